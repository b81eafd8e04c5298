"""What a placement is judged by: the busiest link, the fullest holder, memory spread, bytes to move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.planner.fabric import Fabric, Transfer
from planc.planner.tables import EMPTY, copies_of, copy_index, counts_of
from planc.topology import LINK_KINDS, LinkLoads, token_loads


@dataclass(frozen=True)
class Width:
    """Bytes of one token on the way to an expert and on the way back."""

    dispatch: int
    combine: int


@dataclass(frozen=True, eq=False)
class LayerLinks:
    """Link loads of one layer's dispatch and combine."""

    dispatch: LinkLoads
    combine: LinkLoads
    width: Width

    @property
    def seconds(self) -> float:
        """Busiest link of dispatch, then of combine: the layer's exchanges take at least so long."""
        there = self.dispatch.utilization(self.width.dispatch).max()
        back = self.combine.utilization(self.width.combine).max()
        return float(there + back)

    @property
    def busiest(self) -> tuple[str, float, int]:
        """(name, seconds, tokens) of the busiest link of dispatch."""
        return self.dispatch.busiest(self.width.dispatch)

    @property
    def most_tokens(self) -> int:
        """Most tokens across any single link, whichever way."""
        return int(max(self.dispatch.tokens.max(initial=0), self.combine.tokens.max(initial=0)))

    @property
    def most_bytes(self) -> int:
        """Most bytes across any single link, whichever way."""
        there, back = self.dispatch.tokens.max(initial=0), self.combine.tokens.max(initial=0)
        return int(max(there * self.width.dispatch, back * self.width.combine))

    def busiest_by_kind(self) -> np.ndarray:
        """Seconds of the busiest link of each kind in dispatch, float [kinds of `LINK_KINDS`]."""
        kinds = self.dispatch.topology.kind_of_link
        seconds = self.dispatch.utilization(self.width.dispatch)
        return np.array([seconds[kinds == k].max(initial=0.0) for k in range(len(LINK_KINDS))])


def layer_links(
    fabric: Fabric,
    table: np.ndarray,
    topk: np.ndarray,
    source: np.ndarray,
    experts: int,
    transfer: Transfer,
    width: Width,
) -> LayerLinks:
    """Walk every token of a layer over the links.

    ``topk``: int [tokens, k]; ``source``: int [tokens], index into ``fabric.sources``. Dispatch reaches every rank of an
    expert split by expert TP; combine leaves its first rank, where the sum is.
    """
    _, holder = copies_of(table)
    chosen = copy_index(counts_of(table, experts), topk.astype(np.int64), source.astype(np.int64), len(fabric.sources))
    target = fabric.holders[holder[chosen]]  # [tokens, k, expert_tp]
    start = fabric.sources[source]
    there = token_loads(fabric.topology, start, target.reshape(len(target), -1), transfer)
    back = there
    if target.shape[2] > 1:
        back = token_loads(fabric.topology, start, target[:, :, 0], transfer)
    return LayerLinks(there, back.reversed(), width)


def imbalance(table: np.ndarray, loads: np.ndarray) -> float:
    """Fullest holder over mean, when copies share evenly. ``loads``: float [E]."""
    share = np.append(loads / np.maximum(counts_of(table, len(loads)), 1), 0.0)
    total = share[table].sum(axis=1)
    return float(total.max() / total.mean()) if total.any() else 1.0


def memory_spread(tables: np.ndarray, node: np.ndarray) -> int:
    """Copies on the node that holds most less those on the node that holds least, over all layers. ``tables``: int32
    [layers, holders, slots]; ``node``: int [holders]."""
    held = (tables != EMPTY).sum(axis=(0, 2))
    per_node = np.bincount(node, weights=held)
    return int(per_node.max() - per_node.min())


def copies_to_move(current: np.ndarray, table: np.ndarray) -> int:
    """Copies of one layer that a holder must load because it does not hold them now."""
    moved = 0
    for before, after in zip(current.tolist(), table.tolist(), strict=True):
        moved += len({e for e in after if e != EMPTY} - set(before))
    return moved
