"""Bytes between ranks as rows of a table: op by op, or summed over a step.

Collectives are taken as the direct exchanges of the plan's byte matrices; beside them there is what passes from stage to stage,
from the input and to the output, under the op that sends. What stays on a rank is no row. `link` is the farthest kind of link
between the two ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.sparse import coo_array, csr_array

from planc.graph.traffic import link_classes
from planc.render.style import comm_of
from planc.spec import LINK_CLASSES
from planc.verify import VerifiedPlan

Value = np.ndarray | str | int | None
Part = Mapping[str, Value]  #: column -> values of some rows, or one for all of them; None is an empty cell
_Sent = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # op of the block, source, target, bytes


def most_links(plan: VerifiedPlan) -> int:
    """Rows at most, op by op: pairs of ranks that may send to each other in a collective, and edges beside collectives."""
    gating = plan.parallelism.attention_dp if plan.parallelism.leaders_gate else plan.parallelism.ep
    senders = {"broadcast": 1, "input_split": 1, "dispatch": gating, "combine": gating}
    pairs = 0
    for block in plan.blocks.blocks:
        if block.collective:
            group = int(block.ranks.shape[1])
            pairs += len(block) * senders.get(block.kind, group) * (group - 1)
    return pairs + sum(len(plan.expanded.pairs(number)[0]) for number in _beside(plan))


def links_by_op(plan: VerifiedPlan) -> Iterator[Part]:
    """A row for every op and every pair of ranks that exchange data in it, or by what it sends."""
    ids = np.array(plan.expanded.ids, dtype=object)
    for comm, number, (op, source, target, size) in _exchanges(plan):
        block = plan.blocks.blocks[number]
        about = {"op": ids[plan.blocks.first_op[number] + op], "layer": block.layer, "micro_batch": block.micro_batch}
        yield _row(plan, comm, block.kind, source, target, size) | about


def links_by_step(plan: VerifiedPlan) -> Iterator[Part]:
    """A row for every kind of op and every pair of ranks that exchange data in any such op."""
    shape = (plan.parallelism.world_size,) * 2
    totals: dict[tuple[str, str], csr_array] = {}
    for comm, number, (_, source, target, size) in _exchanges(plan):
        key = comm, plan.blocks.blocks[number].kind
        part = coo_array((size, (source, target)), shape=shape).tocsr()
        totals[key] = totals[key] + part if key in totals else part
    for (comm, kind), total in totals.items():
        found = total.tocoo()
        about = dict.fromkeys(("op", "layer", "micro_batch"))
        yield _row(plan, comm, kind, found.row, found.col, found.data) | about


def _row(
    plan: VerifiedPlan, comm: str, kind: str, source: np.ndarray, target: np.ndarray, size: np.ndarray
) -> dict[str, Value]:
    link = np.array(LINK_CLASSES, dtype=object)[link_classes(plan.spec.cluster, source, target)]
    return {"comm": comm, "kind": kind, "source": source, "target": target, "link": link, "bytes": size}


def _exchanges(plan: VerifiedPlan) -> Iterator[tuple[str, int, _Sent]]:
    """(class, block, what ranks send in its ops) of every collective, then of what is beside them. Like blocks share it."""
    graph = plan.blocks
    known: dict[tuple[object, ...], _Sent] = {}
    for number, block in enumerate(graph.blocks):
        if block.collective:
            experts = None if block.layer is None else id(plan.placement.layers.get(block.layer))
            tensors = (*block.reads.values(), *block.writes.values())
            key = (block.kind, experts, id(block.ranks), id(block.rows), tensors)
            if key not in known:
                known[key] = _inside(plan, number)
            yield comm_of(block.kind), number, known[key]
    for number in _beside(plan):
        edge, (ops, others) = graph.edges[number], plan.expanded.pairs(number)
        source, target = graph.blocks[edge.source].ranks[ops, 0], graph.blocks[edge.target].ranks[others, 0]
        size, away = plan.expanded.edge_bytes(number), source != target
        yield edge.comm, edge.source, (ops[away], source[away], target[away], size[away])


def _beside(plan: VerifiedPlan) -> Iterator[int]:
    """Edges that carry data between ranks by themselves: between stages, from the input, to the output."""
    for number, edge in enumerate(plan.blocks.edges):
        if edge.comm in ("pp", "dp") and plan.blocks.blocks[edge.source].kind != "input_split":
            yield number


def _inside(plan: VerifiedPlan, number: int) -> _Sent:
    """What the ranks of every op of a collective send each other."""
    block = plan.blocks.blocks[number]
    found = []
    for op, ranks in enumerate(block.ranks):
        if op == 0 or block.rows is not None:
            matrix = plan.byte_matrix(number, op) * ~np.eye(len(ranks), dtype=bool)
            source, target = np.nonzero(matrix)
        found.append((np.full(len(source), op), ranks[source], ranks[target], matrix[source, target]))
    ops, one, other, size = (np.concatenate(column) for column in zip(*found, strict=True))
    return ops, one, other, size
