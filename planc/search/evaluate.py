"""The exact prediction of single candidates: the same simulation that `planc estimate` makes of the built plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from planc.cost.book import PriceBook
from planc.cost.step import CLASS_NAMES
from planc.diagnostics import PlancError
from planc.graph import build_graph, expand
from planc.placement import Parallelism, Placed, resolve, step_tokens
from planc.placement.memory import kv_bytes_per_token
from planc.schedule.estimate import Estimate, prefill_chunk, prefill_step
from planc.schedule.simulate import Wiring
from planc.schedule.timeline import Timeline, timeline
from planc.search.space import Shape, reason_of, spec_of
from planc.spec import Spec
from planc.spec.deployment import TrafficSpec
from planc.verify import Draft

Row = dict[str, Any]
_Made = TypeVar("_Made")
KEPT = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate: its ``row``, or why it is no plan. Without ``ttft`` asked for, the row has none."""

    row: Row | None
    refused: str = ""


class Evaluator:
    """Predicts candidates of one spec; prices and the wiring of graphs are kept between them."""

    def __init__(self, spec: Spec, book: PriceBook | None = None) -> None:
        self.spec, self.book = spec, book or PriceBook()
        self._wiring: dict[object, Wiring] = {}
        self._prefills: dict[object, Timeline] = {}

    def placed(self, shape: Shape, batch: int, *, prefill_chunk: int = 0) -> Placed | str:
        """Who holds what, or the reason why it cannot be."""
        try:
            return resolve(spec_of(self.spec, shape, batch, prefill_chunk=prefill_chunk))
        except PlancError as error:
            return reason_of(error.diagnostics[0].code)

    def _draft(self, shape: Shape, batch: int, prefill_chunk: int = 0) -> Draft | str:
        """The candidate's step with its graph, or the reason why it is no plan."""
        placed = self.placed(shape, batch, prefill_chunk=prefill_chunk)
        if isinstance(placed, str):
            return placed
        spec = spec_of(self.spec, shape, batch, prefill_chunk=prefill_chunk)
        graph = build_graph(spec, placed.par, placed.placement)
        return Draft(spec, placed.par, placed.reasons, placed.placement, placed.memory, graph)

    def outcome(self, shape: Shape, batch: int, *, ttft: bool = False, whole: bool = False) -> Outcome:
        """The prediction for a shape at a batch: TPOT and TPS. ``ttft``: also that of the prefill step, which `serving:
        together` needs anyway; ``whole``: all that a record has, with interval and floor."""
        draft = self._draft(shape, batch)
        if isinstance(draft, str):
            return Outcome(None, draft)
        line, prefill = self._line(draft, shape), None
        if ttft or whole or shape.serving == "together":
            chunk = prefill_chunk(draft.spec, draft.parallelism, draft.placement)
            prefill = self._beside(draft, shape, chunk) if chunk else None
        found = Estimate(draft, line, prefill, {})
        if not found.serves:
            return Outcome(None, "no prefill step fits memory beside the KV cache")
        return Outcome(
            row_of(shape, found) if whole else {"gpus": shape.gpus, "step_s": line.period, **_numbers(found)}
        )

    def with_traffic(self, shape: Shape, batch: int, asked: TrafficSpec) -> Row | None:
        """TPOT and TPS where tokens go as ``asked``, with experts placed as the shape has them; None for what is no plan."""
        from planc.placement.known_traffic import spec_traffic  # brings the planner: only where it is needed

        draft = self._draft(shape, batch)
        if isinstance(draft, str):
            return None
        traffic = spec_traffic(draft.spec, draft.parallelism, asked, "traffic")
        line = timeline(draft, book=self.book, traffic=traffic)
        return {"gpus": shape.gpus, **_numbers(Estimate(draft, line, None, {}))}

    def prefill(self, shape: Shape, chunk: int) -> Outcome:
        """The prefill step of ``chunk`` prompt tokens in every TP group, of GPUs that do nothing else: prompts per second, and
        TTFT with the hand-over of the KV cache to the GPUs that decode, s."""
        isl = self.spec.workload.isl
        draft = self._draft(shape, max(1, chunk // isl) * shape.groups, chunk)
        if isinstance(draft, str):
            return Outcome(None, draft)
        line, par = self._line(draft, shape), draft.parallelism
        steps, handed = -(-isl // chunk), hand_over(draft.spec, par)
        prompts = step_tokens(draft.spec, par).padded / line.period / isl
        numbers = {"prompts_per_s": prompts, "ttft_s": steps * line.step + handed}
        return Outcome({"gpus": shape.gpus, "step_s": line.period, "hand_over_s": handed, **numbers})

    def _beside(self, draft: Draft, shape: Shape, chunk: int) -> Timeline:
        """The prefill step beside decode steps: the same one whatever their batch and micro-batches."""
        one = replace(shape, micro_batches=1)
        key = one, draft.parallelism.stages, chunk
        return _once(self._prefills, key, lambda: self._line(prefill_step(draft, chunk), one))

    def _line(self, draft: Draft, shape: Shape) -> Timeline:
        """The simulated step; graphs of one structure share their wiring."""
        work = draft.spec.workload
        key = shape, draft.parallelism.stages, work.phase, work.micro_batches
        wiring = _once(self._wiring, key, lambda: Wiring(expand(draft.blocks)))
        return timeline(draft, book=self.book, wiring=wiring)


def _once(kept: dict[object, _Made], key: object, make: Callable[[], _Made]) -> _Made:
    """What is kept under a key, or made now; of the last `KEPT`, so that a long search does not fill memory."""
    if key not in kept:
        if len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]


def hand_over(spec: Spec, par: Parallelism) -> float:
    """Seconds in which a rank of the largest stage sends its part of a prompt's KV cache over its NIC, at planned bandwidth."""
    nic = spec.cluster.links.nic
    layers = max(par.stage_sizes)
    size = layers * spec.workload.isl * kv_bytes_per_token(spec.model, par.tp)
    return float(nic.latency + size / (nic.bandwidth * nic.utilization))


def _numbers(found: Estimate) -> Row:
    return {"tpot_s": found.tpot, "ttft_s": found.ttft, "tps": found.tps, "tps_per_gpu": found.tps_per_gpu}


def row_of(shape: Shape, found: Estimate) -> Row:
    """A candidate as the record has it: degrees, choices, and the numbers of `planc estimate` (s, B, tokens/s)."""
    plan, memory = found.plan, found.plan.memory  # type: ignore[attr-defined]
    tpot, rank = found.tpot, memory.fullest
    assert tpot is not None
    moe = plan.spec.model.moe
    rounds = plan.placement.rounds
    path = found.own.path_by_class
    return {
        "gpus": shape.gpus,
        "dp": shape.dp,
        "pp": shape.pp,
        "ep": shape.ep,
        "tp": shape.tp,
        "expert_tp": shape.expert_tp,
        "stages": list(plan.parallelism.stage_sizes),
        "gating": shape.gating,
        "tp_comm": shape.tp_comm,
        "rule": shape.scope,
        "slots_per_gpu": rounds,
        "spares": shape.spares,
        "rounds": rounds,
        "one_expert_per_gpu": moe is not None and rounds == 1,
        "micro_batches": shape.micro_batches,
        "split": shape.split,
        "batch": plan.spec.workload.batch,
        "serving": shape.serving,
        "dtypes": dict(shape.dtypes),
        **_numbers(found),
        "tpot_interval_s": list(found.intervals["tpot_s"]),
        "tpot_floor_s": found.floors["tpot_s"],
        "tps_per_user": 1.0 / tpot,
        "path_s": {CLASS_NAMES[name]: seconds for name, seconds in path.items()},
        "memory_used_bytes": int(memory.used[rank]),
        "memory_capacity_bytes": int(memory.capacity[rank]),
    }


def shape_of(row: Row) -> Shape:
    """The shape of a record's row."""
    plain = ("dp", "pp", "ep", "tp", "expert_tp", "gating", "tp_comm", "micro_batches", "split")
    return Shape(
        **{name: row[name] for name in plain},
        scope=row["rule"],
        spares=row["spares"],
        serving=row["serving"],
        dtypes=tuple(sorted(row["dtypes"].items())),
    )
