"""Prices of kernels, kept: by GPU, cluster and size, so that plans, batches and claims share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from planc.cost.kernels import Kernel
from planc.cost.ops import Costs, costs_of
from planc.cost.price import Price
from planc.spec.cluster import Cluster, Gpu, Links
from planc.spec.load import load_gpu, preset_names

if TYPE_CHECKING:
    from planc.cost.fits import FitFile


class PriceBook:
    """Prices of kernels by GPU, kept; kernels asked for together are priced together. ``fits``: of GPUs by name, in place of
    those that ship."""

    def __init__(self, fits: Mapping[str, FitFile] | None = None) -> None:
        self.fits = dict(fits or {})
        self._costs: dict[tuple[int, int, int], tuple[Gpu, Links, Costs]] = {}  # holds what its keys are the ids of
        self._prices: dict[tuple[int, Kernel], Price] = {}

    def costs(self, gpu: Gpu, cluster: Cluster, taken: int = 0) -> Costs:
        """Prices of a GPU on a cluster's links: by a fit that was given, or by the one that ships where the spec is that of the
        preset. ``taken``: SMs that communication has for itself."""
        key = id(gpu), id(cluster.links), taken
        if key not in self._costs:
            fit = self.fits.get(gpu.name)
            if fit is None and gpu.name in preset_names("fits") and gpu.name in preset_names("gpus"):
                from planc.cost.fits import load_fit  # its models take a while to make: only where there is a fit

                fit = load_fit(gpu.name) if _same_rates(gpu, load_gpu(gpu.name)) else None
            self._costs[key] = gpu, cluster.links, costs_of(_whole_peaks(gpu), cluster.links, fit, taken=taken)
        return self._costs[key][2]

    def prepare(self, costs: Costs, wanted: Iterable[Kernel]) -> None:
        """Price kernels in as few calls as there are kinds and dtypes."""
        groups: dict[tuple[str, str], list[Kernel]] = {}
        for kernel in dict.fromkeys(wanted):
            if (id(costs), kernel) not in self._prices:
                groups.setdefault((kernel.kind, kernel.dtype), []).append(kernel)
        for (kind, dtype), members in groups.items():
            columns = {
                name: np.array([dict(k.sizes)[name] for k in members], dtype=float) for name, _ in members[0].sizes
            }
            rows = _priced(costs, kind, columns, dtype)
            for kernel, row in zip(members, rows, strict=True):
                self._prices[id(costs), kernel] = row

    def price(self, costs: Costs, kernel: Kernel) -> Price:
        """The price of one kernel."""
        if (id(costs), kernel) not in self._prices:
            self.prepare(costs, [kernel])
        return self._prices[id(costs), kernel]


def _same_rates(gpu: Gpu, preset: Gpu) -> bool:
    return gpu.peak == preset.peak and gpu.memory_bandwidth == preset.memory_bandwidth


def _whole_peaks(gpu: Gpu) -> Gpu:
    """The GPU with a peak for every dtype: what it cannot multiply it converts to one of 16 bit (or to what it has)."""
    have = gpu.peak.bf16 or gpu.peak.fp16 or gpu.peak.fp8
    peaks = {name: getattr(gpu.peak, name) or have for name in ("bf16", "fp16", "fp8")}
    return gpu.model_copy(update={"peak": gpu.peak.model_copy(update=peaks)})


def _priced(costs: Costs, kind: str, columns: dict[str, np.ndarray], dtype: str) -> list[Price]:
    """Price rows of one kind: estimate, floor, fixed part."""
    if kind == "experts":
        found, floor, fixed, family = costs.experts_of_rank(columns, dtype)
    else:
        found = costs.price(kind, columns, dtype)
        floor, fixed, family = costs.floor(kind, columns, dtype), costs.fixed(kind), _FAMILY.get(kind, kind)
    rows = zip(
        np.maximum(found.seconds, floor).tolist(),
        np.maximum(found.low, floor).tolist(),
        np.maximum(found.high, floor).tolist(),
        floor.tolist(),
        found.provenance.tolist(),
        strict=True,
    )
    return [Price(s, low, max(high, s), f, min(fixed, s), str(word), family) for s, low, high, f, word in rows]


_FAMILY = {"gate": "gemm", "head": "gemm", "norm": "elementwise", "embedding": "elementwise"}
