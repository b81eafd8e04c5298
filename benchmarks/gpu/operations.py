"""Ops as torch runs them: for a row of the grid a maker of calls, and the software that they run.

A call reads tensors of the device's pool (`Cuda.take`) and allocates only its output. Weights are stored [out, in], as
checkpoints have them. Libraries are used where they can be imported (flash-attn, FlashMLA), else torch's own ops.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.gpu.device import Cuda, Maker
from benchmarks.gpu.grid import Row, local_loads, routing

VOCABULARY = 129_280  #: rows of the embedding table (DeepSeek-V3)
LATENT, ROPE = 512, 64  #: of MLA
PAGE = 64  #: tokens of a page of FlashMLA's cache

Built = tuple[Maker, str]


def build(device: Cuda, row: Row, plain: bool = False) -> Built:
    """(maker, software) of one op. ``plain``: torch's own ops also where a library could be imported."""
    return KINDS[row["kind"]](device, row, plain)


def _has(library: str, plain: bool) -> bool:
    return not plain and importlib.util.find_spec(library) is not None


def _linear(device: Cuda, m: int, n: int, k: int) -> Maker:
    def make() -> Callable[[], Any]:
        x, weight = device.take(m, k), device.take(n, k)
        return lambda: device.torch.nn.functional.linear(x, weight)

    return make


def _gemm(device: Cuda, row: Row, plain: bool) -> Built:
    m, n, k = row["m"], row["n"], row["k"]
    if row["dtype"] != "fp8":
        return _linear(device, m, n, k), "torch linear"
    torch = device.torch
    one = torch.ones((), dtype=torch.float32, device="cuda")

    def make() -> Callable[[], Any]:
        x, weight = device.take(m, k), device.take(n, k)
        return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return make, "torch._scaled_mm, one scale a tensor"


def _expert_gemm(device: Cuda, row: Row, plain: bool) -> Built:
    """The routed experts of the slowest rank, as `planc costs` prices them: sorting the group's choices, gathering the
    rank's rows, two grouped GEMMs around SwiGLU, and adding the weighted rows up per token."""
    torch = device.torch
    tokens, top_k, hidden, wide = row["tokens"], row["top_k"], row["hidden"], row["intermediate"] // row["tp"]
    on_rank = local_loads(row)
    local, pairs = len(on_rank), int(on_rank.sum())
    choices = torch.tensor(routing(on_rank, tokens, top_k, row["experts"]), dtype=torch.int32, device="cuda")
    numbers = torch.arange(local, dtype=torch.int32, device="cuda")
    share = torch.rand(tokens * top_k, 1, device="cuda").to(torch.bfloat16)
    multiply, software = _grouped(device, row["dtype"], on_rank, plain)

    def make() -> Callable[[], Any]:
        x, up, down = (
            device.take(tokens, hidden),
            device.take(local, 2 * wide, hidden),
            device.take(local, hidden, wide),
        )

        def call() -> Any:
            ordered, order = torch.sort(choices.view(-1))
            ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
            mine = order[:pairs]
            source = mine // top_k
            inner = multiply(_rows(torch, x, source), up, ends)
            act = torch.nn.functional.silu(inner[:, :wide]) * inner[:, wide:]
            back = multiply(act.to(x.dtype), down, ends) * share.index_select(0, mine)
            return torch.zeros(tokens, hidden, dtype=back.dtype, device="cuda").index_add_(0, source, back)

        return call

    return make, f"{software} with torch's sort, gather, SwiGLU and index_add"


def _rows(torch: Any, x: Any, at: Any) -> Any:
    """Rows of ``x``; torch gathers no FP8, so that its bytes are gathered."""
    if x.element_size() == 1:
        return x.view(torch.uint8).index_select(0, at).view(x.dtype)
    return x.index_select(0, at)


def _grouped(device: Cuda, dtype: str, on_rank: Any, plain: bool) -> tuple[Callable[[Any, Any, Any], Any], str]:
    """([rows, in], [experts, out, in], ends of the experts' rows) -> [rows, out] in BF16."""
    torch = device.torch
    if dtype == "fp8":
        if not hasattr(torch, "_scaled_grouped_mm"):
            raise NotImplementedError("this torch has no _scaled_grouped_mm")
        rows, local = int(on_rank.sum()), len(on_rank)
        ones = torch.ones(rows, dtype=torch.float32, device="cuda")
        scales: dict[int, Any] = {}

        def scaled(x: Any, weight: Any, ends: Any) -> Any:
            wide = weight.shape[1]
            if wide not in scales:  # made by the warm-up, before anything is captured
                scales[wide] = torch.ones(local, wide, dtype=torch.float32, device="cuda")
            other = weight.transpose(1, 2)
            return torch._scaled_grouped_mm(
                x, other, ones, scales[wide], offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        return scaled, "torch._scaled_grouped_mm, one scale a row"
    if hasattr(torch, "_grouped_mm"):
        return lambda x, weight, ends: torch._grouped_mm(x, weight.transpose(1, 2), offs=ends), "torch._grouped_mm"
    starts = [int(on_rank[:expert].sum()) for expert in range(len(on_rank) + 1)]

    def loop(x: Any, weight: Any, ends: Any) -> Any:
        parts = [
            torch.nn.functional.linear(x[low:high], weight[expert])
            for expert, (low, high) in enumerate(pairwise(starts))
            if high > low
        ]
        return torch.cat(parts)

    return loop, "a loop of torch linear over the experts"


def _attention_decode(device: Cuda, row: Row, plain: bool) -> Built:
    torch = device.torch
    batch, heads, length, dim = row["batch"], row["heads"], row["kv_len"], row["head_dim"]
    kv_heads = row["kv_heads"] or heads
    if _has("flash_attn", plain):
        from flash_attn import flash_attn_with_kvcache

        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")

        def make() -> Callable[[], Any]:
            query = device.take(batch, 1, heads, dim)
            keys, values = (device.take(batch, length, kv_heads, dim) for _ in range(2))
            return lambda: flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths, causal=True)

        return make, "flash_attn_with_kvcache"
    attend = torch.nn.functional.scaled_dot_product_attention

    def make_plain() -> Callable[[], Any]:
        query = device.take(batch, heads, 1, dim)
        keys, values = (device.take(batch, kv_heads, length, dim) for _ in range(2))
        return lambda: attend(query, keys, values, enable_gqa=kv_heads != heads)

    return make_plain, "torch scaled_dot_product_attention"


def _mla_decode(device: Cuda, row: Row, plain: bool) -> Built:
    torch = device.torch
    batch, heads, length = row["batch"], row["heads"], row["kv_len"]
    wide, scale = LATENT + ROPE, (128 + ROPE) ** -0.5  # of a query before absorption: 128 + 64 values
    if _has("flash_mla", plain) and length % PAGE == 0:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        pages = torch.arange(batch * length // PAGE, dtype=torch.int32, device="cuda").view(batch, -1)
        parts, splits = get_mla_metadata(lengths, heads, 1)

        def make() -> Callable[[], Any]:
            query, cache = device.take(batch, 1, heads, wide), device.take(batch * length // PAGE, PAGE, 1, wide)
            return lambda: flash_mla_with_kvcache(
                query, cache, pages, lengths, LATENT, parts, splits, softmax_scale=scale, causal=True
            )

        return make, "FlashMLA"

    def make_plain() -> Callable[[], Any]:
        query, cache = device.take(batch, heads, wide), device.take(batch, length, wide)

        def call() -> Any:
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, cache.transpose(1, 2), beta=0, alpha=scale)
            return torch.bmm(torch.softmax(scores, dim=-1), cache[:, :, :LATENT])

        return call

    return make_plain, "torch bmm, softmax, bmm"


def _attention_prefill(device: Cuda, row: Row, plain: bool) -> Built:
    torch = device.torch
    batch, heads, tokens, length, dim = (row[name] for name in ("batch", "heads", "tokens", "kv_len", "head_dim"))
    kv_heads = row["kv_heads"] or heads
    if _has("flash_attn", plain):
        from flash_attn import flash_attn_func

        def make() -> Callable[[], Any]:
            query = device.take(batch, tokens, heads, dim)
            keys, values = (device.take(batch, length, kv_heads, dim) for _ in range(2))
            return lambda: flash_attn_func(query, keys, values, causal=True)  # the last query sees every key

        return make, "flash_attn_func"
    from torch.nn.attention.bias import causal_lower_right

    attend = torch.nn.functional.scaled_dot_product_attention
    mask: dict[str, Any] = (
        {"is_causal": True} if tokens == length else {"attn_mask": causal_lower_right(tokens, length)}
    )

    def make_plain() -> Callable[[], Any]:
        query = device.take(batch, heads, tokens, dim)
        keys, values = (device.take(batch, kv_heads, length, dim) for _ in range(2))
        return lambda: attend(query, keys, values, enable_gqa=kv_heads != heads, **mask)

    return make_plain, "torch scaled_dot_product_attention"


def _norm(device: Cuda, row: Row, plain: bool) -> Built:
    tokens, hidden = row["tokens"], row["hidden"]

    def make() -> Callable[[], Any]:
        x, weight = device.take(tokens, hidden), device.take(hidden)
        return lambda: device.torch.nn.functional.rms_norm(x, (hidden,), weight)

    return make, "torch rms_norm"


def _embedding(device: Cuda, row: Row, plain: bool) -> Built:
    table = device.take(VOCABULARY, row["hidden"])

    def make() -> Callable[[], Any]:
        ids = device.integers(VOCABULARY, row["tokens"])
        return lambda: device.torch.nn.functional.embedding(ids, table)

    return make, "torch embedding"


def _gate(device: Cuda, row: Row, plain: bool) -> Built:
    """Scores by softmax, the best of them, and their shares, in 32 bit as engines do."""
    torch = device.torch

    def make() -> Callable[[], Any]:
        x, weight = device.take(row["tokens"], row["hidden"]), device.take(row["experts"], row["hidden"])

        def call() -> Any:
            scores = torch.softmax(torch.nn.functional.linear(x, weight).float(), dim=-1)
            best, experts = torch.topk(scores, row.get("choices", 8), dim=-1, sorted=False)
            return best / best.sum(dim=-1, keepdim=True), experts

        return call

    return make, "torch linear, softmax and topk"


def _head(device: Cuda, row: Row, plain: bool) -> Built:
    return _linear(device, row["tokens"], row["vocab"], row["hidden"]), "torch linear"


KINDS: dict[str, Callable[[Cuda, Row, bool], Built]] = {
    "gemm": _gemm,
    "expert_gemm": _expert_gemm,
    "attention_decode": _attention_decode,
    "mla_decode": _mla_decode,
    "attention_prefill": _attention_prefill,
    "norm": _norm,
    "embedding": _embedding,
    "gate": _gate,
    "head": _head,
}
