"""The prediction in words and tables: for a terminal, for programs, and for the plan document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from planc.cost.price import PROVENANCE_ORDER
from planc.cost.step import CLASS_NAMES
from planc.report.claims import claim_records, claim_rows
from planc.schedule import Estimate, Timeline
from planc.schedule.sweep import Best, Point
from planc.units import format_bytes, format_seconds

PROVENANCE = {
    "fitted": "fitted to measurements of this GPU, inside their range",
    "extrapolated": "the same fit outside the range of its measurements",
    "derived": "a fit of a related op, which was not measured itself",
    "spec": "MFU and utilisation of the spec: no fit of this GPU covers them",
}


def estimate_record(found: Estimate) -> dict[str, Any]:
    """The prediction as JSON: every key says its unit (`_s`: seconds); what is missing is null and has its reason."""
    spec, par = found.plan.spec, found.plan.parallelism
    own = found.own
    return {
        "name": spec.name,
        "gpus": par.world_size,
        "phase": spec.workload.phase,
        "batch": spec.workload.batch,
        "isl": spec.workload.isl,
        "osl": spec.workload.osl,
        "tpot_s": found.tpot,
        "ttft_s": found.ttft,
        "tps": found.tps,
        "tps_per_gpu": found.tps_per_gpu,
        "step_s": own.step,
        "largest_batch": found.concurrency,
        "floors": found.floors,
        "intervals": {key: list(pair) for key, pair in found.intervals.items()},
        "breakdown": {
            "phase": spec.workload.phase,
            "critical_path_s": own.path_by_class,
            "split": own.split,
            "busy_s": {
                "compute": _spread(own.usage.compute),
                "communication": _spread(own.usage.communication),
                "idle": _spread(own.usage.idle),
            },
            "exposed_communication_s": float(own.usage.exposed.mean()),
            "overlapped_communication_s": float(own.usage.overlapped.mean()),
            "overlap_efficiency": own.overlap_efficiency,
            "busiest_links": [
                {"link": name, "utilization": share, "bytes": size} for name, share, size in busiest_links(own)
            ],
            "prefill_share_s": found.prefill_share,
        },
        "provenance": own.provenance,
        "target": target_records(found),
        "claims": claim_records(found),
        "missing": found.missing,
    }


def _spread(seconds: np.ndarray) -> dict[str, float]:
    """Least, mean and most over GPUs."""
    return {"min": float(seconds.min()), "mean": float(seconds.mean()), "max": float(seconds.max())}


def path_records(line: Timeline) -> list[dict[str, Any]]:
    """Every op of the critical path by name: when it ran, what it waited for last, what other transfers cost it."""
    graph = line.plan.blocks
    return [
        {
            "op": graph.op_id(s.block, s.op),
            "start_s": s.start,
            "end_s": s.end,
            "waited_for": s.cause,
            "delayed_s": s.delayed,
        }
        for s in line.critical_path
    ]


def path_text(line: Timeline) -> str:
    """The same as a table."""
    rows = [
        (r["op"], format_seconds(r["start_s"]), format_seconds(r["end_s"] - r["start_s"]), r["waited_for"])
        for r in path_records(line)
    ]
    return "\n".join(table(("critical path", "start", "time", "after"), rows)) + "\n"


def target_records(found: Estimate) -> dict[str, dict[str, Any]]:
    """The spec's target beside the prediction: key -> target, predicted, verdict."""
    records: dict[str, dict[str, Any]] = {}
    for key in ("tpot_s", "ttft_s", "tps"):
        name = key.removesuffix("_s")
        wanted, value = getattr(found.plan.spec.target, name), getattr(found, name)
        if wanted is not None:
            records[key] = {"target": wanted, "predicted": value, "verdict": _reaches(found, key, wanted, value)}
    return records


def _reaches(found: Estimate, key: str, wanted: float, value: float | None) -> str:
    """Whether a target is reached, with what is known of the interval and the floor."""
    if value is None:
        return "not predicted"
    sign = -1.0 if key == "tps" else 1.0  # more TPS are better, and less time
    low, high = sorted((sign * wanted - sign * bound) for bound in found.intervals[key])
    if sign * (wanted - value) >= 0:
        return "reached" if low >= 0 else "reached, but not by the whole interval"
    floor = _most_tps(found) if key == "tps" else found.floors[key]
    if floor is not None and sign * (wanted - floor) < 0:
        return "missed, and beyond the floor: no software reaches it with this plan"
    return "missed, but not by the whole interval" if high >= 0 else "missed"


def _most_tps(found: Estimate) -> float | None:
    """TPS at the floor of TPOT."""
    return found.tps * found.tpot / found.floors["tpot_s"] if found.tps and found.tpot else None


def target_rows(found: Estimate) -> list[str]:
    """The same in words: ``TPOT ≤ 50 ms: reached``."""
    show = {"tpot_s": ("TPOT ≤", format_seconds), "ttft_s": ("TTFT ≤", format_seconds), "tps": ("TPS ≥", _rate)}
    return [
        f"{show[key][0]} {show[key][1](record['target'])}: {record['verdict']}"
        for key, record in target_records(found).items()
    ]


def busiest_links(line: Timeline, count: int = 3) -> list[tuple[str, float, float]]:
    """(name, share of its bandwidth used, bytes) of the busiest link of each kind, busiest first."""
    topology, shares = line.prices.topology, line.link_utilization
    found = []
    for kind in range(int(topology.kind_of_link.max()) + 1):
        members = (topology.kind_of_link == kind).nonzero()[0]
        if len(members) and shares[members].max() > 0:
            link = int(members[shares[members].argmax()])
            found.append((topology.names[link], float(shares[link]), float(line.link_bytes[link])))
    return sorted(found, key=lambda row: (-row[1], row[0]))[:count]


def headline_rows(found: Estimate) -> list[tuple[str, str, str, str]]:
    """(what, estimate, 90 % interval, floor) as text."""
    rows = []
    for key, name in (("tpot_s", "TPOT"), ("ttft_s", "TTFT"), ("tps", "TPS"), ("tps_per_gpu", "TPS per GPU")):
        value = getattr(found, key.removesuffix("_s"))
        if value is None:
            rows.append((name, "–", found.missing.get(key, ""), ""))
            continue
        show = format_seconds if key.endswith("_s") else _rate
        low, high = found.intervals[key]
        floor = found.floors.get(key)
        if key.startswith("tps") and found.tpot is not None:
            floor = value * found.tpot / found.floors["tpot_s"]
        rows.append((name, show(value), f"{show(low)} to {show(high)}", "" if floor is None else show(floor)))
    return rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "below 1 %"


def class_rows(line: Timeline) -> list[tuple[str, float, float]]:
    """(class of ops in words, seconds of the critical path, share of the step), longest first."""
    rows = [(CLASS_NAMES[name], value, value / line.step) for name, value in line.path_by_class.items()]
    return sorted(rows, key=lambda row: -row[1])


def provenance_rows(line: Timeline) -> list[tuple[str, float, str]]:
    """(word, share of the critical path, what it means), best known first."""
    shares = line.provenance
    return [(word, shares[word], PROVENANCE[word]) for word in reversed(PROVENANCE_ORDER) if shares.get(word, 0) > 0]


def estimate_text(found: Estimate) -> str:
    """The prediction for a terminal."""
    spec, par, own = found.plan.spec, found.plan.parallelism, found.own
    work = spec.workload
    gpus = ", ".join(dict.fromkeys(g.gpu.name for g in spec.cluster.groups))
    lines = [
        f"{spec.name}: {work.phase}, batch {work.batch:,}, isl {work.isl:,}, osl {work.osl:,}, on {par.world_size} GPUs ({gpus})",
        "",
        *table(("", "estimate", "90 % interval", "at best"), headline_rows(found)),
        *(f"target {row}" for row in target_rows(found)),
        "",
        f"largest batch that fits memory: {found.concurrency:,}",
        f"{work.phase} step {format_seconds(own.step)}, on its critical path:",
        *table(
            ("class of ops", "time", "share"),
            [(name, format_seconds(value), f"{100 * share:.1f} %") for name, value, share in class_rows(own)],
        ),
        "",
        "mean over GPUs: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in own.split.items()),
        f"communication hidden by computation: {100 * own.overlap_efficiency:.0f} %",
        "busiest links: "
        + (
            "; ".join(f"{name} {100 * share:.1f} %, {format_bytes(size)}" for name, share, size in busiest_links(own))
            or "none"
        ),
        "prices: " + "; ".join(f"{_percent(share)} {word} ({text})" for word, share, text in provenance_rows(own)),
    ]
    for row in claim_rows(found):
        lines += [
            "",
            f"claim `{row['name']}`: {row['says']}",
            *(f"  {part}" for part in row["found"].split("; ")),
        ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def point_record(point: Point) -> dict[str, Any]:
    """One workload of a sweep as JSON."""
    return {
        **point.changes,
        "batch": point.batch,
        "tpot_s": point.tpot,
        "ttft_s": point.ttft,
        "tps": point.tps,
        "tps_per_gpu": point.tps_per_gpu,
        "floors": {"tpot_s": point.floor},
        "intervals": {"tpot_s": [point.low, point.high]},
        "fits": point.fits,
    }


def sweep_text(points: Sequence[Point]) -> str:
    """A row per workload."""
    keys = list(points[0].changes)
    rows = [
        (
            *(f"{point.changes[key]:,}" for key in keys),
            format_seconds(point.tpot),
            f"{format_seconds(point.low)} to {format_seconds(point.high)}",
            format_seconds(point.floor),
            "–" if point.ttft is None else format_seconds(point.ttft),
            _rate(point.tps),
            _rate(point.tps_per_gpu),
            "" if point.fits else "does not fit memory",
        )
        for point in points
    ]
    head = (*keys, "TPOT", "90 % interval", "floor", "TTFT", "TPS", "TPS per GPU", "")
    return "\n".join(table(head, rows)) + "\n"


def best_record(best: Best, tpot: float | None, ttft: float | None) -> dict[str, Any]:
    """The best batch as JSON."""
    return {
        "bounds": {"tpot_s": tpot, "ttft_s": ttft},
        "best": None if best.point is None else point_record(best.point),
        "nearest": None if best.nearest is None else point_record(best.nearest),
        "steps": best.steps,
        "simulated": best.simulated,
        "pruned": best.pruned,
        "largest_batch": best.limit,
    }


def bounds_text(tpot: float | None, ttft: float | None) -> str:
    """``TPOT ≤ 20 ms and TTFT ≤ 1 s``."""
    parts = [f"{name} ≤ {format_seconds(v)}" for name, v in (("TPOT", tpot), ("TTFT", ttft)) if v is not None]
    return " and ".join(parts) or "no bound"


def best_text(best: Best, tpot: float | None, ttft: float | None) -> str:
    """The best batch in words."""
    assert best.point is not None
    point = best.point
    return (
        f"best batch under {bounds_text(tpot, ttft)}: {point.batch:,} with {_rate(point.tps)} TPS "
        f"({_rate(point.tps_per_gpu)} per GPU), TPOT {format_seconds(point.tpot)}"
        f" ({format_seconds(point.low)} to {format_seconds(point.high)})\n"
        f"of {best.steps:,} different steps up to batch {best.limit:,} (memory), {best.simulated:,} were simulated; "
        f"{best.pruned:,} cannot be better\n"
    )


def straggler_record(planned: Estimate, slow: Estimate, moved: Estimate) -> dict[str, Any]:
    """What a slow GPU or link costs a step, and what is left when copies of experts share tokens by the speed of their GPUs."""
    layers = planned.plan.placement.layers.values()
    steps = planned.own.step, slow.own.step, moved.own.step
    lost, recovered = steps[1] - steps[0], steps[1] - steps[2]
    return {
        "step_as_planned_s": steps[0],
        "step_s": steps[1],
        "step_by_speed_s": steps[2],
        "lost_s": lost,
        "recovered_share": max(0.0, recovered) / lost if lost > 0 else 0.0,
        "redundant_copies": max((int(len(part.expert) - len(part.copies)) for part in layers), default=0),
    }


def straggler_text(record: dict[str, Any]) -> str:
    """The same in words."""
    copies = record["redundant_copies"]
    share = f"{100 * record['recovered_share']:.0f} % of it"
    taken = f"stragglers: the step takes {format_seconds(record['step_s'])} instead of {format_seconds(record['step_as_planned_s'])}"
    if not copies:
        return f"{taken}; no expert has a second copy that could take over (spare GPUs and `spares: replicate` give some)\n"
    return (
        f"{taken}; with {copies} redundant copies a layer that share tokens by the speed of their GPUs, "
        f"{format_seconds(record['step_by_speed_s'])}: {share if record['recovered_share'] else 'nothing'} is recovered\n"
    )
