"""What the schedule means for those who serve: TPOT, TTFT, TPS, the largest concurrency.

TPOT: seconds from decode step to decode step, divided by the tokens that a step yields a sequence. Where the same GPUs also
prefill (`serving: together`), the prompts that arrive while a sequence decodes take their turns (`token_time`). TTFT: the
prefill steps of one prompt on every TP group at once, without waiting in a queue. TPS: batch ÷ TPOT (Little's law).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from planc.cost import Floors, step_floors
from planc.cost.book import PriceBook
from planc.cost.step import Step
from planc.placement import Parallelism, Placement, largest_that_fits, memory_table, step_tokens
from planc.routing import Traffic
from planc.schedule.simulate import Slow
from planc.schedule.timeline import Timeline, timeline
from planc.schedule.workload import at_workload, changed
from planc.spec import Spec
from planc.verify import Draft, VerifiedPlan

#: prompt tokens of a TP group in a prefill step, where the spec does not say: one prompt, at most so many at a time
CHUNKS = (16384, 8192, 4096, 2048, 1024, 512, 256, 128)


@dataclass(frozen=True, eq=False)
class Estimate:
    """The prediction for one plan. ``decode`` and ``prefill``: the simulated steps, None where that step does not fit;
    ``missing``: key -> why it is not there; ``planned``: floors of the plan's own step at planned utilisation."""

    plan: Step
    decode: Timeline | None
    prefill: Timeline | None
    missing: dict[str, str]
    planned: Floors | None = None

    @property
    def own(self) -> Timeline:
        """The step of the plan's own phase."""
        line = self.decode if self.plan.spec.workload.phase == "decode" else self.prefill
        assert line is not None
        return line

    @property
    def traffic(self) -> Traffic | None:
        """Where tokens go, None for evenly."""
        return self.own.prices.traffic

    @property
    def prefill_steps(self) -> int:
        """Prefill steps of one prompt."""
        assert self.prefill is not None
        work = self.prefill.plan.spec.workload
        return -(-work.isl // (work.prefill_chunk or work.isl))

    @property
    def prompt_share(self) -> float:
        """Seconds that one prompt takes of the prefill steps that serve every TP group at once."""
        assert self.prefill is not None
        at_once = step_tokens(self.prefill.plan.spec, self.plan.parallelism).padded
        return float(self.plan.spec.workload.isl / at_once * self.prefill.period)

    @property
    def prefill_share(self) -> float:
        """Seconds of TPOT that the prompts of others take, where the same GPUs do both; else 0."""
        return 0.0 if self.tpot is None or self.tpot_alone is None else max(0.0, self.tpot - self.tpot_alone)

    @property
    def tpot_alone(self) -> float | None:
        """Seconds per output token if no prompts took turns."""
        return None if self.decode is None else self._own_time(self.decode.period)

    @property
    def serves(self) -> bool:
        """Whether the GPUs do all that is asked of them: those that decode and prefill must fit a step of each."""
        together = self.plan.spec.execution.serving == "together"
        return self.decode is not None and (self.prefill is not None or not together)

    def _own_time(self, step: float) -> float:
        execution = self.plan.spec.execution
        return float((step + execution.step_overhead) / execution.tokens_per_step)

    def _tpot(self, step: float) -> float:
        execution, work = self.plan.spec.execution, self.plan.spec.workload
        own = self._own_time(step)
        if execution.serving == "apart" or self.prefill is None or self.ttft is None or work.osl == 0:
            return own
        return float(token_time(own, self.prompt_share, self.ttft, work.batch - 1, work.osl))

    @cached_property
    def tpot(self) -> float | None:
        """Seconds per output token."""
        return None if self.decode is None else self._tpot(self.decode.period)

    @cached_property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.prefill is None else self.prefill_steps * self.prefill.step

    @property
    def tps(self) -> float | None:
        """Output tokens per second of the deployment."""
        return None if self.tpot is None else self.plan.spec.workload.batch / self.tpot

    @property
    def tps_per_gpu(self) -> float | None:
        """TPS over the GPUs of the plan."""
        return None if self.tps is None else self.tps / self.plan.parallelism.world_size

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """90 % intervals of the above."""
        found: dict[str, tuple[float, float]] = {}
        if self.decode is not None and self.tpot is not None:
            low, high = (self._tpot(bound) for bound in self.decode.period_interval)
            found["tpot_s"] = low, high
            batch = self.plan.spec.workload.batch
            found["tps"] = batch / high, batch / low
            world = self.plan.parallelism.world_size
            found["tps_per_gpu"] = batch / high / world, batch / low / world
        if self.prefill is not None:
            low, high = self.prefill.interval
            found["ttft_s"] = low * self.prefill_steps, high * self.prefill_steps
        return found

    @property
    def floors(self) -> dict[str, float]:
        """No plan of this shape is quicker: bytes ÷ bandwidth and FLOPs ÷ peak at full rates along the schedule; and, named
        `planned_…`, the floors at the utilisation that the spec counts on (`planc.cost.step_floors`)."""
        found: dict[str, float] = {}
        if self.decode is not None:
            found["tpot_s"] = self.decode.period_floor / self.plan.spec.execution.tokens_per_step
        if self.prefill is not None:
            found["ttft_s"] = self.prefill.floor * self.prefill_steps
        for name in ("memory", "compute", "transfer", "latency"):
            if self.planned is not None:
                found[f"planned_{name}_s"] = getattr(self.planned, name)
        return found

    @cached_property
    def concurrency(self) -> int:
        """The largest batch that fits memory."""
        return largest_that_fits(self.plan.spec, self.plan.parallelism, self.plan.placement, "batch")


def token_time(step: Any, prompt: float, first: float, others: Any, osl: float) -> Any:
    """Seconds per output token where prompts of ``others`` take turns with decode steps of ``step`` seconds a token; numbers, or
    arrays elementwise.

    All of them are at work all the time, each for ``first`` seconds until its first token and then for W seconds on its
    ``osl`` tokens; so in W seconds each brings W ÷ (W + first) prompts, which take ``prompt`` seconds apiece:
    W = osl·step + others·prompt·W ÷ (W + first). One's own prompt does not delay one's tokens.
    """
    decode = osl * step
    more = decode + others * prompt - first
    return (more + np.sqrt(more * more + 4.0 * first * decode)) / 2.0 / osl


def estimate(
    plan: VerifiedPlan,
    *,
    book: PriceBook | None = None,
    traffic: Traffic | None = None,
    slow: Slow | None = None,
    by_speed: bool = False,
) -> Estimate:
    """Predict a plan: its own step, and the other phase on the same GPUs.

    ``book`` keeps prices between calls; ``traffic``: where tokens go; without it, evenly. ``slow``: GPUs and links that are
    slower than planned; ``by_speed``: copies of an expert share its tokens by the speed of their GPUs.
    """
    book = book or PriceBook()

    def line(step: Step) -> Timeline:
        return timeline(step, book=book, traffic=traffic, slow=slow, by_speed=by_speed)

    own = line(plan)
    missing: dict[str, str] = {}
    other: Timeline | None = None
    if plan.spec.workload.phase == "decode":
        chunk = prefill_chunk(plan.spec, plan.parallelism, plan.placement)
        if chunk:
            other = line(prefill_step(plan, chunk))
        else:
            missing["ttft_s"] = "no prefill step fits memory beside the KV cache of this batch"
            if plan.spec.execution.serving == "together":
                missing["ttft_s"] += "; TPOT leaves the prompts out"
        return Estimate(plan, own, other, missing, step_floors(plan))
    draft = at_workload(plan, phase="decode", micro_batches=1)
    if not draft.memory.fits:
        missing["tpot_s"] = "a decode step of this batch does not fit memory"
    else:
        other = line(draft)
    return Estimate(plan, other, own, missing, step_floors(plan))


def prefill_chunks(spec: Spec) -> list[int]:
    """Prompt tokens that a TP group's prefill step may have, most first: the spec's chunk, or the whole prompt and `CHUNKS`."""
    work = spec.workload
    if work.prefill_chunk:
        return [work.prefill_chunk]
    return [c for c in (work.isl, *CHUNKS) if c <= min(work.isl, CHUNKS[0])]


def prefill_chunk(spec: Spec, par: Parallelism, placement: Placement) -> int:
    """The first of `prefill_chunks` that fits memory beside the KV cache of the batch; 0 where none fits."""
    for chunk in prefill_chunks(spec):
        step = changed(spec, phase="prefill", prefill_chunk=chunk, micro_batches=1)
        if memory_table(step, par, placement).fits:
            return chunk
    return 0


def prefill_step(plan: Step, chunk: int) -> Draft:
    """The plan's prefill step of ``chunk`` prompt tokens per TP group."""
    return at_workload(plan, phase="prefill", prefill_chunk=chunk, micro_batches=1)


def known_traffic(plan: Step, *, files: bool) -> Traffic | None:
    """Where tokens go as the spec says: generated, or (``files``) recorded; None where it says nothing. Without ``files``
    a recording is left aside, as where only the written plan is at hand."""
    asked = plan.spec.traffic
    if asked is None or plan.spec.model.moe is None or (asked.file and not files):
        return None
    from planc.placement.known_traffic import spec_traffic  # brings the planner: only where it is needed

    return spec_traffic(plan.spec, plan.parallelism, asked, "traffic")
