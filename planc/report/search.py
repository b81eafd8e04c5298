"""The result of a search in words and tables for a terminal, from its record (docs/search.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planc.report.estimate import table
from planc.units import counted, format_bytes, format_seconds

Row = dict[str, Any]

WORDS = {
    "tps": "most TPS",
    "tps-per-gpu": "most TPS per GPU",
    "tpot": "shortest TPOT",
    "cost": "fewest dollars per token",
    "gpus": "fewest GPUs",
}


def degrees_text(row: Row) -> str:
    """``dp 2 · pp 1 · ep 64 · tp 8, leader gating``: what tells a row from another."""
    parts = [f"{key} {row[key]}" for key in ("dp", "pp", "ep", "tp")]
    parts += [f"expert_tp {row['expert_tp']}"] if row["expert_tp"] > 1 else []
    parts += [f"{row['micro_batches']} micro-batches"] if row["micro_batches"] > 1 else []
    parts += [f"{row['gating']} gating"] if row["tp"] > 1 else []
    parts += ["reduce-scatter"] if row["tp_comm"] == "reduce_scatter" else []
    parts += ["even stages"] if row["pp"] > 1 and row["split"] == "even" else []
    parts += ["spare slots replicated"] if row["spares"] == "replicate" else []
    parts += ["in turns with prefill"] if row["serving"] == "together" else []
    parts += [f"{role} {dtype}" for role, dtype in row["dtypes"].items()]
    return " · ".join(parts)


def goal_text(record: Row) -> str:
    """``most TPS with TPOT ≤ 50 ms on 128 GPUs``."""
    bounds = record["bounds"]
    kept = [
        f"{name} ≤ {format_seconds(bounds[key])}"
        for name, key in (("TPOT", "tpot_s"), ("TTFT", "ttft_s"))
        if bounds[key]
    ]
    kept += [f"TPS ≥ {bounds['tps']:,.0f}"] if bounds["tps"] else []
    gpus = bounds["gpus"]
    where = f"on {counted(gpus[0], 'GPU')}" if len(gpus) == 1 else f"on {min(gpus):,} to {max(gpus):,} GPUs"
    return f"{WORDS[record['objective']]}{' with ' + ' and '.join(kept) if kept else ''} {where}"


def _cells(row: Row) -> tuple[str, ...]:
    if row["tps"] is None:
        return (row["reason"], *("–",) * 7)
    ttft = "–" if row["ttft_s"] is None else format_seconds(row["ttft_s"])
    experts = "–" if not row["rounds"] else str(row["rounds"])
    return (
        degrees_text(row),
        f"{row['batch']:,}",
        format_seconds(row["tpot_s"]),
        ttft,
        f"{row['tps']:,.0f}",
        f"{row['tps_per_gpu']:,.0f}",
        f"{row['tps_per_user']:,.1f}",
        experts,
    )


_HEAD = ("batch", "TPOT", "TTFT", "TPS", "per GPU", "per user", "experts/GPU")


def search_text(record: Row, dollars: float | None = None) -> str:
    """The winner with what is known of it, the runners-up, the front with its reasons, baselines and counts."""
    winner = record["winner"]
    low, high = winner["tpot_interval_s"]
    proof = "the best of the declared space" if record["optimal"] else _unproved(record)
    lines = [
        f"{record['name']}: {goal_text(record)}",
        f"  {degrees_text(winner)}, batch {winner['batch']:,} on {counted(winner['gpus'], 'GPU')}: {proof}",
        f"  TPOT {format_seconds(winner['tpot_s'])} ({format_seconds(low)} to {format_seconds(high)}, floor {format_seconds(winner['tpot_floor_s'])}), "
        f"TPS {winner['tps']:,.0f} ({winner['tps_per_gpu']:,.0f} per GPU)",
        f"  memory of the fullest GPU {format_bytes(winner['memory_used_bytes'])} of {format_bytes(winner['memory_capacity_bytes'])}",
    ]
    if dollars is not None:
        lines.append(
            f"  ${dollars / 3600 / winner['tps_per_gpu'] * 1e6:.3f} per million tokens at ${dollars:g} a GPU and hour"
        )
    rule = _rule_text(record)
    lines += [f"  {rule}"] if rule else []
    lines.append("")
    lines += table((f"best {len(record['top'])}", *_HEAD), [_cells(row) for row in record["top"]])
    if record["front"]:
        lines += [
            "",
            *table(("front: TPS per GPU against TPS per user", *_HEAD), [_cells(row) for row in record["front"]]),
        ]
        lines += [f"  {format_seconds(row['tpot_s'])}: {row['reason']}" for row in record["front"]]
    if record["baselines"]:
        rows = [(f"{row['name']}: {_cells(row)[0]}", *_cells(row)[1:]) for row in record["baselines"]]
        lines += ["", *table(("beside it", *_HEAD), rows)]
    if record.get("pools"):
        lines += ["", *_pool_lines(record["pools"])]
    if record.get("sensitivity"):
        lines += ["", *_sensitivity_lines(record["sensitivity"])]
    lines += ["", f"{record['candidates']:,} candidates, {record['simulated']:,} simulated; left out:"]
    lines += [f"  {count:>12,}  {reason}" for reason, count in record["pruned"].items()]
    return "\n".join(lines) + "\n"


def _unproved(record: Row) -> str:
    value = record["most"]
    return "the best found; the search stopped before it was proved" + (
        "" if value is None else f" (others reach at most {value:,.4g})"
    )


def _rule_text(record: Row) -> str:
    """Where the rule of one expert per GPU wins or loses, per GPU."""
    one, several = record["one_expert_per_gpu"], record["several_experts_per_gpu"]
    if one is None or several is None:
        present = one or several
        if present is None or not present["rounds"]:
            return ""
        return "no plan of the space that keeps the bounds " + (
            "has at most one expert of a layer per GPU" if one is None else "has several experts of a layer on a GPU"
        )
    ratio = one["tps_per_gpu"] / several["tps_per_gpu"]
    word = "more" if ratio >= 1 else "fewer"
    return (
        f"one expert of a layer per GPU: {one['tps_per_gpu']:,.0f} TPS per GPU, {abs(100 * (ratio - 1)):.1f} % {word} than the best with several "
        f"({several['tps_per_gpu']:,.0f}, {several['rounds']} per GPU)"
    )


def _sensitivity_lines(rows: Sequence[Row]) -> list[str]:
    cells = [(row["what"], row["words"]) for row in rows]
    return table(("what changes the winner", ""), cells)


def _pool_lines(pools: Row) -> list[str]:
    head = "prefill and decode apart: GPUs of each pool"
    rows = [
        (
            f"{row['prefill_gpus']} + {row['decode_gpus']}",
            f"{row['tps']:,.0f}",
            f"{row['tps_per_gpu']:,.0f}",
            format_seconds(row["tpot_s"]),
            format_seconds(row["ttft_s"]),
            row["binds"],
            degrees_text(row["prefill"]),
            degrees_text(row["decode"]),
        )
        for row in pools["rows"]
    ]
    return table((head, "TPS", "per GPU", "TPOT", "TTFT", "what binds", "prefill", "decode"), rows)
