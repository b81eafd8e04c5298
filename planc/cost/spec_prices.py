"""Prices without a fit: a roofline at the MFU and utilisation of the GPU's spec, marked `spec`.

They hold no overhead of a kernel, which no spec gives. Their interval runs from the floor (full peak and bandwidth) to
three times the price and 60 µs: on GPUs with a fit kernels cost 3 to 50 µs beside their roofline (docs/accuracy.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from planc.cost import counts
from planc.cost.loads import RankLoad
from planc.cost.transfer import GPUS_PER_NODE
from planc.diagnostics import Diagnostic, PlancError
from planc.spec.fields import DTYPE_BYTES

if TYPE_CHECKING:
    from planc.cost.ops import Prices
    from planc.spec.cluster import Gpu, Link, Links

WIDER, KERNEL = 3.0, 60e-6  #: upper bound: this many times the price, and so many seconds more


def plain(gpu: Gpu, kind: str, s: dict[str, np.ndarray], dtype: str) -> Prices:
    """GEMM, and attention and MLA decode."""
    width = DTYPE_BYTES[dtype]
    if kind == "gemm":
        flops, size = counts.gemm(s["m"], s["n"], s["k"], width)
    elif kind == "mla_decode":
        flops, size = counts.mla_decode(s["batch"], s["heads"], s["kv_len"], width)
    else:
        flops, size = counts.attention_decode(**s, width=width)
    return roofline(gpu, flops, size, dtype)


def experts(gpu: Gpu, s: dict[str, np.ndarray], load: RankLoad, dtype: str) -> Prices:
    """The routed experts of the slowest rank."""
    wide = s["intermediate"] / s["tp"]
    flops, size = counts.expert_gemm(load.rows, load.active, s["hidden"], wide, s["gated"], DTYPE_BYTES[dtype])
    return roofline(gpu, flops, size, dtype)


def streaming(gpu: Gpu, gemm: Any, kind: str, s: dict[str, np.ndarray], dtype: str, share: float = 1.0) -> Prices:
    """Norm, embedding and prefill attention: never measured here. With a GEMM fit, its overhead and efficiencies stand
    in (`derived`, its interval outside its range); without one, the spec's. ``share``: of the SMs that compute has."""
    if kind == "norm":
        flops, size = counts.norm(s["tokens"], s["hidden"])
    elif kind == "embedding":
        flops, size = counts.embedding(s["tokens"], s["hidden"])
    else:
        flops, size = counts.attention_prefill(**s, width=DTYPE_BYTES[dtype])
    spec = roofline(gpu, flops, size, dtype)
    if gemm is None:
        return spec
    from planc.cost.ops import Prices

    fitted = gemm.constants
    compute = flops / (
        share * _peak(gpu, dtype) * (gpu.mfu if kind == "attention_prefill" else fitted.compute_efficiency)
    )
    memory = size / (float(gpu.memory_bandwidth) * fitted.memory_efficiency)
    seconds = fitted.overhead + np.maximum(compute, memory)
    low, high = gemm.interval.outside
    high = max(high, 1.0 / low, 1.5)  # nothing was measured to say how far off this is
    return Prices(seconds, np.maximum(spec.low, seconds / high), seconds * high, np.full(len(seconds), "derived"))


def transfer(gpu: Gpu, links: Links | None, kind: str, word: str, s: dict[str, np.ndarray]) -> Prices:
    """Collectives over NVLink, dispatch and combine over NVLink or NIC: latency + bytes ÷ bandwidth of one link."""
    if links is None:
        message = f"{gpu.name} has no fit for `{kind}` and no cluster preset of its name that gives its links"
        raise PlancError([Diagnostic("PLN403", message, hint="price it within a deployment spec, which has links")])
    if "ranks" in s:
        sent = counts.bus_bytes(kind, s["ranks"], s["bytes"])
        return _over([(links.nvlink, sent)], np.ones(len(sent)))
    width = counts.wire_width(kind, word, s["hidden"])
    nodes, top_k = s["nodes"], s["top_k"]
    if word == "low_latency":
        stay, away = top_k / nodes, top_k * (1.0 - 1.0 / nodes)
    else:
        stay = counts.expected_targets(float(GPUS_PER_NODE), top_k)
        away = counts.expected_targets(nodes, top_k) * (1.0 - 1.0 / nodes)
    copies = s["tokens"] * width
    return _over([(links.nvlink, copies * stay), (links.nic, copies * away)], nodes)


def _over(parts: list[tuple[Link, np.ndarray]], nodes: np.ndarray) -> Prices:
    """The slower of the links, each with its latency where it is used."""
    from planc.cost.ops import Prices

    seconds, low = np.zeros(len(nodes)), np.zeros(len(nodes))
    for link, size in parts:
        used = (size > 0) | (link is parts[0][0])
        planned = link.latency + size / (link.bandwidth * link.utilization)
        seconds = np.maximum(seconds, np.where(used, planned, 0.0))
        low = np.maximum(low, size / link.bandwidth)
    return Prices(seconds, low, WIDER * seconds + KERNEL, np.full(len(seconds), "spec"))


def roofline(gpu: Gpu, flops: np.ndarray, size: np.ndarray, dtype: str) -> Prices:
    """The larger of FLOPs ÷ (peak · MFU) and bytes ÷ (bandwidth · utilisation)."""
    from planc.cost.ops import Prices

    peak, bandwidth = _peak(gpu, dtype), float(gpu.memory_bandwidth)
    seconds = np.maximum(flops / (peak * gpu.mfu), size / (bandwidth * gpu.memory_utilization))
    low = np.maximum(flops / peak, size / bandwidth)
    return Prices(seconds, low, WIDER * seconds + KERNEL, np.full(len(seconds), "spec"))


def _peak(gpu: Gpu, dtype: str) -> float:
    value = getattr(gpu.peak, dtype)
    if value is None:
        message = f"{gpu.name} gives no peak FLOPS for {dtype}"
        raise PlancError([Diagnostic("PLN110", message, hint=f"add `peak.{dtype}` to its file")])
    return float(value)
