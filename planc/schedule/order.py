"""The order in which every GPU of a stage starts its ops: one program for all, as engines run it.

Blocks are taken one by one: always the one that can start first on the streams of its stage; of two that can start
together, the one that has come less far. So micro-batches stay abreast: while one waits for its dispatch, the other
computes. Since all
ranks keep one order, collectives meet in the same order everywhere and cannot wait for each other in a circle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planc.cost.price import BlockPrices
from planc.cost.step import Step
from planc.graph import OpBlock


def on_communication_stream(block: OpBlock) -> bool:
    """Whether the block's ops take a communication stream, of all their ranks; else a compute stream."""
    return block.collective or block.kind in ("pp_send", "pp_recv")


def takes_time(block: OpBlock) -> bool:
    """Whether the ops occupy a stream: what only marks a place (input, output, receive) does not."""
    return block.kind not in ("input", "output_collect", "pp_recv")


def stage_of(plan: Step, block: OpBlock) -> int:
    """Pipeline stage of a block's ranks."""
    return int(block.ranks[0, 0]) % plan.parallelism.replica_size // plan.parallelism.ep


def program_orders(plan: Step, prices: Sequence[BlockPrices]) -> list[list[int]]:
    """Orders of all blocks that an engine may run, the quickest single step first: those that keep one micro-batch, two, or
    as many as a stage has to itself abreast, and, where there are stages, micro-batch after micro-batch, which leaves a stage
    early. Indices of blocks by their start."""
    work, par = plan.spec.workload, plan.parallelism
    if par.pp == 1 and work.micro_batches == 1 and _one_stream(plan):
        return [list(range(len(plan.blocks.blocks)))]  # the graph is in this order already
    abreast = sorted({1, min(2, work.micro_batches), max(1, work.micro_batches // par.pp)})
    found = sorted((_order(plan, prices, count) for count in abreast), key=lambda one: one[0])
    orders = [order for _, order in found]
    if par.pp > 1 and work.micro_batches > 1:
        orders.append(list(range(len(plan.blocks.blocks))))
    return [order for n, order in enumerate(orders) if order not in orders[:n]]


def _order(plan: Step, prices: Sequence[BlockPrices], abreast: int) -> tuple[float, list[int]]:
    """(end of the last block when all ops of a block are as slow as its slowest, the order)."""
    graph, execution = plan.blocks, plan.spec.execution
    seconds = [float(p.seconds.max()) for p in prices]
    waiting = np.zeros(len(graph.blocks), dtype=np.int64)
    readers: list[list[int]] = [[] for _ in graph.blocks]
    for edge in graph.edges:
        waiting[edge.target] += 1
        readers[edge.source].append(edge.target)
    streams = {
        (stage, remote): [0.0] * (execution.communication_streams if remote else execution.compute_streams)
        for stage in range(plan.parallelism.pp)
        for remote in (False, True)
    }
    place = [(stage_of(plan, b), on_communication_stream(b)) for b in graph.blocks]
    far = [0] * (1 + max(b.micro_batch for b in graph.blocks))
    rank: list[tuple[int, int, int]] = []  # who goes first of those that can start together
    for number, b in enumerate(graph.blocks):
        rank.append((b.micro_batch // abreast, far[b.micro_batch], number))
        far[b.micro_batch] += 1
    ready = dict.fromkeys(np.flatnonzero(waiting == 0).tolist(), 0.0)
    came = [0.0] * len(graph.blocks)
    order: list[int] = []
    while ready:
        start, (*_, block) = min((max(at, min(streams[place[i]])), rank[i]) for i, at in ready.items())
        del ready[block]
        order.append(block)
        end = start + seconds[block]
        if takes_time(graph.blocks[block]):
            lanes = streams[place[block]]
            lanes[lanes.index(min(lanes))] = end
        for reader in readers[block]:
            waiting[reader] -= 1
            came[reader] = max(came[reader], end)
            if not waiting[reader]:
                ready[reader] = came[reader]
    return max(came), order


def _one_stream(plan: Step) -> bool:
    execution = plan.spec.execution
    return execution.compute_streams == execution.communication_streams == 1
