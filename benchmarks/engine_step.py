"""One step of a serving engine that keeps its experts inside a TP group, from planc's kernels and prices; and what a client
sees of such steps under a steady concurrency.

Inside a TP group tokens are replicated: every rank has all tokens of the group, computes its experts (or its shard of all
experts), and one all-reduce adds the parts; nothing is dispatched. With attention DP every TP group first gathers the
tokens of all groups, and gets its own back by a reduce-scatter (TensorRT-LLM, and vLLM's default
`allgather_reducescatter`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.cost import compute
from planc.cost.kernels import Context, Kernel, kernels
from planc.cost.loads import TILE, RankLoad
from planc.cost.ops import Costs
from planc.cost.step import product_dtype
from planc.graph import OpBlock
from planc.graph.types import TensorType
from planc.placement import Parallelism
from planc.schedule.estimate import token_time
from planc.schedule.workload import changed
from planc.spec import Spec

#: prompt tokens of a step at most: vLLM's max_num_batched_tokens, SGLang's chunked_prefill_size and TensorRT-LLM's
#: max_num_tokens all default to 8192 on an H100 or H200
MOST_PROMPT_TOKENS = 8192
#: backends whose prompts share a step with the sequences that decode; SGLang gives them steps of their own
#: (`enable_mixed_chunk` is off by default)
MIXED = ("trtllm", "vllm")
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How an engine splits a model: ``tp`` ranks share attention, ``attention_dp`` such groups share the sequences, and all
    of them hold the experts, split into ``moe_tp`` shards and ``moe_ep`` parts."""

    tp: int
    attention_dp: int = 1
    moe_tp: int = 1
    moe_ep: int = 1


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one TP group computes in a step: ``sequences`` that decode, with ``kv_len`` tokens each in the cache, and
    ``prompt`` tokens of prompts of ``isl`` tokens. ``groups``: how many of the groups have prompts in this step."""

    sequences: int
    kv_len: float
    prompt: int = 0
    isl: int = 1
    groups: int = 1


def step_time(spec: Spec, costs: Costs, layout: Layout, tokens: Tokens, skew: float) -> float:
    """Seconds of one step: its kernels one after another. ``skew``: exponent of the experts' loads, 0 for even ones
    (`planc.cost.loads`)."""
    return sum(count * _seconds(costs, kernel) for kernel, count in step_kernels(spec, costs, layout, tokens, skew))


def step_kernels(
    spec: Spec, costs: Costs, layout: Layout, tokens: Tokens, skew: float
) -> Iterator[tuple[Kernel, float]]:
    """(kernel, how often) of one step."""
    model, h = spec.model, spec.model.hidden
    here = tokens.sequences + tokens.prompt
    everywhere = tokens.sequences * layout.attention_dp + tokens.prompt * tokens.groups
    decode, prefill = (_context(spec, layout.tp, phase, tokens) for phase in ("decode", "prefill"))
    dense, moe = len(model.dense_layer_ids), len(model.moe_layer_ids)
    for kernel in [*_attention(decode, prefill, tokens), *kernels(decode, _block("residual_add", (here, h)))]:
        yield kernel, model.layers
    yield from _all_reduces(layout.tp, here * h, model.layers)
    if dense:
        assert model.dense_mlp is not None
        yield from (
            (kernel, dense) for kernel in _mlp(decode, "dense", here, model.dense_mlp.intermediate // layout.tp)
        )
        yield from _all_reduces(layout.tp, here * h, dense)
    if model.moe:
        ranks = layout.tp * layout.attention_dp
        for kernel in kernels(decode, _block("gate", (here, h))):
            yield kernel, moe
        yield _experts(spec, layout, everywhere, skew), moe
        if model.moe.shared_width:
            width = model.moe.shared_width // layout.tp
            yield from ((kernel, moe) for kernel in _mlp(decode, "shared", here, width))
        if layout.attention_dp == 1:
            yield from _all_reduces(layout.tp, here * h, moe)
        else:
            for kind in ("all_gather", "reduce_scatter"):
                yield _collective(kind, ranks, everywhere * h * 2), moe
    for kernel in kernels(decode, _block("residual_add", (here, h))):
        yield kernel, model.layers
    last = max(1, tokens.sequences + math.ceil(tokens.prompt / tokens.isl))
    logits = (last, -(-model.vocab // layout.tp))
    for kind, shape in (("embed", (here, h)), ("lm_head", logits), ("sample", logits)):
        yield from ((kernel, 1) for kernel in kernels(decode, _block(kind, shape)))


def _attention(decode: Context, prefill: Context, tokens: Tokens) -> Iterator[Kernel]:
    """Kernels of one layer's attention: projections of all tokens together, the core of each kind apart."""
    a, h = decode.spec.model.attention, decode.spec.model.hidden
    here = tokens.sequences + tokens.prompt
    parts = [(decode, tokens.sequences), (prefill, tokens.prompt)]
    for kind in ("attn_qkv", "attn_core", "attn_out"):
        if kind == "attn_core":
            for at, count in parts:
                yield from kernels(at, _block(kind, (count, h))) if count else ()
            continue
        whole = kernels(decode, _block(kind, (here, h)))
        if a.kind != "mla":
            yield from whole
            continue
        # MLA's decode multiplies by W_UK and W_UV, a product of activations and 16 bit; its prefill expands K and V
        own = -1 if kind == "attn_qkv" else 0
        shared = [kernel for kernel in whole if kernel is not whole[own]]
        yield from shared
        for at, count in parts:
            if count and at is decode:
                yield kernels(at, _block(kind, (count, h)))[own]
            elif count and kind == "attn_qkv":
                yield from kernels(at, _block(kind, (count, h)))[len(shared) :]


def _mlp(at: Context, kind: str, tokens: int, width: int) -> list[Kernel]:
    h = at.spec.model.hidden
    up = _block(f"{kind}_up", (tokens, h), u=(tokens, width))
    return [*kernels(at, up), *kernels(at, _block(f"{kind}_down", (tokens, width)))]


def _experts(spec: Spec, layout: Layout, tokens: int, skew: float) -> Kernel:
    moe = spec.model.moe
    assert moe is not None
    sizes = {"tokens": tokens, "hidden": spec.model.hidden, "intermediate": moe.intermediate, "experts": moe.experts}
    sizes |= {"top_k": moe.top_k, "ep": layout.moe_ep, "tp": layout.moe_tp, "skew": skew, "gated": int(moe.gated)}
    return Kernel("expert_gemm", tuple(sizes.items()), spec.model.dtype_of("expert_weights"))


def _experts_seconds(costs: Costs, kernel: Kernel) -> float:
    """Experts of the slowest rank. Even popularity is not even load: with few tokens some experts get none and others
    several, so that fewer weights are read than by the balanced load of a kernel benchmark."""
    sizes = dict(kernel.sizes)
    name = f"expert_gemm{'_fp8' if kernel.dtype == 'fp8' else ''}_balanced"
    part = getattr(costs.fit, name)
    if sizes["skew"]:
        return float(costs.price("expert_gemm", sizes, kernel.dtype).seconds[0])
    load = even_popularity(*(int(sizes[key]) for key in ("tokens", "top_k", "experts", "ep")))
    columns = {key: np.array([float(value)]) for key, value in sizes.items()}
    return float(compute.expert_gemm(part.constants, costs.hardware, load, columns, kernel.dtype)[0])


def even_popularity(tokens: int, top_k: int, experts: int, ep: int, draws: int = 16) -> RankLoad:
    """Load of the slowest rank where every token chooses its experts evenly and independently of the others: means over
    draws with a fixed seed."""
    counts = np.random.default_rng(0).binomial(tokens, top_k / experts, (draws, ep, -(-experts // ep)))
    padded = -(-counts // TILE) * TILE
    parts = (counts.sum(axis=2), (counts > 0).sum(axis=2), padded.sum(axis=2))
    rows, active, padded = (np.array([max(1.0, float(part.max(axis=1).mean()))]) for part in parts)
    return RankLoad(rows, active, padded)


def _all_reduces(ranks: int, elements: int, count: int) -> Iterator[tuple[Kernel, float]]:
    if ranks > 1:
        yield _collective("all_reduce", ranks, elements * 2), count


def _collective(kind: str, ranks: int, size: float) -> Kernel:
    return Kernel(kind, (("ranks", ranks), ("bytes", size)))


_FOUND: dict[tuple[str, Kernel], float] = {}  #: prices so far, by GPU preset


def _seconds(costs: Costs, kernel: Kernel) -> float:
    key = costs.gpu.name, kernel
    if key not in _FOUND:
        sizes = dict(kernel.sizes)
        if "ranks" in sizes:
            _FOUND[key] = _collective_seconds(costs, kernel.kind, int(sizes["ranks"]), float(sizes["bytes"]))
        elif kernel.kind == "expert_gemm":
            _FOUND[key] = _experts_seconds(costs, kernel)
        else:
            _FOUND[key] = float(costs.price(kernel.kind, sizes, kernel.dtype).seconds[0])
    return _FOUND[key]


def _collective_seconds(costs: Costs, kind: str, ranks: int, size: float) -> float:
    """The quicker of the libraries in a node. Over nodes (not measured): inside each, and a ring of NICs between them, each
    carrying the share of one of its GPUs."""
    inside = min(ranks, GPUS_PER_NODE)
    words = ("nccl", "custom") if kind == "all_reduce" else ("nccl",)
    found = min(
        float(costs.price(kind, {"ranks": inside, "bytes": size, "library": word}).seconds[0]) for word in words
    )
    nodes = ranks // inside
    if nodes == 1:
        return found
    assert costs.links is not None
    nic = costs.links.nic
    turns = 2 if kind == "all_reduce" else 1
    return found + nic.latency + turns * size / inside * (nodes - 1) / nodes / (nic.bandwidth * nic.utilization)


def _context(spec: Spec, tp: int, phase: Any, tokens: Tokens) -> Context:
    par = Parallelism(1, 1, tp, tp, 1, ((0, spec.model.layers),), "sharded", "all_reduce")
    return Context(changed(spec, phase=phase, isl=tokens.isl), par, tokens.kv_len, product_dtype(spec))


def _block(kind: str, shape: tuple[int, int], u: tuple[int, int] | None = None) -> OpBlock:
    """An op as the kernels see it: the shapes that it reads and writes."""
    tensor = TensorType(shape, "bf16")
    writes = {"u": TensorType(u, "bf16")} if u else {"logits": tensor}
    return OpBlock(kind, kind, np.zeros((1, 1), dtype=np.int32), reads={"x": tensor, "u": tensor}, writes=writes)


# --- what a client sees -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds: ``tpot``, ``ttft``; ``step``: of a decode step alone; ``prompt``: that one prompt adds to the others'
    steps; ``own``: of the steps that a prompt takes."""

    tpot: float
    ttft: float
    step: float
    prompt: float
    own: float


class Engine:
    """A model on one instance of a backend."""

    def __init__(self, spec: Spec, costs: Costs, layout: Layout, backend: str, skew: float = 0.0) -> None:
        self.spec, self.costs, self.layout, self.backend, self.skew = spec, costs, layout, backend, skew

    def _step(self, sequences: float, prompt: int, groups: int, kv_len: float, isl: int) -> float:
        group = math.ceil(sequences / self.layout.attention_dp)
        tokens = Tokens(group, kv_len, prompt, isl, groups)
        return step_time(self.spec, self.costs, self.layout, tokens, self.skew)

    def prefill(self, sequences: float, isl: int, osl: int, at_once: float | None = None) -> tuple[float, float]:
        """(seconds that one prompt adds, seconds of the steps that one prompt takes) beside ``sequences`` that decode.

        In a steady state a prompt comes for every sequence that ends, sequences ÷ osl of them in a step (``at_once``
        prompts, if given); they share a step up to `MOST_PROMPT_TOKENS` of a TP group.
        """
        arriving = at_once or max(1.0, sequences / max(osl, 1))
        groups = min(self.layout.attention_dp, math.ceil(arriving))
        chunk = min(MOST_PROMPT_TOKENS, isl * math.ceil(arriving / groups))
        if chunk < isl:  # chunks of like size
            chunk = math.ceil(isl / math.ceil(isl / chunk))
        kv_len = isl + osl / 2
        beside = sequences if self.backend in MIXED else 0
        whole = self._step(beside, chunk, groups, kv_len, isl)
        without = self._step(beside, 0, 1, kv_len, isl) if beside else 0.0
        prompts = chunk * groups / isl
        return (whole - without) / prompts, whole * math.ceil(isl / chunk)

    def together(self, concurrency: int, isl: int, osl: int) -> Served:
        """Decode and prefill on the same GPUs at a steady concurrency (`planc.schedule.estimate.token_time`)."""
        step = self._step(concurrency, 0, 1, isl + osl / 2, isl)
        prompt, own = self.prefill(concurrency, isl, osl)
        tpot = token_time(step, prompt, own, concurrency - 1, osl)
        busy = min(0.95, (concurrency - 1) * prompt / (osl * tpot + own))
        waiting = min(busy / (1 - busy) / 2, (concurrency - 1) / 2) * prompt  # M/D/1, at most half of the others
        return Served(tpot, own + waiting + step / 2, step, prompt, own)

    def waves(self, concurrency: int, isl: int, osl: int) -> Served:
        """The same where prompts go first and all requests are alike: they start together, so they end together. The prompts
        of a wave pass in groups; a request waits for half of the groups before its first token, and for half after."""
        step = self._step(concurrency, 0, 1, isl + osl / 2, isl)
        at_once = max(1, min(concurrency, MOST_PROMPT_TOKENS // isl))
        prompt, own = self.prefill(0, isl, osl, at_once=at_once)
        groups = math.ceil(concurrency / at_once)
        return Served(step + (groups - 1) / 2 * own / osl, (groups + 1) / 2 * own, step, prompt, own)

    def apart(self, concurrency: float, isl: int, osl: int, prefill: float, first: float) -> Served:
        """A decode pool's instance with its share of the concurrency. ``prefill``: seconds from prompt to prompt that its
        share of the prefill pool needs at least; ``first``: seconds of one prompt. By Little's law ``concurrency`` splits
        between the pools as their times do; the prefill pool's rate bounds it."""
        decoding, step, rate = float(concurrency), 0.0, 0.0
        for _ in range(30):
            step = self._step(max(1.0, decoding), 0, 1, isl + osl / 2, isl)
            rate = min(concurrency / (first + osl * step), 1 / prefill)
            decoding = (decoding + min(concurrency, rate * osl * step)) / 2
        return Served(step, max(first, concurrency / rate - osl * step), step, prefill, first)
