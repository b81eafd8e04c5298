"""Placement policies: which holder of an EP group gets which expert. A new policy is one function and one line.

These know no traffic. The policy `topology` does, and plans layer by layer: `planc.placement.known_traffic`; `given` takes what
a file says: `planc.placement.given`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Place ``experts`` experts on holders so that counts per holder differ by at most one.

    ``node_of_holder``: int [G]. Returns int32 [experts], the holder of each expert.
    """

    def __call__(self, experts: int, node_of_holder: np.ndarray) -> np.ndarray: ...


def linear(experts: int, node_of_holder: np.ndarray) -> np.ndarray:
    """Consecutive experts on consecutive holders; with more experts than holders, runs of them on one holder."""
    holders = len(node_of_holder)
    if experts <= holders:
        return np.arange(experts, dtype=np.int32)
    share, rest = divmod(experts, holders)
    sizes = np.full(holders, share)
    sizes[:rest] += 1
    return np.repeat(np.arange(holders, dtype=np.int32), sizes)


def round_robin(experts: int, node_of_holder: np.ndarray) -> np.ndarray:
    """Consecutive experts on different nodes: first every node's first holder, then every node's second, …"""
    order = np.argsort(_index_in_node(node_of_holder), kind="stable").astype(np.int32)
    return order[np.arange(experts) % len(order)]


def _index_in_node(node_of_holder: np.ndarray) -> np.ndarray:
    starts = np.searchsorted(node_of_holder, node_of_holder)  # nodes ascend with the rank
    return np.arange(len(node_of_holder)) - starts


POLICIES: dict[str, Policy] = {"linear": linear, "round_robin": round_robin}

#: what a spec may name
POLICY_NAMES = ("auto", *POLICIES, "topology", "given")
