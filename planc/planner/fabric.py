"""Where an EP group sits in the cluster: its sources, its holders, and the links from each source to each of them.

A **source** is a rank that gates tokens, a **holder** a place that may hold experts: ``expert_tp`` ranks in a row. What a
source sends to an expert goes in two parts. The far part crosses the network from the source's NIC port to a port of the
holder's node (nothing inside an NVLink domain); in node-deduplicated mode experts of a token on one node share it. The
near part crosses NVLink to the holder itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from planc.topology import Topology

Transfer = Literal["dedup", "direct"]


class Ways(NamedTuple):
    """``cell``: what each holder shares its far transfers with, int64 [G]: its node, or itself; ``far``: links from each
    source to each cell, int64 [S, cells, n]; ``near``: links from there to each holder, int64 [S, G, n]. `Fabric.nowhere`
    stands where no link is needed."""

    cell: np.ndarray
    far: np.ndarray
    near: np.ndarray


@dataclass(frozen=True, eq=False)
class Fabric:
    """Links of one EP group. ``sources``: world rank of each source, int64 [S]; ``holders``: world ranks of each holder,
    int64 [G, expert_tp]."""

    topology: Topology
    sources: np.ndarray
    holders: np.ndarray

    @property
    def nowhere(self) -> int:
        """A link number of its own for "no link", one past the last."""
        return self.topology.links

    @cached_property
    def node_numbers(self) -> np.ndarray:
        """World numbers of the nodes that have holders, ascending."""
        return np.unique(self.topology.node[self.holders[:, 0]])

    @cached_property
    def node(self) -> np.ndarray:
        """Node of each holder, as an index into `node_numbers`, int64 [G]."""
        return np.asarray(np.searchsorted(self.node_numbers, self.topology.node[self.holders[:, 0]]))

    @cached_property
    def pod(self) -> np.ndarray:
        """Leaf pod of each node of `node_numbers`, numbered from 0."""
        return np.unique(self.topology.leaf[self.node_numbers], return_inverse=True)[1].reshape(-1)

    @cached_property
    def source_pod(self) -> np.ndarray:
        """Group of sources that are alike to the network: those of one leaf pod; numbered from 0, int64 [S]."""
        leaf = self.topology.leaf[self.topology.node[self.sources]]
        return np.unique(leaf, return_inverse=True)[1].reshape(-1)

    @cached_property
    def seconds_per_byte(self) -> np.ndarray:
        """1 ÷ capacity of each link, and 0 for `nowhere`; float [links + 1]."""
        return np.append(1.0 / self.topology.capacity, 0.0)

    def ways(self, transfer: Transfer) -> Ways:
        """The links that transfers take. In direct mode every rank of a holder has a transfer of its own."""
        first_gpu = np.searchsorted(self.topology.node, self.node_numbers)
        by_node = self._far(
            first_gpu, self.topology.port_at[self.node_numbers[None], self.topology.rail[self.sources][:, None]]
        )
        if transfer == "dedup":
            return Ways(self.node, by_node, self._near(shared=True))
        if self.topology.cluster.links.nic.routing == "rail":
            return Ways(self.node, np.tile(by_node, self.holders.shape[1]), self._near(shared=False))
        parts = [self._far(ranks, self.topology.port[ranks][None]) for ranks in self.holders.T]
        return Ways(np.arange(len(self.holders)), np.concatenate(parts, axis=2), self._near(shared=False))

    def _far(self, target: np.ndarray, enter: np.ndarray) -> np.ndarray:
        """NIC up, NIC down, spine up, spine down from each source to each target rank; int64 [S, targets, 4]."""
        t = self.topology
        leave = t.port[self.sources][:, None]
        away = t.domain[self.sources][:, None] != t.domain[target][None, :]
        cross = away & (t.trunk[leave] != t.trunk[enter])
        links = np.broadcast_arrays(
            np.where(away, t.first["nic_up"] + leave, self.nowhere),
            np.where(away, t.first["nic_down"] + enter, self.nowhere),
            np.where(cross, t.first["spine_up"] + t.trunk[leave], self.nowhere),
            np.where(cross, t.first["spine_down"] + t.trunk[enter], self.nowhere),
        )
        return np.stack(links, axis=2)

    def _near(self, *, shared: bool) -> np.ndarray:
        """NVLink from each source, or from the GPU where its data enters the node, to each rank of each holder: up and
        down for every rank; int64 [S, G, 2 · expert_tp]. What is ``shared`` by a node enters on the sender's rail."""
        t, source = self.topology, self.sources[:, None, None]
        target = self.holders[None]
        inside = t.domain[source] == t.domain[target]
        enter = t.port_at[t.node[target], t.rail[source]] if shared else t.entry(source, target)
        moved = np.where(inside, source != target, enter != t.port[target])
        up = np.where(inside, source, t.entry_gpu[enter]) + t.first["nvlink_up"]
        down = np.broadcast_to(target, moved.shape) + t.first["nvlink_down"]
        return np.concatenate([np.where(moved, up, self.nowhere), np.where(moved, down, self.nowhere)], axis=2)
