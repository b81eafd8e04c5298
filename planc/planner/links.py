"""Copies onto holders so that the busiest link carries as little as can be: a search led by prices.

Every link gets a price: how much the crowding of the fabric (a sum of high powers of link utilisation) grows with one
more token on it. From the prices follow, for every copy and every node, what the copy costs there and what it saves
where it is; the swaps that these promise most for are then measured exactly, and those that keep the promise are made.
Prices are whole numbers, so that the order of sums, and with it the plan, is the same on every machine.

In node-deduplicated mode the copies of one token on one node share its transfer, which is why swaps are measured and not
only priced; a sum over links, or the number of nodes that a token visits, would be the wrong aim: lowering it was seen to
raise the busiest link (clustering piles hot experts up).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from planc.planner.fabric import Fabric, Transfer

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_PRICE = 2**20  #: the highest price of a link
_CREDIBLE = 100.0  #: tokens from a source to a node at which its own count weighs as much as its pod's average
_EVEN = 1000.0  #: tokens of a source at which its share of all tokens is believed as much as an even one
_SWEEPS = 60  #: price rounds at most for each power
_TRIES = 48  #: swaps measured in a round
_SHAKES = 12  #: fresh starts of a small problem


@dataclass(frozen=True, eq=False)
class Demand:
    """Which copies every row needs and where it comes from. A row is a token of one **block**: a layer or a scenario,
    whose links are counted by themselves. ``rows``: int64 [n], ``copies``: int64 [n]: row needs copy, pairwise;
    ``source``: int64 [rows]; ``block``: int64 [rows]; ``weight``: float [blocks], seconds that a block's utilisation
    counts for one token (so that blocks of different size compare)."""

    rows: np.ndarray
    copies: np.ndarray
    source: np.ndarray
    block: np.ndarray
    weight: np.ndarray

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.weight)


class LinkState:
    """Link loads of a placement, kept up to date swap by swap.

    ``at``: int64 [copies], the holder of each copy (mutated by `swap`). Loads are float [blocks · (links + 1)]: tokens,
    with each source's counts drawn towards its pod's average by how little was seen of it.
    """

    def __init__(
        self, fabric: Fabric, demand: Demand, copies: int, at: np.ndarray, transfer: Transfer, *, smooth: bool
    ) -> None:
        from scipy.sparse import csr_matrix

        self.fabric, self.demand, self.transfer, self.smooth = fabric, demand, transfer, smooth
        self.at = at.astype(np.int64).copy()
        self.sources, self.links = len(fabric.sources), fabric.nowhere + 1
        self.port = demand.block * self.sources + demand.source  # a source in a block, [rows]
        self.ports = demand.blocks * self.sources
        rows = len(demand.source)
        ones = np.ones(len(demand.rows))
        self.needs: csr_matrix = csr_matrix((ones, (demand.copies, demand.rows)), shape=(copies, rows))
        self.needs.sort_indices()
        self.rows_of = np.split(self.needs.indices, self.needs.indptr[1:-1])
        self._mark = np.zeros(rows, dtype=np.int8)
        self._smoothing()
        self.cell, far, near = fabric.ways(transfer)
        cells = far.shape[1]
        self.hits = np.zeros((rows, cells), dtype=np.int16)
        np.add.at(self.hits, (demand.rows, self.cell[self.at[demand.copies]]), 1)
        offset = np.arange(demand.blocks)[:, None] * self.links
        #: links from every port, port after port, to each cell and to each holder; [cells or holders, ports · n]
        self.far, self.near = (
            np.stack([(part[:, i].reshape(1, -1) + offset).reshape(-1) for i in range(part.shape[1])])
            for part in (far, near)
        )
        self.cost = (fabric.seconds_per_byte[None, :] * demand.weight[:, None]).reshape(-1)
        self.loads = self._count_all()

    # --- counting -----------------------------------------------------------------------------------------------------

    def _smoothing(self) -> None:
        """How far a source's counts are drawn to those of its pod: all the way with nothing seen, hardly with much. The
        shares of sources in their pod, and of pods in all tokens, are drawn to even ones likewise."""
        pods = int(self.fabric.source_pod.max()) + 1
        self.pod = (np.arange(self.demand.blocks)[:, None] * pods + self.fabric.source_pod[None, :]).reshape(-1)
        self.pods = self.demand.blocks * pods
        seen = np.bincount(self.port, minlength=self.ports).astype(float)
        per_pod = np.bincount(self.pod, weights=seen, minlength=self.pods)
        rows = len(self.demand.source)
        even = _EVEN / (_EVEN + rows / self.ports)
        size = np.bincount(self.pod)  # sources of a pod
        self.share = (1 - even) * seen / np.maximum(per_pod, 1.0)[self.pod] + even / size[self.pod]
        block = np.repeat(np.arange(self.demand.blocks), pods)  # of each pod
        total = np.bincount(block, weights=per_pod)[block]
        even = _EVEN / (_EVEN + rows / self.pods) if self.smooth else 0.0
        wanted = (1 - even) * per_pod + even * total * size / self.sources
        self.scale = np.where(per_pod > 0, wanted / np.maximum(per_pod, 1.0), 1.0)[self.pod]
        nodes = len(self.fabric.node_numbers)
        cells = min(len(self.demand.rows), rows * nodes) / (self.ports * nodes)  # most tokens of a port to a node, mean
        self.drawn = _CREDIBLE / (_CREDIBLE + cells) if self.smooth else 0.0

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of these rows by port, smoothed; float [ports]."""
        port = self.port[rows]
        own = np.bincount(port, minlength=self.ports)
        if not self.drawn:
            return own.astype(float)
        pods = np.bincount(self.pod[port], minlength=self.pods)
        return np.asarray(((1 - self.drawn) * own + self.drawn * pods[self.pod] * self.share) * self.scale)

    def _smooth(self, own: np.ndarray) -> np.ndarray:
        """The same for many counts at once, [n, ports]."""
        order = np.argsort(self.pod, kind="stable")
        pods = np.add.reduceat(own[:, order], np.searchsorted(self.pod[order], np.arange(self.pods)), axis=1)
        return np.asarray(((1 - self.drawn) * own + self.drawn * pods[:, self.pod] * self.share) * self.scale)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of each copy by port, smoothed; float [copies, ports]."""
        return self._smooth(self._raw_tokens)

    def _count_all(self) -> np.ndarray:
        rows, cell = np.nonzero(self.hits)
        weight = np.ones(len(rows)) if self.transfer == "dedup" else self.hits[rows, cell]
        size = self.hits.shape[1] * self.ports
        cells = np.bincount(cell * self.ports + self.port[rows], weight, size).reshape(-1, self.ports)
        far, near = self._spread(self.far, self._smooth(cells)), self._spread(self.near[self.at], self.tokens)
        return np.asarray(far + near)

    def _spread(self, links: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Loads of ``tokens`` [n, ports], each over its port's ``links`` [n, ports · m]."""
        weights = np.repeat(tokens.reshape(-1), links.shape[1] // self.ports)
        return np.asarray(np.bincount(links.reshape(-1), weights, self.demand.blocks * self.links))

    # --- seeing and making swaps --------------------------------------------------------------------------------------

    def utilization(self) -> np.ndarray:
        """Seconds that every link of every block is busy, float [blocks · (links + 1)]."""
        return np.asarray(self.loads * self.cost)

    def _alone(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that need one of two copies and not the other."""
        one, two = self.rows_of[a], self.rows_of[b]
        mark = self._mark  # a scratch pad: much quicker than comparing sorted lists
        mark[one] += 1
        mark[two] += 1
        alone = one[mark[one] == 1], two[mark[two] == 1]
        mark[one] = 0
        mark[two] = 0
        return alone

    def change(self, a: int, b: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """How the loads change when two copies trade places, and the rows that need one of them alone."""
        na, nb = int(self.cell[self.at[a]]), int(self.cell[self.at[b]])
        links, tokens = [], []
        one, two = alone = self._alone(a, b)
        if na != nb:
            if self.transfer == "dedup":
                hits = self.hits
                at_a = self.counts(two[hits[two, na] == 0]) - self.counts(one[hits[one, na] == 1])
                at_b = self.counts(one[hits[one, nb] == 0]) - self.counts(two[hits[two, nb] == 1])
            else:
                at_a = self.tokens[b] - self.tokens[a]
                at_b = -at_a
            links += [self.far[na], self.far[nb]]
            width = self.far.shape[1] // self.ports
            tokens += [np.repeat(at_a, width), np.repeat(at_b, width)]
        moved = np.repeat(self.tokens[b] - self.tokens[a], self.near.shape[1] // self.ports)
        links += [self.near[self.at[a]], self.near[self.at[b]]]
        tokens += [moved, -moved]
        total = np.bincount(np.concatenate(links), np.concatenate(tokens), self.demand.blocks * self.links)
        return total, alone

    def swap(self, a: int, b: int, change: np.ndarray, alone: tuple[np.ndarray, np.ndarray]) -> None:
        """Trade the places of two copies, given what `change` said of it."""
        na, nb = self.cell[self.at[[a, b]]].tolist()
        one, two = alone
        self.hits[one, na] -= 1
        self.hits[two, na] += 1
        self.hits[two, nb] -= 1
        self.hits[one, nb] += 1
        self.at[a], self.at[b] = self.at[b], self.at[a]
        self.loads = self.loads + change

    def promises(self, prices: np.ndarray) -> np.ndarray:
        """What every swap of two copies saves at these link prices, float [copies, copies], whole numbers; exact but for
        tokens that need both. ``prices``: whole numbers [blocks · (links + 1)]."""
        far = self._drawn_together(self._prices(prices, self.far))  # [ports, cells]
        cell = self.cell[self.at]
        every = np.arange(len(self.at))
        if self.transfer == "dedup":
            by_row = far[self.port]
            adds = self.needs @ np.where(self.hits == 0, by_row, 0.0)
            saves = (self.needs @ np.where(self.hits == 1, by_row, 0.0))[every, cell]
        else:
            adds = self._raw_tokens @ far
            saves = adds[every, cell]
        gain = saves[:, None] - adds[:, cell]
        gain[cell[:, None] == cell[None, :]] = 0.0
        if prices[self._nvlink].any():
            costs = self._raw_tokens @ self._drawn_together(self._prices(prices, self.near))  # [copies, holders]
            gain += costs[every, self.at][:, None] - costs[:, self.at]
        return np.asarray(gain + gain.T)

    def _prices(self, prices: np.ndarray, links: np.ndarray) -> np.ndarray:
        """Price of everything on the way from each port; [ports, cells or holders]."""
        return np.asarray(prices[links].reshape(len(links), self.ports, -1).sum(axis=2).T)

    @cached_property
    def _nvlink(self) -> np.ndarray:
        """Numbers of the NVLink links of all blocks."""
        end = self.fabric.topology.first["nic_up"]
        return (np.arange(self.demand.blocks)[:, None] * self.links + np.arange(end)).reshape(-1)

    @cached_property
    def _raw_tokens(self) -> np.ndarray:
        """Tokens of each copy by port as counted, float [copies, ports]."""
        return tokens_by_port(self.demand.copies, self.port[self.demand.rows], self.needs.shape[0], self.ports)

    def _drawn_together(self, prices: np.ndarray) -> np.ndarray:
        """Prices by port, smoothed as the counts are; rounded to whole numbers, [ports, any]."""
        prices = prices * self.scale[:, None]
        order = np.argsort(self.pod, kind="stable")
        starts = np.searchsorted(self.pod[order], np.arange(self.pods))
        mean = np.add.reduceat((prices * self.share[:, None])[order], starts, axis=0)
        return np.asarray(np.rint((1 - self.drawn) * prices + self.drawn * mean[self.pod]))


def tokens_by_port(copy: np.ndarray, port: np.ndarray, copies: int, ports: int) -> np.ndarray:
    """How many of the pairs (copy, port) are alike, float [copies, ports]."""
    return np.bincount(copy * ports + port, minlength=copies * ports).reshape(copies, ports).astype(float)


def crowding(relative: np.ndarray, power: int) -> float:
    """Sum of a power of two of utilisation relative to the busiest link at the start of a round."""
    for _ in range(power.bit_length() - 1):
        relative = relative * relative
    return float(relative.sum())


def improve(state: LinkState, expert: np.ndarray, seed: int, small: bool) -> None:
    """Swap copies of ``state`` until no promising swap lowers the crowding.

    ``expert``: int64 [copies], equal numbers may not share a holder (-1 stands for an empty slot). A ``small`` problem has every swap measured, and starts again from shaken placements.
    """
    for power in (4, 16, 64) if small else (4, 16):
        _descend(state, expert, power, small)
    if not small:
        return
    random = np.random.default_rng([seed, len(expert)])
    best, busiest = state.at.copy(), state.utilization().max()
    for _ in range(_SHAKES):
        for _ in range(3):
            a, b = random.integers(0, len(expert), 2).tolist()
            if a != b and _may_swap(state, expert, a, b):
                state.swap(a, b, *state.change(a, b))
        _descend(state, expert, 64, small)
        now = state.utilization().max()
        if now < busiest * (1 - 1e-9):
            best, busiest = state.at.copy(), now
        elif now > busiest * (1 + 1e-9):
            _return_to(state, best)
    _return_to(state, best)


def _return_to(state: LinkState, at: np.ndarray) -> None:
    fresh = LinkState(state.fabric, state.demand, len(at), at, state.transfer, smooth=state.smooth)
    state.at, state.hits, state.loads = fresh.at, fresh.hits, fresh.loads


def _may_swap(state: LinkState, expert: np.ndarray, a: int, b: int) -> bool:
    """Whether no holder would have an expert twice (or two empty slots, as -1 is a number like any other)."""
    here, there = state.at[a], state.at[b]
    if here == there or expert[a] == expert[b]:
        return False
    return not ((expert[state.at == there] == expert[a]).any() or (expert[state.at == here] == expert[b]).any())


def _descend(state: LinkState, expert: np.ndarray, power: int, every: bool) -> None:
    first, second = np.triu_indices(len(expert), 1)
    for _ in range(_SWEEPS):
        utilization = state.utilization()
        top = float(utilization.max())
        if top <= 0:
            return
        relative = utilization / top
        price = power * relative ** (power - 1) * state.cost
        gain = state.promises(np.rint(price * (_PRICE / price.max())))[first, second]
        tries = len(gain) if every else min(4 * _TRIES, len(gain))
        chosen = np.argpartition(-gain, tries - 1)[:tries]
        chosen = chosen[np.lexsort((chosen, -gain[chosen]))]
        if not every:
            chosen = chosen[gain[chosen] > 0]
        if not _make_swaps(
            state,
            expert,
            power,
            top,
            list(zip(first[chosen].tolist(), second[chosen].tolist(), strict=True)),
            every,
        ):
            return


def _make_swaps(
    state: LinkState,
    expert: np.ndarray,
    power: int,
    top: float,
    pairs: list[tuple[int, int]],
    every: bool,
) -> int:
    """Measure the swaps in turn and make those that lower the crowding; each copy moves once."""
    made, measured = 0, 0
    touched: set[int] = set()
    now = crowding(state.utilization() / top, power)
    for a, b in pairs:
        if a in touched or b in touched or not _may_swap(state, expert, a, b):
            continue
        measured += 1
        if measured > _TRIES and not every:
            break
        change, alone = state.change(a, b)
        after = crowding((state.loads + change) * state.cost / top, power)
        if after < now * (1 - 1e-9):
            state.swap(a, b, change, alone)
            now = after
            made += 1
            touched |= {a, b}
    return made
