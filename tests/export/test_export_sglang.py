"""SGLang's files: the map read by its contract, the command line by a parser of its options, the script as nodes run it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launch_scripts import parsed, start
from small_specs import LINKS, small_spec

import planc
from planc.export import refusals, write
from planc.export.slots import slot_tables
from planc.planner.tables import EMPTY

#: options of SGLang 0.5.23 that the script uses: their choices, or their type. Read in its wheel, sglang/srt/arg_groups/fields
#: (parallel.py, exec_.py, model.py, device.py), where a field's name with dashes is the flag.
OPTIONS: dict[str, Any] = {
    "--model-path": str,
    "--nnodes": int,
    "--node-rank": int,
    "--port": int,
    "--host": str,
    "--dist-init-addr": str,
    "--base-gpu-id": int,
    "--tp-size": int,
    "--pp-size": int,
    "--attn-dp-size": int,
    "--ep-size": int,
    "--moe-a2a-backend": ["none", "deepep", "mooncake", "nixl", "mori", "flashinfer", "pplx"],
    "--deepep-mode": ["auto", "normal", "low_latency"],
    "--ep-num-redundant-experts": int,
    "--ep-dispatch-algorithm": ["static", "dynamic", "fake", "lp"],
    "--enable-two-batch-overlap": None,
    "--init-expert-location": str,
    "--moe-dense-tp-size": int,
    "--moe-runner-backend": [
        "auto",
        "deep_gemm",
        "triton",
        "flashinfer_trtllm",
        "flashinfer_cutlass",
        "cutlass",
        "aiter",
    ],
    "--kv-cache-dtype": ["auto", "fp8_e5m2", "fp8_e4m3", "bf16", "bfloat16", "mxfp8"],
    "--max-running-requests": int,
    "--chunked-prefill-size": int,
}
NAMES = ["moe-61l-ep64-dp2", "deepseek-v3-ep256", "deepseek-v3-128gpu", "qwen3-235b-a22b"]


def launched(folder: Path, *arguments: str) -> argparse.Namespace:
    """What the script gives SGLang on a node, with the layers of its ``stages``."""
    done = start(folder / "launch.sh", "python3", *arguments)
    assert done.words[:2] == ["-m", "sglang.launch_server"]
    found = parsed(done.words[2:], OPTIONS)
    found.stages = done.variables.get("SGLANG_PP_LAYER_PARTITION", "")
    return found


PLANS: dict[str, planc.VerifiedPlan] = {}


def plan_of(name: str) -> planc.VerifiedPlan:
    if name not in PLANS:
        PLANS[name] = planc.compile(planc.load_spec(name))
    return PLANS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_map_says_who_holds_what(name: str, tmp_path: Path) -> None:
    """By the engine's contract: one key, a row for every hidden layer, slot p of n on EP rank p // (n ÷ ranks)."""
    plan = plan_of(name)
    write(plan, ["sglang"], tmp_path, model="m")
    record = json.loads((tmp_path / "sglang" / "expert_location.json").read_text())
    assert list(record) == ["physical_to_logical_map"]
    rows, par, moe = record["physical_to_logical_map"], plan.parallelism, plan.spec.model.moe
    assert moe is not None and len(rows) == plan.spec.model.layers
    for layer, row in enumerate(rows):
        assert len(row) % par.ep == 0 and set(row) == set(range(moe.experts))  # dense rows are valid ones too
        width = len(row) // par.ep
        stage = par.stage_of_layer(layer) * par.ep
        for slot, expert in enumerate(row if layer in plan.placement.layers else []):
            assert expert in plan.placement.experts_of_rank(stage + slot // width)[layer]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_start_what_the_plan_says(name: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    write(plan, ["sglang"], tmp_path, model="a b; rm -rf 'x'")
    par, moe = plan.parallelism, plan.spec.model.moe
    assert moe is not None
    gpus = 0
    for instance in range(par.dp):
        found = launched(tmp_path / "sglang", str(instance), "0", "10.0.0.1")
        gpus += found.tp_size * (found.pp_size or 1)
        assert found.model_path == "a b; rm -rf 'x'"
        assert found.dist_init_addr == f"10.0.0.1:{20000 + 100 * instance}" and found.port == 30000 + instance
        assert found.nnodes * plan.spec.cluster.groups[0].gpus_per_node == max(8, par.replica_size)
        assert (found.attn_dp_size or 1) * par.tp == found.tp_size == found.ep_size == par.ep
        assert (
            found.ep_dispatch_algorithm == "static"
            and Path(found.init_expert_location) == tmp_path / "sglang" / "expert_location.json"
        )
        slots = next(iter(slot_tables(plan).values())).size
        assert (found.ep_num_redundant_experts or 0) == slots - moe.experts
    assert gpus == par.world_size
    assert launched(tmp_path / "sglang", "0", "1", "host:99").dist_init_addr == "host:99"
    for wrong in ((str(par.dp), "0", "h"), ("0", "99", "h"), ("0", "x", "h"), ("0", "0")):
        with pytest.raises(subprocess.CalledProcessError):
            launched(tmp_path / "sglang", *wrong)


def test_every_layer_has_its_own_row(tmp_path: Path) -> None:
    """Layers placed differently, behind a dense one; the row of that one holds every expert."""
    rows = [[3, 1, 4, 0, 5, 2, 7, 6], [7, 6, 5, 4, 3, 2, 1, 0]]
    (tmp_path / "given.json").write_text(json.dumps(rows))
    moe = {"experts": 8, "top_k": 2, "intermediate": 32}
    model = {"layers": 3, "moe": moe, "first_k_dense": 1, "dense_mlp": {"intermediate": 64}}
    placement, degrees = {"map": str(tmp_path / "given.json")}, {"dp": 1, "pp": 1, "ep": 8, "tp": 1}
    plan = planc.compile(small_spec(model=model, placement=placement, parallelism=degrees))
    write(plan, ["sglang"], tmp_path, model="m")
    record = json.loads((tmp_path / "sglang" / "expert_location.json").read_text())["physical_to_logical_map"]
    assert record[1:] == rows and sorted(record[0]) == list(range(8))


def test_stages_have_the_plan_s_layers(tmp_path: Path) -> None:
    """Left alone, the engine shares layers out in its own way, and another GPU would hold some of them."""
    degrees = {"dp": 1, "pp": 2, "ep": 4, "tp": 1, "stages": [3, 1]}
    plan = planc.compile(small_spec(model={"layers": 4}, parallelism=degrees, workload={"batch": 8}))
    write(plan, ["sglang"], tmp_path, model="m")
    found = launched(tmp_path / "sglang", "0", "1", "h")
    assert (found.pp_size, found.tp_size, found.nnodes, found.stages) == (2, 4, 2, "3,1")


def seats(found: argparse.Namespace, gpus: int) -> dict[tuple[int, int], int]:
    """(stage, TP rank) -> local GPU of what SGLang runs on a node: a node has whole stages, or a stage has whole nodes."""
    stages = found.pp_size or 1
    here, of_one = max(stages // found.nnodes, 1), max(found.nnodes // stages, 1)
    first, width = here * (found.node_rank // of_one), found.tp_size // of_one
    begin = width * (found.node_rank % of_one)
    placed = {}
    for stage in range(first, first + here):
        for rank in range(begin, begin + width):
            placed[stage, rank] = found.base_gpu_id + (stage % here) * width + rank % width
    return placed


STAGED = {
    "a stage a node": (2, 4, {"pp": 2, "ep": 4}),
    "two stages a node": (2, 4, {"pp": 4, "ep": 2}),
    "two nodes a stage": (4, 4, {"pp": 2, "ep": 8}),
    "on one node": (1, 8, {"pp": 2, "ep": 4}),
    "replicas side by side": (2, 8, {"dp": 4, "pp": 2, "ep": 2}),
    "three nodes a stage": (6, 4, {"pp": 2, "ep": 12}),
    "a stage and a half a node": (2, 6, {"pp": 3, "ep": 4}),
    "a node and a half a stage": (3, 8, {"pp": 2, "ep": 12}),
}


@pytest.mark.parametrize("name", STAGED)
def test_every_rank_is_on_its_gpu(name: str, tmp_path: Path) -> None:
    """By the way in which SGLang deals stages and ranks out to nodes; what it would deal out otherwise is refused."""
    nodes, gpus, degrees = STAGED[name]
    groups = [{"nodes": nodes, "gpus_per_node": gpus}]
    moe = {"experts": 12, "top_k": 2, "intermediate": 32}
    rule = {"slots_per_gpu": 6, "spares": "replicate"}
    parts = {"parallelism": {"dp": 1, "tp": 1} | degrees, "expert_rule": rule, "workload": {"batch": 96}}
    model = {"layers": 6, "moe": moe}
    plan = planc.compile(small_spec(cluster={"name": "c", "links": LINKS, "groups": groups}, model=model, **parts))
    par, cluster = plan.parallelism, plan.spec.cluster
    if "half" in name:
        [fault] = refusals(plan, ["sglang"])["sglang"]
        assert "whole stages" in fault.message and "parallelism.pp: 1" in fault.hint
        return
    write(plan, ["sglang"], tmp_path, model="m")
    seen = []
    for instance in range(par.dp):
        on = cluster.node_of_rank[instance * par.replica_size :][: par.replica_size]
        for node in range(len(set(on.tolist()))):
            found = launched(tmp_path / "sglang", str(instance), str(node), "h")
            for (stage, rank), local in seats(found, gpus).items():
                world = instance * par.replica_size + stage * par.ep + rank
                assert cluster.local_of_rank[world] == local and on[world - instance * par.replica_size] == on[0] + node
                seen.append(world)
    assert sorted(seen) == list(range(par.world_size))


@pytest.mark.parametrize(("micro_batches", "pp", "asked"), [(2, 1, True), (3, 1, False), (2, 2, False)])
def test_two_batches_overlap_where_the_engine_can(micro_batches: int, pp: int, asked: bool, tmp_path: Path) -> None:
    degrees = {"dp": 1, "pp": pp, "ep": 8 // pp, "tp": 1}
    plan = planc.compile(small_spec(parallelism=degrees, workload={"micro_batches": micro_batches}))
    write(plan, ["sglang"], tmp_path, model="m")
    found = launched(tmp_path / "sglang", "0", "0", "h")
    assert found.enable_two_batch_overlap is asked
    assert found.max_running_requests == plan.spec.workload.batch  # of all micro-batches
    assert ("micro-batches of the plan are not asked for" in (tmp_path / "sglang" / "launch.sh").read_text()) != asked


def test_what_the_plan_has_is_asked_for(tmp_path: Path) -> None:
    """Types, requests, whole dense layers, room in buffers; and options of one's own behind them."""
    moe = {"experts": 8, "top_k": 2, "intermediate": 32}
    model = {"layers": 3, "moe": moe, "first_k_dense": 1, "dense_mlp": {"intermediate": 64}}
    degrees = {"dp": 1, "pp": 1, "ep": 8, "tp": 2}
    types = {"weights": "fp8", "kv_cache": "fp8"}
    work = {"batch": 4 * 300, "isl": 16, "osl": 4}
    plan = planc.compile(small_spec(model=model | {"dtypes": types}, parallelism=degrees, workload=work))
    write(plan, ["sglang"], tmp_path, model="m")
    done = start(tmp_path / "sglang" / "launch.sh", "python3", "0", "0", "h", "--port", "7", "--model-path", "a b")
    found = parsed(done.words[2:], OPTIONS)
    assert (found.port, found.model_path) == (7, "a b")  # the last one counts
    assert (found.kv_cache_dtype, found.moe_dense_tp_size, found.max_running_requests) == ("fp8_e4m3", 1, 1200)
    assert done.variables["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "150"
    assert found.moe_runner_backend is None and "whole on every GPU" in (tmp_path / "sglang" / "launch.sh").read_text()
    plain = planc.compile(small_spec(parallelism=degrees | {"tp": 1}))
    write(plain, ["sglang"], tmp_path, model="m")
    found = launched(tmp_path / "sglang", "0", "0", "h")
    assert found.moe_runner_backend == "deep_gemm" and (found.kv_cache_dtype, found.moe_dense_tp_size) == (None, None)
    assert "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK" not in (tmp_path / "sglang" / "launch.sh").read_text()


def test_more_than_dispatch_has_room_for_is_refused(tmp_path: Path) -> None:
    degrees = {"dp": 1, "pp": 1, "ep": 8, "tp": 1}
    for tokens, asked, refused in ((1024, "auto", False), (1025, "auto", True), (1025, "normal", False)):
        work = {"batch": 8 * tokens, "isl": 2, "osl": 1}
        plan = planc.compile(small_spec(parallelism=degrees, workload=work, execution={"all_to_all": asked}))
        found = refusals(plan, ["sglang"])["sglang"]
        assert [fault.path for fault in found] == ["execution.all_to_all"] * refused
    prefill = {"phase": "prefill", "batch": 8, "isl": 32, "prefill_chunk": 16}
    plan = planc.compile(small_spec(parallelism=degrees, workload=prefill))
    write(plan, ["sglang"], tmp_path, model="m")
    found = launched(tmp_path / "sglang", "0", "0", "h")
    assert (found.chunked_prefill_size, found.max_running_requests) == (128, None)  # 16 on each of 8 GPUs
    long = prefill | {"isl": 600, "prefill_chunk": 300}
    plan = planc.compile(small_spec(parallelism=degrees, workload=long, execution={"all_to_all": "low_latency"}))
    write(plan, ["sglang"], tmp_path, model="m")
    done = start(tmp_path / "sglang" / "launch.sh", "python3", "0", "0", "h")
    assert done.variables["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "300"  # prompts go the same way


def test_scripts_know_their_folder_whatever_cd_looks_up(tmp_path: Path) -> None:
    write(plan_of("deepseek-v3-128gpu"), ["sglang"], tmp_path, model="m")
    done = start(tmp_path / "sglang" / "launch.sh", "python3", "0", "0", "h", CDPATH=".")
    assert str(tmp_path / "sglang" / "expert_location.json") in done.words


def test_amd_has_its_own_exchange(tmp_path: Path) -> None:
    plan = planc.compile(small_spec(parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1}, gpu={"name": "mi300x"}))
    write(plan, ["sglang", "vllm", "lws", "kserve"], tmp_path, model="m", image="i")
    found = launched(tmp_path / "sglang", "0", "0", "h")
    assert (found.moe_a2a_backend, found.deepep_mode, found.moe_runner_backend) == ("mori", None, None)
    before = planc.compile(small_spec(parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1}, gpu={"name": "a100-sxm-80gb"}))
    write(before, ["sglang"], tmp_path / "a100", model="m")
    assert launched(tmp_path / "a100" / "sglang", "0", "0", "h").moe_runner_backend is None
    assert "Hopper" in (tmp_path / "a100" / "sglang" / "launch.sh").read_text()
    assert "--all2all-backend mori_low_latency" in (tmp_path / "vllm" / "launch.sh").read_text()
    for path in ("lws/lws.yaml", "kserve/kserve.yaml"):
        text = (tmp_path / path).read_text()
        assert "amd.com/gpu" in text and "nvidia.com/gpu" not in text


def test_scripts_can_be_executed(tmp_path: Path) -> None:
    write(plan_of("deepseek-v3-128gpu"), ["sglang", "slurm"], tmp_path, model="m")
    assert os.access(tmp_path / "sglang" / "launch.sh", os.X_OK)
    assert not os.access(tmp_path / "sglang" / "expert_location.json", os.X_OK)


def spare(**rule: Any) -> planc.Spec:
    return small_spec(
        model={"moe": {"experts": 6, "top_k": 2, "intermediate": 32}},
        parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1},
        expert_rule={"scope": "layer", "slots_per_gpu": 1, **rule},
    )


def test_idle_slots_are_refused_and_the_change_helps(tmp_path: Path) -> None:
    plan = planc.compile(spare(spares="idle"))
    [fault] = refusals(plan, ["sglang"])["sglang"]
    assert fault.code == "PLN503" and "2 of 8 slots empty" in fault.message and "replicate" in fault.hint
    assert any((table == EMPTY).any() for table in slot_tables(plan).values())
    with pytest.raises(planc.PlancError):
        write(plan, ["sglang"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    write(planc.compile(spare(spares="replicate")), ["sglang"], tmp_path, model="m")
    assert launched(tmp_path / "sglang", "0", "0", "h").ep_num_redundant_experts == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1, "expert_tp": 2}}, "2 GPUs share one"),
        ({"model": {"moe": None, "dense_mlp": {"intermediate": 64}}}, "no experts"),
    ],
)
def test_what_is_another_plan_is_refused(changes: dict[str, Any], words: str) -> None:
    found = refusals(planc.compile(small_spec(**changes)), ["sglang"])["sglang"]
    assert any(words in fault.message and fault.hint for fault in found)


def test_replicas_askew_on_their_nodes_are_refused() -> None:
    """An engine takes the same GPUs of every node: not the last two of one and the first two of the next."""
    sizes = [{"nodes": 1, "gpus_per_node": 2}, {"nodes": 2, "gpus_per_node": 4}, {"nodes": 1, "gpus_per_node": 2}]
    askew = {"name": "c", "links": LINKS, "groups": sizes}
    degrees = {"dp": 3, "pp": 1, "ep": 4, "tp": 1}
    plan = planc.compile(small_spec(cluster=askew, parallelism=degrees, expert_rule={"slots_per_gpu": 2}))
    [fault] = refusals(plan, ["sglang"])["sglang"]
    assert "begins at GPU 2 of one node and at GPU 0 of another" in fault.message and "divisor of 2" in fault.hint
    degrees |= {"dp": 6, "ep": 2}
    plan = planc.compile(small_spec(cluster=askew, parallelism=degrees, expert_rule={"slots_per_gpu": 4}))
    assert not refusals(plan, ["sglang"])["sglang"]


def test_layers_on_different_gpus_are_refused() -> None:
    [fault] = refusals(plan_of("moe-4l-64gpu"), ["sglang"])["sglang"]
    assert fault.hint.startswith("set expert_rule.scope: layer and expert_rule.spares: replicate")
    asked = ["expert_rule.scope=layer", "expert_rule.spares=replicate"]
    assert not refusals(planc.compile(planc.load_spec("moe-4l-64gpu", asked)), ["sglang"])["sglang"]
