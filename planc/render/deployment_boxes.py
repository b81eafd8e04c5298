"""Boxes of GPUs for the deployment figure: TP groups or nodes of them, before dispatch and as holders of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planc.placement import copy_tokens
from planc.render.folding import lane_classes
from planc.render.grid import GAP, centred
from planc.render.text import named, numbers_text, text_width, tokens_text
from planc.render.view import SIZE, Node, node
from planc.units import format_bytes
from planc.verify import VerifiedPlan

COLUMNS = 4
_ROOM = 190.0  #: px of bold text in a box of a holder
MAX_BOXES = 16  #: of GPUs in one stage; of more, the first ones, a fold and the last


@dataclass(frozen=True, slots=True)
class Unit:
    """GPUs drawn as one box: a TP group, or a node of TP groups; ``proof`` is set where it stands for several."""

    ranks: range
    count: int = 1
    proof: str = ""


def nodes_of(plan: VerifiedPlan, ranks: Sequence[int]) -> list[int]:
    """Nodes that a run of ranks touches."""
    found = plan.spec.cluster.node_of_rank[ranks[0] : ranks[-1] + 1]
    return list(range(int(found[0]), int(found[-1]) + 1))


def units_of(plan: VerifiedPlan, ranks: range) -> list[Unit]:
    """TP groups of a stage, or nodes of them when there are many; runs of more than fit are folded where proven."""
    par = plan.parallelism
    width = par.tp
    sizes = np.unique(np.bincount(plan.spec.cluster.node_of_rank[ranks.start : ranks.stop])[nodes_of(plan, ranks)[0] :])
    per_node = int(sizes[0])
    if (
        (par.tp == 1 or par.attention_dp > MAX_BOXES)
        and len(sizes) == 1
        and per_node % par.tp == 0 == par.ep % per_node
    ):
        width = per_node
    units = [Unit(range(r, r + width)) for r in range(ranks.start, ranks.stop, width)]
    if len(units) <= MAX_BOXES:
        return units
    kept = 2 * COLUMNS - 2
    hidden = units[kept:-1]
    classes = lane_classes(plan, width)[ranks.start // width :][kept : len(units)]
    alike = len(set(classes[:-1].tolist())) == 1
    fold = Unit(
        range(hidden[0].ranks.start, hidden[-1].ranks.stop), len(hidden), "alike (proven)" if alike else "not all alike"
    )
    return [*units[:kept], fold, units[-1]]


@dataclass(frozen=True, slots=True)
class Box:
    """Words and facts of one box."""

    id: str
    kind: str
    lines: tuple[str, ...]
    attributes: dict[str, str]
    facts: tuple[str, int]


def placed(boxes: Sequence[Box], top: float, first: float, pitch: float) -> list[list[Node]]:
    """The boxes in rows of `COLUMNS`, the first column beginning at ``first``."""
    rows: list[list[Node]] = []
    width, height = pitch - 12, max(len(b.lines) for b in boxes) * 14 + 12
    for i in range(0, len(boxes), COLUMNS):
        part = boxes[i : i + COLUMNS]
        y = top + len(rows) * (height + GAP)
        row = []
        for b, x in zip(part, centred(len(part), COLUMNS, first, pitch), strict=True):
            text = ", ".join(b.lines)
            row.append(
                node(b.id, b.kind, b.lines, x - width / 2, y, width, height, attributes=b.attributes, tooltip=text)
            )
        rows.append(row)
    return rows


def _folded(unit: Unit) -> str:
    return f"×{unit.count} {unit.proof}" if "proven" in unit.proof else f"… {unit.count} more, {unit.proof}"


def _nodes_text(plan: VerifiedPlan, unit: Unit) -> str:
    return named("node", nodes_of(plan, unit.ranks))


def _gpus_text(plan: VerifiedPlan, unit: Unit) -> str:
    """The unit's GPUs, and what they are where the cluster has several kinds."""
    cluster, text = plan.spec.cluster, named("GPU", unit.ranks)
    if len(cluster.groups) == 1:
        return text
    kinds = {cluster.groups[g].gpu.name for g in cluster.group_of_rank[unit.ranks.start : unit.ranks.stop].tolist()}
    return f"{text} · {', '.join(sorted(kinds))}"


def group_box(plan: VerifiedPlan, unit: Unit, stage: int) -> Box:
    """TP groups: where they are, their share of the tokens, what they reduce."""
    par = plan.parallelism
    first = (unit.ranks.start - stage * par.ep) // par.tp
    groups = range(first, first + len(unit.ranks) // par.tp)
    reduced = next(b for b in plan.blocks.blocks if b.kind == "attn_out").writes["y"]
    gate = next((b for b in plan.blocks.blocks if b.kind == "gate"), None)
    sent = reduced if gate is None else gate.writes["tokens"]
    facts = (sent.text(), sent.row_bytes * (len(unit.ranks) if not par.leaders_gate else len(groups)))
    tokens = tokens_text(plan.tokens.group) + (" each" if len(groups) > 1 else "")
    reduce = f"TP all-reduce {format_bytes(reduced.row_bytes)}"
    if len(groups) == 1 and par.tp > 1:
        title, where = f"TP group {first} · {_gpus_text(plan, unit)}", _nodes_text(plan, unit)
        lines = [title, f"{where} · attention DP {first}", f"{tokens} · {reduce}"]
    else:
        title = f"{_nodes_text(plan, unit)} · {len(groups)} TP groups of {par.tp}"
        lines = [title, _gpus_text(plan, unit), f"attention DP {numbers_text(groups)}"]
        lines.append(f"{tokens} · {reduce}" if par.tp > 1 else tokens)
    if unit.count > 1:
        lines = [_folded(unit), *lines]
    attributes = {"ranks": f"{unit.ranks[0]}-{unit.ranks[-1]}", "tensor": facts[0]}
    return Box(f"S{stage}.tp_group.r{unit.ranks[0]}-{unit.ranks[-1]}", "tp_group", tuple(lines), attributes, facts)


def holder_box(plan: VerifiedPlan, unit: Unit, layers: Sequence[int]) -> Box:
    """Expert holders: which experts of the stage's layers, and the tokens each of them gets."""
    par = plan.parallelism
    stage = par.stage_of_layer(layers[0])
    low, high = unit.ranks.start - stage * par.ep, unit.ranks.stop - stage * par.ep
    experts: dict[int, list[int]] = {}
    counts: list[int] = []
    most = 0
    for layer in layers if len({id(plan.placement.layers[i]) for i in layers}) > 1 else layers[:1]:
        part = plan.placement.layers[layer]
        here = (part.rank + par.expert_tp > low) & (part.rank < high)
        experts[layer] = sorted(set(part.expert[here].tolist()))
        own = copy_tokens(plan.spec, par, plan.placement, layer)[here].tolist()
        counts, most = counts + own, max(most, sum(own))
    tensor = next(b for b in plan.blocks.blocks if b.kind == "dispatch").writes["tokens"]
    words = _held(experts, len(layers))
    lines = [*([_folded(unit)] if unit.count > 1 else []), words]
    lines.append(f"{_nodes_text(plan, unit)} · {_gpus_text(plan, unit)}")
    turns = max(plan.placement.layers[layer].rounds for layer in layers)
    if counts:
        turn = f", {turns} turns" if turns > 1 else ""
        lines.append(f"{tokens_text(min(counts), max(counts))} an expert{turn}")
    attributes = {"ranks": f"{unit.ranks[0]}-{unit.ranks[-1]}", "tensor": tensor.text(), "expert": words}
    facts = tensor.text(), most * tensor.row_bytes
    return Box(
        f"S{stage}.experts.r{unit.ranks[0]}-{unit.ranks[-1]}",
        "holder",
        tuple(lines),
        attributes,
        facts,
    )


def _held(experts: dict[int, list[int]], layers: int) -> str:
    """``experts 0–7`` where all layers agree; else by layer, or where that is too long how many of each layer."""
    first = next(iter(experts.values()))
    if all(ids == first for ids in experts.values()):
        if first:
            return named("expert", first)
        return "no expert" if len(experts) == 1 else f"no expert of {layers} layers"
    text = ", ".join(f"L{layer} E{numbers_text(ids)}" for layer, ids in experts.items() if ids)
    if text_width(text, SIZE, bold=True) <= _ROOM:
        return text
    sizes = [len(ids) for ids in experts.values()]
    low, high = min(sizes), max(sizes)
    count = str(low) if low == high else f"{low}–{high}"
    return f"{count} expert{'s' if high > 1 else ''} of each of {layers} layers"
