"""Made results of a search, as `planc search` records them: fronts of all shapes, baselines that nearly coincide or do not fit."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
NASTY = "a <b>&amp;</b> \"x\" </script><script>document.title='broken'</script> %{x} ${y}"


def row(batch: int, tpot_s: float, **changed: Any) -> Record:
    """A deployment; TPS follows from batch and TPOT, the interval is 8 % below to 12 % above it."""
    made: Record = {
        "gpus": 128, "dp": 1, "pp": 1, "ep": 128, "tp": 1, "expert_tp": 1, "stages": [61], "gating": "sharded",
        "tp_comm": "all_reduce", "rule": "layer", "slots_per_gpu": 2, "rounds": 2, "spares": "idle", "one_expert_per_gpu": False,
        "micro_batches": 2, "batch": batch, "serving": "apart", "dtypes": {}, "tpot_s": tpot_s,
        "tpot_interval_s": [0.92 * tpot_s, 1.12 * tpot_s], "tpot_floor_s": 0.6 * tpot_s, "ttft_s": None,
        "memory_used_bytes": 4.1e10 + 2.2e6 * batch, "memory_capacity_bytes": 8.0e10,
    }  # fmt: skip
    made |= changed
    made["tps"] = batch / tpot_s
    return made | {"tps_per_gpu": made["tps"] / made["gpus"], "tps_per_user": 1 / tpot_s}


def front_row(batch: int, tpot_s: float, reason: str = "most TPS per GPU within this TPOT", **changed: Any) -> Record:
    return row(batch, tpot_s, **changed) | {"reason": reason, "tpot_bound_s": 1.05 * tpot_s}


def baseline(name: str, batch: int, tpot_s: float, reason: str = "as published", **changed: Any) -> Record:
    return row(batch, tpot_s, **changed) | {"name": name, "reason": reason}


def unfit(name: str, reason: str) -> Record:
    """A baseline that does not fit memory: it has no batch, and so no TPOT and no TPS."""
    nothing = dict.fromkeys(
        ("batch", "tpot_s", "tpot_interval_s", "tpot_floor_s", "tps", "tps_per_gpu", "tps_per_user")
    )
    return row(1, 1.0, ep=8, tp=8, dp=16) | nothing | {"name": name, "reason": reason}


def record(front: list[Record], baselines: list[Record] | None = None, **changed: Any) -> Record:
    """A result; the winner is the row of the front with most TPS per GPU within the bound of TPOT."""
    made: Record = {
        "schema": "planc.search/1",
        "name": "deepseek-v3-128gpu",
        "objective": "tps-per-gpu",
        "bounds": {"tpot_s": 0.05, "ttft_s": None, "tps": None, "gpus": sorted({r["gpus"] for r in front}) or [128]},
        "space": {
            "tp": [1, 2, 4, 8],
            "pp": [1, 2],
            "gating": ["leader", "sharded"],
            "dtypes": {"kv_cache": ["bf16", "fp8"]},
        },
        "candidates": 812_345,
        "pruned": {"tp does not divide the heads": 120_403, "does not fit memory at batch 1": 61_210},
        "simulated": 87,
        "optimal": True,
        "front": front,
        "baselines": baselines or [],
        "sensitivity": [],
    }
    made |= changed
    limit = made["bounds"]["tpot_s"] or 1e9
    inside = [r for r in front if r["tpot_s"] <= limit]
    best = max(inside, key=lambda r: r["tps_per_gpu"], default=None)
    winner = {key: value for key, value in best.items() if key not in ("reason", "tpot_bound_s")} if best else None
    return {"winner": winner, "top": [winner] if winner else []} | made


ONE = {"one_expert_per_gpu": True, "slots_per_gpu": 1, "rounds": 1, "gpus": 256, "ep": 256}
_SHAPE = [(1.0, 64, 8), (1.08, 128, 8), (1.2, 256, 8), (1.42, 512, 4), (1.75, 1024, 4), (2.2, 2048, 4), (2.7, 3072, 2)]
_SHAPE += [
    (3.3, 4352, 2),
    (4.0, 5888, 2),
    (4.8, 7680, 1),
    (5.8, 9984, 1),
    (7.0, 12544, 1),
    (8.6, 15872, 1),
    (10.5, 19712, 1),
]
BASELINES = [
    baseline(
        "TP8·PP2, colocated",
        512,
        0.0341,
        "the serving default of one node, copied",
        tp=8,
        pp=2,
        ep=64,
        gating="leader",
        serving="together",
    ),
    baseline("TP8·PP2, prefill elsewhere", 512, 0.0332, "the same with prefill apart", tp=8, pp=2, ep=64),
    baseline("published EP128", 4096, 0.052, "batch and degrees of the report", micro_batches=2),
    unfit("TP8·DP16, no EP", "rank 0 needs 96.2 GB but has 80 GB"),
]
WIDE = [
    front_row(batch, 0.0095 * slower, tp=tp, micro_batches=2 if batch >= 1024 else 1, one_expert_per_gpu=n % 3 == 1)
    for n, (slower, batch, tp) in enumerate(_SHAPE)
]
_SIZES = [
    (32, 32, 12e-3),
    (64, 1024, 22e-3),
    (96, 2304, 27e-3),
    (128, 4096, 31e-3),
    (256, 9216, 34e-3),
    (512, 18432, 38e-3),
]

#: by what is special about them
RECORDS: dict[str, Record] = {
    "wide": record(WIDE, BASELINES),
    "no bound": record(WIDE, BASELINES, bounds={"tpot_s": None, "ttft_s": 2.0, "tps": 1e5, "gpus": None}, optimal=False),
    "close together": record(
        [front_row(2048 + 256 * n, 0.02 + 0.0012 * n, tp=4 if n < 8 else 2, one_expert_per_gpu=n % 2 == 0) for n in range(16)],
        [baseline(f"engine {n}, its default", 2300 + 4 * n, 0.026 + 0.00004 * n) for n in range(5)],
        bounds={"tpot_s": 0.031, "ttft_s": None, "tps": None, "gpus": [128]},
    ),
    "many sizes": record(
        [front_row(batch, tpot, gpus=gpus, ep=gpus, one_expert_per_gpu=gpus >= 256) for gpus, batch, tpot in _SIZES], BASELINES,
        objective="gpus",
    ),
    "one point": record([front_row(4096, 0.0312, tp=2, **ONE)]),
    "none in the bound": record(WIDE[5:], bounds={"tpot_s": 0.01, "ttft_s": None, "tps": None, "gpus": [128]}),
    "empty": record([], BASELINES),
    "nasty": record([front_row(64, 0.01, NASTY), front_row(512, 0.02, NASTY)], [baseline(NASTY, 256, 0.03, NASTY)], name=NASTY),
}  # fmt: skip
