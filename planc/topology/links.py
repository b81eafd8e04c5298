"""Every directed link of a cluster with its capacity, and the links that data takes from one rank to another.

A rail r of a node is the NIC that its GPUs with local index ≡ r (mod rails) share. Ranks in one NVLink domain talk
over NVLink. Beyond it, data leaves by the sender's own rail, crosses that rail's leaf switch, between leaf pods also the
spine, and arrives on the same rail of the target node, whence NVLink carries it to its GPU: the rail-optimised route
that DeepEP's and NCCL's all-to-alls take. A target node with fewer rails is entered on rail mod its rails, through the
spine. With `routing: shortest` data enters by the target's own port instead: the fewest links, but through the spine between
rails (what is deduplicated per node still enters on the sender's rail). Parallel spine paths are equal shares of one
capacity (ECMP).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from planc.spec import Cluster

if TYPE_CHECKING:
    import networkx as nx

#: kinds of links in the order in which they are numbered
LINK_KINDS = ("nvlink_up", "nvlink_down", "nic_up", "nic_down", "spine_up", "spine_down")


@dataclass(frozen=True, eq=False)
class Topology:
    """Links of a cluster. Arrays over ranks are int64 [gpus]; ``capacity`` is float [links], B/s counted on."""

    cluster: Cluster
    node: np.ndarray  #: node of each rank
    domain: np.ndarray  #: NVLink domain of each rank
    leaf: np.ndarray  #: leaf pod of each node, int64 [nodes]
    port: np.ndarray  #: rail port of each rank: a number per (node, rail), node-major
    trunk: np.ndarray  #: spine trunk of each port: a number per (leaf, rail), int64 [ports]
    first: dict[str, int]  #: kind of link -> number of its first link
    capacity: np.ndarray
    latency: np.ndarray  #: float [links], s that passing the link adds to a route
    names: tuple[str, ...]

    @property
    def links(self) -> int:
        """Number of links."""
        return len(self.names)

    @cached_property
    def kind_of_link(self) -> np.ndarray:
        """Index into `LINK_KINDS` of each link, int64 [links]."""
        starts = [self.first[kind] for kind in LINK_KINDS]
        return np.asarray(np.searchsorted(starts, np.arange(self.links), side="right") - 1)

    @cached_property
    def port_at(self) -> np.ndarray:
        """Port of each (node, rail), int64 [nodes, rails]; a node with fewer rails repeats its own."""
        rails = self.rails
        table = np.zeros((len(rails), int(rails.max())), dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(rails)[:-1]])
        for node in range(len(rails)):
            table[node] = starts[node] + np.arange(table.shape[1]) % rails[node]
        return table

    @cached_property
    def entry_gpu(self) -> np.ndarray:
        """The GPU that hands on what arrives at each port: the first that uses it, int64 [ports]."""
        return np.unique(self.port, return_index=True)[1].astype(np.int64)

    @cached_property
    def rails(self) -> np.ndarray:
        """Rails of each node, int64 [nodes]."""
        return rails_of_nodes(self.cluster)

    @cached_property
    def rail(self) -> np.ndarray:
        """Rail of each rank."""
        return np.asarray(self.cluster.local_of_rank.astype(np.int64) % self.rails[self.node])

    def route(self, source: int, target: int) -> list[int]:
        """Links from one rank to another, in order; empty for a rank to itself."""
        if source == target:
            return []
        if self.domain[source] == self.domain[target]:
            return [self.first["nvlink_up"] + source, self.first["nvlink_down"] + target]
        entry = int(self.entry(np.array([source]), np.array([target]))[0])
        leave, enter = int(self.port[source]), entry
        path = [self.first["nic_up"] + leave]
        if self.trunk[leave] != self.trunk[enter]:
            path += [self.first["spine_up"] + int(self.trunk[leave]), self.first["spine_down"] + int(self.trunk[enter])]
        path.append(self.first["nic_down"] + enter)
        if entry != self.port[target]:  # it arrives at the same rail's GPU, and NVLink takes it further
            path += [self.first["nvlink_up"] + int(self.entry_gpu[entry]), self.first["nvlink_down"] + target]
        return path

    def entry(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Port by which data from each source rank enters the node of each target rank; int64, broadcast."""
        if self.cluster.links.nic.routing == "shortest":
            return np.broadcast_to(self.port[target], np.broadcast_shapes(source.shape, target.shape))
        return np.asarray(self.port_at[self.node[target], self.rail[source]])

    def graph(self) -> nx.DiGraph[str]:
        """Devices and links as a DiGraph for figures and checks: GPUs, NVLink domains, NIC ports, leaves, spine."""
        import networkx as nx

        result: nx.DiGraph[str] = nx.DiGraph()

        def add(source: str, target: str, kind: str, index: int) -> None:
            link = self.first[kind] + index
            facts = {"bytes_per_s": float(self.capacity[link]), "latency_s": float(self.latency[link])}
            result.add_edge(source, target, link=link, name=self.names[link], **facts)

        for rank in range(len(self.node)):
            add(f"gpu{rank}", f"nvlink{self.domain[rank]}", "nvlink_up", rank)
            add(f"nvlink{self.domain[rank]}", f"gpu{rank}", "nvlink_down", rank)
            result.add_edge(f"gpu{rank}", f"nic{self.port[rank]}")
            result.add_edge(f"nic{self.port[rank]}", f"gpu{rank}")
        for port in range(len(self.trunk)):
            add(f"nic{port}", f"leaf{self.trunk[port]}", "nic_up", port)
            add(f"leaf{self.trunk[port]}", f"nic{port}", "nic_down", port)
        for trunk in range(self.first["spine_down"] - self.first["spine_up"]):
            add(f"leaf{trunk}", "spine", "spine_up", trunk)
            add("spine", f"leaf{trunk}", "spine_down", trunk)
        return result


def rails_of_nodes(cluster: Cluster) -> np.ndarray:
    """Rails of each node: the NIC's ``rails``, at most one per GPU; by default one per GPU. int64 [nodes]."""
    asked = cluster.links.nic.rails
    counts = [min(asked or g.gpus_per_node, g.gpus_per_node) for g in cluster.groups for _ in range(g.nodes)]
    return np.array(counts, dtype=np.int64)


def topology(cluster: Cluster) -> Topology:
    """Number the links of a cluster and give each its capacity: bandwidth × utilization, in B/s.

    A port carries the NIC bandwidth of the GPUs that share it; a trunk the bandwidth of its leaf's ports on that rail,
    divided by the leaf's oversubscription.
    """
    links = cluster.links
    node = cluster.node_of_rank.astype(np.int64)
    rails = rails_of_nodes(cluster)
    port_start = np.concatenate([[0], np.cumsum(rails)[:-1]])
    port = port_start[node] + cluster.local_of_rank.astype(np.int64) % rails[node]
    ports = int(rails.sum())
    node_of_port = np.repeat(np.arange(cluster.nodes), rails)
    rail_of_port = np.arange(ports) - port_start[node_of_port]
    leaf = np.arange(cluster.nodes) // (links.leaf.nodes if links.leaf else max(1, cluster.nodes))
    _, trunk = np.unique(leaf[node_of_port] * int(rails.max()) + rail_of_port, return_inverse=True)
    trunk = trunk.reshape(-1)
    nvlink = np.full(cluster.gpus, links.nvlink.bandwidth * links.nvlink.utilization)
    nic = np.bincount(port, minlength=ports) * (links.nic.bandwidth * links.nic.utilization)
    spine = np.bincount(trunk, weights=nic) / (links.leaf.oversubscription if links.leaf else 1.0)
    sizes = {kind: len(part) for kind, part in zip(LINK_KINDS, (nvlink, nvlink, nic, nic, spine, spine), strict=True)}
    starts = np.concatenate([[0], np.cumsum(list(sizes.values()))])
    names = [
        f"{kind} {_place(kind, i, node_of_port, rail_of_port, leaf, trunk)}"
        for kind, n in sizes.items()
        for i in range(n)
    ]
    return Topology(
        cluster,
        node,
        cluster.domain_of_rank.astype(np.int64),
        leaf,
        port,
        trunk,
        {kind: int(start) for kind, start in zip(LINK_KINDS, starts, strict=False)},
        np.concatenate([nvlink, nvlink, nic, nic, spine, spine]),
        _latencies(cluster, [len(part) for part in (nvlink, nvlink, nic, nic, spine, spine)]),
        tuple(names),
    )


def _latencies(cluster: Cluster, sizes: list[int]) -> np.ndarray:
    """Latency that each link adds: NVLink's where data leaves a GPU, the NIC's where it leaves a node, the leaf's where it
    enters one, the spine's on the way up; so that the sum over a route is that of the classes it crosses."""
    links = cluster.links
    leaf = links.leaf.latency if links.leaf else 0.0
    spine = links.spine.latency if links.spine else 0.0
    return np.repeat([links.nvlink.latency, 0.0, links.nic.latency, leaf, spine, 0.0], sizes)


def _place(kind: str, i: int, node: np.ndarray, rail: np.ndarray, leaf: np.ndarray, trunk: np.ndarray) -> str:
    """Where a link is, for people: ``GPU 3``, ``node 2 rail 5``, ``leaf 0 rail 5``."""
    if kind.startswith("nvlink"):
        return f"GPU {i}"
    if kind.startswith("nic"):
        return f"node {node[i]} rail {rail[i]}"
    port = int(np.flatnonzero(trunk == i)[0])
    return f"leaf {leaf[node[port]]} rail {rail[port]}"
