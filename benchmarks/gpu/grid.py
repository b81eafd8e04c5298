"""What is measured: lists of ops with sizes from small to large, as `planc costs` reads them, and the routing of experts.

Sizes are those of models in use (DeepSeek-V3, Kimi K2, Qwen3, Mixtral, Llama), on a grid that is wider than their
deployments, so that a fit interpolates. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.cost import counts, loads
from planc.spec.fields import DTYPE_BYTES

Row = dict[str, Any]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTHS = (512, 1024, 2048, 4096, 7168, 16384)
#: hidden, intermediate, experts, top-k, (ep, tp) of one rank
EXPERTS = (
    (7168, 2048, 256, 8, ((1, 4), (2, 1), (8, 1), (8, 2), (32, 1), (64, 1), (256, 1))),  # DeepSeek-V3
    (7168, 2048, 384, 8, ((4, 1), (16, 1), (32, 1), (128, 1))),  # Kimi K2
    (4096, 1536, 128, 8, ((1, 1), (1, 4), (4, 1), (16, 1), (64, 1))),  # Qwen3-235B
    (2048, 768, 128, 8, ((1, 1), (4, 1), (8, 1))),  # Qwen3-30B
    (4096, 14336, 8, 2, ((1, 1), (1, 4), (2, 1), (8, 1))),  # Mixtral 8x7B
)
SKEWS = (1.01, 1.2)  #: exponents of the power law
HEADS = ((8, 1), (16, 2), (32, 8), (64, 8), (64, 4), (8, 8), (32, 32))
LENGTHS = (64, 256, 1024, 4096, 16384, 65536)
BATCHES = (1, 4, 16, 64, 256, 1024)
MOST_BYTES = 24e9  #: of one op: more of it says nothing new, and takes long
MOST_PAIRS = 131_072  #: (token, expert) pairs on one rank
MOST_FLOPS = 2e13


def rows(families: tuple[str, ...] = ()) -> list[Row]:
    """Every op to measure on one GPU, in the order of measuring (one dtype after the other); of ``families`` only where
    some are named (kinds of op)."""
    parts = (_gemm, _experts, _attention, _mla, _prefill, _streaming, _routing)
    found = [row for part in parts for row in part() if not families or row["kind"] in families]
    found = [row for row in found if bytes_of(row) <= MOST_BYTES and flops_of(row) <= MOST_FLOPS]
    order = ("bf16", "fp16", "fp8")
    return sorted(found, key=lambda row: order.index(row["dtype"]))


def collectives(world: int, families: tuple[str, ...] = ()) -> list[Row]:
    """Collectives among 2, 4 and 8 ranks of ``world``, 1 KiB to 512 MiB."""
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    return [
        {"kind": kind, "dtype": "bf16", "ranks": ranks, "bytes": 1 << power, "library": "nccl"}
        for kind in kinds
        for ranks in (2, 4, 8)
        for power in range(10, 30)
        if ranks <= world and (not families or kind in families)
    ]


def thinned(rows: list[Row], every: int) -> list[Row]:
    """One row of ``every``, drawn with a fixed seed: a regular step would miss whole sizes of the grid."""
    kept = np.sort(np.random.default_rng(0).permutation(len(rows))[: -(-len(rows) // every)])
    return [rows[at] for at in kept]


def _gemm() -> Iterator[Row]:
    for dtype, every in (("bf16", 1), ("fp16", 5), ("fp8", 2)):
        shapes = [(n, k) for n in WIDTHS for k in WIDTHS]
        for number, (n, k) in enumerate(shapes):
            if number % every == 0:
                yield from ({"kind": "gemm", "dtype": dtype, "m": m, "n": n, "k": k} for m in TOKENS)


def _experts() -> Iterator[Row]:
    tokens = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    for hidden, wide, experts, top_k, splits in EXPERTS:
        shape = {"hidden": hidden, "intermediate": wide, "experts": experts, "top_k": top_k, "gated": 1}
        for ep, tp in splits:
            for count in tokens:
                if count * top_k / ep > MOST_PAIRS:
                    continue
                size = {"tokens": count, **shape, "ep": ep, "tp": tp}
                for skew in ("balanced", *SKEWS):
                    if skew == "balanced" or ep > 1:
                        yield {"kind": "expert_gemm", "dtype": "bf16", **size, "skew": skew}
                    if (skew == "balanced" or ep > 1) and hidden >= 4096:
                        yield {"kind": "expert_gemm", "dtype": "fp8", **size, "skew": skew}


def _attention() -> Iterator[Row]:
    for heads, kv_heads in HEADS:
        for batch in BATCHES:
            for length in LENGTHS:
                size = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "kv_len": length}
                yield {"kind": "attention_decode", "dtype": "bf16", **size}


def _mla() -> Iterator[Row]:
    for heads in (16, 32, 64, 128):
        for batch in BATCHES:
            for length in LENGTHS:
                yield {"kind": "mla_decode", "dtype": "bf16", "batch": batch, "heads": heads, "kv_len": length}


def _prefill() -> Iterator[Row]:
    for heads, kv_heads in ((8, 1), (32, 8), (32, 32)):
        for batch in (1, 4):
            for tokens in (128, 512, 2048, 8192):
                for kv_len in (tokens, 4 * tokens):
                    size = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "tokens": tokens}
                    yield {"kind": "attention_prefill", "dtype": "bf16", **size, "kv_len": kv_len}


def _streaming() -> Iterator[Row]:
    for kind in ("norm", "embedding"):
        for hidden in (2048, 4096, 7168):
            for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
                yield {"kind": kind, "dtype": "bf16", "tokens": tokens, "hidden": hidden}


def _routing() -> Iterator[Row]:
    for hidden, _, experts, top_k, _ in EXPERTS:
        for tokens in (1, 8, 64, 256, 1024, 4096):
            yield {"kind": "gate", "dtype": "bf16", "tokens": tokens, "hidden": hidden, "experts": experts} | {
                "choices": top_k
            }
    for hidden, vocab in ((7168, 129_280), (4096, 32_000)):
        for tokens in (1, 16, 128, 1024):
            yield {"kind": "head", "dtype": "bf16", "tokens": tokens, "hidden": hidden, "vocab": vocab}


def bytes_of(row: Row) -> float:
    """Bytes that one call reads and writes (`planc.cost.counts`)."""
    return _counts(row)[1]


def flops_of(row: Row) -> float:
    """FLOPs of one call."""
    return _counts(row)[0]


def _counts(row: Row) -> tuple[float, float]:
    kind, width = row["kind"], DTYPE_BYTES[row["dtype"]]
    if kind == "gemm":
        found = counts.gemm(row["m"], row["n"], row["k"], width)
    elif kind in ("gate", "head"):
        found = counts.gemm(row["tokens"], row["experts" if kind == "gate" else "vocab"], row["hidden"], width)
    elif kind == "expert_gemm":
        on_rank = local_loads(row)
        size = float(on_rank.sum()), float((on_rank > 0).sum()), row["hidden"], row["intermediate"] / row["tp"]
        found = counts.expert_gemm(*size, row["gated"], width)
    elif kind in ("norm", "embedding"):
        found = getattr(counts, kind)(row["tokens"], row["hidden"])
    else:
        names = ("batch", "heads", "kv_heads", "head_dim", "tokens", "kv_len")
        found = getattr(counts, kind)(**{name: row[name] for name in names if name in row}, width=width)
    return float(found[0]), float(found[1])


def local_loads(row: Row) -> np.ndarray:
    """Tokens of each expert on the slowest rank, int [⌈experts ÷ ep⌉]."""
    tokens, top_k, experts, ep = (row[name] for name in ("tokens", "top_k", "experts", "ep"))
    if row["skew"] != "balanced":
        found = loads.slowest_loads(experts, ep, tokens, top_k, float(row["skew"]))
        found[found.argmax()] -= max(0, found.sum() - tokens * top_k)  # rounding can make a few too many
        return found
    local = -(-experts // ep)
    pairs = max(1, round(tokens * top_k * local / experts))
    active = min(local, pairs)
    number = np.arange(local)
    return np.asarray(pairs // active * (number < active) + (number < pairs % active))


def routing(on_rank: np.ndarray, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Choices of every token of the group, int [tokens, top_k], so that experts 0, 1, … (those of the measured rank)
    get ``on_rank`` tokens each, no token chooses one of them twice, and all other choices are of higher numbers: other
    ranks' experts, or a number that is nobody's where there are none."""
    pairs = np.repeat(np.arange(len(on_rank)), on_rank)
    ids = np.full((tokens, top_k), -1)
    token = np.arange(len(pairs)) % tokens
    ids[token, np.arange(len(pairs)) // tokens] = pairs
    away = ids < 0
    others = np.random.default_rng(0).integers(len(on_rank), max(experts, len(on_rank) + 1), away.sum())
    ids[away] = others
    return ids[np.random.default_rng(1).permutation(tokens)]
