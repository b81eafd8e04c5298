"""The price of ops on one GPU: time with an interval and where it comes from.

>>> costs = load_costs("h100-sxm")
>>> price = costs.price("gemm", {"m": [16, 4096], "n": 7168, "k": 2048})
>>> [str(word) for word in price.provenance]
['fitted', 'fitted']

Provenance: `fitted` is a fit inside its range of sizes; `extrapolated` one outside it, with a wider interval; `derived`
the constants of a fit applied to what was not measured (another dtype, another op of the same nature); `spec` a roofline
at the MFU and utilisation of the GPU's spec, where no fit exists. Another GPU's fit is used only where a fit file says that the
chip is the same (`like`), and then `derived`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from planc.cost import compute, loads, spec_prices, transfer
from planc.cost.hardware import DEFAULT_SMS, Hardware
from planc.diagnostics import Diagnostic, PlancError, Span

if TYPE_CHECKING:
    from planc.cost.fits import FitFile
    from planc.spec.cluster import Gpu, Links

#: kind of op -> its columns; every size is a number of at least 1, but `skew` (0 is balanced), `gated` (0 or 1) and
#: `kv_heads` (0 is as many as heads)
KINDS: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "expert_gemm": ("tokens", "hidden", "intermediate", "experts", "top_k", "ep", "tp", "skew", "gated"),
    "attention_decode": ("batch", "heads", "kv_heads", "head_dim", "kv_len"),
    "mla_decode": ("batch", "heads", "kv_len"),
    "attention_prefill": ("batch", "heads", "kv_heads", "head_dim", "tokens", "kv_len"),
    "gate": ("tokens", "hidden", "experts"),
    "head": ("tokens", "hidden", "vocab"),
    "norm": ("tokens", "hidden"),
    "embedding": ("tokens", "hidden"),
    "all_reduce": ("ranks", "bytes", "library"),
    "all_gather": ("ranks", "bytes", "library"),
    "reduce_scatter": ("ranks", "bytes", "library"),
    "all_to_all": ("ranks", "bytes", "library"),
    "dispatch": ("nodes", "tokens", "hidden", "top_k", "experts", "mode"),
    "combine": ("nodes", "tokens", "hidden", "top_k", "experts", "mode"),
}
#: columns of words -> the words
CHOICES: dict[str, tuple[str, ...]] = {"library": ("nccl", "custom"), "mode": ("low_latency", "normal")}
#: a rank with at most so many experts, each at most so wide: of some such shapes every measured size is up to three
#: times slower than of others (a slow tile choice of the tuned grouped GEMM), which no size foretells
FEW = (12.0, 2048.0)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
PROVENANCE = ("fitted", "extrapolated", "derived", "spec")


@dataclass(frozen=True, slots=True)
class Prices:
    """Of n ops: seconds with the bounds of a 90 % interval, float [n], and provenance, text [n]."""

    seconds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    provenance: np.ndarray


@dataclass(frozen=True, slots=True)
class Costs:
    """All prices of one GPU. ``links`` are those of the cluster preset of its name, for prices from specs."""

    gpu: Gpu
    links: Links | None
    fit: FitFile | None
    hardware: Hardware

    @property
    def share(self) -> float:
        """Share of the SMs that is left to compute."""
        return self.hardware.sms / self.fit.sms if self.fit else 1.0

    def price(self, kind: str, sizes: Mapping[str, Any], dtype: str = "bf16") -> Prices:
        """Price ops of one kind and dtype. ``sizes``: the columns of the kind (`KINDS`), numbers or sequences of one
        length; `library` and `mode` words. The dtype of a collective, dispatch or combine does not count: bytes are
        given, or follow from the library's format."""
        columns = _columns(kind, sizes)
        if kind in ("dispatch", "combine", *COLLECTIVES):
            word = columns.pop("mode" if kind in ("dispatch", "combine") else "library")
            return self._by_word(kind, word, columns)
        if kind == "expert_gemm":
            return self._experts(columns, dtype)
        return self._plain(kind, columns, dtype)

    def floor(self, kind: str, sizes: Mapping[str, Any], dtype: str = "bf16") -> np.ndarray:
        """FLOPs ÷ peak or bytes ÷ memory bandwidth, the larger, at full rates; seconds, float [n]. Compute ops only."""
        s = _columns(kind, sizes)
        if kind in ("gate", "head"):
            kind, s = "gemm", {"m": s["tokens"], "n": s["experts" if kind == "gate" else "vocab"], "k": s["hidden"]}
        if kind in ("norm", "embedding", "attention_prefill"):
            return spec_prices.streaming(self.gpu, None, kind, s, dtype).low
        return spec_prices.plain(self.gpu, kind, s, dtype).low

    def fixed(self, kind: str) -> float:
        """Seconds of a kernel that no size shrinks; 0 without a fit."""
        if self.fit is None:
            return 0.0
        part = getattr(self.fit, {"attention_decode": kind, "mla_decode": kind}.get(kind, "gemm"))
        if part is None:
            return 0.0
        return float(part.constants.xqa.overhead if kind == "attention_decode" else part.constants.overhead)

    def experts_of_rank(self, s: dict[str, np.ndarray], dtype: str) -> tuple[Prices, np.ndarray, float, str]:
        """(prices, floors, fixed seconds, family) of a rank's experts whose load is known: columns ``rows``, ``active`` and
        ``padded`` beside those of `expert_gemm`. Constants are those of balanced loads; the rank sorts its own rows."""
        load = loads.RankLoad(s["rows"], s["active"], s["padded"])
        plain = spec_prices.experts(self.gpu, s, load, dtype)
        family = f"expert_gemm{'_fp8' if dtype == 'fp8' else ''}_balanced"
        part = getattr(self.fit, family, None)
        if part is None:
            return plain, plain.low, 0.0, "expert_gemm"
        own = s | {"tokens": s["rows"] / s["top_k"], "experts": s["active"]}
        seconds = compute.expert_gemm(part.constants, self.hardware, load, own, dtype)
        derived = (s["gated"] == 0) | (dtype == "fp16") | (self.share < 1)
        found = _inside(part, s, seconds, derived=derived, apart=rough(family, s))
        return found, plain.low, float(part.constants.overhead), family

    def inside(self, part: Any, s: dict[str, np.ndarray], seconds: np.ndarray, derived: Any, apart: Any) -> Prices:
        """Interval and provenance of times that a fit's form gave for sizes ``s``."""
        return _inside(part, s, seconds, derived=derived, apart=apart)

    def _by_word(self, kind: str, word: np.ndarray, s: dict[str, np.ndarray]) -> Prices:
        parts = [(word == one, one) for one in np.unique(word)]
        return _merge(len(word), [(at, self._transfer(kind, str(one), _take(s, at))) for at, one in parts])

    def _transfer(self, kind: str, word: str, s: dict[str, np.ndarray]) -> Prices:
        collective = kind in COLLECTIVES
        name = f"{kind}_{word}" if word != "nccl" else kind
        part = getattr(self.fit, name, None)
        if part is None:
            return spec_prices.transfer(self.gpu, self.links, kind, word, s)
        if not collective:
            form = transfer.low_latency if word == "low_latency" else transfer.normal
            return _inside(part, s, form(part.constants, kind, s), apart=rough(name, s))
        if word == "custom":
            return _inside(part, s, transfer.custom_all_reduce(part.constants, s["ranks"], s["bytes"]))
        return _inside(part, s, transfer.nccl(part.constants, kind, s["ranks"], s["bytes"]))

    def _experts(self, s: dict[str, np.ndarray], dtype: str) -> Prices:
        skewed = s["skew"] > 0
        parts = [(at, _take(s, at)) for at in (skewed, ~skewed) if at.any()]
        return _merge(len(skewed), [(at, self._experts_of(part, dtype)) for at, part in parts])

    def _experts_of(self, s: dict[str, np.ndarray], dtype: str) -> Prices:
        skewed = bool(s["skew"][0] > 0)
        name = f"expert_gemm{'_fp8' if dtype == 'fp8' else ''}_{'skewed' if skewed else 'balanced'}"
        part = getattr(self.fit, name, None)
        args = s["tokens"], s["top_k"], s["experts"], s["ep"]
        fill = part.fill if part else "spread"
        load = loads.power_law(*args, s["skew"], fill) if skewed else loads.balanced(*args)
        if part is None:
            return spec_prices.experts(self.gpu, s, load, dtype)
        seconds = compute.expert_gemm(part.constants, self.hardware, load, s, dtype)
        return _inside(part, s, seconds, derived=(s["gated"] == 0) | (dtype == "fp16"), apart=rough(name, s))

    def _plain(self, kind: str, s: dict[str, np.ndarray], dtype: str) -> Prices:
        if kind in ("gate", "head"):  # a GEMM, whose constants it takes
            as_gemm = {"m": s["tokens"], "n": s["experts" if kind == "gate" else "vocab"], "k": s["hidden"]}
            return _as_derived(self._plain("gemm", as_gemm, dtype))
        if kind in ("norm", "embedding", "attention_prefill"):
            gemm = self.fit.gemm if self.fit else None
            return spec_prices.streaming(self.gpu, gemm, kind, s, dtype, self.share)
        part = getattr(self.fit, kind, None)
        if part is None:
            return spec_prices.plain(self.gpu, kind, s, dtype)
        form = {"attention_decode": compute.attention_decode, "mla_decode": compute.mla_decode}.get(kind)
        if form is None:
            seconds = compute.gemm(part.constants, self.hardware, s["m"], s["n"], s["k"], dtype)
        else:
            seconds = form(part.constants, self.hardware, s, dtype)
        derived = dtype not in part.dtype.split() or self.share < 1
        return _inside(part, s, seconds, derived=np.full(len(seconds), derived))


def rough(family: str, s: Mapping[str, np.ndarray]) -> Any:
    """Rows of a family whose measured times scatter more than the rest's, by their sizes: few, narrow experts (`FEW`), and
    DeepEP's normal mode over several nodes."""
    if family.startswith("expert_gemm"):
        return (s["experts"] / s["ep"] <= FEW[0]) & (s["intermediate"] / s["tp"] <= FEW[1])
    return s["nodes"] > 1 if family.endswith("_normal") else False


def load_costs(gpu: str, fit: str | os.PathLike[str] | None = None) -> Costs:
    """Prices of a GPU preset or file: from the file ``fit`` where one is given, else from its shipped fit where there is
    one, else from its spec. Raises PlancError where ``fit`` is another GPU's (PLN408)."""
    from planc.cost.fits import fit_names, load_fit
    from planc.spec.load import load_cluster, load_gpu, preset_names

    part = load_gpu(gpu)
    links = load_cluster(part.name).links if part.name in preset_names("clusters") else None
    if fit is None:
        return costs_of(part, links, load_fit(part.name) if part.name in fit_names() else None)
    found = load_fit(fit)
    if found.gpu != part.name:
        message = f"`{os.fspath(fit)}` is a fit of {found.gpu}, not of {part.name}"
        hint = "measure this GPU (docs/gpu.md); a fit says nothing of another one"
        raise PlancError([Diagnostic("PLN408", message, "gpu", Span(os.fspath(fit), 1, 1), hint)])
    return costs_of(part, links, found)


def costs_of(gpu: Gpu, links: Links | None, fit: FitFile | None, *, taken: int = 0) -> Costs:
    """Prices of a GPU with a fit, or with none. ``taken``: SMs that communication has for itself, of a GPU with a fit."""
    peaks = {key: float(value) for key in ("bf16", "fp16", "fp8") if (value := getattr(gpu.peak, key)) is not None}
    sms = fit.sms if fit else DEFAULT_SMS
    if fit and taken:
        peaks, sms = {key: value * (sms - taken) / sms for key, value in peaks.items()}, sms - taken
    return Costs(gpu, links, fit, Hardware(peaks, float(gpu.memory_bandwidth), sms))


def _columns(kind: str, sizes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The kind's columns as arrays of one length: floats, or words."""
    given = {name: np.asarray(sizes[name]) for name in KINDS[kind]}
    arrays = np.broadcast_arrays(*(np.atleast_1d(value) for value in given.values()))
    columns = {
        name: array if name in CHOICES else array.astype(float) for name, array in zip(KINDS[kind], arrays, strict=True)
    }
    if "kv_heads" in columns:
        columns["kv_heads"] = np.where(columns["kv_heads"] == 0, columns["heads"], columns["kv_heads"])
    return columns


def _take(s: dict[str, np.ndarray], at: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value[at] for name, value in s.items()}


def _merge(rows: int, parts: list[tuple[np.ndarray, Prices]]) -> Prices:
    """Prices of disjoint masks as one."""
    out = Prices(np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows, dtype="U12"))
    for at, price in parts:
        for name in ("seconds", "low", "high", "provenance"):
            getattr(out, name)[at] = getattr(price, name)
    return out


def _inside(
    part: Any, s: dict[str, np.ndarray], seconds: np.ndarray, derived: Any = False, apart: Any = False
) -> Prices:
    """Interval and provenance of a fit's times."""
    inside = np.ones(len(seconds), dtype=bool)
    for name, (low, high) in part.valid.items():
        inside &= (s[name] >= low) & (s[name] <= high)
    if "ranks" in s:
        inside &= np.isin(s["ranks"], transfer.MEASURED_RANKS)
    known = inside & ~np.asarray(derived) & (not part.derived)
    (low, high), (lower, higher) = part.interval.inside, part.interval.outside
    if part.interval.rough is not None:
        low, high = (np.where(apart, *pair) for pair in zip(part.interval.rough, part.interval.inside, strict=True))
    words = np.where(known, "fitted", np.where(inside, "derived", "extrapolated")).astype("U12")
    return Prices(seconds, seconds * np.where(known, low, lower), seconds * np.where(known, high, higher), words)


def _as_derived(price: Prices) -> Prices:
    words = np.where(price.provenance == "fitted", "derived", price.provenance)
    return replace(price, provenance=words)
