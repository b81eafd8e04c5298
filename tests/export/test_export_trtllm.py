"""TensorRT-LLM's files: the map by its contract, the options by their fields, the script as processes of an MPI job run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_scripts import Started, start
from small_specs import small_spec

import planc
from planc.export import refusals, write
from planc.export.slots import slot_tables

#: fields of TorchLlmArgs and MoeConfig that the options use; both reject keys that they do not know
FIELDS = {
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "moe_expert_parallel_size": int,
    "enable_attention_dp": bool,
    "pp_partition": list,
    "max_batch_size": int,
    "max_seq_len": int,
    "max_num_tokens": int,
    "enable_chunked_prefill": bool,
    "kv_cache_config": dict,
    "moe_config": dict,
}
MOE_FIELDS = {"backend", "max_num_tokens", "load_balancer"}
NAMES = ["deepseek-v3-ep256", "deepseek-v3-128gpu", "qwen3-235b-a22b"]


def exported(plan: planc.VerifiedPlan, folder: Path, **named: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, map) as the engine's loaders see them."""
    write(plan, ["trtllm"], folder, **named)
    options = yaml.safe_load((folder / "trtllm" / "llm_api_options.yaml").read_text())
    assert all(type(value) is FIELDS[key] for key, value in options.items())
    assert set(options["moe_config"]) <= MOE_FIELDS
    balancer = yaml.safe_load((folder / "trtllm" / options["moe_config"]["load_balancer"]).read_text())
    assert set(balancer) == {"num_slots", "layer_updates_per_iter", "initial_global_assignments"}
    return options, balancer


@pytest.mark.parametrize("name", NAMES)
def test_the_map_says_who_holds_what(name: str, tmp_path: Path) -> None:
    """Slots [r · k, (r + 1) · k) of a layer, by its index in the model, lie on EP rank r."""
    plan = planc.compile(planc.load_spec(name))
    options, balancer = exported(plan, tmp_path)
    par, moe = plan.parallelism, plan.spec.model.moe
    assert moe is not None and balancer["layer_updates_per_iter"] == 0
    assert list(balancer["initial_global_assignments"]) == list(plan.spec.model.moe_layer_ids)
    width, rest = divmod(balancer["num_slots"], options["moe_expert_parallel_size"])
    assert rest == 0
    for layer, row in balancer["initial_global_assignments"].items():
        assert len(row) == balancer["num_slots"] and set(row) == set(range(moe.experts))
        stage = par.stage_of_layer(layer) * par.ep
        for slot, expert in enumerate(row):
            assert expert in plan.placement.experts_of_rank(stage + slot // width)[layer]
    assert options["tensor_parallel_size"] * options["pipeline_parallel_size"] * par.dp == par.world_size
    assert options["enable_attention_dp"] is True and par.tp == 1
    sequences = options["max_batch_size"] * par.attention_dp * par.dp
    assert 0 <= sequences - plan.spec.workload.batch < par.attention_dp * par.dp
    assert "NVLink domains" in " ".join((tmp_path / "trtllm" / "launch.sh").read_text().splitlines())


def launched(folder: Path, instance: int, tasks: int, **variables: str) -> Started:
    """The script in a process of a job of so many."""
    script = folder / "trtllm" / "launch.sh"
    return start(script, "trtllm-llmapi-launch", str(instance), check=False, SLURM_NTASKS=str(tasks), **variables)


def test_processes_start_what_the_plan_says(tmp_path: Path) -> None:
    """Four replicas on half a node each, from any folder, and never with another number of GPUs."""
    plan = planc.compile(small_spec(parallelism={"dp": 4, "pp": 1, "ep": 2, "tp": 1}, expert_rule={"slots_per_gpu": 4}))
    options, _ = exported(plan, tmp_path, model="a b; rm -rf 'x'")
    assert options["tensor_parallel_size"] == 2
    folder = tmp_path / "trtllm"
    for instance, gpus in enumerate(("0,1", "2,3", "0,1", "2,3")):
        found = launched(tmp_path, instance, 2)
        assert found.words == [
            *("trtllm-serve", "a b; rm -rf 'x'", "--backend", "pytorch"),
            *("--host", "0.0.0.0", "--port", str(8000 + instance)),
            *("--extra_llm_api_options", "llm_api_options.yaml"),
        ]
        assert (found.variables["CUDA_VISIBLE_DEVICES"], found.folder) == (gpus, str(folder))
    for instance, tasks in ((0, 8), (4, 2)):
        found = launched(tmp_path, instance, tasks)
        assert found.status == 2 and not found.words and found.errors
    assert launched(tmp_path, 1, 2, CUDA_VISIBLE_DEVICES="7,6").variables["CUDA_VISIBLE_DEVICES"] == "7,6"
    (tmp_path / "here").mkdir()
    write(plan, ["trtllm"], tmp_path, model="here")
    assert launched(tmp_path, 0, 2).words[1] == str(tmp_path / "here")  # the script leaves the folder
    assert "srun --mpi=pmix --nodes 1 --ntasks 2 --ntasks-per-node 2 launch.sh 3" in (folder / "launch.sh").read_text()


def test_stages_and_prefill(tmp_path: Path) -> None:
    degrees = {"dp": 1, "pp": 2, "ep": 4, "tp": 1, "stages": [3, 1]}
    work = {"phase": "prefill", "batch": 8, "isl": 32, "prefill_chunk": 16}
    plan = planc.compile(small_spec(model={"layers": 4}, parallelism=degrees, workload=work))
    options, balancer = exported(plan, tmp_path, model="m")
    assert options["pp_partition"] == [3, 1] and options["pipeline_parallel_size"] == 2
    assert options["max_num_tokens"] == 16 and options["max_seq_len"] == 36
    assert options["enable_chunked_prefill"] is True  # a prompt has 32 tokens
    tables = slot_tables(plan)
    assert balancer["initial_global_assignments"][3] == tables[3].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("changes", "words", "change"),
    [
        ({"tp": 2}, "here 2 share attention", "set parallelism.tp: 1, where attention and KV cache fit a GPU whole"),
        ({"expert_tp": 2}, "2 GPUs share one", "set parallelism.expert_tp: 1"),
    ],
)
def test_what_is_another_plan_is_refused(changes: dict[str, Any], words: str, change: str) -> None:
    degrees = {"dp": 1, "pp": 1, "ep": 8, "tp": 1} | changes
    [fault] = refusals(planc.compile(small_spec(parallelism=degrees)), ["trtllm"])["trtllm"]
    assert fault.code == "PLN503" and words in fault.message and fault.hint == change


def test_other_makers_and_types(tmp_path: Path) -> None:
    degrees = {"dp": 1, "pp": 1, "ep": 8, "tp": 1}
    plan = planc.compile(small_spec(parallelism=degrees, model={"dtypes": {"kv_cache": "fp8"}}))
    assert exported(plan, tmp_path)[0]["kv_cache_config"] == {"dtype": "fp8"}
    [fault] = refusals(planc.compile(small_spec(parallelism=degrees, gpu={"name": "mi300x"})), ["trtllm"])["trtllm"]
    assert "NVIDIA" in fault.message
