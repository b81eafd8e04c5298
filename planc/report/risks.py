"""Judgements that follow from the plan's numbers: when it is the right plan, what threatens it, what claims say."""

from __future__ import annotations

from typing import Any

from planc.cost import Floors, busiest_bytes
from planc.placement import check_rule
from planc.units import format_bytes, format_rate, format_seconds
from planc.verify import VerifiedPlan


def optimality_rows(plan: VerifiedPlan, floors: Floors) -> list[dict[str, Any]]:
    """Conditions under which one expert per GPU is the best use of the cluster, each with its numbers."""
    moe, par = plan.spec.model.moe, plan.parallelism
    if moe is None:
        return []
    nic = plan.spec.cluster.links.nic
    exchange = _exchange_seconds(plan)
    work = max(floors.expert_read, floors.expert_read * floors.expert_tokens / floors.balance_tokens)
    return [
        {
            "name": "enough GPUs: one per expert of a layer",
            "holds": par.holders >= moe.experts,
            "numbers": f"{par.holders} places for {moe.experts} experts",
        },
        {
            "name": "fast network: dispatch and combine take no longer than the expert's own work",
            "holds": exchange <= work,
            "numbers": f"{format_seconds(exchange)} (one copy per token and expert) at {format_rate(nic.bandwidth * nic.utilization)} against {format_seconds(work)}",
        },
        {
            "name": "large batch: transfers longer than link latency",
            "holds": exchange >= 2 * nic.latency,
            "numbers": f"{format_seconds(exchange)} of transfer against {format_seconds(2 * nic.latency)} of latency per layer",
        },
        {
            "name": "compute-bound experts",
            "holds": floors.expert_tokens >= floors.balance_tokens,
            "numbers": f"{floors.expert_tokens:.1f} tokens per expert; compute-bound above {floors.balance_tokens:.1f}",
        },
    ]


def _exchange_seconds(plan: VerifiedPlan) -> float:
    """Dispatch and combine of one MoE layer: bytes of the busiest rank across NVLink domains ÷ NIC bandwidth."""
    nic, cluster = plan.spec.cluster.links.nic, plan.spec.cluster
    total = 0.0
    for kind in ("dispatch", "combine"):
        index = next(i for i, b in enumerate(plan.blocks.blocks) if b.kind == kind)
        matrix = plan.byte_matrix(index)
        domain = cluster.domain_of_rank[plan.blocks.blocks[index].ranks[0]]
        far = matrix * (domain[:, None] != domain[None, :])
        total += busiest_bytes(far) / (nic.bandwidth * nic.utilization)
    return float(total)


def risk_rows(plan: VerifiedPlan, floors: Floors) -> list[dict[str, str]]:
    """Network, imbalance, memory, stragglers: each with this plan's numbers and what to do."""
    par, memory, moe = plan.parallelism, plan.memory, plan.spec.model.moe
    rank = memory.fullest
    free = int(memory.headroom[rank])
    share = floors.transfer / max(floors.transfer + floors.memory, 1e-30)
    crossing = sum(v["nic"] + v["spine"] for v in plan.volumes.values())
    everything = sum(sum(v.values()) for v in plan.volumes.values())
    rows = [
        {
            "name": "network",
            "numbers": f"{format_bytes(crossing)} of {format_bytes(everything)} per step leave the NVLink domain; transfer floor "
            f"{format_seconds(floors.transfer)}, {100 * share:.0f} % of transfer plus memory floors",
            "mitigation": "place co-activated experts on one node, send one copy per node"
            + (", overlap with two micro-batches" if plan.spec.workload.micro_batches == 1 else ""),
        },
        {
            "name": "memory headroom",
            "numbers": f"GPU {rank} keeps {format_bytes(free)} free ({100 * free / int(memory.capacity[rank]):.1f} %); the limits are "
            f"batch {plan.limits['batch']} or isl {plan.limits['isl']}",
            "mitigation": "nothing to do"
            if free > 0.25 * int(memory.capacity[rank])
            else "raise tp, lower batch or context, prefill in chunks",
        },
    ]
    if moe is not None:
        hot = 2 * floors.expert_tokens
        slowed = max(1.0, hot / floors.balance_tokens) / max(1.0, floors.expert_tokens / floors.balance_tokens)
        needed, slots = check_rule(plan.spec, par)
        spare = slots - needed if slots else par.holders - moe.experts
        rows += [
            {
                "name": "load imbalance",
                "numbers": f"planned for even routing, {floors.expert_tokens:.1f} tokens per expert; an expert twice as loaded "
                f"gets {hot:.0f} and takes {slowed:.2f} times as long, and its layer waits. Spare places: {max(0, spare)}",
                "mitigation": "give spare GPUs copies of hot experts (spares: replicate), rebalance from recorded loads",
            },
            {
                "name": "stragglers",
                "numbers": f"{par.ep} GPUs wait for each other {2 * len(plan.placement.layers)} times a step; one GPU 10 % slow "
                "makes every expert phase 10 % slow",
                "mitigation": "redundant copies of experts on other nodes, health checks before start, time-outs per collective",
            },
        ]
    return rows
