"""`planc show --topology`: the cluster's links by kind, and what one MoE layer of the plan puts on the busiest of each."""

from __future__ import annotations

import numpy as np

from planc.spec import Cluster
from planc.topology import LINK_KINDS, LinkLoads, pair_loads, topology
from planc.units import format_bytes, format_rate, format_seconds
from planc.verify import VerifiedPlan


def topology_text(plan: VerifiedPlan) -> str:
    """A table of link kinds with counts and capacities, then dispatch and combine of the first MoE layer: the busiest
    link of each kind, its bytes, and bytes ÷ capacity (one copy per token and expert, all replicas at once)."""
    links = topology(plan.spec.cluster)
    lines = [
        f"{plan.spec.cluster.name}: {plan.spec.cluster.nodes} nodes, {plan.spec.cluster.gpus} GPUs, {links.links} links",
        "",
    ]
    lines.append(f"{'links':<14}{'count':>7}{'capacity each':>16}{'together':>14}{'latency':>12}")
    for number, kind in enumerate(LINK_KINDS):
        part = links.capacity[links.kind_of_link == number]
        each = format_rate(part.min()) if part.min() == part.max() else f"{format_rate(part.min())} and up"
        latency = format_seconds(float(links.latency[links.kind_of_link == number].max(initial=0.0)))
        lines.append(f"{kind:<14}{len(part):>7}{each:>16}{format_rate(part.sum()):>14}{latency:>12}")
    lines += ["", *_shape_lines(plan.spec.cluster)]
    for kind in ("dispatch", "combine"):
        loads = layer_loads(plan, kind)
        if loads is not None:
            lines += ["", *_load_lines(plan, kind, loads)]
    return "\n".join(lines)


def _shape_lines(cluster: Cluster) -> list[str]:
    """Nodes by group, leaf pods with their oversubscription, and how routes are chosen."""
    lines = [
        f"{g.name}: {g.nodes} nodes of {g.gpus_per_node} {g.gpu.name}, NVLink domain of {g.nvlink_domain or g.gpus_per_node}"
        for g in cluster.groups
    ]
    leaf, nic = cluster.links.leaf, cluster.links.nic
    if leaf is not None:
        lines.append(f"leaf pods of {leaf.nodes} nodes, {leaf.oversubscription:g}:1 to the spine")
    rails = f"{nic.rails} rails a node" if nic.rails else "a rail for each GPU of a node"
    how = {"rail": "routes stay on the sender's rail", "shortest": "routes enter by the target's own port"}[nic.routing]
    return [*lines, f"{rails}; {how}; parallel spine paths share evenly"]


def layer_loads(plan: VerifiedPlan, kind: str) -> LinkLoads | None:
    """Bytes over every link in the first MoE layer's dispatch or combine of one micro-batch; None without experts."""
    index = next((i for i, b in enumerate(plan.blocks.blocks) if b.kind == kind and not b.micro_batch), None)
    if index is None:
        return None
    matrix = plan.byte_matrix(index)
    source, target = np.nonzero(matrix)
    ranks = plan.blocks.blocks[index].ranks.astype(np.int64)
    size = np.tile(matrix[source, target], len(ranks))
    return pair_loads(topology(plan.spec.cluster), ranks[:, source].reshape(-1), ranks[:, target].reshape(-1), size)


def _load_lines(plan: VerifiedPlan, kind: str, loads: LinkLoads) -> list[str]:
    layer = next(b.layer for b in plan.blocks.blocks if b.kind == kind)
    lines = [f"{kind} of layer {layer}, busiest link of each kind:"]
    seconds = loads.utilization(1.0)
    for number, name in enumerate(LINK_KINDS):
        members = np.flatnonzero(loads.topology.kind_of_link == number)
        link = int(members[np.argmax(seconds[members])])
        if loads.tokens[link]:
            place = loads.topology.names[link].removeprefix(name).strip()
            lines.append(
                f"  {name:<12}{place:<18}{format_bytes(int(loads.tokens[link])):>10}{format_seconds(seconds[link]):>12}"
            )
    return lines
