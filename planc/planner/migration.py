"""Fewest bytes moved: of the placements that are alike to the network, the one nearest to the current plan.

GPUs of a node, and nodes of a leaf pod, can trade their contents without changing which copies share a node or pod. Who
takes whose contents is an assignment problem, solved exactly at each level.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planc.planner.fabric import Fabric
from planc.planner.tables import EMPTY

Judge = Callable[[np.ndarray], float]


def nearest(fabric: Fabric, table: np.ndarray, current: np.ndarray, judge: Judge) -> np.ndarray:
    """Rename nodes within their pods, then GPUs within their nodes, to keep most copies where ``current`` has them.

    ``judge`` gives what must not rise (the layer's link time): sources stay where they are, so a renamed node may see
    other loads, and then the renaming of nodes is left out, or both. int32 [holders, slots].
    """
    limit = judge(table) * (1 + 1e-12)
    moved = _nodes_renamed(fabric, table, current)
    for candidate in (_holders_renamed(fabric, moved, current), _holders_renamed(fabric, table, current)):
        if judge(candidate) <= limit:
            return candidate
    return table


def kept(table: np.ndarray, current: np.ndarray) -> np.ndarray:
    """How many copies holder i of ``table`` shares with holder j of ``current``, int64 [holders, holders]."""
    most = int(max(table.max(), current.max())) + 1
    one, two = (_holds(part, most) for part in (table, current))
    return np.asarray(one.astype(np.int64) @ two.astype(np.int64).T)


def _holds(table: np.ndarray, experts: int) -> np.ndarray:
    holds = np.zeros((len(table), experts + 1), dtype=bool)
    holds[np.arange(len(table))[:, None], np.where(table == EMPTY, experts, table)] = True
    return holds[:, :experts]


def _holders_renamed(fabric: Fabric, table: np.ndarray, current: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    result = table.copy()
    for node in range(len(fabric.node_numbers)):
        members = np.flatnonzero(fabric.node == node)
        rows, columns = linear_sum_assignment(-kept(table[members], current[members]))
        result[members[columns]] = table[members[rows]]
    return result


def _nodes_renamed(fabric: Fabric, table: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Nodes of one pod with the same number of holders trade their contents."""
    from scipy.optimize import linear_sum_assignment

    result = table.copy()
    sizes = np.bincount(fabric.node)
    for pod in range(int(fabric.pod.max()) + 1):
        for size in np.unique(sizes[fabric.pod == pod]).tolist():
            nodes = np.flatnonzero((fabric.pod == pod) & (sizes == size))
            if len(nodes) < 2:
                continue
            members = np.stack([np.flatnonzero(fabric.node == n) for n in nodes])
            worth = np.array([[_best_kept(table[a], current[b]) for b in members] for a in members])
            rows, columns = linear_sum_assignment(-worth)
            for a, b in zip(members[rows], members[columns], strict=True):
                result[b] = table[a]
    return result


def _best_kept(table: np.ndarray, current: np.ndarray) -> int:
    """Copies kept when the contents of one node go to another one in the best order."""
    from scipy.optimize import linear_sum_assignment

    together = kept(table, current)
    return int(together[linear_sum_assignment(-together)].sum())
