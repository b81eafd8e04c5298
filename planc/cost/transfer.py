"""Times of communication ops as functions of sizes and fitted constants: latency + bytes ÷ bandwidth, per protocol and
level. Sizes are float arrays of one shape; times are seconds. ``size`` is the message buffer of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np

from planc.cost import counts
from planc.cost.compute import smooth_max

Array = np.ndarray

GPUS_PER_NODE = 8  #: of the measured nodes; a dispatch over N nodes has 8·N ranks
NORMAL_SMS = 20  #: that DeepEP's normal mode was measured on, and takes from computation
MEASURED_RANKS = (2, 4, 8)  #: of the collectives


def _quickest(times: list[Array], sharpness: float = 10.0) -> Array:
    """A smooth minimum: near a crossing the library switches a little early or late."""
    stack = np.stack(np.broadcast_arrays(*times))
    least = stack.min(axis=0)
    return np.asarray(least * ((stack / least) ** -sharpness).sum(axis=0) ** (-1.0 / sharpness))


def _by_ranks(values: tuple[float, float, float], ranks: Array) -> Array:
    """A constant given at 2, 4 and 8 ranks, at any number of ranks (on a scale of log2; flat outside)."""
    return np.asarray(np.interp(np.log2(ranks), np.log2(MEASURED_RANKS), values))


def nccl(c: Any, kind: str, ranks: Array, size: Array) -> Array:
    """A ring of NCCL: the quickest of its three protocols (LL, LL128, Simple), each a line in the bytes that a rank
    sends. Latency grows with a power of the ranks, LL128's bandwidth too; that of Simple is given by ranks."""
    sent = counts.bus_bytes(kind, ranks, size)
    scale = ranks / 4.0
    first = c.ll_latency * scale**c.ll_latency_power
    second = first + c.ll128_latency * scale**c.ll128_latency_power
    third = second + c.simple_latency
    return _quickest(
        [
            first + sent / c.ll_bandwidth,
            second + sent / (c.ll128_bandwidth * scale**c.ll128_bandwidth_power),
            third + sent / _by_ranks(c.simple_bandwidth, ranks),
        ]
    )


def custom_all_reduce(c: Any, ranks: Array, size: Array) -> Array:
    """One-shot (every rank reads all the others' buffers), two-shot (reduce-scatter, then all-gather), and the
    fall-back to NCCL for large buffers; the quickest counts."""
    sent = counts.bus_bytes("all_reduce", ranks, size)
    scale = ranks / 4.0
    first = c.one_shot_latency * scale**c.one_shot_latency_power
    second = first + c.two_shot_latency * scale**c.two_shot_latency_power
    third = second + c.large_latency
    return _quickest(
        [
            first + size * (ranks - 1.0) / (c.one_shot_bandwidth * scale**c.one_shot_bandwidth_power),
            second + sent / (c.two_shot_bandwidth * scale**c.two_shot_bandwidth_power),
            third + sent / _by_ranks(c.large_bandwidth, ranks),
        ]
    )


def low_latency(c: Any, kind: str, s: dict[str, Array]) -> Array:
    """DeepEP's low-latency dispatch or combine: one copy per token and choice, straight to its expert's rank, evenly
    over all experts: a share (N − 1)/N of the copies leaves its node. One set of constants serves every number of nodes,
    so that 16 and 32 nodes follow from the form: the share, and with it the time, tends to a limit."""
    copies = s["tokens"] * s["top_k"] * counts.wire_width(kind, "low_latency", s["hidden"])
    away = 1.0 - 1.0 / s["nodes"]
    return low_latency_moved(c, s, copies / s["nodes"], copies * away, copies)


def low_latency_moved(c: Any, s: dict[str, Array], stays: Array, leaves: Array, sent: Array) -> Array:
    """The same from bytes: those of the busiest rank inside its node (``stays``), over the busiest NIC (``leaves``), and
    those that a rank sends in all (``sent``).

    Copies that leave share the NIC, the others NVLink, and what arrives is taken in by as many groups of warps as there
    are experts (one per local expert and sender).
    """
    away = 1.0 - 1.0 / s["nodes"]
    base = c.overhead + c.per_expert * s["experts"] + c.per_hidden * s["hidden"] + c.remote_latency * away
    taken = sent / s["experts"] / c.pair_bandwidth
    wire = ((stays / c.nvlink_bandwidth) ** 3 + (leaves / c.nic_bandwidth) ** 3 + taken**3) ** (1.0 / 3.0)
    return np.asarray((base**c.overlap + wire**c.overlap) ** (1.0 / c.overlap))


def normal(c: Any, kind: str, s: dict[str, Array]) -> Array:
    """DeepEP's normal dispatch or combine (20 SMs), notification included, with choices evenly over all experts. In one
    node a copy goes to every rank that a token chose, beside work per token; over nodes one copy per node that it chose
    crosses the NIC."""
    size = s["tokens"] * counts.wire_width(kind, "normal", s["hidden"])
    ranks = counts.expected_targets(float(GPUS_PER_NODE), s["top_k"])
    nodes = counts.expected_targets(s["nodes"], s["top_k"]) * (1.0 - 1.0 / s["nodes"])
    return normal_moved(c, s, size * ranks, size * nodes, size)


def normal_moved(c: Any, s: dict[str, Array], stays: Array, leaves: Array, sent: Array) -> Array:
    """The same from bytes: copies to ranks of one node (``stays``), copies over the busiest NIC (``leaves``), and a
    rank's tokens once each (``sent``). Bandwidth over 2, 4 and 8 nodes is measured and does not follow a simple law;
    beyond, that of 8 nodes is kept."""
    nodes = s["nodes"]
    inside = c.node_overhead + c.node_per_hidden * s["hidden"]
    local = smooth_max(sent / c.token_bandwidth, stays / c.nvlink_bandwidth, c.node_overlap)
    one = inside + local + c.filling * local / (local + inside)
    across = c.overhead + c.per_node * (nodes - 1.0)
    bandwidth = np.interp(np.log2(np.maximum(nodes, 2.0)), (1.0, 2.0, 3.0), c.nic_bandwidth)
    many = (across**c.overlap + (leaves / bandwidth) ** c.overlap) ** (1.0 / c.overlap)
    return np.asarray(np.where(nodes == 1, one, np.maximum(one, many)))
