"""The search itself: bounds for all candidates, exact simulation of those that may still be best, until none can.

Candidates are looked at best bound first. One whose bound cannot beat what was found is left out, and with it all that
follow: so the answer is the best of the declared space, not of those simulated. Waves of candidates are evaluated together,
by as many workers as there are; their size is fixed, so that the result is the same for any number of workers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from planc.cost.book import PriceBook
from planc.placement import memory_table, place_experts
from planc.placement.legality import least_excess
from planc.placement.stages import make_parallelism
from planc.schedule.estimate import prefill_chunk, prefill_chunks, token_time
from planc.search.bound import Bounds
from planc.search.evaluate import Outcome, Row
from planc.search.space import Axes, Shape, reason_of, shapes, slots_of, spec_of, with_cluster
from planc.spec import Spec

#: candidates that are simulated together
WAVE = 4
#: tokens of a TP group up to which every number is looked at; beyond, as many per doubling
FINE = 128
#: by how much the order of ops may make a step quicker than a smaller or larger one of the same shape foretells
SLACK = 0.02
LONGER = 2  #: a prefill step alone takes at most as many times what one of a row takes, per pipeline stage
BATCH = 10**8  #: the largest that a spec may have
MEMORY = reason_of("PLN201")
PADDING = "the same step as a larger batch (padding)"
OTHER_RULE = "experts of a layer per GPU: not what was asked for"
STOPPED = "not looked at: the search stopped at its limit"

Evaluate = Callable[..., list[Outcome]]  #: (shapes with batches, whole=False) -> what became of each
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Goal:
    """What is best, under which bounds (s, tokens/s; None: no bound)."""

    objective: str = "tps"
    tpot: float | None = None
    ttft: float | None = None
    tps: float | None = None
    one_expert_per_gpu: bool | None = None  #: only plans that do, or (False) only others; None for all

    def worth(self, row: Row) -> float:
        """How good a candidate is; more is better."""
        return self.value(row["tps"], row["tpot_s"], row["gpus"])

    def value(self, tps: float, tpot: float, gpus: int) -> float:
        """The objective as a number of which more is better. A GPU costs the same wherever it is, so that the cheapest token
        is that of the most tokens per GPU."""
        if self.objective == "tpot":
            return -tpot
        if self.objective == "gpus":
            return -gpus + 0.5 * min(1.0, tps / gpus / 1e9)  # of as few GPUs the one that serves more
        return tps if self.objective == "tps" else tps / gpus

    def keeps(self, row: Row) -> bool:
        """Whether a candidate keeps the bounds."""
        return not self.missed(row)

    def missed(self, row: Row) -> dict[str, float]:
        """Bounds that a candidate misses -> by which factor."""
        found = {}
        if self.tpot is not None and row["tpot_s"] > self.tpot:
            found["tpot"] = row["tpot_s"] / self.tpot
        if self.ttft is not None and (row["ttft_s"] is None or row["ttft_s"] > self.ttft):
            found["ttft"] = np.inf if row["ttft_s"] is None else row["ttft_s"] / self.ttft
        if self.tps is not None and row["tps"] < self.tps:
            found["tps"] = self.tps / row["tps"]
        return found


class Candidate(NamedTuple):
    """A shape at a batch with its predicted numbers."""

    shape: Shape
    batch: int
    row: Row


@dataclass(slots=True)
class Found:
    """What a search came to. ``top``: the best candidates, best first; ``nearest``: of those simulated the one that misses the
    bounds least; ``optimal``: whether no other candidate of the space can be better; ``most``: what one left out could be
    worth at most, where it is not."""

    top: list[Candidate] = field(default_factory=list)
    nearest: Candidate | None = None
    optimal: bool = True
    most: float | None = None


class Explorer:
    """A declared space with its bounds, searched as often as asked: what was simulated is kept."""

    def __init__(self, spec: Spec, space: Axes, evaluate: Evaluate, book: PriceBook | None = None) -> None:
        self.spec, self.evaluate = spec, evaluate
        self.shapes, self.refused = shapes(spec, space)
        self.known: dict[tuple[int, int], Outcome] = {}  #: (shape, point) -> what became of it
        self._fitting: dict[int, int] = {}
        self._least: dict[int, Array] = {}  #: shape -> seconds of its steps at least, by point
        self._steps: dict[int, dict[int, float]] = {}  #: shape -> point -> seconds of its step, as simulated
        self._bound: dict[
            int, tuple[Array, Array]
        ] = {}  #: shape -> (TPOT at least, TPS at most), until a step is simulated
        clusters = {gpus: with_cluster(spec, gpus) for gpus in dict.fromkeys(shape.gpus for shape in self.shapes)}
        self._roughly = [rough_limit(clusters[shape.gpus], shape) for shape in self.shapes]
        self.asked = "batch" in space
        #: what every shape is looked at with, ascending: batches that are asked for, or tokens of a TP group and micro-batch
        self.points = np.array(sorted(space["batch"])) if self.asked else thinned(max(self._roughly, default=0))
        self.book = book or PriceBook()
        self._bounds = {gpus: Bounds(whole, self.book, self._grid(gpus)) for gpus, whole in clusters.items()}
        self._prefill: dict[int, Bounds] = {}

    # --- candidates ---------------------------------------------------------------------------------------------

    def _grid(self, gpus: int) -> Array:
        """Tokens of a TP group and micro-batch that the shapes on so many GPUs have."""
        if not self.asked:
            return self.points
        return np.unique(np.concatenate([self.tokens(shape) for shape in self.shapes if shape.gpus == gpus]))

    @property
    def candidates(self) -> int:
        """Combinations of a shape with a batch, whether legal or not."""
        return (len(self.shapes) + self.refused.total()) * len(self.points)

    def tokens(self, shape: Shape) -> Array:
        """Tokens of a TP group and micro-batch at every point."""
        return tokens_of(shape, self.points) if self.asked else self.points

    def batches(self, shape: Shape) -> Array:
        """The batch of every point: as asked for, or the largest that gives a TP group so many tokens."""
        return self.points if self.asked else self.points * (shape.groups * shape.micro_batches)

    def whole(self, shape: Shape) -> Array:
        """Points that are steps of their own, bool [points]: as many tokens for every rank that gates."""
        return np.asarray((self.tokens(shape) % (1 if shape.leaders else shape.tp)) == 0)

    def allowed(self, number: int) -> Array:
        """Points that a shape has, bool [points]: whole ones within memory, which is known exactly once it was asked for."""
        shape = self.shapes[number]
        if number in self._fitting:
            fits = np.arange(len(self.points)) < self._fitting[number]
        else:
            fits = self.tokens(shape) <= self._roughly[number]
        return np.asarray(self.whole(shape) & fits)

    def bound(self, number: int) -> tuple[Array, Array]:
        """(TPOT at least, TPS at most) at every point. Steps of the shape that were simulated tell of the others: where no op
        takes less than a part ρ of its time there, the step takes no less than ρ of its own, but for `SLACK`."""
        if number not in self._bound:
            self._bound[number] = self._made_bound(number)
        return self._bound[number]

    def _made_bound(self, number: int) -> tuple[Array, Array]:
        shape = self.shapes[number]
        bounds, execution = self._bounds[shape.gpus], self.spec.execution
        at = np.searchsorted(bounds.grid, self.tokens(shape)) if self.asked else np.arange(len(self.points))
        if number not in self._least:
            self._least[number] = bounds.step(shape)[at]
        step = self._least[number]
        for point, seconds in self._steps.get(number, {}).items():
            step = np.maximum(step, bounds.scale(shape, int(at[point]))[at] * (seconds * (1 - SLACK)))
            step[point] = seconds
        tpot = (step + execution.step_overhead) / execution.tokens_per_step
        if shape.serving == "together" and self.spec.workload.osl:
            tpot = self._beside_prefill(number, tpot)
        return tpot, self.batches(shape) / tpot

    def _beside_prefill(self, number: int, tpot: Array) -> Array:
        """TPOT at least, where the prompts of others take turns, at the best chunk. It grows with what a prompt takes and
        shrinks with TTFT, of which there is at most `LONGER` times what steps that follow each other take."""
        shape, work = self.shapes[number], self.spec.workload
        others = self.batches(shape) - 1
        found = []
        for chunk, step in zip(*self._prefill_steps(number), strict=True):
            tokens = chunk if shape.leaders else -(-chunk // shape.tp) * shape.tp
            prompt, first = step * work.isl / (tokens * shape.groups), step * -(work.isl // -chunk) * LONGER * shape.pp
            found.append(token_time(tpot, prompt, first, others, work.osl))
        return np.asarray(np.minimum.reduce(found))

    def _prefill_steps(self, number: int) -> tuple[Array, Array]:
        """(prompt tokens of a TP group in a prefill step, seconds of such a step at least), float [chunks] each."""
        shape = replace(self.shapes[number], micro_batches=1)
        if shape.gpus not in self._prefill:
            whole, chunks = with_cluster(self.spec, shape.gpus), np.array(prefill_chunks(self.spec))
            self._prefill[shape.gpus] = Bounds(whole, self.book, chunks, prefill=True)
        bounds = self._prefill[shape.gpus]
        return bounds.grid, bounds.step(shape)

    def ttft(self, number: int) -> float:
        """TTFT at least, whatever the batch: prefill steps of a prompt, each at its bound, at the best chunk."""
        chunks, steps = self._prefill_steps(number)
        return float((-(self.spec.workload.isl // -chunks) * steps).min())

    def one_expert(self, shape: Shape) -> bool:
        """Whether a GPU of the shape has at most one expert of any layer."""
        return self.spec.model.moe is not None and slots_of(self.spec, shape) == 1

    def fitting(self, number: int) -> int:
        """How many points of a shape, from the first on, fit memory, exactly."""
        if number not in self._fitting:
            self._fitting[number] = self._exactly(self.shapes[number], self._roughly[number])
        return self._fitting[number]

    def _exactly(self, shape: Shape, roughly: int) -> int:
        batches = self.batches(shape)
        degrees = {key: getattr(shape, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}

        def fits(point: int) -> bool:
            spec = spec_of(self.spec, shape, int(batches[point]))
            par = make_parallelism(spec, degrees)
            placement = place_experts(spec, par)
            prefills = shape.serving == "apart" or prefill_chunk(spec, par, placement) > 0
            return prefills and memory_table(spec, par, placement).fits

        low, high = -1, int((self.tokens(shape) <= roughly).sum())
        step = 1
        while high - low > 1:  # the rough limit is close: look near it first
            middle = max(high - step, (low + high) // 2 if step > 4 else low + 1)
            low, high = (middle, high) if fits(middle) else (low, middle)
            step *= 2
        return low + 1

    # --- searching ----------------------------------------------------------------------------------------------

    def search(
        self,
        goal: Goal,
        *,
        top: int = 1,
        most: int = 10_000,
        within: float = 0.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Found:
        """The ``top`` candidates (one of every shape) of a goal, among those that keep its bounds. After ``most`` simulations
        it stops and says what the rest could be worth. ``within``: a share by which others may be better than what is
        found."""
        found = Found()
        best: dict[int, tuple[float, Candidate]] = {}  # shape -> its best candidate
        heap: list[tuple[float, int]] = []
        worth: dict[int, Array] = {}
        for number, shape in enumerate(self.shapes if len(self.points) else ()):
            if goal.one_expert_per_gpu is not None and goal.one_expert_per_gpu is not self.one_expert(shape):
                continue
            worth[number] = self._worth(number, goal)
            self._push(heap, worth, number)
        simulated = 0
        tried: dict[int, set[int]] = {}
        while heap:
            wave: list[tuple[int, int]] = []
            floor = self._nth(best, top)
            floor += within * abs(floor) if floor > -np.inf else 0.0
            while heap and len(wave) < min(WAVE, max(1, most - simulated)) and -heap[0][0] > floor:
                _, number = heapq.heappop(heap)
                if number not in self._fitting:
                    self.fitting(number)
                    self._renew(heap, worth, number, goal, tried, best)
                    continue
                wave.append((number, int(np.argmax(worth[number]))))
            if not wave:
                break
            unknown = [one for one in wave if one not in self.known]
            if simulated and simulated + len(unknown) > most:
                found.optimal, found.most = (
                    False,
                    max(-heap[0][0] if heap else -np.inf, *(worth[n][p] for n, p in wave)),
                )
                break
            simulated += len(unknown)
            self._simulate(unknown)
            for number, point in wave:
                tried.setdefault(number, set()).add(point)
                row = self.known[number, point].row
                if row is None:
                    self._renew(heap, worth, number, goal, tried, best)
                    continue
                one = Candidate(self.shapes[number], int(self.batches(self.shapes[number])[point]), row)
                excess = max(goal.missed(row).values(), default=0.0)
                if not excess and (number not in best or goal.worth(row) > best[number][0]):
                    best[number] = goal.worth(row), one
                if found.nearest is None or excess < max(goal.missed(found.nearest.row).values(), default=0.0):
                    found.nearest = one
                self._renew(heap, worth, number, goal, tried, best)
            if progress:
                progress(len(self.known), 0)
        ranked = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
        found.top = [one for _, (_, one) in ranked[:top]]
        return found

    def _nth(self, best: dict[int, tuple[float, Candidate]], top: int) -> float:
        """What a candidate must be worth more than to count."""
        if len(best) < top:
            return -np.inf
        return sorted((value for value, _ in best.values()), reverse=True)[top - 1]

    def _worth(self, number: int, goal: Goal) -> Array:
        """What the candidates of a shape are worth at most, by point; −inf for those that cannot keep a bound."""
        shape = self.shapes[number]
        tpot, tps = self.bound(number)
        if goal.objective == "tpot":
            value = -tpot
        elif goal.objective == "gpus":
            value = -shape.gpus + 0.5 * np.minimum(1.0, tps / shape.gpus / 1e9)
        else:
            value = tps if goal.objective == "tps" else tps / shape.gpus
        good = self.allowed(number)
        if goal.tpot is not None:
            good &= tpot <= goal.tpot
        if goal.tps is not None:
            good &= tps >= goal.tps
        if goal.ttft is not None and self.ttft(number) > goal.ttft:
            good[:] = False
        return np.where(good, value, -np.inf)

    def _renew(
        self,
        heap: list[tuple[float, int]],
        worth: dict[int, Array],
        number: int,
        goal: Goal,
        tried: dict[int, set[int]],
        best: dict[int, tuple[float, Candidate]],
    ) -> None:
        """Back into the heap with what is known now; what cannot beat the shape's own best is left out."""
        worth[number] = self._worth(number, goal)
        worth[number][list(tried.get(number, ()))] = -np.inf
        if number in best:
            worth[number][worth[number] <= best[number][0]] = -np.inf
        self._push(heap, worth, number)

    def _push(self, heap: list[tuple[float, int]], worth: dict[int, Array], number: int) -> None:
        if len(worth[number]) and (most := float(worth[number].max())) > -np.inf:
            heapq.heappush(heap, (-most, number))

    def _simulate(self, wanted: Iterable[tuple[int, int]]) -> None:
        wanted = list(wanted)
        asked = [(self.shapes[number], int(self.batches(self.shapes[number])[point])) for number, point in wanted]
        for (number, point), outcome in zip(wanted, self.evaluate(asked), strict=True):
            self._keep(number, point, outcome)

    def _keep(self, number: int, point: int, outcome: Outcome) -> None:
        self.known[number, point] = outcome
        self._bound.pop(number, None)
        if outcome.row is not None:
            self._steps.setdefault(number, {})[point] = outcome.row["step_s"]

    def remember(self, number: int, batch: int, outcome: Outcome) -> None:
        """Take over what another search found of a shape at a batch, where the batch is one of this grid."""
        for point in np.flatnonzero(self.batches(self.shapes[number]) == batch).tolist():
            self._keep(number, point, outcome)

    def pruned(self, goal: Goal, *, optimal: bool = True) -> Counter[str]:
        """Candidates that were not simulated, by reason: with those that were, all there are. ``optimal``: whether the search
        came to its end."""
        count: Counter[str] = Counter()
        for reason, combinations in self.refused.items():
            count[reason] += combinations * len(self.points)
        known: dict[int, list[int]] = {}
        for number, point in self.known:
            known.setdefault(number, []).append(point)
        for number, shape in enumerate(self.shapes if len(self.points) else ()):
            whole, good = self.whole(shape), self.allowed(number)
            count[PADDING] += int((~whole).sum())
            left = whole.copy()
            left[known.get(number, [])] = False
            count[MEMORY] += int((left & ~good).sum())
            left &= good
            if goal.one_expert_per_gpu is not None and goal.one_expert_per_gpu is not self.one_expert(shape):
                count[OTHER_RULE] += int(left.sum())
                continue
            tpot, tps = self.bound(number)
            for name, misses in (
                ("TPOT", goal.tpot is not None and tpot > goal.tpot),
                ("TPS", goal.tps is not None and tps < goal.tps),
                ("TTFT", goal.ttft is not None and self.ttft(number) > goal.ttft),
            ):
                count[f"{name} bound: no schedule keeps it"] += int((left & misses).sum())
                left &= ~np.asarray(misses)
            count["bound: cannot beat what was found" if optimal else STOPPED] += int(left.sum())
        return Counter({reason: n for reason, n in count.items() if n > 0})


def rough_limit(spec: Spec, shape: Shape) -> int:
    """Tokens of a TP group and micro-batch beyond which no memory suffices: attention, experts and KV cache alone."""
    degrees = {key: getattr(shape, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}

    def excess(sequences: int) -> float:
        work = spec.workload.model_copy(update={"batch": sequences * shape.groups})
        return least_excess(spec.model_copy(update={"workload": work}), degrees)

    first, second = excess(1), excess(2)
    if first > 0:
        return 0
    fit = int((1 - first / max(second - first, 1.0)) / shape.micro_batches) + 1
    return min(fit, BATCH // (shape.groups * shape.micro_batches))


def tokens_of(shape: Shape, batches: Array) -> Array:
    """Tokens of a TP group and micro-batch that batches give (`planc.placement.step_tokens`)."""
    sequences = -(batches // -shape.groups)
    tokens = -(sequences // -shape.micro_batches)
    return np.asarray(tokens if shape.leaders else -(-tokens // shape.tp) * shape.tp)


def thinned(limit: int) -> Array:
    """Numbers up to ``limit``: every one up to `FINE`, then `FINE` of every doubling, all multiples of a power of two."""
    found = [np.arange(1, min(limit, FINE) + 1)]
    step, last = 2, FINE
    while last < limit:
        found.append(np.arange(last + step, min(limit, 2 * last) + 1, step))
        step, last = step * 2, 2 * last
    return np.concatenate(found).astype(np.int64) if limit > 0 else np.zeros(0, dtype=np.int64)
