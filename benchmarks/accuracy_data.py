"""Measured tables (one CSV each, see the README beside them) as columns of `planc costs`.

Units differ by table: times in ms or us; `message_size` in elements; MoE `num_tokens` over the whole EP group, DeepEP
`num_token` per GPU; KV length is isl + step.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fitting import Table, table_of

from planc.cost import compute, loads
from planc.cost.hardware import Hardware


def read(path: Path) -> dict[str, np.ndarray]:
    """A CSV as arrays: numbers where every value is one, else text."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    columns = {}
    for name in rows[0]:
        values = np.array([row[name] or "nan" for row in rows])
        try:
            columns[name] = values.astype(float)
        except ValueError:
            columns[name] = values
    return columns


def _join(parts: list[dict[str, np.ndarray]], names: dict[str, str]) -> dict[str, np.ndarray]:
    """Columns of several tables under planc's names (``names``: planc's → the table's)."""
    return {ours: np.concatenate([part[theirs] for part in parts]) for ours, theirs in names.items()}


def gemm(folder: Path, gpu: str) -> Table:
    """TensorRT-LLM, BF16 in and out."""
    raw = read(folder / f"{gpu}_gemm_bf16.csv")
    return table_of({key: raw[key] for key in "mnk"}, raw["latency"] * 1e-3, ("n", "k"))


def expert_gemm(folder: Path, gpu: str, dtype: str, skewed: bool) -> Table:
    """TensorRT-LLM's grouped GEMM (CUTLASS), gated; the load of the measured rank is worked out here once."""
    names = [f"{gpu}_moe_fp8block_h7168.csv"] if dtype == "fp8" else [f"{gpu}_moe_bf16.csv"]
    if dtype == "bf16" and gpu == "h100_sxm":
        names.append("h100_sxm_moe_bf16_h7168_rc10.csv")
    ours = {"tokens": "num_tokens", "hidden": "hidden_size", "intermediate": "inter_size", "experts": "num_experts"}
    ours |= {"top_k": "topk", "ep": "moe_ep_size", "tp": "moe_tp_size", "law": "distribution", "latency": "latency"}
    s = _join([read(folder / name) for name in names], ours)
    law = s.pop("law")
    s["skew"] = np.array([float(word.split("_")[-1]) if word.startswith("power_law") else 0.0 for word in law])
    s["gated"] = np.ones(len(law))
    at = (s["skew"] > 0) == skewed
    s = {name: value[at] for name, value in s.items()}
    seconds = s.pop("latency") * 1e-3
    args = s["tokens"], s["top_k"], s["experts"], s["ep"]
    load = loads.power_law(*args, s["skew"], fill(gpu, dtype)) if skewed else loads.balanced(*args)
    s |= {"rows": load.rows, "active": load.active, "padded": load.padded}
    return table_of(s, seconds, ("hidden", "experts", "ep", "tp"))


def fill(gpu: str, dtype: str) -> str:
    """How the load generator of the tables dealt out what rounding left (`planc.cost.loads`): most BF16 rows of H100
    come from 1.3.0rc10, the others from 1.3.0rc20."""
    return "packed" if dtype == "bf16" and gpu == "h100_sxm" else "spread"


def attention_decode(folder: Path, gpu: str) -> Table:
    """TensorRT-LLM, BF16 cache."""
    raw = read(folder / f"{gpu}_attn_generation_hd128.csv")
    kv = np.where(raw["num_key_value_heads"] == 0, raw["num_heads"], raw["num_key_value_heads"])
    s = {"batch": raw["batch_size"], "heads": raw["num_heads"], "kv_heads": kv, "head_dim": raw["head_dim"]}
    s["kv_len"] = raw["isl"] + raw["step"]
    s["xqa"] = compute.uses_xqa(Hardware({}, 1.0), s)
    return table_of(s, raw["latency"] * 1e-3, ("heads", "kv_heads"))


def mla_decode(folder: Path, gpu: str) -> Table:
    """TensorRT-LLM (FlashMLA), BF16 latent."""
    raw = read(folder / f"{gpu}_mla_generation.csv")
    s = {"batch": raw["batch_size"], "heads": raw["num_heads"], "kv_len": raw["isl"] + raw["step"]}
    return table_of(s, raw["latency"] * 1e-3, ("heads", "batch"))


def nccl(folder: Path, gpu: str, kind: str) -> Table:
    """nccl-tests in one node; half is two bytes an element, int8 one."""
    raw = read(folder / f"{gpu}_nccl.csv")
    at = raw["op_name"] == {"all_to_all": "alltoall"}.get(kind, kind)
    width = np.where(raw["nccl_dtype"] == "half", 2.0, 1.0)
    s = {"ranks": raw["num_gpus"][at], "bytes": (raw["message_size"] * width)[at]}
    return table_of(s, raw["latency"][at] * 1e-3, ("bytes",))


def custom_all_reduce(folder: Path, gpu: str) -> Table:
    """TensorRT-LLM's, BF16."""
    raw = read(folder / f"{gpu}_custom_allreduce_trtllm.csv")
    s = {"ranks": raw["num_gpus"], "bytes": raw["message_size"] * 2.0}
    return table_of(s, raw["latency"] * 1e-3, ("bytes",))


_DEEPEP = {"nodes": "node_num", "tokens": "num_token", "hidden": "hidden_size", "top_k": "num_topk"}
_DEEPEP |= {"experts": "num_experts"}


def low_latency(folder: Path, gpu: str, kind: str) -> Table:
    """DeepEP, one node of this GPU and 2, 4 and 8 nodes of H100 (the only ones measured)."""
    files = [f"{gpu}_deepep_ll_1node_manyshapes.csv", "h100_sxm_deepep_ll_multinode.csv"]
    s = _join([read(folder / name) for name in files], _DEEPEP | {"us": f"{kind}_avg_t_us"})
    return table_of(s, s.pop("us") * 1e-6, ("nodes", "hidden", "top_k", "experts"))


def normal(folder: Path, gpu: str, kind: str) -> Table:
    """DeepEP on 20 SMs, transmission plus notification; several nodes as in `low_latency`. Of the two one-node tables
    the newer one counts (DeepEP as in SGLang 0.5.12): they differ by 10 %."""
    columns = _DEEPEP | {"sms": f"{kind}_sms", "sent": f"{kind}_transmit_us", "told": f"{kind}_notify_us"}
    one = _join([read(folder / f"{gpu}_deepep_normal_1node_manyshapes.csv")], columns)
    many = _join([read(folder / "h100_sxm_deepep_normal_multinode.csv")], columns)
    at = (many["sms"] == 20) & (many["nodes"] > 1)
    s = {name: np.concatenate([one[name], many[name][at]]) for name in columns}
    seconds = (s.pop("sent") + s.pop("told")) * 1e-6
    s.pop("sms")
    return table_of(s, seconds, ("nodes", "hidden", "top_k", "experts"))


_TRT = "aiconfigurator 095f58a, TensorRT-LLM 1.3.0rc20"
_NCCL = "aiconfigurator 095f58a, nccl-tests with NCCL 2.29.2, one node, half and int8"


def table_and_source(family: str, folder: Path, gpu: str) -> tuple[Table, str]:
    """The measured rows of a family on one GPU, and where they come from."""
    reader, source = _READERS[family]
    return reader(folder, gpu), source


def _moe_source(dtype: str, word: str) -> str:
    what = "FP8 block scales" if dtype == "fp8" else "BF16; on H100 hidden 7168 from 1.3.0rc10"
    return f"{_TRT} moe_perf ({what}), {word}"


def _deepep_source(mode: str) -> str:
    words = "; 2 to 8 nodes: 0.5.6.post2, H100, 256 and 288 experts" + (", 20 SMs" if mode == "normal" else "")
    return f"aiconfigurator 095f58a, DeepEP as in SGLang 0.5.12, one node{words}"


#: family -> what reads its table, and the table's source
_READERS: dict[str, tuple[Callable[[Path, str], Table], str]] = {
    "gemm": (gemm, f"{_TRT} gemm_perf (BF16)"),
    "attention_decode": (attention_decode, f"{_TRT} generation_attention_perf (BF16 cache)"),
    "mla_decode": (mla_decode, f"{_TRT} generation_mla_perf (BF16 cache)"),
    "all_reduce_custom": (custom_all_reduce, f"{_TRT} custom_allreduce_perf (BF16), one node"),
}
_READERS |= {
    f"expert_gemm{label}_{word}": (
        lambda folder, gpu, d=dtype, k=skewed: expert_gemm(folder, gpu, d, k),
        _moe_source(dtype, word),
    )
    for dtype, label in (("bf16", ""), ("fp8", "_fp8"))
    for skewed, word in ((False, "balanced"), (True, "skewed"))
}
_READERS |= {
    kind: (lambda folder, gpu, k=kind: nccl(folder, gpu, k), _NCCL)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
}
_READERS |= {
    f"{kind}_{mode}": (lambda folder, gpu, k=kind, r=reader: r(folder, gpu, k), _deepep_source(mode))
    for kind in ("dispatch", "combine")
    for mode, reader in (("low_latency", low_latency), ("normal", normal))
}
