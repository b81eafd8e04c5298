"""Prefill and decode on GPUs of their own: how many each pool gets, and its best plan.

A pool of decode GPUs yields tokens, a pool of prefill GPUs prompts, and a token needs 1 ÷ osl of a prompt: the deployment
serves the smaller of TPS and osl · prompts per second. Both are searched for every split of the nodes, decode under the bound
of TPOT, prefill under that of TTFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from planc.cost.book import PriceBook
from planc.schedule.estimate import CHUNKS
from planc.search.bound import Bounds
from planc.search.evaluate import Evaluator, Outcome
from planc.search.explore import Evaluate, Explorer, Goal
from planc.search.space import Axes, Shape, declared, shapes, with_cluster
from planc.spec import Spec

Row = dict[str, Any]
SPLITS = 15  #: splits of the nodes that are looked at, spread evenly where there are more
_CHOICES = ("dp", "pp", "ep", "tp", "expert_tp", "gating", "tp_comm", "micro_batches", "split", "spares", "serving")


def pools(
    spec: Spec,
    goal: Goal,
    asked: Axes,
    evaluate: Evaluate,
    book: PriceBook | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Row:
    """The best plan of both pools for every split, most tokens per second first; ``rows`` is empty where no split serves."""
    book = book or PriceBook()
    own = Evaluator(spec, book)
    rows = []
    for done, (first, second) in enumerate(splits(spec)):
        rows += list(_split(spec, goal, asked, evaluate, own, first, second))
        if progress:
            progress(done + 1, SPLITS)
    rows.sort(key=lambda row: (-row["tps"], row["prefill_gpus"]))
    return {"gpus": spec.cluster.gpus, "rows": rows}


def splits(spec: Spec) -> list[tuple[int, int]]:
    """(GPUs that prefill, GPUs that decode) in whole nodes, of a node alone in halves."""
    gpus, node = spec.cluster.gpus, spec.cluster.groups[0].gpus_per_node
    unit = node if gpus > node else max(1, node // 2)
    cuts = list(range(unit, gpus, unit))
    chosen = sorted({cuts[round(n * (len(cuts) - 1) / (SPLITS - 1))] for n in range(SPLITS)}) if cuts else []
    return [(cut, gpus - cut) for cut in chosen]


def _split(
    spec: Spec, goal: Goal, asked: Axes, evaluate: Evaluate, own: Evaluator, first: int, second: int
) -> Iterator[Row]:
    space = {key: values for key, values in asked.items() if key != "gpus"}
    prefill = best_prefill(own, goal, space, first)
    if prefill is None:
        return
    decode_space = declared(spec, space | {"gpus": (second,), "serving": ("apart",)})
    decode = Explorer(spec, decode_space, evaluate, own.book)
    found = decode.search(replace(goal, objective="tps", ttft=None, tps=None)).top if decode.shapes else []
    if not found:
        return
    one, (shape, chunk, outcome) = found[0], prefill
    assert outcome.row is not None
    prompts, osl = outcome.row["prompts_per_s"], max(1, spec.workload.osl)
    tps = min(one.row["tps"], prompts * osl)
    yield {
        "prefill_gpus": first,
        "decode_gpus": second,
        "tps": tps,
        "tps_per_gpu": tps / (first + second),
        "tpot_s": one.row["tpot_s"],
        "ttft_s": outcome.row["ttft_s"],
        "hand_over_s": outcome.row["hand_over_s"],
        "prompts_per_s": prompts,
        "binds": "decode" if one.row["tps"] <= prompts * osl else "prefill",
        "prefill": _plain(shape) | {"chunk": chunk},
        "decode": _plain(one.shape) | {"batch": one.batch, "tps": one.row["tps"]},
    }


def _plain(shape: Shape) -> Row:
    return {name: getattr(shape, name) for name in _CHOICES} | {"dtypes": dict(shape.dtypes)}


def best_prefill(own: Evaluator, goal: Goal, asked: Axes, gpus: int) -> tuple[Shape, int, Outcome] | None:
    """(shape, prompt tokens of a TP group and step, numbers) with the most prompts per second under the bound of TTFT: best
    bound first, as in `planc.search.explore`."""
    spec = own.spec
    fixed = {"gpus": (gpus,), "expert_tp": (1,), "split": ("balanced",), "spares": ("idle",), "serving": ("apart",)}
    open_ = {key: values for key, values in asked.items() if key not in (*fixed, "batch")}
    found, _ = shapes(spec, declared(spec, {"micro_batches": (1, 2)} | open_ | fixed))
    grid = prompt_tokens(spec)
    bounds = Bounds(with_cluster(spec, gpus), own.book, grid, prefill=True)
    ranked: list[tuple[float, int, int]] = []
    for number, shape in enumerate(found):
        whole = np.ones(len(grid), dtype=bool) if shape.leaders else grid % shape.tp == 0
        step = bounds.step(shape)
        rate = grid * shape.groups * shape.micro_batches / step / spec.workload.isl
        late = np.zeros(len(grid), dtype=bool)
        if goal.ttft is not None:
            late = np.ceil(spec.workload.isl / (grid * shape.micro_batches)) * step > goal.ttft
        ranked += [(float(rate[n]), number, int(grid[n])) for n in np.flatnonzero(whole & ~late)]
    best: tuple[Shape, int, Outcome] | None = None
    most = 0.0
    for rate_, number, tokens in sorted(ranked, key=lambda one: (-one[0], one[1], one[2])):
        if rate_ <= most:
            break
        chunk = tokens * found[number].micro_batches
        outcome = own.prefill(found[number], chunk)
        row = outcome.row
        if row is None or (goal.ttft is not None and row["ttft_s"] > goal.ttft):
            continue
        if row["prompts_per_s"] > most:
            most, best = row["prompts_per_s"], (found[number], chunk, outcome)
    return best


def prompt_tokens(spec: Spec) -> np.ndarray:
    """Prompt tokens of a TP group in a prefill step: the spec's chunk, or parts of a prompt, one whole, and several."""
    work = spec.workload
    if work.prefill_chunk:
        return np.array([work.prefill_chunk])
    several = [work.isl * n for n in (2, 4, 8, 16) if work.isl * n <= CHUNKS[0]]
    return np.array(sorted({min(work.isl, CHUNKS[0]), *several, *(c for c in CHUNKS if c <= work.isl)}))
