"""Floors of one step: bytes ÷ bandwidth and FLOPs ÷ peak, at the utilisation that the spec counts on.

Two bounds hold for memory and for compute, and the larger counts: the busiest rank must do all its micro-batches, and
one micro-batch must pass every stage and layer. Bandwidths and peaks are the spec's, each times its utilisation
(memory_utilization, MFU, link utilization), as the hand arithmetic of the reference plan has them. Everything is derived
from the spec; nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.graph import OpBlock
from planc.placement import WEIGHT_ITEMS, copy_tokens
from planc.placement.memory import kv_bytes_per_token, padded_width, unquantized_bytes
from planc.spec.cluster import Gpu
from planc.spec.model import (
    attention_parameters,
    dense_mlp_parameters,
    expert_parameters,
    gate_parameters,
    shared_parameters,
)
from planc.verify import VerifiedPlan


@dataclass(frozen=True, slots=True)
class Floors:
    """Seconds, unless a name says otherwise."""

    expert_read: float  #: one expert (or shard) from the memory of the slowest GPU
    attention_read: float  #: one layer's attention weights from the same
    weights_read: float  #: weights that one micro-batch reads, slowest rank of each stage, stages added
    kv_read: float  #: KV cache that one micro-batch reads at the input length, likewise (decode)
    memory: float  #: the bound from memory reads
    compute: float  #: the bound from FLOPs ÷ (peak · MFU)
    transfer: float  #: bytes of the busiest rank of every collective ÷ link bandwidth, one copy per token and expert
    latency: float  #: one link latency per collective; both over all micro-batches, one after another
    expert_tokens: float  #: mean tokens per expert copy and micro-batch
    balance_tokens: float  #: tokens above which an expert is compute-bound on the slowest GPU

    @property
    def step(self) -> float:
        """The bound for the whole step: the larger of memory and compute, as if everything overlapped. Transfers are
        left out: sending one copy per node instead of one per expert makes them shorter than `transfer`."""
        return max(self.memory, self.compute)


def step_floors(plan: VerifiedPlan) -> Floors:
    """Floors of the planned step."""
    spec, par = plan.spec, plan.parallelism
    slowest = min((g.gpu for g in spec.cluster.groups), key=_bandwidth)
    width = spec.model.bytes_of("expert_weights")
    expert = expert_parameters(spec.model) * width / par.expert_tp
    attention = sum(attention_parameters(spec.model, par.tp)) * spec.model.bytes_of("weights")
    first = next(iter(plan.placement.layers), None)
    tokens = float(copy_tokens(spec, par, plan.placement, first).mean()) if first is not None else 0.0
    weights, kv = _seconds(plan, _weights_read(plan)), _seconds(plan, _kv_read(plan))
    m = spec.workload.micro_batches
    transfer, latency = _communication(plan)
    return Floors(
        expert_read=expert / _bandwidth(slowest),
        attention_read=attention / _bandwidth(slowest),
        weights_read=_through_stages(weights),
        kv_read=_through_stages(kv) / m,
        memory=max(_through_stages(weights + kv / m), float((weights + kv).max())),
        compute=_compute(plan),
        transfer=transfer * m,
        latency=latency * m,
        expert_tokens=tokens,
        balance_tokens=_flops(slowest, spec.model.dtype_of("expert_weights")) / _bandwidth(slowest) * width / 2,
    )


def _bandwidth(gpu: Gpu) -> float:
    return float(gpu.memory_bandwidth * gpu.memory_utilization)


def _flops(gpu: Gpu, dtype: str) -> float:
    return float(getattr(gpu.peak, dtype) * gpu.mfu)


def _seconds(plan: VerifiedPlan, bytes_of_rank: np.ndarray) -> np.ndarray:
    """Seconds of memory reads of each rank, float [dp, pp, ep]."""
    cluster, par = plan.spec.cluster, plan.parallelism
    bandwidth = np.array([_bandwidth(g.gpu) for g in cluster.groups])[cluster.group_of_rank[: par.world_size]]
    return np.asarray((bytes_of_rank / bandwidth).reshape(par.dp, par.pp, par.ep))


def _through_stages(seconds: np.ndarray) -> float:
    """Sum over pipeline stages of the slowest rank's seconds; ``seconds``: [dp, pp, ep]."""
    return float(seconds.max(axis=(0, 2)).sum())


def _weights_read(plan: VerifiedPlan) -> np.ndarray:
    """Weight bytes that a step reads on each rank: all but the embedding table, of which a step reads only rows (as a
    tied head it reads its shard), and the experts to which no token goes. int64 [world]."""
    spec, par, model = plan.spec, plan.parallelism, plan.spec.model
    total = np.sum([plan.memory.items[name] for name in WEIGHT_ITEMS if name != "embedding"], axis=0)
    if model.tied_embeddings and par.pp == 1:
        total = total + padded_width(model.vocab, par.tp) * model.hidden * unquantized_bytes(model)
    shard = expert_parameters(model) * model.bytes_of("expert_weights") // par.expert_tp
    idle = np.zeros((par.pp, par.ep), dtype=np.int64)
    for layer, part in plan.placement.layers.items():
        unused = part.rank[copy_tokens(spec, par, plan.placement, layer) == 0]
        holders = np.repeat(np.bincount(unused // par.expert_tp, minlength=par.holders), par.expert_tp)
        idle[par.stage_of_layer(layer)] += holders
    return np.asarray(total - np.tile(idle.reshape(-1), par.dp) * shard)


def _kv_read(plan: VerifiedPlan) -> np.ndarray:
    """KV bytes that a decode step reads on each rank at the input length, all micro-batches. float [world]."""
    spec, par = plan.spec, plan.parallelism
    if spec.workload.phase == "prefill":
        return np.zeros(par.world_size)
    per_layer = plan.tokens.sequences * spec.workload.isl * kv_bytes_per_token(spec.model, par.tp)
    layers = np.repeat(par.stage_sizes, par.ep)
    return np.asarray(np.tile(layers * per_layer, par.dp), dtype=float)


def _compute(plan: VerifiedPlan) -> float:
    """Seconds of FLOPs: 2 per weight and token, attention over the context, the experts' at their own dtype's peak."""
    spec, par, m = plan.spec, plan.parallelism, plan.spec.workload.micro_batches
    gpus = [g.gpu for g in spec.cluster.groups]
    fastest = max(_flops(g, spec.model.dtype_of("weights")) for g in gpus)
    expert_peak = max(_flops(g, spec.model.dtype_of("expert_weights")) for g in gpus)
    path, rank_total = 0.0, np.zeros((par.pp, par.ep))
    for stage, (first, end) in enumerate(par.stages):
        shared = _stage_flops(plan, first, end, last=stage == par.pp - 1) / fastest
        path += shared
        rank_total[stage] += shared * m
        for layer, part in plan.placement.layers.items():
            if first <= layer < end:
                loads = np.bincount(part.rank, weights=copy_tokens(spec, par, plan.placement, layer), minlength=par.ep)
                seconds = loads * (2.0 * expert_parameters(spec.model) / par.expert_tp / expert_peak)
                path += float(seconds.max())
                rank_total[stage] += seconds * m
    return max(path, float(rank_total.max()))


def _stage_flops(plan: VerifiedPlan, first: int, end: int, *, last: bool) -> float:
    """FLOPs of one rank for one micro-batch in the layers ``first`` … ``end`` − 1, the routed experts' left out."""
    spec, par, model, t = plan.spec, plan.parallelism, plan.spec.model, plan.tokens.group
    a, layers = model.attention, end - first
    moe = sum(first <= i < end for i in model.moe_layer_ids)
    weights = layers * sum(attention_parameters(model, par.tp)) + (layers - moe) * dense_mlp_parameters(model) / par.tp
    weights += moe * (shared_parameters(model) + gate_parameters(model) * (0 if par.leaders_gate else 1)) / par.tp
    # a decode token attends to its whole prompt, a prefill token to half of its own on average
    context = spec.workload.isl if spec.workload.phase == "decode" else min(t, spec.workload.isl) / 2
    attention = layers * context * (a.heads // par.tp) * (a.q_head_dim + a.out_head_dim)
    head = padded_width(model.vocab, par.tp) * model.hidden * plan.tokens.logits if last else 0
    return 2.0 * (t * (weights + attention) + head)


def _communication(plan: VerifiedPlan) -> tuple[float, float]:
    """(bytes ÷ bandwidth, latency) summed over the collectives and hand-overs on the way of one micro-batch."""
    transfer = latency = 0.0
    seen: dict[tuple[object, ...], tuple[float, float]] = {}
    for index, block in enumerate(plan.blocks.blocks):
        if block.micro_batch or not (block.collective or block.kind == "pp_send"):
            continue
        place = id(plan.placement.layers.get(block.layer)) if block.layer is not None else 0
        rows = block.rows.tobytes() if block.rows is not None else b""
        key = (block.kind, block.ranks.shape[1], int(block.ranks[0, 0]), place, next(iter(block.reads.values())), rows)
        if key not in seen:
            seen[key] = _moved(plan, index, block)
        transfer, latency = transfer + seen[key][0], latency + seen[key][1]
    return transfer, latency


def _moved(plan: VerifiedPlan, index: int, block: OpBlock) -> tuple[float, float]:
    """(seconds of the busiest rank, link latency) of a collective's first op with the most rows, or of a hand-over.

    A broadcast counts as scatter and all-gather, so that no rank sends everything to everybody.
    """
    par, domains, links = plan.parallelism, plan.spec.cluster.domain_of_rank, plan.spec.cluster.links
    group = block.ranks.shape[1]
    op = 0 if block.rows is None else int(np.argmax(block.rows))
    ranks = block.ranks[op]
    if block.kind == "pp_send":
        near_only = bool(domains[ranks[0]] == domains[ranks[0] + par.ep])
        size = float(block.writes["x"].row_bytes)
        near, far = (size, 0.0) if near_only else (0.0, size)
    elif block.kind == "broadcast":
        near, far = block.writes["x"].row_bytes * (group - 1) / group, 0.0
    else:
        matrix = plan.byte_matrix(index, op)
        np.fill_diagonal(matrix, 0)
        inside = domains[ranks][:, None] == domains[ranks][None, :]
        near, far = busiest_bytes(matrix * inside), busiest_bytes(matrix * ~inside)
        if block.kind == "input_split":  # one scatter for all micro-batches; the ranks of a TP group read one copy
            near, far = (size / plan.spec.workload.micro_batches for size in (near, far / par.tp))
    seconds = max(
        near / (links.nvlink.bandwidth * links.nvlink.utilization), far / (links.nic.bandwidth * links.nic.utilization)
    )
    return float(seconds), links.nic.latency if far else links.nvlink.latency if near else 0.0


def busiest_bytes(matrix: np.ndarray) -> float:
    """The most bytes that one rank sends or receives in a byte matrix [group, group]."""
    return float(max(matrix.sum(axis=1).max(), matrix.sum(axis=0).max()))
