"""Times of compute ops on one GPU, as functions of sizes and of a GPU's fitted constants (`planc.cost.fits`).

Every form is a roofline with a fixed overhead: time = t0 + (compute^p + memory^p)^(1/p). Compute time counts what the
kernel does rather than what the op needs: whole tiles, whole waves of thread blocks on the GPU's SMs. Sizes are float
arrays of one shape; times are seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planc.cost import counts
from planc.cost.hardware import Hardware
from planc.cost.loads import RankLoad

Array = np.ndarray

#: output tiles (rows, columns) of a dense GEMM on Hopper and how often its depth is split
GEMM_TILES = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
GEMM_SPLITS = (1, 2, 4, 8)
#: TensorRT-LLM's decode attention: tokens of a block, waves to aim at, blocks × 4 ≥ SMs, largest head group
#: (cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention/decoderXQAConstants.h and decoderXQAImplJIT.cpp)
XQA_TOKENS, XQA_WAVES, XQA_FACTOR, XQA_GROUP = 128, 8, 4, 32
MMHA_TOKENS, MMHA_WAVES = 64, 8
MLA_TILE = 64  #: heads and cached tokens of a tile of FlashMLA


def smooth_max(first: Array, second: Array, power: float) -> Array:
    """(a^p + b^p)^(1/p) for p ≥ 1: above the larger, below the sum; the overlap of two limits is not complete."""
    top = np.maximum(first, second)
    return np.asarray(top * (1.0 + (np.minimum(first, second) / top) ** power) ** (1.0 / power))


def gemm(c: Any, hw: Hardware, m: Array, n: Array, k: Array, dtype: str) -> Array:
    """Dense GEMM: the best of a set of tiles and depth splits, as a library's heuristic or tuner picks.

    A block of a tile runs ⌈k ÷ split⌉ deep plus a prologue, no faster than its loads arrive; blocks run in whole waves
    over the SMs. A larger tile reuses more of what it loads.
    """
    _, size = counts.gemm(m, n, k, hw.width(dtype))
    memory = size / (hw.memory_bandwidth * c.memory_efficiency)
    rate = hw.peak(dtype) / hw.sms * c.compute_efficiency
    best = np.full(np.shape(memory), np.inf)
    for rows, columns in GEMM_TILES:
        reuse = rows * columns / (rows * columns + c.tile_edge * (rows + columns))
        blocks = np.ceil(m / rows) * np.ceil(n / columns)
        for split in GEMM_SPLITS:
            waves = np.ceil(blocks * split / hw.sms)
            depth = k / split
            block = np.maximum(2.0 * rows * columns * (depth + c.prologue) / (rate * reuse), depth * c.step_latency)
            time = smooth_max(waves * block, memory, c.overlap)
            best = np.minimum(best, time + (c.split_overhead if split > 1 else 0.0))
    return np.asarray(c.overhead + best)


def expert_gemm(c: Any, hw: Hardware, load: RankLoad, sizes: dict[str, Array], dtype: str) -> Array:
    """The routed experts of the slowest rank: weights of the active experts against padded rows, the rows through
    permutation, activation and un-permutation, and sorting over the group's choices.

    ``c`` are the constants of balanced or of skewed loads; ``sizes`` holds tokens, hidden, intermediate, experts, top_k,
    tp and gated.
    """
    hidden, wide = sizes["hidden"], sizes["intermediate"] / sizes["tp"]
    matrices = 2.0 + sizes["gated"]
    weights = matrices * hidden * wide * load.active * hw.width(dtype) / (hw.memory_bandwidth * c.memory_efficiency)
    flops = 2.0 * matrices * hidden * wide * load.padded / (hw.peak(dtype) * c.compute_efficiency)
    moved = 2.0 * load.rows * (4.0 * hidden + matrices * wide) / hw.memory_bandwidth * c.activation_passes
    sorting = sizes["tokens"] * sizes["top_k"] * c.per_choice + sizes["experts"] * c.per_routed
    return np.asarray(c.overhead + c.per_expert * load.active + smooth_max(weights, flops, c.overlap) + moved + sorting)


def uses_xqa(hw: Hardware, sizes: dict[str, Array]) -> Array:
    """Whether TensorRT-LLM takes its XQA kernel: groups of 2 to 32 heads, and enough blocks to fill a quarter of the
    SMs; else the multi-head kernel, in which every head reads its KV cache for itself."""
    group = sizes["heads"] / sizes["kv_heads"]
    blocks = sizes["batch"] * sizes["kv_heads"] * np.maximum(np.floor(sizes["kv_len"] / XQA_TOKENS), 1.0)
    return np.asarray((group > 1) & (group <= XQA_GROUP) & (blocks * XQA_FACTOR >= hw.sms))


def attention_decode(c: Any, hw: Hardware, sizes: dict[str, Array], dtype: str) -> Array:
    """MHA or GQA decode: of the two kernels the one that the library takes."""
    return np.where(uses_xqa(hw, sizes), xqa(c.xqa, hw, sizes, dtype), mmha(c.mmha, hw, sizes, dtype))


def xqa(c: Any, hw: Hardware, sizes: dict[str, Array], dtype: str) -> Array:
    """Grouped-query kernel: a block takes one KV head of one sequence, or 128 tokens of it while that leaves at most
    eight waves; one block an SM at a time. More heads in a group take longer."""
    batch, heads, kv_heads, dim, length = (sizes[key] for key in ("batch", "heads", "kv_heads", "head_dim", "kv_len"))
    units = batch * kv_heads
    blocks = np.maximum(units, np.minimum(units * np.floor(length / XQA_TOKENS), XQA_WAVES * hw.sms))
    group = 1.0 + c.group_cost * (heads / kv_heads / XQA_GROUP) ** c.group_power
    tokens = np.maximum(np.minimum(length, XQA_TOKENS), length * units / (XQA_WAVES * hw.sms))
    waves = np.ceil(blocks / hw.sms) * (c.block + c.token * np.maximum(tokens - 64.0, 0.0)) * group
    _, size = counts.attention_decode(batch, heads, kv_heads, dim, length, hw.width(dtype))
    memory = size / (hw.memory_bandwidth * c.memory_efficiency)
    return np.asarray(c.overhead + c.split_overhead * (blocks > units) + smooth_max(waves, memory, c.overlap))


def mmha(c: Any, hw: Hardware, sizes: dict[str, Array], dtype: str) -> Array:
    """Multi-head kernel: a block takes one head of one sequence, or 64 tokens of it while that leaves at most eight
    waves; two blocks an SM, four when there are many. Heads of a group read the same cache again, from L2."""
    batch, heads, kv_heads, dim, length = (sizes[key] for key in ("batch", "heads", "kv_heads", "head_dim", "kv_len"))
    units = batch * heads
    blocks = np.maximum(units, np.minimum(units * np.floor(length / MMHA_TOKENS), MMHA_WAVES * hw.sms))
    few = blocks <= 4 * hw.sms
    waves = np.where(few, np.ceil(blocks / (2 * hw.sms)), np.ceil(blocks / (4 * hw.sms)))
    tokens = np.maximum(np.minimum(length, MMHA_TOKENS), length * units / (MMHA_WAVES * hw.sms))
    _, size = counts.attention_decode(batch, heads, kv_heads, dim, length, hw.width(dtype))
    memory = size / (hw.memory_bandwidth * c.memory_efficiency)
    again = 2.0 * hw.width(dtype) * units * dim * length / c.l2_bandwidth
    reads = smooth_max(memory, again, c.overlap)
    time = smooth_max(waves * (c.block + c.token * tokens), reads, c.overlap)
    return np.asarray(c.overhead + c.split_overhead * np.log2(blocks / units) + time)


def mla_decode(c: Any, hw: Hardware, sizes: dict[str, Array], dtype: str) -> Array:
    """MLA decode as FlashMLA schedules it: tiles of 64 heads share the SMs; cached tokens are dealt in blocks of 64 to
    as many parts as there are SMs for a tile, so that a long sequence is split and a short one shares its part.
    Handing out and adding up grow with the parts that a sequence can have."""
    batch, heads, length = sizes["batch"], sizes["heads"], sizes["kv_len"]
    parts = np.floor(hw.sms / np.ceil(heads / MLA_TILE))
    filled = np.minimum(heads, MLA_TILE) / MLA_TILE
    blocks = np.ceil(length / MLA_TILE)
    deepest = np.maximum(np.ceil(batch * blocks / parts), 1.0)
    sequences = np.maximum(batch / parts, 1.0)
    compute = deepest * c.block * (1.0 + c.block_heads * filled)
    compute = compute + sequences * c.sequence * (1.0 + c.sequence_heads * filled)
    cache = 1.0 * hw.width(dtype) * batch * length * (counts.MLA_LATENT + counts.MLA_ROPE)
    _, size = counts.mla_decode(batch, heads, length, hw.width(dtype))
    memory = cache / (hw.memory_bandwidth * c.memory_efficiency)
    queries = (size - cache) / (hw.memory_bandwidth * c.query_efficiency)
    start = c.start * np.log2(np.minimum(blocks, parts))
    return np.asarray(c.overhead + start + smooth_max(compute, memory, c.overlap) + queries)
