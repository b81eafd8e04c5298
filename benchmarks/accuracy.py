"""How far planc's prices are from measured times: cross-validation of every family, docs/accuracy.md and its figure.

    python benchmarks/accuracy.py --data DIR          # judge the shipped fits
    python benchmarks/accuracy.py --data DIR --fit    # fit again, and write specs/fits/*.yaml

DIR holds the measured tables that docs/accuracy.md names; end-to-end rows are judged by `accuracy_e2e.py`. A row is always judged by constants that were fitted without
it: once with rows left out one by one (five folds), once with whole shapes left out.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy_e2e
import accuracy_figure
import numpy as np
from accuracy_data import read
from accuracy_fit import (
    Family,
    borrowing,
    coverage,
    cross_validate,
    families,
    folds,
    held_out_ends,
    namespace,
    rough_rows,
    search,
    tree,
)
from accuracy_report import report

from planc.cost import load_costs, load_fit
from planc.cost.fits import FAMILIES, FitFile
from planc.cost.hardware import Hardware
from planc.cost.ops import Costs

ROOT = Path(__file__).resolve().parent.parent
GPUS = {"h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
#: DeepEP's own figure for normal mode over 8 nodes is 51 GB/s on H800 (docs/legacy.md), the table's is 22 GB/s
PUBLISHED_NORMAL = 22 / 51
SMS = 132  #: NVIDIA H100 and H200 SXM: 132 streaming multiprocessors (H100 architecture whitepaper)


@dataclass
class Judged:
    """One family on one GPU. Ratios are measured ÷ predicted."""

    family: Family
    gpu: str
    constants: dict[str, float]
    seconds: np.ndarray
    inside: np.ndarray  #: by the constants of all rows
    by_row: np.ndarray
    by_shape: np.ndarray
    covered: float
    interval: dict[str, list[float]]
    valid: dict[str, list[float]]


def judge(
    family: Family,
    gpu: str,
    folder: Path,
    hw: Hardware,
    shipped: FitFile | None,
    found: dict[str, dict[str, float]],
) -> Judged:
    """Fit (or take the shipped constants), cross-validate, and find the interval. ``found``: constants of the families
    before."""
    family, given = borrowing(family, found)
    table = family.read(folder, GPUS[gpu])
    if shipped is None:
        constants = {name: _rounded(name, value) for name, value in search(family, hw, table, family.start, 6).items()}
    else:
        constants = _flat(getattr(shipped, family.name).constants.model_dump())
    start = {
        name: value if name.endswith("power") else max(value, 1e-14)
        for name, value in constants.items()
        if name not in given
    }
    by = [folds(table, by_shape) for by_shape in (False, True)]
    by_row, by_shape = (cross_validate(family, hw, table, start, fold) for fold in by)
    apart = rough_rows(family, table.columns)
    parts = {"inside": ~apart, "rough": apart} if apart.any() else {"inside": ~apart}
    interval = {}
    for word, at in parts.items():
        tail = max(0.0, 0.05 - 0.8 / at.sum())  # quantiles of few rows lie too close together
        low, high = np.quantile(by_row[at], (tail, 1.0 - tail))
        interval[word] = [min(float(low), 1.0), max(float(high), 1.0)]
    ends = np.quantile(held_out_ends(family, hw, table, start), (0.05, 0.95))
    shapes = np.quantile(by_shape, (0.05, 0.95))
    shapes, ends = np.clip(shapes, 1 / 3, 3), np.clip(ends, 1 / 3, 3)  # beyond, a fit of too few rows went astray
    low, high = interval["inside"]
    widest = [min(pair[0] for pair in interval.values()), max(pair[1] for pair in interval.values())]
    interval["outside"] = [
        min(*shapes, *ends, low**1.5, widest[0], 0.85),
        max(*shapes, *ends, high**1.5, widest[1], 1.18),
    ]
    if family.name.endswith("normal"):
        interval["outside"][0] = min(interval["outside"][0], PUBLISHED_NORMAL)
    predicted = family.form(namespace(constants), hw, table.columns)
    return Judged(
        family,
        gpu,
        _in_order(constants | given),
        table.seconds,
        table.seconds / predicted,
        by_row,
        by_shape,
        coverage(by_row, by[0], apart),
        {
            word: [float(f"{v:.3g}") for v in interval[word]]
            for word in ("inside", "outside", "rough")
            if word in interval
        },
        {name: [float(table.columns[name].min()), float(table.columns[name].max())] for name in family.sizes},
    )


def _in_order(constants: dict[str, float]) -> dict[str, float]:
    """Borrowed constants at their place."""
    if "per_expert" not in constants:
        return constants
    first = ("overhead", "per_expert")
    return {name: constants[name] for name in (*first, *(key for key in constants if key not in first))}


def _flat(values: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": part for key, part in value.items()}
        elif isinstance(value, (tuple, list)):
            flat |= {f"{name}.{place}": part for place, part in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _rounded(name: str, value: float) -> float:
    """Four digits are more than a fit can tell; a time below a femtosecond per unit is none."""
    value = float(f"{value:.4g}")
    return 0.0 if 0 < value < 1e-15 and not name.endswith("power") else value


_PLAIN = ("overlap", "power", "_cost", "_heads", "prologue", "tile_edge", "_passes")


def _quantity(name: str, value: float) -> str:
    if name.endswith("bandwidth"):
        return f"{value / 1e9:.4g} GB/s"
    if name.endswith("efficiency"):
        return f"{value * 100:.4g} %"
    if name.endswith(_PLAIN):
        return f"{value:.4g}"
    return f"{value * 1e9:.4g} ns" if value < 1e-7 else f"{value * 1e6:.4g} us"


def _written(values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_written(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: [{', '.join(_quantity(name, part) for part in value)}]")
        else:
            lines.append(f"{indent}{name}: {_quantity(name, value)}")
    return lines


def fit_text(gpu: str, source: str, judged: list[Judged], absent: tuple[str, ...] = ()) -> str:
    """A fit file."""
    head = [
        f"# Fitted times of {gpu}; written by benchmarks/accuracy.py. What each constant is: planc/cost/constants.py.",
        "# `interval`: the middle 90 % of measured ÷ predicted, inside the fitted sizes (`valid`) and outside them.",
        f"gpu: {gpu}",
        f'source: "{source}"',
        f"sms: {SMS}",
    ]
    if absent:
        head.append(f"absent: [{', '.join(absent)}]")
    for one in judged:
        family = one.family
        head += [f"{family.name}:", f'  source: "{family.source}"']
        if family.dtype:
            head.append(f"  dtype: {family.dtype}")
        head.append(f"  rows: {len(one.seconds)}")
        if family.name.endswith("skewed"):
            from accuracy_data import fill

            head.append(f"  fill: {fill(GPUS.get(gpu, ''), family.dtype)}")
        valid = ", ".join(f"{name}: [{low:.12g}, {high:.12g}]" for name, (low, high) in one.valid.items())
        head.append(f"  valid: {{{valid}}}")
        words = ", ".join(f"{word}: {pair}" for word, pair in one.interval.items())
        head.append(f"  interval: {{{words}}}")
        head += ["  constants:", *_written(tree(one.constants), "    ")]
    return "\n".join([*head, ""])


def h800(folder: Path, judged: list[Judged]) -> str:
    """DeepEP's own four low-latency rows on H800: the two bandwidths are fitted, everything else of the form is what
    H100 has, and the file says so."""
    raw = read(folder / "deepep_v1_h800_readme.csv")
    at = raw["mode"] == "low_latency"
    columns = {"nodes": raw["ep"][at] / 8, "tokens": raw["tokens_per_gpu"][at], "hidden": raw["hidden"][at]}
    columns |= {"top_k": raw["topk"][at], "experts": np.full(at.sum(), 256.0)}
    parts = []
    for one in judged:
        if one.gpu != "h100-sxm" or not one.family.name.endswith("low_latency"):
            continue
        kind = one.family.name.split("_")[0]
        seconds = raw[f"{kind}_us"][at] * 1e-6
        from accuracy_data import Table

        table = Table(columns, seconds, np.arange(len(seconds)))
        free = ("nvlink_bandwidth", "nic_bandwidth")
        fixed = {name: value for name, value in one.constants.items() if name not in free}
        start = {name: one.constants[name] for name in free}

        def form(c: Any, hw: Hardware, s: dict[str, np.ndarray], f: Family = one.family, k: Any = fixed) -> np.ndarray:
            return f.form(namespace(k | vars(c)), hw, s)

        words = (
            "deepseek-ai/DeepEP docs/legacy.md, 4 rows (EP 8 to 64, 128 tokens, hidden 7168, top-8): only the two "
            "bandwidths are fitted; overheads, latency and overlap are assumed to be those fitted on h100-sxm"
        )
        family = Family(
            one.family.name, one.family.title, 6, 3, start, form, one.family.read, one.family.sizes, words, "any"
        )
        found = {name: _rounded(name, value) for name, value in search(family, Hardware({}, 1.0), table, start).items()}
        ratio = seconds / form(namespace(found), Hardware({}, 1.0), columns)
        valid = {name: [float(columns[name].min()), float(columns[name].max())] for name in one.family.sizes}
        interval = {"inside": [0.85, 1.18], "outside": [0.75, 1.35]}
        constants = {name: found.get(name, value) for name, value in one.constants.items()}
        parts.append(Judged(family, "h800-sxm", constants, seconds, ratio, ratio, ratio, 1.0, interval, valid))
    absent = tuple(name for name in FAMILIES if name not in {part.family.name for part in parts})
    source = "DeepEP's published H800 figures; its intervals are assumed, four rows cannot tell them"
    return fit_text("h800-sxm", source, parts, absent)


def _hardware(costs: Costs) -> Hardware:
    return Hardware(costs.hardware.peaks, costs.hardware.memory_bandwidth, SMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the measured tables")
    parser.add_argument("--fit", action="store_true", help="fit on all rows and write specs/fits")
    parser.add_argument("--only", default="", help="families whose name matches this pattern; writes nothing")
    options = parser.parse_args()
    judged = []
    for gpu in GPUS:
        hw = _hardware(load_costs(gpu) if not options.fit else _spec_costs(gpu))
        shipped = None if options.fit else load_fit(gpu)
        found: dict[str, dict[str, float]] = {}
        for family in families():
            if not re.search(options.only, family.name):
                continue
            for _, other in family.borrowed:  # not judged before, if `--only` leaves it out
                if other not in found:
                    found[other] = _flat(getattr(load_fit(gpu), other).constants.model_dump())
            one = judge(family, gpu, options.data, hw, shipped, found)
            found[family.name] = one.constants
            judged.append(one)
            errors = [np.abs(1 / ratio - 1) * 100 for ratio in (one.inside, one.by_row, one.by_shape)]
            text = "  ".join(f"{np.median(e):5.2f} / {np.quantile(e, 0.9):5.1f}" for e in errors)
            print(f"{gpu} {family.name:28} {len(one.seconds):5}  {text}  {one.covered:.3f}", flush=True)
    if options.only:
        return
    if options.fit:
        fits = ROOT / "specs" / "fits"
        fits.mkdir(exist_ok=True)
        source = (
            "ai-dynamo/aiconfigurator 095f58a51 (Apache-2.0, Copyright (c) 2025-2026 NVIDIA CORPORATION & AFFILIATES)"
        )
        for gpu in GPUS:
            (fits / f"{gpu}.yaml").write_text(fit_text(gpu, source, [one for one in judged if one.gpu == gpu]), "utf-8")
        (fits / "h800-sxm.yaml").write_text(h800(options.data, judged), "utf-8")
    figures = ROOT / "docs" / "figures"
    (figures / "accuracy.svg").write_text(accuracy_figure.draw(_panels(judged)), "utf-8")
    end_to_end, panels = accuracy_e2e.section(options.data)
    heading = "Predicted (up) against measured (across) time per output token, ms; no constant was fitted to these rows"
    text = accuracy_figure.draw(panels, "Predicted against measured TPOT of served models", heading, 1e-3)
    (figures / "accuracy_e2e.svg").write_text(text, "utf-8")
    (ROOT / "docs" / "accuracy.md").write_text(report(judged, options.data) + end_to_end, "utf-8")


def _spec_costs(gpu: str) -> Costs:
    from planc.cost.ops import costs_of
    from planc.spec.load import load_gpu

    return costs_of(load_gpu(gpu), None, None)


def _panels(judged: list[Judged]) -> list[accuracy_figure.Panel]:
    panels = []
    for name in dict.fromkeys(one.family.name for one in judged):
        ones = [one for one in judged if one.family.name == name]
        note = " · ".join(
            f"{np.median(np.abs(1 / one.by_row - 1)):.1%} of {len(one.seconds)} ({one.gpu[:4].upper()})" for one in ones
        )
        points = {one.gpu: (one.seconds, one.seconds / one.by_row) for one in ones}
        panels.append(accuracy_figure.Panel(ones[0].family.title, note, points))
    return panels


if __name__ == "__main__":
    main()
