"""A fit file from measured rows, by the code that fits the shipped ones (`benchmarks/fitting`)."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from benchmarks.fitting import Family, Judged, Table, families, fit_text, judge, table_of
from benchmarks.gpu.rows import Rows
from planc.cost import loads
from planc.cost.fits import FAMILIES
from planc.cost.hardware import Hardware
from planc.cost.ops import CHOICES, KINDS, costs_of
from planc.cost.transfer import MEASURED_RANKS
from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.load import load_gpu

ROWS_PER_CONSTANT = 3  #: fewer rows than this many for each constant are no fit
#: columns that make a shape: its rows are left out together in cross-validation
SHAPES = {
    "gemm": ("n", "k"),
    "expert_gemm": ("hidden", "experts", "ep", "tp"),
    "attention_decode": ("heads", "kv_heads"),
    "mla_decode": ("heads", "batch"),
    "dispatch": ("nodes", "hidden", "top_k", "experts"),
    "combine": ("nodes", "hidden", "top_k", "experts"),
}
FILL = "spread"  #: how `benchmarks.gpu.grid` rounds skewed loads (`planc.cost.loads`)


def fit(rows: Rows, gpu: str) -> str:
    """The text of a fit file: the same bytes for the same rows. Families with too few rows are `absent`. Raises PlancError
    where the rows are another GPU's (PLN408), or too few for any family (PLN404)."""
    part = load_gpu(gpu)
    if rows.facts["gpu"] != part.name:
        message = f"the rows were measured as {rows.facts['gpu']}, not as {part.name}"
        raise PlancError([Diagnostic("PLN408", message, "gpu", Span(rows.ops.file, 1, 1))])
    sms = int(rows.facts["sms"])
    peaks = costs_of(part, None, None).hardware
    hardware = Hardware(peaks.peaks, peaks.memory_bandwidth, sms)
    judged: list[Judged] = []
    for family in families():
        found = _table(rows, family)
        if found is None:
            continue
        table, dtype, software = found
        reason = _too_few(family, table, hardware, dtype)
        if reason:
            print(f"{family.name} is left absent: {reason}", file=sys.stderr)
            continue
        one = judge(dataclasses.replace(family, dtype=dtype), part.name, table, hardware)
        if "ranks" in table.columns:
            one.constants = settled(one.constants, np.unique(table.columns["ranks"]))
        source = f"{_machine(rows)}; {software}"[:1000]
        judged.append(dataclasses.replace(one, source=source, fill=FILL if "skewed" in family.name else ""))
    if not judged:
        message = "no family has rows enough to fit"
        hint = f"{ROWS_PER_CONSTANT} rows for each of its constants, of two shapes at least"
        raise PlancError([Diagnostic("PLN404", message, span=Span(rows.ops.file, 1, 1), hint=hint)])
    known = {one.family.name for one in judged}
    absent = tuple(name for name in FAMILIES if name not in known)
    return fit_text(part.name, _machine(rows), sms, judged, absent, "benchmarks/gpu")


def settled(constants: dict[str, float], ranks: np.ndarray) -> dict[str, float]:
    """Constants of a collective without what rows of these ``ranks`` cannot tell: a bandwidth at ranks that were not
    measured is that of the nearest ones measured; with one number of ranks, latencies and bandwidths do not grow with
    ranks. No time at ``ranks`` changes."""
    out = dict(constants)
    for name in constants:
        head, _, place = name.partition(".")
        if place.isdigit():
            nearest = ranks[np.abs(np.log2(ranks) - np.log2(MEASURED_RANKS[int(place)])).argmin()]
            if nearest in MEASURED_RANKS:
                out[name] = constants[f"{head}.{MEASURED_RANKS.index(int(nearest))}"]
    if len(ranks) == 1:
        for name, value in constants.items():
            if name.endswith("_power"):
                base = name.removesuffix("_power")
                out[base] = float(f"{constants[base] * (ranks[0] / 4.0) ** value:.4g}")
                out[name] = 0.0
    return out


def _table(rows: Rows, family: Family) -> tuple[Table, str, str] | None:
    """The rows that fit a family, the dtypes among them, and what ran."""
    parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    words = set()
    for (kind, dtype), (places, sizes) in rows.ops.groups.items():
        values = {name: np.array(sizes[name]) for name in KINDS[kind]}
        mine = np.array([_family_of(kind, dtype, values, number) == family.name for number in range(len(places))])
        if mine.any():
            parts.append((np.array(places)[mine], {name: value[mine] for name, value in values.items()}))
            words.add(dtype)
    if not parts:
        return None
    at = np.concatenate([part[0] for part in parts])
    order = np.argsort(at)
    columns = {
        name: np.concatenate([part[1][name] for part in parts])[order] for name in parts[0][1] if name not in CHOICES
    }
    at = at[order]
    if "kv_heads" in columns:
        columns["kv_heads"] = np.where(columns["kv_heads"] == 0, columns["heads"], columns["kv_heads"])
    if "skew" in columns:
        tokens, top_k, experts, ep = (columns[name] for name in ("tokens", "top_k", "experts", "ep"))
        load = loads.balanced(tokens, top_k, experts, ep)
        if family.name.endswith("skewed"):
            load = loads.power_law(tokens, top_k, experts, ep, columns["skew"], FILL)
        columns |= {"rows": load.rows, "active": load.active, "padded": load.padded}
    shape = next((names for kind, names in SHAPES.items() if family.name.startswith(kind)), ("bytes",))
    table = table_of(columns, rows.seconds[at], shape)
    dtype = family.dtype if family.dtype in ("any", "fp8") else " ".join(sorted(words))
    return table, dtype, ", ".join(sorted({str(word) for word in rows.software[at]} - {""})) or "software not said"


def _family_of(kind: str, dtype: str, columns: dict[str, np.ndarray], number: int) -> str:
    """The family that a row is fitted in, or nothing: FP8 GEMMs and caches are checked against the constants of 16 bit,
    as they are priced."""
    if kind in ("dispatch", "combine"):
        return f"{kind}_{columns['mode'][number]}"
    if "library" in columns:
        library = columns["library"][number]
        return kind if library == "nccl" else f"{kind}_{library}"
    if kind == "expert_gemm":
        if columns["gated"][number] != 1 or dtype == "fp16":
            return ""
        return (
            f"expert_gemm{'_fp8' if dtype == 'fp8' else ''}_{'skewed' if columns['skew'][number] > 0 else 'balanced'}"
        )
    return kind if dtype in ("bf16", "fp16") else ""


def _too_few(family: Family, table: Table, hardware: Hardware, dtype: str) -> str:
    """Why a table cannot be fitted; empty where it can."""
    least = ROWS_PER_CONSTANT * len(family.start)
    if len(table.seconds) < least:
        return f"{len(table.seconds)} rows, where {len(family.start)} constants need {least}"
    if table.shape.max() == 0:
        return "all rows are of one shape"
    if dtype != "any" and ("fp8" if dtype == "fp8" else "bf16") not in hardware.peaks:
        return f"the GPU's spec gives no peak FLOPS for {dtype}"
    return ""


def _machine(rows: Rows) -> str:
    f = rows.facts
    cuda = f", CUDA {f['cuda']}" if "cuda" in f else ""
    return f"benchmarks/gpu on {f['device']}, driver {f['driver']}, torch {f['torch']}{cuda}, {f['date']}"
