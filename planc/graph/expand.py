"""From blocks to arrays of ops and edges, and from those to networkx."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from planc.graph.types import ROWS, EdgeBlock, OpBlock, PlanGraph, TensorType, range_text

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class Expanded:
    """Every edge of the hub form as arrays, edge block by edge block; ops are numbered as in `PlanGraph`.

    ``source``, ``target``: int64 [edges]; ``first_edge``: int64 [edge blocks + 1].
    """

    graph: PlanGraph
    source: np.ndarray
    target: np.ndarray
    first_edge: np.ndarray

    @cached_property
    def ids(self) -> list[str]:
        """Text id of every op."""
        names: list[str] = []
        for block in self.graph.blocks:
            stem = f"{block.name}.r"
            names += [stem + text for text in _rank_texts(block)]
        return names

    def edge_bytes(self, block: int) -> np.ndarray:
        """Bytes of each edge of an edge block, int64 [edges of the block]."""
        return tensor_bytes(self.graph, block, *self.pairs(block))

    def pairs(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) op numbers, counted from each block's first op, of an edge block."""
        edge, part = self.graph.edges[block], slice(self.first_edge[block], self.first_edge[block + 1])
        return (
            self.source[part] - self.graph.first_op[edge.source],
            self.target[part] - self.graph.first_op[edge.target],
        )


def tensor_bytes(graph: PlanGraph, block: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Bytes of the edges of an edge block from op ``source`` to op ``target`` (numbers inside their blocks)."""
    edge = graph.edges[block]
    rows = edge_rows(graph, edge, source, target)
    size = edge.tensor.row_bytes
    return np.full(len(source), size, dtype=np.int64) if rows is None else rows * size


def edge_rows(graph: PlanGraph, edge: EdgeBlock, source: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """Row counts of edges whose tensor has `ROWS`: those of the end that has rows. None for fixed shapes."""
    if ROWS not in edge.tensor.shape:
        return None
    for block, ops in ((edge.source, source), (edge.target, target)):
        rows = graph.blocks[block].rows
        if rows is not None:
            return np.asarray(rows[ops])
    return np.zeros(len(source), dtype=np.int64)


def expand(graph: PlanGraph) -> Expanded:
    """Number every edge. Blocks that share their rank arrays share the work."""
    cache: dict[tuple[int, int, str], tuple[np.ndarray, np.ndarray]] = {}
    sources, targets, sizes = [], [], [0]
    for edge in graph.edges:
        a, b = graph.blocks[edge.source].ranks, graph.blocks[edge.target].ranks
        if edge.pairs is not None:
            pair = edge.pairs[:, 0].astype(np.int64), edge.pairs[:, 1].astype(np.int64)
        else:
            key = (id(a), id(b), edge.pattern)
            if key not in cache:
                cache[key] = _match(a, b, edge.pattern, graph.world_size)
            pair = cache[key]
        sources.append(pair[0] + graph.first_op[edge.source])
        targets.append(pair[1] + graph.first_op[edge.target])
        sizes.append(len(pair[0]))
    empty = np.zeros(0, dtype=np.int64)
    return Expanded(
        graph,
        np.concatenate(sources) if sources else empty,
        np.concatenate(targets) if targets else empty,
        np.cumsum(sizes, dtype=np.int64),
    )


def _match(a: np.ndarray, b: np.ndarray, pattern: str, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Op numbers joined by ``pattern``, ordered by source then target."""
    kind, _, number = pattern.partition(":")
    if kind == "rank":
        pair = _sharing_a_rank(a, b, world)
    elif kind == "shift":
        pair = _sharing_a_rank(a + int(number), b, world + abs(int(number)))
    else:
        pair = _in_one_run(a, b, int(number))
    order = np.lexsort((pair[1], pair[0]))
    return pair[0][order], pair[1][order]


def _sharing_a_rank(a: np.ndarray, b: np.ndarray, world: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of ops with a common rank, each pair once."""
    op_of_rank = np.full(world, -1, dtype=np.int64)
    valid = (b >= 0) & (b < world)
    op_of_rank[b[valid]] = np.broadcast_to(np.arange(len(b))[:, None], b.shape)[valid]
    inside = (a >= 0) & (a < world)
    found = np.where(inside, op_of_rank[np.where(inside, a, 0)], -1)
    source = np.broadcast_to(np.arange(len(a), dtype=np.int64)[:, None], a.shape)[found >= 0]
    target = found[found >= 0]
    if a.shape[1] == 1 or len(source) == 0:
        return source, target
    keys = np.unique(source * len(b) + target)
    return keys // len(b), keys % len(b)


def _in_one_run(a: np.ndarray, b: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
    same = (a[:, :1] // run) == (b[:, 0] // run)
    if a.shape[1] == b.shape[1]:
        same &= ~(a[:, None, :] == b[None, :, :]).all(axis=2)
    source, target = np.nonzero(same)
    return source.astype(np.int64), target.astype(np.int64)


def _rank_texts(block: OpBlock) -> list[str]:
    if block.ranks.shape[1] == 1:
        return [str(r) for r in block.ranks[:, 0].tolist()]
    first, last = block.ranks[:, 0], block.ranks[:, -1]
    if (last - first == block.ranks.shape[1] - 1).all() and (np.diff(block.ranks, axis=1) == 1).all():
        return [f"{f}-{e}" for f, e in zip(first.tolist(), last.tolist(), strict=True)]
    return [range_text(row) for row in block.ranks.tolist()]


def to_networkx(expanded: Expanded) -> nx.DiGraph[str]:
    """The hub form as a DiGraph filled from sorted arrays.

    Node attributes: ``kind``, ``layer`` (absent outside layers), ``gpu`` (rank) or ``ranks`` (a collective's group
    as text), ``expert`` (expert ops), ``shape``, ``dtype`` and ``layout`` of what the op writes first,
    ``micro_batch``. Edge attributes: ``tensor`` (text), ``bytes``, and on communication edges ``comm`` and
    ``style="dashed"``.
    """
    import networkx as nx

    graph, ids = expanded.graph, expanded.ids
    result: nx.DiGraph[str] = nx.DiGraph()
    collecting = gc.isenabled()
    gc.disable()  # nothing here is garbage; the collector would walk a million live objects again and again
    try:
        for number, block in enumerate(graph.blocks):
            first = int(graph.first_op[number])
            result.add_nodes_from(zip(ids[first : first + len(block)], node_attributes(block), strict=True))
        for number, edge in enumerate(graph.edges):
            part = slice(expanded.first_edge[number], expanded.first_edge[number + 1])
            result.add_edges_from(
                (ids[s], ids[t], attributes)
                for s, t, attributes in zip(
                    expanded.source[part].tolist(),
                    expanded.target[part].tolist(),
                    edge_attributes(expanded, number, edge),
                    strict=True,
                )
            )
    finally:
        if collecting:
            gc.enable()
    return result


def shown_tensor(block: OpBlock) -> TensorType | None:
    """The tensor that stands for an op where one is shown: what it writes first, else what it reads first. A
    dispatch writes a different row count to every rank, so what it reads is shown."""
    tensors = [*block.writes.values(), *block.reads.values()]
    fixed = [t for t in tensors if ROWS not in t.shape or block.rows is not None]
    return next(iter(fixed or tensors), None)


def node_attributes(block: OpBlock) -> list[dict[str, object]]:
    common: dict[str, object] = {"kind": block.kind, "micro_batch": block.micro_batch}
    if block.layer is not None:
        common["layer"] = block.layer
    written = shown_tensor(block)
    if written is not None:
        common |= {"shape": written.shape, "dtype": written.dtype, "layout": written.layout}
    texts = _rank_texts(block)
    local = block.ranks.shape[1] == 1 and not block.collective
    rows = []
    for op, text in enumerate(texts):
        own = dict(common)
        own["gpu" if local else "ranks"] = int(text) if local else text
        if block.experts is not None:
            own["expert"] = int(block.experts[op])
        if block.rows is not None and written is not None:
            own["shape"] = tuple(int(block.rows[op]) if n == ROWS else n for n in written.shape)
        rows.append(own)
    return rows


def edge_attributes(expanded: Expanded, number: int, edge: EdgeBlock) -> list[dict[str, object]]:
    source, target = expanded.pairs(number)
    rows = edge_rows(expanded.graph, edge, source, target)
    size = edge.tensor.row_bytes
    marks: dict[str, object] = {"comm": edge.comm, "style": "dashed"} if edge.comm else {}
    if rows is None:
        text = edge.tensor.text()
        return [{"tensor": text, "bytes": size, **marks} for _ in range(len(source))]
    return [{"tensor": edge.tensor.text(n), "bytes": n * size, **marks} for n in rows.tolist()]
