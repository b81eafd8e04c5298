"""`planc gate`: what a bias in the gate does to the loads of one MoE layer, what it costs, and what redundant copies of
experts do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.placement.degrees import resolve
from planc.placement.known_traffic import skew_of, spec_traffic
from planc.placement.mesh import Parallelism
from planc.planner.apportion import apportion
from planc.planner.balance import balanced
from planc.planner.tables import table_of
from planc.routing.bias import (
    Balanced,
    Overflow,
    Rule,
    Run,
    Stream,
    balance,
    even_imbalance,
    gpu_loads,
    imbalance,
    variance,
)
from planc.routing.gate import gate_of
from planc.routing.tokens import layer_weights
from planc.routing.traffic import rates_of_loads, words_of
from planc.spec import ExpertRule, Spec, check_spec
from planc.spec.deployment import TrafficSpec
from planc.spec.model import Moe, expert_parameters
from planc.units import format_bytes

MAX_TOKENS, MAX_STEPS = 1_000_000, 10_000
_STILL_FALLING = 1.05  #: imbalance in the first half of the last quarter over that in its second half


@dataclass(frozen=True, slots=True)
class GateRequest:
    """What `gate_report` is asked for. ``tokens`` of a step and ``seed``: by default the spec's; ``layer``: of the model, by
    default its first MoE layer; ``rate`` in scores a step (0.001 is DeepSeek-V3's); ``drift`` in logits a step; ``capacity``:
    factor over the mean load, None without a limit."""

    steps: int = 200
    tokens: int | None = None
    rate: float = 0.001
    rule: Rule = "sign"
    capacity: float | None = None
    overflow: Overflow = "drop"
    drift: float = 0.0
    seed: int | None = None
    layer: int | None = None


class Measures(NamedTuple):
    """Means over the steps that judge. ``load_variance`` in tokens²; imbalance is largest ÷ mean, ``served_imbalance`` of
    what the capacity leaves, per GPU; shares are of all (token, choice) pairs, ``weight_lost`` of the router weight that the
    unbiased gate's choices have."""

    load_variance: float
    expert_imbalance: float
    gpu_imbalance: float
    changed: float
    weight_lost: float
    served_imbalance: float
    passed_on: float
    dropped: float


class Copies(NamedTuple):
    """Redundant copies instead of a bias: how many beyond one of each expert, slots of a GPU, bytes of the further copies
    (of this layer), and imbalance per GPU in the steps that judge."""

    redundant: int
    slots: int
    size: int
    gpu_imbalance: float


@dataclass(frozen=True, eq=False)
class GateReport:
    """A layer's gate, with a bias and without. ``traffic``: in words; ``table``: int32 [GPUs, slots], the experts of each
    GPU as the policy `linear` places them; ``judged``: the steps that all measures are of; ``even``: the imbalance per expert
    that chance leaves when all experts are equally likely; ``notes``: what was made up or assumed."""

    name: str
    layer: int
    traffic: str
    request: GateRequest
    balanced: Balanced
    table: np.ndarray
    judged: slice
    before: Measures
    after: Measures
    even: float
    copies: tuple[Copies, ...]
    notes: tuple[Diagnostic, ...]

    @property
    def still_falling(self) -> bool:
        """Whether the biased gate's imbalance had not settled when the steps ended."""
        by_step = imbalance(self.balanced.after.loads[self.judged])
        half = len(by_step) // 2
        return half > 0 and bool(by_step[:half].mean() > _STILL_FALLING * by_step[half:].mean())


def gate_report(
    spec: Spec, request: GateRequest = GateRequest(), *, progress: Callable[[int, int], None] | None = None
) -> GateReport:
    """Run the gate of one MoE layer over the spec's traffic (uniform where it gives none), with a bias and without.

    All is judged on the last quarter of the steps; redundant copies are placed for the mean load of the steps before.
    Raises PlancError: PLN410 for a dense model, PLN014 for a layer without experts and numbers out of range, what the spec
    is refused for, and PLN021 to PLN023 for a recording that cannot be used.
    """
    faults = check_spec(spec)
    moe = spec.model.moe
    if moe is None:
        faults.append(spec.fault("PLN410", f"{spec.model.name} has no experts, so no gate chooses any", "model"))
    faults += _out_of_range(spec, request)
    if faults or moe is None:
        raise PlancError(faults)
    placed = resolve(spec)
    layer = spec.model.moe_layer_ids[0] if request.layer is None else request.layer
    stream, traffic, recorded = _stream(spec, placed.par, moe, request, layer)
    found = balance(
        gate_of(moe),
        stream,
        steps=request.steps,
        rate=request.rate,
        rule=request.rule,
        capacity_factor=request.capacity,
        overflow=request.overflow,
        progress=progress,
    )
    part = placed.placement.layers[layer]
    table = table_of(part.expert, part.rank // placed.par.expert_tp, placed.par.holders, part.rounds)
    if isinstance(spec.expert_rule, ExpertRule) and spec.expert_rule.scope == "model":
        table = table[(table >= 0).any(axis=1)]  # the other GPUs hold the experts of other layers
    judged = slice(request.steps - max(1, request.steps // 4), request.steps)
    notes = []
    if recorded is not None:
        notes.append(_made_up(found, recorded))
    if not moe.gate_bias:
        message = f"the gate of {spec.model.name} has no bias; shown is what one would do"
        notes.append(Diagnostic("PLN412", message, severity="note"))
    return GateReport(
        spec.name,
        layer,
        traffic,
        request,
        found,
        table,
        judged,
        _measures(found.before, found, table, judged),
        _measures(found.after, found, table, judged),
        even_imbalance(found.gate, stream.tokens),
        tuple(_copies(spec, found, len(table), judged)),
        tuple(notes),
    )


def _out_of_range(spec: Spec, request: GateRequest) -> list[Diagnostic]:
    """PLN014 for numbers that cannot be."""
    layers = spec.model.moe_layer_ids
    wrong = []
    if request.layer is not None and layers and request.layer not in layers:
        runs = (
            f"{layers[0]} to {layers[-1]}" if len(layers) == layers[-1] - layers[0] + 1 else ", ".join(map(str, layers))
        )
        wrong.append(("--layer", f"layer {request.layer} has no experts; MoE layers are {runs}"))
    if request.tokens is not None and not 1 <= request.tokens <= MAX_TOKENS:
        wrong.append(("--tokens", f"{request.tokens:,} tokens a step; there can be 1 to {MAX_TOKENS:,}"))
    if not 1 <= request.steps <= MAX_STEPS:
        wrong.append(("--steps", f"{request.steps:,} steps; there can be 1 to {MAX_STEPS:,}"))
    if request.capacity is not None and not request.capacity > 0:
        wrong.append(("--capacity", f"a capacity factor of {request.capacity:g} leaves no room for any token"))
    if not 0 <= request.drift * request.steps**0.5 <= 100:  # beyond it exponentials of logits overflow
        wrong.append(("--drift", f"popularity would drift by {request.drift * request.steps**0.5:,.0f} logits"))
    return [Diagnostic("PLN014", message, span=Span(option, 1, 1)) for option, message in wrong]


def _stream(
    spec: Spec, par: Parallelism, moe: Moe, request: GateRequest, layer: int
) -> tuple[Stream, str, np.ndarray | None]:
    """The layer's tokens, where they are from in words, and the recorded loads of the experts where there are any."""
    asked = spec.traffic or TrafficSpec()
    row = spec.model.moe_layer_ids.index(layer)
    seed = asked.seed if request.seed is None else request.seed
    recorded = None
    if asked.file:
        traffic = spec_traffic(spec, par, asked, "traffic")
        recorded = traffic.loads.sum(axis=0)[row]
        words, weights = traffic.origin, rates_of_loads(recorded, moe.top_k)[None]
    else:
        skew = skew_of(asked, moe)
        words = (
            f"{words_of(replace(skew, groups=1))}, seed {seed}"
            if spec.traffic
            else "none in the spec, so all experts are equally popular"
        )
        weights = layer_weights(skew, moe.experts, seed, row)
    sources = par.attention_dp if par.leaders_gate else par.ep
    return Stream(weights, request.tokens or asked.tokens, request.drift, seed, row, sources), words, recorded


def _made_up(found: Balanced, recorded: np.ndarray) -> Diagnostic:
    """PLN411, with how far the loads of the unbiased gate are from those recorded."""
    loads = found.before.loads.sum(axis=0)
    apart = np.abs(loads / loads.sum() - recorded / recorded.sum()).sum() / 2
    message = (
        f"router scores are made up to give the recorded loads ({100 * apart:.1f} % of the choices fall elsewhere); changed "
        "decisions and weight lost are those of made-up scores"
    )
    return Diagnostic("PLN411", message, severity="note")


def _measures(run: Run, found: Balanced, table: np.ndarray, judged: slice) -> Measures:
    loads, pairs = run.loads[judged], found.stream.tokens * found.gate.top_k
    shares = (float(part[judged].mean() / pairs) for part in (run.changed, run.passed_on, run.dropped))
    changed, passed_on, dropped = shares
    return Measures(
        float(variance(loads).mean()),
        float(imbalance(loads).mean()),
        float(imbalance(gpu_loads(loads, table)).mean()),
        changed,
        float(run.weight_lost[judged].mean()),
        float(imbalance(gpu_loads(run.served[judged], table)).mean()),
        passed_on,
        dropped,
    )


def _copies(spec: Spec, found: Balanced, gpus: int, judged: slice) -> list[Copies]:
    """What copies do for the unbiased loads: none, and an eighth, a quarter, a half and all of the GPUs with one more."""
    loads, experts = found.before.loads, found.gate.experts
    known = loads[: judged.start] if judged.start else loads
    mean = known.mean(axis=0, keepdims=True)
    size = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights")
    rows = []
    for redundant in sorted({0, *(-(-gpus // part) for part in (8, 4, 2, 1))}):
        if experts + redundant > experts * gpus:
            continue
        slots = -(-(experts + redundant) // gpus)
        tables, _ = balanced(mean, apportion(mean, experts + redundant, gpus), gpus, slots)
        judged_on = float(imbalance(gpu_loads(loads[judged], tables[0])).mean())
        rows.append(Copies(redundant, slots, redundant * size, judged_on))
    return rows


# --- in words and as JSON ---------------------------------------------------------------------------------------------


def gate_text(report: GateReport) -> str:
    """The report as aligned text."""
    found, request = report.balanced, report.request
    gate, steps, gpus = found.gate, report.judged.stop - report.judged.start, len(report.table)
    groups = f", {gate.top_groups} of {gate.groups} groups" if gate.groups > 1 else ""
    drift = f"; popularity drifts by {request.drift:g} logits a step" if request.drift else ""
    lines = [
        f"{report.name}, layer {report.layer}: {gate.score} gate, top-{gate.top_k} of {gate.experts} experts{groups}",
        f"traffic: {report.traffic}",
        f"{request.steps:,} steps of {found.stream.tokens:,} tokens{drift}",
        f"bias: {request.rule} rule, {request.rate:g} a step, from zero; means over the last {steps:,} steps",
        "",
        f"{'':<44}{'without bias':>14}{'with bias':>14}",
    ]
    lines += [f"{name:<44}{before:>14}{after:>14}" for name, before, after in _rows(report)]
    lines += ["", f"chance alone leaves an imbalance per expert of {report.even:.2f} when all are equally likely"]
    if report.still_falling:
        lines.append("the imbalance with bias was still falling: more steps or a higher rate would lower it")
    lines += [
        "",
        f"redundant copies instead of a bias, placed on {gpus:,} GPUs for the mean load of the steps before; no decision changes",
        f"{'copies':>8}{'slots a GPU':>14}{'memory in all':>16}{'imbalance per GPU':>20}",
    ]
    for row in report.copies:
        lines.append(f"{row.redundant:>8}{row.slots:>14}{format_bytes(row.size):>16}{row.gpu_imbalance:>20.2f}")
    return "\n".join(lines)


def _rows(report: GateReport) -> list[tuple[str, str, str]]:
    """(name, without bias, with bias) of every measure."""
    gpus, capacity = len(report.table), report.balanced.capacity
    rows = [
        ("variance of loads, tokens²", "load_variance", "{:,.0f}"),
        ("imbalance per expert (max ÷ mean)", "expert_imbalance", "{:.2f}"),
        (f"imbalance per GPU ({gpus:,}, policy linear)", "gpu_imbalance", "{:.2f}"),
        ("changed decisions", "changed", "{:.1%}"),
        ("router weight lost", "weight_lost", "{:.1%}"),
    ]
    if capacity is not None:
        rows.append((f"dropped at a capacity of {capacity:,} tokens", "dropped", "{:.1%}"))
        if report.request.overflow == "next":
            rows.append(("passed on to a next best expert", "passed_on", "{:.1%}"))
        rows.append(("imbalance per GPU of what is served", "served_imbalance", "{:.2f}"))
    values = report.before._asdict(), report.after._asdict()
    return [(name, *(form.format(value[key]).replace("%", " %") for value in values)) for name, key, form in rows]  # type: ignore[misc]


_JSON_KEYS = {
    "load_variance": "load_variance_tokens2",
    "expert_imbalance": "imbalance_per_expert_ratio",
    "gpu_imbalance": "imbalance_per_gpu_ratio",
    "changed": "changed_decisions_share",
    "weight_lost": "router_weight_lost_share",
    "served_imbalance": "served_imbalance_per_gpu_ratio",
    "passed_on": "passed_on_share",
    "dropped": "dropped_share",
}


def gate_json(report: GateReport) -> dict[str, Any]:
    """The report as plain values, units in the keys; loads are means over the steps that judge, imbalance is of every
    step."""
    found, request = report.balanced, report.request

    def side(run: Run, measures: Measures) -> dict[str, Any]:
        return {
            **{_JSON_KEYS[key]: value for key, value in measures._asdict().items()},
            "load_per_expert_tokens": run.loads[report.judged].mean(axis=0).tolist(),
            "imbalance_per_expert_by_step_ratio": imbalance(run.loads).tolist(),
            "imbalance_per_gpu_by_step_ratio": imbalance(gpu_loads(run.loads, report.table)).tolist(),
        }

    gate = found.gate
    return {
        "name": report.name,
        "layer": report.layer,
        "gate": {key: getattr(gate, key) for key in ("score", "experts", "top_k", "groups", "top_groups")},
        "traffic": report.traffic,
        "gpus": len(report.table),
        "steps": request.steps,
        "tokens_per_step": found.stream.tokens,
        "judged_steps": report.judged.stop - report.judged.start,
        "rule": request.rule,
        "rate_scores_per_step": request.rate,
        "drift_logits_per_step": request.drift,
        "capacity_tokens": found.capacity,
        "overflow": request.overflow,
        "seed": found.stream.seed,
        "before": side(found.before, report.before),
        "after": side(found.after, report.after),
        "bias_per_expert_scores": found.bias[-1].tolist(),
        "even_imbalance_per_expert_ratio": report.even,
        "still_falling": report.still_falling,
        "redundant_copies": [
            {
                "copies": row.redundant,
                "slots_per_gpu": row.slots,
                "memory_bytes": row.size,
                "imbalance_per_gpu_ratio": row.gpu_imbalance,
            }
            for row in report.copies
        ],
        "notes": [{"code": note.code, "message": note.message} for note in report.notes],
    }
