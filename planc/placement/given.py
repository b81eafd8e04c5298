"""The policy `given`: experts where an expert map has them, such as that of a deployment that runs already."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.placement.degrees import Placed, resolve
from planc.placement.expert_map import map_for, open_map, spec_map
from planc.placement.experts import check_rule, placement_of
from planc.placement.memory import memory_table
from planc.placement.mesh import Parallelism
from planc.placement.overflow import overflow_fault
from planc.spec import ExpertRule, Spec, check_spec

_LONGEST = 1000  #: of the name in a spec: `PlacementSpec.map`


def place_as_given(spec: Spec, placed: Placed) -> Placed:
    """The same degrees with every expert where the map at `placement.map` has it, in every replica.

    Raises PlancError: PLN024 and PLN025 for a map that cannot be used, PLN202 for one that the expert rule does not allow,
    PLN201 where it needs more memory than there is.
    """
    par = placed.par
    tables = spec_map(spec, par, "map")
    found = rule_faults(spec, par, tables)
    if found:
        raise PlancError(found)
    placement = placement_of(spec, par, tables)
    memory = memory_table(spec, par, placement)
    if not memory.fits:
        raise PlancError([overflow_fault(spec, par, placement, memory)])
    return replace(placed, placement=placement, memory=memory)


def with_map(spec: Spec, path: str | Path) -> tuple[Spec, str, list[str]]:
    """(the spec with the map at ``path`` as its placement, the form of the map in words, keys of the spec that were changed so
    that it may be one, in words). A map with more experts on a GPU than the rule allows raises `expert_rule.slots_per_gpu`,
    one with further copies sets `spares: replicate`; ranks that the map tells decide a degree on `auto`.

    Raises PlancError PLN024, PLN025 (also for a map that leaves ``ep`` on `auto` open), and what spec and degrees are refused
    for.
    """
    way = _way(spec, path)
    found, told = open_map(path), ["placement.policy: given"]
    place = spec.placement.model_copy(update={"policy": "given", "map": way, "current": ""})
    degrees, rule = spec.parallelism, spec.expert_rule
    if degrees.ep == "auto" and found.ranks:
        whole = {"expert_tp": 1} if degrees.expert_tp == "auto" else {}  # devices hold experts, not parts of them
        degrees = degrees.model_copy(update={"ep": found.ranks, **whole})
        told += [f"parallelism.ep: {found.ranks}", *(f"parallelism.{key}: {value}" for key, value in whole.items())]
    spec = spec.model_copy(update={"placement": place, "parallelism": degrees})
    faults = check_spec(spec)
    if degrees.ep == "auto" and spec.model.moe is not None:
        message = f"{os.fspath(path)} does not say how many GPUs its slots are on, and parallelism.ep is on auto"
        faults.append(
            spec.fault("PLN025", message, "parallelism.ep", "set parallelism.ep to the GPUs of the EP group that runs")
        )
    if faults:
        raise PlancError(faults)
    if not isinstance(rule, ExpertRule) or rule.scope == "model":
        return spec, found.form, told
    roomy = rule.model_copy(update={"slots_per_gpu": len(found.rows[0]), "spares": "idle"})
    par = resolve(spec.model_copy(update={"expert_rule": roomy})).par
    tables = map_for(spec, par, path)
    slots, copies = needed_rule(tables)
    changes: dict[str, int | str] = {}
    if not _allowed(spec, par, tables):
        changes["slots_per_gpu"] = slots
    if copies and rule.spares == "idle":
        changes["spares"] = "replicate"
    told += [f"expert_rule.{key}: {value}" for key, value in changes.items()]
    return spec.model_copy(update={"expert_rule": rule.model_copy(update=changes)}), found.form, told


def _way(spec: Spec, path: str | Path) -> str:
    """The way from the spec's folder to the map, which a plan names. Raises PlancError PLN024 where it cannot be named."""
    name = os.fspath(path)
    way = os.path.relpath(os.path.realpath(path), os.path.realpath(spec.folder))
    what = ""
    if os.path.lexists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        what, hint = f"{name} is no file", "save the map in a file first"
    elif not name.isprintable():
        what, hint = "the name of the file has unprintable characters", "rename the file"
    elif len(way) > _LONGEST:
        what, hint = f"the way from the spec to the map has {len(way):,} characters", "move the two closer together"
    if what:
        where = Span(ascii(name)[1:-1][:200], 1, 1)
        raise PlancError(
            [Diagnostic("PLN024", f"{what}, and a plan names the map that it was made of", span=where, hint=hint)]
        )
    return way


def file_faults(spec: Spec, par: Parallelism) -> list[Diagnostic]:
    """Every fault of the map that the spec names."""
    try:
        return rule_faults(spec, par, spec_map(spec, par, "map"))
    except PlancError as error:
        return list(error.diagnostics)


def rule_faults(spec: Spec, par: Parallelism, tables: np.ndarray) -> list[Diagnostic]:
    """What of slot tables int32 [MoE layers, holders, slots] the spec does not allow: PLN025 for a GPU with two copies of an
    expert, PLN202 for more experts or copies than its rule has room for."""
    slots, copies = needed_rule(tables)
    rule, name, found = spec.expert_rule, spec.placement.map, []
    twice = _twice(tables)
    if twice:
        layer, holder, expert = twice
        message = f"{name}: holder {holder} has expert {expert} of MoE layer {spec.model.moe_layer_ids[layer]} twice"
        found.append(
            spec.fault("PLN025", message, "placement.map", "a GPU holds one copy of an expert; change the map")
        )
    if isinstance(rule, ExpertRule) and rule.scope == "model":
        message = "an expert map has slots for every layer, and the rule counts experts of all layers together"
        found.append(spec.fault("PLN202", message, "expert_rule.scope", "set expert_rule.scope: layer"))
    elif isinstance(rule, ExpertRule) and not _allowed(spec, par, tables):
        rounds = ", or in rounds as many on every GPU as the layer needs" if rule.on_overflow == "rounds" else ""
        message = f"{name} has {slots} experts of a layer on a GPU; the rule allows {rule.slots_per_gpu}{rounds}"
        found.append(spec.fault("PLN202", message, "expert_rule", f"set expert_rule.slots_per_gpu: {slots}"))
    if copies and not spec.replicates:
        message = f"{name} has further copies of experts, and the rule allows one of each"
        found.append(
            spec.fault(
                "PLN202", message, "expert_rule", f"set expert_rule: {{slots_per_gpu: {slots}, spares: replicate}}"
            )
        )
    return found


def _allowed(spec: Spec, par: Parallelism, tables: np.ndarray) -> bool:
    """Whether a rule of scope `layer` has room for a map: in its slots, or in rounds that differ by one at most."""
    rule, held = spec.expert_rule, (tables >= 0).sum(axis=2)
    assert isinstance(rule, ExpertRule)
    if held.max() <= rule.slots_per_gpu:
        return True
    needed, _ = check_rule(spec, par)
    even = bool((np.ptp(held, axis=1) <= 1).all())
    return rule.on_overflow == "rounds" and even and int(held.max()) <= -(-needed // par.holders)


def needed_rule(tables: np.ndarray) -> tuple[int, bool]:
    """(experts of a layer on the fullest GPU, whether experts have further copies) of slot tables int32 [MoE layers, holders,
    slots]."""
    held = tables >= 0
    copies = any(len(np.unique(table[here])) < int(here.sum()) for table, here in zip(tables, held, strict=True))
    return int(held.sum(axis=2).max()), copies


def _twice(tables: np.ndarray) -> tuple[int, int, int] | None:
    """(row, holder, expert) of the first expert that a holder has twice."""
    ordered = np.sort(tables, axis=2)
    found = np.argwhere((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0))
    if not len(found):
        return None
    row, holder, slot = found[0].tolist()
    return row, holder, int(ordered[row, holder, slot])
