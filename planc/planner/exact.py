"""The least busy busiest link of a small layer, proven: a mixed-integer program for HiGHS.

For checks and certificates of up to about 16 copies; the search in `links.py` does the planning.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planc.planner.fabric import Fabric, Transfer
from planc.planner.links import Demand


class Exact(NamedTuple):
    """``seconds``: the busiest link's time in the best placement found; ``bound``: proven least; ``at``: holder of each
    copy, int64 [copies]."""

    seconds: float
    bound: float
    at: np.ndarray


def least_busiest(
    fabric: Fabric, demand: Demand, copies: int, transfer: Transfer, *, relaxed: bool = False, limit: float = 60.0
) -> Exact | None:
    """Minimise the largest link time over all placements with one copy a holder; ``relaxed`` drops whole numbers and
    gives the bound of the linear program alone. None when HiGHS finds nothing within ``limit`` seconds.

    x[c, g]: copy c is on holder g. y[r, n]: row r needs node n, at least as large as each of its copies' x there (rows
    with the same source and copies are one, counted). z: at least the time of every link.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    ways = fabric.ways(transfer)
    holders, nodes = len(fabric.holders), ways.far.shape[1]
    kinds, number = _like_rows(demand)
    xs, ys = copies * holders, len(kinds) * nodes if transfer == "dedup" else 0
    z = xs + ys
    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def constraint(terms: list[tuple[int, float]], least: float, most: float) -> None:
        entries.extend((len(low), column, value) for column, value in terms)
        low.append(least)
        high.append(most)

    for c in range(copies):
        constraint([(c * holders + g, 1.0) for g in range(holders)], 1, 1)
    for g in range(holders):
        constraint([(c * holders + g, 1.0) for c in range(copies)], 0, 1)
    on_node = [np.flatnonzero(ways.cell == n).tolist() for n in range(nodes)]
    load: dict[int, dict[int, float]] = {}

    def add(link: int, column: int, tokens: float) -> None:
        if link % (fabric.nowhere + 1) != fabric.nowhere:
            row = load.setdefault(link, {})
            row[column] = row.get(column, 0.0) + tokens

    for r, (block, source, needed) in enumerate(kinds):
        base = block * (fabric.nowhere + 1)
        for n in range(nodes):
            if transfer == "dedup":
                for c in needed:
                    terms = [(xs + r * nodes + n, 1.0), *((c * holders + g, -1.0) for g in on_node[n])]
                    constraint(terms, 0, np.inf)
                for link in ways.far[source, n].tolist():
                    add(base + link, xs + r * nodes + n, number[r])
        for c in needed:
            for g in range(holders):
                for link in ways.near[source, g].tolist():
                    add(base + link, c * holders + g, number[r])
                if transfer == "direct":
                    for link in ways.far[source, ways.cell[g]].tolist():
                        add(base + link, c * holders + g, number[r])
    cost = (fabric.seconds_per_byte[None, :] * demand.weight[:, None]).reshape(-1)
    scale = 1 / cost.max()  # HiGHS wants numbers near one
    for link, row in load.items():
        constraint([(z, 1.0), *((column, -tokens * cost[link] * scale) for column, tokens in row.items())], 0, np.inf)
    rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
    matrix = coo_matrix((values, (rows, columns)), shape=(len(low), z + 1)).tocsr()
    whole = np.zeros(z + 1, dtype=np.int64)
    if not relaxed:
        whole[:xs] = 1
    upper = np.append(np.ones(z), np.inf)
    goal = np.append(np.zeros(z), 1.0)
    found = milp(
        goal,
        constraints=LinearConstraint(matrix, low, high),
        integrality=whole,
        bounds=Bounds(0, upper),
        options={"time_limit": limit},
    )
    if found.x is None:
        return None
    at = found.x[:xs].reshape(copies, holders).argmax(axis=1)
    bound = found.mip_dual_bound if not relaxed else found.fun
    return Exact(float(found.fun) / scale, float(bound) / scale, at)


def _like_rows(demand: Demand) -> tuple[list[tuple[int, int, tuple[int, ...]]], list[float]]:
    """Distinct (block, source, copies needed) of all rows, and how many rows are like each."""
    order = np.lexsort((demand.copies, demand.rows))
    rows, copies = demand.rows[order], demand.copies[order]
    starts = np.searchsorted(rows, np.arange(len(demand.source) + 1))
    counted: dict[tuple[int, int, tuple[int, ...]], float] = {}
    for r in range(len(demand.source)):
        key = (int(demand.block[r]), int(demand.source[r]), tuple(copies[starts[r] : starts[r + 1]].tolist()))
        counted[key] = counted.get(key, 0.0) + 1.0
    return list(counted), list(counted.values())
