"""Small specs for the tests, made from a few parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import planc

ROOT = Path(__file__).parent.parent
GPU = {
    "name": "small",
    "peak": {"bf16": "400 TFLOPS", "fp8": "800 TFLOPS"},
    "memory": "1 GB",
    "memory_bandwidth": "1 TB/s",
}
LINKS = {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "50 GB/s"}}
MOE = {"experts": 8, "top_k": 2, "intermediate": 32, "gated": False}
Small = Callable[..., planc.Spec]
Compiled = Callable[..., planc.VerifiedPlan]


def small_spec(**parts: Any) -> planc.Spec:
    """Two MoE layers of 8 experts on 2 nodes of 4 GPUs. A mapping changes keys of its part, anything else replaces it;
    ``gpu`` stands for the GPU of every node."""
    gpu = GPU | parts.pop("gpu", {})
    groups = {"groups": [{"nodes": 2, "gpus_per_node": 4, "gpu": gpu}]}
    spec: dict[str, Any] = {
        "name": "small",
        "model": {"name": "tiny", "layers": 2, "hidden": 64, "attention": {"heads": 8, "head_dim": 8}, "moe": MOE},
        "cluster": {"name": "lab", "links": LINKS} | groups,
        "workload": {"batch": 64, "isl": 16, "osl": 4},
        "parallelism": {"dp": 1},
    }
    for key, value in parts.items():
        spec[key] = spec[key] | value if isinstance(value, dict) and key in spec else value
    for group in spec["cluster"]["groups"]:
        group.setdefault("gpu", gpu)
    return planc.parse_spec(json.dumps(spec))
