"""``comprehensive_moe_dag``: every op of every layer on every GPU.

The DOT text is complete: one statement per op and per edge of the hub form, every attribute on the statement itself so
that simple parsers see it, and a position each, so that ``neato -n2`` redraws the map. The SVG of the same name is in
`planc.render.comprehensive_map`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.graph.expand import Expanded, edge_rows, shown_tensor
from planc.graph.types import ROWS, OpBlock, range_text
from planc.render.comprehensive_map import comprehensive_svg
from planc.render.filters import Filter
from planc.render.style import COMMS, OPS, comm_of
from planc.render.text import dot_quote
from planc.verify import VerifiedPlan

__all__ = ["MAX_OPS", "Filter", "comprehensive_dot", "comprehensive_size", "comprehensive_svg"]

MAX_OPS = 300_000  #: above this a figure of every op helps nobody: the caller leaves it out and says so

# Points of the DOT positions: a lane holds the widest label of a local op at Graphviz's default 14 pt.
_LANE, _NODE_GAP, _REPLICA_GAP, _ROW = 200, 60, 200, 90


def comprehensive_size(plan: VerifiedPlan) -> int:
    """Ops that the figure would hold."""
    return plan.blocks.op_count


def comprehensive_dot(plan: VerifiedPlan, keep: Filter | None = None) -> str:
    """The complete DOT: all ops and edges of the hub form, or those that ``keep`` keeps."""
    expanded, chosen = plan.expanded, keep or Filter()
    kept = chosen.ops(plan)
    quoted = [f'"{name}"' for name in expanded.ids]  # ids are letters, digits, dots, commas and hyphens
    title = dot_quote(f"comprehensive_moe_dag: {plan.spec.name}" + (f", {part}" if (part := chosen.text()) else ""))
    lines = ['digraph "comprehensive_moe_dag" {', f"label={title};", "labelloc=t;", "splines=line;"]
    x, row = _lane_positions(plan), 0
    for number, block in enumerate(plan.blocks.blocks):
        first = int(plan.blocks.first_op[number])
        ops = np.flatnonzero(kept[first : first + len(block)])
        if len(ops):
            names = quoted[first : first + len(block)]
            lines += _nodes(block, ops.tolist(), names, x, -row * _ROW, plan.spec.workload.micro_batches > 1)
            row += 1
    for number in range(len(plan.blocks.edges)):
        lines += _edges(expanded, number, quoted, None if chosen == Filter() else kept)
    lines.append("}\n")
    return "\n".join(lines)


def _lane_positions(plan: VerifiedPlan) -> np.ndarray:
    """Centre of each rank's lane in points, int64 [world_size]."""
    ranks = np.arange(plan.parallelism.world_size)
    node = plan.spec.cluster.node_of_rank[: len(ranks)].astype(np.int64)
    return ranks * _LANE + node * _NODE_GAP + ranks // plan.parallelism.replica_size * _REPLICA_GAP


def _nodes(block: OpBlock, ops: list[int], names: list[str], x: np.ndarray, y: int, batches: bool) -> Iterator[str]:
    """Node statements of the chosen ops of a block."""
    local = not block.collective
    common = f"kind={block.kind}" + ("" if block.layer is None else f", layer={block.layer}")
    if batches:
        common += f", micro_batch={block.micro_batch}"
    tensors, look = _tensors(block), _look(block.kind)
    stem = ("" if block.layer is None else f"L{block.layer} ") + block.kind
    experts = None if block.experts is None else block.experts.tolist()
    groups = block.ranks.tolist()
    centres = ((x[block.ranks[:, 0]] + x[block.ranks[:, -1]]) // 2).tolist()
    spans = (x[block.ranks[:, -1]] - x[block.ranks[:, 0]]).tolist()
    for op in ops:
        where = str(groups[op][0]) if local else range_text(groups[op])
        place = f"gpu={where}" if local else f'ranks="{where}", width={spans[op] / 72 + 2:.2f}'
        expert = "" if experts is None else f", expert={experts[op]}"
        label = stem if experts is None else f"{stem} E{experts[op]}"
        yield (
            f'{names[op]} [{common}, {place}{expert}{tensors[op]}, label="{label}\\nGPU {where}", '
            f'{look}, pos="{centres[op]},{y}!"];'
        )


def _tensors(block: OpBlock) -> list[str]:
    """``tensor`` and ``dtype`` of each op of a block, ready to append."""
    shown = shown_tensor(block)
    if shown is None:
        return [""] * len(block)
    if block.rows is None or ROWS not in shown.shape:
        return [f', tensor="{shown.text()}", dtype={shown.dtype}'] * len(block)
    rows = block.rows.tolist()
    texts = {n: f', tensor="{shown.text(n)}", dtype={shown.dtype}' for n in set(rows)}
    return [texts[n] for n in rows]


def _look(kind: str) -> str:
    """Graphviz shape, style and colours of an op kind. A collective is communication: its outline is dashed."""
    style = OPS[kind]
    if comm := (comm_of(kind) if style.family == "collective" else ""):
        return f'shape=box, style="dashed,filled", color="{COMMS[comm]}", fillcolor="{style.fill}"'
    if style.shape == "round":
        return f'shape=box, style="rounded,filled", fillcolor="{style.fill}"'
    return f'shape={style.shape}, style=filled, fillcolor="{style.fill}"'


def _edges(expanded: Expanded, number: int, names: list[str], kept: np.ndarray | None) -> Iterator[str]:
    """Edge statements of an edge block, those with both ends kept."""
    edge, part = expanded.graph.edges[number], slice(expanded.first_edge[number], expanded.first_edge[number + 1])
    source, target = expanded.source[part], expanded.target[part]
    rows = edge_rows(expanded.graph, edge, *expanded.pairs(number))
    if kept is not None:
        both = kept[source] & kept[target]
        source, target, rows = source[both], target[both], None if rows is None else rows[both]
    size = edge.tensor.row_bytes
    marks = f', comm={edge.comm}, style=dashed, color="{COMMS[edge.comm]}"];' if edge.comm else "];"
    pairs = zip(source.tolist(), target.tolist(), strict=True)
    if rows is None:
        tail = f' [tensor="{edge.tensor.text()}", bytes={size}{marks}'
        return (f"{names[s]} -> {names[t]}{tail}" for s, t in pairs)
    counts = rows.tolist()
    tails = {n: f' [tensor="{edge.tensor.text(n)}", bytes={n * size}{marks}' for n in set(counts)}
    return (f"{names[s]} -> {names[t]}{tails[n]}" for (s, t), n in zip(pairs, counts, strict=True))
