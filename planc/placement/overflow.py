"""The diagnostic for a plan that does not fit: the itemised sum, and the smallest changes that would."""

from __future__ import annotations

from dataclasses import replace

from planc.diagnostics import Diagnostic
from planc.placement.experts import Placement, place_experts
from planc.placement.memory import MemoryTable, largest_that_fits, memory_table
from planc.placement.mesh import Parallelism, tp_groups_fit
from planc.placement.stages import make_parallelism
from planc.spec import Cluster, Spec
from planc.units import format_bytes


def overflow_fault(spec: Spec, par: Parallelism, placement: Placement, memory: MemoryTable) -> Diagnostic:
    """PLN201 for the fullest rank."""
    rank = memory.fullest
    items = memory.of_rank(rank)
    rows = [f"{name.replace('_', ' '):<17}{format_bytes(value):>10}" for name, value in items.items() if value]
    rows.append(f"{'sum':<17}{format_bytes(int(memory.used[rank])):>10}")
    over = int((memory.headroom < 0).sum())
    message = (
        f"rank {rank} needs {format_bytes(int(memory.used[rank]))} but has {format_bytes(int(memory.capacity[rank]))}"
        f" ({over} of {par.world_size} ranks overflow)"
    )
    path = (
        "workload.batch"
        if items["kv_cache"] > memory.weights[rank]
        else f"cluster.groups.{spec.cluster.group_of_rank[rank]}.gpu.memory"
    )
    return spec.fault("PLN201", message, path, "; or ".join(_changes(spec, par, placement)), tuple(rows))


def _changes(spec: Spec, par: Parallelism, placement: Placement) -> list[str]:
    """Single changes that fit, smallest first."""
    changes = []
    a = spec.model.attention
    for tp in range(par.tp + 1, spec.cluster.smallest_domain() + 1):
        legal = par.ep % tp == 0 and a.heads % tp == 0 and tp_groups_fit(spec.cluster, tp)
        if legal and (a.kind != "gqa" or a.kv_heads % tp == 0 or tp % a.kv_heads == 0):
            wider = replace(par, tp=tp)
            if memory_table(spec, wider, place_experts(spec, wider)).fits:
                changes.append(f"set tp {tp}")
                break
    batch = largest_that_fits(spec, par, placement, "batch")
    if batch:
        changes.append(f"lower workload.batch from {spec.workload.batch} to {batch}")
    isl = largest_that_fits(spec, par, placement, "isl")
    if isl:
        changes.append(f"lower workload.isl from {spec.workload.isl} to {isl}")
    more = _nodes_that_fit(spec, par)
    if more:
        changes.append(more)
    return changes or [
        "no change of tp, batch or isl alone fits, nor up to 32 times the nodes: use GPUs with more memory"
    ]


def _nodes_that_fit(spec: Spec, par: Parallelism) -> str:
    """The smallest of 2, 4 … 32 times the nodes on which the plan fits with one degree raised by as much, as a hint:
    more replicas share the sequences, more stages the layers, a larger EP group both sequences and experts."""
    if spec.parallelism.stages or len(spec.cluster.groups) > 1:
        return ""
    group = spec.cluster.groups[0]
    for factor in (2, 4, 8, 16, 32):
        grown = group.model_copy(update={"nodes": group.nodes * factor})
        cluster = Cluster(name=spec.cluster.name, groups=(grown,), links=spec.cluster.links)
        larger = spec.model_copy(update={"cluster": cluster})
        for key in ("dp", "pp", "ep"):
            degrees = {k: getattr(par, k) for k in ("dp", "pp", "ep", "tp", "expert_tp")}
            degrees[key] *= factor
            if degrees["pp"] > spec.model.layers:
                continue
            mesh = make_parallelism(larger, degrees)
            if memory_table(larger, mesh, place_experts(larger, mesh)).fits:
                return f"use {grown.nodes} nodes ({key} {degrees[key]})"
    return ""
