"""vLLM-Ascend's files: the map by the way the engine reads it, the script as nodes run it."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launch_scripts import parsed, start
from small_specs import LINKS, small_spec

import planc
from planc.export import refusals, write

#: options of vLLM that the script uses, with their types
OPTIONS: dict[str, Any] = {
    "--tensor-parallel-size": int,
    "--data-parallel-size": int,
    "--data-parallel-size-local": int,
    "--data-parallel-start-rank": int,
    "--data-parallel-address": str,
    "--data-parallel-rpc-port": int,
    "--additional-config": json.loads,
    "--port": int,
    "--max-num-seqs": int,
    "--max-num-batched-tokens": int,
    "--headless": None,
    "--enable-expert-parallel": None,
}


def launched(folder: Path, *arguments: str) -> argparse.Namespace:
    """What the script gives vLLM on a node, with its ``devices``."""
    done = start(folder / "vllm-ascend" / "launch.sh", "vllm", *arguments)
    found = parsed(done.words, OPTIONS, "serve", "model")
    found.devices = [int(device) for device in done.variables["ASCEND_RT_VISIBLE_DEVICES"].split(",")]
    return found


@pytest.mark.parametrize("name", ["moe-61l-ep64-dp2", "deepseek-v3-ep256", "deepseek-v3-128gpu"])
def test_every_device_has_the_experts_of_the_plan(name: str, tmp_path: Path) -> None:
    """The engine takes the n-th entry for its n-th MoE layer, and the r-th device for EP rank r: DP rank · TP + TP rank."""
    plan = planc.compile(planc.load_spec(name))
    write(plan, ["vllm-ascend"], tmp_path, model="a b; rm -rf 'x'")
    par, cluster = plan.parallelism, plan.spec.cluster
    seen = []
    for instance in range(par.dp):
        nodes = max(1, par.replica_size // 8)
        for node in range(nodes):
            found = launched(tmp_path, str(instance), str(node), "10.0.0.1")
            first = (found.data_parallel_start_rank or 0) * found.tensor_parallel_size
            config = found.additional_config["eplb_config"]
            record = json.loads(Path(config["expert_map_path"]).read_text())
            assert found.model == "a b; rm -rf 'x'" and found.enable_expert_parallel and found.headless == (node > 0)
            assert found.data_parallel_size * found.tensor_parallel_size == par.ep
            assert len(found.devices) == found.data_parallel_size_local * found.tensor_parallel_size
            for local, device in enumerate(found.devices):
                rank = instance * par.replica_size + first + local
                assert cluster.local_of_rank[rank] == device
                held = plan.placement.experts_of_rank(rank)
                seen.append(rank)
                for number, layer in enumerate(plan.spec.model.moe_layer_ids):
                    entry = record["layer_list"][number]["device_list"][first + local]
                    assert entry["device_expert"] == held[layer], (rank, layer)
    assert seen == list(range(par.world_size))


def test_instances_that_share_a_node(tmp_path: Path) -> None:
    degrees = {"dp": 4, "pp": 1, "ep": 2, "tp": 2}
    plan = planc.compile(small_spec(parallelism=degrees, expert_rule={"slots_per_gpu": 4}))
    write(plan, ["vllm-ascend"], tmp_path, model="m")
    found = [launched(tmp_path, str(n), "0", "h:9") for n in range(4)]
    assert [one.devices for one in found] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [one.port for one in found] == [8000, 8001, 8002, 8003]
    assert found[0].data_parallel_size is None and found[0].tensor_parallel_size == 2  # one TP group
    for wrong in (("4", "0"), ("0", "1"), ("0", "x")):
        with pytest.raises(subprocess.CalledProcessError):
            launched(tmp_path, *wrong, "h")


@pytest.mark.parametrize(
    ("degrees", "words", "change"),
    [
        ({"pp": 2, "ep": 4}, "the map of the first stage", "set parallelism.pp: 1 and ep: 8"),
        ({"expert_tp": 2}, "2 GPUs share one", "set parallelism.expert_tp: 1"),
    ],
)
def test_what_is_another_plan_is_refused(degrees: dict[str, int], words: str, change: str) -> None:
    plan = planc.compile(small_spec(parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1} | degrees))
    [fault] = refusals(plan, ["vllm-ascend"])["vllm-ascend"]
    assert fault.code == "PLN503" and words in fault.message and fault.hint == change


@pytest.mark.parametrize("groups", [[(4, 2)], [(1, 4), (2, 2)]])
def test_groups_over_nodes_are_refused(groups: list[tuple[int, int]]) -> None:
    """Of the first instance, or only of a later one."""
    sizes = [{"nodes": nodes, "gpus_per_node": gpus, "nvlink_domain": 4} for nodes, gpus in groups]
    cluster = {"name": "c", "links": LINKS, "groups": sizes}
    count = sum(nodes * gpus for nodes, gpus in groups)
    degrees = {"dp": count // 4, "pp": 1, "ep": 4, "tp": 4}
    plan = planc.compile(small_spec(cluster=cluster, parallelism=degrees, expert_rule={"slots_per_gpu": 2}))
    [fault] = refusals(plan, ["vllm-ascend"])["vllm-ascend"]
    assert "do not divide the 2 there" in fault.message and fault.hint == "set parallelism.tp to a divisor of 2"
