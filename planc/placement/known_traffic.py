"""The policy `topology`: expert placement for known traffic and the links that it takes, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import isclose
from pathlib import Path

import numpy as np

from planc.diagnostics import Diagnostic, PlancError
from planc.placement.degrees import Placed
from planc.placement.expert_map import named_at, spec_map
from planc.placement.experts import Placement, placement_of
from planc.placement.memory import memory_table
from planc.placement.mesh import Parallelism, step_tokens
from planc.planner import Certificate, Fabric, Group, Problem, Width, certificate, plan_groups, tables_of
from planc.planner.layer import MODES
from planc.planner.objectives import layer_links
from planc.planner.plan import cut_samples, layer_sample
from planc.planner.tables import table_of
from planc.routing import Expected, Skew, Traffic, generated, load_traffic
from planc.spec import ExpertRule, Spec
from planc.spec.deployment import TrafficSpec
from planc.spec.model import Moe, expert_parameters
from planc.topology import topology

Progress = Callable[[int, int], None]


def place_for_traffic(spec: Spec, placed: Placed, *, workers: int = 1, progress: Progress | None = None) -> Placed:
    """The same degrees with the experts of every layer placed for the spec's traffic (uniform where it gives none).

    Every replica gets the placement that is planned on the links of the first. Raises PlancError for traffic files that
    cannot be used (PLN021 to PLN023) and a current map that does not fit (PLN024, PLN025).
    """
    moe = spec.model.moe
    if moe is None:
        return placed
    par = placed.par
    main = spec_traffic(spec, par, spec.traffic or TrafficSpec(), "traffic")
    scenarios = [spec_traffic(spec, par, part, f"scenarios.{key}") for key, part in spec.scenarios.items()]
    groups = list(groups_of(spec, par, _current_map(spec, par)))
    planned = plan_groups(groups, main, scenarios, top_k=moe.top_k, workers=workers, progress=progress)
    sources = par.attention_dp if par.leaders_gate else par.ep
    record = certificate(
        planned,
        main,
        scenarios,
        layers=spec.model.moe_layer_ids,
        tokens=float(step_tokens(spec, par).source * sources),
        expert_bytes=expert_parameters(spec.model) * spec.model.bytes_of("expert_weights"),
    )
    placement = placement_of(spec, par, tables_of(planned))
    return replace(placed, placement=placement, memory=memory_table(spec, par, placement), certificate=record)


def file_faults(spec: Spec, par: Parallelism) -> list[Diagnostic]:
    """Every fault of the files that the spec names: recordings and the current map."""
    found: list[Diagnostic] = []
    if spec.model.moe is None:
        return found
    asked = [("traffic", spec.traffic), *((f"scenarios.{key}", part) for key, part in spec.scenarios.items())]
    reads: list[Callable[[], object]] = [lambda: _current_map(spec, par)]
    for path, part in asked:
        if part is not None and part.file:
            reads.append(partial(spec_traffic, spec, par, part, path))
    for read in reads:
        try:
            read()
        except PlancError as error:
            found += error.diagnostics
    return found


def spec_traffic(spec: Spec, par: Parallelism, asked: TrafficSpec, path: str) -> Traffic:
    """The traffic that a spec names or describes, for the model's MoE layers. Raises PlancError at the spec's ``path``."""
    model, moe = spec.model, spec.model.moe
    assert moe is not None
    if not asked.file:
        return generated(
            skew_of(asked, moe),
            tokens=asked.tokens,
            layers=len(model.moe_layer_ids),
            experts=moe.experts,
            top_k=moe.top_k,
            sources=par.attention_dp if par.leaders_gate else par.ep,
            seed=asked.seed,
        )
    expected = Expected(model.layers, model.moe_layer_ids, moe.experts, moe.top_k, model.name)
    try:
        return load_traffic(spec.folder / asked.file, expect=expected)
    except PlancError as error:
        raise named_at(spec, f"{path}.file", error) from None


def skew_of(asked: TrafficSpec, moe: Moe) -> Skew:
    """The skew that a spec's generator has, with the group limits of the model's gate."""
    return Skew(asked.popularity, asked.exponent, asked.topics, asked.strength, moe.groups, moe.top_groups)


def groups_of(spec: Spec, par: Parallelism, current: np.ndarray | None) -> Iterator[Group]:
    """One group per pipeline stage that has MoE layers, on the first replica's ranks. ``current``: the slot tables that
    run now, int32 [MoE layers, holders, slots]."""
    moe = spec.model.moe
    assert moe is not None
    links = topology(spec.cluster)
    together = isinstance(spec.expert_rule, ExpertRule) and spec.expert_rule.scope == "model"
    width = Width(*(spec.model.hidden * spec.model.bytes_of(role) for role in ("dispatch", "combine")))
    ids = spec.model.moe_layer_ids
    for stage, (first, end) in enumerate(par.stages):
        rows = tuple(row for row, layer in enumerate(ids) if first <= layer < end)
        if not rows:
            continue
        ranks = par.stage_ranks(stage)[0].astype(np.int64)
        sources = ranks[:: par.tp] if par.leaders_gate else ranks
        fabric = Fabric(links, sources, ranks.reshape(-1, par.expert_tp))
        slots, copies = _room(spec, par, moe.experts * (len(rows) if together else 1))
        asked = spec.placement
        problem = Problem(
            fabric, moe.experts, slots, copies, width, asked.transfer, asked.objective, asked.seed, moe.groups
        )
        yield Group(problem, rows, together, None if current is None else current[list(rows)])


def _room(spec: Spec, par: Parallelism, needed: int) -> tuple[int, int]:
    """(slots of a holder, copies in all) for so many experts that share slots."""
    rule = spec.expert_rule
    slots = rule.slots_per_gpu if isinstance(rule, ExpertRule) else 1
    slots = max(slots, -(-needed // par.holders))
    copies = min(slots, needed) * par.holders if spec.replicates else needed
    return -(-copies // par.holders), copies


def _current_map(spec: Spec, par: Parallelism) -> np.ndarray | None:
    return spec_map(spec, par, "current") if spec.placement.current else None


def link_faults(
    spec: Spec, par: Parallelism, placement: Placement, record: Certificate, file: str | None = None
) -> tuple[list[Diagnostic], str]:
    """Measure the links of a placement again, from its traffic: (PLN318 for what the certificate says otherwise, what was
    looked at in words). Traffic that was generated is generated again. A recorded file (``file``, or where the spec names
    it) must be the one planned for; without it nothing is measured, which the words say."""
    asked = spec.traffic or TrafficSpec()
    if file is not None:
        asked = TrafficSpec(file=str(Path(file).absolute()))
    try:
        traffic = spec_traffic(spec, par, asked, "traffic")
    except PlancError as error:
        if file is not None:
            raise
        hint = "give the file with --traffic" if asked.file else "is this another version of planc?"
        return [], f"link times not measured again: {error.diagnostics[0].message} ({hint})"
    if traffic.digest != record.traffic.sha256:
        message = f"{asked.file} is not the traffic that was planned for: sha256 {traffic.digest[:12]}, not {record.traffic.sha256[:12]}"
        return [Diagnostic("PLN318", message, "certificate.traffic")], ""
    found = []
    for path, said, follows in _measured(spec, par, placement, record, traffic):
        if not isclose(said, follows, rel_tol=1e-9, abs_tol=1e-15):
            message = f"the file says {said:.9g}, measured again it is {follows:.9g}"
            found.append(
                Diagnostic("PLN318", message, f"certificate.{path}", hint="build the plan again, or undo the edit")
            )
    return found, f"link times of {len(record.layers)} layers measured again on {record.traffic.tokens:,} tokens"


def _measured(
    spec: Spec, par: Parallelism, placement: Placement, record: Certificate, traffic: Traffic
) -> Iterator[tuple[str, float, float]]:
    """(place in the certificate, what it says, what the tokens give), for every layer and for the sums."""
    if not record.traffic.tokens:
        return
    sums = dict.fromkeys(MODES, 0.0)
    most = dict.fromkeys(MODES, 0)
    said = {layer.layer: (number, layer) for number, layer in enumerate(record.layers)}
    scale = record.tokens / record.traffic.tokens
    for group in groups_of(spec, par, None):
        problem = group.problem
        cut = cut_samples(
            traffic, spec.model.moe.top_k if spec.model.moe else 1, len(problem.fabric.sources), record.seed
        )
        for row in group.rows:
            layer = spec.model.moe_layer_ids[row]
            part = placement.layers[layer]
            table = table_of(part.expert, part.rank // par.expert_tp, par.holders, problem.slots)
            tokens = layer_sample(cut, row).all
            for mode in MODES:
                args = problem.fabric, table, tokens.topk, tokens.source, problem.experts
                links = layer_links(*args, mode, problem.width)
                sums[mode] += links.seconds * scale
                most[mode] = max(most[mode], links.most_tokens)
                if mode == record.transfer:
                    number, stated = said[layer]
                    yield f"layers.{number}.seconds", stated.seconds, links.seconds * scale
    for mode in MODES:
        links_said = record.objectives.dedup if mode == "dedup" else record.objectives.direct
        if links_said is None:
            continue
        yield f"objectives.{mode}.seconds", links_said.seconds, sums[mode]
        yield f"objectives.{mode}.most_tokens", links_said.most_tokens, most[mode] * scale
