"""How far planc's prices are from measured times: cross-validation of every family, docs/accuracy.md and its figure.

    python benchmarks/accuracy.py --data DIR          # judge the shipped fits
    python benchmarks/accuracy.py --data DIR --fit    # fit again, and write specs/fits/*.yaml

DIR holds the measured tables that docs/accuracy.md names; end-to-end rows are judged by `accuracy_e2e.py`. A row is always
judged by constants that were fitted without it: once with rows left out one by one (five folds), once with whole shapes left out.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accuracy_e2e
import accuracy_figure
import numpy as np
from accuracy_data import fill, read, table_and_source
from accuracy_report import report
from fitting import Family, Judged, Table, families, fit_text, flat, judge, namespace, search
from fitting.families import rounded

from planc.cost import load_costs, load_fit
from planc.cost.fits import FAMILIES, FitFile
from planc.cost.hardware import Hardware
from planc.cost.ops import Costs

ROOT = Path(__file__).resolve().parent.parent
GPUS = {"h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
#: DeepEP's own figure for normal mode over 8 nodes is 51 GB/s on H800 (docs/legacy.md), the table's is 22 GB/s
PUBLISHED_NORMAL = 22 / 51
SMS = 132  #: NVIDIA H100 and H200 SXM: 132 streaming multiprocessors (H100 architecture whitepaper)


#: family -> (constant, family that it is taken from): all FP8 rows have experts of one size, so that time per expert and
#: time per byte of its weights are one
BORROWED = {f"expert_gemm_fp8_{word}": ("per_expert", f"expert_gemm_{word}") for word in ("balanced", "skewed")}


def _judged(
    family: Family, gpu: str, folder: Path, hw: Hardware, shipped: FitFile | None, given: dict[str, float]
) -> Judged:
    """A family on its measured table: fitted anew, or with the shipped constants. ``given``: constants that are not
    searched."""
    table, source = table_and_source(family.name, folder, GPUS[gpu])
    constants = None if shipped is None else flat(getattr(shipped, family.name).constants.model_dump())
    if constants is not None:
        constants = {name: value for name, value in constants.items() if name not in given}
    outside = PUBLISHED_NORMAL if family.name.endswith("normal") else 1.0
    one = judge(_with(family, given), gpu, table, hw, constants, outside)
    found = {name: one.constants.get(name, given.get(name, 0.0)) for name in family.start}
    words = fill(GPUS[gpu], family.dtype) if "skewed" in family.name else ""
    return replace(one, family=family, constants=found, source=source, fill=words)


def _with(family: Family, given: dict[str, float]) -> Family:
    """The family with some constants filled in, which are then not searched."""

    def form(c: Any, hw: Hardware, s: dict[str, np.ndarray]) -> np.ndarray:
        return family.form(SimpleNamespace(**(vars(c) | given)), hw, s)

    return replace(family, form=form, start={k: v for k, v in family.start.items() if k not in given})


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
        family = Family(one.family.name, one.family.title, 6, 3, start, form, one.family.sizes, "any")
        found = {name: rounded(name, value) for name, value in search(family, Hardware({}, 1.0), table, start).items()}
        ratio = seconds / form(namespace(found), Hardware({}, 1.0), columns)
        valid = {name: [float(columns[name].min()), float(columns[name].max())] for name in one.family.sizes}
        interval = {"inside": [0.85, 1.18], "outside": [0.75, 1.35]}
        constants = {name: found.get(name, value) for name, value in one.constants.items()}
        parts.append(Judged(family, "h800-sxm", constants, seconds, ratio, ratio, ratio, 1.0, interval, valid, words))
    absent = tuple(name for name in FAMILIES if name not in {part.family.name for part in parts})
    source = "DeepEP's published H800 figures; its intervals are assumed, four rows cannot tell them"
    return fit_text("h800-sxm", source, SMS, parts, absent, like="h100-sxm")


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
            given = {}
            if family.name in BORROWED:
                name, other = BORROWED[family.name]
                if other not in found:  # not judged before: `--only` left it out
                    found[other] = flat(getattr(load_fit(gpu), other).constants.model_dump())
                given = {name: found[other][name]}
            one = _judged(family, gpu, options.data, hw, shipped, given)
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
            parts = [one for one in judged if one.gpu == gpu]
            (fits / f"{gpu}.yaml").write_text(fit_text(gpu, source, SMS, parts), "utf-8")
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
