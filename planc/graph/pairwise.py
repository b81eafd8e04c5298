"""The graph without collectives: each becomes direct edges from the ops that feed it to the ops that read from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planc.graph.expand import Expanded, edge_attributes, node_attributes
from planc.graph.traffic import byte_matrix, copy_matrix
from planc.graph.types import OpBlock, PlanGraph
from planc.placement import Parallelism, Placement
from planc.spec import Spec

if TYPE_CHECKING:
    import networkx as nx

_COMM = {"dispatch": "dispatch", "combine": "combine", "input_split": "dp"}


@dataclass(frozen=True, slots=True)
class _End:
    """An op at one end of a collective: its id, rank, turn and, where it reads, its tensor."""

    id: str
    rank: int
    slot: int
    tensor: str = ""


def pairwise(spec: Spec, par: Parallelism, placement: Placement, expanded: Expanded) -> nx.DiGraph[str]:
    """The step as a DiGraph of local ops alone.

    Attributes are those of `planc.graph.to_networkx`. ``bytes`` of an edge that stands for a collective is what the
    source's rank sends to the reader's rank; ops of one rank that read the same tensor share that transfer. Dispatch
    and combine have an edge only where tokens go, and ``bytes`` counts the tokens of that expert copy, also those that
    stay on their rank. Where a collective reads from another one, the first leaves an op on every rank of its group.
    """
    import networkx as nx

    graph, ids = expanded.graph, expanded.ids
    result: nx.DiGraph[str] = nx.DiGraph()
    chained = {e.source for e in graph.edges if graph.blocks[e.source].collective and graph.blocks[e.target].collective}
    for number, block in enumerate(graph.blocks):
        rows = node_attributes(block)
        first = int(graph.first_op[number])
        if not block.collective:
            result.add_nodes_from(zip(ids[first : first + len(block)], rows, strict=True))
        elif number in chained:
            for ranks, row in zip(block.ranks.tolist(), rows, strict=True):
                alone = {key: value for key, value in row.items() if key != "ranks"}
                result.add_nodes_from((f"{block.name}.r{rank}", alone | {"gpu": rank}) for rank in ranks)
    for number, edge in enumerate(graph.edges):
        if graph.blocks[edge.source].collective or graph.blocks[edge.target].collective:
            continue
        part = slice(expanded.first_edge[number], expanded.first_edge[number + 1])
        ends = expanded.source[part].tolist(), expanded.target[part].tolist(), edge_attributes(expanded, number, edge)
        result.add_edges_from((ids[s], ids[t], a) for s, t, a in zip(*ends, strict=True))
    for number, block in enumerate(graph.blocks):
        if block.collective:
            sent = _Sent(spec, par, placement, graph, number)
            for op, (feeders, readers) in enumerate(_ends(expanded, number, number in chained)):
                result.add_edges_from(_direct(block, sent, op, feeders, readers))
    return result


def _ends(expanded: Expanded, number: int, chained: bool) -> list[tuple[list[_End], list[_End]]]:
    """(ops that feed it, ops that read from it) of every op of a collective block."""
    graph, ids = expanded.graph, expanded.ids
    block = graph.blocks[number]
    ends: list[tuple[list[_End], list[_End]]] = [([], []) for _ in range(len(block))]
    for at, edge in enumerate(graph.edges):
        source, target = (
            (op.tolist() for op in expanded.pairs(at)) if number in (edge.source, edge.target) else ([], [])
        )
        left, right = graph.blocks[edge.source], graph.blocks[edge.target]
        for s, t in zip(source, target, strict=True):
            if edge.target == number and left.collective:
                ends[t][0].extend(_End(f"{left.name}.r{rank}", rank, left.slot) for rank in left.ranks[s].tolist())
            elif edge.target == number:
                ends[t][0].append(_End(ids[graph.first_op[edge.source] + s], int(left.ranks[s, 0]), left.slot))
            elif not right.collective:
                text = edge.tensor.text(right.row_count(t))
                ends[s][1].append(_End(ids[graph.first_op[edge.target] + t], int(right.ranks[t, 0]), right.slot, text))
    if chained:
        tensor = next(iter(block.writes.values()))
        for op, ranks in enumerate(block.ranks.tolist()):
            shown = tensor.text(block.row_count(op))
            ends[op][1].extend(_End(f"{block.name}.r{rank}", rank, block.slot, shown) for rank in ranks)
    return ends


class _Sent:
    """Bytes between the ends of a collective."""

    def __init__(self, spec: Spec, par: Parallelism, placement: Placement, graph: PlanGraph, number: int) -> None:
        self.args, self.par, self.block = (spec, par, placement), par, graph.blocks[number]
        self._matrix = np.zeros((0, 0), dtype=np.int64)
        self._of_op = -1
        if self.block.kind in ("dispatch", "combine") and self.block.layer is not None:
            part = placement.layers[self.block.layer]
            turns = zip(part.rank.tolist(), part.slot.tolist(), strict=True)
            self._copy = {turn: i for i, turn in enumerate(turns)}
            self._tokens = copy_matrix(*self.args, self.block.layer)

    def tokens(self, source: _End, expert: _End) -> int:
        """Tokens that a rank of an EP group sends to the expert copy that runs at the other end."""
        holder = expert.rank % self.par.ep // self.par.expert_tp * self.par.expert_tp
        return int(self._tokens[source.rank % self.par.ep, self._copy[holder, expert.slot]])

    def between(self, op: int, feeder: _End, reader: _End) -> int:
        """Bytes from the feeder's rank to the reader's."""
        if self.block.kind == "input_split":
            return self.block.writes["x"].row_bytes
        if op != self._of_op:
            self._matrix, self._of_op = byte_matrix(*self.args, self.block, op), op
        first, group = int(self.block.ranks[op, 0]), self.block.ranks.shape[1]
        i, j = feeder.rank - first, reader.rank - first
        inside = 0 <= j < group  # a reader outside the group, output_collect, gets what any other rank gets
        return int(self._matrix[i, j if inside else (i + 1) % group])


def _direct(
    block: OpBlock, sent: _Sent, op: int, feeders: list[_End], readers: list[_End]
) -> Iterator[tuple[str, str, dict[str, object]]]:
    """The direct edges of one op of a collective."""
    for feeder in feeders:
        for reader in readers:
            text = reader.tensor
            if block.kind in ("dispatch", "combine"):
                experts = (feeder, reader) if block.kind == "dispatch" else (reader, feeder)
                first_shard = experts[1].rank % sent.par.expert_tp == 0
                tokens = sent.tokens(*experts) if first_shard or block.kind == "dispatch" else 0
                if not tokens:
                    continue
                tensor = block.writes["tokens"] if block.kind == "dispatch" else block.reads["y"]
                size, text = tokens * tensor.row_bytes, tensor.text(tokens)
            else:
                size = sent.between(op, feeder, reader)
            marks: dict[str, object] = {}
            if feeder.rank != reader.rank:
                marks = {"comm": _COMM.get(block.kind, "tp"), "style": "dashed"}
            yield feeder.id, reader.id, {"tensor": text, "bytes": size, **marks}
