"""The placements that planc is measured against, and that it returns where they are better: what engines do without a
map, longest-first by node, and the greedy that expert-parallel load balancers publish.
"""

from __future__ import annotations

import heapq

import numpy as np

from planc.planner.apportion import apportion
from planc.planner.balance import longest_first
from planc.planner.tables import EMPTY, table_of
from planc.units import split_evenly


def identity(experts: int, holders: int, slots: int, copies: int) -> np.ndarray:
    """Consecutive experts on consecutive holders, and the copies after the last expert begin again with the first;
    holders differ by at most one copy. int32 [holders, slots]."""
    expert = np.arange(copies) % experts
    holder = np.repeat(np.arange(holders), split_evenly(copies, holders))
    return table_of(expert, holder, holders, slots)


def greedy(loads: np.ndarray, holders: int, slots: int, copies: int) -> np.ndarray:
    """Replicate the expert with the largest share until the slots are full, then longest first onto the emptiest holder.

    With one slot a holder it leaves every first copy on the holder of its number, as the published code does. Copies of
    an expert are kept apart here, which the published code does not do. int32 [layers, holders, slots].
    """
    counts = apportion(loads, copies, holders)
    if slots > 1:
        return longest_first(loads, counts, holders, slots)
    table = np.full((len(loads), holders, 1), EMPTY, dtype=np.int32)
    for layer, row in enumerate(counts):
        extra = np.repeat(np.arange(len(row)), row - 1)
        table[layer, : len(row), 0] = np.arange(len(row))
        table[layer, len(row) : len(row) + len(extra), 0] = extra
    return table


def hierarchical(loads: np.ndarray, node: np.ndarray, slots: int, copies: int, groups: int) -> np.ndarray | None:
    """One layer's greedy with expert groups kept whole on nodes, as balancers do for gates that limit a token to a few
    groups: groups onto nodes, heaviest first, then `greedy` inside every node. None where groups, copies or GPUs do not
    divide over the nodes. ``loads``: float [E]. int32 [holders, slots]."""
    nodes, experts = int(node.max()) + 1, len(loads)
    per_node = np.bincount(node)
    if groups % nodes or copies % nodes or experts % groups or len(set(per_node.tolist())) > 1:
        return None
    members = np.arange(experts).reshape(groups, -1)
    weight = loads[members].sum(axis=1)
    home = longest_first(weight[None], np.ones((1, groups), dtype=np.int64), nodes, groups // nodes)[0]
    table = np.full((len(node), slots), EMPTY, dtype=np.int32)
    for n in range(nodes):
        own = np.sort(members[home[n]].reshape(-1))
        if not len(own) <= copies // nodes <= len(own) * per_node[n]:
            return None
        inner = greedy(loads[own][None], int(per_node[n]), slots, copies // nodes)[0]
        table[node == n] = np.where(inner == EMPTY, EMPTY, own[inner])
    return table


def longest_first_by_node(loads: np.ndarray, counts: np.ndarray, node: np.ndarray, slots: int) -> np.ndarray:
    """One layer's copies, heaviest first, onto the node with the least load so far, and inside it onto its emptiest
    holder without that expert; holders differ by at most one copy. ``loads``, ``counts``: [E]; ``node``: int [holders].
    int32 [holders, slots]."""
    share = loads / counts
    held: list[set[int]] = [set() for _ in node]
    weight = [0.0] * len(node)
    members = [np.flatnonzero(node == n).tolist() for n in range(int(node.max()) + 1)]
    queue = [(0.0, 0, n) for n in range(len(members))]  # load, copies, node
    table = np.full((len(node), slots), EMPTY, dtype=np.int32)
    full = int(counts.sum()) - len(node) * (slots - 1)  # holders that may still fill their last slot
    for e in np.argsort(-share, kind="stable").tolist():
        for _ in range(int(counts[e])):
            aside = []
            while True:
                if not queue:
                    return np.asarray(longest_first(loads[None], counts[None], len(node), slots)[0])
                load, number, n = heapq.heappop(queue)
                open_ = [h for h in members[n] if len(held[h]) < slots - (full <= 0)]
                free = [h for h in open_ if e not in held[h]]
                if free:
                    break
                if open_:
                    aside.append((load, number, n))
            h = min(free, key=lambda h: (len(held[h]), weight[h]))
            table[h, len(held[h])] = e
            held[h].add(e)
            full -= len(held[h]) == slots
            weight[h] += float(share[e])
            heapq.heappush(queue, (load + float(share[e]), number + 1, n))
            for entry in aside:
                heapq.heappush(queue, entry)
    return table
