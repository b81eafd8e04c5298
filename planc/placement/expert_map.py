"""Expert maps as engines and balancers write them: which expert is in which physical slot of an EP group.

Written in the form that SGLang reads; read in that form and in those of TensorRT-LLM, vLLM-Ascend, vLLM's pull request 49572
and EPLB's arrays. docs/formats.md has the forms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.placement.mesh import Parallelism
from planc.planner.tables import EMPTY
from planc.routing.opened import npy_array, npz_members
from planc.spec import Spec
from planc.spec.text import decode, parse_json, parse_yaml, read_bytes

KEY = "physical_to_logical_map"
PERMUTATION = "old_expert_of_new_index"  #: of planc's own permutation.json: vLLM puts index i in slot i
_MOST_BYTES = 64_000_000
_FEW = 5
_ANOTHER = "is this the map of this model?"
_FORMS = (
    f"planc reads SGLang's `{KEY}`, TensorRT-LLM's `initial_global_assignments`, vLLM-Ascend's `layer_list`, a list of rows, "
    f"and arrays [layers, slots] of EPLB in .npy, or in .npz as `{KEY}` or `phy2log`"
)


class EngineMap(NamedTuple):
    """A map as a file has it: its ``form`` in words; ``rows``, the experts in the slots of the EP group, a row a layer;
    ``layers``, which of the model's layers the rows are, None where they only follow each other; ``ranks`` of the EP group, 0
    where the form does not say; ``everywhere``: the one row is that of every layer."""

    form: str
    rows: list[list[int]]
    layers: list[int] | None = None
    ranks: int = 0
    everywhere: bool = False


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


def read_map(path: str | Path, *, experts: int, holders: int, moe_layers: Sequence[int], layers: int) -> np.ndarray:
    """Read a map of any form to slot tables, int32 [MoE layers, holders, slots], -1 where a slot is empty.

    ``moe_layers``: the model's MoE layers, of ``layers`` in all. Raises PlancError: PLN024 when the file is no map, PLN025 when
    it is another deployment's (layers, holders, experts) or misses an expert; PLN001 to PLN005 and PLN009 for text that cannot
    be read.
    """
    found, name = open_map(path), str(path)
    rows = found.rows * len(moe_layers) if found.everywhere else found.rows
    at: Sequence[int] = range(len(moe_layers))  # the rows of the MoE layers
    if found.layers is not None:
        absent = sorted(set(moe_layers) - set(found.layers))
        beyond = sorted(set(found.layers) - set(moe_layers))
        if absent or beyond:
            what = f"layer {absent[0]} has no row" if absent else f"layer {beyond[0]} is no MoE layer of this model"
            raise PlancError(
                [_other(name, f"{what}; the model's MoE layers are {moe_layers[0]} to {moe_layers[-1]}", _ANOTHER)]
            )
        at = [found.layers.index(layer) for layer in moe_layers]
    elif len(rows) not in (len(moe_layers), layers):
        message = f"{len(rows)} rows; the model has {len(moe_layers)} MoE layers and {layers} layers"
        raise PlancError([_other(name, message, _ANOTHER)])
    elif len(rows) == layers:
        at = moe_layers
    if found.ranks and found.ranks != holders:
        message = f"the map is for {found.ranks} ranks, and {holders} hold experts here"
        raise PlancError([_other(name, message, f"set parallelism.ep: {found.ranks} and expert_tp: 1")])
    if len(rows[0]) % holders:
        message = f"{len(rows[0])} slots do not divide over {holders} holders"
        hint = "is this the map of this cluster? parallelism.ep says how many hold experts"
        raise PlancError([_other(name, message, hint)])
    labels = [f"layer {found.layers[row]}" if found.layers is not None else f"row {row}" for row in at]
    tables = np.array([rows[row] for row in at], dtype=np.int64)
    faults = [*_range_faults(tables, experts, name, labels), *_cover_faults(tables, experts, name, labels)]
    if faults:
        raise PlancError(faults)
    return tables.reshape(len(at), holders, -1).astype(np.int32)


def open_map(path: str | Path) -> EngineMap:
    """A map of any form, by what the file holds. Rows have one length and ids that fit 32 bits. Raises PlancError PLN024, and
    PLN001 to PLN005 and PLN009 for text that cannot be read."""
    name = str(path)
    data = read_bytes(path, _MOST_BYTES)
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06") or data.startswith(b"\x93NUMPY"):
        found = _of_arrays(data, name)
    elif data.startswith(b"\x80"):
        raise PlancError(
            [_none(name, "this is a pickle, and planc never opens pickles", "save the map with np.save or as JSON")]
        )
    elif data.startswith(b"\x1f\x8b") or not data.strip():
        what, hint = ("packed with gzip", "unpack it with gunzip first") if data.strip() else ("empty", _FORMS)
        raise PlancError([_none(name, f"this file is {what}", hint)])
    elif Path(path).suffix.lower() in (".yaml", ".yml"):
        found = _of_values(parse_yaml(decode(data, name), name).value, name)
    else:
        found = _of_values(parse_json(decode(data, name), name), name)
    odd = next((number for number, row in enumerate(found.rows) if not _is_row(row)), None)
    if not found.rows or odd is not None:
        where = "it has no rows" if odd is None else f"row {odd} is none"
        message = f"this is not an expert map: {found.form} has a list of expert ids for every layer, and {where}"
        raise PlancError([_none(name, message, "ids are whole numbers, -1 an empty slot")])
    widths = sorted({len(row) for row in found.rows})
    if len(widths) > 1:
        message = f"the rows of an expert map have one length; these have {widths[0]} and {widths[1]}"
        raise PlancError([_none(name, message)])
    return found


def spec_map(spec: Spec, par: Parallelism, key: str) -> np.ndarray:
    """The map that a spec names at ``placement.<key>``, as `read_map` gives it. Raises PlancError that also says where in the
    spec the file is named."""
    try:
        return map_for(spec, par, Path(spec.folder) / str(getattr(spec.placement, key)))
    except PlancError as error:
        raise named_at(spec, f"placement.{key}", error) from None


def map_for(spec: Spec, par: Parallelism, path: str | Path) -> np.ndarray:
    """A map for the spec's model on an EP group of ``par``, as `read_map` gives it."""
    moe, ids = spec.model.moe, spec.model.moe_layer_ids
    assert moe is not None
    return read_map(path, experts=moe.experts, holders=par.holders, moe_layers=ids, layers=spec.model.layers)


def named_at(spec: Spec, path: str, error: PlancError) -> PlancError:
    """Faults of a file that the spec names at ``path``, with the place of that name."""
    span = spec.span(path)
    where = (f"named at {span.file}:{span.line} ({path})",) if span else ()
    return PlancError(replace(d, related=(*d.related, *where)) for d in error.diagnostics)


# --- forms ----------------------------------------------------------------------------------------------------------


def _of_arrays(data: bytes, name: str) -> EngineMap:
    """EPLB's `physical_to_logical_map`, int [layers, slots]."""
    try:
        if data.startswith(b"\x93NUMPY"):
            return EngineMap("an EPLB array", npy_array(data, KEY, name).tolist())
        names, read = npz_members(data, name, _MOST_BYTES)
        key = next((key for key in (KEY, "phy2log") if key in names), "")
        if not key:
            raise PlancError([_none(name, f"no array of the file is named `{KEY}` or `phy2log`", _FORMS)])
        return EngineMap("an EPLB archive", read(key).tolist())
    except PlancError as error:
        raise PlancError(replace(d, code="PLN024", hint=_FORMS) for d in error.diagnostics) from None


def _of_values(record: Any, name: str) -> EngineMap:
    """JSON or YAML."""
    if isinstance(record, dict) and KEY in record:
        return EngineMap("SGLang's map", _listed(record[KEY]))
    if isinstance(record, dict) and "initial_global_assignments" in record:
        return _of_tensorrt(record, name)
    if isinstance(record, dict) and "layer_list" in record:
        return _of_ascend(record, name)
    if isinstance(record, dict) and PERMUTATION in record:
        return EngineMap("a permutation for vLLM", *_by_layer(record[PERMUTATION], "a permutation for vLLM", name))
    if isinstance(record, list) and record and type(record[0]) is int:
        return EngineMap("a row for every layer", [record], everywhere=True)
    if isinstance(record, list):
        return EngineMap("a list of rows", record)
    loads = isinstance(record, dict) and "logical_count" in record
    hint = "loads are traffic: planc place makes a map of them" if loads else _FORMS
    raise PlancError([_none(name, "this is not an expert map", hint)])


def _of_tensorrt(record: dict[str, Any], name: str) -> EngineMap:
    """TensorRT-LLM's MoeLoadBalancerConfig."""
    form, slots = "TensorRT-LLM's map", record.get("num_slots")
    unknown = sorted(set(record) - {"num_slots", "initial_global_assignments", "layer_updates_per_iter"})
    if unknown:
        raise PlancError([_none(name, f"{form}: `{unknown[0][:40]}` is none of its keys")])
    rows, layers = _by_layer(record["initial_global_assignments"], form, name)
    if any(isinstance(row, list) and len(row) != slots for row in rows):
        raise PlancError([_none(name, f"{form}: every layer has as many experts as num_slots says")])
    if record.get("layer_updates_per_iter"):
        form += ", where experts start: it moves them as it serves"
    return EngineMap(form, rows, layers)


def _by_layer(value: Any, form: str, name: str) -> tuple[list[Any], list[int]]:
    """(rows, the layers that they are of) of a mapping from the number of a layer in the model to its row."""
    if not isinstance(value, dict) or not value or not all(re.fullmatch("0|[1-9][0-9]{0,5}", key) for key in value):
        raise PlancError([_none(name, f"{form}: layers are numbers, each with its experts")])
    return list(value.values()), [int(key) for key in value]


def _of_ascend(record: dict[str, Any], name: str) -> EngineMap:
    """vLLM-Ascend's map: MoE layers in order, and in each the devices in order; the engine goes by the order alone."""
    form, entries = "vLLM-Ascend's map", record["layer_list"]
    try:
        devices = [entry["device_list"] for entry in entries]
        ordered = all([device["device_id"] for device in one] == list(range(len(one))) for one in devices)
        rows = [[device["device_expert"] for device in one] for one in devices]
        said = (record["moe_layer_count"], {entry["device_count"] for entry in entries})
        sizes = {len(experts) for row in rows for experts in row}
        flat = [[expert for experts in row for expert in experts] for row in rows]
        fits = ordered and said == (len(entries), {len(one) for one in devices}) and len(sizes) == len(said[1]) == 1
    except (TypeError, KeyError):
        fits = False
    if not fits:
        message = (
            f"{form}: moe_layer_count layers of device_count devices, numbered from 0, with as many experts on each"
        )
        raise PlancError([_none(name, message)])
    return EngineMap(form, flat, ranks=len(devices[0]))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and all(type(v) is int and abs(v) < 2**31 for v in row)


def _none(name: str, message: str, hint: str = "") -> Diagnostic:
    return Diagnostic("PLN024", message, span=Span(name, 1, 1), hint=hint)


def _other(name: str, message: str, hint: str = "") -> Diagnostic:
    return Diagnostic("PLN025", message, span=Span(name, 1, 1), hint=hint)


def _range_faults(tables: np.ndarray, experts: int, name: str, labels: Sequence[str]) -> list[Diagnostic]:
    wrong = np.argwhere((tables < EMPTY) | (tables >= experts))[:_FEW].tolist()
    return [
        _other(
            name,
            f"{labels[n]}, slot {slot}: there is no expert {tables[n, slot]}; experts are 0 to {experts - 1}",
            _ANOTHER,
        )
        for n, slot in wrong
    ]


def _cover_faults(tables: np.ndarray, experts: int, name: str, labels: Sequence[str]) -> list[Diagnostic]:
    found = []
    for label, row in zip(labels, tables, strict=True):
        absent = np.setdiff1d(np.arange(experts), row)
        if len(absent):
            message = f"{label}: expert {absent[0]} is on no holder ({len(absent)} of {experts} experts absent)"
            found.append(_other(name, message, _ANOTHER))
    return found[:_FEW]
