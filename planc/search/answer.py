"""A question about a deployment, and the record of its answer: winner, runners-up, front, baselines, reasons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pydantic import ValidationError

from planc import __version__
from planc.cost.book import PriceBook
from planc.diagnostics import Diagnostic, PlancError, Span
from planc.placement import Parallelism, resolve
from planc.report.search_file import SCHEMA
from planc.search.evaluate import Outcome, Row, shape_of
from planc.search.explore import OTHER_RULE, Candidate, Evaluate, Explorer, Found, Goal
from planc.search.pools import pools
from planc.search.sensitivity import sensitivity
from planc.search.space import Axes, Shape, declared, spec_of
from planc.spec import ExpertRule, Spec
from planc.units import format_seconds

Record = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a goal over a space (values of axes; others are what cluster and model allow), how many rows, how many
    points of the front, after how many simulations a search gives up on proof, and whether to say what would change the winner
    and how pools for prefill and decode would share the GPUs."""

    goal: Goal = field(default_factory=Goal)
    asked: Axes = field(default_factory=dict)
    top: int = 10
    front: int = 8
    most: int = 10_000
    sensitivity: bool = False
    pools: bool = False


def answer(
    spec: Spec,
    question: Question,
    evaluate: Evaluate,
    *,
    book: PriceBook | None = None,
    known: Record | None = None,
    progress: Progress | None = None,
) -> Record:
    """Search and write down what was found. ``known``: an earlier record of the same question's spec, whose simulations are
    taken over. Raises PlancError: PLN436 for a space without a legal shape, PLN430 where no plan keeps the bounds."""
    space = declared(spec, question.asked)
    explorer = Explorer(spec, space, evaluate, book)
    if not explorer.shapes:
        raise PlancError([_empty(explorer, space)])
    if known is not None:
        take_over(explorer, known, question.goal)
    found = explorer.search(question.goal, top=question.top, most=question.most, progress=progress)
    if not found.top:
        raise PlancError([_refusal(spec, question.goal, explorer, found)])
    front = _front(explorer, question, found, progress)
    rule = _by_rule(explorer, question)
    own = [*_baselines(spec, question, evaluate, book)]
    more: Record = {}
    if question.pools:
        more["pools"] = pools(spec, question.goal, question.asked, evaluate, book, progress)
    if question.sensitivity:
        first = found.top[0].shape
        more["sensitivity"] = sensitivity(spec, question.goal, question.asked, first, found.top[:5])
    every = (*found.top, *(one for one, _ in front), *(one for one in rule.values() if one is not None))
    wanted = list(dict.fromkeys((one.shape, one.batch) for one in every))
    rows = dict(zip(wanted, evaluate(wanted, whole=True), strict=True))

    def row(one: Candidate) -> Row:
        full = rows[one.shape, one.batch].row
        assert full is not None
        return full

    top = _distinct([row(one) for one in found.top])
    best_of = {kept: None if one is None else row(one) for kept, one in rule.items()}
    return {
        "schema": SCHEMA,
        "name": spec.name,
        "objective": question.goal.objective,
        "bounds": {
            "tpot_s": question.goal.tpot,
            "ttft_s": question.goal.ttft,
            "tps": question.goal.tps,
            "gpus": list(space["gpus"]),
        },
        "space": {key: list(values) for key, values in space.items()} | {"batch": _batches(explorer, space)},
        "candidates": explorer.candidates,
        "pruned": dict(sorted(explorer.pruned(question.goal, optimal=found.optimal).items())),
        "simulated": len(explorer.known),
        "optimal": found.optimal,
        "most": found.most,
        "winner": top[0],
        "one_expert_per_gpu": best_of[True],
        "several_experts_per_gpu": best_of[False],
        "top": top,
        "front": with_reasons([row(one) | {"tpot_bound_s": bound} for one, bound in front]),
        "baselines": own,
        **more,
        "spec": spec.model_dump(mode="json"),
        "sources": dict(spec.sources),
        "fingerprint": fingerprint(spec, explorer.book),
        "simulations": _simulations(explorer),
    }


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Rows without those whose stages, balanced or even, are the same ones."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(json.dumps(row | {"split": ""}, sort_keys=True), row)
    return list(kept.values())


def _by_rule(explorer: Explorer, question: Question) -> dict[bool, Candidate | None]:
    """The best with at most one expert of a layer per GPU, and the best with several; None where there is none."""
    if explorer.spec.model.moe is None:
        return {True: None, False: None}
    return {
        kept: next(iter(explorer.search(replace(question.goal, one_expert_per_gpu=kept), most=question.most).top), None)
        for kept in (True, False)
    }


def _batches(explorer: Explorer, space: Axes) -> list[int] | str:
    if "batch" in space:
        return list(space["batch"])
    points = explorer.points
    most = int(points[-1]) if len(points) else 0
    return f"the largest of every decode step: up to {most} tokens per TP group and micro-batch, {len(points)} values"


# --- the front --------------------------------------------------------------------------------------------------------

QUICKEST = 0.05  #: by how much another plan may be quicker than the first of a front
_ROUND = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


def _front(
    explorer: Explorer, question: Question, found: Found, progress: Progress | None
) -> list[tuple[Candidate, float | None]]:
    """Candidates that serve the most per GPU under bounds of TPOT from the quickest that there is to none, with that bound."""
    if not question.front:
        return []
    goal = replace(question.goal, objective="tps-per-gpu", tpot=None, tps=None)

    def best(bound: float | None) -> Candidate | None:
        return next(iter(explorer.search(replace(goal, tpot=bound), most=question.most, progress=progress).top), None)

    quick = replace(goal, objective="tpot")
    quickest = explorer.search(quick, most=question.most, within=QUICKEST, progress=progress).top
    most = best(None)
    if not quickest or most is None:
        return []
    first, last = quickest[0].row["tpot_s"], most.row["tpot_s"]
    bounds = round_bounds(first, last, question.front)
    if question.goal.tpot is not None and first < question.goal.tpot < last:
        bounds = sorted({*bounds, question.goal.tpot})
    # of several as quick as the quickest the one that serves most
    points: list[tuple[Candidate, float | None]] = [
        (one, bound) for bound in (first, *bounds) if (one := best(bound)) is not None
    ]
    points.append((most, None))
    kept: list[tuple[Candidate, float | None]] = []
    for one, bound in points:  # what is slower must serve more
        if not kept or one.row["tps_per_gpu"] > kept[-1][0].row["tps_per_gpu"]:
            kept.append((one, bound))
    return kept


def round_bounds(first: float, last: float, count: int) -> list[float]:
    """About ``count`` round numbers between two times, spread evenly by factor."""
    values = [f * 10.0**power for power in range(-7, 4) for f in _ROUND if first < f * 10.0**power < last]
    if len(values) <= count:
        return values
    return [values[round(n * (len(values) - 1) / (count - 1))] for n in range(count)] if count > 1 else values[:1]


#: what a row's reason names where it changes along the front
_CHOICES = ("gpus", "dp", "pp", "ep", "tp", "expert_tp", "gating", "tp_comm", "micro_batches", "batch")


def with_reasons(rows: Sequence[Row]) -> list[Row]:
    """Rows of a front with a sentence each: what decides the length of their step, and what changed from the quicker one."""
    found: list[Row] = []
    for row in rows:
        shares = sorted(row["path_s"].items(), key=lambda item: -item[1])[:2]
        total = sum(row["path_s"].values())
        parts = [" and ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in shares) + " of the step"]
        if found:
            before = found[-1]
            moved = [f"{key} {before[key]} → {row[key]}" for key in _CHOICES if before[key] != row[key]]
            gain = row["tps_per_gpu"] / before["tps_per_gpu"] - 1
            more = (
                f"{100 * gain:.0f} % more TPS per GPU than" if gain < 1 else f"{1 + gain:.1f} times the TPS per GPU of"
            )
            parts.append(f"{more} the point before by {', '.join(moved)}")
        else:
            parts.append(f"no plan of the space has a TPOT {100 * QUICKEST:.0f} % shorter")
        found.append(row | {"reason": "; ".join(parts)})
    return found


# --- baselines --------------------------------------------------------------------------------------------------------


def _baselines(spec: Spec, question: Question, evaluate: Evaluate, book: PriceBook | None) -> Iterable[Row]:
    """What engineers would otherwise run: the spec's own plan as it is, and common degrees with the best power of two as
    their batch under the goal's bounds."""
    gpus = spec.cluster.gpus
    own = _own(spec)
    if own is not None:
        outcome = evaluate([own], whole=True)[0]
        yield from [_baseline("the spec's own plan", own[0], outcome, spec)]
    common: dict[str, dict[str, Any]] = {
        "TP 8 · PP 2, in turns with prefill": {"pp": 2, "ep": 8, "tp": 8, "expert_tp": 1, "serving": "together"},
        "EP 8, one node a replica": {"pp": 1, "ep": 8, "tp": 1, "expert_tp": 1},
        "EP 4, half a node a replica": {"pp": 1, "ep": 4, "tp": 1, "expert_tp": 1},
    }
    for name, degrees in common.items():
        asked: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in degrees.items()} | {
            "gpus": (gpus,),
            "spares": ("idle",),
        }
        asked |= {"slots_per_gpu": tuple(range(1, 1 + (spec.model.moe.experts if spec.model.moe else 1)))}
        asked |= {"gating": ("sharded",), "tp_comm": ("all_reduce",), "split": ("balanced",)}
        asked |= {"batch": tuple(2**n for n in range(24)), "micro_batches": (degrees["pp"],)}
        yield _best_of(name, spec, asked, question, evaluate, book)


def _own(spec: Spec) -> tuple[Shape, int] | None:
    """The spec's own degrees and batch; None for a spec of a prefill step or one that is no plan."""
    if spec.workload.phase != "decode":
        return None
    try:
        par = resolve(spec.model_copy(update={"traffic": None, "scenarios": {}})).par
    except PlancError:
        return None
    return shape_of_plan(spec, par), spec.workload.batch


def shape_of_plan(spec: Spec, par: Parallelism) -> Shape:
    """The shape of a compiled plan; stages that are neither balanced nor even count as balanced."""
    rule = spec.expert_rule
    return Shape(
        par.dp,
        par.pp,
        par.ep,
        par.tp,
        par.expert_tp,
        par.gating,
        par.tp_comm,
        spec.workload.micro_batches,
        scope=rule.scope if isinstance(rule, ExpertRule) else "none",
        spares="replicate" if spec.replicates else "idle",
        serving=spec.execution.serving,
    )


def _best_of(name: str, spec: Spec, asked: Axes, question: Question, evaluate: Evaluate, book: PriceBook | None) -> Row:
    explorer = Explorer(spec, declared(spec, asked), evaluate, book)
    nothing = Shape(1, 1, 1, 1)
    if not explorer.shapes:
        reason = next(iter(explorer.refused), "its degrees do not divide the GPUs")
        return _baseline(name, _named(nothing, asked), Outcome(None, reason), spec)
    found = explorer.search(question.goal, most=question.most)
    if not found.top:
        why = "no batch fits memory" if found.nearest is None else _misses(question.goal, found.nearest)
        return _baseline(name, _named(explorer.shapes[0], asked), Outcome(None, why), spec)
    one = found.top[0]
    return _baseline(name, one.shape, evaluate([(one.shape, one.batch)], whole=True)[0], spec)


def _named(shape: Shape, asked: Axes) -> Shape:
    known = {f.name for f in fields(Shape)}
    return replace(shape, **{key: values[0] for key, values in asked.items() if key in known})


def _baseline(name: str, shape: Shape, outcome: Outcome, spec: Spec) -> Row:
    if outcome.row is not None:
        return {"name": name, "reason": "", **outcome.row}
    numbers = ("tpot_s", "tpot_floor_s", "ttft_s", "tps", "tps_per_gpu", "tps_per_user", "memory_used_bytes")
    empty = dict.fromkeys((*numbers, "tpot_interval_s", "memory_capacity_bytes", "path_s", "batch"))
    row = asdict(shape) | {"gpus": shape.gpus, "rule": shape.scope, "rounds": None, "slots_per_gpu": None, "stages": []}
    row |= {"one_expert_per_gpu": False, "dtypes": dict(shape.dtypes)}
    del row["scope"]
    return {"name": name, "reason": outcome.refused, **row, **empty}


# --- refusals ---------------------------------------------------------------------------------------------------------


def _misses(goal: Goal, one: Candidate) -> str:
    """Which bound the nearest candidate misses, in words."""
    missed = goal.missed(one.row)
    if not missed:
        return ""
    name = max(missed, key=lambda key: missed[key])
    if name == "tps":
        return f"serves {one.row['tps']:,.0f} TPS of the {goal.tps:,.0f} asked for"
    value, bound = one.row[f"{name}_s"], goal.tpot if name == "tpot" else goal.ttft
    assert bound is not None
    reached = "no prefill step fits memory" if value is None else f"{name.upper()} {format_seconds(value)}"
    return f"{reached}, bound {format_seconds(bound)}"


def _refusal(spec: Spec, goal: Goal, explorer: Explorer, found: Found) -> Diagnostic:
    """No plan keeps the bounds: the nearest, and the bound that binds."""
    reasons = explorer.pruned(goal, optimal=found.optimal)
    related = tuple(f"{count:,} candidates: {reason}" for reason, count in reasons.most_common(4))
    nearest = _nearest(goal, explorer, found)
    if nearest is None:
        message, option, span = "no legal plan of the space fits memory at any batch", "cluster", spec.span("cluster")
        hint = "more GPUs, a shorter isl or a smaller KV dtype"
        if goal.one_expert_per_gpu and OTHER_RULE in reasons:
            message = "no plan that fits memory has at most one expert of a layer per GPU"
            option, hint = "--one-expert-per-gpu", "leave the option out, or give as many GPUs as there are experts"
            span = Span(option, 1, 1)
        return Diagnostic("PLN430", message, option, span, hint, related)
    s, missed = nearest.shape, goal.missed(nearest.row)
    if not missed:  # found on the way to the nearest
        message = "the search stopped before it came to a plan that keeps the bounds"
        return Diagnostic("PLN430", message, "--limit", Span("--limit", 1, 1), "a larger --limit", related)
    words = f"dp {s.dp} · pp {s.pp} · ep {s.ep} · tp {s.tp}, batch {nearest.batch:,}: {_misses(goal, nearest)}"
    binding = max(missed, key=lambda name: missed[name])
    message, hint = f"no plan keeps the bounds; what binds is {binding.upper()}", "relax the bound, or give more GPUs"
    if binding == "ttft":
        hint += ", or shorten isl"
    if not found.optimal:
        message = f"none of the plans that were simulated keeps the bounds; what binds is {binding.upper()}"
        hint = f"the search stopped before it was proved that there is none: a larger --limit; {hint}"
    return Diagnostic(
        "PLN430", message, f"--{binding}", Span(f"--{binding}", 1, 1), hint, (f"nearest: {words}", *related)
    )


def _nearest(goal: Goal, explorer: Explorer, found: Found) -> Candidate | None:
    """The plan that misses the bounds by the least factor: of those simulated, and those that are best without a bound."""
    near = [] if found.nearest is None else [found.nearest]
    freed = [replace(goal, objective="tpot", tpot=None)] if goal.tpot is not None else []
    freed += [replace(goal, objective="tps", tps=None)] if goal.tps is not None else []
    freed.append(replace(goal, objective="tpot", tpot=None, ttft=None, tps=None))
    for easier in freed:
        if not near or easier is not freed[-1]:
            near += explorer.search(easier, most=200).top
    return min(near, key=lambda one: max(goal.missed(one.row).values(), default=0.0), default=None)


def _empty(explorer: Explorer, space: Axes) -> Diagnostic:
    related = tuple(f"{count:,} combinations: {reason}" for reason, count in explorer.refused.most_common(4))
    message = "the declared space has no legal plan"
    sizes = ", ".join(str(n) for n in space["gpus"])
    hint = f"dp · pp · ep must be the GPUs ({sizes}); open an axis with --over, such as --over ep=1,2,4,8"
    return Diagnostic("PLN436", message, "--over", Span("--over", 1, 1), hint, related)


# --- files ------------------------------------------------------------------------------------------------------------


def fingerprint(spec: Spec, book: PriceBook) -> str:
    """What simulations of a search depend on: a hash of the spec, the fits that were given, and planc's version."""
    fits = {name: fit.model_dump(mode="json") for name, fit in book.fits.items()}
    text = json.dumps([__version__, spec.model_dump(mode="json"), fits], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _simulations(explorer: Explorer) -> list[Record]:
    found = []
    for (number, point), outcome in sorted(explorer.known.items()):
        shape = explorer.shapes[number]
        batch = int(explorer.batches(shape)[point])
        found.append({"shape": _plain(shape), "batch": batch, "row": outcome.row, "refused": outcome.refused})
    return found


def _plain(shape: Shape) -> Record:
    return asdict(shape) | {"dtypes": [list(pair) for pair in shape.dtypes]}


def take_over(explorer: Explorer, record: Record, goal: Goal) -> None:
    """Simulations of an earlier record as if they had been made now; where TTFT is bounded, those that have one. Raises
    PlancError PLN437 for one of another spec."""
    if record["fingerprint"] != fingerprint(explorer.spec, explorer.book):
        message = f"the result of `{record['name']}` is of another spec than this one, or of other fits"
        hint = "search anew without --resume, or give the spec, overrides and fits that it was made with"
        raise PlancError([Diagnostic("PLN437", message, "--resume", Span("--resume", 1, 1), hint)])
    numbers = {shape: number for number, shape in enumerate(explorer.shapes)}
    for one in record["simulations"]:
        shape = Shape(**one["shape"] | {"dtypes": tuple((a, b) for a, b in one["shape"]["dtypes"])})
        if shape in numbers and (goal.ttft is None or one["row"] is None or one["row"]["ttft_s"] is not None):
            explorer.remember(numbers[shape], one["batch"], Outcome(one["row"], one["refused"]))


def winner_spec(record: Record, place: int = 0) -> Spec:
    """The deployment spec of a row of ``top``, as `planc build` compiles it. Raises PlancError: what a record made by hand is
    refused for."""
    from planc.spec.load import spec_from_values

    spec = spec_from_values(record["spec"], record["sources"], record["name"])
    row = record["top"][place]
    try:
        return spec_of(spec, shape_of(row), row["batch"])
    except ValidationError as error:
        [fault, *_] = error.errors()
        message = f"row {place + 1} of the result of `{spec.name}` is no plan: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise PlancError([Diagnostic("PLN438", message)]) from None
