"""What the timeline figure draws: representative ranks, what ran on their streams, and ops too narrow to see gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from planc.cost.step import CLASS_NAMES, CLASSES, class_of
from planc.render.style import ATTENTION, COMMS, DENSE, EXPERT, ROUTING
from planc.render.text import named
from planc.schedule import Timeline
from planc.schedule.order import on_communication_stream, takes_time

ROWS = 8  #: ranks of the overview at most
SAME = 1e-9  #: times that differ by less than this share of the step are one

#: name in words, fill, and for communication its stroke, by class of op
LOOK: dict[str, tuple[str, str, str]] = {
    name: (CLASS_NAMES[name], fill, stroke)
    for name, fill, stroke in (
        ("attention", ATTENTION, ""),
        ("dense", DENSE, ""),
        ("gate", ROUTING, ""),
        ("experts", EXPERT, ""),
        ("head", "#d9c6e8", ""),
        ("dispatch", "#ee8f52", COMMS["dispatch"]),
        ("combine", "#4f97d0", COMMS["combine"]),
        ("tp", "#cf82ad", COMMS["tp"]),
        ("pp", "#c2a04f", COMMS["pp"]),
        ("ends", "#a8a8a8", COMMS["dp"]),
    )
}


class Row(NamedTuple):
    """A rank that stands for others, and why it was chosen."""

    rank: int
    words: str


@dataclass(frozen=True, eq=False)
class Lane:
    """What ran on one stream of a rank, in its order: arrays over ops. ``op`` counts in its block; ``far``: a communication
    stream."""

    rank: int
    far: bool
    stream: int
    block: np.ndarray
    op: np.ndarray
    start: np.ndarray
    end: np.ndarray


def busy_by_rank(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of work on compute and on communication streams, float [world] each, summed over streams."""
    world = timeline.plan.blocks.world_size
    total = np.zeros((2, world))
    for number, block in enumerate(timeline.plan.blocks.blocks):
        if takes_time(block):
            seconds = np.repeat(timeline.run.end[number] - timeline.run.start[number], block.ranks.shape[1])
            total[int(on_communication_stream(block))] += np.bincount(block.ranks.reshape(-1), seconds, world)
    return total[0], total[1]


def chosen_rows(timeline: Timeline) -> list[Row]:
    """Of every pipeline stage the ranks that compute most and least (one, where all compute as long); of stages too many
    for the figure, the first, the last and some between, each by its busiest rank."""
    par = timeline.plan.parallelism
    near = SAME * timeline.step
    compute, far = (np.round(t / near) for t in busy_by_rank(timeline))
    stages = np.unique(np.linspace(0, par.pp - 1, min(par.pp, ROWS)).round().astype(int)).tolist()
    rows = []
    for stage in stages:
        ranks = np.unique(par.stage_ranks(stage))
        first, last = par.stages[stage]
        where = f"stage {stage}, {named('layer', range(first, last))} · " if par.pp > 1 else ""
        most, least = (int(ranks[pick(compute[ranks])]) for pick in (np.argmax, np.argmin))
        if compute[most] == compute[least]:
            alike = len(np.unique(far[ranks])) == 1
            words = f"one of {len(ranks):,} that are busy alike" if alike else f"all {len(ranks):,} compute as long"
            rows.append(Row(most, where + (words if len(ranks) > 1 else "the only one")))
            continue
        rows.append(Row(most, f"{where}computes most of {len(ranks):,}"))
        if 2 * len(stages) <= ROWS:
            rows.append(Row(least, f"{where}computes least of {len(ranks):,}"))
    return rows


def lanes_of(timeline: Timeline, ranks: Sequence[int]) -> dict[int, list[Lane]]:
    """Rank -> its compute streams, then its communication streams."""

    @cache
    def members(key: int) -> tuple[np.ndarray, np.ndarray]:
        found = np.nonzero(np.isin(blocks[key].ranks, ranks))
        return found[0], found[1]

    blocks, execution = timeline.plan.blocks.blocks, timeline.plan.spec.execution
    first: dict[int, int] = {}  # blocks with the same ranks share an array: its members are looked up once
    parts = []
    for index, block in enumerate(blocks):
        if not takes_time(block):
            continue
        op, member = members(first.setdefault(id(block.ranks), index))
        lane = np.broadcast_to(np.asarray(timeline.run.lanes[index]), block.ranks.shape)[op, member]
        far = np.full(len(op), int(on_communication_stream(block)))
        times = timeline.run.start[index][op], timeline.run.end[index][op]
        parts.append((block.ranks[op, member], far, lane, np.full(len(op), index), op, *times))
    rank_of, kind_of, lane_of, number, op, start, end = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((number, end, start))
    counts = execution.compute_streams, execution.communication_streams
    out: dict[int, list[Lane]] = {}
    for one in ranks:
        for kind, stream in [(0, n) for n in range(counts[0])] + [(1, n) for n in range(counts[1])]:
            at = order[(rank_of[order] == one) & (kind_of[order] == kind) & (lane_of[order] == stream)]
            out.setdefault(one, []).append(Lane(one, bool(kind), stream, number[at], op[at], start[at], end[at]))
    return out


def classes_of(timeline: Timeline) -> np.ndarray:
    """Number of the class of every block in `CLASSES`."""
    return np.array([CLASSES.index(class_of(block)) for block in timeline.plan.blocks.blocks])


def on_path(timeline: Timeline, rank: int) -> list[tuple[int, float, float]]:
    """(block, start, end) of the critical path's ops on a rank, in their order."""
    blocks = timeline.plan.blocks.blocks
    return [
        (s.block, s.start, s.end)
        for s in timeline.critical_path
        if takes_time(blocks[s.block]) and rank in blocks[s.block].ranks[s.op]
    ]


def strips(start: np.ndarray, end: np.ndarray, kind: np.ndarray, slot: float) -> Iterator[tuple[int, float, float]]:
    """(kind, start, end) of what is drawn for intervals that follow each other, in px. In slots ``slot`` px wide, what is of
    one kind is put together: kinds, and time in which nothing runs, stand in the order in which they first come there. So
    nothing moves by more than a slot, and every kind keeps its length in every slot."""
    if not len(start):
        return
    idle = int(kind.max()) + 1
    gap = np.flatnonzero(start[1:] > end[:-1])
    start, end = np.concatenate([start, end[:-1][gap]]), np.concatenate([end, start[1:][gap]])
    kind = np.concatenate([kind, np.full(len(gap), idle)])
    first = np.floor(start / slot).astype(int)
    count = np.maximum(1, np.ceil(end / slot - 1e-9).astype(int) - first)
    which = np.repeat(np.arange(len(start)), count)
    number = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + first[which]
    left = np.maximum(start[which], number * slot)
    length = np.maximum(0.0, np.minimum(end[which], (number + 1) * slot) - left)
    keys, inverse = np.unique(number * (idle + 1) + kind[which], return_inverse=True)
    total, begins = np.bincount(inverse, length), np.full(len(keys), np.inf)
    np.minimum.at(begins, inverse, left)
    slots, kinds = np.divmod(keys, idle + 1)
    order = np.lexsort((begins, slots))
    slots, kinds, total, begins = (column[order].tolist() for column in (slots, kinds, total, begins))
    open_kind, since, upto, last = idle, 0.0, 0.0, None
    for place, one, size, begin in zip(slots, kinds, total, begins, strict=True):
        at = upto if place == last else begin
        if one != open_kind or at - upto > 1e-6:
            if open_kind != idle:
                yield open_kind, since, upto
            open_kind, since = one, at
        upto, last = at + size, place
    if open_kind != idle:
        yield open_kind, since, upto
