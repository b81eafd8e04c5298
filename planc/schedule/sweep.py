"""Predictions over many workloads of one plan, and the batch that serves most under bounds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planc.cost.book import PriceBook
from planc.cost.step import Step
from planc.placement import Parallelism, largest_that_fits, step_tokens
from planc.routing import Traffic
from planc.schedule.estimate import Estimate, prefill_chunk, prefill_step
from planc.schedule.simulate import Wiring
from planc.schedule.timeline import Timeline, timeline
from planc.schedule.workload import at_workload, changed
from planc.spec import Spec
from planc.verify import Draft


@dataclass(frozen=True, slots=True)
class Point:
    """The prediction for one workload: ``changes`` are its differences from the spec's. Times in s; ``floor``: of TPOT."""

    changes: dict[str, int]
    batch: int
    tpot: float
    low: float
    high: float
    floor: float
    tps: float
    tps_per_gpu: float
    ttft: float | None
    fits: bool  #: whether memory holds it

    def within(self, tpot: float | None, ttft: float | None) -> bool:
        """Whether it keeps the bounds (s; None: no bound)."""
        return _excess(self.tpot, tpot) <= 1.0 and _excess(self.ttft, ttft) <= 1.0


def _excess(value: float | None, bound: float | None) -> float:
    return 0.0 if bound is None else float("inf") if value is None else value / bound


@dataclass(frozen=True, slots=True)
class Best:
    """The best batch under bounds: ``point``, or None where no batch keeps them; then ``nearest`` misses them least of
    those simulated. ``simulated``: distinct steps simulated, ``pruned``: left out by bounds, ``steps``: all there are;
    ``limit``: the largest batch that fits memory."""

    point: Point | None
    nearest: Point | None
    simulated: int
    pruned: int
    steps: int
    limit: int


class Sweep:
    """Predicts a plan at other workloads; prices of kernels and the wiring of the graph are kept between them."""

    def __init__(self, plan: Step, traffic: Traffic | None = None, book: PriceBook | None = None) -> None:
        self.plan, self.traffic = plan, traffic
        self.book = book or PriceBook()
        self._wiring: dict[tuple[str, int], Wiring] = {}
        self._prefill: dict[tuple[int, int], Timeline] = {}
        self._chunk: dict[tuple[int, int, int], int] = {}

    def at(self, **changes: int) -> Point:
        """The prediction for the decode step with these values of ``workload``."""
        found, fits = self._estimate(**changes)
        assert found.decode is not None and found.tpot is not None and found.tps is not None
        low, high = found.intervals["tpot_s"]
        batch, floor = found.plan.spec.workload.batch, found.floors["tpot_s"]
        gpus = found.plan.parallelism.world_size
        return Point(changes, batch, found.tpot, low, high, floor, found.tps, found.tps / gpus, found.ttft, fits)

    def _estimate(self, **changes: int) -> tuple[Estimate, bool]:
        """(prediction, whether it fits memory)."""
        draft = at_workload(self.plan, phase="decode", **changes)
        found = Estimate(draft, self._line(draft), self._prefilled(draft), {})
        return found, draft.memory.fits and found.serves

    def _prefilled(self, draft: Draft) -> Timeline | None:
        """The prefill step beside a decode step. It depends on the prompt and on what memory the sequences leave, not on the
        batch itself."""
        work, sequences = draft.spec.workload, step_tokens(draft.spec, draft.parallelism).sequences
        room = work.isl, work.osl, sequences
        if room not in self._chunk:
            self._chunk[room] = prefill_chunk(draft.spec, draft.parallelism, draft.placement)
        chunk = self._chunk[room]
        if not chunk:
            return None
        key = chunk, work.isl
        if key not in self._prefill:
            self._prefill[key] = self._line(prefill_step(draft, chunk))
        return self._prefill[key]

    def _line(self, draft: Step) -> Timeline:
        key = draft.spec.workload.phase, draft.spec.workload.micro_batches
        line = timeline(draft, book=self.book, traffic=self.traffic, wiring=self._wiring.get(key))
        self._wiring.setdefault(key, line.wiring)
        return line

    def best_batch(
        self, tpot: float | None, ttft: float | None, progress: Callable[[int, int], None] | None = None
    ) -> Best:
        """The batch with the most TPS that keeps the bounds and fits memory, exactly; the smaller of two with as many.

        Batches that give a TP group the same tokens share one step. Steps are simulated until no other can be better: a step
        takes at least what bounds the smaller ones (`_least`), so between two simulated steps no TPS exceeds the largest batch
        there ÷ the bound of the lower, and none keeps a TPOT that this bound exceeds.
        """
        par = self.plan.parallelism
        spec = changed(self.plan.spec, phase="decode")
        limit = largest_that_fits(spec, par, self.plan.placement, "batch")
        batches = largest_batches(spec, par, limit)
        if not batches:
            return Best(None, None, 0, 0, 0, limit)
        found: dict[int, Estimate] = {}
        best: tuple[float, int] = (0.0, 0)  # most TPS, − its batch
        nearest: tuple[float, int] | None = None  # least excess over the bounds, its batch

        def look(number: int) -> None:
            nonlocal best, nearest
            found[number] = self._estimate(batch=batches[number])[0]
            if progress:
                progress(len(found), len(batches))
            for one in self._of_one_step(found[number], batches[number - 1] if number else 0):
                batch = one.plan.spec.workload.batch
                excess = max(_excess(one.tpot, tpot), _excess(one.ttft, ttft))
                nearest = min(nearest or (excess, batch), (excess, batch))
                if excess <= 1.0:
                    best = max(best, (one.tps or 0.0, -batch))

        look(0)
        look(len(batches) - 1)
        heap = [self._between(0, len(batches) - 1, batches, found)]
        while heap:
            most, low, high = heapq.heappop(heap)
            if high - low < 2 or -most < best[0]:
                continue
            if tpot is not None and self._least(found[low]) > tpot:
                continue
            middle = (low + high) // 2
            look(middle)
            for pair in ((low, middle), (middle, high)):
                heapq.heappush(heap, self._between(*pair, batches, found))
        at = [self.at(batch=batch) if batch else None for batch in (-best[1], nearest[1] if nearest else 0)]
        return Best(at[0], at[1], len(found), len(batches) - len(found), len(batches), limit)

    def _of_one_step(self, largest: Estimate, below: int) -> Iterator[Estimate]:
        """The predictions among which the best of a step's batches is: that of the ``largest``. Where the same GPUs prefill, all
        from ``below`` + 1 on that leave room for it: more sequences bring more prompts, which can cost more than they yield."""
        if largest.plan.spec.execution.serving == "apart":
            yield largest
            return
        assert isinstance(largest.plan, Draft)
        for batch in range(below + 1, largest.plan.spec.workload.batch + 1):
            draft = replace(largest.plan, spec=changed(largest.plan.spec, batch=batch))
            one = Estimate(draft, largest.decode, self._prefilled(draft), {})
            if one.serves:
                yield one

    def _between(self, low: int, high: int, batches: list[int], found: dict[int, Estimate]) -> tuple[float, int, int]:
        """(− most TPS of the steps between two simulated ones, their numbers)."""
        return -batches[max(low, high - 1)] / self._least(found[low]), low, high

    def _least(self, found: Estimate) -> float:
        """Seconds per token that no larger batch undercuts. Those are the step's own, without turns of prompts, where prices
        never fall as batches grow and the program order is one; a library that changes kernels (grouped-query decode,
        docs/accuracy.md), and micro-batches or several streams in an order that changes leave the floor."""
        spec = self.plan.spec
        streams = spec.execution.compute_streams, spec.execution.communication_streams
        changes = spec.model.attention.kind == "gqa" or spec.workload.micro_batches > 1 or streams != (1, 1)
        assert found.tpot_alone is not None
        return found.floors["tpot_s"] if changes else found.tpot_alone


def largest_batches(spec: Spec, par: Parallelism, limit: int) -> list[int]:
    """Of every decode step that some batch up to ``limit`` gives, the largest such batch, ascending."""
    groups = par.dp * par.attention_dp
    # `step_tokens` rounds a TP group's tokens up to micro-batches, and to ranks where every one of them gates
    alike = groups * spec.workload.micro_batches * (1 if par.leaders_gate else par.tp)
    return [min(limit, batch) for batch in range(alike, limit + alike, alike)] if limit > 0 else []
