"""Where things stand in the comprehensive map: lanes (a column per GPU) and sections (a band per layer) with their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from planc.graph import OpBlock
from planc.graph.expand import shown_tensor
from planc.render.filters import Filter
from planc.render.folding import micro_batches_alike
from planc.render.text import text_width
from planc.verify import VerifiedPlan

SIZE, LANE_SIZE, HEADING = 9.0, 10.0, 11.0  #: px of text in the map, of GPU labels, of headings
MARGIN = 16.0
GUTTER = 7.0  #: free on each side of a lane's shapes, for lines that skip rows
OP_HEIGHT, BAR_HEIGHT, BUS_HEIGHT = 13.0, 14.0, 28.0
#: between two compute rows; beside a communication row, where the dashes of a line must show; above and below a band
NEAR, APART, ENTRY, EXIT = 7.0, 12.0, 10.0, 5.0
NODE_GAP, PANEL_GAP, LABEL = 30.0, 36.0, 52.0
OUTSIDE = -1  #: stands for the row of an op in an earlier or later section

SHORT = {
    "input": "input", "embed": "emb", "attn_qkv": "qkv", "attn_core": "core", "attn_out": "out",
    "residual_add": "add", "dense_up": "up", "dense_down": "down", "gate": "gate", "shared_up": "sh up",
    "shared_down": "sh dn", "aggregate": "agg", "pp_send": "send", "pp_recv": "recv", "lm_head": "head",
    "sample": "samp", "output_collect": "collect",
}  # fmt: skip


class Panel(NamedTuple):
    """The shown lanes of one EP group, with the names of their rows at the left."""

    replica: int
    stage: int
    left: float
    first: float
    end: float
    ranks: tuple[int, ...]


class NodeSpan(NamedTuple):
    """Neighbouring lanes of one node; ``label`` names it, and its GPUs where the cluster has several kinds."""

    label: str
    left: float
    end: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Lanes:
    """``left``: rank -> x of its lane, in rank order. ``shape`` is the width of an op, ``pitch`` that of a lane."""

    left: dict[int, float]
    panels: tuple[Panel, ...]
    spans: tuple[NodeSpan, ...]
    pitch: float
    shape: float
    width: float

    def bar(self, ranks: Sequence[int]) -> tuple[float, float]:
        """Left and right end of a bar over those of ``ranks`` that are shown."""
        places = [self.left[r] for r in ranks if r in self.left]
        return places[0] + 2, places[-1] + self.pitch - 2

    def centre(self, rank: int) -> float:
        """Middle of a lane."""
        return self.left[rank] + self.pitch / 2


NO_LANES = Lanes({}, (), (), 0.0, 0.0, 0.0)


class Wire(NamedTuple):
    """An edge block between rows of a section; `OUTSIDE` where the other end is in another section."""

    source: int
    target: int
    edge: int


@dataclass(frozen=True)
class Section:
    """A band of the map: one layer, or ops before, between and after the layers. ``blocks`` are its rows."""

    name: str
    label: str
    kind: str
    layer: int | None
    blocks: tuple[int, ...]
    wires: tuple[Wire, ...]


class Row(NamedTuple):
    """Where a row lies in its band. ``bus`` is the y of a line across lanes above it, if it has one."""

    top: float
    bottom: float
    bus: float | None


def make_lanes(plan: VerifiedPlan, keep: Filter, names: float) -> Lanes:
    """Lanes of the kept ranks. ``names`` is the width that row names need left of every panel."""
    par = plan.parallelism
    ranks = np.flatnonzero(keep.ranks(plan)).tolist()
    node_of = plan.spec.cluster.node_of_rank
    shape = _shape_width(plan)
    pitch = math.ceil(max(shape + 2 * GUTTER, text_width(f"GPU {par.world_size - 1}", LANE_SIZE, bold=True) + 4))
    x, left, panels, spans = MARGIN, {}, [], []
    for group, members in groupby(ranks, lambda r: r // par.ep):
        start, inside = x, list[int]()
        x += math.ceil(LABEL + names + 10)
        first = x
        for node, lanes in groupby(members, lambda r: int(node_of[r])):
            own, begin = tuple(lanes), x
            for rank in own:
                left[rank], x = x, x + pitch
            label = _node_label(plan, node, own[0])
            spans.append(NodeSpan(label, begin, x, own))
            inside += own
            x = math.ceil(max(x, begin + text_width(label, HEADING, bold=True) + 8) + NODE_GAP)
        x -= NODE_GAP
        panels.append(Panel(group // par.pp, group % par.pp, start, first, x, tuple(inside)))
        x += PANEL_GAP
    return Lanes(left, tuple(panels), tuple(spans), pitch, shape, x - PANEL_GAP + MARGIN)


def _node_label(plan: VerifiedPlan, node: int, rank: int) -> str:
    cluster = plan.spec.cluster
    kind = f" · {cluster.groups[cluster.group_of_rank[rank]].gpu.name}" if len(cluster.groups) > 1 else ""
    return f"node {node}{kind}"


def _shape_width(plan: VerifiedPlan) -> float:
    """Wide enough for the longest expert id in an ellipse, and for the short names of ops."""
    widest = max((int(part.expert.max()) for part in plan.placement.layers.values()), default=0)
    return max(36.0, text_width(f"E{widest}", SIZE) / 0.8 + 2)


def make_sections(plan: VerifiedPlan, keep: Filter) -> tuple[list[Section], bool]:
    """The bands from top to bottom, and whether like micro-batches are drawn once."""
    blocks, kept = plan.blocks.blocks, keep.ops(plan)
    first_op = plan.blocks.first_op
    batches = plan.spec.workload.micro_batches
    folded = batches > 1 and micro_batches_alike(plan)
    chosen = [
        i
        for i, block in enumerate(blocks)
        if kept[first_op[i] : first_op[i + 1]].any() and not (folded and block.micro_batch)
    ]
    groups = [tuple(g) for _, g in groupby(chosen, lambda i: (blocks[i].micro_batch, blocks[i].layer))]
    place = {block: (s, row) for s, group in enumerate(groups) for row, block in enumerate(group)}
    wires: list[list[Wire]] = [[] for _ in groups]
    for number, edge in enumerate(plan.blocks.edges):
        if edge.source in place and edge.target in place:
            (a, source), (b, target) = place[edge.source], place[edge.target]
            if a == b:
                wires[a].append(Wire(source, target, number))
            else:
                wires[a].append(Wire(source, OUTSIDE, number))
                wires[b].append(Wire(OUTSIDE, target, number))
    heads = _headings(plan, groups, batches > 1 and not folded)
    return [Section(*head, g, tuple(w)) for head, g, w in zip(heads, groups, wires, strict=True)], folded


def _headings(
    plan: VerifiedPlan, groups: list[tuple[int, ...]], several: bool
) -> list[tuple[str, str, str, int | None]]:
    """Id, label, kind and layer of each section; ids are unique."""
    found, seen = [], dict[str, int]()
    for group in groups:
        block = plan.blocks.blocks[group[0]]
        batch = f"m{block.micro_batch}." if several and block.name.startswith("m") else ""
        if block.layer is not None:
            kind = "MoE" if block.layer in plan.placement.layers else "dense"
            name = label = f"L{block.layer}"
        else:
            kind = {"pp_send": "hand-over", "pp_recv": "hand-over", "input": "start", "embed": "start"}.get(
                block.kind, "end"
            )
            name, label = {"hand-over": ("pp", "pp"), "start": ("start", "input"), "end": ("end", "output")}[kind]
        count = seen[batch + name] = seen.get(batch + name, 0) + 1
        found.append((batch + name + (f".{count}" if count > 1 else ""), label, kind, block.layer))
    return found


def make_rows(plan: VerifiedPlan, section: Section) -> tuple[list[Row], float]:
    """Rows of a section, and its height."""
    crossing = {w.target for w in section.wires if plan.blocks.edges[w.edge].pattern != "rank"}
    rows: list[Row] = []
    y, before = ENTRY, False
    for number, index in enumerate(section.blocks):
        collective, bus = plan.blocks.blocks[index].collective, None
        if number:
            y += APART if collective or before or number in crossing else NEAR
        if number in crossing:
            bus, y = y + BUS_HEIGHT / 2 - 4, y + BUS_HEIGHT
        rows.append(Row(y, y + (BAR_HEIGHT if collective else OP_HEIGHT), bus))
        y, before = rows[-1].bottom, collective
    return rows, y + (APART if before else EXIT)


def row_name(block: OpBlock) -> str:
    """``expert.s0 [16-17, 7168] bf16 S(experts)``: the block's name in its layer, and the tensor that stands for it."""
    return f"{block_stem(block)} {tensor_text(block)}".rstrip()


def block_stem(block: OpBlock) -> str:
    """The block's name without micro-batch and layer."""
    name = block.name.removeprefix(f"m{block.micro_batch}.")
    return name if block.layer is None else name.removeprefix(f"L{block.layer}.")


def tensor_text(block: OpBlock, op: int | None = None) -> str:
    """The tensor that stands for a block; the rows of one op, or the range over all."""
    tensor = shown_tensor(block)
    if tensor is None:
        return ""
    if block.rows is None:
        return tensor.text()
    if op is not None:
        return tensor.text(int(block.rows[op]))
    low, high = int(block.rows.min()), int(block.rows.max())
    return tensor.text(low) if low == high else tensor.text().replace("[m", f"[{low}-{high}", 1)
