"""FLOPs and bytes of every op kind, by arithmetic alone: what the times of `planc.cost.ops` are built on.

Sizes are numbers or numpy arrays of one shape; every function returns floats of that shape. A multiply and an add count
as two FLOPs. ``width`` is the bytes of one element (`DTYPE_BYTES`). Bytes are those that must cross the memory of the
GPU once: weights, inputs and outputs, and no intermediate that a fused kernel keeps on chip.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Sizes = Any  #: a number, or a float array

MLA_LATENT = 512  #: values of the KV latent of a token (DeepSeek-V2, arXiv 2405.04434: kv_lora_rank)
MLA_ROPE = 64  #: values of its decoupled rotary key


def gemm(m: Sizes, n: Sizes, k: Sizes, width: Sizes, out_width: Sizes = 2) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of [m, k] × [k, n] → [m, n]: 2mnk; both inputs and the output once."""
    return 2.0 * m * n * k, width * (1.0 * m * k + 1.0 * k * n) + out_width * 1.0 * m * n


def expert_gemm(
    rows: Sizes, active: Sizes, hidden: Sizes, intermediate: Sizes, gated: Sizes, width: Sizes
) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of the experts of one rank: ``rows`` (token, expert) pairs on ``active`` experts.

    An expert has three matrices of hidden × intermediate when ``gated``, else two; ``intermediate`` is the width that
    the rank holds. Weights of every active expert are read once; rows are read and written once, in 16 bit.
    """
    matrices = 2.0 + gated
    parameters = matrices * hidden * intermediate
    return 2.0 * rows * parameters, width * active * parameters + 2.0 * 2.0 * rows * hidden


def attention_decode(
    batch: Sizes, heads: Sizes, kv_heads: Sizes, head_dim: Sizes, kv_len: Sizes, width: Sizes
) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of one new token a sequence: scores and values over ``kv_len`` cached tokens; K and V are read
    once per KV head, queries and outputs (16 bit) once per head."""
    flops = 4.0 * batch * heads * head_dim * kv_len
    return flops, 2.0 * width * batch * kv_heads * head_dim * kv_len + 2.0 * 2.0 * batch * heads * head_dim


def mla_decode(batch: Sizes, heads: Sizes, kv_len: Sizes, width: Sizes) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of MLA's absorbed decode: every head reads the one latent (512 + 64 values a token); a query is
    576 wide, an output 512, both in 16 bit."""
    wide = MLA_LATENT + MLA_ROPE
    flops = 2.0 * batch * heads * kv_len * (wide + MLA_LATENT)
    return flops, width * 1.0 * batch * kv_len * wide + 2.0 * batch * heads * (wide + MLA_LATENT)


def attention_prefill(
    batch: Sizes, heads: Sizes, kv_heads: Sizes, head_dim: Sizes, tokens: Sizes, kv_len: Sizes, width: Sizes
) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of ``tokens`` new tokens a sequence that end at position ``kv_len``, causal: new token i sees
    kv_len − tokens + i of them, i = 1 … tokens."""
    pairs = tokens * (kv_len - tokens) + tokens * (tokens + 1.0) / 2
    flops = 4.0 * batch * heads * head_dim * pairs
    return flops, 2.0 * width * batch * kv_heads * head_dim * kv_len + 2.0 * 2.0 * batch * heads * head_dim * tokens


def norm(tokens: Sizes, hidden: Sizes) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of an RMSNorm: square, add, scale by the norm, scale by the weight; one read and one write."""
    return 4.0 * tokens * hidden, 2.0 * (2.0 * tokens * hidden + hidden)


def embedding(tokens: Sizes, hidden: Sizes) -> tuple[Sizes, Sizes]:
    """(FLOPs, bytes) of a table look-up: one row read and one written per token."""
    return 0.0 * tokens * hidden, 2.0 * 2.0 * tokens * hidden


def bus_bytes(kind: str, ranks: Sizes, size: Sizes) -> Sizes:
    """Bytes that one rank must send in a collective over ``ranks`` (nccl-tests, PERFORMANCE.md): size·(n − 1)/n, twice
    that for an all-reduce. ``size`` is the whole buffer of one rank: of an all-gather the gathered output, of a
    reduce-scatter the whole input."""
    return (2.0 if kind == "all_reduce" else 1.0) * size * (ranks - 1.0) / ranks


def expected_targets(targets: Sizes, top_k: Sizes) -> Sizes:
    """Expected number of different targets (nodes, ranks) among a token's top_k choices, evenly and independently
    drawn: n(1 − (1 − 1/n)^k)."""
    return targets * (1.0 - (1.0 - 1.0 / targets) ** top_k)


def wire_width(kind: str, mode: str, hidden: Sizes) -> Sizes:
    """Bytes of one token on the wire, by the library's format (DeepEP): low-latency dispatch sends FP8 with a 4-byte
    scale per 128 values and a 16-byte header, normal dispatch is counted at one byte a value, combine is BF16."""
    if kind == "combine":
        return 2.0 * hidden
    return 1.0 * hidden + hidden / 32.0 + 16.0 if mode == "low_latency" else 1.0 * hidden


def ceil_div(value: Sizes, step: Sizes) -> Sizes:
    """⌈value ÷ step⌉ as a float."""
    return np.ceil(np.asarray(value, dtype=float) / step)
