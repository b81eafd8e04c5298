"""Recorded traffic: every format read right, every fault answered with its code, and nothing else for damaged files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planc.diagnostics import Diagnostic, PlancError, render_text
from planc.routing import Expected, load_traffic, opened, recorded

RNG = np.random.default_rng(0)
IDS = np.sort(np.argsort(RNG.random((6, 4, 16)), axis=2)[:, :, :2], axis=2)  # 6 tokens, 4 MoE layers, top-2 of 16
RANKS = np.array([0, 1, 2, 0, 1, 2])
STEPS = RNG.integers(1, 100, (3, 4, 16)).astype(float)  # 3 steps
LOADS = STEPS.sum(axis=0)
MODEL = Expected(layers=6, moe_layers=(1, 2, 3, 5), experts=16, top_k=2, name="small")
ALL_MOE = Expected(layers=4, moe_layers=(0, 1, 2, 3), experts=16, top_k=2, name="small")


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def lines(ids: Any = IDS, ranks: Any = RANKS) -> list[dict[str, Any]]:
    return [{"topk_ids": i.tolist(), "source_rank": int(r)} for i, r in zip(ids, ranks, strict=True)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def with_dense_rows(array: np.ndarray, axis: int, fill: float = 0) -> np.ndarray:
    """The rows of 4 MoE layers put among those of all 6 layers."""
    shape = list(array.shape)
    shape[axis] = MODEL.layers
    out = np.full(shape, fill, dtype=array.dtype)
    out[(slice(None),) * axis + (list(MODEL.moe_layers),)] = array
    return out


def refused(tmp_path: Path, name: str, data: bytes, expect: Expected | None = None) -> tuple[Diagnostic, ...]:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlancError) as error:
        load_traffic(tmp_path / name, expect=expect)
    for diagnostic in error.value.diagnostics:
        assert diagnostic.message.isprintable() and diagnostic.hint.isprintable()
        assert diagnostic.span and diagnostic.span.file == str(tmp_path / name)
        assert diagnostic.hint or diagnostic.code in ("PLN004", "PLN009")
    assert render_text(error.value.diagnostics)
    return error.value.diagnostics


# --- formats ---------------------------------------------------------------------------------------------------------

TRACES = {
    "int16.npz": npz(topk_ids=IDS.astype(np.int16), source_rank=RANKS),
    "uint8.npz": npz(topk_ids=IDS.astype(np.uint8), source_rank=RANKS.astype(np.uint8), experts=16),
    "big-endian.npz": npz(topk_ids=IDS.astype(">i8"), source_rank=RANKS),
    "columns.npz": npz(topk_ids=np.asfortranarray(IDS), source_rank=RANKS),
    "unsorted.npz": npz(topk_ids=IDS[:, :, ::-1], source_rank=RANKS, num_experts=np.array([16])),
    "with-more.npz": npz(topk_ids=IDS, source_rank=RANKS, weight=LOADS, notes=np.array("x"), other=np.array([{}])),
    "trace.jsonl": jsonl(lines()),
    "spaced.jsonl": b"\xef\xbb\xbf\r\n" + jsonl(lines()).replace(b"\n", b"\r\n\n"),
    "trace.ndjson": jsonl(lines()),
    "without-an-ending": jsonl(lines()),
    "lines.json": jsonl(lines()),
    "one.json": json.dumps({"topk_ids": IDS.tolist(), "source_rank": RANKS.tolist()}).encode(),
}


@pytest.mark.parametrize("expect", [None, ALL_MOE, MODEL])
@pytest.mark.parametrize("name", TRACES)
def test_token_traces(tmp_path: Path, name: str, expect: Expected | None) -> None:
    (tmp_path / name).write_bytes(TRACES[name])
    traffic = load_traffic(tmp_path / name, expect=expect)
    assert traffic.tokens is not None
    assert np.array_equal(traffic.tokens.topk, IDS)
    assert np.array_equal(traffic.tokens.on_sources(3), RANKS)
    assert (traffic.tokens.topk.dtype, traffic.tokens.source.dtype, traffic.tokens.sources) == (np.int32, np.int32, 3)
    assert (traffic.layers, traffic.experts, traffic.top_k) == (4, 16, 2)
    assert traffic.loads.dtype == np.float64
    assert np.array_equal(traffic.loads, traffic.tokens.loads()[None])
    assert traffic.name == name
    assert traffic.digest == hashlib.sha256(TRACES[name]).hexdigest()
    assert traffic.origin == f"recorded: {name}, sha256 {traffic.digest[:12]}…, topk_ids of 6 tokens on 3 sources"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npz", npz(topk_ids=IDS)),
        ("a.jsonl", jsonl([{"topk_ids": row["topk_ids"]} for row in lines()])),
    ],
)
def test_a_trace_without_sources(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    traffic = load_traffic(tmp_path / name)
    assert traffic.tokens is not None
    assert traffic.tokens.sources == 0
    assert traffic.tokens.on_sources(4).tolist() == [0, 1, 2, 3, 0, 1]
    assert traffic.origin.endswith("topk_ids of 6 tokens")


def test_experts_of_a_trace(tmp_path: Path) -> None:
    """The model's, else as the trace says, else as many as its ids need."""
    file = tmp_path / "a.npz"
    file.write_bytes(npz(topk_ids=IDS % 8 * [[[1, 0]]] + [[[0, 9]]]))
    assert load_traffic(file).experts == 10
    assert load_traffic(file, expect=ALL_MOE).experts == 16
    file.write_bytes(npz(topk_ids=IDS, num_experts=20))
    assert load_traffic(file).experts == 20
    assert load_traffic(file).loads.shape == (1, 4, 20)


def test_rows_of_dense_layers_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    for key, array, axis, fill in (("topk_ids", IDS, 1, -1), ("logical_count", STEPS, 1, 0), ("weight", LOADS, 0, 0)):
        file.write_bytes(npz(**{key: with_dense_rows(array, axis, fill)}))
        traffic = load_traffic(file, expect=MODEL)
        found = traffic.tokens.topk if traffic.tokens else traffic.loads
        assert np.array_equal(found, array[None] if key == "weight" else array), key


MATRICES = {
    "sglang.npz": (npz(logical_count=STEPS.astype(np.int32), rank=0), STEPS, "logical_count of 3 steps"),
    "sglang-one.npz": (npz(logical_count=LOADS.astype(np.int64)), LOADS[None], "logical_count of 1 step"),
    "sglang.json": (json.dumps({"logical_count": LOADS.tolist()}).encode(), LOADS[None], "logical_count of 1 step"),
    "vllm.npz": (npz(logical_expert_load=STEPS), STEPS, "logical_expert_load of 3 steps"),
    "vllm.json": (json.dumps({"expert_load": STEPS.tolist()}).encode(), STEPS, "expert_load of 3 steps"),
    "eplb.npz": (npz(weight=LOADS.astype(np.float32)), LOADS[None], "weight of 1 step"),
    "eplb.json": (json.dumps({"weight": LOADS.astype(int).tolist()}).encode(), LOADS[None], "weight of 1 step"),
    "bare.npy": (npy(LOADS.astype(np.float16)), LOADS[None], "weight of 1 step"),
    "bare-steps.npy": (npy(STEPS.astype(np.uint64)), STEPS, "weight of 3 steps"),
    "bare.json": (json.dumps(LOADS.tolist()).encode(), LOADS[None], "weight of 1 step"),
    "bare-with-a-bom": (b"\xef\xbb\xbf" + json.dumps(LOADS.tolist()).encode(), LOADS[None], "weight of 1 step"),
    "bare": (json.dumps(STEPS.tolist()).encode(), STEPS, "weight of 3 steps"),
}


@pytest.mark.parametrize("expect", [None, ALL_MOE, MODEL])
@pytest.mark.parametrize("name", MATRICES)
def test_load_matrices(tmp_path: Path, name: str, expect: Expected | None) -> None:
    data, loads, what = MATRICES[name]
    (tmp_path / name).write_bytes(data)
    traffic = load_traffic(tmp_path / name, expect=expect)
    assert traffic.loads.dtype == np.float64
    assert np.array_equal(traffic.loads, loads)
    assert (traffic.tokens, traffic.top_k, traffic.experts, traffic.layers) == (None, None, 16, 4)
    assert traffic.origin == f"recorded: {name}, sha256 {hashlib.sha256(data).hexdigest()[:12]}…, {what}"


@pytest.mark.parametrize("kind", ["npz", "json"])
@pytest.mark.parametrize("dense", [False, True])
def test_physical_experts_are_folded(tmp_path: Path, kind: str, dense: bool) -> None:
    """20 physical experts; the last four are copies of other experts in each layer."""
    mapping = np.stack([RNG.permutation([*range(16), *RNG.permutation(16)[:4]]) for _ in range(4)])
    loads = RNG.integers(1, 50, (2, 4, 20))
    want = np.zeros((2, 4, 16))
    for step, layer, physical in np.ndindex(loads.shape):
        want[step, layer, mapping[layer, physical]] += loads[step, layer, physical]
    if dense:
        mapping, loads = with_dense_rows(mapping, 0, -1), with_dense_rows(loads, 1)
    arrays = {"expert_load": loads, "physical_to_logical_map": mapping}
    data = npz(**arrays) if kind == "npz" else json.dumps({k: v.tolist() for k, v in arrays.items()}).encode()
    (tmp_path / f"a.{kind}").write_bytes(data)
    for expect in (MODEL,) if dense else (None, MODEL, ALL_MOE):
        traffic = load_traffic(tmp_path / f"a.{kind}", expect=expect)
        assert np.array_equal(traffic.loads, want)
        assert traffic.origin.endswith("expert_load of 2 steps, folded from 20 physical experts")


def test_a_silent_step_is_legal(tmp_path: Path) -> None:
    steps = STEPS.copy()
    steps[1, 2] = 0
    (tmp_path / "a.npz").write_bytes(npz(logical_count=steps))
    assert np.array_equal(load_traffic(tmp_path / "a.npz").loads, steps)


def test_a_name_that_a_terminal_would_act_on(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[2J.npy"
    file.write_bytes(npy(LOADS))
    assert load_traffic(file).name == "a?[2J.npy"
    file.write_bytes(b"")
    with pytest.raises(PlancError) as error:
        load_traffic(str(file))
    assert error.value.diagnostics[0].message.isprintable()


# --- not a traffic file ----------------------------------------------------------------------------------------------


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return out.getvalue()


def header(text: str, body: bytes = b"\0" * 128, version: int = 1) -> bytes:
    size = len(text) + 1
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + size.to_bytes(2 if version == 1 else 4, "little")
        + text.encode()
        + b"\n"
        + body
    )


OBJECTS = np.array([[1, None], [2, 3]], dtype=object)
HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
NOT_TRAFFIC = {  # name: (bytes, words of the message, words of the hint)
    "empty.npz": (b"", "is empty", ".jsonl"),
    "empty.json": (b" \n", "not a traffic file", ".jsonl"),
    "text.yaml": (b"topk_ids: [1]\n", "not a traffic file", "`logical_count`"),
    "text.npz": (b"topk_ids: [1]\n", "does not begin as a file that ends in .npz", ".jsonl"),
    "text.npy": (b"\x93NUMP", "does not begin as a file that ends in .npy", ".jsonl"),
    "cut.npz": (TRACES["int16.npz"][:200], "the zip archive is damaged", "again"),
    "cut-end.npz": (TRACES["int16.npz"][:-1], "the zip archive is damaged", "again"),
    "no-members.npz": (zipped(), "no key that planc knows; the file has none", "`topk_ids`"),
    "keys.npz": (npz(topk_id=IDS, other=RANKS), "the file has `other`, `topk_id`", "did you mean `topk_ids`?"),
    "keys.json": (b'{"weights": [[1, 2]]}', "the file has `weights`", "did you mean `weight`?"),
    "odd-keys.npz": (npz(**{"a\u202e\x1b": IDS}), "the file has none", "`topk_ids`"),
    "not-npy.npz": (zipped(topk_ids__npy=b"hello"), "the header of `topk_ids` is damaged", "again"),
    "dims.npz": (
        npz(topk_ids=IDS[0]),
        "2 dimensions, shape [4, 2], instead of [tokens, layers, k]",
        "[tokens, layers, k]",
    ),
    "dims-of-loads.npz": (npz(weight=LOADS[0]), "1 dimension, shape [16]", "[layers, experts]"),
    "dims-of-a-scalar.npz": (npz(weight=np.float64(3)), "0 dimensions, shape []", "[layers, experts]"),
    "dims-many.npy": (npy(np.ones((1,) * 10)), "10 dimensions, shape [1, 1, 1, 1, 1, 1, …]", "[layers, experts]"),
    "dims-of-the-map.npz": (npz(expert_load=LOADS, physical_to_logical_map=RANKS), "1 dimension", "physical experts"),
    "dims-of-ranks.npz": (npz(topk_ids=IDS, source_rank=IDS), "`source_rank` has 3 dimensions", "[tokens]"),
    "dims.json": (b'{"weight": 3}', "0 dimensions", "[layers, experts]"),
    "floats.npz": (npz(topk_ids=IDS.astype(float)), "holds float64, but ids are whole numbers", "int32"),
    "floats.json": (json.dumps({"topk_ids": (IDS + 0.0).tolist()}).encode(), "are whole numbers", "int32"),
    "bools.npz": (npz(weight=LOADS > 3), "holds bool, not numbers", "float32"),
    "texts.npz": (npz(weight=LOADS.astype(str)), "not numbers", "float32"),
    "dates.npz": (npz(weight=LOADS.astype("datetime64[s]")), "holds datetime64[s], not numbers", "float32"),
    "complex.npz": (npz(weight=LOADS.astype(complex)), "holds complex128, not numbers", "float32"),
    "records.npz": (npz(weight=np.zeros((4, 16), [("\u202ea", "i4")])), "not numbers", "float32"),
    "objects.npz": (npz(topk_ids=OBJECTS), "pickled array", "np.savez"),
    "objects.npy": (npy(OBJECTS), "pickled array", "np.savez"),
    "objects-beside.npz": (npz(topk_ids=IDS, source_rank=OBJECTS), "`source_rank` is a pickled array", "np.savez"),
    "dump.pkl": (pickle.dumps({"topk_ids": [1]}), "is a pickle, and planc never opens pickles", "np.savez"),
    "dump.pt": (
        zipped(archive__data__pkl=b"").replace(b"archive.data", b"archive/data"),
        "is a PyTorch file",
        "np.savez",
    ),
    "old.pt": (pickle.dumps({"logical_count": 1}), "is a PyTorch file", 'torch.load("old.pt")'),
    "renamed.npz": (
        zipped(archive__data__pkl=b"").replace(b"archive.data", b"archive/data"),
        "is a PyTorch file",
        "np.savez",
    ),
    "packed.npz.gz": (b"\x1f\x8b\x08\0\0", "is packed with gzip", "gunzip"),
    "huge.npy": (header(HUGE), "are 8,000,000,000,000,000,000 bytes, but the file has 128", "again"),
    "huge.npz": (zipped(topk_ids__npy=header(HUGE.replace("(", "(2, ").replace("f8", "i8"))), "is damaged", "again"),
    "endless.npy": (header(HUGE.replace("1000000000,", "9" * 400 + ",")), "[…, 1000000000] of float64", "again"),
    "negative.npy": (header(HUGE.replace("(1", "(-1")), "negative size", "again"),
    "short.npy": (npy(LOADS)[:-8], "are 512 bytes, but the file has 504", "again"),
    "long.npy": (npy(LOADS) + b"x", "are 512 bytes, but the file has 513", "again"),
    "brackets.npy": (header("(" * 5000), "the header of `weight` is damaged", "again"),
    "unclosed.npy": (header("{'descr': '<f8', 'shape': ( }"), "the header of `weight` is damaged", "again"),
    "code.npy": (
        header(HUGE.replace("'<f8'", "__import__('os').abort()")),
        "the header of `weight` is damaged",
        "again",
    ),
    "version.npy": (b"\x93NUMPY\x09\x00" + npy(LOADS)[8:], "the header of `weight` is damaged", "again"),
    "a-number.json": (b"3", "holds 3, not an object or a list", "`topk_ids`"),
    "a-text.json": (b'"\\u202e\\u001b"', "not an object or a list", "`topk_ids`"),
    "ragged.json": (b'{"weight": [[1, 2], [3, 4, 5]]}', "[0] has 2 entries, but [1] 3", "lists of equal length"),
    "ragged-deep.json": (b"[[[1], [2, 3]]]", "[0][0] has 1 entry, but [0][1] 2", "lists of equal length"),
    "mixed.json": (b"[[1, 2], 3]", "[1] is a number, but [0] a list", "lists of equal length"),
    "null.json": (b"[[1, 2], [3, null]]", "[1][1] is null", "nothing but numbers"),
    "true.json": (b"[[true, false]]", "[0][0] is true", "nothing but numbers"),
    "words.json": (b'[[1, 2], [3, "4"]]', '[1][1] is "4"', "nothing but numbers"),
    "nested.json": (b'[[1, {"a": 1}]]', "[0][1] is an object", "nothing but numbers"),
    "large.json": (b"[[1, 1" + b"0" * 400 + b"]]", "[0][1] is a number of more than 64 bits", "nothing but numbers"),
}


@pytest.mark.parametrize("name", NOT_TRAFFIC)
def test_not_a_traffic_file(tmp_path: Path, name: str) -> None:
    data, message, hint = NOT_TRAFFIC[name]
    (found,) = refused(tmp_path, name, data)
    assert (found.code, found.span and found.span.line) == ("PLN021", 1)
    assert message in found.message, found.message
    assert hint in found.hint, found.hint


def test_arrays_that_cannot_be_used_are_told_together(tmp_path: Path) -> None:
    found = refused(tmp_path, "a.npz", npz(topk_ids=IDS[0], source_rank=IDS, experts=np.array("x")))
    assert [d.code for d in found] == ["PLN021"] * 3


@pytest.mark.parametrize("value", [np.array([1, 2]), 0, -1, 65_537, 2**63])
def test_experts_beside_a_trace(tmp_path: Path, value: Any) -> None:
    (found,) = refused(tmp_path, "a.npz", npz(topk_ids=IDS, experts=value))
    assert found.code == "PLN022"
    assert "a layer has 1 to 65,536 experts" in found.message


def test_a_flipped_bit_in_packed_data(tmp_path: Path) -> None:
    data = bytearray(npz(topk_ids=IDS))
    data[150] ^= 1
    (found,) = refused(tmp_path, "a.npz", bytes(data))
    assert found.code == "PLN021"
    assert "`topk_ids` is damaged" in found.message


def test_arrays_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = npz(topk_ids=np.zeros((1000, 100, 10), dtype=np.int64))
    assert len(data) < 20_000
    monkeypatch.setattr(opened, "MAX_ARRAY_BYTES", 7_000_000)
    (found,) = refused(tmp_path, "a.npz", data)
    assert (found.code, "unpacked" in found.message) == ("PLN021", True)


def test_arrays_that_unpack_to_more_than_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip that says 1,000 bytes and unpacks to 200 MB: no more is unpacked than it says."""
    data = npz(topk_ids=np.zeros((250, 1000, 100), dtype=np.int64))
    said = (200_000_128).to_bytes(4, "little")
    assert said in data
    data = data.replace(said, (1000).to_bytes(4, "little"))
    monkeypatch.setattr(recorded, "MAX_FILE_BYTES", 1_000_000)  # a buffer of this size is taken to read into
    tracemalloc.start()
    (found,) = refused(tmp_path, "a.npz", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.code == "PLN021"
    assert peak < 20_000_000


# --- unreadable, and not JSON ----------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "nowhere.npz", tmp_path):
        with pytest.raises(PlancError, match="PLN001"):
            load_traffic(path)
    monkeypatch.setattr(recorded, "MAX_FILE_BYTES", 100)
    assert [d.code for d in refused(tmp_path, "a.npy", npy(LOADS))] == ["PLN003"]
    monkeypatch.undo()
    monkeypatch.setattr(opened, "MAX_JSON_BYTES", 100)
    assert [d.code for d in refused(tmp_path, "a.json", MATRICES["eplb.json"][0])] == ["PLN003"]


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(recorded, "_loads", short)
    assert [d.code for d in refused(tmp_path, "a.npy", npy(LOADS))] == ["PLN003"]


@pytest.mark.parametrize(
    ("name", "data", "code", "line"),
    [
        ("a.json", b'{"weight": [[1, 2],\n [3, 4', "PLN004", 2),
        ("a.json", b"weight: 3", "PLN004", 1),
        ("a.json", b'{"weight": [[1]], "weight": [[2]]}', "PLN005", 1),
        ("a.json", b"[" * 50 + b"]" * 50, "PLN009", 1),
        ("a.json", b"[" * 100_000, "PLN009", 1),
        ("a.json", b'{"weight": [[1, \xff]]}', "PLN002", 1),
        ("a.jsonl", jsonl(lines())[:-20], "PLN004", 6),
        ("a.jsonl", jsonl([*lines()[:3], "topk_ids"]), "PLN004", 4),
        ("a.jsonl", jsonl([*lines()[:1], '{"topk_ids": [], "topk_ids": []}']), "PLN005", 2),
        ("a.jsonl", jsonl([*lines()[:2], "[" * 40 + "]" * 40]), "PLN009", 3),
        ("a.jsonl", jsonl(lines()) + b"\xff", "PLN002", 7),
        ("a.json", jsonl([*lines()[:2], "x"]), "PLN004", 3),
    ],
)
def test_not_json(tmp_path: Path, name: str, data: bytes, code: str, line: int) -> None:
    (found,) = refused(tmp_path, name, data)
    assert (found.code, found.span and found.span.line) == (code, line)


# --- lines -----------------------------------------------------------------------------------------------------------

ODD_LINES = {  # what stands on line 3 of a trace: (words of the message, words of the hint)
    "3": ("holds 3, not an object", "a list of experts for each layer"),
    "[[1, 2]]": ("holds a list, not an object", "a list of experts for each layer"),
    "{}": ("it has no keys", "a list of experts for each layer"),
    '{"topkids": [[1, 2]], "a\\u202e": 1}': ("it has `topkids`, `a?`", "did you mean `topk_ids`?"),
    '{"topk_ids": [[1, 2], [3]], "source_rank": 1}': ("[0] has 2 entries, but [1] 1", "[layers, k]"),
    '{"topk_ids": [1, 2], "source_rank": 1}': (
        "`topk_ids` has 1 dimension, shape [2], instead of [layers, k]",
        "[layers, k]",
    ),
    '{"topk_ids": "no", "source_rank": 1}': ('it is "no"', "nothing but numbers"),
    '{"topk_ids": [[1.0, 2]], "source_rank": 1}': ("ids are whole numbers", "int32"),
    '{"topk_ids": [[1, 2], [3, 4]], "source_rank": 1}': ("shape [2, 2], but on line 1 [4, 2]", "the same layers"),
    json.dumps({"topk_ids": IDS[0].tolist()}): ("has no `source_rank`, but line 1 has one", "or on none"),
    json.dumps({"topk_ids": IDS[0].tolist(), "source_rank": 1.5}): ("is 1.5, not a whole number", "such as 3"),
    json.dumps({"topk_ids": IDS[0].tolist(), "source_rank": None}): ("is null, not a whole number", "such as 3"),
    json.dumps({"topk_ids": IDS[0].tolist(), "source_rank": True}): ("is true, not a whole number", "such as 3"),
    json.dumps({"topk_ids": IDS[0].tolist(), "source_rank": 2**70}): ("not a whole number", "such as 3"),
}


@pytest.mark.parametrize("line", ODD_LINES)
def test_odd_lines(tmp_path: Path, line: str) -> None:
    message, hint = ODD_LINES[line]
    (found,) = refused(tmp_path, "a.jsonl", jsonl([*lines()[:2], line, *lines()[2:]]))
    assert (found.code, found.span and found.span.line) == ("PLN021", 3)
    assert message in found.message, found.message
    assert hint in found.hint, found.hint


def test_a_source_on_a_later_line_only(tmp_path: Path) -> None:
    (found,) = refused(tmp_path, "a.jsonl", jsonl([{"topk_ids": IDS[0].tolist()}, lines()[1]]))
    assert (found.code, found.span and found.span.line) == ("PLN021", 2)
    assert "has a `source_rank`, but line 1 has none" in found.message


def test_faulty_lines_are_told_together_but_not_all(tmp_path: Path) -> None:
    found = refused(tmp_path, "a.jsonl", jsonl([*lines(), "{}", "3", "{"]))
    assert [(d.code, d.span and d.span.line) for d in found] == [("PLN021", 7), ("PLN021", 8), ("PLN004", 9)]
    assert len(refused(tmp_path, "b.jsonl", jsonl(["{}"] * 1000))) == 5


# --- values that cannot be -------------------------------------------------------------------------------------------


def changed(array: np.ndarray, *changes: tuple[Any, Any]) -> np.ndarray:
    array = array.copy()
    for where, value in changes:
        array[where] = value
    return array


LAYER_2 = changed(np.zeros((4, 2), dtype=int), (2, [-1, 0]))
FIRST = IDS[1, 2, 0]
BAD_VALUES = {  # name: (bytes, words of each message in order)
    "negative.npz": (npz(logical_count=changed(STEPS, ((1, 2, 3), -4))), ["step 1, layer 3, expert 3: the load is negative: -4"]),
    "negative.json": (json.dumps(changed(LOADS, ((0, 0), -1)).tolist()).encode(), ["layer 1, expert 0: the load is negative: -1"]),
    "nan.npy": (npy(changed(LOADS, ((3, 15), np.nan))), ["layer 5, expert 15: the load is not a number"]),
    "nan.json": (b"[[1, NaN]]", ["layer row 0, expert 1: the load is not a number"]),
    "infinite.npz": (npz(weight=changed(LOADS, ((0, 1), np.inf))), ["layer 1, expert 1: the load is infinite"]),
    "infinite.json": (b"[[1, Infinity], [1, -1e999]]", ["row 0, expert 1: the load is infinite", "row 1, expert 1: the load is negative"]),
    "all.npz": (
        npz(weight=changed(LOADS, ((0, 1), np.inf), ((1, 1), -1), ((2, 1), np.nan))),
        ["layer 1, expert 1: the load is infinite", "layer 2, expert 1: the load is neg", "layer 3, expert 1: the load is not"],
    ),
    "silent.npz": (npz(logical_count=changed(STEPS, ((slice(None), 2), 0))), ["layer 3: the loads of all experts are zero over all steps"]),
    "silent.npy": (npy(changed(LOADS, ((1,), 0), ((3,), 0))), ["layer 2: the loads of all experts are zero", "layer 5: the loads"]),
    "overflow.npy": (npy(changed(LOADS, ((0, slice(None)), 1.7e308))), ["layer 1: the loads sum to inf"]),
    "underflow.npy": (npy(changed(LOADS, ((0,), 5e-324))), ["layer 1: the loads sum to 7.9"]),
    "ids.npz": (npz(topk_ids=changed(IDS, ((4, 1, 1), 16))), ["token 4, layer 2: expert 16 is not one of 0 to 15"]),
    "ids-negative.npz": (npz(topk_ids=changed(IDS, ((0, 0, 0), -1))), ["token 0, layer 1: expert -1 is not one of 0 to 15"]),
    "ids-wide.npz": (npz(topk_ids=changed(IDS.astype(np.uint64), ((0, 0, 0), 2**64 - 1))), ["expert 18446744073709551615 is not"]),
    "ids-byte.npz": (npz(topk_ids=changed(IDS.astype(np.uint8), ((0, 3, 0), 255))), ["token 0, layer 5: expert 255 is not"]),
    "ids.jsonl": (b"\n" + jsonl(lines(changed(IDS, ((4, 1, 1), 99)))), ["token 4, layer 2: expert 99 is not one of 0 to 15"]),
    "twice.npz": (npz(topk_ids=changed(IDS, ((1, 2, 1), FIRST))), [f"token 1, layer 3: expert {FIRST} is chosen twice"]),
    "ranks.npz": (npz(topk_ids=IDS, source_rank=RANKS - 1), ["token 0: source rank -1", "token 3: source rank -1"]),
    "ranks-large.npz": (npz(topk_ids=IDS, source_rank=RANKS * 10**6), [f"token {i}: source rank {i % 3}000000 is not" for i in (1, 2, 4, 5)]),
    "ranks.jsonl": (b"\n" + jsonl(lines(ranks=RANKS - 1)), ["token 0: source rank -1", "token 3: source rank -1"]),
    "ranks-few.npz": (npz(topk_ids=IDS, source_rank=RANKS[:5]), ["`source_rank` has 5 entries for 6 tokens"]),
    "no-tokens.npz": (npz(topk_ids=IDS[:0]), ["`topk_ids` is empty: its shape is [0, 4, 2]"]),
    "no-k.npz": (npz(topk_ids=IDS[:, :, :0]), ["`topk_ids` is empty: its shape is [6, 4, 0]"]),
    "no-experts.npy": (npy(LOADS[:, :0]), ["`weight` is empty: its shape is [4, 0]"]),
    "no-experts.json": (b"[[], []]", ["`weight` is empty: its shape is [2, 0]"]),
    "no-tokens.jsonl": (b"\n\n", ["has no tokens"]),
    "nothing.jsonl": (b"", ["has no tokens"]),
    "map.npz": (
        npz(expert_load=LOADS, physical_to_logical_map=changed(np.tile(np.arange(16), (4, 1)), ((2, 7), -1), ((3, 1), 16))),
        ["physical expert 1 of layer 5 stands for expert 16", "physical expert 7 of layer 3 stands for expert -1"],
    ),
    "map-short.npz": (npz(expert_load=LOADS, physical_to_logical_map=np.zeros((4, 15), int)), ["is [4, 15], but `expert_load` has 4 layers of 16"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(tmp_path: Path, name: str) -> None:
    data, messages = BAD_VALUES[name]
    bare = name in ("nan.json", "infinite.json")  # too small for the model
    found = refused(tmp_path, name, data, None if bare else MODEL)
    assert {d.code for d in found} == {"PLN022"}
    assert len(found) == len(messages), [d.message for d in found]
    for diagnostic, message in zip(found, messages, strict=True):
        assert message in diagnostic.message, diagnostic.message
    if name.endswith(".jsonl") and len(data) > 2:
        tokens = [int(message.split()[1].strip(":,")) for message in messages]
        assert [d.span and d.span.line for d in found] == [token + 2 for token in tokens]  # a blank line first


def test_values_are_told_together_but_not_all(tmp_path: Path) -> None:
    every = slice(None)
    ids = changed(IDS, ((every, 0, 0), -1), ((every, 1), 3), ((every, 2), 4), ((every, 3, 0), -1))
    found = refused(tmp_path, "a.npz", npz(topk_ids=ids, source_rank=RANKS - 9))
    assert {d.code for d in found} == {"PLN022"}
    # the first 5 of 12 negative ids, of 12 chosen twice, and of 6 ranks
    assert len(found) == 15
    assert sum("(the first 5 of 12 such are shown)" in d.message for d in found) == 10
    assert sum("(the first 5 of 6 such are shown)" in d.message for d in found) == 5


def test_ids_without_a_model_are_bounded(tmp_path: Path) -> None:
    (found,) = refused(tmp_path, "a.npz", npz(topk_ids=changed(IDS, ((2, 0, 1), 2**40))))
    assert "token 2, layer row 0: expert 1099511627776 is not one of 0 to 65,535" in found.message
    data = npz(expert_load=LOADS, physical_to_logical_map=np.full((4, 16), 2**40))
    assert "is not one of 0 to 65,535" in refused(tmp_path, "b.npz", data)[0].message


# --- traffic of another model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "messages"),
    [
        ({"topk_ids": IDS[:, :3]}, ["3 rows of layers, but small has 4 MoE layers of 6 in all"]),
        ({"weight": np.ones((5, 16))}, ["5 rows of layers, but small has 4 MoE layers of 6 in all"]),
        ({"weight": np.ones((1, 16))}, ["1 row of layers"]),
        ({"weight": np.ones((4, 20))}, ["20 experts a layer, but small has 16"]),
        ({"topk_ids": IDS[:, :, :1]}, ["1 expert per token, but small has top_k 2"]),
        ({"topk_ids": IDS, "experts": 32}, ["32 experts a layer, but small has 16"]),
        (
            {"topk_ids": IDS[:, :1, :1], "num_experts": 8},
            ["1 expert per token", "1 row of layers", "8 experts a layer, but small has 16"],
        ),
    ],
)
def test_traffic_of_another_model(tmp_path: Path, arrays: dict[str, Any], messages: list[str]) -> None:
    found = refused(tmp_path, "a.npz", npz(**arrays), MODEL)
    assert {d.code for d in found} == {"PLN023"}
    assert len(found) == len(messages)
    for diagnostic, message in zip(found, messages, strict=True):
        assert message in diagnostic.message, diagnostic.message
    load_traffic(tmp_path / "a.npz")  # no fault of its own


def test_no_traffic_belongs_to_a_dense_model(tmp_path: Path) -> None:
    dense = Expected(layers=4, moe_layers=(), experts=0, top_k=0, name="dense\x1b")
    found = refused(tmp_path, "a.npz", npz(weight=LOADS), dense)
    assert {d.code for d in found} == {"PLN023"}
    assert any("dense? has no MoE layers" in d.message for d in found)


# --- damage ----------------------------------------------------------------------------------------------------------

WHOLE = {
    "a.npz": TRACES["int16.npz"],
    "stored.npz": zipped(weight__npy=npy(LOADS)),
    "a.npy": npy(LOADS),
    "a.json": MATRICES["eplb.json"][0],
    "a.jsonl": TRACES["trace.jsonl"],
}


def attempt(file: Path, data: bytes) -> None:
    """Whatever the bytes are: usable traffic, or coded faults that can be shown."""
    file.write_bytes(data)
    try:
        loads = load_traffic(file).loads
    except PlancError as error:
        assert all(d.message.isprintable() and d.hint.isprintable() for d in error.diagnostics)
        assert error.diagnostics
        return
    assert np.isfinite(loads).all()
    assert (loads >= 0).all()
    assert (loads.sum(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("name", WHOLE)
def test_cut_files(tmp_path: Path, name: str) -> None:
    whole = WHOLE[name]
    for size in range(0, len(whole), max(1, len(whole) // 60)):
        attempt(tmp_path / name, whole[:size])


@pytest.mark.parametrize("name", WHOLE)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    for _ in range(150):
        data = bytearray(WHOLE[name])
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
            else:
                data[at : at + rng.randrange(3)] = rng.choice(
                    [b"", b"[", b"]", b"NaN", b"-", b"1e999", b"9" * 30, b"\n"]
                )
        attempt(tmp_path / name, bytes(data))


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[s]", "c16", "S3", "U2", "V4", "?", "f2", "f8", "g", "i1", "u8", ">i4"])
def test_every_dtype_and_shape(tmp_path: Path, dtype: str) -> None:
    for shape in ((), (1,), (6,), (4, 16), (6, 4, 2), (3, 4, 16), (0, 4, 2), (1,) * 5):
        array = np.zeros(shape, dtype)
        attempt(tmp_path / "a.npy", npy(array))
        for key in ("topk_ids", "logical_count", "expert_load", "weight"):
            attempt(tmp_path / "a.npz", npz(**{key: array}))
        for key in ("source_rank", "experts"):
            attempt(tmp_path / "a.npz", npz(topk_ids=IDS, **{key: array}))
        attempt(tmp_path / "a.npz", npz(expert_load=LOADS, physical_to_logical_map=array))


def test_a_device_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/zero"):
        pytest.skip("no /dev/zero")
    monkeypatch.setattr(recorded, "MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(PlancError, match="PLN003"):
        load_traffic("/dev/zero")
