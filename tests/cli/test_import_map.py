"""`planc import-map`: a running deployment's map as a plan that is verified, drawn, priced and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SPEC = "deepseek-v3-128gpu"  # 256 experts on 128 GPUs, two a GPU


def test_a_map_becomes_a_plan(run: Callable[..., Any], tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    shuffled = np.stack([random.permutation(256) for _ in range(58)])
    np.save("running.npy", shuffled)
    found = run("import-map", "running.npy", SPEC, "-o", "plan", "--figures", "none", "--json")
    assert found.status == 0, found.err
    assert "running.npy: an EPLB array; set placement.policy: given" in found.err
    assert found.json["expert_rule"]["rounds"] == 2 and "plan/plan.json" in found.json["files"]
    verified = run("verify", "plan")
    assert verified.status == 0 and "at-most-one-expert rule" in verified.out + verified.err
    explained = run("explain", "plan", "--gpu", "5", "--format", "json")
    assert explained.status == 0 and f"{shuffled[0, 10]}" in explained.out
    assert run("export", "plan", "--to", "sglang", "-o", "deploy", "--model", "m").status == 0
    rows = json.loads(Path("deploy/sglang/expert_location.json").read_text())["physical_to_logical_map"]
    assert [sorted(rows[3][n : n + 2]) for n in range(0, 256, 2)] == np.sort(shuffled[0].reshape(128, 2)).tolist()
    compared = run("compare", SPEC, "plan", "--json")
    assert compared.status == 0, compared.err


def test_a_map_of_devices_decides_a_degree_on_auto(run: Callable[..., Any], tmp_path: Path) -> None:
    device = [{"device_id": d, "device_expert": [d]} for d in range(64)]
    layers = [{"layer_id": n, "device_count": 64, "device_list": device} for n in range(58)]
    Path("map.json").write_text(json.dumps({"moe_layer_count": 58, "layer_list": layers}))
    found = run(
        *("import-map", "map.json", "moe-61l-ep64-dp2", "-o", "plan", "--figures", "none"),
        *("--set", "parallelism.ep=auto"),
    )
    assert found.status == 0, found.err
    assert "parallelism.ep: 64" in found.err


def test_maps_that_cannot_be_read_write_nothing(run: Callable[..., Any], tmp_path: Path) -> None:
    Path("short.json").write_text(json.dumps([[0, 1]]))
    Path("words.json").write_text('{"a": 1}')
    for name, code in (("short.json", "PLN025"), ("words.json", "PLN024"), ("gone.json", "PLN001")):
        found = run("import-map", name, SPEC, "-o", "plan")
        assert (found.status, found.out) == (1, "") and f"error[{code}]" in found.err, found.err
        assert not Path("plan").exists()
    found = run("import-map", "words.json", SPEC, "-o", "plan", "--set", "placement.policy=linear")
    assert found.status == 1 and "error[PLN111]" in found.err
    np.save("half.npy", np.tile(np.arange(128), (94, 1)))
    found = run("import-map", "half.npy", "qwen3-235b-a22b", "-o", "plan")  # whose degrees are on auto
    assert found.status == 1 and "does not say how many GPUs" in found.err and "set parallelism.ep" in found.err
