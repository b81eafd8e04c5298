"""Floors by hand: small plans whose times follow on paper from bytes ÷ bandwidth and FLOPs ÷ peak."""

from __future__ import annotations

import pytest
from small_specs import small_spec

from planc.cost import step_floors
from planc.pipeline import compile

BW = 1e12 * 0.8  # B/s of the small GPU at its utilisation
PEAK = 400e12 * 0.6
ATTENTION = 4 * 64 * 64  # parameters of a layer: q, k, v and o, each 64 × 64
EXPERT = 2 * 64 * 32


def floors(**parts):
    return step_floors(compile(small_spec(**parts)))


def test_one_stage_reads_all_layers():
    """2 layers on 8 ranks, tp 1, one expert a rank: 2 · (attention + expert + gate) · 2 B, and 8 sequences of KV."""
    found = floors(parallelism={"ep": 8, "tp": 1})
    weights = 2 * (ATTENTION + EXPERT + 64 * 8) * 2
    kv = 2 * 8 * 16 * (2 * 64) * 2  # layers · sequences · isl · (k and v) · B
    assert found.weights_read == pytest.approx(weights / BW, rel=1e-12)
    assert found.kv_read == pytest.approx(kv / BW, rel=1e-12)
    assert found.memory == pytest.approx((weights + kv) / BW, rel=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16])
def test_stages_overlap_when_there_are_micro_batches(micro_batches):
    """pp 2: one micro-batch passes both stages; a rank does all micro-batches of its own stage. The larger holds."""
    found = floors(parallelism={"pp": 2, "ep": 4, "tp": 1, "dp": 1}, workload={"micro_batches": micro_batches})
    weights = (ATTENTION + 2 * EXPERT + 64 * 8) * 2  # a stage is one layer; a rank holds two of its eight experts
    kv = 16 * 16 * (2 * 64) * 2  # 64 sequences on 4 ranks
    path = 2 * (weights + kv / micro_batches)
    assert found.memory == pytest.approx(max(path, weights + kv) / BW, rel=1e-12)
    tokens = 16 / micro_batches  # of a rank and micro-batch; as many (token, expert) pairs go to each of 4 · 2 experts
    layer = 2 * tokens * (ATTENTION + 64 * 8 + 16 * 8 * (8 + 8)) + 2 * EXPERT * tokens * 2
    assert found.compute == pytest.approx(max(2 * layer, micro_batches * layer) / PEAK, rel=1e-12)


def test_prompts_of_a_chunk_attend_to_themselves_only():
    one = floors(parallelism={"ep": 8, "tp": 1}, workload={"phase": "prefill", "prefill_chunk": 16})
    four = floors(parallelism={"ep": 8, "tp": 1}, workload={"phase": "prefill", "prefill_chunk": 64})
    assert four.compute == pytest.approx(4 * one.compute, rel=1e-12)
    assert one.kv_read == 0


def test_experts_run_at_the_peak_of_their_own_dtype():
    dense = floors(parallelism={"ep": 8, "tp": 1}, workload={"batch": 4096, "isl": 1, "osl": 0})
    moe = {"name": "tiny", "layers": 2, "hidden": 64, "attention": {"heads": 8, "head_dim": 8}}
    moe |= {"moe": {"experts": 8, "top_k": 2, "intermediate": 32, "gated": False}, "dtypes": {"expert_weights": "fp8"}}
    fp8 = floors(model=moe, parallelism={"ep": 8, "tp": 1}, workload={"batch": 4096, "isl": 1, "osl": 0})
    experts = 2 * 2 * EXPERT * (4096 * 2 / 8) / PEAK  # both layers, all tokens of an expert
    assert dense.compute - fp8.compute == pytest.approx(experts / 2, rel=1e-9)


def test_hand_over_inside_a_domain_uses_nvlink():
    """One node of 8, pp 2: [32, 64] bf16 from rank i to rank i + 4 over NVLink at 400 GB/s · 80 %."""
    nodes = {"groups": [{"nodes": 1, "gpus_per_node": 8}]}
    one = floors(cluster=nodes, parallelism={"pp": 2, "ep": 4, "tp": 1, "dp": 1})
    two = floors(parallelism={"pp": 2, "ep": 4, "tp": 1, "dp": 1})
    sent = 16 * 64 * 2
    assert two.transfer - one.transfer > sent / (50e9 * 0.8) - sent / (400e9 * 0.8) - 1e-12


def test_transfers_grow_with_micro_batches_only_by_what_is_padded():
    whole = floors(parallelism={"ep": 8, "tp": 1}, workload={"batch": 1024})
    halves = floors(parallelism={"ep": 8, "tp": 1}, workload={"batch": 1024, "micro_batches": 2})
    assert halves.transfer == pytest.approx(whole.transfer, rel=1e-12)
    assert halves.latency == 2 * whole.latency
