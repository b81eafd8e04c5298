"""ASTRA-sim's own files: network, system, remote memory, groups, and the command that runs its analytical back-end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from planc.export.target import text_of
from planc.verify import VerifiedPlan

GIB = 1 << 30  #: bandwidths of network.yml are in GiB/s, whatever its comments say


def configuration(
    plan: VerifiedPlan, groups: Mapping[tuple[int, ...], int], prefix: str, way: str, notes: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files. ``groups``: members of collectives -> number; ``prefix`` of the traces' names."""
    bandwidth, latency = flat_network(plan)
    yield (
        "network.yml",
        text_of("astra_network.yml.j2", ranks=plan.parallelism.world_size, bandwidth=bandwidth, latency=latency),
    )
    yield "system.json", _json(_system(plan))
    yield "memory.json", _json({"memory-type": "NO_MEMORY_EXPANSION"})
    yield "comm_groups.json", _json({str(number): list(ranks) for ranks, number in groups.items()})
    yield (
        "run.sh",
        text_of("chakra.sh.j2", name=plan.spec.name, prefix=prefix, way=way, notes=notes, grouped=bool(groups)),
    )


def flat_network(plan: VerifiedPlan) -> tuple[float, float]:
    """(GiB/s, ns) of a switch that joins all ranks: the planned bandwidth of the farthest class of links in use, and half of
    its latency, because a switch is entered and left.

    One dimension, because ASTRA-sim makes rings of groups that are smaller than a network of several, and its
    congestion-aware back-end has one only.
    """
    cluster, world = plan.spec.cluster, plan.parallelism.world_size
    links = cluster.links
    if len(np.unique(cluster.domain_of_rank[:world])) == 1:
        link, latency = links.nvlink, links.nvlink.latency
    else:
        link, latency = links.nic, links.nic.latency
        latency += links.leaf.latency if links.leaf is not None else 0.0
        if links.spine is not None and len(np.unique(cluster.leaf_of_rank[:world])) > 1:
            latency += links.spine.latency
    return link.bandwidth * link.utilization / GIB, latency * 1e9 / 2


def _system(plan: VerifiedPlan) -> dict[str, object]:
    direct = {key: ["direct"] for key in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")}
    memory = min(float(group.gpu.memory_bandwidth) for group in plan.spec.cluster.groups)
    return {
        "scheduling-policy": "LIFO",
        "endpoint-delay": 0,
        "active-chunks-per-dimension": 1,
        "preferred-dataset-splits": 1,
        **{f"{name}-implementation": value for name, value in direct.items()},
        "collective-optimization": "baseline",
        "local-mem-bw": memory / 1e9,
        "boost-mode": 0,
        "roofline-enabled": 1,
        "peak-perf": 1,  # TFLOPS: num_ops of a node are its duration
        "trace-enabled": 0,
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
