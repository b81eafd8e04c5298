"""One layer of the simplified figure: attention in a column at the left, dense MLP or experts at the right.

Every edge of the compact graph between two drawn blocks is drawn, so nothing is left out inside a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from planc.graph import EdgeBlock, OpBlock, PlanGraph, TensorType, range_text
from planc.placement import copy_tokens
from planc.render.style import comm_of
from planc.render.text import named, numbers_text, text_width, tokens_text
from planc.render.view import SIZE, SKEW, Edge, Frame, Label, Node, Point, frame, node
from planc.verify import VerifiedPlan

LANE = 28.0  #: where the residual stream runs down the page, left of the layers' frames
FRAME_X, FRAME_WIDTH = 42.0, 922.0
RESIDUAL = 56.0  #: inside the frame: past the attention
ATTENTION, NODE_WIDTH, NODE_HEIGHT, ROW = 158.0, 176.0, 42.0, 68.0
MID, GATE_LANE = 352.0, 366.0  #: past the experts: the residual, and the gate's weights
MAX_TURNS = 3  #: experts of one GPU drawn below each other; of more, those between the first and the last share a shape
FIRST = 380.0  #: where the right part begins
SHARED = 854.0


@dataclass
class Sheet:
    """A figure in the making: what was placed so far, block by block."""

    plan: VerifiedPlan
    y: float
    placed: dict[int, list[Node]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)  #: tokens of the experts that a node stands for

    @property
    def graph(self) -> PlanGraph:
        """The plan's compact graph."""
        return self.plan.blocks

    def put(self, block: int, middle: float, y: float, width: float = NODE_WIDTH, lines: tuple[str, ...] = ()) -> Node:
        """Place one block as one node."""
        made = block_node(self.plan, block, middle - width / 2, y, width, lines)
        self.placed.setdefault(block, []).append(made)
        self.nodes.append(made)
        return made


def replica_ranks(plan: VerifiedPlan, block: OpBlock) -> np.ndarray:
    """Ranks of the block's ops in replica 0, int32 [ops, group]."""
    return block.ranks[block.ranks[:, 0] < plan.parallelism.replica_size]


def block_node(plan: VerifiedPlan, number: int, x: float, y: float, width: float, lines: tuple[str, ...] = ()) -> Node:
    """All ops of a block in replica 0 as one node."""
    block = plan.blocks.blocks[number]
    ranks = replica_ranks(plan, block)
    flat = sorted(ranks.reshape(-1).tolist())
    where = named("GPU", flat)
    if len(ranks) > 1 and ranks.shape[1] > 1:
        where = f"{len(ranks)} groups of {ranks.shape[1]} GPUs"
    lines = lines or (block.kind, where)
    place = {"gpu": str(flat[0])} if len(flat) == 1 and not block.collective else {"ranks": range_text(flat)}
    attributes = {"layer": str(block.layer)} if block.layer is not None else {}
    tensor = next(iter([*block.writes.values(), *block.reads.values()]))
    attributes |= place | {"tensor": tensor.text(), "dtype": tensor.dtype}
    tooltip = f"{block.kind}: {len(ranks)} op{'s' if len(ranks) > 1 else ''} on {named('GPU', flat)}"
    return node(
        f"{block.name}.r{range_text(flat)}", block.kind, lines, x, y, width, NODE_HEIGHT, tooltip=tooltip,
        attributes=attributes, comm=comm_of(block.kind),
    )  # fmt: skip


# --- placing --------------------------------------------------------------------------------------------------------


def draw_layer(sheet: Sheet, layer: int, title: str, note: str) -> None:
    """Place the blocks of a layer in a frame, and the edges inside it."""
    members = [
        i for i, b in enumerate(sheet.graph.blocks) if b.layer == layer and b.micro_batch == 0
    ]  # fmt: skip
    kinds = [sheet.graph.blocks[i].kind for i in members]
    cut = kinds.index("residual_add") + 1
    top, first = sheet.y, sheet.y + 44
    for row, block in enumerate(members[:cut]):
        sheet.put(block, ATTENTION, first + row * ROW)
    bottom = first + (cut - 1) * ROW + NODE_HEIGHT
    right = members[cut:]
    if "gate" in kinds:
        bottom = max(bottom, _experts_part(sheet, right, first))
    else:
        for row, block in enumerate(right):
            sheet.put(block, (FIRST + FRAME_X + FRAME_WIDTH) / 2, first + row * ROW)
        bottom = max(bottom, first + (len(right) - 1) * ROW + NODE_HEIGHT)
    sheet.frames.append(frame(f"layer{layer}", title, FRAME_X, top, FRAME_WIDTH, bottom + 16 - top, note))
    sheet.y = bottom + 16
    inside = set(members)
    for edge in sheet.graph.edges:
        if edge.source in inside and edge.target in inside:
            known = {(e.source, e.target) for e in sheet.edges}
            found = layer_edges(sheet, edge, first - 16)
            sheet.edges += [e for e in found if (e.source, e.target) not in known]


def _experts_part(sheet: Sheet, members: Sequence[int], first: float) -> float:
    """Gate, dispatch, experts, combine, aggregate below each other, shared experts beside them; returns the bottom."""
    blocks = sheet.graph.blocks
    shared = [i for i in members if "shared" in blocks[i].name]
    main = [i for i in members if i not in shared]
    experts = [i for i in main if blocks[i].kind == "expert"]
    last = 676.0 if shared else 836.0
    middle, width, y = (FIRST + last) / 2, last - FIRST, first
    for block in main:
        kind = blocks[block].kind
        if kind == "expert":
            if block == experts[0]:
                y = _experts(sheet, experts, y + 4, FIRST, last) + 30
        elif kind == "all_reduce" and any(m in sheet.placed and blocks[m].kind == kind for m in main):
            sheet.placed[block] = [n for m in main for n in sheet.placed.get(m, []) if n.kind == kind][:1]
        else:
            wide = width if kind in ("dispatch", "combine", "all_reduce") else NODE_WIDTH
            sheet.put(block, middle, y, wide)
            y += ROW
    for row, block in enumerate(shared):
        sheet.put(block, SHARED, first + row * (ROW + 12) + 20, 132)
    return y - ROW + NODE_HEIGHT


def _experts(sheet: Sheet, blocks: Sequence[int], y: float, x: float, end: float) -> float:
    """The experts of replica 0, a row per turn: those of the first GPUs, one ×N for the rest, and the last."""
    plan, width = sheet.plan, sheet.plan.parallelism.expert_tp
    layer = sheet.graph.blocks[blocks[0]].layer
    assert layer is not None
    part, tokens = plan.placement.layers[layer], copy_tokens(plan.spec, plan.parallelism, plan.placement, layer)
    base = int(replica_ranks(plan, sheet.graph.blocks[blocks[0]]).min()) - int(part.rank.min())
    holders = np.unique(part.rank)
    widest = text_width(tokens_text(int(tokens.min()), int(tokens.max())), SIZE)
    room = 5 if end > 700 and widest < 52 else 3
    groups = [holders[i : i + 1] for i in range(len(holders))]
    if len(groups) > room:
        groups = [*groups[: room - 2], holders[room - 2 : -1], holders[-1:]]
    pitch = (end - x) / len(groups)
    turns = [[slot] for slot in range(len(blocks))]
    if len(turns) > MAX_TURNS:
        turns = [turns[0], [slot for (slot,) in turns[1:-1]], turns[-1]]
    for slots in turns:
        for column, group in enumerate(groups):
            chosen = np.flatnonzero(np.isin(part.slot, slots) & np.isin(part.rank, group))
            if len(chosen):
                ranks = [int(r) + base + i for r in sorted(part.rank[chosen].tolist()) for i in range(width)]
                facts = part.expert[chosen].tolist(), ranks, tokens[chosen].tolist()
                size = min(pitch - 18, 120.0)
                left = x + (column + 0.5) * pitch - size / 2
                made = _expert(sheet.graph.blocks[blocks[slots[0]]], *facts, left, y, size)
                sheet.nodes.append(made)
                sheet.rows[made.id] = facts[2]
                for slot in slots:
                    sheet.placed.setdefault(blocks[slot], []).append(made)
        y += 64 + 26
    return y - 26


def _expert(
    block: OpBlock, experts: list[int], ranks: list[int], tokens: list[int], x: float, y: float, width: float
) -> Node:
    """One expert, or a run of them as ×N; experts of one block with like token counts are alike."""
    low, high = min(tokens), max(tokens)
    count = tokens_text(low, high)
    lines = (f"E{experts[0]}", named("GPU", ranks), count)
    if len(experts) > 1:
        alike = f"×{len(experts)}" if low == high else f"… {len(experts)}"
        ids = f"E{numbers_text(sorted(experts))}"
        ids = ids if text_width(ids, SIZE) < width - 8 else f"E{min(experts)} … E{max(experts)}"
        lines = (alike, ids, count)
    tensor = block.reads["tokens"]
    place = {"gpu": str(ranks[0])} if len(ranks) == 1 else {"ranks": range_text(ranks)}
    attributes = {"layer": str(block.layer), **place, "expert": range_text(sorted(experts)), "dtype": tensor.dtype}
    attributes["tensor"] = tensor.text(low if low == high else None)
    tooltip = f"{named('expert', sorted(experts))} · {named('GPU', ranks)} · {count} each"
    id = f"{block.name}.r{range_text(ranks)}"
    return node(id, "expert", lines, x, y, width, 64, tooltip=tooltip, attributes=attributes)


# --- edges ----------------------------------------------------------------------------------------------------------


def _leaning(n: Node, shift: float) -> Point:
    """A point on the left side of a parallelogram, ``shift`` px below the middle."""
    return n.x + SKEW * (0.5 - shift / n.height), n.y + n.height / 2 + shift


def layer_edges(sheet: Sheet, edge: EdgeBlock, over: float) -> list[Edge]:
    """The drawn edges of an edge block inside a layer; ``over`` is the level above the right part."""
    a, b = sheet.graph.blocks[edge.source], sheet.graph.blocks[edge.target]
    made = []
    for m, source in enumerate(sheet.placed[edge.source]):
        for n, target in enumerate(sheet.placed[edge.target]):
            if a.kind == "expert" == b.kind:
                if source.top[0] == target.top[0] and source is not target:
                    made.append(Edge(source.id, target.id, (source.bottom, target.top), None, "", "order", 0))
                continue
            points = _points(source, target, a, b, over)
            label = _label(edge, points, a, b, source, target) if (m, n) == (0, 0) else None
            rows = sheet.rows.get(source.id) or sheet.rows.get(target.id)
            made.append(drawn_edge(edge, source, target, points, label, rows))
    if b.kind == "expert" and b.slot == 0 and a.kind == "dispatch":
        sheet.labels += _beside(sheet.placed[edge.source][0], b, edge.tensor, 1)
    elif a.kind == "expert" and b.collective and a.slot == 0:
        sheet.labels += _beside(sheet.placed[edge.target][0], a, edge.tensor, -1)
    elif "shared" in a.name and "shared" in b.name:
        source = sheet.placed[edge.source][0]
        sheet.labels += _two_lines(edge.tensor.text(), source.bottom[0] + 8, source.bottom[1] + 19)
    return made


def drawn_edge(
    edge: EdgeBlock,
    source: Node,
    target: Node,
    points: Sequence[Point],
    label: Label | None,
    rows: Sequence[int] | None = None,
) -> Edge:
    """An edge with the tensor and bytes of one op, or of the experts with these ``rows``."""
    alike = rows is not None and len(set(rows)) == 1
    tensor = edge.tensor.text(rows[0] if rows is not None and alike else None)
    size = edge.tensor.row_bytes * (1 if rows is None else sum(rows))
    return Edge(source.id, target.id, tuple(points), label, edge.comm, tensor, size)


def _points(s: Node, t: Node, a: OpBlock, b: OpBlock, over: float) -> list[Point]:
    """The way from one op of a layer to another."""
    if "expert" in (a.kind, b.kind):
        return _expert_points(s, t)
    if a.kind == "residual_add" and b.kind in ("dense_up", "gate", "shared_up"):
        return [s.right, (MID, s.right[1]), (MID, over), (t.top[0], over), t.top]
    if a.kind == "residual_add":
        end = _leaning(t, 8) if t.shape == "parallelogram" else t.left
        return [s.right, (MID, s.right[1]), (MID, end[1]), end]
    if a.kind == "gate" and b.kind == "aggregate":
        start, end = s.left, _leaning(t, -8)
        return [start, (GATE_LANE, start[1]), (GATE_LANE, end[1]), end]
    if "shared" in a.name and b.kind == "aggregate":
        return [s.bottom, (s.bottom[0], t.right[1]), t.right]
    x = s.bottom[0] if s.width <= t.width else t.top[0]
    return [(x, s.y + s.height), (x, t.y)]


def _expert_points(s: Node, t: Node) -> list[Point]:
    """Straight down, or past the experts of the other turns through the gaps between the columns."""
    expert, bar = (s, t) if s.kind == "expert" else (t, s)
    x = expert.top[0]
    if s is bar and t.y - (s.y + s.height) > 60:
        lane = expert.x + expert.width + 6
        return [(lane, s.y + s.height), (lane, expert.right[1]), expert.right]
    if t is bar and t.y - (s.y + s.height) > 60:
        lane = expert.x - 6
        return [expert.left, (lane, expert.left[1]), (lane, t.y)]
    return [(x, s.y + s.height), (x, t.y)]


def _label(edge: EdgeBlock, points: Sequence[Point], a: OpBlock, b: OpBlock, s: Node, t: Node) -> Label | None:
    """The tensor beside the edge; edges that carry what a labelled one beside them carries have none."""
    text = edge.tensor.text(_alike(a) or _alike(b))
    beside = "expert" in (a.kind, b.kind) or ("shared" in a.name and "shared" in b.name)
    if beside or (a.kind == "residual_add" and b.kind not in ("gate", "dense_up")):
        return None
    if a.kind == "gate" and b.kind == "aggregate":
        return None
    if "shared" in a.name and b.kind == "aggregate":
        return Label(text, s.bottom[0] - 8, t.right[1] - 6, "end")
    if a.kind == "residual_add":
        return Label(text, t.top[0] + 8, t.y - 4)
    (x, y), (_, end) = points[0], points[-1]
    return Label(text, x + 8, (y + end) / 2 + 4)


def _beside(bar: Node, block: OpBlock, tensor: TensorType, way: int) -> list[Label]:
    """What one expert gets or gives, right of the bar and level with the gap below (1) or above it (-1)."""
    level = bar.y + bar.height + 17 if way > 0 else bar.y - 15
    return _two_lines(tensor.text(_alike(block)), bar.x + bar.width + 8, level)


def _alike(block: OpBlock) -> int | None:
    """The row count of the block's ops, where all have the same."""
    same = block.rows is not None and int(block.rows.min()) == int(block.rows.max())
    return int(block.rows[0]) if block.rows is not None and same else None


def _two_lines(text: str, x: float, level: float) -> list[Label]:
    """A tensor as its shape and, below it, its type and layout."""
    shape, _, rest = text.partition("] ")
    return [Label(shape + "]", x, level - 3), Label(rest, x, level + 11)]
