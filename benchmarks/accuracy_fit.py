"""Fitting: families of ops with their forms and starting values, robust least squares on log errors, cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accuracy_data import Table, attention_decode, custom_all_reduce, expert_gemm, gemm, low_latency, mla_decode, nccl
from accuracy_data import normal as normal_table
from scipy.optimize import least_squares

from planc.cost import compute, transfer
from planc.cost.hardware import Hardware
from planc.cost.loads import RankLoad
from planc.cost.ops import rough

GB, US = 1e9, 1e-6
FOLDS = 5


@dataclass(frozen=True)
class Family:
    """A family of ops: how it is read, its form, and where the search for its constants starts. Names that end in
    `efficiency` stay in (0, 1], those in `power` are searched as they are, all others are positive."""

    name: str
    title: str
    target: float  #: median absolute error to reach on unseen rows
    aim: float
    start: dict[str, float]
    form: Callable[[Any, Hardware, dict[str, np.ndarray]], np.ndarray]
    read: Callable[[Path, str], Table]
    sizes: tuple[str, ...]  #: columns whose range bounds the fit
    source: str
    dtype: str = ""
    borrowed: tuple[tuple[str, str], ...] = ()  #: (constant, family that it is taken from): the rows cannot tell it


def _attention(c: Any, hw: Hardware, s: dict[str, np.ndarray]) -> np.ndarray:
    return compute.attention_decode(c, hw, s, "bf16")


def _experts(dtype: str) -> Callable[[Any, Hardware, dict[str, np.ndarray]], np.ndarray]:
    def form(c: Any, hw: Hardware, s: dict[str, np.ndarray]) -> np.ndarray:
        return compute.expert_gemm(c, hw, RankLoad(s["rows"], s["active"], s["padded"]), s, dtype)

    return form


_GEMM = {"overhead": 2.4 * US, "compute_efficiency": 0.94, "memory_efficiency": 0.82, "overlap": 3.0}
_GEMM |= {"tile_edge": 9.5, "prologue": 115.0, "step_latency": 1.3e-10, "split_overhead": 2 * US}
_EXPERTS = {
    "overhead": 30 * US,
    "per_expert": 0.1 * US,
    "per_routed": 0.06 * US,
    "compute_efficiency": 0.9,
    "memory_efficiency": 0.9,
}
_EXPERTS |= {"overlap": 2.0, "activation_passes": 1.4, "per_choice": 3e-9}
_ATTENTION = {"xqa.overhead": 5.3 * US, "xqa.block": 4.7 * US, "xqa.token": 1e-9, "xqa.group_cost": 0.5}
_ATTENTION |= {"xqa.group_power": 2.2, "xqa.split_overhead": 2.3 * US, "xqa.memory_efficiency": 0.87}
_ATTENTION |= {"xqa.overlap": 2.6, "mmha.overhead": 3.7 * US, "mmha.block": 4.7 * US, "mmha.token": 2e-8}
_ATTENTION |= {"mmha.split_overhead": 1.2 * US, "mmha.memory_efficiency": 0.95, "mmha.l2_bandwidth": 1e4 * GB}
_ATTENTION |= {"mmha.overlap": 1.6}
_MLA = {"overhead": 7 * US, "block": 0.7 * US, "block_heads": 0.2, "sequence": 5 * US, "sequence_heads": 0.4}
_MLA |= {"start": 0.9 * US, "memory_efficiency": 0.97, "query_efficiency": 0.75, "overlap": 1.5}
_NCCL = {"ll_latency": 8 * US, "ll_latency_power": 0.5, "ll_bandwidth": 8 * GB, "ll128_latency": 1.2 * US}
_NCCL |= {"ll128_latency_power": 0.5, "ll128_bandwidth": 130 * GB, "ll128_bandwidth_power": 0.4}
_NCCL |= {"simple_latency": 13 * US, "simple_bandwidth.0": 260 * GB, "simple_bandwidth.1": 305 * GB}
_NCCL |= {"simple_bandwidth.2": 330 * GB}
_CUSTOM = {"one_shot_latency": 2.9 * US, "one_shot_latency_power": 0.1, "one_shot_bandwidth": 280 * GB}
_CUSTOM |= {"one_shot_bandwidth_power": 0.1, "two_shot_latency": 8 * US, "two_shot_latency_power": 1.0}
_CUSTOM |= {"two_shot_bandwidth": 240 * GB, "two_shot_bandwidth_power": 0.1, "large_latency": 40 * US}
_CUSTOM |= {"large_bandwidth.0": 315 * GB, "large_bandwidth.1": 362 * GB, "large_bandwidth.2": 467 * GB}
_LL = {"overhead": 8 * US, "per_expert": 0.012 * US, "per_hidden": 2e-10, "remote_latency": 18 * US}
_LL |= {"nvlink_bandwidth": 270 * GB, "nic_bandwidth": 46 * GB, "pair_bandwidth": 4 * GB, "overlap": 1.08}
_NORMAL = {"node_overhead": 25 * US, "node_per_hidden": 2e-9, "token_bandwidth": 160 * GB}
_NORMAL |= {
    "nvlink_bandwidth": 330 * GB,
    "node_overlap": 2.2,
    "filling": 18 * US,
    "overhead": 50 * US,
    "per_node": 9 * US,
}
_NORMAL |= {"nic_bandwidth.0": 37 * GB, "nic_bandwidth.1": 46 * GB, "nic_bandwidth.2": 22 * GB, "overlap": 0.85}

_TRT = "aiconfigurator 095f58a, TensorRT-LLM 1.3.0rc20"
_SIZES = ("nodes", "tokens", "hidden", "top_k", "experts")
_LOADS = ("tokens", "hidden", "intermediate", "experts", "top_k", "ep", "tp")


def families() -> list[Family]:
    """Every fitted family, in the order of a fit file."""
    out = [
        Family(
            "gemm", "GEMM, BF16", 7, 4, _GEMM, lambda c, hw, s: compute.gemm(c, hw, s["m"], s["n"], s["k"], "bf16"),
            gemm, ("m", "n", "k"), f"{_TRT} gemm_perf (BF16)", "bf16",
        ),
    ]  # fmt: skip
    for dtype, label in (("bf16", ""), ("fp8", "_fp8")):
        for skewed, word in ((False, "balanced"), (True, "skewed")):
            version = f"{_TRT} moe_perf ({'FP8 block scales' if dtype == 'fp8' else 'BF16; on H100 hidden 7168 from 1.3.0rc10'})"
            out.append(
                Family(
                    f"expert_gemm{label}_{word}", f"expert GEMM, {dtype.upper()}, {word}", 20 if skewed else 10,
                    12 if skewed else 5, _EXPERTS, _experts(dtype),
                    lambda folder, gpu, d=dtype, k=skewed: expert_gemm(folder, gpu, d, k), _LOADS + (("skew",) if skewed else ()),
                    f"{version}, {word}", dtype,
                    # all FP8 rows have experts of one size: time per expert and time per byte of its weights are one
                    (("per_expert", f"expert_gemm_{word}"),) if dtype == "fp8" else (),
                )
            )  # fmt: skip
    out.append(
        Family(
            "attention_decode", "MHA and GQA decode", 25, 12, _ATTENTION, _attention, attention_decode,
            ("batch", "heads", "kv_heads", "head_dim", "kv_len"), f"{_TRT} generation_attention_perf (BF16 cache)", "bf16",
        )
    )  # fmt: skip
    out.append(
        Family(
            "mla_decode", "MLA decode", 9, 5, _MLA, lambda c, hw, s: compute.mla_decode(c, hw, s, "bf16"), mla_decode,
            ("batch", "heads", "kv_len"), f"{_TRT} generation_mla_perf (BF16 cache)", "bf16",
        )
    )  # fmt: skip
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        out.append(
            Family(
                kind, f"NCCL {kind.replace('_', '-')}", 10, 5, _NCCL,
                lambda c, hw, s, k=kind: transfer.nccl(c, k, s["ranks"], s["bytes"]),
                lambda folder, gpu, k=kind: nccl(folder, gpu, k), ("ranks", "bytes"),
                "aiconfigurator 095f58a, nccl-tests with NCCL 2.29.2, one node, half and int8", "any",
            )
        )  # fmt: skip
    out.append(
        Family(
            "all_reduce_custom", "custom all-reduce", 10, 5, _CUSTOM,
            lambda c, hw, s: transfer.custom_all_reduce(c, s["ranks"], s["bytes"]), custom_all_reduce,
            ("ranks", "bytes"), f"{_TRT} custom_allreduce_perf (BF16), one node", "any",
        )
    )  # fmt: skip
    for mode, start, read in (("low_latency", _LL, low_latency), ("normal", _NORMAL, normal_table)):
        for kind in ("dispatch", "combine"):
            form = transfer.low_latency if mode == "low_latency" else transfer.normal
            words = "; 2 to 8 nodes: 0.5.6.post2, H100, 256 and 288 experts" + (", 20 SMs" if mode == "normal" else "")
            out.append(
                Family(
                    f"{kind}_{mode}", f"DeepEP {mode.replace('_', '-')} {kind}", 6, 3, start,
                    lambda c, hw, s, k=kind, f=form: f(c, k, s), lambda folder, gpu, k=kind, r=read: r(folder, gpu, k),
                    _SIZES, f"aiconfigurator 095f58a, DeepEP as in SGLang 0.5.12, one node{words}", "any",
                )
            )  # fmt: skip
    order = ["gemm", "expert_gemm", "attention", "mla", "all_", "reduce", "dispatch", "combine"]
    return sorted(out, key=lambda f: next(i for i, word in enumerate(order) if f.name.startswith(word)))


def borrowing(family: Family, found: dict[str, dict[str, float]]) -> tuple[Family, dict[str, float]]:
    """The family with borrowed constants filled in, which are then not searched, and those constants. ``found``: constants
    by family."""
    given = {name: found[other][name] for name, other in family.borrowed}
    if not given:
        return family, {}

    def form(c: Any, hw: Hardware, s: dict[str, np.ndarray]) -> np.ndarray:
        return family.form(SimpleNamespace(**(vars(c) | given)), hw, s)

    return replace(family, form=form, start={k: v for k, v in family.start.items() if k not in given}), given


def tree(flat: dict[str, float]) -> dict[str, Any]:
    """Constants by dotted names, nested: `xqa.block` into a mapping, `simple_bandwidth.0` into a list."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        head, _, rest = name.partition(".")
        if rest.isdigit():
            out.setdefault(head, []).append(value)
        elif rest:
            out.setdefault(head, {})[rest] = value
        else:
            out[name] = value
    return out


def namespace(flat: dict[str, float]) -> Any:
    """Constants as the forms read them."""
    return SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in tree(flat).items()})


def search(family: Family, hw: Hardware, table: Table, start: dict[str, float], tries: int = 1) -> dict[str, float]:
    """Constants that minimise a robust sum of squared log errors (soft L1 beyond 5 %); further ``tries`` start from
    points drawn around ``start``, with a fixed seed."""
    names = list(start)
    plain = np.array([name.endswith("power") for name in names])
    low = np.where(plain, -4.0, -60.0)
    high = np.array(
        [4.0 if p else 0.0 if n.endswith("efficiency") else 60.0 for n, p in zip(names, plain, strict=True)]
    )
    high = np.array([np.log(16.0) if n.endswith("overlap") else h for n, h in zip(names, high, strict=True)])
    low = np.array([np.log(0.55) if n.endswith("overlap") else v for n, v in zip(names, low, strict=True)])
    first = np.array([v if p else np.log(v) for v, p in zip(start.values(), plain, strict=True)])
    values = lambda x: dict(zip(names, np.where(plain, x, np.exp(np.where(plain, 0.0, x))).tolist(), strict=True))  # noqa: E731
    measured = np.log(table.seconds)

    def errors(x: np.ndarray) -> np.ndarray:
        return np.log(family.form(namespace(values(x)), hw, table.columns)) - measured

    rng, best = np.random.default_rng(0), None
    for attempt in range(tries):
        begin = first + (rng.normal(0.0, 0.3, len(first)) if attempt else 0.0)
        begin = np.clip(begin, low + 1e-6, high - 1e-6)
        found = least_squares(errors, begin, bounds=(low, high), loss="soft_l1", f_scale=0.05, max_nfev=200)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return values(best.x)


def folds(table: Table, by_shape: bool) -> np.ndarray:
    """Fold of every row, int [rows]: of rows one by one, or of whole shapes."""
    rng = np.random.default_rng(1)
    if not by_shape:
        return rng.permutation(len(table.seconds)) % FOLDS
    return (rng.permutation(table.shape.max() + 1) % FOLDS)[table.shape]


def cross_validate(family: Family, hw: Hardware, table: Table, start: dict[str, float], fold: np.ndarray) -> np.ndarray:
    """Measured ÷ predicted of every row, predicted by constants fitted without the row's fold."""
    ratio = np.empty(len(table.seconds))
    for one in np.unique(fold):
        at = fold == one
        if at.all():
            raise ValueError(f"{family.name}: one shape only")
        constants = search(family, hw, table.take(~at), start)
        part = table.take(at)
        ratio[at] = part.seconds / family.form(namespace(constants), hw, part.columns)
    return ratio


def held_out_ends(family: Family, hw: Hardware, table: Table, start: dict[str, float]) -> np.ndarray:
    """Measured ÷ predicted of the tenth of rows with the shortest and the tenth with the longest times (of each number
    of nodes or ranks), by constants fitted to those between: how a fit does outside its range."""
    outer = np.zeros(len(table.seconds), dtype=bool)
    members = table.columns.get("nodes", table.columns.get("ranks", np.ones(len(outer))))
    for one in np.unique(members):
        at = members == one
        low, high = np.quantile(table.seconds[at], (0.1, 0.9))
        outer |= at & ((table.seconds < low) | (table.seconds > high))
    constants = search(family, hw, table.take(~outer), start)
    part = table.take(outer)
    return np.asarray(part.seconds / family.form(namespace(constants), hw, part.columns))


def rough_rows(family: Family, s: dict[str, np.ndarray]) -> np.ndarray:
    """Rows whose interval is their own (`planc.cost.ops.rough`)."""
    return np.broadcast_to(rough(family.name, s), len(next(iter(s.values()))))


def coverage(ratio: np.ndarray, fold: np.ndarray, apart: np.ndarray) -> float:
    """Share of rows within the 5 % and 95 % quantiles of the other folds' ratios; rows of ``apart`` among themselves."""
    inside = np.empty(len(ratio), dtype=bool)
    for one in np.unique(fold):
        for group in (apart, ~apart):
            at = (fold == one) & group
            if at.any():
                others = ratio[(fold != one) & group]
                tail = max(0.0, 0.05 - 0.8 / len(others))
                low, high = np.quantile(others, (tail, 1.0 - tail))
                inside[at] = (ratio[at] >= min(low, 1.0)) & (ratio[at] <= max(high, 1.0))
    return float(inside.mean())
