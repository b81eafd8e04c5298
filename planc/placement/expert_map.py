"""Expert maps in the form that SGLang reads: `physical_to_logical_map`, a row per layer, an expert id per slot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.planner.tables import EMPTY
from planc.spec.text import decode, parse_json, read_bytes

KEY = "physical_to_logical_map"
_MOST_BYTES = 256_000_000
_FEW = 5


def map_json(tables: np.ndarray, *, moe_layers: Sequence[int] | None = None, layers: int | None = None) -> str:
    """The map of slot tables int32 [MoE layers, holders, slots]: one key, one row per layer, slots of holder after holder.

    With ``moe_layers`` and ``layers`` (of the model) there is a row for every hidden layer; dense ones, which the engine
    does not use, repeat the experts in order. An empty slot is -1.
    """
    _, holders, slots = tables.shape
    rows = [row.reshape(-1).tolist() for row in tables]
    if moe_layers is not None and layers is not None:
        experts = int(tables.max()) + 1
        plain = [slot % experts for slot in range(holders * slots)]
        place = dict(zip(moe_layers, rows, strict=True))
        rows = [place.get(layer, plain) for layer in range(layers)]
    return '{"' + KEY + '": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"


def read_map(
    path: str | Path, *, experts: int, holders: int, moe_layers: Sequence[int] | None, layers: int | None
) -> np.ndarray:
    """Read a map back to slot tables, int32 [MoE layers, holders, slots].

    Rows are the MoE layers', or every hidden layer's (those of dense layers are left out). Raises PlancError: PLN024 when
    the file is no map, PLN025 when it is another deployment's (layers, holders, experts) or misses an expert.
    """
    name = str(path)
    record = parse_json(decode(read_bytes(path, _MOST_BYTES), name), name)
    rows = record.get(KEY) if isinstance(record, dict) else record
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        message = f"this is not an expert map: `{KEY}` is a list of rows of expert ids, one row a layer"
        raise PlancError([Diagnostic("PLN024", message, span=Span(name, 1, 1))])
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        message = f"the rows of an expert map have one length; these have {widths[0]} and {widths[1]}"
        raise PlancError([Diagnostic("PLN024", message, span=Span(name, 1, 1))])
    if moe_layers is not None and len(rows) not in (len(moe_layers), layers):
        message = f"{len(rows)} rows; the model has {len(moe_layers)} MoE layers and {layers} layers"
        raise PlancError([Diagnostic("PLN025", message, span=Span(name, 1, 1))])
    if moe_layers is not None and len(rows) == layers:
        rows = [rows[layer] for layer in moe_layers]
    if widths[0] % holders:
        message = f"{widths[0]} slots do not divide over {holders} holders"
        raise PlancError(
            [Diagnostic("PLN025", message, span=Span(name, 1, 1), hint="is this the map of this cluster?")]
        )
    tables = np.array(rows, dtype=np.int64)
    found = [*_range_faults(tables, experts, name), *_cover_faults(tables, experts, name)]
    if found:
        raise PlancError(found)
    return tables.reshape(len(rows), holders, -1).astype(np.int32)


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(type(v) is int and abs(v) < 2**31 for v in row)


def _range_faults(tables: np.ndarray, experts: int, name: str) -> list[Diagnostic]:
    wrong = np.argwhere((tables < EMPTY) | (tables >= experts))
    return [
        Diagnostic(
            "PLN025",
            f"row {row}, slot {slot}: there is no expert {tables[row, slot]}; experts are 0 to {experts - 1}",
            span=Span(name, 1, 1),
        )
        for row, slot in wrong[:_FEW].tolist()
    ]


def _cover_faults(tables: np.ndarray, experts: int, name: str) -> list[Diagnostic]:
    found = []
    for number, row in enumerate(tables):
        absent = np.setdiff1d(np.arange(experts), row)
        if len(absent):
            message = f"row {number}: expert {absent[0]} is on no holder ({len(absent)} of {experts} experts absent)"
            found.append(Diagnostic("PLN025", message, span=Span(name, 1, 1)))
    return found[:_FEW]
