"""Where the ranks of a plan run: instances of an engine on whole nodes, ranks numbered node by node.

planc's replicas (dp) share nothing, so each is an instance of the engine by itself: pp · ep GPUs with a master of its own.
"""

from __future__ import annotations

import math
import re
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
    """Why replicas are no instances of an engine: one that has several nodes has the same GPUs of each of them."""
    par, cluster = plan.parallelism, plan.spec.cluster
    for number in range(par.dp):
        first = number * par.replica_size
        on, local = (ids[first : first + par.replica_size] for ids in (cluster.node_of_rank, cluster.local_of_rank))
        _, begin, counts = np.unique(on, return_index=True, return_counts=True)
        message = ""
        if np.ptp(counts):
            message = f"replica {number} has {counts.min()} GPUs on one node and {counts.max()} on another"
        elif np.ptp(local[begin]):
            message = f"replica {number} begins at GPU {local[begin].max()} of one node and at GPU {local[begin].min()} of another"
        if message:
            sizes = {group.gpus_per_node for group in cluster.groups}
            change = f"set pp · ep to a divisor of {math.gcd(*sizes)}" + (
                ", or to a multiple" if len(sizes) == 1 else ""
            )
            yield refusal(title, message, change, "parallelism")
            return


def fitting(plan: VerifiedPlan) -> str:
    """The change after which replicas fit nodes, all in one way."""
    sizes = {group.gpus_per_node for group in plan.spec.cluster.groups}
    return f"set pp · ep to a divisor of {math.gcd(*sizes)}" + (", or to a multiple" if len(sizes) == 1 else "")


def of_amd(plan: VerifiedPlan) -> bool:
    """Whether the GPUs are AMD's, by their names (`mi300x`); of other names NVIDIA's are meant."""
    return any(re.match(r"(amd.*)?mi\d", group.gpu.name, re.IGNORECASE) for group in plan.spec.cluster.groups)
