"""Predictions over many workloads of one plan, and the batch that serves most under bounds."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from planc.cost.step import PriceBook, Step
from planc.placement import Parallelism, largest_that_fits
from planc.routing import Traffic
from planc.schedule.estimate import Estimate, prefill_chunk, prefill_step
from planc.schedule.simulate import Wiring
from planc.schedule.timeline import Timeline, timeline
from planc.schedule.workload import at_workload, changed
from planc.spec import Spec


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

    def __init__(self, plan: Step, traffic: Traffic | None = None) -> None:
        self.plan, self.traffic = plan, traffic
        self.book = PriceBook()
        self._wiring: dict[tuple[str, int], Wiring] = {}
        self._prefill: dict[tuple[int, int], Timeline] = {}

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
        chunk = prefill_chunk(draft)
        prefill = None
        if chunk:  # its step depends on the prompt, not on the batch
            key = chunk, draft.spec.workload.isl
            if key not in self._prefill:
                self._prefill[key] = self._line(prefill_step(draft, chunk))
            prefill = self._prefill[key]
        return Estimate(draft, self._line(draft), prefill, {}), draft.memory.fits

    def _line(self, draft: Step) -> Timeline:
        key = draft.spec.workload.phase, draft.spec.workload.micro_batches
        line = timeline(draft, book=self.book, traffic=self.traffic, wiring=self._wiring.get(key))
        self._wiring.setdefault(key, line.wiring)
        return line

    def best_batch(
        self, tpot: float | None, ttft: float | None, progress: Callable[[int, int], None] | None = None
    ) -> Best:
        """The batch with the most TPS that keeps the bounds and fits memory, exactly; the smaller of two with as many.

        Batches that give a TP group the same tokens share one step, of which the largest batch has the most TPS. Steps are
        simulated until no other can be better: a step takes at least what bounds the smaller ones (`_least`), so between two
        simulated steps no TPS exceeds the largest batch there ÷ the bound of the lower, and none keeps a TPOT that this
        bound exceeds.
        """
        par = self.plan.parallelism
        spec = changed(self.plan.spec, phase="decode")
        limit = largest_that_fits(spec, par, self.plan.placement, "batch")
        batches = largest_batches(spec, par, limit)
        if not batches:
            return Best(None, None, 0, 0, 0, limit)
        found: dict[int, Estimate] = {}
        best: int | None = None

        def look(number: int) -> None:
            nonlocal best
            one = found[number] = self._estimate(batch=batches[number])[0]
            if progress:
                progress(len(found), len(batches))
            kept = _excess(one.tpot, tpot) <= 1 and _excess(one.ttft, ttft) <= 1
            if kept and (best is None or ((one.tps or 0.0), -number) > ((found[best].tps or 0.0), -best)):
                best = number

        look(0)
        look(len(batches) - 1)
        heap = [self._between(0, len(batches) - 1, batches, found)]
        while heap:
            most, low, high = heapq.heappop(heap)
            if high - low < 2 or (best is not None and -most < (found[best].tps or 0.0)):
                continue
            if tpot is not None and self._least(found[low]) > tpot:
                continue
            middle = (low + high) // 2
            look(middle)
            for pair in ((low, middle), (middle, high)):
                heapq.heappush(heap, self._between(*pair, batches, found))
        missed = {n: max(_excess(one.tpot, tpot), _excess(one.ttft, ttft)) for n, one in found.items()}
        nearest = min(missed, key=lambda n: (missed[n], n))
        at = [None if n is None else self.at(batch=batches[n]) for n in (best, nearest)]
        return Best(at[0], at[1], len(found), len(batches) - len(found), len(batches), limit)

    def _between(self, low: int, high: int, batches: list[int], found: dict[int, Estimate]) -> tuple[float, int, int]:
        """(− most TPS of the steps between two simulated ones, their numbers)."""
        return -batches[max(low, high - 1)] / self._least(found[low]), low, high

    def _least(self, found: Estimate) -> float:
        """Seconds that no step of a larger batch undercuts. That is the step's own TPOT where prices never fall as batches
        grow and the program order is one; a library that changes kernels (grouped-query decode, docs/accuracy.md) and
        micro-batches in an order that changes leave its floor."""
        spec = self.plan.spec
        changes = spec.model.attention.kind == "gqa" or spec.workload.micro_batches > 1
        assert found.tpot is not None
        return found.floors["tpot_s"] if changes else found.tpot


def largest_batches(spec: Spec, par: Parallelism, limit: int) -> list[int]:
    """Of every decode step that some batch up to ``limit`` gives, the largest such batch, ascending."""
    groups = par.dp * par.attention_dp
    # `step_tokens` rounds a TP group's tokens up to micro-batches, and to ranks where every one of them gates
    alike = groups * spec.workload.micro_batches * (1 if par.leaders_gate else par.tp)
    return [min(limit, batch) for batch in range(alike, limit + alike, alike)] if limit > 0 else []
