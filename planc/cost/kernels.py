"""Which kernels an op of the graph is: kinds and sizes that `planc.cost.ops` prices.

What engines fuse is one kernel here: a residual add with the norm that follows it, an activation with nothing, RoPE with
the write to the KV cache. A GEMM of FP8 weights takes FP8 rows, which a kernel of its own scales and converts first, one
for every input (per-token-group quantisation in vLLM and SGLang, `fp8_quantize_1x128` in TensorRT-LLM); what feeds the
experts is converted inside their grouped GEMM, as it was measured. MLA decodes absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) and prefills with K and V
expanded. Expert ops, collectives and hand-overs are priced by `planc.cost.step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.graph import OpBlock
from planc.placement import Parallelism
from planc.placement.memory import padded_width
from planc.spec import Spec


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel. ``sizes``: (column, value) pairs of its kind, in the order of `planc.cost.ops.KINDS`."""

    kind: str
    sizes: tuple[tuple[str, float], ...]
    dtype: str = "bf16"


@dataclass(frozen=True, slots=True)
class Context:
    """What an op's sizes follow from, beside its block. ``kv_len``: tokens that a sequence has in the cache; ``dtype``:
    of products of two activations."""

    spec: Spec
    par: Parallelism
    kv_len: float
    dtype: str


def kernels(at: Context, block: OpBlock) -> list[Kernel]:
    """Kernels of one op of a local block, in the order they run; none for what takes no time (input, output, receive)."""
    return _KINDS[block.kind](at, block) if block.kind in _KINDS else []


def _kernel(kind: str, dtype: str = "bf16", **sizes: float) -> Kernel:
    return Kernel(kind, tuple(sizes.items()), dtype)


def _tokens(block: OpBlock) -> int:
    return next(iter(block.reads.values())).shape[0]


def _linear(at: Context, m: float, n: float, k: float) -> list[Kernel]:
    """A GEMM with weights, its input converted first where those are FP8."""
    dtype = at.spec.model.dtype_of("weights")
    product = _kernel("gemm", dtype, m=m, n=n, k=k)
    return [_stream(m, k), product] if dtype == "fp8" else [product]


def _stream(tokens: float, width: float) -> Kernel:
    """An element-wise kernel over [tokens, width]."""
    return _kernel("norm", tokens=tokens, hidden=width)


def _embed(at: Context, block: OpBlock) -> list[Kernel]:
    return [_kernel("embedding", tokens=_tokens(block), hidden=at.spec.model.hidden)]


def _attn_qkv(at: Context, block: OpBlock) -> list[Kernel]:
    a, h, t = at.spec.model.attention, at.spec.model.hidden, _tokens(block)
    heads = a.heads // at.par.tp
    if a.kind != "mla":
        width = (heads + 2 * max(1, a.kv_head_count // at.par.tp)) * a.head_dim
        return [*_linear(at, t, width, h), _stream(t, width)]
    # without a low rank for queries (0) these are projected straight from the hidden state, by `up`
    down = [*_linear(at, t, a.q_lora_rank + a.kv_width, h), _stream(t, a.q_lora_rank + a.kv_width)]
    up = _linear(at, t, heads * a.q_head_dim, a.q_lora_rank or h)
    if at.spec.workload.phase == "decode":
        return [*down, *up, _kernel("gemm", at.dtype, m=t, n=heads * a.kv_lora_rank, k=a.qk_nope_head_dim)]
    return [*down, *up, *_linear(at, t, heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)]


def _attn_core(at: Context, block: OpBlock) -> list[Kernel]:
    a, work, t = at.spec.model.attention, at.spec.workload, _tokens(block)
    heads = a.heads // at.par.tp
    kv_heads = max(1, a.kv_head_count // at.par.tp) if a.kind != "mla" else heads
    cache = at.spec.model.dtype_of("kv_cache")
    if work.phase == "prefill":
        # whole prompts side by side, or a chunk of one, which sees half of the prompt before it on average
        prompts, new = np.maximum(1.0, t / work.isl), np.minimum(t, work.isl)
        length = (work.isl + new) / 2
        width = (a.q_head_dim + a.out_head_dim) / 2
        sizes = {"batch": prompts, "heads": heads, "kv_heads": kv_heads, "head_dim": width, "tokens": new}
        return [_kernel("attention_prefill", at.dtype, **sizes, kv_len=length)]
    if a.kind == "mla":
        return [_kernel("mla_decode", cache, batch=t, heads=heads, kv_len=at.kv_len)]
    sizes = {"batch": t, "heads": heads, "kv_heads": kv_heads, "head_dim": a.head_dim, "kv_len": at.kv_len}
    return [_kernel("attention_decode", cache, **sizes)]


def _attn_out(at: Context, block: OpBlock) -> list[Kernel]:
    a, h, t = at.spec.model.attention, at.spec.model.hidden, _tokens(block)
    heads = a.heads // at.par.tp
    out = _linear(at, t, h, heads * a.out_head_dim)
    if a.kind == "mla" and at.spec.workload.phase == "decode":
        return [_kernel("gemm", at.dtype, m=t, n=heads * a.v_head_dim, k=a.kv_lora_rank), *out]
    return out


def _add(at: Context, block: OpBlock) -> list[Kernel]:
    return [_stream(_tokens(block), at.spec.model.hidden)]


def _up(at: Context, block: OpBlock) -> list[Kernel]:
    model = at.spec.model
    dense = block.kind == "dense_up"
    gated = (model.dense_mlp.gated if model.dense_mlp else False) if dense else bool(model.moe and model.moe.gated)
    t, width = block.writes["u"].shape
    return [*_linear(at, t, (2 if gated else 1) * width, model.hidden), _stream(t, width)]


def _down(at: Context, block: OpBlock) -> list[Kernel]:
    t, width = block.reads["u"].shape
    return _linear(at, t, at.spec.model.hidden, width)


def _gate(at: Context, block: OpBlock) -> list[Kernel]:
    moe, t = at.spec.model.moe, _tokens(block)
    assert moe is not None
    return [
        _kernel("gate", at.dtype, tokens=t, hidden=at.spec.model.hidden, experts=moe.experts),
        _stream(t, moe.experts),
    ]


def _aggregate(at: Context, block: OpBlock) -> list[Kernel]:
    """The weighted sum of what came back with the residual, and the norm that follows."""
    moe, h = at.spec.model.moe, at.spec.model.hidden
    assert moe is not None
    return [_stream(block.writes["x"].shape[0], h * (moe.top_k + 2) / 2)]


def _lm_head(at: Context, block: OpBlock) -> list[Kernel]:
    model, tokens = at.spec.model, block.writes["logits"].shape[0]
    return [_kernel("head", at.dtype, tokens=tokens, hidden=model.hidden, vocab=padded_width(model.vocab, at.par.tp))]


def _sample(at: Context, block: OpBlock) -> list[Kernel]:
    tokens, vocab = next(iter(block.reads.values())).shape
    return [_stream(tokens, vocab)]


_KINDS = {
    "embed": _embed,
    "attn_qkv": _attn_qkv,
    "attn_core": _attn_core,
    "attn_out": _attn_out,
    "residual_add": _add,
    "dense_up": _up,
    "shared_up": _up,
    "dense_down": _down,
    "shared_down": _down,
    "gate": _gate,
    "aggregate": _aggregate,
    "lm_head": _lm_head,
    "sample": _sample,
}
