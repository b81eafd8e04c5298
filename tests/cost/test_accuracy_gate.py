"""A gate on accuracy without the measured tables: a few measured H100 rows of every family, near which prices stay.

Source: ai-dynamo/aiconfigurator 095f58a51 (Apache-2.0, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES),
`systems/data/h100_sxm`: gemm, moe, attention, mla of TensorRT-LLM, nccl 2.29.2, DeepEP of SGLang; times in µs. Rows were
taken at even ranks of the sorted times of a family. The fit saw them too: docs/accuracy.md has the errors on unseen rows.
"""

from __future__ import annotations

import numpy as np

from planc.cost import load_costs

MEASURED: list[tuple[str, dict[str, float], float]] = [
    ("gemm", {"m": 64, "n": 1024, "k": 1536}, 4.827),
    ("gemm", {"m": 8192, "n": 1024, "k": 7168}, 150.6),
    ("gemm", {"m": 128, "n": 1024, "k": 8192}, 10.91),
    ("gemm", {"m": 4, "n": 2048, "k": 16384}, 28.79),
    ("expert_gemm_balanced", {"tokens": 768, "hidden": 4096, "intermediate": 14336, "experts": 8, "top_k": 2, "ep": 4, "tp": 16}, 65.57),
    ("expert_gemm_balanced", {"tokens": 12288, "hidden": 4096, "intermediate": 14336, "experts": 8, "top_k": 2, "ep": 1, "tp": 32}, 738.6),
    ("expert_gemm_balanced", {"tokens": 16384, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 2, "tp": 32}, 2315.0),
    ("expert_gemm_balanced", {"tokens": 768, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 16, "tp": 2}, 308.3),
    ("expert_gemm_balanced", {"tokens": 1, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 2, "tp": 1}, 157.0),
    ("expert_gemm_skewed", {"tokens": 4096, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 16, "tp": 2, "skew": 1.2}, 958.5),
    ("expert_gemm_skewed", {"tokens": 64, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 2, "tp": 1, "skew": 1.2}, 3100.0),
    ("expert_gemm_skewed", {"tokens": 4, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 16, "tp": 4, "skew": 1.2}, 219.5),
    ("expert_gemm_skewed", {"tokens": 4, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 4, "tp": 32, "skew": 1.01}, 90.91),
    ("expert_gemm_skewed", {"tokens": 4096, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 8, "tp": 16, "skew": 1.2}, 445.2),
    ("expert_gemm_fp8_balanced", {"tokens": 1536, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 8, "tp": 1}, 634.5),
    ("expert_gemm_fp8_balanced", {"tokens": 256, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 32, "tp": 1}, 151.9),
    ("expert_gemm_fp8_balanced", {"tokens": 384, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 256, "tp": 1}, 51.42),
    ("expert_gemm_fp8_balanced", {"tokens": 1024, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 2, "tp": 1}, 3132.0),
    ("expert_gemm_fp8_skewed", {"tokens": 96, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 4, "tp": 1, "skew": 1.01}, 810.6),
    ("expert_gemm_fp8_skewed", {"tokens": 384, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 256, "tp": 1, "skew": 1.01}, 70.27),
    ("expert_gemm_fp8_skewed", {"tokens": 3072, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 256, "tp": 1, "skew": 1.01}, 230.7),
    ("expert_gemm_fp8_skewed", {"tokens": 64, "hidden": 7168, "intermediate": 2048, "experts": 384, "top_k": 8, "ep": 1, "tp": 1, "skew": 1.01}, 3653.0),
    ("attention_decode", {"batch": 1, "heads": 32, "kv_heads": 2, "head_dim": 128, "kv_len": 2048}, 27.29),
    ("attention_decode", {"batch": 2048, "heads": 8, "kv_heads": 1, "head_dim": 128, "kv_len": 16}, 82.98),
    ("attention_decode", {"batch": 32, "heads": 8, "kv_heads": 4, "head_dim": 128, "kv_len": 16384}, 361.6),
    ("attention_decode", {"batch": 1, "heads": 8, "kv_heads": 4, "head_dim": 128, "kv_len": 32}, 9.365),
    ("attention_decode", {"batch": 2, "heads": 8, "kv_heads": 4, "head_dim": 128, "kv_len": 2048}, 13.87),
    ("mla_decode", {"batch": 1024, "heads": 4, "kv_len": 16}, 61.18),
    ("mla_decode", {"batch": 128, "heads": 2, "kv_len": 32}, 13.67),
    ("mla_decode", {"batch": 32, "heads": 2, "kv_len": 256}, 18.48),
    ("mla_decode", {"batch": 16, "heads": 128, "kv_len": 65536}, 475.8),
    ("all_reduce", {"ranks": 2, "bytes": 16384}, 7.27),
    ("all_reduce", {"ranks": 4, "bytes": 134217728}, 613.2),
    ("all_reduce", {"ranks": 8, "bytes": 512}, 15.49),
    ("all_reduce", {"ranks": 8, "bytes": 4194304}, 46.9),
    ("all_gather", {"ranks": 2, "bytes": 131072}, 6.57),
    ("all_gather", {"ranks": 2, "bytes": 4194304}, 26.77),
    ("all_gather", {"ranks": 8, "bytes": 512}, 10.4),
    ("all_gather", {"ranks": 8, "bytes": 67108864}, 208.4),
    ("all_to_all", {"ranks": 4, "bytes": 131072}, 12.49),
    ("all_to_all", {"ranks": 4, "bytes": 8192}, 7.0),
    ("all_to_all", {"ranks": 8, "bytes": 67108864}, 221.3),
    ("all_to_all", {"ranks": 8, "bytes": 2097152}, 18.74),
    ("all_reduce_custom", {"ranks": 4, "bytes": 512}, 2.864),
    ("all_reduce_custom", {"ranks": 8, "bytes": 8192}, 3.541),
    ("all_reduce_custom", {"ranks": 8, "bytes": 1048576}, 25.96),
    ("all_reduce_custom", {"ranks": 8, "bytes": 134217728}, 575.5),
    ("reduce_scatter", {"ranks": 2, "bytes": 65536}, 6.28),
    ("reduce_scatter", {"ranks": 8, "bytes": 512}, 10.24),
    ("reduce_scatter", {"ranks": 8, "bytes": 2097152}, 18.6),
    ("reduce_scatter", {"ranks": 8, "bytes": 134217728}, 399.2),
    ("dispatch_low_latency", {"nodes": 1, "tokens": 8, "hidden": 4096, "top_k": 8, "experts": 128}, 11.23),
    ("dispatch_low_latency", {"nodes": 1, "tokens": 128, "hidden": 4096, "top_k": 10, "experts": 512}, 34.83),
    ("dispatch_low_latency", {"nodes": 1, "tokens": 512, "hidden": 6144, "top_k": 8, "experts": 256}, 99.69),
    ("dispatch_low_latency", {"nodes": 1, "tokens": 16, "hidden": 7168, "top_k": 6, "experts": 384}, 16.8),
    ("dispatch_normal", {"nodes": 1, "tokens": 32768, "hidden": 4096, "top_k": 8, "experts": 128}, 2583.0),
    ("dispatch_normal", {"nodes": 1, "tokens": 4, "hidden": 4096, "top_k": 6, "experts": 256}, 26.21),
    ("dispatch_normal", {"nodes": 1, "tokens": 1024, "hidden": 4096, "top_k": 8, "experts": 256}, 112.2),
    ("dispatch_normal", {"nodes": 1, "tokens": 96, "hidden": 6144, "top_k": 2, "experts": 8}, 32.54),
    ("combine_low_latency", {"nodes": 1, "tokens": 32, "hidden": 4096, "top_k": 8, "experts": 128}, 18.91),
    ("combine_low_latency", {"nodes": 1, "tokens": 2, "hidden": 4096, "top_k": 8, "experts": 256}, 12.06),
    ("combine_low_latency", {"nodes": 1, "tokens": 512, "hidden": 4096, "top_k": 10, "experts": 512}, 183.3),
    ("combine_low_latency", {"nodes": 2, "tokens": 16, "hidden": 7168, "top_k": 8, "experts": 288}, 43.1),
    ("combine_normal", {"nodes": 1, "tokens": 65536, "hidden": 2048, "top_k": 8, "experts": 128}, 4519.0),
    ("combine_normal", {"nodes": 1, "tokens": 96, "hidden": 4096, "top_k": 6, "experts": 256}, 49.98),
    ("combine_normal", {"nodes": 1, "tokens": 48, "hidden": 5120, "top_k": 1, "experts": 128}, 37.96),
    ("combine_normal", {"nodes": 1, "tokens": 512, "hidden": 6144, "top_k": 8, "experts": 160}, 168.4),
]  # fmt: skip


def _split(family: str) -> tuple[str, str, dict[str, object]]:
    """Kind, dtype and further columns of a family of a fit file."""
    if family.startswith("expert_gemm"):
        return "expert_gemm", "fp8" if "fp8" in family else "bf16", {"gated": 1, "skew": 0}
    for mode in ("low_latency", "normal"):
        if family.endswith(mode):
            return family.removesuffix(f"_{mode}"), "bf16", {"mode": mode}
    if family.startswith(("all_", "reduce_")):
        return family.removesuffix("_custom"), "bf16", {"library": "custom" if family.endswith("custom") else "nccl"}
    return family, "bf16", {}


def test_gate() -> None:
    costs = load_costs("h100-sxm")
    errors: dict[str, list[float]] = {}
    held = []
    for family, sizes, measured in MEASURED:
        kind, dtype, more = _split(family)
        price = costs.price(kind, more | sizes, dtype)
        assert price.provenance[0] == "fitted", (family, sizes)
        ratio = price.seconds[0] * 1e6 / measured
        assert 0.6 < ratio < 1.6, (family, sizes, ratio)
        errors.setdefault(family, []).append(abs(ratio - 1))
        held.append(price.low[0] * 1e6 <= measured <= price.high[0] * 1e6)
    assert len(errors) == 16
    assert np.median([error for part in errors.values() for error in part]) < 0.06
    for family, part in errors.items():
        assert np.median(part) < 0.2, family
    assert np.mean(held) > 0.8
