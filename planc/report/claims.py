"""Claims of a spec beside prediction and floor. A claim is data to check; nothing is tuned to meet one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from planc.schedule import Estimate, Sweep
from planc.schedule.timeline import SPLIT
from planc.spec.deployment import Claim
from planc.units import format_seconds

Verdict = Literal["impossible", "quicker than predicted", "as predicted", "slower than predicted"]
MEANS: dict[Verdict, str] = {
    "impossible": "below the floor: no software on this hardware is as quick with this plan",
    "quicker than predicted": "quicker than the 90 % interval, above the floor",
    "as predicted": "within the 90 % interval",
    "slower than predicted": "slower than the 90 % interval",
}
LONGEST = 1 << 20  #: the longest input looked at


@dataclass(frozen=True, slots=True)
class Judged:
    """One claimed figure, as seconds per output token: what is claimed, predicted, its interval and floor."""

    key: Literal["tpot_s", "tps"]
    claimed: float
    predicted: float
    low: float
    high: float
    floor: float

    @property
    def verdict(self) -> Verdict:
        """Where the claim lies."""
        if self.claimed < self.floor * (1 - 1e-9):
            return "impossible"
        if self.claimed < self.low:
            return "quicker than predicted"
        return "as predicted" if self.claimed <= self.high else "slower than predicted"


def judged(claim: Claim, found: Estimate) -> list[Judged]:
    """The claimed TPOT, and the TPOT that the claimed TPS mean at the plan's batch."""
    if found.tpot is None:
        return []
    batch = found.plan.spec.workload.batch
    at = found.tpot, *found.intervals["tpot_s"], found.floors["tpot_s"]
    rows = [Judged("tpot_s", claim.tpot, *at)] if claim.tpot is not None else []
    return rows + ([Judged("tps", batch / claim.tps, *at)] if claim.tps is not None else [])


def in_flight(claim: Claim) -> float | None:
    """Sequences in flight that a claim implies: TPS × TPOT (Little's law)."""
    return claim.tps * claim.tpot if claim.tps is not None and claim.tpot is not None else None


def longest_inputs(claim: Claim, found: Estimate) -> dict[str, int]:
    """The longest isl at which the claimed TPOT is predicted, and at which its floor allows it, for the sequences in flight
    that the claim implies (else the spec's batch), as far as memory holds them; 0: at none. Times grow with isl, so bisection
    finds it."""
    if claim.tpot is None or found.tpot is None:
        return {}
    batch = max(1, round(in_flight(claim) or found.plan.spec.workload.batch))
    sweep = Sweep(found.plan, found.traffic, found.own.prices.book)

    def longest(which: Literal["tpot", "floor"]) -> int:
        def reached(isl: int) -> bool:
            point = sweep.at(batch=batch, isl=isl)
            return point.fits and bool(getattr(point, which) <= claim.tpot)

        low, high = 0, 1
        while high <= LONGEST and reached(high):
            low, high = high, high * 2
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            low, high = (middle, high) if reached(middle) else (low, middle)
        return min(low, LONGEST)

    return {"predicted": longest("tpot"), "floor": longest("floor")}


def claim_records(found: Estimate) -> list[dict[str, Any]]:
    """Every claim as JSON."""
    records = []
    for claim in found.plan.spec.claims:
        record: dict[str, Any] = {"name": claim.name, "source": claim.source, "verdicts": {}}
        for row in judged(claim, found):
            record["verdicts"][row.key] = {
                "claimed_tpot_s": row.claimed,
                "predicted_tpot_s": row.predicted,
                "interval_tpot_s": [row.low, row.high],
                "floor_tpot_s": row.floor,
                "verdict": row.verdict,
            }
        record["sequences_in_flight"] = in_flight(claim)
        gpus = claim.gpus or found.plan.parallelism.world_size
        record["tps_per_gpu"] = claim.tps / gpus if claim.tps is not None else None
        record["longest_isl"] = longest_inputs(claim, found)
        if claim.latency_split:
            record["latency_split"] = {"stated": dict(claim.latency_split), "predicted": found.own.split}
        records.append(record)
    return records


def claim_rows(found: Estimate) -> list[dict[str, str]]:
    """Each claim in words: what it says, and what is found."""
    rows = []
    work = found.plan.spec.workload
    for claim in found.plan.spec.claims:
        says, parts = [], []
        if claim.tps is not None:
            says.append(f"{claim.tps:,.0f} TPS")
        if claim.tpot is not None:
            says.append(f"TPOT {format_seconds(claim.tpot)}")
        if claim.latency_split:
            says.append(", ".join(f"{k} {100 * v:.0f} %" for k, v in claim.latency_split.items()))
            parts.append(
                "predicted, mean over GPUs: " + ", ".join(f"{k} {100 * found.own.split[k]:.1f} %" for k in SPLIT)
            )
        for row in judged(claim, found):
            what = (
                "TPOT" if row.key == "tpot_s" else f"TPS (TPOT {format_seconds(row.claimed)} at batch {work.batch:,})"
            )
            parts.append(
                f"{what}: {row.verdict} at isl {work.isl:,} and osl {work.osl:,}, predicted {format_seconds(row.predicted)}"
                f" ({format_seconds(row.low)} to {format_seconds(row.high)}), floor {format_seconds(row.floor)}"
            )
        if (flight := in_flight(claim)) is not None:
            parts.append(f"implies {flight:,.0f} sequences in flight (TPS × TPOT)")
        reach = longest_inputs(claim, found)
        if reach:
            shown = {key: f"up to isl {value:,}" if value else "at no isl" for key, value in reach.items()}
            parts.append(
                f"with those in memory the TPOT is predicted {shown['predicted']}, and above the floor {shown['floor']}"
            )
        if claim.tps is not None:
            gpus = claim.gpus or found.plan.parallelism.world_size
            parts.append(f"{claim.tps / gpus:,.0f} TPS per GPU on {gpus} GPUs")
        rows.append(
            {"name": claim.name, "says": "; ".join(says), "found": "; ".join(parts) or "nothing to compare with"}
        )
    return rows
