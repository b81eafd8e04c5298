"""Reduced forms of the schemas that orchestrators check manifests by, with the fields that planc writes and no others, and a
checker of them. Our own reduction of:

- kubernetes-sigs/lws `config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml` at 83ba21e907f84f5b713a83bd1eb39a976fde2bbc
- kserve/kserve `config/crd/full/serving.kserve.io_llminferenceservices.yaml` at 5c0493da0c026731f2e07eac846eb2c45d3b884c, with
  the rules of `pkg/apis/serving/v1alpha1/llm_inference_service_validation.go` at 029a167b2dfc1c2d54a245dff253fd018ec1cad1
- ai-dynamo/dynamo `deploy/operator/config/crd/bases/nvidia.com_dynamographdeployments.yaml` at
  29a131e8e8f2fb69e2d137bc229b36c34ca44a90 and `deploy/operator/api/v1alpha1/` at 00686d64463dceb8718974a481f643cc03dd469e
- ray 2.60.0 `ray/serve/schema.py`, `ray/llm/_internal/serve/core/configs/llm_config.py` and `ray/util/accelerators/accelerators.py`
- pods and config maps: the Kubernetes API, v1
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def faults(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    """What of a value a schema does not allow, as `path: why`. Fields that a schema does not name are faults."""
    here = path or "."
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool)):
        yield f"{here}: not of type {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{here}: not one of {schema['enum']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{here}: below {schema['minimum']}"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        yield f"{here}: not of the form {schema['pattern']}"
    if kind == "array":
        for index, item in enumerate(value):
            yield from faults(item, schema["items"], f"{path}[{index}]")
    if kind == "object":
        known: dict[str, Schema] = schema.get("properties", {})
        yield from (f"{path}.{key}: missing" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            if key in known or "values" in schema:
                yield from faults(item, known.get(key, schema.get("values")), f"{path}.{key}")
            else:
                yield f"{path}.{key}: unknown"


def mapping(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split()}


def named(apiVersion: str, kind: str, **parts: Schema) -> Schema:
    metadata = mapping("name", name=NAME)
    return mapping(
        " ".join(("apiVersion", "kind", "metadata", *parts)),
        apiVersion={"type": "string", "enum": [apiVersion]},
        kind={"type": "string", "enum": [kind]},
        metadata=metadata,
        **parts,
    )


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


TEXT: Schema = {"type": "string"}
#: RFC 1123 labels of 63 characters, with a letter first, as names of services are: RFC 1035
NAME: Schema = {"type": "string", "pattern": r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SIZE: Schema = {"type": "integer", "minimum": 1}
FLAG: Schema = {"type": "boolean"}
#: of a resource that is counted, and of memory
WHOLE: Schema = {"type": "string", "pattern": r"[1-9]\d*"}
BYTES: Schema = {"type": "string", "pattern": r"[1-9]\d*(Mi|Gi|Ti)"}

VOLUMES = listed(
    mapping(
        "name",
        name=NAME,
        configMap=mapping("name", name=NAME),
        persistentVolumeClaim=mapping("claimName", claimName=NAME, readOnly=FLAG),
        emptyDir=mapping(medium={"type": "string", "enum": ["", "Memory"]}, sizeLimit=BYTES),
    )
)
CONTAINER = mapping(
    "name",
    name=NAME,
    image=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    env=listed(mapping("name", name=TEXT, value=TEXT)),
    ports=listed(mapping("containerPort", name=NAME, containerPort=SIZE)),
    readinessProbe=mapping(httpGet=mapping("port", path=TEXT, port=SIZE), periodSeconds=SIZE),
    resources=mapping(limits=mapping(**{"nvidia.com/gpu": WHOLE})),
    volumeMounts=listed(mapping("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)
POD = mapping("containers", containers=listed(CONTAINER), volumes=VOLUMES)

CONFIG_MAP = named("v1", "ConfigMap", data={"type": "object", "values": TEXT})
LEADER_WORKER_SET = named(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    spec=mapping(
        "leaderWorkerTemplate",
        replicas=COUNT,
        leaderWorkerTemplate=mapping(
            "workerTemplate",
            size=SIZE,
            restartPolicy={"type": "string", "enum": ["Default", "RecreateGroupOnPodRestart", "None"]},
            leaderTemplate=mapping(spec=POD),
            workerTemplate=mapping(spec=POD),
        ),
    ),
)
LLM_INFERENCE_SERVICE = named(
    "serving.kserve.io/v1alpha1",
    "LLMInferenceService",
    spec=mapping(
        "model",
        model=mapping("uri", uri=TEXT, name=TEXT),
        replicas=COUNT,
        parallelism=mapping("data dataLocal", data=SIZE, dataLocal=SIZE, tensor=SIZE, expert=FLAG),
        router=mapping(route=mapping(), gateway=mapping(), scheduler=mapping()),
        template=POD,
        worker=POD,
    ),
)
DYNAMO_GRAPH = named(
    "nvidia.com/v1alpha1",
    "DynamoGraphDeployment",
    spec=mapping(
        backendFramework={"type": "string", "enum": ["sglang", "vllm", "trtllm"]},
        services={
            "type": "object",
            "values": mapping(
                componentType={"type": "string", "enum": ["frontend", "worker"]},
                replicas=COUNT,
                multinode=mapping("nodeCount", nodeCount={"type": "integer", "minimum": 2}),
                resources=mapping(limits=mapping(gpu=WHOLE)),
                sharedMemory=mapping(size=BYTES),
                extraPodSpec=mapping(mainContainer=CONTAINER, volumes=VOLUMES),
            ),
        },
    ),
)
LLM_CONFIG = mapping(
    "model_loading_config",
    model_loading_config=mapping("model_id", model_id=TEXT, model_source=TEXT),
    accelerator_type={
        "type": "string",
        "enum": [
            "A100",
            "A100-40G",
            "A100-80G",
            "H20",
            "H100",
            "H200",
            "B200",
            "B300",
            "GB200",
            "GB300",
            "AMD-Instinct-MI300X-OAM",
        ],
    },
    runtime_env=mapping(env_vars={"type": "object", "values": TEXT}),
    deployment_config=mapping(num_replicas=SIZE),
    engine_kwargs=mapping(
        tensor_parallel_size=SIZE,
        pipeline_parallel_size=SIZE,
        data_parallel_size=SIZE,
        enable_expert_parallel=FLAG,
        all2all_backend={"type": "string", "enum": ["deepep_high_throughput", "deepep_low_latency"]},
        expert_placement_strategy={"type": "string", "enum": ["linear", "round_robin"]},
        max_num_seqs=SIZE,
        max_num_batched_tokens=SIZE,
        kv_cache_dtype={"type": "string", "enum": ["auto", "fp8"]},
        enable_dbo=FLAG,
        ubatch_size=SIZE,
        dbo_decode_token_threshold=SIZE,
        dbo_prefill_token_threshold=SIZE,
        enable_eplb=FLAG,
        eplb_config=mapping(num_redundant_experts=SIZE, step_interval=SIZE),
    ),
)
RAY_SERVE = mapping(
    "applications",
    applications=listed(
        mapping(
            "import_path",
            name=NAME,
            route_prefix={"type": "string", "pattern": "/.*"},
            import_path={
                "type": "string",
                "enum": ["ray.serve.llm:build_openai_app", "ray.serve.llm:build_dp_openai_app"],
            },
            args=mapping(llm_config=LLM_CONFIG, llm_configs=listed(LLM_CONFIG)),
        )
    ),
)
BY_KIND = {
    "ConfigMap": CONFIG_MAP,
    "LeaderWorkerSet": LEADER_WORKER_SET,
    "LLMInferenceService": LLM_INFERENCE_SERVICE,
    "DynamoGraphDeployment": DYNAMO_GRAPH,
}


def schema_of(document: dict[str, Any]) -> Schema:
    """The schema of a manifest, or Ray's."""
    return BY_KIND[document["kind"]] if "kind" in document else RAY_SERVE
