"""docs/accuracy.md: tables of errors, what a family stands for, other software on the same GPU, and predicted EP 128
and 256."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_data import read, table_and_source
from fitting import Judged, families, namespace, rough_rows, search

from planc.cost.hardware import Hardware
from planc.cost.ops import load_costs

_HEAD = """# Accuracy

Written by `python benchmarks/accuracy.py --data DIR` (with `--fit` it fits again and writes `specs/fits`). Every number is
an error on rows that the constants were **not** fitted on: five folds of single rows, and five folds of whole shapes, so
that no row of a judged shape was seen. Error is |predicted ÷ measured − 1| in percent, median and, behind the slash, the
90th percentile. "in" is the error of the shipped constants on the rows they were fitted to; hardly better than unseen
rows, which is what few constants should show. "held" is the share of unseen rows inside the 90 % interval, whose
quantiles come from other rows.

![predicted against measured](figures/accuracy.svg)

| family | GPU | rows | in | unseen rows | unseen shapes | held | target | aim |
|---|---|---|---|---|---|---|---|---|
"""

_FORMS = """
## What is fitted

A family has 7 to 15 constants per GPU (and dtype), in `specs/fits/GPU.yaml`, whose names are explained in
`planc/cost/constants.py`; the forms are `planc/cost/compute.py` and `planc/cost/transfer.py`. No constant belongs to a
row, a shape or a model.

- **GEMM**: the best of 8 tiles × 4 depth splits; whole waves of blocks on 132 SMs; overhead.
- **Expert GEMM**: weights of the active experts against padded rows, rows moved through memory, sorting over the group's
  choices and the model's experts. For skewed loads the rank with the most pairs is drawn from the power law that the measurements used
  (`planc/cost/loads.py`): its rows, its active experts, its padding.
- **MHA and GQA decode**: TensorRT-LLM's own rule says which of two kernels runs (XQA for groups of 2 to 32 heads with enough
  blocks, else the multi-head kernel, which reads the cache of a group once per head) and how far a sequence is split;
  waves of blocks against memory. Where the library changes kernel, time can fall as a size grows: so it was measured.
  Elsewhere no price falls as a size grows, but for skewed experts (below).
- **MLA decode**: FlashMLA's tiles of 64 heads and blocks of 64 tokens dealt to the SMs.
- **NCCL**: the quickest of three protocols, each a line; **custom all-reduce**: one-shot, two-shot, fall-back.
- **DeepEP low-latency**: one form for any number of nodes: a share (N − 1)/N of the copies goes through the NIC.
  **Normal**: copies per node that a token chose; bandwidth at 2, 4 and 8 nodes is measured, kept from 8 on.

## What a family stands for

- `library custom` is TensorRT-LLM's all-reduce. vLLM's in a CUDA graph is not fitted; see the table below.
- `expert_gemm` is TensorRT-LLM's CUTLASS grouped GEMM, BF16 or FP8 with block scales. On H100 BF16 of hidden 7168 comes
  from version 1.3.0rc10, of hidden 4096 and 6144 from 1.3.0rc20; one set of constants serves both.
- The power law's rounding differs between the two versions: with few tokens the older one puts what rounding leaves over on
  one rank, the newer one deals it out. A fit says which (`fill`). The law also changes its limits where tokens × top-k
  passes the number of experts, so a skewed time can fall there.
- `dispatch` and `combine` are DeepEP as in SGLang. The wire format follows from the mode, whatever the dtype column says:
  low-latency dispatch FP8, combine BF16. Normal mode is on 20 SMs, without other numbers of SMs.
- Normal mode over 8 nodes is a table that its publisher calls legacy: 22 GB/s over the NIC, where 2 and 4 nodes have 37 and
  46 and DeepEP itself publishes 51 GB/s (H800). It is fitted as measured; beyond 8 nodes the interval reaches down to
  DeepEP's figure.
- Measured on H100 only, and used for H200 too: DeepEP over 2, 4 and 8 nodes.
- Decode attention was measured again and again on one cache, so that a small cache is partly in L2.
- All FP8 experts that were measured have one size, so that time per expert and time per byte of its weights cannot be told
  apart: the time per expert is that of BF16 on the same GPU. (Searched freely, it takes 1.1 µs and errors are the same.)
- `derived` prices (FP8 GEMM, FP8 caches, experts of two matrices, gates, heads, norms, prefill attention) rest on the
  constants of a measured relative and were compared with nothing but the served models below.

"""

_NOT_BLIND = (
    "These are not blind predictions: nothing was fitted on published figures for 16 and 32 nodes, but a first form of the\n"
    "receive term was changed because its price for 32 nodes was implausible, by somebody who roughly remembered those figures."
)


def report(judged: list[Judged], folder: Path) -> str:
    """The page."""
    rows = [_row(one) for one in judged]
    misses = [one for one in judged if _median(one.by_row) > one.family.target]
    text = _HEAD + "\n".join(rows) + "\n\n"
    summary = f"Targets missed on unseen rows: {', '.join(f'{m.family.title} ({m.gpu})' for m in misses) or 'none'}. "
    short = [
        f"{o.family.title} on {o.gpu} ({_median(o.by_row):.1f})" for o in judged if _median(o.by_row) > o.family.aim
    ]
    summary += f"Aims missed: {', '.join(short) or 'none'}."
    text += textwrap.fill(summary, 120) + "\n"
    text += (
        "\n"
        + textwrap.fill(_slow(judged, folder), 120)
        + "\n"
        + _FORMS
        + "## Other software on the same GPU\n\n"
        + _others(folder)
    )
    return text + "\n## More nodes than were measured\n\n" + _nodes(folder)


def _median(ratio: np.ndarray) -> float:
    return float(np.median(np.abs(1 / ratio - 1))) * 100


def _errors(ratio: np.ndarray) -> str:
    errors = np.abs(1 / ratio - 1) * 100
    return f"{np.median(errors):.1f} / {np.quantile(errors, 0.9):.0f}"


def _row(one: Judged) -> str:
    parts = (one.inside, one.by_row, one.by_shape)
    cells = " | ".join(_errors(part) for part in parts)
    family = one.family
    return (
        f"| {family.title} | {one.gpu} | {len(one.seconds):,} | {cells} | {one.covered:.0%} | {family.target:g} | "
        f"{family.aim:g} |"
    )


def _slow(judged: list[Judged], folder: Path) -> str:
    """The share of slow rows among few, narrow experts, which makes the 90th percentile of BF16 experts what it is."""
    parts = []
    for one in judged:
        if one.family.name != "expert_gemm_balanced":
            continue
        columns = table_and_source(one.family.name, folder, one.gpu.replace("-", "_"))[0].columns
        few = rough_rows(one.family, columns)
        share = [float((one.by_row[at] > 1.4).mean()) for at in (few, ~few)]
        parts.append(f"{share[0]:.0%} of rows with few, narrow experts and {share[1]:.1%} of the others on {one.gpu}")
    return (
        "The 90th percentile of BF16 expert GEMM is large for one reason: of some shapes every measured size is two to "
        "three times slower than of their neighbours (balanced rows over 1.4 × the prediction: "
        f"{'; '.join(parts)}). They have at most 12 experts a rank and at most 2048 columns of each; other shapes of that kind "
        "are not slow, and no size tells the two apart: the likely cause is a slow tile that the tuner of the grouped GEMM chose. The point price "
        "is that of the ordinary kernel; the interval of such shapes (`rough`) says up to how much it can be."
    )


def _others(folder: Path) -> str:
    """Median and range of measured ÷ planc's price, for tables that no fit used."""
    lines = ["Median of measured ÷ price (middle 80 % in brackets), for tables that no fit uses:", ""]
    lines += ["| table | priced as | h100-sxm | h200-sxm |", "|---|---|---|---|"]
    kinds: list[tuple[str, str, Any]] = [
        ("vLLM 0.24 all-reduce, CUDA graph", "custom all-reduce", lambda g: _vllm(folder, g, "vllm_graph")),
        ("vLLM 0.24 all-reduce, eager", "custom all-reduce", lambda g: _vllm(folder, g, "vllm_eager")),
        ("SGLang masked grouped GEMM, FP8", "expert GEMM, FP8", lambda g: _wideep(folder, g)),
        ("TensorRT-LLM DeepEP, low-latency, FP8 dispatch", "dispatch", lambda g: _a2a(folder, g, "trtllm", "fp8", 0)),
        (
            "TensorRT-LLM DeepEP, low-latency, BF16 combine",
            "combine",
            lambda g: _a2a(folder, g, "trtllm", "bfloat16", 1),
        ),
        ("vLLM DeepEP, low-latency dispatch", "dispatch", lambda g: _a2a(folder, g, "vllm", "default", 0)),
        ("vLLM DeepEP, low-latency combine", "combine", lambda g: _a2a(folder, g, "vllm", "default", 1)),
    ]
    for title, priced, ratio in kinds:
        cells = []
        for gpu in ("h100-sxm", "h200-sxm"):
            low, middle, high = np.quantile(ratio(gpu), (0.1, 0.5, 0.9))
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {title} | {priced} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _vllm(folder: Path, gpu: str, backend: str) -> np.ndarray:
    raw = read(folder / f"{gpu.replace('-', '_')}_custom_allreduce_vllm.csv")
    at = raw["backend"] == backend
    sizes = {"ranks": raw["num_gpus"][at], "bytes": raw["message_size"][at] * 2, "library": "custom"}
    return np.asarray(raw["latency"][at] * 1e-3 / load_costs(gpu).price("all_reduce", sizes).seconds)


def _wideep(folder: Path, gpu: str) -> np.ndarray:
    raw = read(folder / f"{gpu.replace('-', '_')}_wideep_generation_moe_fp8.csv")
    skew = [float(word.split("_")[-1]) if word.startswith("power_law") else 0.0 for word in raw["distribution"]]
    sizes = {"tokens": raw["num_tokens"], "hidden": raw["hidden_size"], "intermediate": raw["inter_size"]}
    sizes |= {"experts": raw["num_experts"], "top_k": raw["topk"], "ep": raw["moe_ep_size"], "tp": raw["moe_tp_size"]}
    price = load_costs(gpu).price("expert_gemm", sizes | {"skew": skew, "gated": 1}, "fp8")
    return np.asarray(raw["latency"] * 1e-3 / price.seconds)


def _a2a(folder: Path, gpu: str, backend: str, dtype: str, combine: int) -> np.ndarray:
    raw = read(folder / f"{gpu.replace('-', '_')}_moe_a2a_{backend}.csv")
    kind = "combine" if combine else "dispatch"
    at = (
        (raw["phase"] == kind)
        & (raw["comm_dtype"] == dtype)
        & np.isin(raw["comm_backend"], ("trtllm_deepep_ll", "deepep_ll"))
    )
    sizes = {"nodes": raw["node_num"], "tokens": raw["num_tokens"], "hidden": raw["hidden_size"], "top_k": raw["topk"]}
    sizes = {name: value[at] for name, value in (sizes | {"experts": raw["num_experts"]}).items()}
    price = load_costs(gpu).price(kind, sizes | {"mode": "low_latency"})
    return np.asarray(raw["latency"][at] * 1e-6 / price.seconds)


def _nodes(folder: Path) -> str:
    """Leave the 8-node rows out and predict them; then 16 and 32 nodes."""
    lines = []
    for family in families():
        if not family.name.endswith("low_latency"):
            continue
        table = table_and_source(family.name, folder, "h100_sxm")[0]
        far = table.columns["nodes"] == 8
        constants = search(family, Hardware({}, 1.0), table.take(~far), family.start)
        part = table.take(far)
        ratio = part.seconds / family.form(namespace(constants), Hardware({}, 1.0), part.columns)
        lines.append(
            f"- {family.title}: fitted on 1, 2 and 4 nodes, the {int(far.sum())} rows of 8 nodes are predicted within "
            f"{np.median(np.abs(1 / ratio - 1)):.1%} (median; 90th percentile {np.quantile(np.abs(1 / ratio - 1), 0.9):.1%})."
        )
    lines += ["", _NOT_BLIND]
    lines += ["", "Low-latency mode, 128 tokens a rank, hidden 7168, top-8, 256 experts, µs (interval):", ""]
    lines += ["| GPU | nodes | ranks | dispatch | combine | provenance |", "|---|---|---|---|---|---|"]
    for gpu in ("h100-sxm", "h800-sxm"):
        costs = load_costs(gpu)
        for nodes in (1, 2, 4, 8, 16, 32):
            sizes = {"nodes": nodes, "tokens": 128, "hidden": 7168, "top_k": 8, "experts": 256, "mode": "low_latency"}
            prices = [costs.price(kind, sizes) for kind in ("dispatch", "combine")]
            cells = [f"{p.seconds[0] * 1e6:.0f} ({p.low[0] * 1e6:.0f}–{p.high[0] * 1e6:.0f})" for p in prices]
            lines.append(f"| {gpu} | {nodes} | {8 * nodes} | {' | '.join(cells)} | {prices[0].provenance[0]} |")
    lines += [
        "",
        "On h800-sxm only the two bandwidths are fitted, to DeepEP's four published rows (EP 8 to 64); overheads are "
        "H100's, and its intervals are assumed.",
    ]
    return "\n".join([*lines, ""])
