"""vLLM's files: the script run on every node with a stand-in, its options read by a parser of vLLM's, and the experts that
vLLM's own rules then put on every GPU compared with the plan's."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch_scripts import parsed, start
from small_specs import small_spec

import planc
from planc.export import refusals, write
from planc.export.permutation import read_permutation, relabelled

#: options of vLLM 0.33.0 that the script uses: their choices, or their type. Read in its wheel, vllm/engine/arg_utils.py,
#: vllm/config/parallel.py and vllm/entrypoints/common/cli_args.py
OPTIONS: dict[str, Any] = {
    "--headless": None,
    "--port": int,
    "--device-ids": str,
    "--nnodes": int,
    "--node-rank": int,
    "--master-addr": str,
    "--master-port": int,
    "--tensor-parallel-size": int,
    "--pipeline-parallel-size": int,
    "--data-parallel-size": int,
    "--data-parallel-size-local": int,
    "--data-parallel-start-rank": int,
    "--data-parallel-address": str,
    "--data-parallel-rpc-port": int,
    "--enable-expert-parallel": None,
    "--expert-placement-strategy": ["linear", "round_robin"],
    "--all2all-backend": [
        "deepep_high_throughput",
        "deepep_low_latency",
        "deepep_v2",
        "mori_high_throughput",
        "mori_low_latency",
        "moonep",
        "nixl_ep",
        "allgather_reducescatter",
        "flashinfer_nvlink_two_sided",
        "flashinfer_nvlink_one_sided",
    ],
    "--kv-cache-dtype": ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"],
    "--max-num-seqs": int,
    "--max-num-batched-tokens": int,
    "--enable-dbo": None,
    "--ubatch-size": int,
    "--dbo-decode-token-threshold": int,
    "--dbo-prefill-token-threshold": int,
    "--enable-eplb": None,
    "--eplb-config": json.loads,
}
#: keys of `--eplb-config`, and the one of pull request 49572
EPLB = {"num_redundant_experts", "step_interval", "initial_expert_map_path"}


def launched(folder: Path, *arguments: str, **variables: str) -> argparse.Namespace:
    """What the script gives vLLM on a node, with the layers of every stage as ``partition``."""
    done = start(folder / "launch.sh", "vllm", *arguments, **variables)
    assert done.words[0] == "serve"
    found = parsed(done.words[1:], OPTIONS, "model")
    found.partition = [int(n) for n in done.variables.get("VLLM_PP_LAYER_PARTITION", "").split(",") if n]
    return found


def slots_of(ep_rank: int, ep_size: int, experts: int, redundant: int) -> list[int]:
    """Experts that vLLM puts on an EP rank: even runs of slots, and slot p has expert p % E."""
    width, rest = divmod(experts + redundant, ep_size)
    assert not rest
    return [slot % experts for slot in range(ep_rank * width, (ep_rank + 1) * width)]


def agree(plan: planc.VerifiedPlan, folder: Path) -> None:
    """Every GPU of the plan is started once, in its TP group, and gets the layers and experts that the plan has on it."""
    par, cluster, moe = plan.parallelism, plan.spec.cluster, plan.spec.model.moe
    assert moe is not None
    recipe, custom = folder / "permutation.json", folder / "expert_map.json"
    old = read_permutation(recipe).old if recipe.exists() else {}
    seen = set()
    for instance in range(par.dp):
        first = instance * par.replica_size
        nodes = sorted(set(cluster.node_of_rank[first : first + par.replica_size].tolist()))
        heads = 0
        for number, node in enumerate(nodes):
            got = launched(folder, str(instance), str(number), "10.0.0.1", MODEL="m")
            tp, pp, dp = (
                got.tensor_parallel_size,
                got.pipeline_parallel_size or 1,
                got.data_parallel_size or 1,
            )
            assert (tp, pp, dp) == (par.tp, par.pp, par.attention_dp) and got.enable_expert_parallel
            assert got.expert_placement_strategy == "linear"
            heads += not got.headless
            assert got.headless == (number > 0)  # the address given is the first node's
            assert got.headless or (got.port == 8000 + instance and got.data_parallel_start_rank is None)
            devices = [int(text) for text in got.device_ids.split(",")]
            if got.nnodes:  # engines over several nodes: ranks in runs, in the order of nodes
                assert got.nnodes == len(nodes) and got.master_addr == "10.0.0.1"
                assert got.master_port != got.data_parallel_rpc_port
                ranks = list(range(got.node_rank * len(devices), (got.node_rank + 1) * len(devices)))
                assert dp == 1 or got.data_parallel_size_local == 1
                assert dp == 1 or not got.headless or got.data_parallel_start_rank == ranks[0] // (pp * tp)
            else:
                begin = got.data_parallel_start_rank or 0
                count = got.data_parallel_size_local or 1
                ranks = list(range(begin * pp * tp, (begin + count) * pp * tp))
            if dp > 1:
                assert got.data_parallel_address == "10.0.0.1"
                assert got.data_parallel_rpc_port == 20000 + 2 * instance
            layers = got.partition or [plan.spec.model.layers]
            assert len(layers) == pp and sum(layers) == plan.spec.model.layers
            eplb = got.eplb_config or {}
            assert set(eplb) <= EPLB and got.enable_eplb == bool(eplb)
            redundant = eplb.get("num_redundant_experts", 0)
            tables = json.loads(custom.read_text()) if "initial_expert_map_path" in eplb else None
            for rank, device in zip(ranks, devices, strict=True):
                engine, within = divmod(rank, pp * tp)  # DP rank, stage, TP rank: the order of vLLM's groups
                stage, turn = divmod(within, tp)
                [world] = [
                    r
                    for r in range(par.world_size)
                    if cluster.node_of_rank[r] == node and cluster.local_of_rank[r] == device
                ]
                assert world == first + stage * par.ep + engine * tp + turn  # also the plan's TP group
                seen.add(world)
                start = sum(layers[:stage])
                held = {}
                for position, layer in enumerate(plan.spec.model.moe_layer_ids):
                    if not start <= layer < start + layers[stage]:
                        continue
                    experts = slots_of(engine * tp + turn, dp * tp, moe.experts, redundant)
                    if layer in old:
                        experts = [old[layer][index] for index in experts]
                    if tables is not None:
                        width = len(tables[position]) // (dp * tp)
                        ep_rank = engine * tp + turn
                        experts = tables[position][ep_rank * width : (ep_rank + 1) * width]
                    held[layer] = sorted(experts)
                assert held == plan.placement.experts_of_rank(world)
        assert heads == 1
    assert seen == set(range(par.world_size))


def grid(nodes: int, gpus: int) -> dict[str, Any]:
    links = {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "50 GB/s"}}
    return {"name": "lab", "links": links, "groups": [{"nodes": nodes, "gpus_per_node": gpus}]}


SKEWED = {"popularity": "zipf", "exponent": 1.0, "topics": 4, "tokens": 512, "seed": 1}
MANY: dict[str, Any] = {
    "model": {"moe": {"experts": 256, "top_k": 2, "intermediate": 32}},
    "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1},
}
#: what a spec changes -> whether its placement needs a permutation
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "tp in a node": ({"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 2}}, False),
    "no data parallelism": ({"parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 4}}, False),
    "two instances on a node": ({"parallelism": {"dp": 4, "pp": 1, "ep": 2, "tp": 1}}, False),
    "two experts a GPU": ({"parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 2}}, False),
    "stages over nodes": ({"parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 4}}, False),
    "stages in a node": ({"parallelism": {"dp": 2, "pp": 2, "ep": 2, "tp": 1}}, False),
    "uneven stages": ({"model": {"layers": 3}, "parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 4}}, False),
    "stages and nodes interleaved": (
        {"cluster": grid(4, 2), "parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 2}},
        False,
    ),
    "round robin": (
        {"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1}, "placement": {"policy": "round_robin"}},
        True,
    ),
    "traffic": ({"parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 1}, "traffic": SKEWED}, True),
    "copies": (
        {
            "model": {"moe": {"experts": 5, "top_k": 2, "intermediate": 32}},
            "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1},
            "expert_rule": {"scope": "layer", "slots_per_gpu": 1, "spares": "replicate"},
        },
        False,
    ),
}


def case(name: str) -> planc.VerifiedPlan:
    return planc.compile(small_spec(**CASES[name][0]))


@pytest.mark.parametrize("name", CASES)
def test_every_gpu_gets_what_the_plan_has_on_it(name: str, tmp_path: Path) -> None:
    write(case(name), ["vllm"], tmp_path)
    assert (tmp_path / "vllm" / "permutation.json").exists() == CASES[name][1]
    agree(case(name), tmp_path / "vllm")


@pytest.mark.parametrize(
    "name", ["moe-61l-ep64-dp2", "deepseek-v3-128gpu", "moe-4l-16gpu-baseline", "hetero-h100-h200"]
)
def test_shipped_plans(name: str, tmp_path: Path, example: Any) -> None:
    write(example(name), ["vllm"], tmp_path)
    agree(example(name), tmp_path / "vllm")


def test_a_tp_group_over_nodes(tmp_path: Path) -> None:
    """GPUs of one NVLink domain on two nodes: an engine of two nodes, each with --nnodes."""
    cluster = grid(4, 2)
    cluster["groups"][0]["nvlink_domain"] = 4
    plan = planc.compile(small_spec(cluster=cluster, parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 4}))
    write(plan, ["vllm"], tmp_path)
    got = launched(tmp_path / "vllm", "0", "3", "h", MODEL="m")
    assert (got.nnodes, got.node_rank, got.data_parallel_start_rank) == (4, 3, 1)
    agree(plan, tmp_path / "vllm")


def test_what_the_options_say(tmp_path: Path) -> None:
    for phase, asked, backend in (
        ("decode", "auto", "deepep_low_latency"),
        ("prefill", "auto", "deepep_high_throughput"),
        ("decode", "normal", "deepep_high_throughput"),
        ("prefill", "low_latency", "deepep_low_latency"),
    ):
        plan = planc.compile(
            small_spec(
                workload={"phase": phase, "micro_batches": 2},
                execution={"all_to_all": asked},
                parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 2},
            )
        )
        write(plan, ["vllm"], tmp_path, model="a b; rm -rf 'x'")
        got = launched(tmp_path / "vllm", "0", "0", "host:99")
        assert got.all2all_backend == backend and got.enable_dbo and got.dbo_decode_token_threshold == 2
        assert got.model == "a b; rm -rf 'x'" and got.data_parallel_rpc_port == 99
        assert got.data_parallel_address == "host"
    many = small_spec(workload={"micro_batches": 4}, parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 2})
    write(planc.compile(many), ["vllm"], tmp_path, model="m")
    got = launched(tmp_path / "vllm", "0", "0", "h")
    assert (got.ubatch_size, got.enable_dbo) == (4, False)
    for wrong in (("1", "0", "h"), ("0", "2", "h"), ("0", "x", "h"), ("0", "0")):
        with pytest.raises(subprocess.CalledProcessError):
            launched(tmp_path / "vllm", *wrong)
    alone = small_spec(workload={"micro_batches": 2}, parallelism={"dp": 2, "pp": 1, "ep": 4, "tp": 4})
    write(planc.compile(alone), ["vllm"], tmp_path, model="m")
    got = launched(tmp_path / "vllm", "0", "0", "h")
    assert not got.enable_dbo and got.all2all_backend is None and got.data_parallel_size is None
    said = (tmp_path / "vllm" / "launch.sh").read_text()
    assert "an all-reduce takes the place" in said and "2 micro-batches of the plan are not asked for" in said


def test_copies_stay_where_they_are(tmp_path: Path) -> None:
    write(case("copies"), ["vllm"], tmp_path, model="m")
    got = launched(tmp_path / "vllm", "0", "0", "h")
    assert got.eplb_config["num_redundant_experts"] == 3
    assert got.eplb_config["step_interval"] > 10**11  # steps until the balancer would move an expert: never


def test_maps_for_the_pull_request(tmp_path: Path) -> None:
    """A list of slots for every MoE layer, and any copies; nothing of it where vLLM's own layout is the plan's."""
    rule = {"scope": "layer", "slots_per_gpu": 2, "spares": "replicate"}
    plan = planc.compile(small_spec(parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1}, expert_rule=rule))
    [fault] = refusals(plan, ["vllm"])["vllm"]
    assert "from 8 on hold the first experts" in fault.message and "slots_per_gpu: 1" in fault.hint
    write(plan, ["vllm"], tmp_path, options={"vllm.map": "pr-49572"})
    rows = json.loads((tmp_path / "vllm" / "expert_map.json").read_text())
    assert len(rows) == 2 and all(len(row) == 16 and set(row) == set(range(8)) for row in rows)
    got = launched(tmp_path / "vllm", "0", "0", "h", MODEL="m")
    assert got.eplb_config["initial_expert_map_path"] == "expert_map.json"
    assert got.eplb_config["num_redundant_experts"] == 8
    agree(plan, tmp_path / "vllm")
    write(case("round robin"), ["vllm"], tmp_path / "one", options={"vllm.map": "pr-49572"})
    agree(case("round robin"), tmp_path / "one" / "vllm")
    write(case("tp in a node"), ["vllm"], tmp_path / "plain", options={"vllm.map": "pr-49572"})
    assert [path.name for path in (tmp_path / "plain" / "vllm").glob("*.json")] == []


@pytest.mark.parametrize(
    ("changes", "option", "words", "change"),
    [
        ({"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1, "expert_tp": 2}}, "", "2 GPUs share one", {}),
        ({"model": {"moe": None, "dense_mlp": {"intermediate": 64}}}, "", "no experts", {}),
        (
            CASES["round robin"][0],
            "none",
            "slot p holds expert p % 8",
            {"placement": {"policy": "linear"}},
        ),
        (
            {"cluster": grid(4, 4), "parallelism": {"dp": 1, "pp": 2, "ep": 8, "tp": 2}},
            "",
            "whole nodes",
            {"parallelism": {"dp": 1, "pp": 2, "ep": 8, "tp": 4}},
        ),
        (
            CASES["copies"][0] | {"parallelism": {"dp": 1, "pp": 2, "ep": 8, "tp": 4}, "cluster": grid(4, 4)},
            "",
            "its balancer",
            {"parallelism": {"dp": 2, "pp": 1, "ep": 8, "tp": 4}},
        ),
        (
            CASES["copies"][0] | {"placement": {"policy": "round_robin"}},
            "",
            "from 5 on hold the first experts",
            {"placement": {"policy": "linear"}},
        ),
        (
            MANY | {"expert_rule": {"scope": "layer", "slots_per_gpu": 200, "spares": "replicate"}},
            "pr-49572",
            "holds 1023 further copies of a layer at most, and the plan has 1344",
            {"expert_rule": {"scope": "layer", "slots_per_gpu": 159, "spares": "replicate"}},
        ),
        (
            {"model": {"hidden": 9216}, "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 2}},
            "",
            "hidden sizes up to 8192",
            {"execution": {"all_to_all": "normal"}},
        ),
    ],
)
def test_what_is_another_plan_is_refused(
    changes: dict[str, Any], option: str, words: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """… and is written after the change that the hint names."""
    options = {"vllm.map": option} if option else {}
    found = refusals(planc.compile(small_spec(**changes)), ["vllm"], options)["vllm"]
    assert any(fault.code == "PLN503" and words in fault.message and fault.hint for fault in found), found
    if change:
        plan = planc.compile(small_spec(**(changes | change)))
        write(plan, ["vllm"], tmp_path, options=options)
        agree(plan, tmp_path / "vllm")


def limited(**parts: Any) -> planc.VerifiedPlan:
    moe = {"experts": 8, "top_k": 2, "intermediate": 32, "groups": 4, "top_groups": 2}
    return planc.compile(small_spec(model={"moe": moe}, parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1}, **parts))


def test_groups_of_the_gate_stay_whole(tmp_path: Path) -> None:
    """Round robin puts experts 0 and 2 side by side, which are of two groups: no numbering keeps the gate's choice."""
    [fault] = refusals(limited(placement={"policy": "round_robin"}), ["vllm"])["vllm"]
    assert "new groups are whole old ones" in fault.message and "linear" in fault.hint
    write(limited(), ["vllm"], tmp_path)
    agree(limited(), tmp_path / "vllm")


def test_numberings() -> None:
    ranks = [(0,), (1,), (2,), (3,)]
    assert relabelled(ranks, ranks, 1) == (0, 1, 2, 3)
    assert relabelled(ranks, ranks[::-1], 1) == (3, 2, 1, 0)
    assert relabelled(ranks, ranks[::-1], 2) == (3, 2, 1, 0)  # groups change places, experts of a group too
    assert relabelled(ranks, [(0,), (2,), (1,), (3,)], 2) is None
    assert relabelled([(0,), (0,), (1,), (1,)], [(1,), (0,), (0,), (1,)], 1) == (1, 2, 0, 3)
    assert relabelled([(0, 1), (0,)], [(0,), (1,)], 1) is None
    assert relabelled([(0, 2), (1,)], [(1,), (0, 2)], 1) == (1, 0)  # copies stay on the ranks of their expert
    alike = [(0,), (0,), (0,), (0,)]
    assert relabelled(alike, alike, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_numbering_is_found_where_there_is_one(groups: int) -> None:
    """Six experts on three ranks, every fourth of them on two: all permutations tried one by one say the same."""
    random, size, found = np.random.default_rng(groups), 6 // groups, 0
    for _ in range(60):
        here, there = (
            [tuple(sorted(random.choice(3, 2 if random.random() < 0.25 else 1, replace=False))) for _ in range(6)]
            for _ in range(2)
        )
        if random.random() < 0.7:
            there = [here[i] for i in random.permutation(6)]
        good = {
            old
            for old in itertools.permutations(range(6))
            if all(here[new] == there[expert] for new, expert in enumerate(old))
            and all(len({e // size for e in old[g * size : (g + 1) * size]}) == 1 for g in range(groups))
        }
        got = relabelled(here, there, groups)
        assert (got in good) if good else got is None
        found += got is not None
    assert 0 < found < 60


@pytest.mark.parametrize(("tokens", "asked", "depth"), [(511, "auto", ""), (512, "auto", "1026"), (512, "normal", "")])
def test_buffers_of_dispatch_have_room_for_a_step(tmp_path: Path, tokens: int, asked: str, depth: str) -> None:
    """vLLM makes them for as many tokens as a batch may have, by default more than DeepEP takes."""
    degrees, work = {"dp": 1, "pp": 1, "ep": 8, "tp": 1}, {"batch": 8 * tokens, "isl": 2, "osl": 1}
    plan = planc.compile(small_spec(parallelism=degrees, workload=work, execution={"all_to_all": asked}))
    write(plan, ["vllm"], tmp_path, model="m")
    done = start(tmp_path / "vllm" / "launch.sh", "vllm", "0", "0", "h")
    got = parsed(done.words[1:], OPTIONS, "model")
    assert got.max_num_seqs == tokens and got.max_num_batched_tokens == (None if asked == "normal" else tokens)
    assert done.variables.get("NVSHMEM_QP_DEPTH", "") == depth
    more = planc.compile(small_spec(parallelism=degrees, workload=work | {"batch": 8 * 1025}))
    assert "1,025" in refusals(more, ["vllm"])["vllm"][0].message
