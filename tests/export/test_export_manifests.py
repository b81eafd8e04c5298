"""Orchestrators' files: the GPUs, nodes and parallel sizes they ask for are the plan's, SGLang starts as its own script starts
it, manifests pass reduced schemas, and what cannot be told is refused with a change that helps."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from launch_scripts import parsed
from manifest_schemas import NAME, faults, schema_of
from random_specs import specs
from small_specs import small_spec
from test_export_sglang import NAMES, OPTIONS, launched, plan_of
from test_export_vllm import OPTIONS as VLLM_OPTIONS
from test_export_vllm import launched as vllm_launched

import planc
from planc.export import manifests, refusals, target, write

SGLANG = ["lws", "dynamo", "slurm"]
VLLM = ["kserve", "ray"]
ALL = SGLANG + VLLM
FILES = {
    "lws": "lws.yaml",
    "kserve": "kserve.yaml",
    "dynamo": "dynamo.yaml",
    "ray": "serve.yaml",
    "slurm": "launch.sbatch",
}
MODEL, IMAGE = "a b; $(HOME) $HOME `x` \"q\" 'r' # ü: - {", "host:5000/a b:$(tag) #1"


def manifest(folder: Path, name: str, kind: str = "") -> dict[str, Any]:
    """The manifest of a kind, of a name where there are several; Ray's file has one of none."""
    documents = list(yaml.safe_load_all((folder / name / FILES[name]).read_text()))
    found = [document for document in documents if document.get("kind", "") == kind]
    assert found, (kind, documents)
    return dict(found[-1])


def data(folder: Path, name: str, key: str) -> str:
    """A file of the config maps of a manifest."""
    documents = yaml.safe_load_all((folder / name / FILES[name]).read_text())
    return next(str(one["data"][key]) for one in documents if key in one.get("data", {}))


def gpus(container: dict[str, Any]) -> int:
    return int(container["resources"]["limits"]["nvidia.com/gpu"])


def asked(folder: Path, name: str) -> tuple[int, int | None, int | None, int]:
    """(instances, nodes of each, GPUs on each, GPUs in all) that a file asks for, by its reader's rules alone. Ray is told no
    nodes."""
    if name == "lws":
        spec = manifest(folder, name, "LeaderWorkerSet")["spec"]
        group = spec["leaderWorkerTemplate"]
        [leader] = group["leaderTemplate"]["spec"]["containers"]
        [worker] = group["workerTemplate"]["spec"]["containers"]
        total = spec["replicas"] * (gpus(leader) + (group["size"] - 1) * gpus(worker))
        return spec["replicas"], group["size"], gpus(worker), total
    if name == "kserve":
        spec = manifest(folder, name, "LLMInferenceService")["spec"]
        par = spec["parallelism"]
        [head], [worker] = spec["template"]["containers"], spec["worker"]["containers"]
        nodes = max(par["data"] // par["dataLocal"], 1)
        assert par["dataLocal"] * par["tensor"] == gpus(head) == gpus(worker) and par["expert"]
        return spec["replicas"], nodes, gpus(worker), spec["replicas"] * (gpus(head) + (nodes - 1) * gpus(worker))
    if name == "dynamo":
        services = manifest(folder, name, "DynamoGraphDeployment")["spec"]["services"]
        worker = services["worker"]
        assert "resources" not in services["Frontend"]
        nodes, each = worker.get("multinode", {"nodeCount": 1})["nodeCount"], int(worker["resources"]["limits"]["gpu"])
        return worker["replicas"], nodes, each, worker["replicas"] * nodes * each
    if name == "ray":
        [app] = manifest(folder, name)["applications"]
        config = app["args"].get("llm_config") or app["args"]["llm_configs"][0]
        sizes = [config["engine_kwargs"].get(f"{part}_parallel_size", 1) for part in ("tensor", "pipeline", "data")]
        assert ("dp" in app["import_path"]) == (sizes[2] > 1)
        count = config["deployment_config"]["num_replicas"]
        return count, None, None, count * sizes[0] * sizes[1] * sizes[2]
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (folder / name / FILES[name]).read_text(), re.MULTILINE))
    first, last = map(int, told["array"].split("-"))
    assert first == 0 and told["ntasks-per-node"] == "1"
    nodes, each = int(told["nodes"]), int(told["gpus-per-node"])
    return last + 1, nodes, each, (last + 1) * nodes * each


SMALL = {
    "several on a node": {
        "parallelism": {"dp": 4, "pp": 1, "ep": 2, "tp": 2},
        "expert_rule": {"on_overflow": "rounds"},
    },
    "one a node": {"parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 2}, "expert_rule": {"on_overflow": "rounds"}},
    "one GPU": {"parallelism": {"dp": 8, "pp": 1, "ep": 1, "tp": 1}, "expert_rule": {"on_overflow": "rounds"}},
    "all nodes": {"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 2}},
    "stages": {"parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 4}, "expert_rule": {"on_overflow": "rounds"}},
}


def any_plan(name: str) -> planc.VerifiedPlan:
    return planc.compile(small_spec(**SMALL[name])) if name in SMALL else plan_of(name)


CASES = [(form, name) for form in ALL for name in [*NAMES, "deepseek-v3-10240gpu", *SMALL]]


@pytest.mark.parametrize(
    ("form", "name"), [case for case in CASES if case != ("kserve", "stages")]
)  # refused: see below
def test_what_is_asked_for_is_the_plan_s(form: str, name: str, tmp_path: Path) -> None:
    plan = any_plan(name)
    par = plan.parallelism
    write(plan, [form], tmp_path, model=MODEL, image=IMAGE)
    instances, nodes, each, total = asked(tmp_path, form)
    on = plan.spec.cluster.groups[0].gpus_per_node
    assert total == par.world_size and instances == par.dp
    if form != "ray":
        assert nodes == max(1, par.replica_size // on) and each == min(on, par.replica_size)
    if form == "kserve":
        told = manifest(tmp_path, form, "LLMInferenceService")["spec"]["parallelism"]
        assert told["data"] * told["tensor"] == par.ep and told["tensor"] == par.tp
    if form == "ray":
        [app] = manifest(tmp_path, form)["applications"]
        config = app["args"].get("llm_config") or app["args"]["llm_configs"][0]
        engine = config["engine_kwargs"]
        sizes = {"tensor": par.tp, "data": par.ep // par.tp, "pipeline": par.pp}
        assert all(engine.get(f"{part}_parallel_size", 1) == size for part, size in sizes.items())
        assert engine["enable_expert_parallel"] is True


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(specs())
def test_any_plan_is_refused_or_asked_for_whole(parts: dict[str, Any]) -> None:
    try:
        plan = planc.compile(small_spec(**parts))
    except planc.PlancError:
        return
    forms = [form for form, found in refusals(plan, ALL).items() if not found]
    with tempfile.TemporaryDirectory() as folder:
        write(plan, forms, folder)
        for form in forms:
            instances, _, _, total = asked(Path(folder), form)
            assert (instances, total) == (plan.parallelism.dp, plan.parallelism.world_size)
            assert form == "slurm" or not invalid(Path(folder), form)


def invalid(folder: Path, form: str) -> list[str]:
    """What of a file its schemas do not allow."""
    documents = list(yaml.safe_load_all((folder / form / FILES[form]).read_text()))
    return [fault for one in documents for fault in faults(one, schema_of(one))]


def expanded(words: list[str], env: dict[str, str]) -> list[str]:
    """`command` and `args` as Kubernetes starts them: `$(NAME)` is a variable where there is one, `$$` is `$`."""
    one = re.compile(r"\$(\$|\(([^)]*)\))")
    return [one.sub(lambda m: "$" if m[1] == "$" else env.get(m[2], m[0]), word) for word in words]


def in_pods(folder: Path, node: int) -> list[str]:
    """What a LeaderWorkerSet starts on a node."""
    group = manifest(folder, "lws", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    [container] = group["workerTemplate" if node else "leaderTemplate"]["spec"]["containers"]
    env = {"LWS_WORKER_INDEX": str(node), "LWS_LEADER_ADDRESS": "leader", "HOME": "/wrong", "tag": "wrong"}
    assert container["image"] == IMAGE
    return expanded(container["command"] + container["args"], env)


#: a word that shells and Kubernetes leave as it is
PLAIN = re.compile(r"[\w./-]+")


def by_operator(folder: Path, node: int) -> list[str]:
    """What Dynamo starts on a node: the file of options, read as SGLang reads it, and what the operator adds."""
    worker = manifest(folder, "dynamo", "DynamoGraphDeployment")["spec"]["services"]["worker"]
    container = worker["extraPodSpec"]["mainContainer"]
    assert container["image"] == IMAGE and container["command"] == ["python3", "-m", "dynamo.sglang"]
    options = yaml.safe_load(data(folder, "dynamo", "engine.yaml"))
    config, path, *more = container["args"]
    assert (config, path) == ("--config", "/etc/planc/engine/engine.yaml") and all(
        map(PLAIN.fullmatch, container["args"])
    )
    if more:  # SGLang 0.5.21: `--dp-size N --enable-dp-attention`, later `--attn-dp-size N`
        assert more == ["--enable-dp-attention"]
        options["attn-dp-size"] = options.pop("dp-size")
    words = ["python3", "-m", "sglang.launch_server"]
    for key, value in options.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    nodes = worker["multinode"]["nodeCount"]
    return [*words, "--nnodes", str(nodes), "--node-rank", str(node), "--dist-init-addr", "leader:29500"]


SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_JOB_NUM_NODES; SLURM_NODEID++)); do export SLURM_NODEID; "$@" || exit; done
"""


def batch(folder: Path, nodes: int, instance: int = 0, printed: str = "python3", **env: str) -> list[list[str]]:
    """What the batch script starts on every node of a job of the array, with stand-ins for Slurm's programs. ``printed``: for
    the shell, in place of the first word."""
    fake = folder / "bin"
    fake.mkdir(exist_ok=True)
    fakes = {"srun": SRUN, "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames n[7-9]" ] && seq -f n%g 7 999\n'}
    fakes["python3"] = f'#!/bin/sh\nprintf "%s\\0" {printed} "$@"; printf "\\n"\n'
    for program, text in fakes.items():
        (fake / program).write_text(text)
        (fake / program).chmod(0o755)
    bash = shutil.which("bash")
    assert bash, "the script is for bash, which this machine lacks"
    job = {"SLURM_JOB_NODELIST": "n[7-9]", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_ARRAY_TASK_ID": str(instance)}
    done = subprocess.run(
        [bash, "launch.sbatch"],
        cwd=folder / "slurm",
        env={"PATH": f"{fake}:{os.environ['PATH']}"} | job | env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [line.split("\0")[:-1] for line in done.stdout.split("\n")[:-1]]


def sglang(words: list[str]) -> Namespace:
    """The arguments that SGLang is started with."""
    assert words[:3] == ["python3", "-m", "sglang.launch_server"]
    return parsed(words[3:], OPTIONS)


def compared(found: Namespace) -> dict[str, Any]:
    """Arguments of SGLang, without what each form gives in its own way, which is checked apart."""
    own = ("dist_init_addr", "base_gpu_id", "host", "port", "init_expert_location", "stages")
    return {key: value for key, value in vars(found).items() if key not in own}


@pytest.mark.parametrize("name", [*NAMES, "stages"])
def test_sglang_starts_as_its_own_script_starts_it(name: str, tmp_path: Path) -> None:
    plan = any_plan(name)
    write(plan, ["sglang", *SGLANG], tmp_path, model=MODEL, image=IMAGE)
    nodes = asked(tmp_path, "slurm")[1]
    assert nodes
    jobs = batch(tmp_path, nodes)
    assert len(jobs) == nodes
    experts = (tmp_path / "sglang" / "expert_location.json").read_text()
    for node in range(nodes):
        want = compared(launched(tmp_path / "sglang", "0", str(node), "leader"))
        assert want["model_path"] == MODEL and want["node_rank"] == node
        for form, words in (
            ("lws", in_pods(tmp_path, node)),
            ("dynamo", by_operator(tmp_path, node)),
            ("slurm", jobs[node]),
        ):
            found = sglang(words)
            assert compared(found) == want, form
            if form == "slurm":
                assert found.dist_init_addr == "n7:20000" and found.init_expert_location == "expert_location.json"
                assert (tmp_path / form / "expert_location.json").read_text() == experts
            else:
                assert found.dist_init_addr.partition(":")[0] == "leader"
                assert found.init_expert_location == "/etc/planc/map/expert_location.json"
                assert data(tmp_path, form, "expert_location.json") == experts
            assert form == "dynamo" or (found.host == "0.0.0.0" and found.port == 30000)


def test_stages_have_the_plan_s_layers(tmp_path: Path) -> None:
    """SGLang and vLLM divide layers in ways of their own, unless a variable names the layers of each stage."""
    stages = {
        "parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 4, "stages": [3, 2]},
        "expert_rule": {"on_overflow": "rounds"},
    }
    write(planc.compile(small_spec(model={"layers": 5}, **stages)), [*SGLANG, "ray"], tmp_path, model="m", image=IMAGE)
    name = "SGLANG_PP_LAYER_PARTITION"
    group = manifest(tmp_path, "lws", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    worker = manifest(tmp_path, "dynamo", "DynamoGraphDeployment")["spec"]["services"]["worker"]
    pods = [group[part]["spec"]["containers"][0] for part in ("leaderTemplate", "workerTemplate")]
    for container in (*pods, worker["extraPodSpec"]["mainContainer"]):
        assert container["env"] == [{"name": name, "value": "3,2"}]
    [app] = manifest(tmp_path, "ray")["applications"]
    config = app["args"]["llm_configs"][0]
    assert config["runtime_env"] == {"env_vars": {"VLLM_PP_LAYER_PARTITION": "3,2"}}
    assert all(words[0] == "3,2" for words in batch(tmp_path, 2, printed=f"${name}"))
    write(any_plan("all nodes"), [*SGLANG, "ray"], tmp_path)
    assert not any("LAYER_PARTITION" in (tmp_path / form / FILES[form]).read_text() for form in [*SGLANG, "ray"])


def by_kserve(folder: Path) -> list[str]:
    """vLLM's arguments as KServe's preset makes them: of `parallelism`, and a variable that a shell reads."""
    spec = manifest(folder, "kserve", "LLMInferenceService")["spec"]
    par, [head], [worker] = spec["parallelism"], spec["template"]["containers"], spec["worker"]["containers"]
    assert (
        head == worker and head["image"] == IMAGE and [one["name"] for one in head["env"]] == ["VLLM_ADDITIONAL_ARGS"]
    )
    words = ["m", "--tensor-parallel-size", str(par["tensor"]), "--data-parallel-size", str(par["data"])]
    return [*words, *["--enable-expert-parallel"] * par["expert"], *shlex.split(head["env"][0]["value"])]


def by_ray(folder: Path) -> list[str]:
    """vLLM's arguments as Ray's `engine_kwargs` mean them."""
    [app] = manifest(folder, "ray")["applications"]
    config = app["args"].get("llm_config") or app["args"]["llm_configs"][0]
    words = ["m"]
    for name, value in config["engine_kwargs"].items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [text])
    return words


COPIES = {"model": {"moe": {"experts": 6, "top_k": 2, "intermediate": 32}}, "expert_rule": {"spares": "replicate"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "two micro-batches": SMALL["all nodes"] | {"workload": {"micro_batches": 2}},
    "four micro-batches": SMALL["all nodes"] | {"workload": {"micro_batches": 4}},
    "prefill": SMALL["all nodes"] | {"workload": {"phase": "prefill"}},
    "copies": COPIES | {"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1}},
    "one TP group": {"parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 4}, "expert_rule": {"on_overflow": "rounds"}},
}


@pytest.mark.parametrize("name", [*NAMES, "stages", *VARIANTS])
def test_vllm_starts_as_its_own_script_starts_it(name: str, tmp_path: Path) -> None:
    plan = planc.compile(small_spec(**VARIANTS[name])) if name in VARIANTS else any_plan(name)
    forms = [form for form in VLLM if not refusals(plan, [form])[form]]
    assert forms == (["ray"] if name == "stages" else VLLM)
    write(plan, ["vllm", *forms], tmp_path, model=MODEL, image=IMAGE)
    own = vars(vllm_launched(tmp_path / "vllm", "0", "0", "leader"))
    for form in forms:
        words = by_ray(tmp_path) if form == "ray" else by_kserve(tmp_path)
        flags = [word for word in words if word.startswith("--")]
        assert len(flags) == len(set(flags))
        found = vars(parsed(words, VLLM_OPTIONS, "model"))
        sizes = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")
        assert [found[size] or 1 for size in sizes] == [own[size] or 1 for size in sizes]
        for flag in (
            "all2all_backend",
            "expert_placement_strategy",
            "enable_expert_parallel",
            "enable_dbo",
            "ubatch_size",
        ):
            assert found[flag] == own[flag], (form, flag)
        for flag in ("dbo_decode_token_threshold", "dbo_prefill_token_threshold", "enable_eplb", "eplb_config"):
            assert found[flag] == own[flag], (form, flag)


def test_two_batches_overlap_in_sglang(tmp_path: Path) -> None:
    write(planc.compile(small_spec(**VARIANTS["two micro-batches"])), SGLANG, tmp_path, model=MODEL, image=IMAGE)
    for words in (in_pods(tmp_path, 1), by_operator(tmp_path, 1), *batch(tmp_path, 2)):
        assert sglang(words).enable_two_batch_overlap is True


@pytest.mark.parametrize("form", VLLM)
def test_another_placement_is_a_checkpoint_relabelled(form: str, tmp_path: Path) -> None:
    spec = SMALL["one a node"] | {"placement": {"policy": "round_robin"}}
    plan = planc.compile(small_spec(**spec))
    write(plan, [form, "vllm"], tmp_path, options={"vllm.map": "pr-49572"})  # which is vllm's own
    assert not (tmp_path / "vllm" / "permutation.json").exists()
    assert (tmp_path / form / "permutation.json").exists()
    assert "expert_map" not in (tmp_path / form / FILES[form]).read_text()
    write(plan, [form, "vllm"], tmp_path)
    recipe = (tmp_path / "vllm" / "permutation.json").read_bytes()
    assert (tmp_path / form / "permutation.json").read_bytes() == recipe
    assert "relabelled" in (tmp_path / form / FILES[form]).read_text()
    write(any_plan("one a node"), [form], tmp_path)
    assert not (tmp_path / form / "permutation.json").exists()


def test_instances_that_share_a_node_have_ports_of_their_own(tmp_path: Path) -> None:
    write(any_plan("several on a node"), ["slurm"], tmp_path, model="m")
    found = [sglang(words) for instance in range(4) for words in batch(tmp_path, 1, instance)]
    assert [one.port for one in found] == [30000, 30001, 30002, 30003]
    # SGLang takes the 6 ports above this one too, and one for each of an instance's GPUs
    assert [one.dist_init_addr for one in found] == ["n7:20000", "n7:20100", "n7:20200", "n7:20300"]
    assert not any(one.base_gpu_id for one in found)  # Slurm numbers the GPUs of a job from 0


def test_a_job_of_another_shape_does_not_start(tmp_path: Path) -> None:
    plan = any_plan("all nodes")
    write(plan, ["slurm"], tmp_path)
    assert len(batch(tmp_path, 2, MODEL="m")) == 2
    for nodes, env, words in (
        (3, {"MODEL": "m"}, "has 2 nodes"),
        (2, {}, "set MODEL"),
        (2, {"MODEL": ""}, "set MODEL"),
    ):
        with pytest.raises(RuntimeError, match=words):
            batch(tmp_path, nodes, **env)
    with pytest.raises(RuntimeError, match="a job of the array"):
        batch(tmp_path, 2, MODEL="m", SLURM_ARRAY_TASK_ID="")
    (tmp_path / "slurm" / "expert_location.json").unlink()
    with pytest.raises(RuntimeError, match="there is no expert_location"):
        batch(tmp_path, 2, MODEL="m")


# Schemas


@pytest.mark.parametrize("name", [*NAMES, *SMALL])
def test_manifests_pass_the_schemas(name: str, tmp_path: Path) -> None:
    plan = any_plan(name)
    forms = [form for form, found in refusals(plan, [one for one in ALL if one != "slurm"]).items() if not found]
    assert set(forms) >= {"lws", "dynamo", "ray"}
    for told in ({}, {"model": MODEL, "image": IMAGE}):
        write(plan, forms, tmp_path, **told)
        for form in forms:
            assert not invalid(tmp_path, form)
            assert_mounts_are_there(list(yaml.safe_load_all((tmp_path / form / FILES[form]).read_text())))


def assert_mounts_are_there(documents: list[dict[str, Any]]) -> None:
    """Every volume mounted is one of the pod, and every config map that one names is of the same file."""
    maps = {one["metadata"]["name"] for one in documents if one.get("kind") == "ConfigMap"}

    def walk(value: Any) -> None:
        if isinstance(value, dict) and "volumes" in value:
            volumes = {one["name"]: one for one in value["volumes"]}
            for container in [*value.get("containers", []), *filter(None, [value.get("mainContainer")])]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
            assert all(one["configMap"]["name"] in maps for one in volumes.values() if "configMap" in one)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(part)

    walk(documents)


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """A change of a document: a value at a path, or the path removed for None."""

    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        if value is None:
            del document[path[-1]]
        else:
            document[path[-1]] = value

    return change


GROUP = ("spec", "leaderWorkerTemplate")
WORKER = (*GROUP, "workerTemplate", "spec", "containers", 0)
APP = ("applications", 0)
BROKEN: list[tuple[str, str, Callable[[Any], None], str]] = [
    ("lws", "LeaderWorkerSet", put(*GROUP, "size", value="8"), "size: not of type integer"),
    ("lws", "LeaderWorkerSet", put(*GROUP, "size", value=True), "size: not of type integer"),
    ("lws", "LeaderWorkerSet", put(*GROUP, "size", value=0), "size: below 1"),
    ("lws", "LeaderWorkerSet", put(*GROUP, "workerTemplate", value=None), "workerTemplate: missing"),
    ("lws", "LeaderWorkerSet", put("spec", "replica", value=2), "replica: unknown"),
    ("lws", "LeaderWorkerSet", put(*GROUP, "restartPolicy", value="Always"), "restartPolicy: not one of"),
    ("lws", "LeaderWorkerSet", put("metadata", "name", value="A_b"), "name: not of the form"),
    ("lws", "LeaderWorkerSet", put("apiVersion", value="leaderworkerset.x-k8s.io/v2"), "apiVersion: not one of"),
    ("lws", "LeaderWorkerSet", put(*WORKER, "args", 0, value=8), "args[0]: not of type string"),
    (
        "lws",
        "LeaderWorkerSet",
        put(*WORKER, "resources", "limits", "nvidia.com/gpu", value="0"),
        "gpu: not of the form",
    ),
    ("lws", "ConfigMap", put("data", "x", value=1), "data.x: not of type string"),
    ("kserve", "LLMInferenceService", put("spec", "model", "uri", value=None), "uri: missing"),
    ("kserve", "LLMInferenceService", put("spec", "parallelism", "dataLocal", value=None), "dataLocal: missing"),
    (
        "kserve",
        "LLMInferenceService",
        put("spec", "parallelism", "expert", value="true"),
        "expert: not of type boolean",
    ),
    (
        "dynamo",
        "DynamoGraphDeployment",
        put("spec", "services", "worker", "multinode", "nodeCount", value=1),
        "below 2",
    ),
    ("dynamo", "DynamoGraphDeployment", put("spec", "services", "worker", "size", value=1), "worker.size: unknown"),
    ("ray", "", put(*APP, "import_path", value="ray.serve.llm:build"), "import_path: not one of"),
    ("ray", "", put(*APP, "args", "llm_config", "accelerator_type", value="H800"), "accelerator_type: not one of"),
    ("ray", "", put(*APP, "args", "llm_config", "engine_kwargs", "tp", value=1), "tp: unknown"),
]


@pytest.mark.parametrize(("form", "kind", "change", "words"), BROKEN)
def test_the_schemas_catch(form: str, kind: str, change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    write(plan_of("deepseek-v3-ep256"), [form], tmp_path)
    document = manifest(tmp_path, form, kind)
    broken = copy.deepcopy(document)
    change(broken)
    assert not list(faults(document, schema_of(document)))
    assert [fault for fault in faults(broken, schema_of(document)) if words in fault]


# Names, placeholders, large maps


ODD = [
    "on",
    "null",
    "0",
    "61 layers",
    "ÄÖ",
    "-",
    "A" * 100,
    "a" * 100,
    "a" * 99 + "b",
    "deepseek-v3",
    "DeepSeek-V3",
    "x.",
    "a--b",
]


def test_names_are_labels() -> None:
    found = [manifests.label(name) for name in ODD]
    assert len(set(found)) == len(ODD)
    assert all(re.fullmatch(NAME["pattern"], f"{label}-engine") and len(label) <= 24 for label in found)
    assert manifests.label("moe-61l-ep64-dp2") == "moe-61l-ep64-dp2"


@pytest.mark.parametrize("model", ["a\x7f\x85\u2028\u2029b", "\ufeff: #\U0001f600'\"", "$(MODEL) %s \\ '\t"])
def test_a_model_of_any_name_comes_through(model: str, tmp_path: Path) -> None:
    """YAML's readers refuse some characters and fold lines at others."""
    write(plan_of("deepseek-v3-ep256"), ["lws", "kserve", "dynamo", "ray"], tmp_path, model=model, image="i")
    container = manifest(tmp_path, "lws", "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["workerTemplate"]
    assert container["spec"]["containers"][0]["args"][1] == model.replace("$", "$$")
    assert manifest(tmp_path, "kserve", "LLMInferenceService")["spec"]["model"]["uri"] == model
    options = yaml.safe_load(data(tmp_path, "dynamo", "engine.yaml"))
    assert options["model-path"] == model
    [application] = manifest(tmp_path, "ray", "")["applications"]
    assert application["args"]["llm_config"]["model_loading_config"]["model_source"] == model


@pytest.mark.parametrize("name", ["on", "null", "Äb: {c} #d", "A" * 100])
def test_a_plan_of_any_name(name: str, tmp_path: Path) -> None:
    plan = planc.compile(small_spec(name=name, **SMALL["all nodes"]))
    write(plan, ALL, tmp_path, model="m", image="i")
    for form in ALL:
        if form == "slurm":
            assert len(batch(tmp_path, 2)) == 2
            continue
        assert not invalid(tmp_path, form)


def test_what_is_not_given_is_named(tmp_path: Path) -> None:
    """Kubernetes starts no container whose image is called `${IMAGE}`; engines find no model of that name."""
    plan = plan_of("moe-61l-ep64-dp2")
    write(plan, ALL, tmp_path)
    for form, words in (
        ("lws", ["IMAGE", "MODEL"]),
        ("dynamo", ["IMAGE", "MODEL"]),
        ("kserve", ["MODEL"]),
        ("ray", ["MODEL"]),
    ):
        text = (tmp_path / form / FILES[form]).read_text()
        commands = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        assert sorted(set(re.findall(r"\$\{(\w+)\}", commands))) == words
        notes = list(target(form).notes(planc.export.Job(plan)))
        assert any(all(f"${{{word}}}" in note for word in words) for note in notes) and f"# Note: {notes[-1]}" in text
        assert not any("${" in note for note in target(form).notes(planc.export.Job(plan, "m", "i")))


@pytest.mark.parametrize(
    ("model", "uri", "warned"),
    [
        ("deepseek-ai/DeepSeek-V3", "hf://deepseek-ai/DeepSeek-V3", False),
        ("pvc://models/v3", "pvc://models/v3", False),
        ("/models/v3", "/models/v3", True),
    ],
)
def test_kserve_is_told_where_the_model_is(model: str, uri: str, warned: bool, tmp_path: Path) -> None:
    plan = plan_of("deepseek-v3-ep256")
    write(plan, ["kserve"], tmp_path, model=model)
    assert manifest(tmp_path, "kserve", "LLMInferenceService")["spec"]["model"]["uri"] == uri
    notes = list(target("kserve").notes(planc.export.Job(plan, model)))
    assert any("no folder" in note for note in notes) == warned


@pytest.mark.parametrize(
    ("name", "gpu"), [("deepseek-v3-ep256", "H100"), ("qwen3-235b-a22b", "H200"), ("moe-61l-ep64-dp2", None)]
)
def test_ray_is_told_only_gpus_that_it_knows(name: str, gpu: str | None, tmp_path: Path) -> None:
    write(plan_of(name), ["ray"], tmp_path)
    [app] = manifest(tmp_path, "ray")["applications"]
    assert app["args"]["llm_config"].get("accelerator_type") == gpu


@pytest.mark.parametrize("form", ["lws", "dynamo"])
def test_a_map_too_large_for_a_config_map_is_a_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("moe-61l-ep64-dp2")
    write(plan, ["sglang", form], tmp_path)
    experts = (tmp_path / "sglang" / "expert_location.json").read_bytes()
    assert not (tmp_path / form / "expert_location.json").exists()
    monkeypatch.setattr(manifests, "MOST_BYTES", len(experts) - 1)
    write(plan, [form], tmp_path)
    assert (tmp_path / form / "expert_location.json").read_bytes() == experts
    text = (tmp_path / form / FILES[form]).read_text()
    assert not invalid(tmp_path, form)
    assert "physical_to_logical_map" not in text and "claimName: moe-61l-ep64-dp2-map" in text
    assert any("moe-61l-ep64-dp2-map" in note for note in target(form).notes(planc.export.Job(plan)))


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(planc.compile(planc.load_spec("qwen3-235b-a22b")), ALL, tmp_path / folder, model=MODEL, image=IMAGE)
    for form in ALL:
        assert (tmp_path / "a" / form / FILES[form]).read_bytes() == (tmp_path / "b" / form / FILES[form]).read_bytes()


# What is refused


RANKS = {"dp": 1, "pp": 1, "ep": 8, "tp": 1}
MIXED = [
    {"name": "a", "nodes": 1, "gpus_per_node": 4},
    {"name": "b", "nodes": 1, "gpus_per_node": 4, "gpu": "h100-sxm"},
]
TWO_STAGES = {"parallelism": {"dp": 1, "pp": 2, "ep": 4, "tp": 2}, "expert_rule": {"on_overflow": "rounds"}}
#: why -> the spec, forms that refuse it, words of the message, the change that the hint asks for
REFUSED: dict[str, tuple[dict[str, Any], list[str], str, dict[str, Any]]] = {
    "dense": ({"model": {"moe": None, "dense_mlp": {"intermediate": 64}}}, ALL, "no experts", {}),
    "idle": (COPIES | {"expert_rule": {"spares": "idle"}, "parallelism": RANKS}, ALL, "2 of 8 slots empty", COPIES),
    "a layer on each half": (
        {
            "model": {"moe": {"experts": 4, "top_k": 2, "intermediate": 32}},
            "expert_rule": {"scope": "model"},
            "parallelism": RANKS,
        },
        ALL,
        "different layers are on different GPUs",
        {"expert_rule": {"scope": "layer"}, "parallelism": RANKS | {"dp": 2, "ep": 4}},
    ),
    "other copies": (
        {"parallelism": RANKS, "expert_rule": {"slots_per_gpu": 2, "spares": "replicate"}},
        VLLM,
        "no numbering",
        {"expert_rule": {"slots_per_gpu": 1, "spares": "replicate"}},
    ),
    "shared expert": ({"parallelism": RANKS | {"expert_tp": 2}}, ALL, "2 GPUs share one", {"parallelism": RANKS}),
    "two kinds": (
        {"parallelism": RANKS, "cluster": {"groups": MIXED}},
        ALL,
        "small and h100-sxm",
        {"parallelism": RANKS},
    ),
    "two shapes": (
        {
            "parallelism": {"dp": 2, "pp": 1, "ep": 4, "tp": 1},
            "cluster": {"groups": [{"nodes": 1, "gpus_per_node": 4}, {"nodes": 2, "gpus_per_node": 2}]},
        },
        ALL,
        "1 nodes with 4 GPUs each, and another on 2 with 2",
        {
            "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 1},
            "cluster": {"groups": [{"nodes": 2, "gpus_per_node": 4}]},
        },
    ),
    "uneven": (
        {
            "parallelism": {"dp": 1, "pp": 1, "ep": 4, "tp": 1},
            "cluster": {"groups": [{"nodes": 1, "gpus_per_node": 3}, {"nodes": 1, "gpus_per_node": 1}]},
        },
        ALL,
        "1 GPUs on one node and 3",
        {"cluster": {"groups": [{"nodes": 1, "gpus_per_node": 4}]}},
    ),
    "stages of several TP groups": (TWO_STAGES, VLLM, "stages of 4 GPUs", {"parallelism": RANKS}),
    "stages": (SMALL["stages"], ["kserve"], "without expert parallelism", {"parallelism": RANKS}),
    "TP over nodes": (
        {
            "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 8},
            "cluster": {"groups": [{"nodes": 2, "gpus_per_node": 4, "nvlink_domain": 8}]},
        },
        ["kserve"],
        "a TP group of 8 GPUs spans nodes",
        {"parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 4}},
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_another_plan_is_refused_and_the_change_helps(why: str, tmp_path: Path) -> None:
    spec, forms, words, change = REFUSED[why]
    found = refusals(planc.compile(small_spec(**spec)), ALL)
    assert [form for form in ALL if found[form]] == [form for form in ALL if form in forms]
    for form in forms:
        assert all(fault.code == "PLN503" and fault.hint and "--option" not in fault.hint for fault in found[form])
        assert any(words in fault.message for fault in found[form]), found[form]
        assert all(fault.message.startswith(target(form).title) for fault in found[form])
    with pytest.raises(planc.PlancError):
        write(planc.compile(small_spec(**spec)), forms, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    if change:
        changed = {key: value for key, value in spec.items() if key not in ("cluster", *change)} | change
        after = refusals(planc.compile(small_spec(**changed)), forms)
        assert not any(after.values()), after


def test_nodes_of_a_domain_are_scheduled_together(tmp_path: Path) -> None:
    groups = [{"nodes": 2, "gpus_per_node": 4, "nvlink_domain": 8}]
    plan = planc.compile(small_spec(parallelism=RANKS, cluster={"groups": groups}))
    write(plan, ["lws"], tmp_path)
    assert "# Note: NVLink domains have several nodes" in (tmp_path / "lws" / "lws.yaml").read_text()
    assert not any("NVLink" in note for note in target("lws").notes(planc.export.Job(plan_of("deepseek-v3-ep256"))))
