"""Measured serving rows: what was measured on which layout, and why a row cannot be compared."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from engine_step import Layout

#: model of a row -> preset
MODELS = {
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
}
MOE = ("deepseek-v3", "qwen3-235b-a22b", "minimax-m2")
NO_CONFIG = {
    "Qwen/Qwen3.5-397B-A17B": "linear attention in most layers, which planc cannot describe",
    "zhipuai/GLM-5": "sparse attention, which planc cannot describe",
}
#: two runs of one setting that differ by more than this differ in something that the rows do not record
CONTRADICTS = 1.3


@dataclass(frozen=True)
class Row:
    """One measurement; ``concurrency``: requests in flight at the client; ``decoders`` and ``prefillers``: instances of
    each pool (agg: one and none); times in s. ``told``: whether no other run of the same setting contradicts it."""

    id: str
    model: str
    gpu: str
    backend: str
    version: str
    mode: str
    fp8: bool
    isl: int
    osl: int
    concurrency: int
    layout: Layout
    decoders: int
    prefillers: int
    prefill_layout: Layout | None
    ttft: float
    tpot: float
    told: bool = True

    @property
    def moe(self) -> bool:
        """Whether the model has experts."""
        return self.model in MOE

    @property
    def setting(self) -> tuple[object, ...]:
        """What the rows record of a run."""
        parts = self.model, self.gpu, self.backend, self.mode, self.fp8, self.isl, self.osl, self.concurrency
        return *parts, self.layout, self.decoders, self.prefillers


def read_rows(path: Path) -> tuple[list[Row], Counter[str]]:
    """The usable rows, each measurement once, and the number of those left out by reason."""
    with open(path, newline="", encoding="utf-8") as handle:
        raw = list(csv.DictReader(handle))
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for cells in raw:  # repeats differ in the last digits
        key = f"{float(cells['silicon_ttft_ms']):.6g}", f"{float(cells['silicon_tpot_ms']):.6g}"
        groups.setdefault(key, []).append(cells)
    left_out = Counter({"repeats of another row": len(raw) - len(groups)})
    found = []
    for members in groups.values():
        reason = ""
        for cells in sorted(members, key=lambda one: _number(one, "decode_num_workers") == 0):
            row = read_row(cells)
            if isinstance(row, Row):
                found.append(row)
                break
            reason = reason or row
        else:
            left_out[reason] += 1
    return _told(found), left_out


def _told(rows: list[Row]) -> list[Row]:
    by: dict[object, list[float]] = {}
    for row in rows:
        by.setdefault(row.setting, []).append(row.tpot)
    at_odds = {key for key, values in by.items() if max(values) > CONTRADICTS * min(values)}
    return [replace(row, told=row.setting not in at_odds) for row in rows]


def read_row(cells: dict[str, str]) -> Row | str:
    """A row, or why it cannot be used."""
    name, mode = cells["model_path"], cells["mode"]
    if name in NO_CONFIG:
        return f"{name.split('/')[1]}: {NO_CONFIG[name]}"
    if "nvfp4" in (cells["gemm_quant_mode"], cells["moe_quant_mode"]) or name == "openai/gpt-oss-120b":
        return "gpt-oss-120b: MXFP4 experts, for which these GPUs have no peak, and sliding windows"
    if name not in MODELS:
        return f"{name}: no preset"
    if _number(cells, "pp_size") > 1 or _number(cells, "decode_pp_size") > 1:
        return "pipeline stages"
    prefix = "decode_" if mode == "disagg" else ""
    decoders, prefillers = _number(cells, "decode_num_workers"), _number(cells, "prefill_num_workers")
    if mode == "disagg" and not (decoders and prefillers):
        return "disagg: how many instances of each pool served the requests is not recorded"
    model = MODELS[name]
    layout = _layout(cells, prefix, model in MOE)
    return Row(
        id=cells["id"],
        model=model,
        gpu=cells["system"].replace("_", "-"),
        backend=cells["backend"],
        version=cells["backend_version"],
        mode=mode,
        fp8=cells["precision"] == "fp8",
        isl=_number(cells, "isl"),
        osl=_number(cells, "osl"),
        concurrency=_concurrency(cells, layout),
        layout=layout,
        decoders=max(1, decoders),
        prefillers=prefillers,
        prefill_layout=_layout(cells, "prefill_", model in MOE) if mode == "disagg" else None,
        ttft=float(cells["silicon_ttft_ms"]) * 1e-3,
        tpot=float(cells["silicon_tpot_ms"]) * 1e-3,
    )


def _number(cells: dict[str, str], name: str) -> int:
    return int(float(cells[name] or 0))


def _layout(cells: dict[str, str], prefix: str, moe: bool) -> Layout:
    """Degrees as the engine had them. Some collections write `tp 8, ep 8` of one node of eight as tp 64 (or attention DP
    64), expert TP 8 × EP 8: rows of the same measurement in other collections show that it is EP 8 on eight GPUs."""
    tp, data = (max(1, _number(cells, f"{prefix}{name}")) for name in ("tp_size", "attention_dp_size"))
    moe_tp, moe_ep = (max(1, _number(cells, f"{prefix}{name}")) for name in ("moe_tp_size", "moe_ep_size"))
    if not moe:
        return Layout(tp)
    if moe_tp == moe_ep == 8 and 64 in (tp, data):
        tp, data, moe_tp = min(tp, 8), min(data, 8), 1
    if moe_tp * moe_ep == 1:  # not recorded: experts are split like attention
        moe_tp = tp * data
    return Layout(tp, max(1, moe_tp * moe_ep // tp), moe_tp, moe_ep)


def _concurrency(cells: dict[str, str], layout: Layout) -> int:
    """Requests in flight at the client; without a record, the batch column, per instance where there are several."""
    told = re.search(r"silicon_concurrency=(\d+)", cells["silicon_data_source"]) or re.search(r"_c(\d+)_", cells["id"])
    if told:
        return int(told.group(1))
    if cells["mode"] == "disagg":
        return _number(cells, "decode_batch_size") * _number(cells, "decode_num_workers") * layout.attention_dp
    return _number(cells, "batch_size")
