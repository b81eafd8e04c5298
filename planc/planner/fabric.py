"""Where an EP group sits in the cluster: its sources, its holders, and the links from each source to each of them.

A **source** is a rank that gates tokens, a **holder** a place that may hold experts: ``expert_tp`` ranks in a row. What a
source sends to an expert goes in two parts. The far part crosses the network from the source's NIC port to a port of the
holder's node (nothing inside an NVLink domain); in node-deduplicated mode experts of a token on one node share it. The
near part crosses NVLink to the holder itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planc.topology import Topology


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

    @cached_property
    def far(self) -> np.ndarray:
        """Links from each source to each node: NIC up, NIC down, spine up, spine down; int64 [S, nodes, 4]."""
        t = self.topology
        first_gpu = np.searchsorted(t.node, self.node_numbers)
        leave = t.port[self.sources][:, None]
        enter = t.port_at[self.node_numbers[None, :], t.rail[self.sources][:, None]]
        away = t.domain[self.sources][:, None] != t.domain[first_gpu][None, :]
        cross = away & (t.trunk[leave] != t.trunk[enter])
        links = np.stack(
            [
                np.where(away, t.first["nic_up"] + leave, self.nowhere),
                np.where(away, t.first["nic_down"] + enter, self.nowhere),
                np.where(cross, t.first["spine_up"] + t.trunk[leave], self.nowhere),
                np.where(cross, t.first["spine_down"] + t.trunk[enter], self.nowhere),
            ],
            axis=2,
        )
        return links

    @cached_property
    def near(self) -> np.ndarray:
        """NVLink from each source, or from the GPU where its data enters the node, to each rank of each holder: up and
        down for every rank; int64 [S, G, 2 · expert_tp]."""
        t, source = self.topology, self.sources[:, None, None]
        target = self.holders[None]
        inside = t.domain[source] == t.domain[target]
        enter = t.port_at[t.node[target], t.rail[source]]
        moved = np.where(inside, source != target, enter != t.port[target])
        up = np.where(inside, source, t.entry_gpu[enter]) + t.first["nvlink_up"]
        down = np.broadcast_to(target, moved.shape) + t.first["nvlink_down"]
        return np.concatenate([np.where(moved, up, self.nowhere), np.where(moved, down, self.nowhere)], axis=2)
