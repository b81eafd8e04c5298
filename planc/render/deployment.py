"""The whole parallel strategy: replicas, stages, EP groups, TP groups with attention DP, and what passes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from planc.graph import OpBlock
from planc.graph.types import Comm
from planc.render.deployment_boxes import COLUMNS, Box, group_box, holder_box, nodes_of, placed, units_of
from planc.render.folding import fold_replicas
from planc.render.grid import ABOVE, GAP, Facts, collected, fed
from planc.render.text import named, tokens_text
from planc.render.view import (
    HEAD,
    MARGIN,
    WIDTH,
    Edge,
    Frame,
    Label,
    Node,
    Point,
    View,
    compose,
    content_top,
    frame,
    node,
)
from planc.units import format_bytes
from planc.verify import VerifiedPlan

NAME = "complete_deployment_dag"
MAX_STAGES = 3  #: drawn; of more, the first two, a box that names the others, and the last
_LEFT, _RIGHT = 11.0, WIDTH - 11  #: page lanes of the replicas that are not drawn
_OUTER, _LANE = 22.0, 31.0  #: the replica's frame, and the lane inside it that leads to the stages
_FRAME_X, _FRAME_WIDTH = 42.0, WIDTH - 84
_IN, _OUT = _FRAME_X + 18, _FRAME_X + _FRAME_WIDTH - 18  #: trunks inside a stage
_FIRST = _IN + 8
_PITCH = (_OUT - 8 - _FIRST) / COLUMNS
_BAR_X, _BAR_WIDTH = _IN - 8, _OUT - _IN + 16


@dataclass
class _Sheet:
    """The figure in the making."""

    plan: VerifiedPlan
    y: float
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def block(self, name: str) -> OpBlock:
        """A block of micro-batch 0 by name."""
        prefix = "m0." if self.plan.spec.workload.micro_batches > 1 else ""
        return self.plan.blocks.blocks[self.plan.blocks.by_name[prefix + name]]


def deployment_view(plan: VerifiedPlan) -> View:
    """The figure; boxes of GPUs are folded only where `lane_classes` proves them alike."""
    par = plan.parallelism
    caption = _caption(plan)
    sheet = _Sheet(plan, content_top(caption))
    split = _entry(sheet)
    top, sheet.y = sheet.y, sheet.y + HEAD + 14
    stages = _stage_list(plan)
    previous: Node = split
    for stage in stages:
        previous = _rest_of_stages(sheet, stage, previous) if len(stage) > 1 else _stage(sheet, stage[0], previous)
    ranks = range(par.replica_size)
    title = f"replica 0 · {named('GPU', ranks)} · {par.pp} stage{'s' if par.pp > 1 else ''} × EP {par.ep} × TP {par.tp}"
    sheet.frames.insert(0, frame("replica0", title, _OUTER, top, WIDTH - 2 * _OUTER, sheet.y + 10 - top))
    sheet.y += 10
    _output(sheet, split, previous)
    title = f"How the plan is deployed · {plan.spec.name}"
    return compose(NAME, title, caption, sheet.nodes, sheet.edges, sheet.frames, sheet.labels)


def _caption(plan: VerifiedPlan) -> str:
    """The strategy in one sentence, and what is folded."""
    par = plan.parallelism
    words = [
        f"{par.world_size} GPUs = DP {par.dp} × PP {par.pp} × EP {par.ep}; TP {par.tp} inside an EP group gives attention "
        f"DP {par.attention_dp}."
    ]
    words.append("GPUs of a stage stand twice: as TP groups before dispatch, as expert holders after it.")
    for first, last, count in fold_replicas(plan):
        if count > 1:
            words.append(f"Replicas {first}–{last} are proven identical (×{count}).")
    if any(len(u.ranks) // u.count != par.tp for u in units_of(plan, range(par.ep))):
        words.append("TP groups are drawn node by node.")
    words.append("Dispatch and combine run once per MoE layer.")
    return " ".join(words)


# --- the parts, from top to bottom ----------------------------------------------------------------------------------------


def _entry(sheet: _Sheet) -> Node:
    """Input and its split over the replicas."""
    plan, y = sheet.plan, sheet.y
    root, split = sheet.plan.blocks.by_name["input"], sheet.plan.blocks.by_name["input_split"]
    tensor, part = plan.blocks.blocks[root].writes["batch"], plan.blocks.blocks[split].writes["x"]
    par = plan.parallelism
    first = node(
        "input.r0", "input", ("input", "GPU 0"), MARGIN, y, 120, 38, attributes={"gpu": "0", "tensor": tensor.text()}
    )
    lines = (
        f"input_split · {par.dp} replica{'s' if par.dp > 1 else ''} × {par.attention_dp} TP group{'s' if par.attention_dp > 1 else ''}",
        f"{part.text()} to each TP group, {tokens_text(plan.tokens.group)}",
    )
    bar = node(
        "input_split", "input_split", lines, 330, y, 400, 38, comm="dp",
        attributes={"ranks": f"0-{par.world_size - 1}", "tensor": part.text(), "dtype": part.dtype},
    )  # fmt: skip
    label = Label(tensor.text(), 233, y + 13, "middle")
    sheet.edges.append(Edge(first.id, bar.id, (first.right, bar.left), label, "dp", tensor.text(), tensor.row_bytes))
    sheet.nodes += [first, bar]
    sheet.y = y + 38 + 30
    return bar


def _stage_list(plan: VerifiedPlan) -> list[list[int]]:
    """Stages to draw; a list of several stands for the ones that are only named."""
    stages = list(range(plan.parallelism.pp))
    if len(stages) <= MAX_STAGES + 1:
        return [[s] for s in stages]
    return [*([s] for s in stages[: MAX_STAGES - 1]), stages[MAX_STAGES - 1 : -1], [stages[-1]]]


def _stage(sheet: _Sheet, stage: int, previous: Node) -> Node:
    """One stage in its frame: TP groups, dispatch, expert holders, combine; returns what hands over."""
    plan, par = sheet.plan, sheet.plan.parallelism
    top = sheet.y
    first, end = par.stages[stage]
    ranks = range(stage * par.ep, (stage + 1) * par.ep)
    title = f"stage {stage} · layers {first}–{end - 1} · EP group of {par.ep}: {named('GPU', ranks)}"
    moe = [layer for layer in plan.placement.layers if first <= layer < end]
    units = units_of(plan, ranks)
    groups, facts = _boxes(sheet, [group_box(plan, u, stage) for u in units], top + HEAD + GAP)
    comm: Comm = "dp" if stage == 0 else "pp" if previous.kind == "fold" else ""
    into = dict.fromkeys(facts, _carried(sheet, stage))
    # a stage of one box needs no trunk beside it
    left, right = (_IN, _OUT) if len(units) > 1 else (groups[0][0].top[0],) * 2
    sheet.edges += fed(previous, groups, left, comm, into, _way(previous, groups, left))
    y = _below(groups)
    if not moe:
        lines = ("residual stream", "of every TP group")
        out = _put(sheet, f"S{stage}.end", "residual_add", lines, y + GAP, {}, "")
    else:
        dispatch = _bar(sheet, "dispatch", moe, y + GAP)
        holders, held = _boxes(sheet, [holder_box(plan, u, moe) for u in units], dispatch.y + dispatch.height + GAP)
        sheet.edges += collected(groups, dispatch, right, "dispatch", facts)
        sheet.edges += fed(dispatch, holders, left, "dispatch", held)
        y = _below(holders)
        out = _bar(sheet, "combine", moe, y + GAP)
        groups, facts = holders, held
    sheet.edges += collected(groups, out, right, "combine" if moe else "", facts)
    sheet.y = out.y + out.height + 12
    note = f"{len(moe)} MoE and {end - first - len(moe)} dense layers"
    sheet.frames.append(frame(f"stage{stage}", title, _FRAME_X, top, _FRAME_WIDTH, sheet.y - top, note))
    return _send(sheet, stage, out) if stage < par.pp - 1 else out


def _boxes(sheet: _Sheet, boxes: Sequence[Box], top: float) -> tuple[list[list[Node]], Facts]:
    rows = placed(boxes, top, _FIRST, _PITCH)
    sheet.nodes += [n for row in rows for n in row]
    return rows, {b.id: b.facts for b in boxes}


def _way(previous: Node, rows: Sequence[Sequence[Node]], trunk: float) -> list[Point]:
    """From what stands above a stage, round its title, to the trunk inside."""
    level = rows[0][0].y - ABOVE
    start = [previous.left] if previous.kind == "pp_recv" else [previous.bottom]
    turn = previous.left[1] if previous.kind == "pp_recv" else previous.y + previous.height + 15
    return [*start, (start[0][0], turn), (_LANE, turn), (_LANE, level), (trunk, level)]


def _below(rows: Sequence[Sequence[Node]]) -> float:
    return max(n.y + n.height for n in rows[-1])


def _carried(sheet: _Sheet, stage: int) -> tuple[str, int]:
    """What each TP group of a stage gets: its share of the input, or of the stage before."""
    name = "input_split" if stage == 0 else f"S{stage}.pp_recv"
    block = sheet.plan.blocks.blocks[sheet.plan.blocks.by_name[name]] if stage == 0 else sheet.block(name)
    tensor = block.writes["x"]
    return tensor.text(), tensor.row_bytes


def _send(sheet: _Sheet, stage: int, out: Node) -> Node:
    """The hand-over to the next stage: send at the right, receive at the left."""
    par, y = sheet.plan.parallelism, sheet.y + 28
    tensor = sheet.block(f"S{stage}.pp_send").writes["x"]
    made = []
    for kind, number, x in (("pp_send", stage, 570.0), ("pp_recv", stage + 1, 170.0)):
        ranks = range(number * par.ep, (number + 1) * par.ep)
        attributes = {"ranks": f"{ranks[0]}-{ranks[-1]}", "tensor": tensor.text(), "dtype": tensor.dtype}
        lines = (f"{kind} · stage {number}", named("GPU", ranks))
        made.append(node(f"S{number}.{kind}", kind, lines, x, y, 220, 40, attributes=attributes))
    send, recv = made
    facts = tensor.text(), tensor.row_bytes
    label = Label(facts[0], (send.left[0] + recv.right[0]) / 2, send.left[1] - 6, "middle")
    start = (send.top[0], out.y + out.height)
    comm: Comm = "" if out.kind == "residual_add" else "tp" if par.tp > 1 else "combine"
    sheet.edges.append(Edge(out.id, send.id, (start, send.top), None, comm, *facts))
    sheet.edges.append(Edge(send.id, recv.id, (send.left, recv.right), label, "pp", *facts))
    sheet.nodes += made
    sheet.y = y + 40 + 24
    return recv


def _rest_of_stages(sheet: _Sheet, stages: list[int], previous: Node) -> Node:
    """A box for stages that are named only."""
    par = sheet.plan.parallelism
    layers = range(par.stages[stages[0]][0], par.stages[stages[-1]][1])
    ranks = range(stages[0] * par.ep, (stages[-1] + 1) * par.ep)
    lines = (f"{named('stage', stages)}, not drawn", f"{named('layer', layers)} · {named('GPU', ranks)}")
    box = node(
        "stages", "fold", lines, _BAR_X, sheet.y, _BAR_WIDTH, 44,
        attributes={"layer": f"{layers[0]}-{layers[-1]}", "ranks": f"{ranks[0]}-{ranks[-1]}"},
    )  # fmt: skip
    start = previous.bottom
    edge = Edge(previous.id, box.id, (start, (start[0], box.y)), None, "", *_carried(sheet, stages[0]))
    sheet.edges.append(edge)
    sheet.nodes.append(box)
    sheet.y += 44 + 26
    return box


def _output(sheet: _Sheet, split: Node, previous: Node) -> None:
    """The replicas that are not drawn, and the collected output."""
    plan, par = sheet.plan, sheet.plan.parallelism
    size, runs = par.replica_size, fold_replicas(plan)
    tensor = plan.blocks.blocks[plan.blocks.by_name["output_collect"]].reads["stream"]
    facts = tensor.text(), tensor.row_bytes
    share = _carried(sheet, 0)
    others = []
    for first, last in [(1, runs[0][1])] * (runs[0][2] > 1) + [(a, b) for a, b, _ in runs[1:]]:
        ranks = range(first * size, (last + 1) * size)
        count = f" · ×{last - first + 1}" if last > first else ""
        proof = "identical to replica 0 (proven)" if last <= runs[0][1] else "not identical to replica 0"
        line = f"{named('GPU', ranks)} · {named('node', nodes_of(plan, ranks))} · {proof}"
        lines = (f"{named('replica', range(first, last + 1))}{count}", line)
        box = node(
            f"replicas.{first}-{last}", "fold", lines, _OUTER, sheet.y + 16, WIDTH - 2 * _OUTER, 42,
            attributes={"ranks": f"{ranks[0]}-{ranks[-1]}"},
        )  # fmt: skip
        others.append(box)
        sheet.y += 16 + 42
    _join(sheet, split, previous, others, facts, share)


def _join(
    sheet: _Sheet, split: Node, previous: Node, others: list[Node], facts: tuple[str, int], share: tuple[str, int]
) -> None:
    """Edges of the folded replicas along the page's sides, and the output that everything ends in."""
    rank = int(sheet.plan.blocks.blocks[sheet.plan.blocks.by_name["output_collect"]].ranks[0, 0])
    lines = ("output_collect", f"GPU {rank} · {facts[0]} from each TP group")
    end = node(
        f"output_collect.r{rank}", "output_collect", lines, 290, sheet.y + 30, 420, 38,
        attributes={"gpu": str(rank), "tensor": facts[0]},
    )  # fmt: skip
    turn = split.y + split.height + 15
    for box in others:
        way_in = (split.bottom, (split.bottom[0], turn), (_LEFT, turn), (_LEFT, box.left[1]), box.left)
        way_out = (box.right, (_RIGHT, box.right[1]), (_RIGHT, end.right[1]), end.right)
        sheet.edges.append(Edge(split.id, box.id, way_in, None, "dp", *share))
        sheet.edges.append(Edge(box.id, end.id, way_out, None, "dp", *facts))
    low = previous.y + previous.height
    points: tuple[Point, ...] = ((end.top[0], low), end.top)
    if others:
        level = sheet.frames[0].y + sheet.frames[0].height + 8
        points = ((_OUT - 6, low), (_OUT - 6, level), (_RIGHT, level), (_RIGHT, end.right[1]), end.right)
    sheet.edges.append(Edge(previous.id, end.id, points, None, "dp", *facts))
    sheet.nodes += [*others, end]
    sheet.y = end.y + end.height


def _bar(sheet: _Sheet, kind: str, layers: Sequence[int], y: float) -> Node:
    """Dispatch or combine of a stage's MoE layers."""
    plan, par = sheet.plan, sheet.plan.parallelism
    block = sheet.block(f"L{layers[0]}.{kind}")
    ranks = block.ranks[0]
    matrix = plan.byte_matrix(plan.blocks.by_name[block.name])
    nodes = plan.spec.cluster.node_of_rank[ranks]
    far = int(matrix[nodes[:, None] != nodes[None, :]].sum())
    across = f"{format_bytes(far)} of it from node to node" if far else "all inside one node"
    lines = (
        f"{kind} · all-to-all in the EP group of {par.ep}",
        f"layer {layers[0]}, one of {len(layers)}: {format_bytes(int(matrix.sum()))} of tokens, {across}",
    )
    tensor = next(iter(block.writes.values()))
    stage = par.stage_of_layer(layers[0])
    return _put(
        sheet, f"S{stage}.{kind}", kind, lines, y, {"ranks": f"{ranks[0]}-{ranks[-1]}", "tensor": tensor.text()}, kind
    )


def _put(
    sheet: _Sheet, id: str, kind: str, lines: Sequence[str], y: float, attributes: dict[str, str], comm: str
) -> Node:
    made = node(id, kind, lines, _BAR_X, y, _BAR_WIDTH, 40, attributes=attributes, comm=comm)
    sheet.nodes.append(made)
    return made
