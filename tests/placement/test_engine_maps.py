"""Expert maps of engines and balancers: every form is read to the same slot tables, and every broken one has its reason."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planc.diagnostics import PlancError
from planc.placement.expert_map import open_map, read_map

#: MoE layers 1 and 3 of 4, three holders of two slots, five experts
TABLES = np.array([[[0, 1], [2, 3], [4, 0]], [[4, 2], [0, 3], [1, 2]]], dtype=np.int32)
ROWS = TABLES.reshape(2, -1).tolist()


def read(path: Path, **changes: Any) -> np.ndarray:
    asked: dict[str, Any] = {"experts": 5, "holders": 3, "moe_layers": (1, 3), "layers": 4}
    return read_map(path, **asked | changes)


def ascend(tables: np.ndarray = TABLES) -> dict[str, Any]:
    return {
        "moe_layer_count": len(tables),
        "layer_list": [
            {
                "layer_id": n,
                "device_count": len(table),
                "device_list": [{"device_id": d, "device_expert": held} for d, held in enumerate(table.tolist())],
            }
            for n, table in enumerate(tables)
        ],
    }


def tensorrt(**changes: Any) -> dict[str, Any]:
    plain = {"num_slots": 6, "layer_updates_per_iter": 0, "initial_global_assignments": {1: ROWS[0], 3: ROWS[1]}}
    return plain | changes


def text(name: str, value: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return folder / name

    return write


def arrays(name: str, **named: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        if name.endswith(".npy"):
            np.save(folder / name, *named.values())
        else:
            np.savez(folder / name, **named)
        return folder / name

    return write


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


YAML = "# a comment\nnum_slots: 6\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n"
FORMS = {
    "SGLang, rows of MoE layers": text("m.json", {"physical_to_logical_map": ROWS}),
    "SGLang, rows of all layers": text("m.json", {"physical_to_logical_map": [[0] * 6, ROWS[0], [9] * 6, ROWS[1]]}),
    "TensorRT-LLM": text("m.yaml", YAML + f"  3: {ROWS[1]}\n  1: {ROWS[0]}\n"),
    "TensorRT-LLM, as JSON": text("m.json", tensorrt()),
    "vLLM-Ascend": text("m.json", ascend()),
    "a list of rows": text("m.json", ROWS),
    "npy": arrays("m.npy", map=np.array(ROWS)),
    "npz": arrays("m.npz", physical_to_logical_map=np.array(ROWS, dtype=np.int16), load=np.ones(3)),
    "a permutation": text("m.json", {"experts": 6, "old_expert_of_new_index": {"3": ROWS[1], "1": ROWS[0]}}),
    "npz of EPLB": arrays("m.npz", phy2log=np.array(ROWS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    assert np.array_equal(read(FORMS[form](tmp_path)), TABLES)


def test_one_row_for_all_layers(tmp_path: Path) -> None:
    found = read(text("m.json", ROWS[0])(tmp_path))
    assert np.array_equal(found, TABLES[[0, 0]])


def test_a_map_that_moves_says_so(tmp_path: Path) -> None:
    assert "moves them" in open_map(text("m.json", tensorrt(layer_updates_per_iter=2))(tmp_path)).form
    assert "moves them" not in open_map(text("m.json", tensorrt())(tmp_path)).form


def changed(**changes: Any) -> Callable[[Path], Path]:
    return text("m.json", ascend() | changes)


def device(**changes: Any) -> Callable[[Path], Path]:
    record = ascend()
    record["layer_list"][1]["device_list"][2] |= changes
    return text("m.json", record)


def packed_zeros() -> bytes:
    """70 kB that unpack to 70 MB."""
    held = io.BytesIO()
    np.savez_compressed(held, phy2log=np.zeros((1, 70_000_000), dtype=np.int8))
    return held.getvalue()


def npy_of_true() -> bytes:
    """An array whose shape is (True, 16), as Python would take it."""
    held = io.BytesIO()
    np.save(held, np.zeros((1, 16), dtype=np.int32))
    return held.getvalue().replace(b"(1, 16), }   ", b"(True, 16), }")


NOT_A_MAP = {
    "a number": text("m.json", "3"),
    "a word": text("m.json", '"map"'),
    "nothing": text("m.json", "null"),
    "loads": text("m.json", {"logical_count": [[1, 2]]}),
    "a map of text": text("m.yaml", "a: b\n"),
    "TensorRT-LLM, a key of no meaning": text("m.json", tensorrt(slots=6)),
    "TensorRT-LLM, no layers": text("m.json", tensorrt(initial_global_assignments={})),
    "TensorRT-LLM, layers in a list": text("m.json", tensorrt(initial_global_assignments=ROWS)),
    "TensorRT-LLM, a layer without a number": text("m.json", tensorrt(initial_global_assignments={"one": ROWS[0]})),
    "TensorRT-LLM, a layer twice": text("m.json", tensorrt(initial_global_assignments={"1": ROWS[0], "01": ROWS[1]})),
    "TensorRT-LLM, a short row": text("m.json", tensorrt(num_slots=9)),
    "TensorRT-LLM, no row": text("m.json", tensorrt(initial_global_assignments={"1": None, "3": ROWS[1]})),
    "a permutation without layers": text("m.json", {"old_expert_of_new_index": ROWS}),
    "vLLM-Ascend, layers": changed(layer_list=3),
    "vLLM-Ascend, no layer": changed(layer_list=[], moe_layer_count=0),
    "vLLM-Ascend, count of layers": changed(moe_layer_count=3),
    "vLLM-Ascend, no count": text("m.json", {"layer_list": ascend()["layer_list"]}),
    "vLLM-Ascend, devices in another order": device(device_id=0),
    "vLLM-Ascend, fewer experts on one": device(device_expert=[1]),
    "vLLM-Ascend, text for experts": device(device_expert="12"),
    "vLLM-Ascend, no list": device(device_expert=None),
    "a pickle": raw("m.pt", pickle.dumps(ROWS, protocol=4)),
    "an npy of objects": arrays("m.npy", map=np.array([[None]])),
    "an npy of fractions": arrays("m.npy", map=np.array([[0.5]])),
    "an npy of one dimension": arrays("m.npy", map=np.array(ROWS[0])),
    "an npz without the key": arrays("m.npz", map=np.array(ROWS)),
    "an npz that unpacks to too much": raw("m.npz", packed_zeros()),
    "an npy of True columns": raw("m.npy", npy_of_true()),
    "gzip": raw("m.json", b"\x1f\x8b\x08"),
    "an empty file": raw("m.json", b" "),
    "a damaged npz": raw("m.npz", b"PK\x03\x04 and so on"),
    "a damaged npy": raw("m.npy", b"\x93NUMPY and so on"),
}


@pytest.mark.parametrize("name", NOT_A_MAP)
def test_what_is_no_map(name: str, tmp_path: Path) -> None:
    path = NOT_A_MAP[name](tmp_path)
    with pytest.raises(PlancError) as error:
        open_map(path)
    assert [d.code for d in error.value.diagnostics] == ["PLN024"]
    assert all(d.span and d.span.file == str(path) for d in error.value.diagnostics)


OTHERS = {
    "ranks": (text("m.json", ascend()), {"holders": 6}, "for 3 ranks, and 6 hold"),
    "layers of TensorRT-LLM, one more": (text("m.json", tensorrt()), {"moe_layers": (1,)}, "layer 3 is no MoE layer"),
    "layers of TensorRT-LLM, one less": (text("m.json", tensorrt()), {"moe_layers": (1, 2, 3)}, "layer 2 has no row"),
    "layers of vLLM-Ascend": (text("m.json", ascend()), {"moe_layers": (1, 2, 3), "layers": 5}, "2 rows"),
    "slots": (text("m.json", ROWS), {"holders": 4}, "6 slots do not divide"),
    "experts": (text("m.json", ROWS), {"experts": 4}, "there is no expert 4"),
    "a row of the file": (
        text("m.json", {"physical_to_logical_map": [[0] * 6, ROWS[0], [9] * 6, [*ROWS[1][:5], 7]]}),
        {},
        "row 3, slot 5: there is no expert 7",
    ),
    "a layer of the file": (
        text("m.json", tensorrt(initial_global_assignments={"3": [0, 1, 2, 3, 4, 9], "1": ROWS[0]})),
        {},
        "layer 3, slot 5: there is no expert 9",
    ),
    "coverage": (text("m.json", ROWS), {"experts": 6}, "expert 5 is on no holder"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_maps_of_other_deployments(name: str, tmp_path: Path) -> None:
    write, asked, words = OTHERS[name]
    with pytest.raises(PlancError) as error:
        read(write(tmp_path), **asked)
    assert {d.code for d in error.value.diagnostics} == {"PLN025"} and words in error.value.diagnostics[0].message
