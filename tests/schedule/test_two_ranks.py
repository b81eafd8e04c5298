"""Two ranks, one layer, computed on paper.

Model: hidden 1024, 8 heads of 128, two experts of two matrices 1024 × 2048, top-1, BF16, no vocabulary. Two GPUs of one node,
one expert each, 8 sequences: 4 tokens a GPU, of which even routing sends 2 to either expert. KV cache of 100 tokens.
GPU: 100 TFLOPS at 50 % = 50 TFLOPS; 1 TB/s at 80 % = 0.8 TB/s. NVLink: 100 GB/s at 50 % = 50 GB/s, latency 10 us.
A GPU without a fit: every kernel is the larger of FLOPs ÷ 50e12 and bytes ÷ 0.8e12.
"""

from __future__ import annotations

import pytest
from small_specs import small_spec

import planc
from planc.schedule import Estimate, estimate, timeline

GPU = {
    "name": "paper",
    "peak": {"bf16": "100 TFLOPS"},
    "mfu": 0.5,
    "memory": "10 GB",
    "memory_bandwidth": "1 TB/s",
    "memory_utilization": 0.8,
}
LINKS = {"nvlink": {"bandwidth": "100 GB/s", "utilization": 0.5, "latency": "10 us"}, "nic": {"bandwidth": "50 GB/s"}}
BANDWIDTH = 0.8e12

#: op -> seconds; all are bound by memory: 4 tokens × 2 FLOPs per 2-byte weight is 4 FLOPs a byte, against 62.5 at balance
PAPER = {
    # rank 0 sends 4 hidden states of 2048 B to rank 1
    "input_split": 10e-6 + 4 * 2048 / 50e9,
    # [4, 1024] × [1024, 3072]: both inputs and the output; then RoPE and the cache over 4 × 3072 values, in and out
    "attn_qkv": (2 * (4 * 1024 + 1024 * 3072 + 4 * 3072) + 2 * (2 * 4 * 3072 + 3072)) / BANDWIDTH,
    # K and V of 4 sequences × 8 heads × 128 × 100 tokens; queries and outputs
    "attn_core": (2 * 2 * 4 * 8 * 128 * 100 + 2 * 2 * 4 * 8 * 128) / BANDWIDTH,
    "attn_out": 2 * (4 * 1024 + 1024 * 1024 + 4 * 1024) / BANDWIDTH,
    # the sum is read and written once, with the weights of the norm that follows
    "residual_add": 2 * (2 * 4 * 1024 + 1024) / BANDWIDTH,
    # [4, 1024] × [1024, 2]; then the scores
    "gate": (2 * (4 * 1024 + 1024 * 2 + 4 * 2) + 2 * (2 * 4 * 2 + 2)) / BANDWIDTH,
    # 2 of 4 tokens go to the other GPU
    "dispatch": 10e-6 + 2 * 2048 / 50e9,
    # two matrices; 4 rows in and out
    "expert": (2 * 2 * 1024 * 2048 + 2 * 2 * 4 * 1024) / BANDWIDTH,
    "combine": 10e-6 + 2 * 2048 / 50e9,
    # one expert's output and the residual in and out: 1.5 streams of 1024 values
    "aggregate": 2 * (2 * 4 * 1536 + 1536) / BANDWIDTH,
}


@pytest.fixture(scope="module")
def plan() -> planc.VerifiedPlan:
    moe = {"experts": 2, "top_k": 1, "intermediate": 2048, "gated": False}
    attention = {"heads": 8, "head_dim": 128}
    return planc.compile(
        small_spec(
            model={"layers": 1, "hidden": 1024, "attention": attention, "moe": moe},
            cluster={"links": LINKS, "groups": [{"nodes": 1, "gpus_per_node": 2, "gpu": GPU}]},
            workload={"batch": 8, "isl": 100, "osl": 0},
            parallelism={"dp": 1, "pp": 1, "ep": 2, "tp": 1},
        )
    )


def test_every_op(plan: planc.VerifiedPlan) -> None:
    line = timeline(plan)
    for block, price in zip(plan.blocks.blocks, line.prices.blocks, strict=True):
        if block.kind in PAPER:
            assert price.seconds == pytest.approx(PAPER[block.kind], rel=1e-9), block.kind
            assert price.provenance == ("spec",)
    assert {b.kind for b in plan.blocks.blocks} == {*PAPER, "input", "output_collect"}


def test_the_step_is_their_sum(plan: planc.VerifiedPlan) -> None:
    """Every op waits for the one before it on both ranks: 53.6 us, of which 30.3 us are communication."""
    line = timeline(plan)
    total = sum(PAPER.values())
    assert line.step == pytest.approx(total, rel=1e-9)
    assert total == pytest.approx(53.59e-6, rel=1e-3)
    moved = PAPER["input_split"] + PAPER["dispatch"] + PAPER["combine"]
    assert moved == pytest.approx(30.33e-6, rel=1e-3)
    assert line.split["communication"] == pytest.approx(moved / total)
    assert line.split["computation"] == pytest.approx(1 - moved / total)
    assert line.usage.compute.tolist() == pytest.approx([total - moved] * 2)
    assert line.path_by_class["experts"] == pytest.approx(PAPER["expert"])
    assert line.path_by_class["attention"] == pytest.approx(PAPER["attn_qkv"] + PAPER["attn_core"] + PAPER["attn_out"])


def test_tpot_and_tps(plan: planc.VerifiedPlan) -> None:
    found = estimate(plan)
    total = sum(PAPER.values())
    assert isinstance(found, Estimate)
    assert found.tpot == pytest.approx(total)
    assert found.tps == pytest.approx(8 / total)
    assert found.tps_per_gpu == pytest.approx(4 / total)


def test_the_floor_knows_no_latency_and_full_rates(plan: planc.VerifiedPlan) -> None:
    compute = sum(s for name, s in PAPER.items() if name not in ("input_split", "dispatch", "combine"))
    moved = (4 + 2 + 2) * 2048 / 100e9
    assert timeline(plan).floor == pytest.approx(0.8 * compute + moved)


def test_link_use(plan: planc.VerifiedPlan) -> None:
    line = timeline(plan)
    up = line.prices.topology.names.index("nvlink_up GPU 0")
    assert line.link_bytes[up] == pytest.approx((4 + 2 + 2) * 2048)
    assert line.link_utilization[up] == pytest.approx((4 + 2 + 2) * 2048 / 100e9 / line.step)
