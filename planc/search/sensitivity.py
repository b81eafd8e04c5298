"""What changes the winner: bandwidth, context, the number of GPUs, skew of the experts' loads; and at which value.

Each is made smaller and larger by factors until another shape wins; between the last factor at which the winner stays and the
first at which it does not the value is narrowed down. Skew is looked at among the best candidates as they are, at their own
batches and with experts placed without regard to it: what spreads a hot expert over more GPUs suffers less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from planc.cost.book import PriceBook
from planc.report.search import degrees_text
from planc.search.evaluate import Evaluator, Outcome
from planc.search.explore import Candidate, Explorer, Goal
from planc.search.space import Axes, Shape, declared
from planc.spec import Cluster, Spec
from planc.spec.deployment import TrafficSpec
from planc.units import format_rate

Row = dict[str, Any]
FACTORS = ((0.5, 0.25), (2.0, 4.0))  #: downwards and upwards, nearest first
EXPONENTS = (0.3, 0.6, 0.9, 1.2)  #: of a Zipf popularity of experts
GPUS = "number of GPUs"
NARROWINGS = 2  #: halvings, on a scale of factors, of the range in which the winner changes


def sensitivity(spec: Spec, goal: Goal, asked: Axes, winner: Shape, best: Sequence[Candidate]) -> list[Row]:
    """Of every influence whether and where another shape wins, in words and numbers."""
    rows = [
        row for what, change, name in _influences(spec) for row in _scan(spec, goal, asked, winner, what, change, name)
    ]
    return rows + (_skew(spec, goal, best) if spec.model.moe is not None and len(best) > 1 else [])


Change = Callable[[float], Spec | None]


def _influences(spec: Spec) -> list[tuple[str, Change, Callable[[float], str]]]:
    """(name, the spec with it times a factor, its value there in words)."""
    links, work = spec.cluster.links, spec.workload

    def nic(factor: float) -> Spec:
        part = links.nic.model_copy(update={"bandwidth": links.nic.bandwidth * factor})
        return _with_cluster(spec, links=links.model_copy(update={"nic": part}))

    def nvlink(factor: float) -> Spec:
        part = links.nvlink.model_copy(update={"bandwidth": links.nvlink.bandwidth * factor})
        return _with_cluster(spec, links=links.model_copy(update={"nvlink": part}))

    def isl(factor: float) -> Spec:
        changed = work.model_copy(update={"isl": max(1, round(work.isl * factor))})
        return spec.model_copy(update={"workload": changed})

    def gpus(factor: float) -> Spec | None:
        nodes = [group.nodes * factor for group in spec.cluster.groups]
        if any(n != int(n) or n < 1 for n in nodes):
            return None
        groups = [g.model_copy(update={"nodes": int(n)}) for g, n in zip(spec.cluster.groups, nodes, strict=True)]
        return _with_cluster(spec, groups=tuple(groups))

    return [
        ("NIC bandwidth", nic, lambda f: format_rate(links.nic.bandwidth * f)),
        ("NVLink bandwidth", nvlink, lambda f: format_rate(links.nvlink.bandwidth * f)),
        ("input length", isl, lambda f: f"isl {max(1, round(work.isl * f)):,}"),
        (GPUS, gpus, lambda f: f"{round(spec.cluster.gpus * f):,} GPUs"),
    ]


def _with_cluster(spec: Spec, **parts: Any) -> Spec:
    fields = {name: getattr(spec.cluster, name) for name in Cluster.model_fields} | parts
    return spec.model_copy(update={"cluster": Cluster(**fields)})


def _scan(
    spec: Spec,
    goal: Goal,
    asked: Axes,
    winner: Shape,
    what: str,
    change: Change,
    value: Callable[[float], str],
) -> list[Row]:
    space = {key: values for key, values in asked.items() if key != "gpus"}

    def best(factor: float) -> Shape | None:
        changed = change(factor)
        if changed is None:
            return None
        own = Evaluator(changed, PriceBook())

        def evaluate(wanted: Sequence[tuple[Shape, int]], *, whole: bool = False) -> list[Outcome]:
            return [own.outcome(*one, ttft=goal.ttft is not None, whole=whole) for one in wanted]

        found = Explorer(changed, declared(changed, space), evaluate, own.book).search(goal, most=200).top
        return found[0].shape if found else None

    rows = []
    for factors in FACTORS:
        kept, other, at = 1.0, None, 1.0
        for factor in factors:
            shape = best(factor)
            if shape is None:
                break
            if _alike(shape, winner, what):
                kept = factor
                continue
            other, at = shape, factor
            break
        for _ in range(NARROWINGS if other is not None and what != GPUS else 0):
            middle = (kept * at) ** 0.5
            shape = best(middle)
            if shape is None or _alike(shape, winner, what):
                kept = middle
            else:
                other, at = shape, middle
        rows.append(_row(what, kept, at, other, value))
    return rows


def _alike(first: Shape, second: Shape, what: str) -> bool:
    """Of one kind, whatever the number of replicas; where GPUs change, also whatever the width of the EP group."""
    ep = second.ep if what == GPUS else first.ep
    return replace(first, dp=1, ep=ep) == replace(second, dp=1)


def _row(what: str, kept: float, at: float, other: Shape | None, value: Callable[[float], str]) -> Row:
    if other is None:
        words = (
            "as far as was looked" if kept == 1.0 else f"up to {value(kept)}" if kept > 1 else f"down to {value(kept)}"
        )
        return {"what": what, "kept": kept, "changes_at": None, "other": None, "words": f"the winner stays {words}"}
    way = "from" if at > 1 else "down from"
    degrees = {name: getattr(other, name) for name in ("dp", "pp", "ep", "tp", "expert_tp", "gating", "micro_batches")}
    text = degrees_text({f.name: getattr(other, f.name) for f in fields(Shape)} | {"dtypes": dict(other.dtypes)})
    words = f"{way} {value(at)} on (still the winner at {value(kept)}): {text}"
    return {"what": what, "kept": kept, "changes_at": at, "other": degrees, "words": words}


def _skew(spec: Spec, goal: Goal, best: Sequence[Candidate]) -> list[Row]:
    """The first exponent at which another of the best candidates is worth more than the winner."""
    own = Evaluator(spec, PriceBook())
    for exponent in EXPONENTS:
        worth = []
        for one in best:
            row = own.with_traffic(one.shape, one.batch, TrafficSpec(popularity="zipf", exponent=exponent))
            worth.append(-float("inf") if row is None else goal.worth(row))
        first = max(range(len(best)), key=lambda n: (worth[n], -n))
        if first:
            s = best[first].shape
            words = f"from a Zipf exponent of {exponent:g} on, of the best {len(best)} at their batches: dp {s.dp} · pp {s.pp} · ep {s.ep} · tp {s.tp}"
            words += f" · {s.spares} spares" if s.spares == "replicate" else ""
            return [
                {"what": "skew of the experts", "kept": None, "changes_at": exponent, "other": None, "words": words}
            ]
    words = f"the winner stays up to a Zipf exponent of {EXPONENTS[-1]:g}, of the best {len(best)} at their batches"
    return [{"what": "skew of the experts", "kept": EXPONENTS[-1], "changes_at": None, "other": None, "words": words}]
