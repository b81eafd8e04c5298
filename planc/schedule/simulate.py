"""Simulation of a step: when every op of the verified graph starts and ends.

Events are starts and ends of ops. An op starts when all that it reads is there and a stream of each of its ranks is free;
a collective takes a communication stream of all its members and so waits for the last of them. Streams serve ops in
program order (`planc.schedule.order`). A link serves transfers in program order too: those of one block share it evenly
and end together, those of another block come after. A transfer that no other delays takes its price; what delays it is
added. Ops are simulated block by block with arrays over ranks, which is the same as op by op because the order on every
stream is given (tests/schedule compares it with a queue of single events).

Where consecutive layers are alike and one took exactly as long as the one before, later ones do too: the state of all
streams and links has only moved in time, and the equations have no other input. Those layers are filled in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from planc.cost.price import BlockPrices
from planc.cost.step import Step, StepPrices
from planc.graph import Expanded, OpBlock, expand
from planc.graph.types import content
from planc.schedule.order import on_communication_stream, takes_time

#: kinds of ops that a step has only when no other comes before or after it: the way in and out through the first rank
ENDS = ("input", "input_split", "output_collect")


@dataclass(frozen=True)
class Slow:
    """What is slower than planned: rank -> factor on its compute ops, link number -> factor on its transfers."""

    gpus: Mapping[int, float] = field(default_factory=dict)
    links: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Feed:
    """What the ops of a block read from another: for each of ``targets`` the latest end among its sources. ``index``: source
    ops, target by target; ``cuts``: where each target's begin, None when each has one."""

    source: int
    index: np.ndarray
    targets: np.ndarray | None  #: None: all ops, in order
    cuts: np.ndarray | None
    same: bool  #: every op reads from the op of its own number

    def sources(self, op: int) -> np.ndarray:
        """The source ops that an op of the block reads."""
        place = op
        if self.targets is not None:
            place = int(np.searchsorted(self.targets, op))
            if place == len(self.targets) or self.targets[place] != op:
                return self.index[:0]
        if self.cuts is None:
            return self.index[place : place + 1]
        end = self.cuts[place + 1] if place + 1 < len(self.cuts) else len(self.index)
        return self.index[self.cuts[place] : end]

    def latest(self, ready: np.ndarray, end: np.ndarray) -> np.ndarray:
        """``ready`` of the block's ops, or later where one of their sources ends later; float [ops]."""
        came: np.ndarray = end if self.same else end[self.index]
        if self.cuts is not None:
            came = np.maximum.reduceat(came, self.cuts)
        if self.targets is None:
            return np.asarray(np.maximum(ready, came))
        ready = ready.copy()
        ready[self.targets] = np.maximum(ready[self.targets], came)
        return ready


class Wiring:
    """The graph's edges as arrays, made once for graphs of one structure (all batches of a spec)."""

    def __init__(self, expanded: Expanded) -> None:
        graph = expanded.graph
        self.feeds: list[list[Feed]] = [[] for _ in graph.blocks]
        kept: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray | None, np.ndarray | None, bool]] = {}
        ranks = [content(block.ranks) for block in graph.blocks]
        for number, edge in enumerate(graph.edges):
            pairs = b"" if edge.pairs is None else content(edge.pairs)
            key = ranks[edge.source], ranks[edge.target], edge.pattern, pairs
            if key not in kept:
                ops = len(graph.blocks[edge.target])
                wired = _by_target(*expanded.pairs(number), ops)
                whole = wired[1] is wired[2] is None and len(graph.blocks[edge.source]) == ops
                kept[key] = *wired, whole and bool((wired[0] == np.arange(ops)).all())
            self.feeds[edge.target].append(Feed(edge.source, *kept[key]))


def _by_target(
    source: np.ndarray, target: np.ndarray, ops: int
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    order = np.lexsort((source, target))
    source, target = source[order], target[order]
    cuts = np.flatnonzero(np.diff(target, prepend=-1))
    targets = target[cuts]
    return source, None if len(targets) == ops else targets, None if len(cuts) == len(target) else cuts


@dataclass(frozen=True, eq=False)
class Run:
    """Start and end of every op, a list entry per block (float [ops of the block], s), and what was left at the end: when
    each stream [world, streams] and link is free."""

    start: list[np.ndarray]
    end: list[np.ndarray]
    compute: np.ndarray
    communication: np.ndarray
    links: np.ndarray
    lanes: list[np.ndarray | int]  #: stream of each op's ranks, int [ops, group]; 0 for all where there is one
    latest: np.ndarray  #: the last end of every block, float [blocks]
    done: dict[int, float]  #: micro-batch -> the last end of its ops but those of `ENDS`
    simulated: int  #: blocks that were simulated; the rest is filled in

    @property
    def makespan(self) -> float:
        """The last end."""
        return float(self.latest.max())


@dataclass(frozen=True, eq=False)
class _Uses:
    """A block's uses of links, sorted by link: which op, seconds that it occupies the link."""

    links: np.ndarray
    cuts: np.ndarray
    op: np.ndarray
    total: np.ndarray  #: seconds on each link
    by_op: np.ndarray  #: for every use in op order, the number of its link
    op_cuts: np.ndarray
    ops: np.ndarray


def simulate(
    plan: Step,
    prices: StepPrices,
    order: Sequence[int],
    wiring: Wiring | None = None,
    *,
    after: Run | None = None,
    slow: Slow | None = None,
    whole: bool = False,
    layers: Layers | None = None,
) -> Run:
    """Start and end of every op of one step.

    ``after``: an earlier step that this one follows on the same GPUs: each micro-batch starts when its last op of that step
    is done, without input or output through the first rank. ``whole``: simulate every layer, alike or not. ``layers``: those
    of `cut_layers`, where several steps of one plan are simulated.
    """
    wiring = wiring or Wiring(expand(plan.blocks))
    simulation = _Simulation(plan, prices, wiring, after, slow or Slow())
    if whole:
        return simulation.every(order)
    return simulation.run(layers if layers is not None else cut_layers(plan, prices, order, wiring))


#: the order cut into layers, each with what decides how long it takes, its place in the model left out (None: no layer)
Layers = list[tuple[list[int], tuple[object, ...] | None]]


def cut_layers(plan: Step, prices: StepPrices, order: Sequence[int], wiring: Wiring) -> Layers:
    """The program order as layers, for `simulate`."""
    blocks = plan.blocks.blocks
    return [(segment, _sign(segment, blocks, prices.blocks, wiring.feeds)) for segment in _segments(blocks, order)]


class _Simulation:
    def __init__(self, plan: Step, prices: StepPrices, wiring: Wiring, after: Run | None, slow: Slow) -> None:
        self.plan, self.prices, self.feeds = plan, prices.blocks, wiring.feeds
        self.blocks = plan.blocks.blocks
        world, execution = plan.blocks.world_size, plan.spec.execution
        self.chunks = execution.expert_chunks
        self.rate = prices.rate.copy()
        self.slow_ranks = np.ones(world)
        for rank, factor in slow.gpus.items():
            self.slow_ranks[rank] = factor
        self.slow_links = np.ones(len(self.rate))
        for link, factor in slow.links.items():
            self.slow_links[link] = factor
        self.even = not slow.gpus and not slow.links
        self.compute = np.zeros((world, execution.compute_streams))
        self.communication = np.zeros((world, execution.communication_streams))
        self.links = np.zeros(len(self.rate))
        self.done: dict[int, float] = {}  #: micro-batch -> when its last op of the step before is done
        if after is not None:
            self.compute, self.communication = after.compute.copy(), after.communication.copy()
            self.links = after.links.copy()
            self.done = after.done
        self.start: list[np.ndarray] = [np.zeros(0)] * len(self.blocks)
        self.end: list[np.ndarray] = [np.zeros(0)] * len(self.blocks)
        self.lanes: list[np.ndarray | int] = [0] * len(self.blocks)
        self._uses: dict[int, _Uses | None] = {}

    def every(self, order: Sequence[int]) -> Run:
        """All blocks, one after another."""
        for block in order:
            self.block(block)
        return self._result(len(order))

    def run(self, layers: Layers) -> Run:
        """Layers alike filled in."""
        simulated = 0
        segments, signs = [segment for segment, _ in layers], [sign for _, sign in layers]
        number = 0
        while number < len(segments):
            before = self.compute.copy(), self.communication.copy(), self.links.copy()
            for block in segments[number]:
                self.block(block)
            simulated += len(segments[number])
            alike = number > 0 and signs[number] is not None and signs[number] == signs[number - 1]
            step = self._shift(segments[number - 1], segments[number]) if alike else None
            number += 1
            if step is None:
                continue
            first = number
            while number < len(segments) and signs[number] == signs[first - 1]:
                self._fill(segments[first - 1], segments[number], step * (number - first + 1))
                number += 1
            for now, then in zip((self.compute, self.communication, self.links), before, strict=True):
                now[now != then] += step * (number - first)
        return self._result(simulated)

    def _result(self, simulated: int) -> Run:
        sizes = np.array([len(end) for end in self.end])
        latest, full = np.zeros(len(sizes)), sizes > 0
        latest[full] = np.maximum.reduceat(np.concatenate(self.end), (np.cumsum(sizes) - sizes)[full])
        done: dict[int, float] = {}
        for block, end in zip(self.blocks, latest.tolist(), strict=True):
            if block.kind not in ENDS:
                done[block.micro_batch] = max(done.get(block.micro_batch, 0.0), end)
        state = self.compute, self.communication, self.links
        return Run(self.start, self.end, *state, self.lanes, latest, done, simulated)

    # --- one block ----------------------------------------------------------------------------------------------

    def block(self, number: int) -> None:
        """Start and end of the ops of one block."""
        block, price = self.blocks[number], self.prices[number]
        seconds = price.seconds
        far = on_communication_stream(block)
        if not self.even and not far:
            seconds = seconds * self.slow_ranks[block.ranks].max(axis=1)
        skipped = bool(self.done) and block.kind in ENDS
        ready, last = self._ready(number, block.micro_batch)
        if skipped or not takes_time(block):
            self.start[number] = self.end[number] = ready
            return
        pool = self.communication if far else self.compute
        ranks = block.ranks
        lane: np.ndarray | int = 0
        alone = pool.shape[1] == ranks.shape[1] == 1  # by far the most common: one stream, ops on a rank each
        if alone:
            free = pool[ranks[:, 0], 0]
        elif pool.shape[1] == 1:
            free = pool[ranks, 0].max(axis=1)
        else:
            lane = pool[ranks].argmin(axis=2)
            free = pool[ranks].min(axis=2).max(axis=1)
        start = np.maximum(ready, free)
        end = start + seconds
        if last is not None:  # the last part of the rows arrives when dispatch ends, and takes its share of the time
            end = np.maximum(end, last + seconds / self.chunks)
        if len(price.links):
            end = self._over_links(price, start, end)
        if alone:
            pool[ranks[:, 0], 0] = end
        else:
            pool[ranks, lane] = end[:, None]
        self.start[number], self.end[number], self.lanes[number] = start, end, lane

    def _ready(self, number: int, micro_batch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """When each op has what it reads; and for experts that start on a part of it, when the rest is there."""
        block = self.blocks[number]
        ready = np.zeros(len(block))
        last: np.ndarray | None = None
        for feed in self.feeds[number]:
            source = self.blocks[feed.source]
            if self.done and source.kind in ENDS:
                np.maximum(ready, self.done.get(micro_batch, 0.0), out=ready)
                continue
            end = self.end[feed.source]
            if in_chunks(block, source, self.chunks):
                first = self.start[feed.source] + (end - self.start[feed.source]) / self.chunks
                last = feed.latest(np.zeros(len(block)), end)
                ready = feed.latest(ready, first)
            else:
                ready = feed.latest(ready, end)
        return ready, last

    def _over_links(self, price: BlockPrices, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Ends of transfers with what else is on their links."""
        uses = self._uses_of(price)
        if uses is None:
            return end
        begin = np.maximum(self.links[uses.links], np.minimum.reduceat(start[uses.op], uses.cuts))
        finish = begin + uses.total
        self.links[uses.links] = finish
        latest = np.maximum.reduceat(finish[uses.by_op], uses.op_cuts)
        delayed = end.copy()
        delayed[uses.ops] = np.maximum(end[uses.ops], latest + price.fixed[uses.ops])
        return delayed

    def _uses_of(self, price: BlockPrices) -> _Uses | None:
        """An op's busiest link is busy for all of its time but the fixed part; its others in proportion to theirs."""
        key = id(price)
        if key not in self._uses:
            seconds = occupied(price, self.rate) * self.slow_links[price.links]
            if not seconds.any():
                self._uses[key] = None
                return None
            by_link = np.argsort(price.links, kind="stable")
            links, cuts = np.unique(price.links[by_link], return_index=True)
            ops, op_cuts = np.unique(price.op, return_index=True)
            self._uses[key] = _Uses(
                links,
                cuts,
                price.op[by_link],
                np.add.reduceat(seconds[by_link], cuts),
                np.searchsorted(links, price.links),
                op_cuts,
                ops,
            )
        return self._uses[key]

    # --- layers alike -------------------------------------------------------------------------------------------

    def _shift(self, before: list[int], now: list[int]) -> float | None:
        """By how much later everything of a segment is than in the segment before; None when not all by as much."""
        step = float(self.end[now[-1]][0] - self.end[before[-1]][0])
        most = 1e-12 * float(self.end[now[-1]].max())
        for a, b in zip(before, now, strict=True):
            for times in (self.start, self.end):
                if np.abs(times[b] - times[a] - step).max(initial=0.0) > most:
                    return None
        return step

    def _fill(self, model: list[int], segment: list[int], later: float) -> None:
        for a, b in zip(model, segment, strict=True):
            self.start[b], self.end[b] = self.start[a] + later, self.end[a] + later
            self.lanes[b] = self.lanes[a]


def settled(before: Run, now: Run) -> bool:
    """Whether all that a next step depends on is as much later after ``now`` as after the step ``before`` it, or was used by
    neither: then every further step takes as long."""
    step = now.makespan - before.makespan
    pairs = [(now.compute, before.compute), (now.communication, before.communication), (now.links, before.links)]
    pairs.append((np.array(list(now.done.values())), np.array(list(before.done.values()))))
    most = 1e-12 * now.makespan
    return all(bool(((np.abs(a - b - step) <= most) | (a == b)).all()) for a, b in pairs)


def in_chunks(block: OpBlock, source: OpBlock, chunks: int) -> bool:
    """Whether a block starts on the first of ``chunks`` parts of what its source brings: experts, on dispatched tokens."""
    return chunks > 1 and block.kind == "expert" and source.kind == "dispatch"


def occupied(price: BlockPrices, rate: np.ndarray) -> np.ndarray:
    """Seconds for which each use of a link occupies it; float [uses]."""
    if not len(price.links):
        return np.zeros(0)
    alone = price.bytes / rate[price.links]
    busiest = np.zeros(len(price.seconds))
    np.maximum.at(busiest, price.op, alone)
    moving = price.seconds - price.fixed
    share = np.divide(moving, busiest, out=np.zeros(len(busiest)), where=busiest > 0)
    return np.asarray(alone * share[price.op])


def _sign(
    segment: list[int], blocks: Sequence[OpBlock], prices: Sequence[BlockPrices], feeds: list[list[Feed]]
) -> tuple[object, ...] | None:
    layer = blocks[segment[0]].layer
    if layer is None:
        return None
    sign: list[object] = []
    for number in segment:
        block = blocks[number]
        if block.layer is None:
            return None
        read = tuple((*_place(blocks[f.source], layer), id(f.index), id(f.targets), id(f.cuts)) for f in feeds[number])
        sign.append((*_place(block, layer), id(prices[number]), read))
    return tuple(sign)


def _place(block: OpBlock, layer: int) -> tuple[object, ...]:
    """A block by what it is, its layer counted from ``layer``."""
    own = block.layer
    name = block.name.rpartition(f"L{own}.")[2]
    return name, block.micro_batch, None if own is None else own - layer


def _segments(blocks: Sequence[OpBlock], order: Sequence[int]) -> list[list[int]]:
    """The order cut where the first micro-batch begins a layer."""
    segments: list[list[int]] = [[]]
    for number in order:
        block = blocks[number]
        if block.kind == "attn_qkv" and block.micro_batch == 0:
            segments.append([])
        segments[-1].append(number)
    return [segment for segment in segments if segment]
