"""plan.json changed by hand: every change of substance is refused with codes and a place in the file, nothing crashes."""

from __future__ import annotations

import copy
import json
import random
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planc
from planc import pipeline
from planc.diagnostics import PlancError
from planc.verify import load_plan, plan_json

SPEC = """name: small
model:
  base: moe-4l
  layers: 2
  hidden: 64
  first_k_dense: 1
  attention: {heads: 8, head_dim: 8}
  dense_mlp: {intermediate: 64}
  moe: {experts: 8, intermediate: 32, shared_experts: 1}
  vocab: 100
cluster: h100-sxm-4x4
workload: {batch: 62, isl: 16}
parallelism: {dp: 2, pp: 1, ep: 8, tp: 2, gating: leader}
"""
Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def text() -> str:
    """A small plan.json with every kind of entry."""
    return plan_json(planc.compile(planc.parse_spec(SPEC)))


def answer(data: str | bytes, folder: Path) -> set[str]:
    """The codes that loading the text is refused with; empty when it loads. Every fault has a place in the file."""
    file = folder / "plan.json"
    file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    try:
        load_plan(folder)
    except PlancError as error:
        for d in error.diagnostics:
            assert d.span is not None
            assert (d.span.file, d.span.line > 0, d.span.column > 0) == (str(file), True, True)
        return {d.code for d in error.diagnostics}
    return set()


def test_unedited(text: str, tmp_path: Path) -> None:
    plan = planc.compile(planc.parse_spec(SPEC))
    assert answer(text, tmp_path) == set()
    again = load_plan(tmp_path)
    assert again == plan
    assert plan_json(again) == text
    assert answer(json.dumps(json.loads(text)), tmp_path) == set()  # the layout of the file means nothing
    assert answer("\ufeff" + text.replace("\n", "\r\n"), tmp_path) == set()


# --- text ------------------------------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda t: "", "PLN004"),
    "cut in the middle": (lambda t: t[: len(t) // 2], "PLN004"),
    "cut at the end": (lambda t: t[:-3], "PLN004"),
    "text after the end": (lambda t: t + "{}", "PLN004"),
    "two plans": (lambda t: t + t, "PLN004"),
    "a comma lost": (lambda t: t.replace('1",\n', '1"\n', 1), "PLN004"),
    "a comma too many": (lambda t: t.replace("\n}", ",\n}"), "PLN004"),
    "a comment": (lambda t: "// mine\n" + t, "PLN004"),
    "single quotes": (lambda t: t.replace('"', "'"), "PLN004"),
    "yaml": (lambda t: "schema: planc.plan/1", "PLN004"),
    "binary": (lambda t: b"\x89PNG\r\n\x1a\n", "PLN002"),
    "a NUL": (lambda t: t.encode() + b"\0", "PLN002"),
    "latin-1": (lambda t: t.replace("small", "größe").encode("latin-1"), "PLN002"),
    "utf-16": (lambda t: t.encode("utf-16"), "PLN002"),
    "lone surrogate": (lambda t: t.replace("small", "\ud800"), "PLN002"),
    "an escaped lone surrogate": (lambda t: t.replace('"small"', r'"\ud800"'), "PLN004"),
    "an escaped lone surrogate in the model": (lambda t: t.replace('"kind": "mha"', r'"kind": "\uDC00"'), "PLN004"),
    "an escaped lone surrogate for a key": (
        lambda t: t.replace('"sources": {', r'"sources": {"\udc00\ud800": "",'),
        "PLN004",
    ),
    "an escaped lone surrogate in a reason": (
        lambda t: t.replace('"reasons": {', r'"reasons": {"x": "\ud800\ud800",'),
        "PLN004",
    ),
    "an escaped lone surrogate after a backslash": (
        lambda t: t.replace('"reasons": {', r'"reasons": {"x": "\\ud83d\udc00",'),
        "PLN004",
    ),
    "a key twice": (lambda t: t.replace('"parallelism": {', '"parallelism": {"dp": 1,', 1), "PLN005"),
    "a section twice": (lambda t: t.replace('{\n "schema"', '{"sources": {},\n "schema"'), "PLN005"),
    "a block's key twice": (lambda t: t.replace('"kind": "embed"', '"kind": "embed", "kind": "embed"'), "PLN005"),
    "deep": (lambda t: t.replace('"checks": [', '"checks": [' + "[" * 50 + "]" * 50 + ","), "PLN009"),
    "very deep": (lambda t: "[" * 100_000, "PLN009"),
    "very deep, closed": (lambda t: '{"a":' * 5000 + "1" + "}" * 5000, "PLN009"),
    "5000 digits": (lambda t: t.replace('"rounds": 1', '"rounds": ' + "1" * 5000), "PLN004"),
    "a list": (lambda t: f"[{t}]", "PLN018"),
    "a number": (lambda t: "17", "PLN018"),
    "null": (lambda t: "null", "PLN018"),
    "no plan": (lambda t: '{"model": 1}', "PLN018"),
    "a newer schema": (lambda t: t.replace("planc.plan/1", "planc.plan/2"), "PLN018"),
    "NaN": (lambda t: t.replace('"rounds": 1', '"rounds": NaN'), "PLN018"),
    "infinity in the spec": (lambda t: t.replace('"mfu": 0.6', '"mfu": Infinity'), "PLN013"),
    "a name with a tag": (lambda t: t.replace('"name": "small"', '"name": "<script>"'), "PLN016"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_edited_text(name: str, text: str, tmp_path: Path) -> None:
    change, code = TEXTS[name]
    changed = change(text)
    assert changed != text
    assert answer(changed, tmp_path) == {code}


def test_escapes_of_whole_characters(text: str, tmp_path: Path) -> None:
    r"""Pairs of escapes are characters, and after an escaped backslash `\\ud800` is text."""
    changed = text.replace('"reasons": {', r'"reasons": {"x": "\ud83d\ude00 \\\\ud800",')
    assert changed != text
    assert answer(changed, tmp_path) == set()


# --- values ------------------------------------------------------------------------------------------------------------


def block(tree: Any, kind: str) -> Any:
    """The first block of a kind."""
    return next(b for b in tree["graph"]["blocks"] if b["kind"] == kind)


def edge(tree: Any, source: str) -> Any:
    """The first edge from a port."""
    return next(e for e in tree["graph"]["edges"] if e["source"].endswith(source))


def put(container: Any, key: Any, value: Any) -> None:
    """Set a key that is there."""
    assert (type(container[key]), container[key]) != (type(value), value)
    container[key] = value


EDITS: dict[str, tuple[Edit, str]] = {
    # who holds what
    "an expert on another rank": (lambda t: put(t["placement"]["layers"][0], "ranks", "1,1-7"), "PLN316"),
    "an expert twice": (lambda t: put(t["placement"]["layers"][0], "experts", "0-6,6"), "PLN312"),
    "an expert that is not there": (lambda t: put(t["placement"]["layers"][0], "experts", "0-6,8"), "PLN311"),
    "an expert of a huge number": (lambda t: put(t["placement"]["layers"][0], "experts", "0-6,999999999"), "PLN311"),
    "columns swapped": (
        lambda t: put(t["placement"]["layers"][0], "slots", t["placement"]["layers"][0]["ranks"]),
        "PLN316",
    ),
    "columns of unequal length": (lambda t: put(t["placement"]["layers"][0], "ranks", "0-6"), "PLN018"),
    "a rank outside": (lambda t: put(t["placement"]["layers"][0], "ranks", "0-6,8"), "PLN018"),
    "a layer without experts": (lambda t: put(t["placement"]["layers"][0], "layers", ""), "PLN018"),
    "a dense layer with experts": (lambda t: put(t["placement"]["layers"][0], "layers", "0-1"), "PLN018"),
    "no placement": (lambda t: put(t["placement"], "layers", []), "PLN018"),
    "other rounds": (lambda t: put(t["placement"], "rounds", 2), "PLN310"),
    "a run of a billion": (lambda t: put(t["placement"]["layers"][0], "ranks", "0-999999999"), "PLN018"),
    "a run of a billion copies": (lambda t: put(t["placement"]["layers"][0], "ranks", "1x999999999"), "PLN018"),
    "a run that goes nowhere": (lambda t: put(t["placement"]["layers"][0], "ranks", "7-0"), "PLN018"),
    "a negative rank": (lambda t: put(t["placement"]["layers"][0], "ranks", "-1,1-7"), "PLN018"),
    "digits of another script": (lambda t: put(t["placement"]["layers"][0], "ranks", "٠-٧"), "PLN018"),
    # degrees
    "another dp": (lambda t: put(t["parallelism"], "dp", 1), "PLN018"),
    "another tp": (lambda t: put(t["parallelism"], "tp", 4), "PLN111"),
    "tp 0": (lambda t: put(t["parallelism"], "tp", 0), "PLN018"),
    "negative degrees": (lambda t: t["parallelism"].update(dp=-2, ep=-8), "PLN018"),
    "huge degrees": (lambda t: t["parallelism"].update(dp=10**30), "PLN018"),
    "stages with a gap": (lambda t: put(t["parallelism"], "stages", [[0, 1]]), "PLN018"),
    "stages that overlap": (lambda t: put(t["parallelism"], "stages", [[-3, 2]]), "PLN108"),
    "other gating": (lambda t: put(t["parallelism"], "gating", "sharded"), "PLN111"),
    "another world": (lambda t: put(t["parallelism"], "world_size", 17), "PLN316"),
    "no reasons": (lambda t: t["reasons"].clear(), "PLN018"),
    # memory
    "less kv cache": (lambda t: put(t["memory"][0]["items"], "kv_cache", 1), "PLN315"),
    "more capacity": (lambda t: put(t["memory"][0], "capacity", 10**12), "PLN315"),
    "another sum": (lambda t: put(t["memory"][0], "used", 1), "PLN316"),
    "a rank without memory": (lambda t: put(t["memory"][0], "ranks", "0"), "PLN315"),
    "memory of a rank outside": (lambda t: put(t["memory"][0], "ranks", "0-16"), "PLN018"),
    "an item lost": (lambda t: t["memory"][0]["items"].pop("kv_cache"), "PLN018"),
    "bytes beyond 64 bits": (lambda t: put(t["memory"][0]["items"], "kv_cache", 2**70), "PLN018"),
    "memory as text": (lambda t: put(t["memory"][0], "used", "1 GB"), "PLN018"),
    # the graph
    "a shape": (lambda t: put(block(t, "attn_out")["writes"], "y", "[8, 65] bf16 P"), "PLN304"),
    "a dtype": (
        lambda t: put(edge(t, "attn_core.o"), "tensor", edge(t, "attn_core.o")["tensor"].replace("fp16", "fp8")),
        "PLN305",
    ),
    "a layout": (
        lambda t: put(
            edge(t, "attn_core.o"), "tensor", edge(t, "attn_core.o")["tensor"].split("] fp16")[0] + "] fp16 R"
        ),
        "PLN306",
    ),
    "a tensor without a shape": (lambda t: put(block(t, "attn_core")["writes"], "o", "[] fp16 R"), "PLN018"),
    "rows in the second place": (lambda t: put(block(t, "attn_core")["writes"], "o", "[1, m] fp16 R"), "PLN018"),
    "a tensor of unknown dtype": (lambda t: put(block(t, "attn_core")["writes"], "o", "[1] int4 R"), "PLN018"),
    "a size beyond 64 bits": (lambda t: put(block(t, "attn_core")["writes"], "o", "[9999999999999] fp16 R"), "PLN018"),
    "an edge lost": (lambda t: t["graph"]["edges"].remove(edge(t, "attn_core.o")), "PLN314"),
    "an edge twice": (lambda t: t["graph"]["edges"].append(edge(t, "attn_core.o")), "PLN317"),
    "an edge to nowhere": (lambda t: put(edge(t, "attn_core.o"), "target", "L9.attn_out.o"), "PLN018"),
    "an edge without a port": (lambda t: put(edge(t, "attn_core.o"), "target", "L0"), "PLN018"),
    "an edge to another port": (lambda t: put(edge(t, "attn_core.o"), "target", "L0.attn_out.z"), "PLN314"),
    "an edge backwards": (lambda t: put(edge(t, "L1.attn_core.o"), "target", "L0.attn_out.o"), "PLN302"),
    "an edge marked": (lambda t: edge(t, "attn_core.o").update(comm="tp"), "PLN309"),
    "an edge not marked": (lambda t: edge(t, "dispatch.tokens").pop("comm"), "PLN309"),
    "an edge of an odd pattern": (lambda t: edge(t, "attn_core.o").update(pattern="all"), "PLN018"),
    "pairs without their pattern": (lambda t: edge(t, "attn_core.o").update(pairs=[[0, 0]]), "PLN018"),
    "pairs outside": (lambda t: edge(t, "attn_core.o").update(pattern="pairs", pairs=[[0, 99999]]), "PLN018"),
    "pairs of three": (lambda t: edge(t, "attn_core.o").update(pattern="pairs", pairs=[[0, 0, 0]]), "PLN018"),
    "a block lost": (lambda t: t["graph"]["blocks"].remove(block(t, "gate")), "PLN018"),
    "a block twice": (lambda t: t["graph"]["blocks"].append(block(t, "gate")), "PLN317"),
    "blocks in another order": (lambda t: t["graph"]["blocks"].insert(0, t["graph"]["blocks"].pop(1)), "PLN018"),
    "a block of another kind": (lambda t: put(block(t, "gate"), "kind", "sample"), "PLN314"),
    "a block of no kind": (lambda t: put(block(t, "gate"), "kind", "gates"), "PLN314"),
    "a block elsewhere": (lambda t: put(block(t, "attn_core"), "ranks", "0-14,16"), "PLN308"),
    "a block nowhere": (lambda t: put(block(t, "attn_core"), "ranks", ""), "PLN308"),
    "a block twice on a rank": (lambda t: put(block(t, "attn_core"), "ranks", "0-14,14"), "PLN317"),
    "a block in no layer": (lambda t: put(block(t, "attn_core"), "layer", 2), "PLN314"),
    "a block in a negative layer": (lambda t: put(block(t, "attn_core"), "layer", -1), "PLN314"),
    "a group of none": (lambda t: put(block(t, "dispatch"), "group", 0), "PLN018"),
    "a group of a million": (lambda t: put(block(t, "dispatch"), "group", 10**6), "PLN018"),
    "a group of more than 64 bits": (lambda t: block(t, "dispatch").update(ranks="", group=10**30), "PLN018"),
    "a negative group": (lambda t: put(block(t, "dispatch"), "group", -8), "PLN018"),
    "a split of none": (lambda t: put(block(t, "attn_core"), "split", 0), "PLN314 PLN304"),
    "another split": (lambda t: put(block(t, "attn_core"), "split", 4), "PLN304"),
    "other row counts": (lambda t: put(block(t, "expert"), "rows", "1x16"), "PLN304 PLN313"),
    "an expert op of another expert": (lambda t: put(block(t, "expert"), "experts", "1,1-7,0-7"), "PLN311"),
    "an expert op without experts": (lambda t: block(t, "expert").pop("experts"), "PLN314"),
    "another world of the graph": (lambda t: put(t["graph"], "world_size", 10**15), "PLN308"),
    "another count of ops": (lambda t: put(t["graph"], "ops", 5), "PLN316"),
    # what follows from the rest
    "limits": (lambda t: put(t["limits"], "batch", 10**9), "PLN316"),
    "tokens": (lambda t: put(t["tokens"], "group", 0), "PLN316"),
    "volumes": (lambda t: put(t["volumes"]["tp"], "nvlink", -5), "PLN316"),
    "checks": (lambda t: t["checks"].pop(), "PLN316"),
    "a check of zero items": (lambda t: put(t["checks"][0], "count", 0), "PLN316"),
    "a note's code": (lambda t: put(t["notes"][0], "code", "PLN999"), "PLN018"),
    "a note's severity": (lambda t: put(t["notes"][0], "severity", "error"), "PLN018"),
    "a note without a message": (lambda t: t["notes"][0].pop("message"), "PLN018"),
    # the spec inside
    "a spec that contradicts itself": (lambda t: put(t["spec"]["model"]["moe"], "top_k", 9), "PLN101"),
    "a spec with other sizes": (lambda t: put(t["spec"]["model"], "hidden", 128), "PLN304"),
    "a spec with another batch": (lambda t: put(t["spec"]["workload"], "batch", 128), "PLN304"),
    "a spec with another cluster": (lambda t: put(t["spec"]["cluster"]["groups"][0], "nodes", 8), "PLN018"),
    "a spec with a huge cluster": (
        lambda t: t["spec"]["cluster"]["groups"][0].update(nodes=100_000, gpus_per_node=1024),
        "PLN014",
    ),
    "a spec with less memory": (lambda t: put(t["spec"]["cluster"]["groups"][0]["gpu"], "memory", "1 MB"), "PLN315"),
    "a spec of another policy": (lambda t: put(t["spec"]["placement"], "policy", "random"), "PLN015"),
    "a spec with an unknown key": (lambda t: t["spec"].update(zz=1), "PLN010"),
    "a spec without a model": (lambda t: t["spec"].pop("model"), "PLN011"),
    "a bare number for bytes": (lambda t: put(t["spec"]["cluster"]["groups"][0]["gpu"], "memory", 80), "PLN013"),
    "a spec that is a list": (lambda t: put(t, "spec", []), "PLN018"),
    # keys and types
    "an unknown key": (lambda t: t.update({"²": 1}), "PLN018"),
    "an unknown key of many digits": (lambda t: t.update({"9" * 5000: 1}), "PLN018"),
    "an unknown key of a block": (lambda t: block(t, "gate").update(note="mine"), "PLN018"),
    "a section lost": (lambda t: t.pop("volumes"), "PLN018"),
    "a section null": (lambda t: t.update(graph=None), "PLN018"),
    "text for a number": (lambda t: put(t["parallelism"], "dp", "2"), "PLN018"),
    "true for a number": (lambda t: put(t["placement"], "rounds", True), "PLN018"),
    "a fraction for a number": (lambda t: put(t["parallelism"], "dp", 2.0), "PLN018"),
    "a list for text": (lambda t: put(block(t, "gate"), "ranks", [0, 1]), "PLN018"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_values(name: str, text: str, tmp_path: Path) -> None:
    change, wanted = EDITS[name]
    tree = json.loads(text)
    before = copy.deepcopy(tree)
    change(tree)
    assert json.dumps(tree) != json.dumps(before)
    found = answer(json.dumps(tree), tmp_path)
    assert found & set(wanted.split()), found


def flood(tree: Any, rows: list[Any], key: str, changes: dict[str, Any]) -> None:
    """Two hundred rows like the first, each with its own text that stands for millions of numbers."""
    rows += [rows[0] | changes | {key: f"0x{3_999_999 - i}"} for i in range(200)]


FLOODS: dict[str, Edit] = {
    "memory": lambda t: flood(t, t["memory"], "ranks", {}),
    "ranks": lambda t: flood(t, t["graph"]["blocks"], "ranks", {"name": "more"}),
    "rows": lambda t: flood(t, t["graph"]["blocks"], "rows", {"name": "more"}),
    "experts": lambda t: flood(t, t["graph"]["blocks"], "experts", {"name": "more"}),
    "groups": lambda t: t["graph"]["blocks"].extend(block(t, "gate") | {"group": 10**6 - i} for i in range(200)),
    "copies": lambda t: flood(t, t["placement"]["layers"], "ranks", {"experts": "0x3999999", "slots": "0x3999999"}),
    "layers": lambda t: flood(t, t["placement"]["layers"], "layers", {}),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_small_file_stays_small(name: str, text: str, tmp_path: Path) -> None:
    """A list of numbers may be no longer than the cluster or the model in the file allows: short texts stand for millions."""
    tree = json.loads(text)
    FLOODS[name](tree)
    tracemalloc.start()
    try:
        assert answer(json.dumps(tree), tmp_path) == {"PLN018"}
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_faults_are_at_their_line(text: str, tmp_path: Path) -> None:
    """Edits in the file as planc writes it: the fault is shown on the edited line."""
    for pattern, replacement in {
        r'"name": "L0.attn_core", "kind": "attn_core"': '"name": "L0.attn_core", "kind": "attention"',
        r'"rounds": 1': '"rounds": 7.5',
        r'"ep": 8,\n': '"ep": "8",\n',
        r'"top_k": 2': '"top_k": 99',
        r'"batch": 62': '"batch": 0',
        r'"target": "L0.attn_out.o"': '"target": "L7.nowhere.o"',
    }.items():
        match = re.search(pattern, text)
        assert match is not None, pattern
        changed = text[: match.start()] + replacement + text[match.end() :]
        file = tmp_path / "plan.json"
        file.write_text(changed)
        with pytest.raises(PlancError) as error:
            load_plan(file)
        lines = {d.span.line for d in error.value.diagnostics if d.span}
        assert changed.count("\n", 0, match.start()) + 1 in lines, (pattern, error.value.diagnostics)


def test_a_large_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    with file.open("wb") as handle:
        handle.truncate(600_000_000)
    with pytest.raises(PlancError, match="PLN003"):
        load_plan(file)


VALUES = [
    0,
    1,
    -1,
    3,
    10**6,
    2**31,
    2**63,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "x",
    "0-3",
    "0x4",
    "9-1",
]
VALUES += [
    "0-999999999",
    "[0] int32 R",
    "[m, 64] fp16 R",
    "[999999999999, 999999999999] fp16 R",
    [],
    {},
    [1],
    [[0, 0]],
    "²",
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(p for key, inner in items for p in paths(inner, (*path, key)))]


def mutated(text: str, tree: Any, places: list[tuple[Any, ...]], rng: random.Random) -> bytes:
    """One random edit: of bytes, of a number in the text, or of a value, key or row."""
    how = rng.randrange(6)
    if how == 0:
        data = bytearray(text.encode())
        data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if how == 1:
        at = rng.randrange(len(text))
        return (text[:at] + text[at + rng.randrange(1, 30) :]).encode()
    if how == 2:
        match = rng.choice(list(re.finditer(r"\d+", text)))
        return (
            text[: match.start()] + str(rng.choice((0, 1, 5, 64, 999, 10**9, 10**20))) + text[match.end() :]
        ).encode()
    changed = copy.deepcopy(tree)
    path = rng.choice(places)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if how == 3:
        parent[path[-1]] = rng.choice(VALUES)
    elif how == 4:
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(rng.choice(parent)))
    else:
        parent["zz"] = rng.choice(VALUES)
    return json.dumps(changed).encode()


def test_random_edits(text: str, tmp_path: Path) -> None:
    """300 edits: coded faults or a plan, never another exception, and each soon."""
    rng = random.Random(20240607)
    tree = json.loads(text)
    places = paths(tree)
    places += [p for p in places if p[0] not in ("spec", "sources", "graph")] * 3
    refused = 0
    for _ in range(300):
        data = mutated(text, tree, places, rng)
        start = time.perf_counter()
        refused += bool(answer(data, tmp_path))
        assert time.perf_counter() - start < 5, data
    assert refused > 200


@pytest.mark.parametrize("section", ["notes", "reasons", "sources"])
def test_free_text_is_held_against_the_document(section: str, tmp_path: Path) -> None:
    """Nothing else in plan.json says what a note or a reason should be; the document beside it does."""
    pipeline.write(planc.compile(planc.parse_spec(SPEC)), tmp_path, [])
    assert pipeline.verify_folder(tmp_path)[0].spec.name == "small"
    file = tmp_path / "plan.json"
    tree = json.loads(file.read_text())
    place = tree[section][0] if section == "notes" else tree[section]
    key = "message" if section == "notes" else "tp" if section == "reasons" else "cluster.groups.0.gpu.memory"
    put(place, key, "because I say so")
    file.write_text(json.dumps(tree))
    with pytest.raises(PlancError, match="PLN316"):
        pipeline.verify_folder(tmp_path)
