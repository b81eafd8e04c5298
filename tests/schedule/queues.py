"""A second simulation, op by op with queues and events, that shares no code with planc's."""

from __future__ import annotations

from collections import deque

import planc
from planc.schedule import Timeline


def event_times(plan: planc.VerifiedPlan, line: Timeline) -> tuple[list[float], list[float]]:
    """(start, end) of every op for one stream of each kind a rank, links not shared: every rank has two queues in program
    order; an op begins when it heads all its queues and everything that it reads has ended."""
    blocks, first = plan.blocks.blocks, plan.blocks.first_op
    moving = {
        "input_split",
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
        "dispatch",
        "combine",
        "pp_send",
    }
    free = {"input", "output_collect", "pp_recv"}
    queues: dict[tuple[int, bool], deque[int]] = {}
    block_of: dict[int, int] = {}
    members: dict[int, list[tuple[int, bool]]] = {}
    for number in line.order:
        block = blocks[number]
        for op in range(len(block)):
            name = int(first[number]) + op
            block_of[name] = number
            members[name] = []
            if block.kind not in free:
                for rank in block.ranks[op].tolist():
                    key = rank, block.kind in moving
                    queues.setdefault(key, deque()).append(name)
                    members[name].append(key)
    reads: dict[int, set[int]] = {name: set() for name in block_of}
    readers: dict[int, set[int]] = {name: set() for name in block_of}
    for source, target in zip(plan.expanded.source.tolist(), plan.expanded.target.tolist(), strict=True):
        reads[target].add(source)
        readers[source].add(target)
    start, end = [0.0] * len(block_of), [-1.0] * len(block_of)
    stream: dict[tuple[int, bool], float] = {}
    todo = deque(sorted(block_of))
    while todo:
        name = todo.popleft()
        if end[name] >= 0 or any(end[r] < 0 for r in reads[name]) or any(queues[k][0] != name for k in members[name]):
            continue
        number = block_of[name]
        seconds = float(line.prices.blocks[number].seconds[name - int(first[number])]) if members[name] else 0.0
        start[name] = max([0.0, *(end[r] for r in reads[name]), *(stream.get(k, 0.0) for k in members[name])])
        end[name] = start[name] + seconds
        for key in members[name]:
            stream[key] = end[name]
            queues[key].popleft()
            if queues[key]:
                todo.append(queues[key][0])
        todo.extend(readers[name])
    return start, end
