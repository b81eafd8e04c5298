"""The plan beside traditional expert parallelism: the same GPUs with EP 4 and EP 8, experts colocated."""

from __future__ import annotations

from typing import Any

from planc.placement import Parallelism, copy_tokens, memory_table, place_experts
from planc.placement.legality import degree_faults
from planc.placement.memory import kv_bytes_per_token
from planc.placement.stages import make_parallelism
from planc.spec.model import expert_parameters
from planc.verify import VerifiedPlan


def traditional_rows(plan: VerifiedPlan) -> list[dict[str, Any]]:
    """This plan, then EP 8 and EP 4 on the same GPUs where they divide: experts per rank, bytes, whether they fit."""
    if plan.spec.model.moe is None:
        return []
    par = plan.parallelism
    rows = [_row(plan, par, "this plan")]
    for ep in (8, 4):
        if ep >= par.ep or plan.spec.cluster.gpus % (ep * par.pp) or plan.spec.cluster.smallest_domain() < ep:
            continue
        spec = plan.spec.model_copy(update={"expert_rule": "none"})
        degrees = {"dp": spec.cluster.gpus // (ep * par.pp), "pp": par.pp, "ep": ep, "expert_tp": 1}
        tps = [tp for tp in range(min(par.tp, ep), 0, -1) if not degree_faults(spec, degrees | {"tp": tp})]
        if tps:
            rows.append(_row(plan, make_parallelism(spec, degrees | {"tp": tps[0]}), f"EP {ep}, colocated"))
    return rows


def _row(plan: VerifiedPlan, par: Parallelism, name: str) -> dict[str, Any]:
    spec = plan.spec
    if name != "this plan":
        spec = spec.model_copy(update={"expert_rule": "none"})
    placement = plan.placement if name == "this plan" else place_experts(spec, par)
    memory = plan.memory if name == "this plan" else memory_table(spec, par, placement)
    layer = next(iter(placement.layers))
    tokens = copy_tokens(spec, par, placement, layer)
    gpu = min((g.gpu for g in spec.cluster.groups), key=lambda g: g.memory_bandwidth * g.memory_utilization)
    rounds = max(part.rounds for part in placement.layers.values())
    size = expert_parameters(spec.model, par.expert_tp) * spec.model.bytes_of("expert_weights")
    rank = memory.fullest
    return {
        "name": name,
        "degrees": f"dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}",
        "per_rank": rounds,
        "expert_bytes": int(memory.items["experts"][rank]),
        "layer_read": rounds * size / (gpu.memory_bandwidth * gpu.memory_utilization),
        "tokens": float(tokens.mean()),
        "kv_tokens": (int(memory.capacity[rank]) - int(memory.used[rank]) + int(memory.items["kv_cache"][rank]))
        // (kv_bytes_per_token(spec.model, par.tp) * max(par.stage_sizes)),
        "used": int(memory.used[rank]),
        "fits": memory.fits,
        "crosses_nodes": bool(par.ep > spec.cluster.smallest_domain()),
    }
