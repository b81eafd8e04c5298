"""Bytes on every rank, itemised: weights by part, KV cache, activations, dispatch buffers, reserve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planc.placement.experts import Placement
from planc.placement.mesh import Parallelism, step_tokens
from planc.routing import balanced_counts
from planc.spec import Spec
from planc.spec.fields import DTYPE_BYTES
from planc.spec.model import (
    Model,
    attention_parameters,
    dense_mlp_parameters,
    expert_parameters,
    gate_parameters,
    norm_parameters,
    shared_parameters,
)

WEIGHT_ITEMS = ("experts", "attention", "dense_mlp", "shared_experts", "gates", "norms", "embedding", "head")
ITEMS = (*WEIGHT_ITEMS, "kv_cache", "activations", "dispatch_buffers")


@dataclass(frozen=True, eq=False)
class MemoryTable:
    """Bytes per item and rank. ``items``: name -> int64 [world]; ``capacity`` and ``reserve``: int64 [world]."""

    items: dict[str, np.ndarray]
    capacity: np.ndarray
    reserve: np.ndarray

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight bytes of each rank, int64 [world]."""
        return np.asarray(np.sum([self.items[name] for name in WEIGHT_ITEMS], axis=0))

    @cached_property
    def used(self) -> np.ndarray:
        """All items and the reserve, int64 [world]."""
        return np.asarray(np.sum(list(self.items.values()), axis=0) + self.reserve)

    @property
    def headroom(self) -> np.ndarray:
        """Capacity less what is used; negative where a rank overflows, int64 [world]."""
        return np.asarray(self.capacity - self.used)

    @property
    def fits(self) -> bool:
        """Whether every rank fits."""
        return bool((self.headroom >= 0).all())

    @property
    def fullest(self) -> int:
        """The rank with the least headroom."""
        return int(np.argmin(self.headroom))

    def of_rank(self, rank: int) -> dict[str, int]:
        """Item -> bytes of one rank, the reserve included."""
        return {name: int(v[rank]) for name, v in self.items.items()} | {"reserve": int(self.reserve[rank])}


def kv_bytes_per_token(model: Model, tp: int) -> int:
    """KV cache bytes of one token and layer on one rank of a TP group.

    MHA and GQA: 2 · (KV heads of the rank) · head_dim; a KV head is replicated when tp exceeds the KV heads. MLA:
    the latent (kv_lora_rank + rope) is replicated on every rank of the group.
    """
    a = model.attention
    if a.kind == "mla":
        return a.kv_width * model.bytes_of("kv_cache")
    return 2 * max(1, a.kv_head_count // tp) * a.head_dim * model.bytes_of("kv_cache")


def unquantized_bytes(model: Model) -> int:
    """Bytes of a weight that fp8 checkpoints leave unquantized: gates, norms, embedding, head."""
    dtype = model.dtype_of("weights")
    return DTYPE_BYTES[model.dtype_of("activations") if dtype == "fp8" else dtype]


def padded_width(width: int, degree: int) -> int:
    """Width of one shard, rounded up."""
    return -(-width // degree)


def memory_table(spec: Spec, par: Parallelism, placement: Placement) -> MemoryTable:
    """Exact bytes of every rank. One replica is computed and repeated for the others."""
    world = par.world_size
    items = {name: np.tile(part.reshape(-1), par.dp) for name, part in _replica_items(spec, par, placement).items()}
    capacity = spec.cluster.memory_of_rank[:world]
    shares = np.array([g.gpu.reserve for g in spec.cluster.groups])[spec.cluster.group_of_rank[:world]]
    return MemoryTable({name: items[name] for name in ITEMS}, capacity, np.ceil(capacity * shares).astype(np.int64))


def _replica_items(spec: Spec, par: Parallelism, placement: Placement) -> dict[str, np.ndarray]:
    """Item -> int64 [pp, ep]."""
    model, tp, shape = spec.model, par.tp, (par.pp, par.ep)
    weight, small = model.bytes_of("weights"), unquantized_bytes(model)
    tokens = step_tokens(spec, par)
    is_dense, is_moe = _layer_counts(spec, par)
    every = np.array(par.stage_sizes)[:, None]
    leader = np.arange(par.ep) % tp == 0
    gates = leader if par.leaders_gate else np.ones(par.ep, dtype=bool)
    shared_tp = tp if par.leaders_gate else 1
    last = np.arange(par.pp)[:, None] == par.pp - 1
    first = np.arange(par.pp)[:, None] == 0
    embedding = model.vocab * model.hidden * small
    head = padded_width(model.vocab, tp) * model.hidden * small
    if model.tied_embeddings and par.pp == 1:
        head = 0  # the head is a view of the embedding table on the same rank
    expert_bytes = expert_parameters(model, par.expert_tp) * model.bytes_of("expert_weights")
    final_norm = model.hidden if model.norm == "rms" else 0
    values = {
        "experts": placement.expert_counts().reshape(shape) * expert_bytes,
        "attention": every * sum(attention_parameters(model, tp)) * weight,
        "dense_mlp": is_dense * (dense_mlp_parameters(model) // tp) * weight,
        "shared_experts": is_moe * (shared_parameters(model) // shared_tp) * weight,
        "gates": is_moe * gates * gate_parameters(model) * small,
        "norms": (every * norm_parameters(model) + last * final_norm) * small,
        "embedding": first * embedding,
        "head": last * head,
        "kv_cache": every * tokens.sequences * spec.workload.context * kv_bytes_per_token(model, tp),
        "activations": _activations(spec, par, placement) * spec.workload.micro_batches,
        "dispatch_buffers": _dispatch_buffers(spec, par, placement) * spec.workload.micro_batches,
    }
    return {name: np.broadcast_to(value, shape).astype(np.int64) for name, value in values.items()}


def _layer_counts(spec: Spec, par: Parallelism) -> tuple[np.ndarray, np.ndarray]:
    """Dense and MoE layers of each stage, int64 [pp, 1] each."""
    moe = np.array([[sum(a <= i < b for i in spec.model.moe_layer_ids)] for a, b in par.stages], dtype=np.int64)
    every = np.array([[b - a] for a, b in par.stages], dtype=np.int64)
    return every - moe, moe


def _activations(spec: Spec, par: Parallelism, placement: Placement) -> np.ndarray:
    """Peak activation bytes of one micro-batch: the residual stream twice (input and running sum), and the largest working
    set of an op beside it. int64 [pp, ep]."""
    stream = 2 * step_tokens(spec, par).group * spec.model.hidden * spec.model.bytes_of("activations")
    return np.asarray(np.maximum.reduce(list(working_sets(spec, par, placement).values())) + stream)


def working_sets(spec: Spec, par: Parallelism, placement: Placement) -> dict[str, np.ndarray]:
    """Op kind -> bytes that the largest such op of each rank reads and makes in a micro-batch, beside the residual stream.
    Rows on their way to and from experts are dispatch buffers; collectives work in place, but for the gather of the logits.
    int64 [pp, ep]."""
    model, tp = spec.model, par.tp
    t, a, moe, mlp, h = step_tokens(spec, par), model.attention, model.moe, model.dense_mlp, model.hidden
    q, o = a.heads // tp * a.q_head_dim, a.heads // tp * a.out_head_dim
    kv_new = a.kv_width if a.kind == "mla" else 2 * max(1, a.kv_head_count // tp) * a.head_dim
    values: dict[str, np.ndarray | int] = {
        "attn_qkv": t.group * (h + q + kv_new),
        "attn_core": t.group * (q + kv_new + o),
    }
    values["attn_out"] = t.group * (o + h)
    has_dense, has_moe = (part > 0 for part in _layer_counts(spec, par))
    if mlp:
        width, matrices = mlp.intermediate // tp, 2 if mlp.gated else 1
        values["dense_up"] = has_dense * t.group * (h + matrices * width)
        values["dense_down"] = has_dense * t.group * (width + h)
    if moe is not None:
        gates = np.arange(par.ep) % (tp if par.leaders_gate else 1) == 0
        values["gate"] = has_moe * gates * t.source * (h + moe.experts)
        width, matrices = moe.shared_width // (tp if par.leaders_gate else 1), 2 if moe.gated else 1
        if width:
            rows = t.group if par.leaders_gate else t.source
            values["shared_up"] = has_moe * rows * (h + matrices * width)
            values["shared_down"] = has_moe * rows * (width + h)
        values["expert"] = _expert_tokens(spec, par, placement)[1] * (matrices * moe.intermediate // par.expert_tp)
    if model.vocab:
        shard, last = padded_width(model.vocab, tp), np.arange(par.pp)[:, None] == par.pp - 1
        values["lm_head"] = last * t.logits * (h + shard)
        if tp > 1:
            values["all_gather"] = last * t.logits * (shard + shard * tp)
    size, shape = model.bytes_of("activations"), (par.pp, par.ep)
    return {kind: np.broadcast_to(value * size, shape).astype(np.int64) for kind, value in values.items()}


def _dispatch_buffers(spec: Spec, par: Parallelism, placement: Placement) -> np.ndarray:
    """Receive buffer of dispatch, send buffer of combine, and at the source the top_k partial outputs that return.
    int64 [pp, ep]."""
    model, moe = spec.model, spec.model.moe
    if moe is None:
        return np.zeros((par.pp, par.ep), dtype=np.int64)
    received = _expert_tokens(spec, par, placement)[0] * model.hidden
    size = received * (model.bytes_of("dispatch") + model.bytes_of("combine"))
    sources = np.arange(par.ep) % (par.tp if par.leaders_gate else 1) == 0
    has_moe = _layer_counts(spec, par)[1] > 0
    returned = step_tokens(spec, par).source * moe.top_k * model.hidden * model.bytes_of("combine")
    return np.asarray(size + has_moe * sources * returned)


def _expert_tokens(spec: Spec, par: Parallelism, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """(tokens received by a rank in its busiest layer, most tokens of one expert on it), int64 [pp, ep] each."""
    total = np.zeros((par.pp, par.ep), dtype=np.int64)
    most = np.zeros((par.pp, par.ep), dtype=np.int64)
    done: dict[tuple[int, int], bool] = {}
    for layer, part in placement.layers.items():
        stage = par.stage_of_layer(layer)
        if done.setdefault((stage, id(part)), False):
            continue
        done[stage, id(part)] = True
        tokens = copy_tokens(spec, par, placement, layer)
        received = np.bincount(part.rank, weights=tokens, minlength=par.ep).astype(np.int64)
        largest = np.zeros(par.ep, dtype=np.int64)
        np.maximum.at(largest, part.rank, tokens)
        for i in range(1, par.expert_tp):  # every shard of an expert receives all its tokens
            received[i :: par.expert_tp] = received[0 :: par.expert_tp]
            largest[i :: par.expert_tp] = largest[0 :: par.expert_tp]
        total[stage] = np.maximum(total[stage], received)
        most[stage] = np.maximum(most[stage], largest)
    return total, most


def copy_tokens(spec: Spec, par: Parallelism, placement: Placement, layer: int) -> np.ndarray:
    """Tokens that each copy of the layer receives in one micro-batch, int64 [copies] in `LayerPlacement` order."""
    part, moe = placement.layers[layer], spec.model.moe
    assert moe is not None
    sources = par.attention_dp if par.leaders_gate else par.ep
    choices = sources * step_tokens(spec, par).source * moe.top_k
    loads = balanced_counts(np.array([choices]), 1, moe.experts)[0]
    copies = part.copies[part.expert]
    first = np.searchsorted(part.expert, part.expert)
    turn = np.arange(len(part.expert)) - first
    load = loads[part.expert]
    return np.asarray(load // copies + (turn < load % copies))


def largest_that_fits(spec: Spec, par: Parallelism, placement: Placement, key: str) -> int:
    """The largest workload ``batch``, or ``isl`` at the given osl, that fits every rank; 0 when none does."""

    def fits(value: int) -> bool:
        work = spec.workload.model_copy(update={key: value})
        return memory_table(spec.model_copy(update={"workload": work}), par, placement).fits

    # where a chunk of prompts fills a prefill step, short prompts need more logits, and may not fit where long ones do
    start = next((value for value in (1, getattr(spec.workload, key)) if fits(value)), 0)
    if not start:
        return 0
    high = start
    while fits(high * 2):
        high *= 2
        if high > 10**9:
            return high
    low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
