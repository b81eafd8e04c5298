"""Certificates: what no placement of the given copies can beat, for each objective.

The busiest link is at least as busy as any weighted mean of links, so every way of taking links together gives a bound:
all links of one kind; the links that leave one pod or node (a cut); the NIC ports of whichever node holds one copy.

In direct mode a weighted sum of link loads is a sum over copies, so its least value is an assignment problem, solved
exactly. In node-deduplicated mode the m experts of a token on one node share a transfer, and each answers for 1/m of it.
1/m lies above each of the lines a − b(m − 1) through two neighbouring points of it, and m − 1 summed over a copy's tokens
is at most what it shares with the best partners that fit beside it. So a copy answers for at least a · (its tokens) −
b · (what it can share), and the sum is over copies again (the idea of the Gilmore-Lawler bound of quadratic assignment).
"""

from __future__ import annotations

import numpy as np

from planc.planner.fabric import Fabric, Transfer, Ways
from planc.planner.links import Demand, tokens_by_port

#: (a, b) of the lines under 1/m through m = j and j + 1, for j = 1, 2, 3
_LINES = tuple((1 / j + (j - 1) / (j * (j + 1)), 1 / (j * (j + 1))) for j in (1, 2, 3))
_FAR_KINDS = ("nic_up", "nic_down", "spine_up", "spine_down")


def link_bound(fabric: Fabric, demand: Demand, copies: int, slots: int, transfer: Transfer) -> tuple[float, str]:
    """(seconds per byte of a token, name of the binding argument): the busiest link of one layer's dispatch is busy at
    least that long × the bytes of a token, wherever the copies are. ``demand`` has one block of weight 1."""
    tokens = tokens_by_port(demand.copies, demand.source[demand.rows], copies, len(fabric.sources))
    ways = fabric.ways(transfer)
    found = [
        (_one_copy(fabric, ways, tokens), "the ports of the node that holds the hottest copy"),
        (_last_hop(fabric, ways, tokens), "NVLink into the GPU that holds the hottest copy"),
    ]
    room = np.bincount(fabric.node) * slots
    shared = _shared(fabric, demand, copies, room, transfer)
    for up in (0, 2):  # NIC, spine
        crosses = (ways.far[:, :, up::4] != fabric.nowhere).sum(axis=2)  # transfers that cross, [S, cells]
        if not crosses.any():
            continue
        least = _least_transfers(ways, tokens, crosses, shared.sum(axis=0), slots)
        for column in (up, up + 1):
            links = np.unique(ways.far[:, :, column::4])
            capacity = fabric.topology.capacity[links[links != fabric.nowhere]].sum()
            found.append((least / capacity, f"all {_FAR_KINDS[column]} links together"))
        found += _cuts(fabric, ways, tokens, crosses, shared, up, slots, transfer)
    return max(found)


def _one_copy(fabric: Fabric, ways: Ways, tokens: np.ndarray) -> float:
    """A copy's tokens enter its node by the ports of their rails: the busiest of them, at the best node for it; the
    largest over all copies. ``tokens``: [copies, S]."""
    enter = ways.far[:, :, 1]  # [S, cells]
    best = np.full(len(tokens), np.inf)
    for node in range(enter.shape[1]):
        ports, port = np.unique(enter[:, node], return_inverse=True)
        by_port = tokens @ (port.reshape(-1)[:, None] == np.arange(len(ports))).astype(float)
        best = np.minimum(best, (by_port * fabric.seconds_per_byte[ports]).max(axis=1))
    return float(best.max(initial=0.0))


def _last_hop(fabric: Fabric, ways: Ways, tokens: np.ndarray) -> float:
    """A copy's tokens come to its GPU over NVLink, but for those that enter there; as in `_one_copy`."""
    down = ways.near[:, :, fabric.holders.shape[1]]  # of the holder's first rank; [S, G]
    return float((tokens @ fabric.seconds_per_byte[down]).min(axis=1).max(initial=0.0))


def _shared(fabric: Fabric, demand: Demand, copies: int, room: np.ndarray, transfer: Transfer) -> np.ndarray:
    """Tokens that a copy has in common with the best partners that fit beside it, by pod of the source; float [pods,
    copies]. Zero in direct mode, where nothing is shared."""
    from scipy.sparse import csr_matrix

    pods = int(fabric.source_pod.max()) + 1
    common = np.zeros((pods, copies))
    partners = min(int(room.max()) - 1, copies - 1)
    if transfer == "direct" or partners < 1:
        return common
    needs = csr_matrix((np.ones(len(demand.rows)), (demand.rows, demand.copies)), shape=(len(demand.source), copies))
    pod = fabric.source_pod[demand.source]
    for p in range(pods):
        part = needs[np.flatnonzero(pod == p)]
        together = np.asarray((part.T @ part).todense())
        np.fill_diagonal(together, 0.0)
        best = np.partition(together, copies - partners, axis=1)[:, copies - partners :]
        common[p] = best.sum(axis=1)
    return common


def _least_transfers(ways: Ways, tokens: np.ndarray, crosses: np.ndarray, shared: np.ndarray, slots: int) -> float:
    """Least number of transfers that cross, over all placements: an assignment of copies to holders."""
    from scipy.optimize import linear_sum_assignment

    cost = (tokens @ crosses)[:, ways.cell]  # [copies, holders]
    cost = _answers_for(cost, shared[:, None])
    if slots > 1:
        cost = np.repeat(cost, slots, axis=1)
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].sum())


def _cuts(
    fabric: Fabric,
    ways: Ways,
    tokens: np.ndarray,
    crosses: np.ndarray,
    shared: np.ndarray,
    up: int,
    slots: int,
    transfer: Transfer,
) -> list[tuple[float, str]]:
    """What must leave over some links even with the best copies on the near side: over every single link in direct mode,
    over all links of a pod together where transfers are shared."""
    if transfer == "direct":
        cut, where = (
            ways.far[:, :, up::4].min(axis=(1, 2)),
            f"one {_FAR_KINDS[up]} link",
        )  # `nowhere` is the largest number
    else:
        cut, where = fabric.source_pod, f"the {_FAR_KINDS[up]} links of one pod"
    found = []
    for number in np.unique(cut).tolist():
        inside = np.flatnonzero(cut == number)
        links = np.unique(ways.far[inside, :, up::4])
        capacity = fabric.topology.capacity[links[links != fabric.nowhere]].sum()
        if not capacity:
            continue
        near = np.logical_not(crosses[inside].all(axis=0))  # nodes that some of these sources reach without the links
        room = int(near[ways.cell].sum()) * slots
        common = shared[np.unique(fabric.source_pod[inside])].sum(axis=0)
        worth = _answers_for(tokens[:, inside].sum(axis=1), common)  # of a copy on the far side
        each = crosses[inside][crosses[inside] > 0].min()  # transfers of a token to a copy there, one per rank
        outside = np.sort(worth)[: max(0, len(worth) - room)].sum() * each
        found.append((float(outside / capacity), where))
    return found


def _answers_for(tokens: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Transfers that a copy answers for at least, given its tokens and what it can share with partners."""
    return np.asarray(np.maximum.reduce([a * tokens - b * shared for a, b in _LINES] + [np.zeros_like(tokens)]))
