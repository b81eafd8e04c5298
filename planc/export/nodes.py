"""Where the ranks of a plan run: instances of an engine on whole nodes, ranks numbered node by node.

planc's replicas (dp) share nothing, so each is an instance of the engine by itself: pp · ep GPUs with a master of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.target import refusal
from planc.verify import VerifiedPlan


@dataclass(frozen=True, slots=True)
class Instance:
    """One replica: ``nodes`` of the cluster in order, ``gpus`` of it on each of them, ``ranks`` in all; ``first_gpu``: of the
    node, where several replicas share one."""

    number: int
    nodes: tuple[int, ...]
    gpus: int
    ranks: int
    first_gpu: int


def instances(plan: VerifiedPlan) -> list[Instance]:
    """The instances of a plan for which `node_faults` finds nothing."""
    par, cluster = plan.parallelism, plan.spec.cluster
    found = []
    for number in range(par.dp):
        first = number * par.replica_size
        on = cluster.node_of_rank[first : first + par.replica_size]
        nodes = np.unique(on)
        gpus = par.replica_size // len(nodes)
        found.append(Instance(number, tuple(nodes.tolist()), gpus, par.replica_size, int(cluster.local_of_rank[first])))
    return found


def node_faults(plan: VerifiedPlan, title: str) -> Iterator[Diagnostic]:
    """Why replicas are no instances of an engine: one that has several nodes has as many GPUs on each of them."""
    par, cluster = plan.parallelism, plan.spec.cluster
    for number in range(par.dp):
        first = number * par.replica_size
        counts = np.bincount(cluster.node_of_rank[first : first + par.replica_size])
        counts = counts[counts > 0]
        if len(set(counts.tolist())) > 1:
            message = f"replica {number} has {counts.min()} GPUs on one node and {counts.max()} on another"
            per_node = int(counts.max())
            change = f"choose degrees whose product is a multiple of the {per_node} GPUs of a node, or divides them"
            yield refusal(title, message, change, "parallelism")
            return
