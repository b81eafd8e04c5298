"""The cluster: groups of nodes with their GPUs, and the hierarchy of links between them."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from planc.spec.fields import Bytes, BytesPerSecond, Count, Flops, Fraction, Name, Seconds, Strict


class Peak(Strict):
    """Dense peak FLOPS by dtype (no sparsity)."""

    bf16: Flops | None = None
    fp16: Flops | None = None
    fp8: Flops | None = None


class Gpu(Strict):
    """One GPU. ``mfu`` and ``memory_utilization`` are the shares of peak FLOPS and of memory bandwidth that
    planning counts on; ``reserve`` is the share of memory kept free for the runtime."""

    name: Name
    peak: Peak
    mfu: Fraction = 0.6
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    memory_utilization: Fraction = 0.8
    reserve: Fraction = Field(default=0.1, description="default: 1 − vLLM's gpu_memory_utilization of 0.9")


class NodeGroup(Strict):
    """Like nodes. ``nvlink_domain`` is the GPUs of one NVLink domain; 0 means one node is one domain."""

    name: Name = "nodes"
    nodes: Annotated[int, Field(ge=1, le=100_000)]
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)] = 8
    gpu: Gpu
    nvlink_domain: Annotated[int, Field(ge=0, le=100_000)] = 0


class Link(Strict):
    """A link class. Bandwidth is per GPU and in one direction; ``utilization`` is the share planning counts on."""

    bandwidth: BytesPerSecond
    latency: Seconds = 0.0
    utilization: Fraction = 0.8


class Nic(Link):
    """Node to network, per GPU. With ``rails`` r, GPU i of a node uses rail i mod r; 0: one rail a GPU. ``routing``:
    `rail` stays on the sender's rail and crosses the target's node over NVLink; `shortest` enters by the target's own
    port, between rails through the spine."""

    rails: Annotated[int, Field(ge=0, le=1024)] = 0
    routing: Literal["rail", "shortest"] = "rail"


class Leaf(Strict):
    """A leaf pod: ``nodes`` nodes share its switches; going up, bandwidth is divided by ``oversubscription``.

    Volumes and link loads count it."""

    nodes: Count
    oversubscription: Annotated[float, Field(ge=1, le=1000)] = 1.0
    latency: Seconds = 0.0


class Spine(Strict):
    """Leaf to leaf through the spine."""

    latency: Seconds = 0.0


class Links(Strict):
    """The hierarchy of links, nearest first."""

    nvlink: Link
    nic: Nic
    leaf: Leaf | None = None
    spine: Spine | None = None


#: link classes from nearest to farthest; traffic is counted by the farthest class it crosses
LINK_CLASSES = ("local", "nvlink", "nic", "spine")


class Cluster(Strict):
    """Node groups in rank order, and their links. Ranks are node-major over all groups."""

    name: Name
    source: Annotated[str, Field(max_length=1000)] = ""
    groups: Annotated[tuple[NodeGroup, ...], Field(min_length=1, max_length=64, strict=False)]
    links: Links

    @cached_property
    def gpus(self) -> int:
        """Number of GPUs."""
        return sum(g.nodes * g.gpus_per_node for g in self.groups)

    @cached_property
    def nodes(self) -> int:
        """Number of nodes."""
        return sum(g.nodes for g in self.groups)

    @cached_property
    def node_of_rank(self) -> np.ndarray:
        """Node of each rank, int32 [gpus]."""
        sizes = np.concatenate([np.full(g.nodes, g.gpus_per_node) for g in self.groups])
        return np.repeat(np.arange(self.nodes, dtype=np.int32), sizes)

    @cached_property
    def local_of_rank(self) -> np.ndarray:
        """Index of each rank in its node, int32 [gpus]."""
        starts = np.searchsorted(self.node_of_rank, np.arange(self.nodes))
        return np.asarray((np.arange(self.gpus) - starts[self.node_of_rank]).astype(np.int32))

    @cached_property
    def group_of_rank(self) -> np.ndarray:
        """Index of each rank's node group, int32 [gpus]."""
        sizes = [g.nodes * g.gpus_per_node for g in self.groups]
        return np.repeat(np.arange(len(self.groups), dtype=np.int32), sizes)

    @cached_property
    def domain_of_rank(self) -> np.ndarray:
        """NVLink domain of each rank, int32 [gpus]."""
        parts, first = [], 0
        for g in self.groups:
            size = g.nodes * g.gpus_per_node
            domain = g.nvlink_domain or g.gpus_per_node
            parts.append(first + np.arange(size, dtype=np.int32) // domain)
            first += -(-size // domain)
        return np.concatenate(parts)

    @cached_property
    def leaf_of_rank(self) -> np.ndarray:
        """Leaf pod of each rank, int32 [gpus]; all zero without leaves."""
        if self.links.leaf is None:
            return np.zeros(self.gpus, dtype=np.int32)
        return self.node_of_rank // np.int32(self.links.leaf.nodes)

    @cached_property
    def memory_of_rank(self) -> np.ndarray:
        """Memory of each rank in bytes, int64 [gpus]."""
        return np.asarray(np.array([g.gpu.memory for g in self.groups], dtype=np.int64)[self.group_of_rank])

    def smallest_domain(self) -> int:
        """GPUs of the smallest NVLink domain: the bound on tp."""
        return int(np.bincount(self.domain_of_rank).min())
