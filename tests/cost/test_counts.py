"""FLOPs and bytes of every op kind, by hand, as literals."""

from __future__ import annotations

import pytest

from planc.cost import counts


def test_gemm() -> None:
    # [16, 2048] × [2048, 7168]: 2·16·7168·2048 FLOPs; 2 B × (16·2048 + 2048·7168) in, 2 B × 16·7168 out
    assert counts.gemm(16, 7168, 2048, 2) == (469_762_048, 29_655_040)
    # FP8 in, 16 bit out
    assert counts.gemm(16, 7168, 2048, 1)[1] == 32_768 + 14_680_064 + 229_376


def test_expert_gemm() -> None:
    # one gated expert of 7168 × 2048 in BF16 has 3·7168·2048 parameters, 88,080,384 B; 4 rows of 7168 in and out
    assert counts.expert_gemm(4, 1, 7168, 2048, 1, 2) == (352_321_536, 88_080_384 + 114_688)
    # two matrices: the 58.72 MB expert of the reference plan
    assert counts.expert_gemm(1, 1, 7168, 2048, 0, 2)[1] - 28_672 == 58_720_256


def test_attention() -> None:
    # 2 sequences, 64 heads on 8 KV heads of 128, 1000 cached tokens: 4·2·64·128·1000; K and V 2·2·2·8·128·1000
    assert counts.attention_decode(2, 64, 8, 128, 1000, 2) == (65_536_000, 8_192_000 + 65_536)
    # MLA: scores over 576, values over 512; a cached token is 576 values of 2 B
    assert counts.mla_decode(2, 128, 1000, 2) == (557_056_000, 2_304_000 + 557_056)
    # prefill of 4 tokens, causal: 1 + 2 + 3 + 4 = 10 pairs; with 96 tokens before them 4·96 more
    assert counts.attention_prefill(1, 2, 2, 8, 4, 4, 2) == (4 * 2 * 8 * 10, 2 * 2 * 2 * 8 * 4 + 4 * 2 * 8 * 4)
    assert counts.attention_prefill(1, 2, 2, 8, 4, 100, 2)[0] == 4 * 2 * 8 * (10 + 384)


def test_memory_ops() -> None:
    assert counts.norm(10, 64) == (2560, 2 * (2 * 640 + 64))
    assert counts.embedding(10, 64) == (0, 2560)


def test_bytes_on_links() -> None:
    assert counts.bus_bytes("all_gather", 8, 8000) == 7000
    assert counts.bus_bytes("all_reduce", 8, 8000) == 14_000
    assert counts.bus_bytes("all_to_all", 2, 8000) == 4000
    # DeepEP's low-latency message: 7168 FP8 values, a float scale per 128, 16 B of header; combine in BF16
    assert counts.wire_width("dispatch", "low_latency", 7168) == 7408
    assert counts.wire_width("combine", "low_latency", 7168) == 14_336
    assert counts.wire_width("dispatch", "normal", 7168) == 7168


def test_expected_targets() -> None:
    assert counts.expected_targets(1, 8) == 1
    assert counts.expected_targets(2.0, 2) == 1.5  # both choices on one of two nodes half of the time
    assert counts.expected_targets(8.0, 8) == pytest.approx(5.2511, abs=1e-4)
