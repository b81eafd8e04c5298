"""Families of ops: their forms, the sizes that bound a fit, and where the search for their constants starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from planc.cost import compute, transfer
from planc.cost.hardware import Hardware
from planc.cost.loads import RankLoad

GB, US = 1e9, 1e-6


@dataclass(frozen=True)
class Table:
    """Rows of one family: columns, measured seconds, and the shape that a row belongs to."""

    columns: dict[str, np.ndarray]
    seconds: np.ndarray
    shape: np.ndarray  #: int [rows]: rows of one number are left out together

    def take(self, at: np.ndarray) -> Table:
        """A part of the rows."""
        return Table({name: value[at] for name, value in self.columns.items()}, self.seconds[at], self.shape[at])


def table_of(columns: dict[str, np.ndarray], seconds: np.ndarray, shape: tuple[str, ...]) -> Table:
    """A table whose rows of one shape agree in the columns ``shape``."""
    keys = np.stack([columns[name].astype(float) for name in shape], axis=1)
    return Table(columns, seconds, np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1))


@dataclass(frozen=True)
class Family:
    """A family of ops: its form, and where the search for its constants starts. Names that end in `efficiency` stay in
    (0, 1], those in `power` are searched as they are, all others are positive."""

    name: str
    title: str
    target: float  #: median absolute error to reach on unseen rows
    aim: float
    start: dict[str, float]
    form: Callable[[Any, Hardware, dict[str, np.ndarray]], np.ndarray]
    sizes: tuple[str, ...]  #: columns whose range bounds the fit
    dtype: str = ""


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

_SIZES = ("nodes", "tokens", "hidden", "top_k", "experts")
_LOADS = ("tokens", "hidden", "intermediate", "experts", "top_k", "ep", "tp")


def families() -> list[Family]:
    """Every fitted family, in the order of a fit file."""
    out = [
        Family(
            "gemm", "GEMM, BF16", 7, 4, _GEMM, lambda c, hw, s: compute.gemm(c, hw, s["m"], s["n"], s["k"], "bf16"),
            ("m", "n", "k"), "bf16",
        ),
    ]  # fmt: skip
    for dtype, label in (("bf16", ""), ("fp8", "_fp8")):
        for skewed, word in ((False, "balanced"), (True, "skewed")):
            sizes = _LOADS + (("skew",) if skewed else ())
            name, title = f"expert_gemm{label}_{word}", f"expert GEMM, {dtype.upper()}, {word}"
            target, aim = (20, 12) if skewed else (10, 5)
            out.append(Family(name, title, target, aim, _EXPERTS, _experts(dtype), sizes, dtype))
    out.append(
        Family(
            "attention_decode", "MHA and GQA decode", 25, 12, _ATTENTION, _attention,
            ("batch", "heads", "kv_heads", "head_dim", "kv_len"), "bf16",
        )
    )  # fmt: skip
    out.append(
        Family(
            "mla_decode", "MLA decode", 9, 5, _MLA, lambda c, hw, s: compute.mla_decode(c, hw, s, "bf16"),
            ("batch", "heads", "kv_len"), "bf16",
        )
    )  # fmt: skip
    for kind in ("all_reduce", "all_gather", "all_to_all", "all_reduce_custom", "reduce_scatter"):
        if kind == "all_reduce_custom":
            form = lambda c, hw, s: transfer.custom_all_reduce(c, s["ranks"], s["bytes"])  # noqa: E731
            out.append(Family(kind, "custom all-reduce", 10, 5, _CUSTOM, form, ("ranks", "bytes"), "any"))
            continue
        out.append(
            Family(
                kind, f"NCCL {kind.replace('_', '-')}", 10, 5, _NCCL,
                lambda c, hw, s, k=kind: transfer.nccl(c, k, s["ranks"], s["bytes"]), ("ranks", "bytes"), "any",
            )
        )  # fmt: skip
    for kind in ("dispatch", "combine"):
        for mode, first, form in (("low_latency", _LL, transfer.low_latency), ("normal", _NORMAL, transfer.normal)):
            out.append(
                Family(
                    f"{kind}_{mode}", f"DeepEP {mode.replace('_', '-')} {kind}", 6, 3, first,
                    lambda c, hw, s, k=kind, f=form: f(c, k, s), _SIZES, "any",
                )
            )  # fmt: skip
    return out


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


def flat(values: dict[str, Any]) -> dict[str, float]:
    """Constants by dotted names, of a fit file's nested ones: what `tree` undoes."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": part for key, part in value.items()}
        elif isinstance(value, (tuple, list)):
            found |= {f"{name}.{place}": part for place, part in enumerate(value)}
        else:
            found[name] = value
    return found


def rounded(name: str, value: float) -> float:
    """Four digits are more than a fit can tell; a time below a femtosecond per unit is none."""
    value = float(f"{value:.4g}")
    return 0.0 if 0 < value < 1e-15 and not name.endswith("power") else value
