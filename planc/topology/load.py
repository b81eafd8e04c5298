"""Load on every link from one layer's dispatch: bytes per link, for direct and for node-deduplicated transfers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planc.topology.links import LINK_KINDS, Topology

Mode = Literal["direct", "dedup"]


@dataclass(frozen=True, eq=False)
class LinkLoads:
    """Tokens over each link of a topology in one layer, int64 [links]."""

    topology: Topology
    tokens: np.ndarray

    def utilization(self, bytes_per_token: float) -> np.ndarray:
        """Seconds that each link is busy: tokens × bytes ÷ capacity, float [links]. Its maximum is the time that the
        transfer takes at least."""
        return np.asarray(self.tokens * bytes_per_token / self.topology.capacity)

    def busiest(self, bytes_per_token: float) -> tuple[str, float, int]:
        """(name, seconds, tokens) of the link that is busy longest."""
        seconds = self.utilization(bytes_per_token)
        link = int(np.argmax(seconds))
        return self.topology.names[link], float(seconds[link]), int(self.tokens[link])

    def reversed(self) -> LinkLoads:
        """The loads when everything goes the other way, as combine does after dispatch: up and down exchanged."""
        tokens = self.tokens.copy()
        for up, down in ((0, 1), (2, 3), (4, 5)):
            first, second, end = (
                self.topology.first[LINK_KINDS[i]] if i < 6 else self.topology.links for i in (up, down, down + 1)
            )
            tokens[first:second], tokens[second:end] = self.tokens[second:end], self.tokens[first:second]
        return LinkLoads(self.topology, tokens)

    def largest_by_kind(self) -> dict[str, int]:
        """Most tokens over one link of each kind."""
        kinds = self.topology.kind_of_link
        return {kind: int(self.tokens[kinds == i].max(initial=0)) for i, kind in enumerate(LINK_KINDS)}


def pair_loads(topology: Topology, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> LinkLoads:
    """Loads of point-to-point transfers: ``tokens[i]`` from rank ``source[i]`` to ``target[i]``, int64 [pairs] each, on
    the routes of `Topology.route`. Raises ValueError for ranks outside the topology."""
    _check_ranks(topology, source, target)
    loads = np.zeros(topology.links, dtype=np.int64)
    near = (topology.domain[source] == topology.domain[target]) & (source != target)
    _count(loads, topology.first["nvlink_up"] + source[near], tokens[near])
    _count(loads, topology.first["nvlink_down"] + target[near], tokens[near])
    far = topology.domain[source] != topology.domain[target]
    source, target, tokens = source[far], target[far], tokens[far]
    entry = topology.entry(source, target)
    _hand_on(topology, loads, entry, target, tokens)
    _cross(topology, loads, source, target, entry, tokens)
    return LinkLoads(topology, loads)


def token_loads(topology: Topology, source: np.ndarray, target: np.ndarray, mode: Mode) -> LinkLoads:
    """Loads of a layer's dispatch.

    ``source``: int [tokens], the rank where each token is; ``target``: int [tokens, k], the ranks of its experts.
    ``direct`` sends one copy per expert; ``dedup`` one copy per target node, handed on there over NVLink, one per GPU.
    Copies to the token's own GPU use no link. Combine is the transpose: the same loads with up and down exchanged.
    Raises ValueError for ranks outside the topology.
    """
    _check_ranks(topology, source, target)
    gpus, nodes = len(topology.node), len(topology.leaf)
    here = np.repeat(source.astype(np.int64), target.shape[1])
    there = target.reshape(-1).astype(np.int64)
    if mode == "direct":
        return pair_loads(topology, here, there, np.ones(len(here), dtype=np.int64))
    token = np.repeat(np.arange(len(source)), target.shape[1])
    keep = np.unique(token * gpus + there, return_index=True)[1]  # experts of a token on one GPU share one copy
    here, there, token = here[keep], there[keep], token[keep]
    near = topology.domain[here] == topology.domain[there]
    loads = pair_loads(topology, here[near], there[near], np.ones(int(near.sum()), dtype=np.int64)).tokens
    here, there, token = here[~near], there[~near], token[~near]
    entry = topology.port_at[topology.node[there], topology.rail[here]]
    _hand_on(topology, loads, entry, there, np.ones(len(there), dtype=np.int64))
    keep = np.unique(token * nodes + topology.node[there], return_index=True)[1]
    _cross(topology, loads, here[keep], there[keep], entry[keep], np.ones(len(keep), dtype=np.int64))
    return LinkLoads(topology, loads)


def _check_ranks(topology: Topology, source: np.ndarray, target: np.ndarray) -> None:
    gpus = len(topology.node)
    if len(source) and (min(source.min(), target.min()) < 0 or max(source.max(), target.max()) >= gpus):
        raise ValueError(f"ranks are 0 to {gpus - 1}")


def _hand_on(topology: Topology, loads: np.ndarray, entry: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> None:
    """From the GPU at the rail where data arrives to its target, over NVLink."""
    moved = entry != topology.port[target]
    _count(loads, topology.first["nvlink_up"] + topology.entry_gpu[entry[moved]], tokens[moved])
    _count(loads, topology.first["nvlink_down"] + target[moved], tokens[moved])


def _cross(
    topology: Topology, loads: np.ndarray, source: np.ndarray, target: np.ndarray, entry: np.ndarray, tokens: np.ndarray
) -> None:
    """From port to port: NICs, and the spine between leaf pods."""
    leave = topology.port[source]
    _count(loads, topology.first["nic_up"] + leave, tokens)
    _count(loads, topology.first["nic_down"] + entry, tokens)
    across = topology.trunk[leave] != topology.trunk[entry]
    _count(loads, topology.first["spine_up"] + topology.trunk[leave[across]], tokens[across])
    _count(loads, topology.first["spine_down"] + topology.trunk[entry[across]], tokens[across])


def _count(loads: np.ndarray, links: np.ndarray, tokens: np.ndarray) -> None:
    loads += np.bincount(links, weights=tokens, minlength=len(loads)).astype(np.int64)
