"""Prices: floors below them, growth with size, one row like many, intervals, provenance, and a regression gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planc.cost import counts, load_costs
from planc.cost.ops import KINDS, Costs
from planc.diagnostics import PlancError

PEAK, MEMORY, NVLINK, NIC = 989.5e12, {"h100-sxm": 3.35e12, "h200-sxm": 4.8e12}, 450e9, 50e9
FITTED = ("h100-sxm", "h200-sxm")
#: kind -> sizes in the middle of what was measured
MIDDLE: dict[str, dict[str, Any]] = {
    "gemm": {"m": 128, "n": 4096, "k": 4096},
    "expert_gemm": {
        "tokens": 1024, "hidden": 7168, "intermediate": 2048, "experts": 256, "top_k": 8, "ep": 8, "tp": 1, "skew": 0,
        "gated": 1,
    },
    "attention_decode": {"batch": 64, "heads": 64, "kv_heads": 8, "head_dim": 128, "kv_len": 2048},
    "mla_decode": {"batch": 64, "heads": 128, "kv_len": 2048},
    "attention_prefill": {"batch": 1, "heads": 64, "kv_heads": 8, "head_dim": 128, "tokens": 2048, "kv_len": 2048},
    "gate": {"tokens": 128, "hidden": 7168, "experts": 256},
    "head": {"tokens": 128, "hidden": 7168, "vocab": 129_280},
    "norm": {"tokens": 128, "hidden": 7168},
    "embedding": {"tokens": 128, "hidden": 7168},
    "all_reduce": {"ranks": 8, "bytes": 1 << 20, "library": "nccl"},
    "all_gather": {"ranks": 8, "bytes": 1 << 20, "library": "nccl"},
    "reduce_scatter": {"ranks": 8, "bytes": 1 << 20, "library": "nccl"},
    "all_to_all": {"ranks": 8, "bytes": 1 << 20, "library": "nccl"},
    "dispatch": {"nodes": 8, "tokens": 64, "hidden": 7168, "top_k": 8, "experts": 256, "mode": "low_latency"},
    "combine": {"nodes": 8, "tokens": 64, "hidden": 7168, "top_k": 8, "experts": 256, "mode": "low_latency"},
}  # fmt: skip


@pytest.fixture(scope="module", params=FITTED)
def costs(request: pytest.FixtureRequest) -> Costs:
    return load_costs(request.param)


def _floor(costs: Costs, kind: str, s: dict[str, Any]) -> float:
    """Bytes ÷ peak bandwidth and FLOPs ÷ peak FLOPS, or bytes on links ÷ their bandwidth; switches may add up."""
    bandwidth = MEMORY[costs.gpu.name]
    if kind == "gemm":
        flops, size = counts.gemm(s["m"], s["n"], s["k"], 2)
    elif kind == "attention_decode":
        flops, size = counts.attention_decode(**s, width=2)
    elif kind == "mla_decode":
        flops, size = counts.mla_decode(**s, width=2)
    elif kind == "expert_gemm":
        rows = s["tokens"] * s["top_k"] / s["ep"]
        active = min(s["experts"] / s["ep"], rows)
        flops, size = counts.expert_gemm(rows, active, s["hidden"], s["intermediate"] / s["tp"], s["gated"], 2)
    elif kind in ("dispatch", "combine"):
        width = counts.wire_width(kind, s["mode"], s["hidden"])
        away = s["tokens"] * width * (1 - 1 / s["nodes"])
        return float(max(away * s["top_k"] / NIC, s["tokens"] * width * s["top_k"] / s["nodes"] / NVLINK))
    else:
        return float(s["bytes"] * (s["ranks"] - 1) / s["ranks"] / NVLINK)
    return float(max(flops / PEAK, size / bandwidth))


SWEPT = [
    ("gemm", "m", (1, 7, 64, 100, 1000, 8192, 50_000)),
    ("gemm", "n", (64, 512, 3000, 16_384)),
    ("gemm", "k", (64, 512, 3000, 16_384)),
    ("expert_gemm", "tokens", (1, 3, 16, 100, 1024, 5000, 16_384, 100_000)),
    ("expert_gemm", "hidden", (1024, 4096, 7168)),
    ("expert_gemm", "intermediate", (512, 2048, 14_336)),
    ("attention_decode", "batch", (8, 33, 64, 200, 2048)),
    ("attention_decode", "kv_len", (8, 100, 128, 129, 1000, 4096, 131_072)),
    ("mla_decode", "batch", (1, 3, 64, 200, 1024)),
    ("mla_decode", "heads", (1, 16, 64, 128)),
    ("mla_decode", "kv_len", (1, 64, 65, 1000, 4096, 131_072)),
    ("all_reduce", "bytes", (1, 512, 1 << 17, 1 << 20, 3 << 20, 1 << 30)),
    ("all_gather", "bytes", (1, 512, 1 << 17, 1 << 20, 3 << 20, 1 << 30)),
    ("reduce_scatter", "bytes", (1, 512, 1 << 17, 1 << 20, 3 << 20, 1 << 30)),
    ("all_to_all", "bytes", (1, 512, 1 << 17, 1 << 20, 3 << 20, 1 << 30)),
    ("dispatch", "tokens", (1, 8, 100, 1024, 8192)),
    ("dispatch", "hidden", (2048, 7168)),
    ("dispatch", "top_k", (1, 2, 8)),
    ("dispatch", "nodes", (1, 2, 4, 8, 16, 32)),
    ("combine", "tokens", (1, 8, 100, 1024, 8192)),
    ("combine", "nodes", (1, 2, 4, 8, 16, 32)),
]


@pytest.mark.parametrize(("kind", "column", "values"), SWEPT)
def test_time_grows_and_stays_above_its_floor(costs: Costs, kind: str, column: str, values: tuple[float, ...]) -> None:
    price = costs.price(kind, MIDDLE[kind] | {column: values})
    assert (np.diff(price.seconds) >= -1e-12).all()
    assert (price.seconds > 1e-6).all()
    for seconds, value in zip(price.seconds, values, strict=True):
        assert seconds >= _floor(costs, kind, MIDDLE[kind] | {column: value})


def test_normal_mode_grows(costs: Costs) -> None:
    for kind in ("dispatch", "combine"):
        for nodes in (1, 2, 8):
            sizes = MIDDLE[kind] | {"mode": "normal", "nodes": nodes, "tokens": [1, 64, 1024, 65_536]}
            assert (np.diff(costs.price(kind, sizes).seconds) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_priced_like_many(costs: Costs, kind: str) -> None:
    column = next(name for name in ("m", "tokens", "batch", "bytes") if name in MIDDLE[kind])
    values = [MIDDLE[kind][column] // d for d in (16, 4, 1)]
    together = costs.price(kind, MIDDLE[kind] | {column: values})
    for at, value in enumerate(values):
        alone = costs.price(kind, MIDDLE[kind] | {column: value})
        assert alone.seconds[0] == together.seconds[at]
        assert alone.provenance[0] == together.provenance[at]
    assert (together.low <= together.seconds).all() and (together.seconds <= together.high).all()
    assert (together.low > 0).all()


@pytest.mark.parametrize("gpu", ["a100-sxm-80gb", "b200-sxm", "mi300x", "reference-h100"])
def test_without_a_fit_the_spec_counts(gpu: str) -> None:
    costs = load_costs(gpu)
    for kind, sizes in MIDDLE.items():
        price = costs.price(kind, sizes)
        assert list(price.provenance) == ["spec"]
        assert 0 < price.low[0] <= price.seconds[0] <= price.high[0]
    # the reference GPU by hand: 2·128·4096² FLOPs at 400 TFLOPS × 60 % are less than 35.7 MB at 1.8 TB/s × 80 %
    if gpu == "reference-h100":
        size = 2 * (128 * 4096 + 4096 * 4096 + 128 * 4096)
        assert costs.price("gemm", MIDDLE["gemm"]).seconds[0] == pytest.approx(size / (1.8e12 * 0.8))


def test_provenance(costs: Costs) -> None:
    def word(kind: str, dtype: str = "bf16", **sizes: Any) -> str:
        return str(costs.price(kind, MIDDLE[kind] | sizes, dtype).provenance[0])

    assert word("gemm") == "fitted"
    assert word("gemm", m=100_000) == "extrapolated"
    assert word("gemm", "fp8") == "derived"
    assert word("gate") == "extrapolated"  # 256 columns; 512 were measured
    assert word("gate", experts=512) == word("norm") == word("attention_prefill") == "derived"
    sizes = {"hidden": 4096, "intermediate": 14_336, "experts": 8, "top_k": 2}  # both GPUs have rows of this shape
    assert word("expert_gemm", **sizes) == "fitted"
    assert word("expert_gemm", **sizes, gated=0) == "derived"
    assert word("expert_gemm", "fp8", skew=1.2) == "fitted"
    assert word("all_to_all", ranks=16) == word("all_to_all", ranks=3) == "extrapolated"
    assert word("dispatch") == "fitted"
    assert word("dispatch", nodes=16) == word("combine", nodes=32) == "extrapolated"
    assert word("all_gather", library="custom") == "spec"


def test_intervals_are_wider_outside_what_was_measured(costs: Costs) -> None:
    price = costs.price("dispatch", MIDDLE["dispatch"] | {"nodes": [8, 16]})
    width = np.log(price.high / price.low)
    assert width[1] > width[0]


def test_few_narrow_experts_may_be_slow() -> None:
    price = load_costs("h100-sxm").price("expert_gemm", MIDDLE["expert_gemm"] | {"ep": [8, 64]})
    factor = price.high / price.seconds
    assert factor[0] < 1.5 and factor[1] > 2.5


def test_h800_has_what_was_published_for_it_and_computes_as_its_chip_does() -> None:
    costs = load_costs("h800-sxm")
    as_h100, other = costs.price("gemm", MIDDLE["gemm"]), load_costs("h100-sxm").price("gemm", MIDDLE["gemm"])
    assert list(as_h100.provenance) == ["derived"] and as_h100.seconds == pytest.approx(other.seconds)
    assert as_h100.high[0] > other.high[0] and as_h100.low[0] < other.low[0]
    assert list(costs.price("all_reduce", {"ranks": 8, "bytes": 1e6, "library": "nccl"}).provenance) == ["spec"]
    assert list(costs.price("dispatch", MIDDLE["dispatch"] | {"tokens": 128}).provenance) == ["fitted"]


def test_no_peak_for_a_dtype_is_said() -> None:
    with pytest.raises(PlancError, match="PLN110"):
        load_costs("a100-sxm-80gb").price("gemm", MIDDLE["gemm"], "fp8")


def test_a_thousand_ops_take_milliseconds(costs: Costs) -> None:
    sizes = {"m": np.arange(1, 1001), "n": 7168, "k": 2048}
    assert len(costs.price("gemm", sizes).seconds) == 1000


def test_no_kv_heads_are_as_many_as_heads(costs: Costs) -> None:
    price = costs.price("attention_decode", MIDDLE["attention_decode"] | {"kv_heads": [0, 64]})
    assert price.seconds[0] == price.seconds[1]
