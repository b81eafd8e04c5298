"""Clusters, tokens and independent counting for the tests of the planner."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

import numpy as np

import planc
from planc.planner.fabric import Fabric
from planc.planner.links import Demand
from planc.planner.tables import copy_index
from planc.routing.tokens import Skew, generate_tokens
from planc.spec import Cluster
from planc.topology import token_loads, topology

TOPICS = Skew("lognormal", 1.0, 3, 2.0)


def lab_cluster(
    *groups: tuple[int, int],
    pod: int = 2,
    rails: int = 0,
    routing: str = "rail",
    domain: int = 0,
    over: float = 2,
    nvlink: int = 450,
) -> Cluster:
    """Nodes × GPUs, group after group, with links of round numbers; ``nvlink`` in GB/s, a NIC has 50."""
    nic = f"{{bandwidth: 50 GB/s, rails: {rails}, routing: {routing}}}"
    links = f"{{nvlink: {{bandwidth: {nvlink} GB/s}}, nic: {nic}, leaf: {{nodes: {pod}, oversubscription: {over}}}}}"
    parts = ", ".join(f"{{nodes: {n}, gpus_per_node: {g}, gpu: h100-sxm}}" for n, g in groups)
    shape = f"groups: [{parts}]"
    if domain:
        ((nodes, gpus),) = groups
        shape = f"nodes: {nodes}, gpus_per_node: {gpus}, gpu: h100-sxm, nvlink_domain: {domain}"
    text = f"name: x\nmodel: deepseek-v3\ncluster: {{name: lab, {shape}, links: {links}}}\nworkload: {{batch: 1, isl: 1}}\n"
    return planc.parse_spec(text).cluster


def fabric_on(cluster: Cluster, tp: int = 1, width: int = 1) -> Fabric:
    """All GPUs as one EP group: every ``tp``-th gates, ``width`` in a row are a holder."""
    ranks = np.arange(cluster.gpus)
    return Fabric(topology(cluster), ranks[::tp], ranks.reshape(-1, width))


def drawn(
    fabric: Fabric, tokens: int, k: int, seed: int, experts: int = 0, skew: Skew = TOPICS
) -> tuple[np.ndarray, np.ndarray]:
    """(topk [tokens, k], source [tokens]); by default as many experts as holders."""
    experts, sources = experts or len(fabric.holders), len(fabric.sources)
    made = generate_tokens(tokens=tokens, layers=1, experts=experts, top_k=k, sources=sources, skew=skew, seed=seed)
    return made.topk[:, 0].astype(np.int64), made.on_sources(sources)


def demand_for(copies: np.ndarray, source: np.ndarray) -> Demand:
    """Rows of one block; ``copies``: the copies that each token needs, int [tokens, k]."""
    number, k = copies.shape
    zeros = np.zeros(number, dtype=np.int64)
    return Demand(np.repeat(np.arange(number), k), copies.reshape(-1), source, zeros, np.ones(1))


def walked(fabric: Fabric, copies: np.ndarray, source: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    """Tokens over every link by `token_loads`, which walks tokens and knows nothing of the search."""
    target = fabric.holders[at[copies]].reshape(len(copies), -1)
    return token_loads(fabric.topology, fabric.sources[source], target, mode).tokens


def busiest(fabric: Fabric, copies: np.ndarray, source: np.ndarray, at: np.ndarray, mode: str) -> float:
    """Seconds of the busiest link for tokens of one byte."""
    return float((walked(fabric, copies, source, at, mode) / fabric.topology.capacity).max())


def copies_needed(counts: np.ndarray, topk: np.ndarray, source: np.ndarray, fabric: Fabric) -> np.ndarray:
    """The copy that serves each choice of a token, int [tokens, k]."""
    return copy_index(counts, topk, source, len(fabric.sources))


def placements(expert: np.ndarray, holders: int, slots: int) -> Iterator[np.ndarray]:
    """Every legal placement: the holder of each copy, at most ``slots`` on one and no expert twice."""
    if slots == 1 and len(expert) == holders:
        yield from (np.array(at) for at in permutations(range(holders)))
        return
    for at in product(range(holders), repeat=len(expert)):
        if np.bincount(at, minlength=holders).max() <= slots and len(set(zip(expert, at, strict=True))) == len(expert):
            yield np.array(at)
