"""Reading recorded traffic: token traces and load matrices, as inference engines and load balancers write them.

A file is opened as named arrays (`opened.py`), which are then checked against each other and against the model they must
belong to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.routing.opened import (
    MAX_FILE_BYTES,
    MOST_FAULTS,
    Opened,
    fault,
    open_arrays,
    plain,
    shape_text,
)
from planc.routing.tokens import TokenTraffic
from planc.routing.traffic import Traffic, loads_of_tokens
from planc.spec.text import read_bytes
from planc.units import counted

MAX_EXPERTS = 65_536  # as many as a model may have
MAX_SOURCES = 1_000_000
_SMALLEST, _LARGEST = 1e-100, 1e100  #: sums of loads that can be divided and multiplied without care


@dataclass(frozen=True, slots=True)
class Expected:
    """The model that traffic must belong to: ``layers`` in all, ``moe_layers`` ascending, ``experts`` of a MoE layer,
    ``top_k``, and the model's ``name`` for messages."""

    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    name: str


def load_traffic(path: str | os.PathLike[str], *, expect: Expected | None = None) -> Traffic:
    """Read a token trace or a load matrix; ``specs/traffic/README.md`` describes the files and has samples of them.

    With ``expect``, a file with a row for every layer of the model gives the rows of its MoE layers, and a file with a
    row for each MoE layer all of them. Without it every row is a MoE layer, and there are as many experts as the
    loads are wide, or as the trace says (`experts`), or one more than its largest id.

    Raises PlancError: PLN001 and PLN003 (unreadable, too large), PLN002, PLN004, PLN005 and PLN009 (not valid JSON),
    PLN021 (not a traffic file), PLN022 (values that cannot be), PLN023 (traffic of another model than ``expect``).
    """
    file = os.fspath(path)
    try:
        data = read_bytes(file, MAX_FILE_BYTES)
        opened = open_arrays(data, file)
        digest = hashlib.sha256(data).hexdigest()
        name = plain(Path(file).name)
        if opened.key == "topk_ids":
            tokens = _tokens(opened, expect)
            what = f"topk_ids of {counted(len(tokens.source), 'token')}"
            what += f" on {counted(tokens.sources, 'source')}" if tokens.sources else ""
            origin = f"recorded: {name}, sha256 {digest[:12]}…, {what}"
            return Traffic(name, origin, tokens.experts, loads_of_tokens(tokens), tokens, digest)
        loads, folded = _loads(opened, expect)
        origin = f"recorded: {name}, sha256 {digest[:12]}…, {opened.key} of {counted(len(loads), 'step')}{folded}"
        return Traffic(name, origin, loads.shape[2], loads, None, digest)
    except MemoryError:
        message = f"{plain(file)} does not fit into this machine's memory"
        raise PlancError([fault("PLN003", file, message, "record fewer tokens or steps")]) from None


# --- what the arrays mean --------------------------------------------------------------------------------------------


def _tokens(opened: Opened, expect: Expected | None) -> TokenTraffic:
    """A token trace."""
    file, arrays, ids = opened.file, opened.arrays, opened.arrays["topk_ids"]
    given = next((key for key in ("experts", "num_experts") if key in arrays), None)
    said = int(arrays[given].reshape(-1)[0]) if given else None
    if given and (arrays[given].size != 1 or not 1 <= (said or 0) <= MAX_EXPERTS):
        message = f"`{given}` is {said}; a layer has 1 to {MAX_EXPERTS:,} experts"
        raise PlancError([fault("PLN022", file, message, f"save `{given}` as the number of experts of a layer")])
    rows = _rows(file, expect, ids.shape[1], said, ids.shape[2])
    ids = ids[:, rows]
    experts = said or (expect.experts if expect else min(MAX_EXPERTS, int(ids.max()) + 1))

    def at(token: int) -> Span:
        return Span(file, opened.lines[token] if opened.lines else 1, 1)

    def where(token: int, layer: int) -> str:
        return f"token {token:,}, {_layer(layer, expect)}"

    def outside(token: int, layer: int, i: int) -> str:
        return f"{where(token, layer)}: expert {ids[token, layer, i]} is not one of 0 to {experts - 1:,}"

    hint = "leave out padded tokens before saving, and number experts from 0 in each layer"
    faults = _listed((ids < 0) | (ids >= experts), outside, hint, at)
    ids = np.sort(ids, axis=2)
    twice = ids[:, :, 1:] == ids[:, :, :-1]
    faults += _listed(
        twice,
        lambda token, layer, i: f"{where(token, layer)}: expert {ids[token, layer, i]} is chosen twice",
        f"a token chooses {ids.shape[2]} different experts in a layer; save the router's ids, without padding",
        at,
    )
    ranks = arrays.get("source_rank")
    if ranks is None:
        source, sources = np.zeros(len(ids), dtype=np.int32), 0
    elif len(ranks) != len(ids):
        message = f"`source_rank` has {counted(len(ranks), 'entry')} for {counted(len(ids), 'token')}"
        faults.append(fault("PLN022", file, message, "save one source rank for each token, or none"))
    else:
        faults += _listed(
            (ranks < 0) | (ranks >= MAX_SOURCES),
            lambda token: f"token {token:,}: source rank {ranks[token]} is not one of 0 to {MAX_SOURCES - 1:,}",
            "number the ranks that gate from 0, or leave `source_rank` out",
            at,
        )
    if faults:
        raise PlancError(faults)
    if ranks is not None:
        source, sources = ranks.astype(np.int32), int(ranks.max()) + 1
    return TokenTraffic(np.ascontiguousarray(ids, dtype=np.int32), source, experts, sources)


def _loads(opened: Opened, expect: Expected | None) -> tuple[np.ndarray, str]:
    """A load matrix, float64 [steps, layers, E], and how it was folded, in words."""
    file, key = opened.file, opened.key
    array, fold = opened.arrays[key], opened.arrays.get("physical_to_logical_map")
    array = array[None] if array.ndim == 2 else array
    steps, layers, width = array.shape
    if fold is not None and fold.shape != (layers, width):
        message = (
            f"`physical_to_logical_map` is {shape_text(fold.shape)}, but `{key}` has {layers} layers of {width} experts"
        )
        raise PlancError([fault("PLN022", file, message, "save the map of the same run: one expert per load")])
    rows = _rows(file, expect, layers, None if fold is not None else width)
    with np.errstate(all="ignore"):  # beyond float64: infinite, and reported as such
        loads = np.array(array[:, rows], dtype=np.float64)
    faults = _bad_loads(loads, file, expect, steps)
    words = ""
    if fold is not None:
        fold = fold[rows]
        experts = expect.experts if expect else max(1, min(MAX_EXPERTS, int(fold.max()) + 1))
        faults += _listed(
            (fold < 0) | (fold >= experts),
            lambda layer, i: (
                f"`physical_to_logical_map`: physical expert {i} of {_layer(layer, expect)} stands for expert "
                f"{fold[layer, i]}, which is not one of 0 to {experts - 1:,}"
            ),
            "save the map from physical experts to the model's experts, numbered from 0 in each layer",
            lambda _: Span(file, 1, 1),
        )
        words = f", folded from {counted(width, 'physical expert')}"
    if faults:
        raise PlancError(faults)
    if fold is not None:
        folded = np.zeros((steps, len(fold), experts))
        every = np.arange(steps)[:, None, None], np.arange(len(fold))[None, :, None]
        np.add.at(folded, (*every, fold.astype(np.int64)[None]), loads)
        loads = folded
    return loads, words


def _bad_loads(loads: np.ndarray, file: str, expect: Expected | None, steps: int) -> list[Diagnostic]:
    """Loads that cannot be, float64 [steps, layers, experts], and layers without any."""

    def where(step: int, layer: int, expert: int) -> str:
        at = f"step {step:,}, " if steps > 1 else ""
        return f"{at}{_layer(layer, expect)}, expert {expert}: the load"

    def place(_: int) -> Span:
        return Span(file, 1, 1)

    hint = "save counts of tokens or positive weights"
    faults = _listed(loads < 0, lambda *i: f"{where(*i)} is negative: {loads[i]:g}", hint, place)
    faults += _listed(np.isnan(loads), lambda *i: f"{where(*i)} is not a number (NaN)", hint, place)
    faults += _listed(np.isposinf(loads), lambda *i: f"{where(*i)} is infinite", hint, place)
    if faults:
        return faults
    with np.errstate(over="ignore"):
        sums = loads.sum(axis=(0, 2))
    over = " over all steps" if steps > 1 else ""
    hint = "leave out the rows of dense layers, or give the model, so that planc knows them"
    faults = _listed(sums == 0, lambda i: f"{_layer(i, expect)}: the loads of all experts are zero{over}", hint, place)
    odd = (sums != 0) & ((sums < _SMALLEST) | (sums > _LARGEST))
    message = f"planc computes with sums from {_SMALLEST:g} to {_LARGEST:g}"
    return faults + _listed(
        odd, lambda i: f"{_layer(i, expect)}: the loads sum to {sums[i]:g}; {message}", "scale the loads", place
    )


def _rows(
    file: str, expect: Expected | None, layers: int, experts: int | None = None, top_k: int | None = None
) -> np.ndarray:
    """The rows of a file with ``layers`` rows that are the model's MoE layers, int64 [MoE layers].

    Raises PlancError PLN023 for rows, experts or a top-k that are not the model's.
    """
    if expect is None:
        return np.arange(layers)
    moe, name = len(expect.moe_layers), plain(expect.name)
    faults = []
    if not moe:
        faults.append((f"{name} has no MoE layers, so no traffic belongs to it", "give the model that was recorded"))
    elif layers not in (moe, expect.layers):
        rows = f"{moe} MoE layers" if moe == expect.layers else f"{moe} MoE layers of {expect.layers} in all"
        message = f"the file has {counted(layers, 'row')} of layers, but {name} has {rows}"
        faults.append((message, f"save {moe} rows, or one for each of the {expect.layers} layers"))
    if experts not in (None, expect.experts):
        message = f"the file has {experts:,} experts a layer, but {name} has {expect.experts:,}"
        faults.append(
            (message, "give the model that was recorded; loads of physical experts need their map beside them")
        )
    if top_k not in (None, expect.top_k):
        message = f"the file has {counted(top_k or 0, 'expert')} per token, but {name} has top_k {expect.top_k}"
        faults.append((message, "give the model that was recorded, without its shared experts"))
    if faults:
        raise PlancError([fault("PLN023", file, message, hint) for message, hint in faults])
    return np.array(expect.moe_layers) if layers == expect.layers else np.arange(layers)


# --- words -----------------------------------------------------------------------------------------------------------


def _listed(bad: np.ndarray, tell: Callable[..., str], hint: str, place: Callable[[int], Span]) -> list[Diagnostic]:
    """PLN022 for the first few True entries of ``bad``; ``tell`` is called with their indices, ``place`` with the
    first index."""
    where = np.argwhere(bad) if bad.any() else np.empty((0, bad.ndim), dtype=np.int64)
    more = f" (the first {MOST_FAULTS} of {len(where):,} such are shown)" if len(where) > MOST_FAULTS else ""
    return [
        Diagnostic("PLN022", tell(*index) + more, span=place(index[0]), hint=hint)
        for index in where[:MOST_FAULTS].tolist()
    ]


def _layer(index: int, expect: Expected | None) -> str:
    """The ``index``-th row used: the model's layer where the model is known."""
    return f"layer {expect.moe_layers[index]}" if expect else f"layer row {index}"
