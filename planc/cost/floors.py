"""Floors of one step: bytes ÷ bandwidth, FLOPs ÷ peak, hops × latency. No prediction may be below them.

Bandwidths and peaks are the spec's, each times its utilisation (memory_utilization, MFU, link utilization), as the
hand arithmetic of the reference plan has them. Everything is derived from the spec; nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.placement import WEIGHT_ITEMS, copy_tokens
from planc.placement.memory import kv_bytes_per_token
from planc.spec import Spec
from planc.spec.cluster import Gpu
from planc.spec.model import attention_parameters, expert_parameters
from planc.verify import VerifiedPlan


@dataclass(frozen=True, slots=True)
class Floors:
    """Seconds, unless a name says otherwise. A stage counts with its slowest rank, and stages add up."""

    expert_read: float  #: one expert (or shard) from memory
    attention_read: float  #: one layer's attention weights from memory
    weights_read: float  #: all weights that a step reads
    kv_read: float  #: the KV cache of the sequences at their input length (decode)
    compute: float  #: FLOPs ÷ (peak · MFU)
    transfer: float  #: bytes of the busiest rank of every collective ÷ link bandwidth, if nothing else ran
    latency: float  #: one link latency per collective on the way
    expert_tokens: float  #: mean tokens per expert copy and micro-batch
    balance_tokens: float  #: tokens above which an expert is compute-bound

    @property
    def memory(self) -> float:
        """Everything a step reads from GPU memory."""
        return self.weights_read + self.kv_read

    @property
    def step(self) -> float:
        """The bound for the whole step: the largest of memory, compute and transfer, as if all overlapped."""
        return max(self.memory, self.compute, self.transfer)


def step_floors(plan: VerifiedPlan) -> Floors:
    """Floors of the planned step."""
    spec, par = plan.spec, plan.parallelism
    gpus = [g.gpu for g in spec.cluster.groups]
    slowest = min(gpus, key=_bandwidth)
    expert = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights") / par.expert_tp
    attention = sum(attention_parameters(spec.model, par.tp)) * spec.model.bytes_of("weights")
    transfer, latency = _communication(plan)
    moe = spec.model.moe
    first = next(iter(plan.placement.layers), None)
    tokens = float(copy_tokens(spec, par, plan.placement, first).mean()) if first is not None else 0.0
    dtype = spec.model.dtype_of("expert_weights")
    width = spec.model.bytes_of("expert_weights")
    return Floors(
        expert_read=expert / _bandwidth(slowest) if moe else 0.0,
        attention_read=attention / _bandwidth(slowest),
        weights_read=_stage_sum(plan, _weights_read(plan)),
        kv_read=_stage_sum(plan, _kv_read(plan)),
        compute=_compute(plan),
        transfer=transfer,
        latency=latency,
        expert_tokens=tokens,
        balance_tokens=min(_flops(g, dtype) / _bandwidth(g) for g in gpus) * width / 2,
    )


def _bandwidth(gpu: Gpu) -> float:
    return float(gpu.memory_bandwidth * gpu.memory_utilization)


def _flops(gpu: Gpu, dtype: str) -> float:
    peak = getattr(gpu.peak, dtype) or max(p for p in (gpu.peak.bf16, gpu.peak.fp16, gpu.peak.fp8) if p)
    return float(peak * gpu.mfu)


def _rank_bandwidth(plan: VerifiedPlan) -> np.ndarray:
    """Memory bandwidth counted on, B/s, float [world]."""
    cluster = plan.spec.cluster
    per_group = np.array([_bandwidth(g.gpu) for g in cluster.groups])
    return np.asarray(per_group[cluster.group_of_rank[: plan.parallelism.world_size]])


def _stage_sum(plan: VerifiedPlan, bytes_of_rank: np.ndarray) -> float:
    """Sum over pipeline stages of the slowest rank's seconds."""
    par = plan.parallelism
    seconds = (bytes_of_rank / _rank_bandwidth(plan)).reshape(par.dp, par.pp, par.ep)
    return float(seconds.max(axis=(0, 2)).sum())


def _weights_read(plan: VerifiedPlan) -> np.ndarray:
    """Weight bytes that a step reads on each rank: all but the embedding table, of which a step reads only rows, and
    the experts to which no token goes."""
    spec, par = plan.spec, plan.parallelism
    total = np.sum([plan.memory.items[name] for name in WEIGHT_ITEMS if name != "embedding"], axis=0)
    if spec.model.moe is None:
        return np.asarray(total)
    shard = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights") // par.expert_tp
    idle = np.zeros((par.pp, par.ep), dtype=np.int64)
    for layer, part in plan.placement.layers.items():
        unused = part.rank[copy_tokens(spec, par, plan.placement, layer) == 0]
        holders = np.repeat(np.bincount(unused // par.expert_tp, minlength=par.holders), par.expert_tp)
        idle[par.stage_of_layer(layer)] += holders
    return np.asarray(total - np.tile(idle.reshape(-1), par.dp) * shard)


def _kv_read(plan: VerifiedPlan) -> np.ndarray:
    spec, par = plan.spec, plan.parallelism
    if spec.workload.phase == "prefill":
        return np.zeros(par.world_size)
    per_layer = plan.tokens.sequences * spec.workload.isl * kv_bytes_per_token(spec.model, par.tp)
    layers = np.repeat([end - first for first, end in par.stages], par.ep)
    return np.asarray(np.tile(layers * per_layer, par.dp))


def step_flops(spec: Spec, plan: VerifiedPlan) -> np.ndarray:
    """FLOPs of each stage's busiest rank in one step, float [pp]: 2 per weight and token, and attention over the KV."""
    par, model, tokens = plan.parallelism, spec.model, plan.tokens
    t = tokens.group * spec.workload.micro_batches
    size = model.bytes_of("weights")
    dense_items = ("attention", "dense_mlp")
    result = np.zeros(par.pp)
    for stage, (first, end) in enumerate(par.stages):
        rank = stage * par.ep
        params = sum(int(plan.memory.items[name][rank]) for name in dense_items) / size
        flops = 2.0 * params * t
        a = model.attention
        context = spec.workload.isl if spec.workload.phase == "decode" else t / 2
        flops += 2.0 * t * context * (a.heads // par.tp) * (a.q_head_dim + a.out_head_dim) * (end - first)
        for layer in plan.placement.layers:
            if first <= layer < end:
                part = plan.placement.layers[layer]
                loads = np.bincount(part.rank, weights=copy_tokens(spec, par, plan.placement, layer))
                flops += 2.0 * expert_parameters(model) / par.expert_tp * loads.max() * spec.workload.micro_batches
        result[stage] = flops
    return result


def _compute(plan: VerifiedPlan) -> float:
    dtype = plan.spec.model.dtype_of("weights")
    fastest = max(_flops(g.gpu, dtype) for g in plan.spec.cluster.groups)
    return float(step_flops(plan.spec, plan).sum() / fastest)


def _communication(plan: VerifiedPlan) -> tuple[float, float]:
    """(bytes ÷ bandwidth, latency) summed over the collectives and hand-overs on the way of one micro-batch."""
    links, cluster = plan.spec.cluster.links, plan.spec.cluster
    transfer = latency = 0.0
    seen: dict[tuple[object, ...], tuple[float, float]] = {}
    for index, block in enumerate(plan.blocks.blocks):
        if block.micro_batch or not (block.collective or block.kind == "pp_send") or block.ranks.shape[1] == 0:
            continue
        if block.kind == "pp_send":
            transfer += block.writes["x"].row_bytes / (links.nic.bandwidth * links.nic.utilization)
            latency += links.nic.latency
            continue
        place = id(plan.placement.layers.get(block.layer)) if block.layer is not None else 0
        key = (block.kind, block.ranks.shape[1], int(block.ranks[0, 0]), place, next(iter(block.reads.values())))
        if key not in seen:
            matrix = plan.byte_matrix(index)
            domain = cluster.domain_of_rank[block.ranks[0]]
            inside = domain[:, None] == domain[None, :]
            np.fill_diagonal(matrix, 0)
            near = max((matrix * inside).sum(axis=1).max(), (matrix * inside).sum(axis=0).max())
            far = max((matrix * ~inside).sum(axis=1).max(), (matrix * ~inside).sum(axis=0).max())
            seconds = max(
                near / (links.nvlink.bandwidth * links.nvlink.utilization),
                far / (links.nic.bandwidth * links.nic.utilization),
            )
            seen[key] = (float(seconds), links.nic.latency if far else links.nvlink.latency if near else 0.0)
        transfer, latency = transfer + seen[key][0], latency + seen[key][1]
    return transfer, latency
