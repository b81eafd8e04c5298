"""Timelines and sweeps for the tests of their figures: roles, micro-batches, streams, dense models, one GPU."""

from __future__ import annotations

from functools import cache

from small_specs import GPU, ROOT, small_spec

import planc
from planc.schedule import Point, Slow, Timeline, timeline

LARGE = "workload.batch=32768", "workload.isl=1024"
EXAMPLES: dict[str, tuple[str, ...]] = {
    "reference": ("moe-61l-ep64-dp2",),
    "two stages": ("moe-4l-16gpu-baseline",),
    "two stages, four micro-batches": ("moe-4l-16gpu-baseline", "workload.micro_batches=4"),
    "two micro-batches": ("deepseek-v3-128gpu", *LARGE, "workload.micro_batches=2"),
    "two streams": (
        "deepseek-v3-128gpu",
        *LARGE,
        "workload.micro_batches=2",
        "execution={compute_streams: 2, communication_streams: 2}",
        "model={base: deepseek-v3, layers: 8}",
    ),
    "alike": ("qwen3-235b-a22b",),
    "experts start early": (
        "deepseek-v3-ep256",
        "execution={expert_chunks: 4}",
        "model={base: deepseek-v3, layers: 8}",
    ),
    "two kinds of GPU": ("hetero-h100-h200",),
    "prefill": ("mixtral-8x7b", "workload.phase=prefill"),
}
DENSE = {"moe": None, "dense_mlp": {"intermediate": 256}}
ALONE = {"groups": [{"nodes": 1, "gpus_per_node": 1, "gpu": GPU}]}
SMALL: dict[str, dict[str, object]] = {
    "one GPU": {"cluster": ALONE},
    "dense": {"model": DENSE},
    "dense, two stages": {"model": DENSE | {"layers": 8}, "parallelism": {"dp": 1, "tp": 4, "pp": 2}},
    "three micro-batches": {"workload": {"micro_batches": 3}},
    "eight stages": {
        "model": {"layers": 24},
        "parallelism": {"dp": 1, "pp": 8},
        "workload": {"batch": 1024, "micro_batches": 16},
    },
    "twelve stages": {
        "cluster": {"groups": [{"nodes": 3, "gpus_per_node": 4, "gpu": GPU}]},
        "model": {"layers": 12},
        "parallelism": {"dp": 1, "pp": 12},
        "workload": {"batch": 1024, "micro_batches": 12},
    },
}
TIMELINES = (*EXAMPLES, *SMALL, "a slow GPU")


@cache
def made_timeline(name: str) -> Timeline:
    """The simulated step of a case, made once."""
    if name == "a slow GPU":
        plan = planc.compile(planc.load_spec(ROOT / "specs" / "mixtral-8x7b.yaml"))
        return timeline(plan, slow=Slow(gpus={5: 1.5}))
    if name in SMALL:
        return timeline(planc.compile(small_spec(**SMALL[name])))
    spec, *overrides = EXAMPLES[name]
    return timeline(planc.compile(planc.load_spec(ROOT / "specs" / f"{spec}.yaml", overrides)))


def sweep(batches: list[int], first: float, each: float, *, gpus: int = 128, room: int = 10**9) -> list[Point]:
    """Points whose TPOT grows with the batch; more than ``room`` does not fit."""
    out = []
    for batch in batches:
        tpot = first + each * batch
        tps = batch / tpot
        out.append(Point({}, batch, tpot, 0.85 * tpot, 1.3 * tpot, 0.6 * tpot, tps, tps / gpus, None, batch <= room))
    return out


#: points, bound
SWEEPS: dict[str, tuple[list[Point], float | None]] = {
    "doubling": (sweep([64 << n for n in range(12)], 8e-3, 2.2e-7, room=40_000), 15e-3),
    "close together": (sweep([round(8000 * 1.18**n) for n in range(20)], 8e-3, 2.2e-7, room=40_000), 20e-3),
    "three decades": (sweep([64 << n for n in range(16)], 1e-3, 1e-6), 5e-3),
    "no bound": (sweep([64, 128, 256, 512], 8e-3, 2.2e-7), None),
    "none under the bound": (sweep([64, 128], 8e-3, 2.2e-7), 1e-3),
    "one": (sweep([256], 8e-3, 2.2e-7), 20e-3),
    "wanders": (sweep([256, 64, 1024, 512], 2e-3, -1e-6), 4e-3),
}
