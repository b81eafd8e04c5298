"""Every shipped preset loads, every hardware number states its source, and the reference presets are as required."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from planc.spec.cluster import Cluster
from planc.spec.deployment import Spec
from planc.spec.load import load_model, parse_spec, preset_names, shipped_folder
from planc.spec.model import expert_parameters, parameter_counts
from planc.spec.text import parse_yaml

GPUS, CLUSTERS, MODELS = (preset_names(kind) for kind in ("gpus", "clusters", "models"))


def spec_on(cluster: str, model: str = "moe-4l") -> Spec:
    """A small spec on the named cluster."""
    return parse_spec(f"name: t\nmodel: {model}\ncluster: {cluster}\nworkload: {{batch: 64, isl: 128}}\n")


def cluster_of(name: str) -> Cluster:
    """The cluster preset."""
    return spec_on(name).cluster


def raw(kind: str, name: str) -> Any:
    """The preset's YAML as written, sources included."""
    path = shipped_folder("specs") / kind / f"{name}.yaml"
    return parse_yaml(path.read_text(encoding="utf-8"), str(path)).value


def test_the_presets_that_are_promised() -> None:
    hardware = {"reference-h100", "h100-sxm", "h200-sxm", "h800-sxm", "b200-sxm", "a100-sxm-80gb", "mi300x"}
    assert set(GPUS) == hardware | {"gb200"}
    assert set(CLUSTERS) == hardware | {"gb200-nvl72"}
    assert set(MODELS) == {
        "deepseek-v3", "deepseek-r1", "deepseek-v2", "qwen3-235b-a22b", "qwen2-57b-a14b", "mixtral-8x7b",
        "gpt-oss-120b", "kimi-k2", "glm-4.5", "olmoe-1b-7b", "llama-4-maverick", "llama-3.1-8b", "moe-61l", "moe-4l",
        "llama-3.1-70b", "qwen3-32b", "minimax-m2",
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_load(name: str) -> None:
    model = load_model(name)
    assert model.name == name and model.source and parameter_counts(model)["total"] > 0
    assert spec_on("h100-sxm", name).model == model


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_load(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster.name == name and cluster.source
    assert cluster.links.nvlink.bandwidth >= cluster.links.nic.bandwidth
    assert 0 < cluster.links.nvlink.latency < cluster.links.nic.latency < 1e-4


@pytest.mark.parametrize("name", GPUS)
def test_gpus_load(name: str) -> None:
    gpu = spec_on(f"{{base: h100-sxm, gpu: {name}}}").cluster.groups[0].gpu
    assert gpu.name == name and gpu.reserve == 0.1
    assert gpu.peak.bf16 is not None and gpu.peak.bf16 == gpu.peak.fp16
    assert gpu.peak.fp8 is None or gpu.peak.fp8 == pytest.approx(2 * gpu.peak.bf16, rel=1e-4)


def unsourced(value: Any, path: str = "") -> Iterator[str]:
    """Places of numbers that are not inside ``{value: …, source: TEXT}``; text counts as a number if it has a digit."""
    if isinstance(value, dict) and set(value) == {"value", "source"}:
        if not (isinstance(value["source"], str) and len(value["source"]) >= 20):
            yield f"{path}: source is too short"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from () if key in ("name", "source", "gpu", "base") else unsourced(part, f"{path}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from unsourced(part, f"{path}.{i}")
    elif isinstance(value, (int, float)) or any(c.isdigit() for c in str(value)):
        yield path


@pytest.mark.parametrize(("kind", "name"), [("gpus", n) for n in GPUS] + [("clusters", n) for n in CLUSTERS])
def test_every_hardware_number_has_a_source(kind: str, name: str) -> None:
    assert list(unsourced(raw(kind, name))) == []


def test_the_walk_finds_a_number_without_a_source() -> None:
    assert list(unsourced({"a": {"b": "80 GB"}, "c": [1], "d": {"value": 1, "source": ""}})) == [
        ".a.b", ".c.0", ".d: source is too short",
    ]  # fmt: skip


def test_every_field_of_a_gpu_is_stated() -> None:
    for name in GPUS:
        assert {"mfu", "memory", "memory_bandwidth", "memory_utilization", "reserve"} <= set(raw("gpus", name)), name


def test_sources_reach_the_spec() -> None:
    sources = spec_on("h100-sxm").sources
    assert "H100" in sources["cluster.groups.0.gpu.memory"] and "halved" in sources["cluster.links.nvlink.bandwidth"]


def test_reference_h100_is_the_requirement() -> None:
    cluster = cluster_of("reference-h100")
    gpu, nvlink, nic = cluster.groups[0].gpu, cluster.links.nvlink, cluster.links.nic
    assert (gpu.peak.bf16, gpu.peak.fp16, gpu.peak.fp8) == (400e12, 400e12, None)
    assert (gpu.mfu, gpu.memory, gpu.memory_bandwidth, gpu.memory_utilization) == (0.6, 64 * 10**9, 1.8e12, 0.8)
    assert (cluster.nodes, cluster.gpus, cluster.smallest_domain()) == (16, 128, 8)
    assert (nvlink.bandwidth, nvlink.utilization, nic.bandwidth, nic.utilization) == (1.8e12, 0.8, 1.8e12, 0.8)


@pytest.mark.parametrize(
    ("name", "bf16", "memory", "bandwidth", "nvlink", "nic"),
    [
        ("h100-sxm", 989.5e12, 80, 3.35e12, 450e9, 50e9),
        ("h200-sxm", 989.5e12, 141, 4.8e12, 450e9, 50e9),
        ("h800-sxm", 989.5e12, 80, 3.35e12, 200e9, 50e9),
        ("b200-sxm", 2250e12, 180, 8e12, 900e9, 50e9),
        ("gb200-nvl72", 2500e12, 186, 8e12, 900e9, 50e9),
        ("a100-sxm-80gb", 312e12, 80, 2.039e12, 300e9, 25e9),
        ("mi300x", 1307.4e12, 192, 5.3e12, 448e9, 50e9),
    ],
)
def test_datasheet_numbers(name: str, bf16: float, memory: int, bandwidth: float, nvlink: float, nic: float) -> None:
    """Dense peak, decimal GB, and bandwidths of one direction."""
    cluster = cluster_of(name)
    gpu = cluster.groups[0].gpu
    assert (gpu.peak.bf16, gpu.memory, gpu.memory_bandwidth) == (bf16, memory * 10**9, bandwidth)
    assert (cluster.links.nvlink.bandwidth, cluster.links.nic.bandwidth) == (nvlink, nic)


def test_an_nvl72_rack_is_one_nvlink_domain() -> None:
    cluster = cluster_of("gb200-nvl72")
    assert (cluster.gpus, cluster.nodes, cluster.smallest_domain()) == (72, 18, 72)


def test_a_preset_is_resized_by_name() -> None:
    cluster = cluster_of("h100-sxm-4x8")
    assert (cluster.name, cluster.nodes, cluster.gpus) == ("h100-sxm-4x8", 4, 32)


def test_reference_models() -> None:
    """The hand arithmetic of the reference plan."""
    large, small = load_model("moe-61l"), load_model("moe-4l")
    assert large.dense_layer_ids == (0, 1, 2) and len(large.moe_layer_ids) == 58
    assert expert_parameters(large) == expert_parameters(small) == 29_360_128
    counts = parameter_counts(large)
    assert counts["attention"] == 61 * 469_762_048 and counts["dense_mlp"] == 3 * 29_360_128
    assert counts["gates"] == 58 * 7168 * 64 and counts["norms"] == counts["embedding"] == 0
    assert small.moe_layer_ids == (0, 1, 2, 3) and small.moe is not None and large.moe is not None
    assert (large.moe.experts, large.moe.top_k, small.moe.experts, small.moe.top_k) == (64, 2, 16, 2)
    assert large.dtypes.weights == "bf16" and small.dtypes.weights == small.dtypes.kv_cache == "fp16"


def test_deepseek_r1_is_deepseek_v3_with_other_weights() -> None:
    v3, r1 = load_model("deepseek-v3"), load_model("deepseek-r1")
    assert r1.name != v3.name and r1.model_copy(update={"name": v3.name, "source": v3.source}) == v3
