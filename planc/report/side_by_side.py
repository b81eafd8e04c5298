"""Plans side by side: what each is predicted to do, why they differ, and how they compare on equal terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.cost.step import CLASS_NAMES, CLASSES
from planc.placement import memory_table
from planc.report.estimate import busiest_links, table
from planc.schedule import Best, Estimate, Sweep, Timeline
from planc.units import format_bytes, format_seconds

#: workloads at which claimed ratios are looked at
BATCHES, INPUTS = (64, 256, 1024, 4096, 16384), (128, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, eq=False)
class Side:
    """One plan of a comparison. ``best``: its best batch under the common TPOT bound."""

    found: Estimate
    best: Best | None = None

    @property
    def name(self) -> str:
        """The plan's name."""
        return self.found.plan.spec.name

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.found.plan.parallelism.world_size

    @property
    def line(self) -> Timeline:
        """The step of its own phase."""
        return self.found.own

    @property
    def work_share(self) -> float:
        """Mean over GPUs of what its compute ops take at full rates (the larger of FLOPs ÷ peak and bytes ÷ bandwidth), over
        the step: how far the hardware is used."""
        total = np.zeros(self.gpus)
        for block, price in zip(self.line.plan.blocks.blocks, self.line.prices.blocks, strict=True):
            if not block.collective and block.kind != "pp_send":
                total += np.bincount(block.ranks[:, 0], weights=price.floor, minlength=self.gpus)
        return float(total.mean() / self.line.step)

    @property
    def moved(self) -> float:
        """Bytes over NICs in a step, all GPUs."""
        topology = self.line.prices.topology
        first = topology.first
        return float(self.line.link_bytes[first["nic_up"] : first["nic_down"]].sum())


def sides(found: Sequence[Estimate], bound: float | None) -> tuple[list[Side], float | None]:
    """The plans with their best batches under one TPOT bound: as given, else the slowest plan's own TPOT."""
    tpots = [one.tpot for one in found if one.tpot is not None]
    bound = bound if bound is not None else max(tpots, default=None)
    return [Side(one, sweep_of(one).best_batch(bound, None) if bound else None) for one in found], bound


def sweep_of(found: Estimate) -> Sweep:
    """Other workloads of a predicted plan, with the same traffic and prices."""
    return Sweep(found.plan, found.traffic, found.own.prices.book)


def reasons(first: Side, second: Side) -> list[tuple[str, float, float, float]]:
    """(class of ops, seconds of the critical path in the first, in the second, share of the difference of the steps), the
    largest difference first."""
    a, b = first.line.path_by_class, second.line.path_by_class
    total = first.line.step - second.line.step
    rows = [(name, a.get(name, 0.0), b.get(name, 0.0)) for name in CLASSES if name in a or name in b]
    return sorted(
        ((name, x, y, (x - y) / total if total else 0.0) for name, x, y in rows), key=lambda row: -abs(row[1] - row[2])
    )


def comparison_record(group: Sequence[Side], bound: float | None, dollars: float | None) -> dict[str, Any]:
    """The comparison as JSON; every key says its unit."""
    most = max(side.gpus for side in group)
    return {
        "plans": [_record(side, dollars) for side in group],
        "differences": [
            {
                "plan": group[0].name,
                "against": other.name,
                "step_s": group[0].line.step - other.line.step,
                "by_class": [
                    {"class": name, "plan_s": x, "against_s": y, "share_of_difference": share}
                    for name, x, y, share in reasons(group[0], other)
                ],
            }
            for other in group[1:]
        ],
        "equal_gpus": {
            "gpus": most,
            "plans": [
                {"name": s.name, "copies": most // s.gpus, "tps": _times(s.found.tps, most // s.gpus)} for s in group
            ],
        },
        "equal_latency": {"tpot_s": bound, "plans": [_best_record(side) for side in group]},
        "claims": claimed_ratios(group),
    }


def _times(value: float | None, count: int) -> float | None:
    return None if value is None else value * count


def _record(side: Side, dollars: float | None) -> dict[str, Any]:
    found = side.found
    memory = memory_table(found.plan.spec, found.plan.parallelism, found.plan.placement)
    rank = memory.fullest
    seconds = None if found.tps_per_gpu is None else 1e6 / found.tps_per_gpu
    par = found.plan.parallelism
    return {
        "name": side.name,
        "gpus": side.gpus,
        "parallelism": {key: getattr(par, key) for key in ("dp", "pp", "ep", "tp")},
        "batch": found.plan.spec.workload.batch,
        "tps": found.tps,
        "tps_per_gpu": found.tps_per_gpu,
        "tpot_s": found.tpot,
        "ttft_s": found.ttft,
        "intervals": {key: list(pair) for key, pair in found.intervals.items()},
        "floors": found.floors,
        "memory_used_bytes": int(memory.used[rank]),
        "memory_capacity_bytes": int(memory.capacity[rank]),
        "largest_batch": found.concurrency,
        "nic_bytes_per_step": side.moved,
        "exposed_communication_s": float(side.line.usage.exposed.mean()),
        "hardware_utilization": side.work_share,
        "idle_share": float(side.line.usage.idle.mean() / side.line.step),
        "busiest_link": busiest_links(side.line, 1)[0][1] if busiest_links(side.line, 1) else 0.0,
        "gpu_seconds_per_million_tokens": seconds,
        "dollars_per_million_tokens": None if seconds is None or dollars is None else seconds / 3600 * dollars,
    }


def _best_record(side: Side) -> dict[str, Any]:
    point = side.best.point if side.best else None
    if point is None:
        return {"name": side.name} | dict.fromkeys(("batch", "tps", "tps_per_gpu", "tpot_s"))
    return {
        "name": side.name,
        "batch": point.batch,
        "tps": point.tps,
        "tps_per_gpu": point.tps_per_gpu,
        "tpot_s": point.tpot,
    }


def claimed_ratios(group: Sequence[Side]) -> list[dict[str, Any]]:
    """Where the first plan and another both have a claim of TPS and TPOT: the claimed ratios, and the batches and input lengths
    at which the predictions reach them."""
    found = []
    first = next((c for c in group[0].found.plan.spec.claims if c.tps and c.tpot), None)
    for other in group[1:]:
        second = next((c for c in other.found.plan.spec.claims if c.tps and c.tpot), None)
        if first is None or second is None or not (first.tps and second.tps and first.tpot and second.tpot):
            continue
        tps, tpot = first.tps / second.tps, second.tpot / first.tpot
        gpus = (first.gpus or group[0].gpus), (second.gpus or other.gpus)
        found.append(
            {
                "plan": group[0].name,
                "against": other.name,
                "claimed_tps_ratio": tps,
                "claimed_tpot_ratio": tpot,
                "claimed_tps_per_gpu_ratio": (first.tps / gpus[0]) / (second.tps / gpus[1]),
                "grid": ratio_grid(group[0], other),
            }
        )
    return found


def ratio_grid(first: Side, second: Side) -> list[dict[str, Any]]:
    """Predicted ratios at equal batches and input lengths that fit both plans' memory. At one batch the ratio of TPS is that
    of the TPOTs turned over."""
    rows: list[dict[str, Any]] = []
    sweeps = tuple(sweep_of(side.found) for side in (first, second))
    for isl in INPUTS:
        limits = [_limit(sweep, isl) for sweep in sweeps]
        for batch in BATCHES:
            if batch > min(limits):
                rows.append({"isl": isl, "batch": batch, "fits": False, "tps_ratio": None, "tps_per_gpu_ratio": None})
                continue
            a, b = (sweep.at(batch=batch, isl=isl) for sweep in sweeps)
            rows.append(
                {
                    "isl": isl,
                    "batch": batch,
                    "fits": True,
                    "tps_ratio": a.tps / b.tps,
                    "tps_per_gpu_ratio": a.tps_per_gpu / b.tps_per_gpu,
                }
            )
    return rows


def _limit(sweep: Sweep, isl: int) -> int:
    from planc.placement import largest_that_fits
    from planc.schedule.workload import changed

    plan = sweep.plan
    return largest_that_fits(changed(plan.spec, isl=isl), plan.parallelism, plan.placement, "batch")


# --- in words -------------------------------------------------------------------------------------------------------


def comparison_text(group: Sequence[Side], bound: float | None, dollars: float | None) -> str:
    """The comparison for a terminal."""
    record = comparison_record(group, bound, dollars)
    parts = [_plan_table(record["plans"], dollars)]
    for other in group[1:]:
        parts.append(_reason_text(group[0], other))
    parts.append(_equal_text(record))
    parts += [_claim_text(claim) for claim in record["claims"]]
    return "\n\n".join(parts) + "\n"


def _plan_table(plans: Sequence[dict[str, Any]], dollars: float | None) -> str:
    def row(name: str, show: Any) -> tuple[str, ...]:
        return name, *(show(plan) for plan in plans)

    def seconds(key: str) -> Any:
        return lambda p: "–" if p[key] is None else format_seconds(p[key])

    def interval(p: dict[str, Any]) -> str:
        pair = p["intervals"].get("tpot_s")
        return "–" if pair is None else f"{format_seconds(pair[0])} to {format_seconds(pair[1])}"

    def floor(p: dict[str, Any]) -> str:
        return format_seconds(p["floors"]["tpot_s"]) if "tpot_s" in p["floors"] else "–"

    def number(key: str) -> Any:
        return lambda p: "–" if p[key] is None else f"{p[key]:,.0f}"

    def percent(key: str) -> Any:
        return lambda p: f"{100 * p[key]:.1f} %"

    rows = [
        row("GPUs", number("gpus")),
        row("degrees", lambda p: " · ".join(f"{k} {v}" for k, v in p["parallelism"].items())),
        row("batch", number("batch")),
        row("TPOT", seconds("tpot_s")),
        row("  90 % interval", interval),
        row("  floor", floor),
        row("TTFT", seconds("ttft_s")),
        row("TPS", number("tps")),
        row("TPS per GPU", number("tps_per_gpu")),
        row(
            "memory of the fullest GPU",
            lambda p: f"{format_bytes(p['memory_used_bytes'])} of {format_bytes(p['memory_capacity_bytes'])}",
        ),
        row("largest batch that fits", number("largest_batch")),
        row("bytes over NICs a step", lambda p: format_bytes(p["nic_bytes_per_step"])),
        row("exposed communication", seconds("exposed_communication_s")),
        row("hardware used", percent("hardware_utilization")),
        row("waiting", percent("idle_share")),
        row("busiest link used", percent("busiest_link")),
        row("GPU seconds per million tokens", number("gpu_seconds_per_million_tokens")),
    ]
    if dollars is not None:
        rows.append(
            row(
                "$ per million tokens",
                lambda p: "–" if p["dollars_per_million_tokens"] is None else f"{p['dollars_per_million_tokens']:.3f}",
            )
        )
    return "\n".join(table(("", *(plan["name"] for plan in plans)), rows))


def _reason_text(first: Side, second: Side) -> str:
    difference = first.line.step - second.line.step
    word = "shorter" if difference < 0 else "longer"
    rows = [
        (CLASS_NAMES[name], format_seconds(x), format_seconds(y), f"{round(100 * share)} %")
        for name, x, y, share in reasons(first, second)
        if x or y
    ]
    head = f"The step of {first.name} is {format_seconds(abs(difference))} {word} than that of {second.name}; on the critical paths:"
    return "\n".join([head, *table(("class of ops", first.name, second.name, "of the difference"), rows)])


def _equal_text(record: dict[str, Any]) -> str:
    gpus, latency = record["equal_gpus"], record["equal_latency"]
    rows = []
    for one, other in zip(gpus["plans"], latency["plans"], strict=True):
        tps = "–" if one["tps"] is None else f"{one['tps']:,.0f}"
        best = (
            ("–",) * 3
            if other["batch"] is None
            else (f"{other['batch']:,}", f"{other['tps']:,.0f}", f"{other['tps_per_gpu']:,.0f}")
        )
        rows.append((one["name"], str(one["copies"]), tps, *best))
    bound = "–" if latency["tpot_s"] is None else format_seconds(latency["tpot_s"])
    head = ("", "copies", f"TPS on {gpus['gpus']} GPUs", f"best batch, TPOT ≤ {bound}", "TPS", "TPS per GPU")
    return "\n".join(
        [
            "On equal terms: as many copies as fit the GPUs of the largest; and the best batch under one bound:",
            *table(head, rows),
        ]
    )


def _claim_text(claim: dict[str, Any]) -> str:
    batches = sorted({row["batch"] for row in claim["grid"]})
    rows = []
    for isl in sorted({row["isl"] for row in claim["grid"]}):
        cells = {row["batch"]: row for row in claim["grid"] if row["isl"] == isl}
        rows.append((f"isl {isl:,}", *(_cell(cells[batch], claim["claimed_tps_ratio"]) for batch in batches)))
    lines = [
        f"Claimed: {claim['plan']} has {claim['claimed_tps_ratio']:.2f} times the TPS and 1/{claim['claimed_tpot_ratio']:.2f} of the TPOT of "
        f"{claim['against']}, {claim['claimed_tps_per_gpu_ratio']:.2f} times the TPS per GPU.",
        "Predicted ratio of TPS at equal batch (in brackets per GPU); * reaches the claim:",
        *table(("", *(f"batch {batch:,}" for batch in batches)), rows),
    ]
    return "\n".join(lines)


def _cell(row: dict[str, Any], claimed: float) -> str:
    if not row["fits"]:
        return "does not fit"
    mark = "*" if row["tps_ratio"] >= claimed else " "
    return f"{row['tps_ratio']:.2f}{mark} ({row['tps_per_gpu_ratio']:.2f})"
