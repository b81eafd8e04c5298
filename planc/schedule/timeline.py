"""A simulated step as a whole: what was busy when, what decided its length, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from planc.cost.book import PriceBook
from planc.cost.step import CLASSES, Step, StepPrices, class_of
from planc.graph import OpBlock, expand
from planc.routing import Traffic
from planc.schedule.order import on_communication_stream, program_orders, takes_time
from planc.schedule.simulate import ENDS, Run, Slow, Wiring, cut_layers, in_chunks, settled, simulate

SPLIT = ("computation", "communication", "synchronisation", "overhead")
_ALIKE = 1e-9  #: times that differ by less than this share of the step are one


@dataclass(frozen=True, slots=True)
class Stretch:
    """One op of the critical path. ``cause``: what it waited for last: `data` of the op before it in the path, its `stream`,
    or nothing (`start`). ``delayed``: seconds that other transfers on its links cost it."""

    block: int
    op: int
    start: float
    end: float
    cause: Literal["data", "stream", "start"]
    delayed: float


@dataclass(frozen=True, eq=False)
class Usage:
    """Seconds by rank over the step, float [world]: ``compute`` and ``communication`` streams busy (the union of several);
    ``exposed``: communication while nothing is computed; ``overlapped``: both; ``idle``: neither; ``fixed``: of
    ``compute``, launches and other parts that no size shrinks. compute + exposed + idle is the step on every rank."""

    compute: np.ndarray
    communication: np.ndarray
    exposed: np.ndarray
    overlapped: np.ndarray
    idle: np.ndarray
    fixed: np.ndarray


@dataclass(frozen=True, eq=False)
class Timeline:
    """The simulated step of a plan. ``order``: blocks in program order; ``run``: start and end of every op; ``again``: two
    steps that follow each other on the same GPUs, of which the first may be this one."""

    plan: Step
    prices: StepPrices
    wiring: Wiring
    order: tuple[int, ...]
    run: Run
    again: tuple[Run, Run] | None = None

    @property
    def step(self) -> float:
        """Seconds from the first start to the last end."""
        return self.run.makespan

    @property
    def period(self) -> float:
        """Seconds from step to step when steps follow each other: without the way in and out through the first rank, and
        with pipeline stages filled. Where the model has no vocabulary, hidden states come in anew: the whole step."""
        return self.step if self.again is None else self.again[1].makespan - self.again[0].makespan

    @cached_property
    def start(self) -> np.ndarray:
        """Start of every op, s; float [ops], numbered as in `PlanGraph`."""
        return np.concatenate(self.run.start)

    @cached_property
    def end(self) -> np.ndarray:
        """End of every op, s; float [ops]."""
        return np.concatenate(self.run.end)

    def stream_of(self, block: OpBlock) -> Literal["compute", "communication"]:
        """Kind of stream that the block's ops take."""
        return "communication" if on_communication_stream(block) else "compute"

    @cached_property
    def intervals(self) -> tuple[np.ndarray, ...]:
        """Every occupation of a stream: (rank, far, lane, op, start, end), one entry per member of an op; ``far`` is 1 for
        communication streams. Sorted by rank, kind of stream, lane and start."""
        return self._intervals(np.ones(self.plan.blocks.world_size, dtype=bool))

    def _intervals(self, chosen: np.ndarray) -> tuple[np.ndarray, ...]:
        """The intervals of the ranks that are ``chosen``, bool [world]."""
        parts = []
        for number, block in enumerate(self.plan.blocks.blocks):
            if not takes_time(block):
                continue
            ops, member = np.nonzero(chosen[block.ranks])
            lane = np.broadcast_to(np.asarray(self.run.lanes[number]), block.ranks.shape)[ops, member]
            far = np.full(len(ops), int(on_communication_stream(block)))
            name = ops + int(self.plan.blocks.first_op[number])
            parts.append(
                (block.ranks[ops, member], far, lane, name, self.run.start[number][ops], self.run.end[number][ops])
            )
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        # of two that start together the first takes no time
        order = np.lexsort((columns[3], columns[5], columns[4], columns[2], columns[1], columns[0]))
        return tuple(column[order] for column in columns)

    def _alike(self) -> tuple[np.ndarray, np.ndarray]:
        """(a rank of every kind, the kind of every rank): ranks of one kind are busy at the same times with ops that have the
        same fixed part."""
        mark = np.zeros(self.plan.blocks.world_size, dtype=np.uint64)
        for number, block in enumerate(self.plan.blocks.blocks):
            if takes_time(block):
                times = self.run.start[number], self.run.end[number], self.prices.blocks[number].fixed
                own = np.full(len(block), 2 * number + 1, dtype=np.uint64)
                for time in times:
                    own = (own ^ np.ascontiguousarray(time).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
                    own ^= own >> np.uint64(29)
                mark[block.ranks] = (mark[block.ranks] ^ own[:, None]) * np.uint64(0xBF58476D1CE4E5B9)
        _, first, kind = np.unique(mark, return_index=True, return_inverse=True)
        return first, kind.reshape(-1)

    def stream_busy(self) -> dict[tuple[int, str, int], float]:
        """(rank, kind of stream, lane) -> seconds busy. What is left to `step` is idle."""
        rank, far, lane, _, start, end = self.intervals
        execution, world = self.plan.spec.execution, self.plan.blocks.world_size
        lanes = execution.compute_streams, execution.communication_streams
        table = np.zeros((world, 2, max(lanes)))
        np.add.at(table, (rank, far, lane), end - start)
        return {
            (r, kind, n): float(table[r, f, n])
            for r in range(world)
            for f, kind in enumerate(("compute", "communication"))
            for n in range(lanes[f])
        }

    @cached_property
    def usage(self) -> Usage:
        """Busy, exposed, overlapped and idle seconds of every rank."""
        world = self.plan.blocks.world_size
        first, kind = self._alike()
        chosen = np.zeros(world, dtype=bool)
        chosen[first] = True
        rank, far, _, op, start, end = self._intervals(chosen)
        at = np.concatenate([start, end])
        who = np.concatenate([rank, rank])
        by = np.concatenate([far, far])
        way = np.concatenate([np.ones(len(start), dtype=np.int64), -np.ones(len(end), dtype=np.int64)])
        order = np.lexsort((way, at, who))
        at, who, by, way = at[order], who[order], by[order], way[order]
        near = np.cumsum(np.where(by == 0, way, 0)) > 0  # every rank's ends close its starts, so sums begin at 0 again
        away = np.cumsum(np.where(by == 1, way, 0)) > 0
        same = who[1:] == who[:-1]
        span = np.where(same, at[1:] - at[:-1], 0.0)

        def total(when: np.ndarray) -> np.ndarray:
            return np.asarray(np.bincount(who[:-1], weights=span * when[:-1], minlength=world)[first][kind])

        fixed = np.concatenate([p.fixed for p in self.prices.blocks])
        compute, both = total(near), total(near & away)
        launches = np.bincount(rank[far == 0], weights=fixed[op[far == 0]], minlength=world)[first][kind]
        communication = total(away)
        exposed = communication - both
        idle = np.maximum(self.step - compute - exposed, 0.0)
        return Usage(compute, communication, exposed, both, idle, np.minimum(launches, compute))

    @property
    def split(self) -> dict[str, float]:
        """Shares of the step, mean over ranks: computation, communication that nothing hides, synchronisation (waiting for
        others), overhead (launches, which no size shrinks)."""
        usage = self.usage
        compute, fixed = float(usage.compute.mean()), float(usage.fixed.mean())
        parts = compute - fixed, float(usage.exposed.mean()), float(usage.idle.mean()), fixed
        return {name: part / self.step for name, part in zip(SPLIT, parts, strict=True)}

    @property
    def overlap_efficiency(self) -> float:
        """Share of communication that computation hides, over all ranks; 0 where there is none."""
        total = float(self.usage.communication.sum())
        return float(self.usage.overlapped.sum()) / total if total else 0.0

    # --- links --------------------------------------------------------------------------------------------------

    @cached_property
    def link_bytes(self) -> np.ndarray:
        """Bytes over every link in the step, float [links]."""
        total = np.zeros(len(self.prices.rate))
        for price in self.prices.blocks:
            if len(price.links):
                total += np.bincount(price.links, weights=price.bytes, minlength=len(total))
        return total

    @property
    def link_utilization(self) -> np.ndarray:
        """Share of every link's full bandwidth that the step uses, float [links]."""
        return np.asarray(self.link_bytes / (self.prices.rate * self.step))

    # --- the critical path --------------------------------------------------------------------------------------

    @cached_property
    def critical_path(self) -> tuple[Stretch, ...]:
        """The ops that decided the length of the step, first to last: each starts when the one before ends."""
        blocks, run = self.plan.blocks.blocks, self.run
        position = {block: n for n, block in enumerate(self.order)}
        block = max(range(len(blocks)), key=lambda n: (float(run.end[n].max(initial=0.0)), -n))
        op = int(run.end[block].argmax())
        path: list[Stretch] = []
        while True:
            start, end = float(run.start[block][op]), float(run.end[block][op])
            price = float(self.prices.blocks[block].seconds[op]) if takes_time(blocks[block]) else 0.0
            before = self._last_read(block, op, start)
            cause: Literal["data", "stream", "start"] = "data"
            if before is None and takes_time(blocks[block]):
                before, cause = self._last_on_streams(position[block], block, op, start), "stream"
            if before is None:
                cause = "start"
            path.append(Stretch(block, op, start, end, cause, max(0.0, end - start - price)))
            if before is None:
                return tuple(reversed(path))
            block, op = before

    def _last_read(self, block: int, op: int, start: float) -> tuple[int, int] | None:
        """The op whose result came last, if its coming is what let this op start."""
        blocks, chunks = self.plan.blocks.blocks, self.plan.spec.execution.expert_chunks
        near, found, latest = _ALIKE * self.step, None, -1.0
        for feed in self.wiring.feeds[block]:
            sources = feed.sources(op)
            came = self.run.end[feed.source][sources]
            if in_chunks(blocks[block], blocks[feed.source], chunks):
                first = self.run.start[feed.source][sources]  # experts start on a part of the rows
                came = first + (came - first) / chunks
            if len(sources) and came.max() > latest:
                latest, found = float(came.max()), (feed.source, int(sources[came.argmax()]))
        return found if latest >= start - near and start > near else None

    def _last_on_streams(self, position: int, block: int, op: int, start: float) -> tuple[int, int] | None:
        """The op before this one on a stream of one of its ranks that ended when this one started."""
        blocks, near = self.plan.blocks.blocks, _ALIKE * self.step
        ranks, far = blocks[block].ranks[op], on_communication_stream(blocks[block])
        if start <= near:
            return None
        for other in reversed(self.order[:position]):
            if not takes_time(blocks[other]) or on_communication_stream(blocks[other]) != far:
                continue
            ended = np.abs(self.run.end[other] - start) <= near
            if ended.any():
                ended &= np.isin(blocks[other].ranks, ranks).any(axis=1)
                if ended.any():
                    return other, int(ended.argmax())
        return None

    @property
    def path_by_class(self) -> dict[str, float]:
        """Seconds of the critical path by class of op; their sum is the step."""
        total = dict.fromkeys(CLASSES, 0.0)
        at = 0.0
        for stretch in self.critical_path:
            key = class_of(self.plan.blocks.blocks[stretch.block])
            total[key] += max(0.0, stretch.end - max(at, stretch.start))
            at = max(at, stretch.end)
        return {key: value for key, value in total.items() if value > 0}

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Bounds of the step's 90 % interval, s: deviations of one family of ops add up along the critical path, those of
        several families as independent ones do."""
        down: dict[str, float] = {}
        up: dict[str, float] = {}
        for stretch in self.critical_path:
            price = self.prices.blocks[stretch.block]
            s, low, high = (float(v[stretch.op]) for v in (price.seconds, price.low, price.high))
            down[price.family] = down.get(price.family, 0.0) + s - low
            up[price.family] = up.get(price.family, 0.0) + high - s
        less, more = (float(np.sqrt(sum(v * v for v in part.values()))) for part in (down, up))
        return max(self.floor, self.step - less), self.step + more

    @property
    def period_interval(self) -> tuple[float, float]:
        """Bounds of the period's 90 % interval, s: as far from it, in proportion, as those of the step."""
        low, high = (self.period / self.step * bound for bound in self.interval)
        return max(self.period_floor, low), high

    @cached_property
    def floor(self) -> float:
        """Seconds that the step takes at least: the longest way through the graph, and the most work of one compute stream,
        when every op takes its floor (bytes ÷ bandwidth, FLOPs ÷ peak, at full rates; no latency, no launch)."""
        return self._floor(ends=True)

    @cached_property
    def period_floor(self) -> float:
        """Seconds that the period takes at least: as `floor`, without what happens only before the first step and after the
        last."""
        return self._floor(ends=self.again is None)

    def _floor(self, *, ends: bool) -> float:
        """The floor with or without the ops at both ends of a step (`ENDS`)."""
        blocks, chunks = self.plan.blocks.blocks, self.plan.spec.execution.expert_chunks
        start: list[np.ndarray] = [np.zeros(0)] * len(blocks)
        end: list[np.ndarray] = [np.zeros(0)] * len(blocks)
        busy = np.zeros(self.plan.blocks.world_size)
        for number in self.order:
            block, floor = blocks[number], self.prices.blocks[number].floor
            if not takes_time(block) or (block.kind in ENDS and not ends):
                floor = np.zeros(len(block))
            ready, last = np.zeros(len(block)), np.zeros(len(block))
            for feed in self.wiring.feeds[number]:
                came = end[feed.source]
                if in_chunks(block, blocks[feed.source], chunks):
                    last = feed.latest(last, came)
                    came = start[feed.source] + (came - start[feed.source]) / chunks
                ready = feed.latest(ready, came)
            start[number], end[number] = ready, np.maximum(ready + floor, last + floor / chunks)
            if not on_communication_stream(block):
                busy[block.ranks[:, 0]] += floor
        longest = max(float(times.max()) for times in end)
        return max(longest, float(busy.max()) / self.plan.spec.execution.compute_streams)

    @property
    def provenance(self) -> dict[str, float]:
        """Share of the critical path by where its prices come from, least known first; a price of several kinds counts as
        the least known of them."""
        total: dict[str, float] = {}
        for stretch in self.critical_path:
            word = self.prices.blocks[stretch.block].provenance[0]
            total[word] = total.get(word, 0.0) + stretch.end - stretch.start
        everything = sum(total.values()) or 1.0
        return {word: value / everything for word, value in sorted(total.items())}


def timeline(
    plan: Step,
    *,
    book: PriceBook | None = None,
    traffic: Traffic | None = None,
    slow: Slow | None = None,
    whole: bool = False,
    wiring: Wiring | None = None,
    order: Sequence[int] | None = None,
    by_speed: bool = False,
) -> Timeline:
    """Price and simulate the plan's step.

    ``book`` keeps prices between calls; ``traffic``: where tokens go (`planc.cost.exchange`); ``slow``: GPUs and links that
    are slower than planned; ``whole``: simulate every layer, alike or not; ``wiring`` and ``order``: those of another step
    of the same structure; ``by_speed``: copies of an expert share its tokens by the speed of their GPUs.
    """
    speed = _speeds(plan, slow) if by_speed and slow else None
    prices = StepPrices(plan, book or PriceBook(), traffic, speed)
    wiring = wiring or Wiring(expand(plan.blocks))
    orders = [list(order)] if order is not None else program_orders(plan, prices.blocks)
    if not plan.spec.model.vocab:  # every step is one by itself
        run = simulate(plan, prices, orders[0], wiring, slow=slow, whole=whole)
        return Timeline(plan, prices, wiring, tuple(orders[0]), run)
    lines = []
    for chosen in orders:  # what is quickest once may not be where steps follow each other
        layers = None if whole else cut_layers(plan, prices, chosen, wiring)
        steps: list[Run] = []
        alone = plan.parallelism.pp == plan.spec.workload.micro_batches == 1
        for _ in range(2 if alone else 4):  # a pipeline needs some steps to fill
            after = steps[-1] if steps else None
            steps.append(simulate(plan, prices, chosen, wiring, after=after, slow=slow, whole=whole, layers=layers))
            if after is not None and settled(after, steps[-1]):
                break
        lines.append(Timeline(plan, prices, wiring, tuple(chosen), steps[0], (steps[-2], steps[-1])))
    return min(lines, key=lambda line: line.period)


def _speeds(plan: Step, slow: Slow) -> np.ndarray:
    """Speed of every rank of an EP group, 1 as planned; float [ep]. Replicas and stages have one table of shares: the slowest
    of the ranks in one place counts."""
    speed = np.ones(plan.parallelism.world_size)
    for rank, factor in slow.gpus.items():
        speed[rank] = 1.0 / factor
    return np.asarray(speed.reshape(-1, plan.parallelism.ep).min(axis=0))
