"""Specs from files: presets, bases, sized clusters, overrides, sources, and places that point into the right file."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from planc.diagnostics import PlancError
from planc.pipeline import place
from planc.spec import Spec, load_model, load_spec, parse_spec, preset_names

HEAD = "name: t\nworkload: {batch: 64, isl: 128}\n"
SMALL = HEAD + "model: moe-4l\ncluster: h100-sxm-2x8\n"
INLINE = (
    HEAD
    + "model: moe-4l\ncluster:\n  name: c\n  nodes: 2\n  gpu: h100-sxm\n  links: {nvlink: {bandwidth: 1 TB/s}, nic: {bandwidth: 1 GB/s}}\n"
)
Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write files by name ('/' for folders, '.yaml' is added) and return the spec's path."""

    def write(spec: str, **parts: str) -> Path:
        for name, text in {"spec": spec, **parts}.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / "spec.yaml"

    return write


def codes(call: Callable[[], object]) -> list[tuple[str, str]]:
    """(code, path) of every fault."""
    with pytest.raises(PlancError) as error:
        call()
    return [(d.code, d.path) for d in error.value.diagnostics]


# --- presets and bases -------------------------------------------------------------------------------------------


def test_every_preset_by_name() -> None:
    for model in preset_names("models"):
        assert load_model(model).name == model
    for cluster in preset_names("clusters"):
        assert parse_spec(f"{HEAD}model: moe-4l\ncluster: {cluster}").cluster.name


def test_shipped_spec_by_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_spec("mixtral-8x7b").name == "mixtral-8x7b"
    Path("mixtral-8x7b").write_text(SMALL)  # a file of that name wins
    assert load_spec("mixtral-8x7b").name == "t"


def test_a_chain_of_bases(files: Files) -> None:
    path = files(
        HEAD + "cluster: h100-sxm-2x8\nmodel: {base: top.yaml, hidden: 256}",
        top="base: sub/middle.yaml\nlayers: 3\nattention: {heads: 4}",
        sub__middle="base: ./bottom.yaml\nlayers: 2\nname: middle",
        sub__bottom="base: moe-4l\nlayers: 1\nmoe: {experts: 8}",
    )
    model = load_spec(path).model
    assert (model.name, model.layers, model.hidden) == ("middle", 3, 256)
    assert (model.attention.heads, model.attention.head_dim) == (4, 128)
    assert (model.moe.experts, model.moe.top_k) == (8, 2) if model.moe else False


def test_names_are_relative_to_the_file_that_says_them(files: Files) -> None:
    gpu = "name: mine\npeak: {fp16: 1 TFLOPS}\nmemory: 9 GB\nmemory_bandwidth: 1 TB/s"
    path = files(
        HEAD + "model: moe-4l\ncluster: lab/cluster.yaml",
        lab__cluster="base: h100-sxm\nnodes: 2\ngpu: ./gpu.yaml",
        lab__gpu=gpu,
    )
    assert load_spec(path).cluster.groups[0].gpu.name == "mine"


def test_preset_folders_beside_the_spec(files: Files) -> None:
    path = files(
        HEAD + "model: own\ncluster: own-3x4", models__own="base: moe-4l\nname: own", clusters__own="base: h100-sxm"
    )
    spec = load_spec(path)
    assert (spec.model.name, spec.cluster.name, spec.cluster.gpus) == ("own", "own-3x4", 12)


@pytest.mark.parametrize(
    ("name", "nodes", "gpus"), [("h100-sxm-4x8", 4, 8), ("gb200-nvl72-18x4", 18, 4), ("reference-h100-1x1", 1, 1)]
)
def test_sized_clusters(name: str, nodes: int, gpus: int) -> None:
    cluster = parse_spec(f"{HEAD}model: moe-4l\ncluster: {name}").cluster
    assert (cluster.name, cluster.groups[0].nodes, cluster.groups[0].gpus_per_node) == (name, nodes, gpus)


def test_overriding_parts() -> None:
    text = (
        HEAD
        + """
model: {base: moe-4l, attention: {heads: 64}, moe: {experts: 32}}
cluster:
  base: h100-sxm-2x8
  name: mine
  nodes: 3
  gpu: {mfu: 50 %, memory: 40 GB}
  links: {nic: {latency: 5 us}}
"""
    )
    spec = parse_spec(text)
    gpu, links = spec.cluster.groups[0].gpu, spec.cluster.links
    assert spec.model.moe is not None
    assert (spec.model.attention.heads, spec.model.attention.head_dim, spec.model.moe.experts) == (64, 128, 32)
    assert (spec.cluster.name, spec.cluster.gpus) == ("mine", 24)
    assert (gpu.name, gpu.mfu, gpu.memory, gpu.memory_bandwidth) == ("h100-sxm", 0.5, 40 * 10**9, 3.35e12)
    assert (links.nic.latency, links.nic.bandwidth, links.nvlink.latency) == (5e-6, 50e9, 12.5e-6)


def test_another_base_replaces_the_whole_part() -> None:
    gpu = (
        parse_spec(HEAD + "model: moe-4l\ncluster: {base: h100-sxm-2x8, gpu: {base: a100-sxm-80gb, mfu: 50 %}}")
        .cluster.groups[0]
        .gpu
    )
    assert (gpu.name, gpu.mfu, gpu.peak.fp8) == ("a100-sxm-80gb", 0.5, None)
    assert (
        parse_spec(HEAD + "model: moe-4l\ncluster: {base: h100-sxm-2x8, gpu: h200-sxm}").cluster.groups[0].gpu.name
        == "h200-sxm"
    )


def test_groups_replace_the_shorthand_of_the_base() -> None:
    groups = "[{nodes: 1, gpu: h100-sxm}, {nodes: 2, gpus_per_node: 4, gpu: {base: h200-sxm, mfu: 0.5}}]"
    cluster = parse_spec(f"{HEAD}model: moe-4l\ncluster: {{base: h100-sxm, groups: {groups}}}").cluster
    assert [(g.nodes, g.gpus_per_node, g.gpu.name, g.gpu.mfu) for g in cluster.groups] == [
        (1, 8, "h100-sxm", 0.6),
        (2, 4, "h200-sxm", 0.5),
    ]


# --- sources and places --------------------------------------------------------------------------------------------


def test_sources_are_taken_off_and_kept() -> None:
    spec = parse_spec(SMALL.replace("model: moe-4l", "model: {base: moe-4l, layers: {value: 3, source: a paper}}"))
    assert spec.model.layers == 3
    assert spec.sources["model.layers"] == "a paper"
    assert "datasheet" in spec.sources["cluster.groups.0.gpu.memory"]


def test_a_replaced_value_loses_its_old_source() -> None:
    plain = parse_spec(SMALL.replace("h100-sxm-2x8", "{base: h100-sxm-2x8, gpu: {memory: 40 GB}}"))
    stated = parse_spec(
        SMALL.replace("h100-sxm-2x8", "{base: h100-sxm-2x8, gpu: {memory: {value: 40 GB, source: me}}}")
    )
    assert "cluster.groups.0.gpu.memory" not in plain.sources
    assert stated.sources["cluster.groups.0.gpu.memory"] == "me"
    bare = SMALL.replace("h100-sxm-2x8", "{base: h100-sxm-2x8, gpu: {memory: {value: 40 GB}}}")
    assert codes(lambda: parse_spec(bare)) == [("PLN013", "cluster.groups.0.gpu.memory")]


ODD_SOURCES = {
    "{value: 1, source: x}": [("PLN012", "")],
    HEAD + "model: {value: moe-4l, source: x}\ncluster: h100-sxm-2x8": [("PLN012", "model")],
    SMALL + "target: {value: {tps: 1}, source: [x]}": [("PLN010", "target.value"), ("PLN010", "target.source")],
    SMALL + "claims: {value: [], source: 5}": [("PLN012", "claims")],
    SMALL + "description: {value: {value: a, source: b}, source: c}": [("PLN012", "description")],
}


@pytest.mark.parametrize("text", ODD_SOURCES)
def test_sources_in_odd_places(text: str) -> None:
    assert codes(lambda: parse_spec(text)) == ODD_SOURCES[text]


def test_places_point_into_the_file_that_says_the_value(files: Files) -> None:
    path = files(
        HEAD + "cluster: {base: h100-sxm-2x8,\n  gpu: {memory: 40 GB}}\nmodel: {base: part.yaml, hidden: 256}",
        part="name: part\nbase: moe-4l\nlayers: 3",
    )
    spec = load_spec(path, ["workload.batch=32"])
    where = {
        "name": ("spec.yaml", 1),
        "model.hidden": ("spec.yaml", 5),
        "model.layers": ("part.yaml", 3),
        "model.moe.top_k": ("moe-4l.yaml", 14),
        "cluster.groups.0.gpu.memory": ("spec.yaml", 4),
        "cluster.groups.0.gpu.mfu": ("h100-sxm.yaml", 7),
        "cluster.groups.0.nodes": ("spec.yaml", 3),
        "cluster.links.nic.latency": ("h100-sxm.yaml", 14),
        "workload.batch": ("--set workload.batch=32", 1),
        "workload.isl": ("spec.yaml", 2),
        "workload.osl": ("spec.yaml", 2),
        "parallelism.tp": ("spec.yaml", 1),
    }
    for dotted, (name, line) in where.items():
        span = spec.span(dotted)
        assert span is not None
        assert (Path(span.file).name if "--set" not in span.file else span.file, span.line) == (name, line), dotted


def test_a_spec_made_in_code_has_no_places() -> None:
    again = Spec.model_validate(parse_spec(SMALL).model_dump(mode="json"))
    assert again.span("model.layers") is None
    assert again.fault("PLN101", "m", "model.layers").span is None


# --- overrides -----------------------------------------------------------------------------------------------------

OVERRIDES: list[tuple[str, str, object]] = [
    ("workload.batch=512", "workload.batch", 512),
    (" workload.batch = 512 ", "workload.batch", 512),
    ("workload.phase=prefill", "workload.phase", "prefill"),
    ("workload={batch: 4, isl: 4}", "workload.isl", 4),
    ("model.layers=3", "model.layers", 3),
    ("model.moe.experts=32", "model.moe.experts", 32),
    ("model.moe={base: x}", "", "PLN010"),
    ("model=mixtral-8x7b", "model.layers", 32),
    ("model.dtypes.kv_cache=fp8", "model.dtypes.kv_cache", "fp8"),
    ("cluster=h200-sxm-1x4", "cluster.gpus", 4),
    ("cluster.nodes=4", "cluster.gpus", 32),
    ("cluster.gpu.mfu=50 %", "cluster.groups.0.gpu.mfu", 0.5),
    ("cluster.gpu=h200-sxm", "cluster.groups.0.gpu.name", "h200-sxm"),
    ("cluster.gpu.memory={value: 9 GB, source: me}", "cluster.groups.0.gpu.memory", 9 * 10**9),
    ("parallelism.tp=8", "parallelism.tp", 8),
    ("parallelism.stages=[1, 3]", "parallelism.stages", (1, 3)),
    ("expert_rule=none", "expert_rule", "none"),
    ("expert_rule.slots_per_gpu=2", "expert_rule.slots_per_gpu", 2),
    ("claims.1.tps=9", "claims.1.tps", 9),
    ("claims.0={name: z}", "claims.0.name", "z"),
    ("description=a=b: c", "", "PLN012"),
    ("description='a=b: c'", "description", "a=b: c"),
    ("nokey", "", "PLN008"),
    ("=1", "", "PLN008"),
    ("", "", "PLN008"),
    ("a..b=1", "", "PLN008"),
    (".=1", "", "PLN008"),
    ("5=1", "", "PLN008"),
    ("model.layers.5=1", "", "PLN008"),
    ("model.5=1", "", "PLN008"),
    ("workload.batch.x=1", "", "PLN008"),
    ("claims.2.tps=9", "", "PLN008"),
    ("claims.x=9", "", "PLN008"),
    ("claims.-1.tps=9", "", "PLN008"),
    ("cluster.groups.0.nodes=2", "", "PLN008"),
    (".".join("a" * 40) + "=1", "", "PLN008"),
    (".".join("a" * 5000) + "=1", "", "PLN008"),
    ("²=1", "", "PLN010"),
    ("9" * 5000 + "=1", "", "PLN010"),
    ("x" * 100_000 + "=1", "", "PLN010"),
    ("workload.batch=", "", "PLN012"),
    ("workload.batch=many", "", "PLN012"),
    ("workload.batch=-1", "", "PLN014"),
    ("workload.batch=[", "", "PLN004"),
    ("workload.batch=1\n---\n2", "", "PLN004"),
    ("workload.batch=*x", "", "PLN004"),
    ("workload={batch: 1, batch: 2}", "", "PLN005"),
    ("name=<script>", "", "PLN016"),
    ("model=../../../no/such/file", "", "PLN007"),
]
CLAIMED = SMALL + "claims:\n  - {name: a}\n  - {name: b}\n"


@pytest.mark.parametrize(("text", "dotted", "want"), OVERRIDES, ids=lambda value: str(value)[:40])
def test_override(text: str, dotted: str, want: object, files: Files) -> None:
    path = files(CLAIMED)
    if not dotted:
        found = codes(lambda: load_spec(path, [text]))
        assert want in {code for code, _ in found}
        return
    value: object = load_spec(path, [text])
    for part in dotted.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    assert value == want


def test_overrides_apply_in_order_and_are_named_by_faults(files: Files) -> None:
    path = files(SMALL)
    assert load_spec(path, ["workload.batch=1", "workload.batch=2"]).workload.batch == 2
    with pytest.raises(PlancError) as error:
        load_spec(path, ["model.layers=0"])
    (found,) = error.value.diagnostics
    assert found.span is not None
    assert (found.code, found.span.file, found.span.line) == ("PLN014", "--set model.layers=0", 1)


@pytest.mark.parametrize("text", ["", "[1]", "3"])
def test_overrides_on_what_is_no_spec(text: str, files: Files) -> None:
    assert [code for code, _ in codes(lambda: load_spec(files(text), ["workload.batch=1"]))] == ["PLN008"]


# --- shorthand -------------------------------------------------------------------------------------------------------


def test_shorthand_and_groups_say_the_same() -> None:
    group = INLINE.replace("  nodes: 2\n  gpu: h100-sxm\n", "  groups: [{nodes: 2, gpu: h100-sxm}]\n")
    assert parse_spec(INLINE).cluster == parse_spec(group).cluster


def test_faults_in_the_shorthand_are_at_its_keys() -> None:
    with pytest.raises(PlancError) as error:
        parse_spec(INLINE.replace("nodes: 2", "nodes: two").replace("gpu: h100-sxm", "gpu: {base: h100-sxm, mfu: 9}"))
    found = [(d.code, d.path, d.span and d.span.line) for d in error.value.diagnostics]
    assert found == [("PLN012", "cluster.groups.0.nodes", 6), ("PLN014", "cluster.groups.0.gpu.mfu", 7)]


# --- messages ----------------------------------------------------------------------------------------------------------

HINTS = {
    SMALL + "expert_rul: none": "did you mean `expert_rule`?",
    SMALL.replace("isl", "ils"): "did you mean `isl`?",
    SMALL.replace("moe-4l", "deepsek-v3"): "did you mean `deepseek-v3`?",
    SMALL.replace("h100-sxm-2x8", "{base: h100-sxm, links: {nvlnk: {}}}"): "did you mean `nvlink`?",
    SMALL + "claims: [{name: a, tpots: 1 s}]": "did you mean `tpot`?",
    SMALL + "parallelism: {gating: shared}": "did you mean `sharded`?",
    SMALL + "zzzzz: 1": "keys here: claims, cluster, description,",
}


@pytest.mark.parametrize("text", HINTS)
def test_hints(text: str) -> None:
    with pytest.raises(PlancError) as error:
        parse_spec(text)
    assert any(HINTS[text] in d.hint for d in error.value.diagnostics), error.value.diagnostics


# --- sizes ---------------------------------------------------------------------------------------------------------------

LARGE = {
    "unknown keys": SMALL + "".join(f"expert_rul{i}: 1\n" for i in range(60_000)),
    "unknown keys over a base": HEAD
    + "cluster: h100-sxm\nmodel:\n  base: moe-4l\n"
    + "".join(f"  k{i}: 1\n" for i in range(30_000)),
    "duplicate keys": SMALL + "k: 1\n" * 50_000,
    "groups": HEAD + "model: moe-4l\ncluster: {base: h100-sxm, groups: [" + "{nodes: 1, gpu: h100-sxm}, " * 5000 + "]}",
    "claims": SMALL + "claims: [" + "{name: a}, " * 30_000 + "]",
    "a long key": SMALL + "k" * 3_000_000 + ": 1",
    "a long name": SMALL.replace("name: t", "name: " + "t" * 3_000_000),
    "a long number": SMALL.replace("64", "6" * 3_000_000),
    "many suffixes": SMALL.replace("h100-sxm", "h100-sxm" + "-1x1" * 20_000),
    "stages": SMALL + "parallelism: {stages: [" + "1, " * 90_000 + "]}",
    "listed layers": SMALL.replace("moe-4l", "{base: moe-4l, moe_layers: '0-99999'}"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_input_is_refused_soon(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(PlancError) as error:
        place(parse_spec(LARGE[name]))
    assert time.perf_counter() - start < 8
    assert all(len(d.message) + len(d.hint) < 1000 for d in error.value.diagnostics)


CLUSTERS = {(1, 1): "PLN201", (7, 1): "", (101, 1): "", (13, 3): "", (1250, 8): "", (100_000, 10): ""}


@pytest.mark.parametrize(("nodes", "gpus"), CLUSTERS)
def test_clusters_of_any_size(nodes: int, gpus: int) -> None:
    """One GPU, primes, and a million GPUs."""
    spec = parse_spec(f"{HEAD}model: moe-61l\ncluster: h100-sxm-{nodes}x{gpus}")
    if CLUSTERS[nodes, gpus]:
        assert [code for code, _ in codes(lambda: place(spec))] == [CLUSTERS[nodes, gpus]]
    else:
        par = place(spec).par
        assert par.dp * par.pp * par.ep == nodes * gpus


def test_ten_thousand_layers() -> None:
    spec = parse_spec(
        HEAD
        + "model: {base: moe-4l, layers: 10000, hidden: 64, attention: {heads: 4, head_dim: 16}}\ncluster: h100-sxm-2x8"
    )
    assert place(spec).par.stages[-1][1] == 10_000


# --- fuzz ----------------------------------------------------------------------------------------------------------------

FUZZED = (
    HEAD.replace("name: t", "name: t\ntarget: {tps: 1000, tpot: 10 ms}")
    + """
model: {base: moe-4l, layers: 2, hidden: 64, attention: {kind: gqa, heads: 8, head_dim: 8, kv_heads: 4}, moe: {experts: 8, intermediate: 32}}
cluster: {base: h100-sxm-2x8, gpu: {mfu: 50 %, memory: {value: 40 GB, source: me}}, links: {nic: {latency: 5 us}}}
parallelism: {dp: auto, pp: 2, ep: 8, tp: 4, gating: leader, stages: [1, 1]}
expert_rule: {scope: layer, slots_per_gpu: 1, on_overflow: rounds, spares: idle}
claims: [{name: x, tps: 5, latency_split: {a: 0.5, b: 0.5}}]
"""
)
TOKENS = "0 -1 1 3 16 1e9 1.5 .nan .inf null true no '' \" ' [] {} [1] auto none mla fp8 model replicate prefill 100% &a *a !!int <<: --- \t \0 \1 # : - ? | > % @ ` \u2028 é <b> .."
EDITS = [
    *TOKENS.split(" "),
    "9" * 5000,
    "{value: 1, source: x}",
    "{base: moe-4l}",
    "1 GB",
    "0 s",
    "deepseek-v3",
    "h100-sxm-2x8",
    "\n",
    " ",
]


def test_random_edits(files: Files) -> None:
    """300 edited specs: a plan or coded faults, each soon, never another exception."""
    rng = random.Random(20240607)
    refused = 0
    for _ in range(300):
        text = FUZZED
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice([*EDITS, ""]) + text[at + rng.choice((0, 0, 1, 2, 8)) :]
        data = bytearray(text.encode())
        if rng.random() < 0.1:
            data[rng.randrange(len(data))] = rng.randrange(256)
        path = files("")
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            place(load_spec(path))
        except PlancError as error:
            refused += 1
            assert all(d.span for d in error.diagnostics), error
        assert time.perf_counter() - start < 5, text
    assert 100 < refused < 300


def test_a_folder_of_odd_files(files: Files, tmp_path: Path) -> None:
    """Folders, loops and devices where a model file is named."""
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (
        "folder.yaml",
        "loop.yaml",
        "pipe.yaml",
        "/dev/zero",
        "/dev/null",
        "a/../b.yaml",
        "/",
        "./",
        "\\0.yaml",
    ):
        assert codes(lambda n=name: load_spec(files(SMALL.replace("moe-4l", n)))) == [("PLN007", "")], name


def test_an_unknown_preset_does_not_hide_the_other_faults() -> None:
    text = "name: t\nmodel: qwen3-235b\ncluster: h100-sxm-4x8\nworkload: {phase: deocde, bach: 3, isl: -1, batch: 5}\n"
    with pytest.raises(PlancError) as caught:
        parse_spec(text)
    found = [(d.code, d.span.line if d.span else 0) for d in caught.value.diagnostics]
    assert found == [("PLN007", 2), ("PLN015", 4), ("PLN010", 4), ("PLN014", 4)]
