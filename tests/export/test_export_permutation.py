"""Relabelled checkpoints: the same outputs, bit for bit, by a small MoE of the test's own, and every way to be refused.

The forward pass takes sums over experts with `math.fsum`, which does not depend on their order.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from small_specs import ROOT, small_spec

import planc
from planc import cli
from planc.export import checkpoint as module
from planc.export import write
from planc.export.checkpoint import INDEX, apply_permutation
from planc.export.permutation import FORMAT, Permutation, permutation_json, read_permutation

HIDDEN, WIDTH, EXPERTS, TOP = 16, 12, 8, 2
LAYERS = 4  #: 0 is dense, 1 to 3 have experts; the draft model's layer is 4
Tensors = dict[str, tuple[str, list[int], bytes]]  #: name -> dtype, shape, bytes


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, by its format."""
    record: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        record[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(record, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def load(folder: Path) -> Tensors:
    """All tensors of a folder's files, which an index lists where there is one."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        [length] = struct.unpack("<Q", data[:8])
        assert length % 8 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                assert name not in found
                found[name] = entry["dtype"], entry["shape"], data[8 + length + first : 8 + length + end]
        if (folder / INDEX).exists():
            files = json.loads((folder / INDEX).read_text())["weight_map"]
            assert {n for n, file in files.items() if file == path.name} == json.loads(data[8 : 8 + length]).keys() - {
                "__metadata__"
            }
    return found


class Style(NamedTuple):
    """How a family of models names things. ``groups``: of which the gate takes two; 1: it takes experts of all."""

    block: str
    router: str
    bias: str
    parts: tuple[str, ...]  #: gate, up, down of an expert; or gate and up together, down
    stacked: bool
    sigmoid: bool
    groups: int


STYLES = {
    "deepseek": Style(
        "mlp",
        "gate.weight",
        "gate.e_score_correction_bias",
        ("gate_proj", "up_proj", "down_proj"),
        False,
        True,
        4,
    ),
    "mixtral": Style("block_sparse_moe", "gate.weight", "", ("w1", "w3", "w2"), False, False, 1),
    "gpt-oss": Style("mlp", "router.weight", "router.bias", ("gate_up_proj", "down_proj"), True, False, 1),
    "llama4": Style("feed_forward", "router.weight", "", ("gate_up_proj", "down_proj"), True, True, 1),
}


def numbers(seed: int, dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if dtype == "BF16":
        return dtype, list(shape), (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return dtype, list(shape), values.astype("<f4").tobytes()


def values(tensors: Tensors, name: str) -> np.ndarray:
    dtype, shape, content = tensors[name]
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(content, "<f4").reshape(shape)


def made(style: Style, dtype: str = "F32") -> Tensors:
    """A checkpoint: embedding, dense layer 0, MoE layers with a shared expert and scales, a draft model's layer."""
    found: Tensors = {
        "model.embed_tokens.weight": numbers(1, dtype, 5, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": numbers(2, dtype, EXPERTS, HIDDEN),
    }
    for layer in range(1, LAYERS + 1):
        at = f"model.layers.{layer}.{style.block}."
        found[at + style.router] = numbers(layer * 100, "F32", EXPERTS, HIDDEN)
        if style.bias:
            found[at + style.bias] = numbers(layer * 100 + 1, "F32", EXPERTS)
        found[at + "shared_experts.up_proj.weight"] = numbers(layer * 100 + 2, dtype, EXPERTS, HIDDEN)
        found[f"model.layers.{layer}.input_layernorm.weight"] = numbers(layer * 100 + 3, dtype, HIDDEN)
        for number, part in enumerate(style.parts):
            down, two = number == len(style.parts) - 1, style.stacked and number == 0
            shape = (HIDDEN, WIDTH) if down else (WIDTH * (2 if two else 1), HIDDEN)
            if style.stacked:
                found[at + f"experts.{part}"] = numbers(layer * 100 + 10 + number, dtype, EXPERTS, *shape)
                found[at + f"experts.{part}_scale"] = numbers(layer * 100 + 20 + number, "F32", EXPERTS, 1)
                found[at + f"experts.{part}_input_scale"] = numbers(layer * 100 + 24 + number, "F32", 1)
                continue
            for expert in range(EXPERTS):
                one = at + f"experts.{expert}.{part}."
                found[one + "weight"] = numbers(layer * 1000 + expert * 10 + number, dtype, *shape)
                found[one + "weight_scale_inv"] = numbers(layer * 1000 + expert * 10 + 5 + number, "F32", 1)
    return found


def chosen(style: Style, tensors: Tensors, layer: int, x: np.ndarray) -> list[tuple[int, float]]:
    """(expert, weight) of a token, the best first. Groups count by their two best experts."""
    at = f"model.layers.{layer}.{style.block}."
    logits = [math.fsum(map(float, row * x)) for row in values(tensors, at + style.router)]
    bias = values(tensors, at + style.bias).tolist() if style.bias else [0.0] * EXPERTS
    if style.sigmoid:
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    else:
        powers = [math.exp(v - max(logits)) for v in logits]
        scores = [v / math.fsum(powers) for v in powers]
    rank = [score + b for score, b in zip(scores, bias, strict=True)]
    size = EXPERTS // style.groups
    worth = [math.fsum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(style.groups)]
    best = sorted(range(style.groups), key=lambda g: -worth[g])[:2]
    allowed = [e for e in range(EXPERTS) if e // size in best]
    taken = sorted(allowed, key=lambda e: -rank[e])[:TOP]
    total = math.fsum(scores[e] for e in taken)
    return [(e, scores[e] / total) for e in taken]


def forward(style: Style, tensors: Tensors, x: np.ndarray) -> np.ndarray:
    for layer in range(1, LAYERS):
        at, out = f"model.layers.{layer}.{style.block}.experts.", x.copy()
        for expert, weight in chosen(style, tensors, layer, x):
            if style.stacked:
                both, down = (values(tensors, at + part)[expert] for part in style.parts)
                gate, up = both[:WIDTH], both[WIDTH:]
                scale = values(tensors, at + f"{style.parts[-1]}_scale")[expert]
            else:
                gate, up, down = (values(tensors, f"{at}{expert}.{part}.weight") for part in style.parts)
                scale = values(tensors, f"{at}{expert}.{style.parts[-1]}.weight_scale_inv")
            inner = (gate * x).sum(1) / (1 + np.exp(-(gate * x).sum(1))) * (up * x).sum(1)
            out = out + np.float32(weight) * scale * (down * inner).sum(1)
        x = out / np.float32(1 + np.abs(out).max())
    return x


TOKENS = np.random.default_rng(7).normal(size=(64, HIDDEN)).astype(np.float32)


def shuffled(style: Style, seed: int = 0) -> dict[int, tuple[int, ...]]:
    """Any order of groups, and of experts in a group, a different one in each layer."""
    random, size = np.random.default_rng(seed), EXPERTS // style.groups
    return {
        layer: tuple(
            int(group * size + one) for group in random.permutation(style.groups) for one in random.permutation(size)
        )
        for layer in range(1, LAYERS)
    }


def recipe(path: Path, old: dict[int, tuple[int, ...]], groups: int = 1, experts: int = EXPERTS) -> Path:
    path.write_text(permutation_json(Permutation(experts, LAYERS, groups, old)))
    return path


def store(folder: Path, tensors: Tensors, files: int = 1) -> Path:
    """A checkpoint folder: one file, or several with an index as Hugging Face writes it; config and tokenizer beside."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    names = list(tensors)
    places = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        path = folder / (file if files > 1 else "model.safetensors")
        save(path, {name: tensors[name] for name in names if places[name] == file}, {"format": "pt"})
    if files > 1:
        record = {"metadata": {"total_size": sum(len(v[2]) for v in tensors.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", STYLES)
def test_outputs_are_the_same(name: str, dtype: str, files: int, tmp_path: Path) -> None:
    style = STYLES[name]
    before, old = made(style, dtype), shuffled(style)
    source = store(tmp_path / "old", before, files)
    told: list[tuple[int, int]] = []
    written, left_out = apply_permutation(
        recipe(tmp_path / "p.json", old, style.groups),
        source,
        tmp_path / "new",
        lambda done, total: told.append((done, total)),
    )
    assert left_out == ["pytorch_model.bin"] and told[-1][0] == told[-1][1] == len(told)
    assert sorted(everything(source).keys() - {"pytorch_model.bin"}) == sorted(everything(tmp_path / "new"))
    assert sorted(path.relative_to(tmp_path / "new").as_posix() for path in written) == sorted(
        everything(tmp_path / "new")
    )
    after = load(tmp_path / "new")
    assert after.keys() == before.keys() and after != before
    for x in TOKENS:
        assert forward(style, after, x).tobytes() == forward(style, before, x).tobytes()
        for layer, row in old.items():
            assert [row[e] for e, _ in chosen(style, after, layer, x)] == [
                e for e, _ in chosen(style, before, layer, x)
            ]
    for one in before:  # the dense layer, the draft model and shared experts are as they were
        if f"layers.{LAYERS}." in one or "layers.0." in one or "shared" in one or "norm" in one:
            assert after[one] == before[one]


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", STYLES)
def test_there_and_back(name: str, files: int, tmp_path: Path) -> None:
    """The inverse gives every file's bytes again."""
    style = STYLES[name]
    old = shuffled(style, 3)
    back = {layer: tuple(row.index(e) for e in range(EXPERTS)) for layer, row in old.items()}
    source = store(tmp_path / "old", made(style), files)
    apply_permutation(recipe(tmp_path / "p.json", old, style.groups), source, tmp_path / "new")
    apply_permutation(recipe(tmp_path / "b.json", back, style.groups), tmp_path / "new", tmp_path / "again")
    first = everything(source)
    del first["pytorch_model.bin"]
    assert everything(tmp_path / "again") == first != everything(tmp_path / "new")


def test_groups_matter(tmp_path: Path) -> None:
    """A numbering that mixes groups of a gate that limits them changes outputs; told of the groups, planc refuses it."""
    style = STYLES["deepseek"]
    mixed = dict.fromkeys(range(1, LAYERS), (0, 2, 1, 3, 4, 5, 6, 7))
    source = store(tmp_path / "old", made(style))
    apply_permutation(recipe(tmp_path / "p.json", mixed), source, tmp_path / "new")
    before, after = made(style), load(tmp_path / "new")
    assert any(forward(style, after, x).tobytes() != forward(style, before, x).tobytes() for x in TOKENS)
    with pytest.raises(planc.PlancError, match=r"PLN507.*group 0 of 4 mixes"):
        read_permutation(recipe(tmp_path / "g.json", mixed, 4))
    (source / "config.json").write_text('{"text_config": {"n_group": 4, "topk_group": 2}}')
    refused(tmp_path, "PLN507", "group 0 of 4 mixes", recipe(tmp_path / "p.json", mixed), source)
    (source / "config.json").write_text('{"n_group": 3, "topk_group": 2}')
    refused(tmp_path, "PLN507", "has 3 groups", recipe(tmp_path / "p.json", mixed), source)
    (source / "config.json").write_text('{"n_group": 4, "topk_group": 4}')
    apply_permutation(recipe(tmp_path / "p.json", mixed), source, tmp_path / "all groups")


def test_a_plan_and_its_checkpoint(tmp_path: Path) -> None:
    """From the plan: index i of the new checkpoint, which vLLM has on GPU i, is the expert that the plan has there."""
    plan = planc.compile(
        small_spec(
            model={"layers": LAYERS, "moe_layers": [1, 2, 3], "dense_mlp": {"intermediate": 32}},
            parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1},
            traffic={"popularity": "zipf", "exponent": 1.0, "topics": 4, "tokens": 512, "seed": 1},
        )
    )
    write(plan, ["vllm"], tmp_path)
    style = STYLES["mixtral"]
    before = made(style)
    source = store(tmp_path / "old", before, 3)
    apply_permutation(tmp_path / "vllm" / "permutation.json", source, tmp_path / "new")
    after, orders = load(tmp_path / "new"), set()
    for layer in range(1, LAYERS):
        orders.add(tuple(plan.placement.experts_of_rank(gpu)[layer][0] for gpu in range(8)))
        for gpu in range(8):
            [expert] = plan.placement.experts_of_rank(gpu)[layer]
            at = f"model.layers.{layer}.block_sparse_moe.experts."
            assert after[f"{at}{gpu}.w1.weight"] == before[f"{at}{expert}.w1.weight"]
    assert len(orders) == LAYERS - 1  # every layer has a numbering of its own


def test_memory_is_a_chunk(tmp_path: Path) -> None:
    """A tensor of 64 MB, of which less than 8 are ever held."""
    at = "model.layers.0.mlp."
    shapes = {at + "router.weight": [EXPERTS, 4], at + "experts.down_proj": [EXPERTS, 1 << 21]}
    source = tmp_path / "old"
    source.mkdir()
    sparse(source / "model.safetensors", shapes)
    path = recipe(tmp_path / "p.json", {0: tuple(range(EXPERTS))[::-1]})
    tracemalloc.start()
    try:
        apply_permutation(path, source, tmp_path / "new")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = (tmp_path / "new" / "model.safetensors").stat().st_size
    assert size == (source / "model.safetensors").stat().st_size > 64 << 20
    assert peak < 8 << 20


def sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """F32 zeros that take no disk."""
    record, at = {}, 0
    for name, shape in shapes.items():
        record[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * math.prod(shape)]}
        at += 4 * math.prod(shape)
    header = json.dumps(record).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + at)


def refused(
    tmp_path: Path,
    code: str,
    words: str,
    path: Path | None = None,
    source: Path | None = None,
    target: Path | None = None,
) -> None:
    """Relabelling is refused with this code, says what to change, and leaves nothing."""
    path = path or recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(planc.PlancError) as error:
        apply_permutation(path, source or tmp_path / "old", target or tmp_path / "new")
    [fault] = error.value.diagnostics
    assert fault.code == code and words in fault.message and fault.hint, fault
    assert sorted(tmp_path.rglob("*")) == before


Change = Callable[[Tensors], Any]
AT = "model.layers.2.mlp."


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def as_other(name: str, other: str) -> Change:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def reshaped(name: str, *shape: int, dtype: str = "F32") -> Change:
    size = math.prod(shape) * {"F32": 4, "I64": 8, "U8": 1}[dtype]
    return lambda tensors: tensors.update({name: (dtype, list(shape), bytes(size))})


def halved(tensors: Tensors) -> None:
    for name in list(tensors):
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= EXPERTS // 2:
            del tensors[name]
        elif name.endswith(("mlp.gate.weight", "correction_bias")):
            dtype, shape, content = tensors[name]
            tensors[name] = dtype, [shape[0] // 2, *shape[1:]], content[: len(content) // 2]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (without(AT + "experts.5.up_proj.weight"), "PLN504", "layer 2: expert 5 has no `up_proj.weight`"),
        (without(AT + "gate.weight"), "PLN504", "layer 2 has experts and no router"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith(AT)],
            "PLN504",
            "layer 2 has no experts",
        ),
        (reshaped("model.layers.0.mlp.experts.0.w", 4), "PLN504", "layer 0 has experts"),
        (reshaped(AT + "experts.3.up_proj.weight", 1, HIDDEN), "PLN504", "different shapes"),
        (reshaped(AT + "gate.tid2eid", 40, 2, dtype="I64"), "PLN504", "not a row for each of 8 experts"),
        (reshaped(AT + "hash", 40, 2, dtype="I64"), "PLN504", "does not know what it is"),
        (reshaped(AT + "experts_order", EXPERTS), "PLN504", "does not know what it is"),
        (reshaped(AT + "experts.all", 3, 5), "PLN504", "is F32 [3, 5]"),
        (reshaped(AT + "gate.e_score_correction_bias", 1, 4), "PLN504", "is F32 [1, 4]"),
        (reshaped("model.layers.2.ffn.experts.0.w", 4), "PLN504", "experts in ffn., mlp."),
        (
            lambda t: t.update({name.replace("model.", "tower."): value for name, value in t.items()}),
            "PLN504",
            "several models: model., tower.",
        ),
        (reshaped(AT + "gate.weight", 16, HIDDEN), "PLN507", "has 16 rows, and the permutation is of 8"),
        (reshaped(AT + "experts.8.up_proj.weight", WIDTH, HIDDEN), "PLN507", "has an expert 8"),
        (halved, "PLN507", "has 4 rows"),
    ],
)
def test_checkpoints_of_other_models(change: Change, code: str, words: str, tmp_path: Path) -> None:
    tensors = made(STYLES["deepseek"])
    change(tensors)
    store(tmp_path / "old", tensors)
    refused(tmp_path, code, words)


def test_draft_models_and_rows_before_a_dimension_of_one(tmp_path: Path) -> None:
    """Layers of a draft model that begin at 0 again stay as they are; a bias may be [1, experts]."""
    tensors = made(STYLES["deepseek"])
    tensors |= {name.replace("model.", "mtp."): value for name, value in tensors.items()}
    name = AT + "moe_statics.e_score_correction_bias"
    tensors[name] = ("F32", [1, EXPERTS], np.arange(EXPERTS, dtype="<f4").tobytes())
    store(tmp_path / "old", tensors)
    old = shuffled(STYLES["deepseek"])
    apply_permutation(recipe(tmp_path / "p.json", old, 4), tmp_path / "old", tmp_path / "new")
    after = load(tmp_path / "new")
    assert all(after[name] == value for name, value in tensors.items() if name.startswith("mtp."))
    assert np.frombuffer(after[name][2], "<f4").tolist() == list(old[2])


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]), 3)
    index, part = source / INDEX, source / "model-00002-of-00003.safetensors"
    whole, text = part.read_bytes(), index.read_text()
    part.unlink()
    refused(tmp_path, "PLN504", "model-00002-of-00003.safetensors, which")
    part.write_bytes(whole)
    name = next(name for name, file in json.loads(text)["weight_map"].items() if file == part.name)
    index.write_text(text.replace(f'"{name}"', '"another"'))
    refused(tmp_path, "PLN504", "by model.safetensors.index.json")
    index.write_text(text.replace(f'"{part.name}"', '"model-00001-of-00003.safetensors"'))
    refused(tmp_path, "PLN504", "should be, by")
    for wrong in (text.replace(part.name, "../" + part.name), '{"weight_map": {}}', "[]"):
        index.write_text(wrong)
        refused(tmp_path, "PLN505", "weight_map")
    index.unlink()
    shutil.copy(part, source / "copy.safetensors")
    refused(tmp_path, "PLN504", "tensors of the same name")
    for file in source.glob("*.safetensors"):
        file.unlink()
    refused(tmp_path, "PLN504", "no safetensors files")
    save(source / "model.safetensors", made(STYLES["deepseek"]))
    (source / "config.json").write_text('{"ignore": ["model.layers.1.mlp.experts.3.up_proj"]}')
    refused(tmp_path, "PLN504", "names single experts (`experts.3`)")


def header(record: Any, data: bytes = b"") -> bytes:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(first: int, end: int, **parts: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - first], "data_offsets": [first, end]} | parts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "do not begin with the length"),
        (b"1234567", "do not begin with the length"),
        (struct.pack("<Q", 1 << 62) + b"{}", "do not begin with the length"),
        (struct.pack("<Q", 40) + b"{}", "do not begin with the length"),
        (header(b"{nonsense"), "cannot be read"),
        (header(b"{\xff\xfe}"), "cannot be read"),
        (header(b" {}"), "begin with `{`"),
        (header({"a\n": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "unprintable"),
        (header({"a": {"dtype": "U8", "shape": [1] * 17, "data_offsets": [0, 1]}}) + b"x", "not whole numbers"),
        (header(b'{"a": 1, "a": 2}'), "cannot be read"),
        (header([1]), "begin with `{`"),
        (header({"__metadata__": {"format": 1}}), "not a mapping of texts"),
        (header({"a": {"dtype": "U8"}}), "has no dtype, shape and data_offsets"),
        (header({"a": entry(0, 4, dtype="F128")}, bytes(4)), "unknown dtype F128"),
        (header({"a": entry(0, 4, shape=[-4])}, bytes(4)), "not whole numbers"),
        (header({"a": entry(0, 4, shape=[True])}, bytes(4)), "not whole numbers"),
        (header({"a": entry(0, 4, data_offsets=[0])}, bytes(4)), "not whole numbers"),
        (header({"a": entry(0, 4, dtype="F32")}, bytes(4)), "is not 4 bytes"),
        (header({"a": entry(0, 3, dtype="F4", shape=[5])}, bytes(3)), "is not 3 bytes"),
        (header({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "begins at byte 2 of the data and not at 4"),
        (header({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "begins at byte 6 of the data and not at 4"),
        (header({"a": entry(2, 4)}, bytes(4)), "begins at byte 2 of the data and not at 0"),
        (header({"a": entry(0, 4)}, bytes(3)), "and its header tells of"),
        (header({"a": entry(0, 4)}, bytes(5)), "and its header tells of"),
    ],
)
def test_damaged_files(content: bytes, words: str, tmp_path: Path) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    (source / "model.safetensors").write_bytes(content)
    refused(tmp_path, "PLN505", words)


def test_a_file_that_gets_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    path = recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    real = module.copy_spans

    def later(shard: Any, *rest: Any) -> None:
        os.truncate(shard.path, shard.path.stat().st_size - 10)
        real(shard, *rest)

    monkeypatch.setattr(module, "copy_spans", later)
    refused(tmp_path, "PLN505", "it ends 10 bytes before", path, source)


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    """Whichever the index names: the other file would be written with the wrong bytes."""
    tensors = made(STYLES["deepseek"])
    for number in (0, 1):
        source = store(tmp_path / f"old{number}", tensors, files=2)
        first, second = sorted(source.glob("*.safetensors"))
        index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
        name = next(name for name, file in index.items() if file == (first, second)[number].name)
        other = (second, first)[number]
        kept = {n: tensors[n] for n, file in index.items() if file == other.name}
        save(other, kept | {name: tensors[name]}, {"format": "pt"})
        refused(tmp_path, "PLN504", "and in", source=source)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.e_score_correction_bias", "may be of the router"),
        ("model.layers.1.router.weight", "may be of the router"),
        ("other.layers.1.mlp.experts.0.w", "has experts too"),
    ],
)
def test_what_may_belong_to_the_experts_is_refused(tmp_path: Path, name: str, words: str) -> None:
    tensors = made(STYLES["deepseek"])
    store(tmp_path / "old", tensors | {name: numbers(7, "F32", EXPERTS)})
    refused(tmp_path, "PLN504", words)


@pytest.mark.parametrize(
    "config", [{"num_hidden_layers": 1}, {"n_routed_experts": 7}, {"llm_config": {"num_experts": 7}}]
)
def test_a_config_of_another_model(tmp_path: Path, config: dict[str, Any]) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    (source / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "PLN507", "the permutation is for")


def test_what_is_not_copied_is_told(tmp_path: Path) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    (source / "gone.json").symlink_to(tmp_path / "nowhere")
    (source / ".cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    path = recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    _, left_out = apply_permutation(path, source, tmp_path / "new")
    assert sorted(left_out) == [".cache/", "gone.json", "linked/", "pytorch_model.bin"]


@pytest.mark.parametrize("where", ["link", "long"])
def test_folders_that_cannot_be(tmp_path: Path, where: str) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    if where == "link":
        (tmp_path / "empty").mkdir()
        (tmp_path / "new").symlink_to(tmp_path / "empty")
        refused(tmp_path, "PLN017", "is a link", source=source)
    else:
        refused(tmp_path, "PLN001", "cannot read", source=tmp_path / ("a" * 5000))


def test_a_file_that_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, so that only its header would be another one's."""
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    path = recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    real = module.copy_spans

    def later(shard: Any, *rest: Any) -> None:
        (tmp_path / "other").write_bytes(shard.path.read_bytes())
        os.replace(tmp_path / "other", shard.path)
        real(shard, *rest)

    monkeypatch.setattr(module, "copy_spans", later)
    refused(tmp_path, "PLN505", "it was changed", path, source)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "its `format`"),
        ({"experts": 0}, "whole numbers"),
        ({"groups": 3}, "not 3 equal groups"),
        ({"old_expert_of_new_index": {}}, "whole numbers"),
        ({"old_expert_of_new_index": {"1": [0] * 8}}, "0 appears twice"),
        ({"old_expert_of_new_index": {"1": [0, 1, 2, 3, 4, 5, 6, 8]}}, "8 is none of experts 0 to 7"),
        ({"old_expert_of_new_index": {"1": [0, 1]}}, "a list of 8 expert numbers"),
        ({"old_expert_of_new_index": {"1": [0, 1, 2, 3, 4, 5, 6, True]}}, "a list of 8 expert numbers"),
        ({"old_expert_of_new_index": {"01": [0]}}, "`01` is not a layer"),
        ({"old_expert_of_new_index": {"4": [0]}}, "`4` is not a layer"),
        ({"old_expert_of_new_index": {"x": [0]}}, "`x` is not a layer"),
    ],
)
def test_what_is_no_permutation(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    store(tmp_path / "old", made(STYLES["deepseek"]))
    rows = {str(layer): list(row) for layer, row in shuffled(STYLES["deepseek"]).items()}
    record = {"format": FORMAT, "experts": 8, "layers": LAYERS, "groups": 4, "old_expert_of_new_index": rows}
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(record | change))
    refused(tmp_path, "PLN507", words, path)
    path.write_text(json.dumps(record))
    assert read_permutation(path).old == shuffled(STYLES["deepseek"])


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is told before anything is written; a disk that fills up or fails leaves nothing either."""
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    path = recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    apply_permutation(path, source, tmp_path / "good")
    need = sum(len(content) for content in everything(tmp_path / "good").values())
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
        refused(tmp_path, "PLN506", "are free there", path, target=tmp_path / "deeper" / "new")
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
        apply_permutation(path, source, tmp_path / "just")
    for number, code in ((errno.ENOSPC, "PLN506"), (errno.EACCES, "PLN017")):

        def full(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(module, "copy_spans", full)
            refused(tmp_path, code, "", path)
    (tmp_path / "mine").mkdir()
    apply_permutation(path, source, tmp_path / "mine")  # an empty folder is as good as none
    refused(tmp_path, "PLN017", "is there already", path, target=tmp_path / "mine")


def test_left_overs_of_killed_runs_go(tmp_path: Path) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, another = tmp_path / f".planc-{int(ended.stdout)}-abcd1234", tmp_path / ".planc-notes-2024"
    dead.mkdir()
    another.mkdir()
    apply_permutation(recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4), source, tmp_path / "new")
    assert not dead.exists() and another.exists()


def test_interrupted(tmp_path: Path) -> None:
    """SIGINT in the middle of a file, of a process of its own: status 130, and nothing is left."""
    at = "model.layers.0.mlp."
    source = tmp_path / "old"
    source.mkdir()
    sparse(source / "model.safetensors", {at + "router.weight": [EXPERTS, 4], at + "experts.w": [EXPERTS, 1 << 21]})
    path = recipe(tmp_path / "p.json", {0: tuple(range(EXPERTS))[::-1]})
    before = sorted(tmp_path.rglob("*"))
    slow = "import sys, planc.export.safetensors_file as f; f.CHUNK = 16; from planc.cli import main; sys.exit(main())"
    words = ["export", "--apply-permutation", path, "--checkpoint", source, "-o", tmp_path / "new"]
    with subprocess.Popen(
        [sys.executable, "-c", slow, *map(str, words)],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        while process.poll() is None and not any(p.stat().st_size for p in tmp_path.glob(".planc-*/new/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = store(tmp_path / "old", made(STYLES["deepseek"]))
    path = recipe(tmp_path / "p.json", shuffled(STYLES["deepseek"]), 4)
    words = ["export", "--apply-permutation", str(path), "--checkpoint", str(source)]
    assert cli.main([*words, "-o", str(tmp_path / "new"), "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["left_out"] == ["pytorch_model.bin"] and "left out" in answer.err
    assert load(tmp_path / "new").keys() == load(source).keys()
    for wrong, said in (
        (words, "-o is missing"),
        (["export", "--checkpoint", str(source), "-o", "x"], "--apply-permutation is missing"),
        ([*words, "-o", "x", "--to", "vllm"], "without a plan"),
        ([*words, "-o", "x", "--option", "a=b"], "without a plan"),
        ([*words[:1], "mixtral-8x7b", *words[1:], "-o", "x"], "without a plan"),
    ):
        assert cli.main(wrong) == 1
        assert said in capsys.readouterr().err
    assert cli.main([*words[:-1], str(tmp_path / "none"), "-o", str(tmp_path / "x")]) == 1
    assert "PLN504" in capsys.readouterr().err
