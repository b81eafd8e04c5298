"""TensorRT-LLM: the static map of its MoE load balancer, LLM API options that use it, and a launch script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planc.diagnostics import Diagnostic
from planc.export.nodes import instances, node_faults, of_amd
from planc.export.slots import redundant, slot_faults, slot_tables
from planc.export.step import group_tokens
from planc.export.target import Job, Target, refusal, text_of
from planc.placement import step_tokens
from planc.verify import VerifiedPlan

MAP, OPTIONS = "moe_load_balancer.yaml", "llm_api_options.yaml"


def faults(job: Job) -> Iterator[Diagnostic]:
    """What TensorRT-LLM cannot be told."""
    plan, par, title = job.plan, job.plan.parallelism, TARGET.title
    yield from slot_faults(plan, title)
    yield from node_faults(plan, title)
    if of_amd(plan):
        yield refusal(title, "it runs on NVIDIA's GPUs only", "export sglang or vllm", "cluster.groups")
    if par.tp > 1:
        message = f"WIDEEP exchanges tokens all to all between GPUs that attend for themselves, and here {par.tp} share attention"
        yield refusal(
            title, message, "set parallelism.tp: 1, where attention and KV cache fit a GPU whole", "parallelism.tp"
        )


def notes(job: Job) -> Iterator[str]:
    """What TensorRT-LLM does in its own way."""
    plan = job.plan
    if plan.spec.workload.micro_batches > 1:
        yield "it does not overlap two micro-batches in a step; the plan's prediction does"
    if _leaves_nvlink(plan):
        yield "between NVLink domains it takes DeepEP where that is installed and knows the number of nodes, else it gathers all tokens"
    if redundant(plan):
        yield "an expert's copies share its tokens in the engine's own way"


def _leaves_nvlink(plan: VerifiedPlan) -> bool:
    """Whether GPUs of one EP group lie in several NVLink domains."""
    domains = plan.spec.cluster.domain_of_rank[: plan.parallelism.world_size].reshape(-1, plan.parallelism.ep)
    return bool((domains != domains[:, :1]).any())


def options(plan: VerifiedPlan) -> dict[str, Any]:
    """Fields of TorchLlmArgs for one instance: how the plan splits the model, and the sizes that it has memory for."""
    par, work = plan.parallelism, plan.spec.workload
    found: dict[str, Any] = {
        "tensor_parallel_size": par.ep,
        "pipeline_parallel_size": par.pp,
        "moe_expert_parallel_size": par.ep,
        "enable_attention_dp": True,
    }
    if par.pp > 1:
        found["pp_partition"] = list(par.stage_sizes)
    found["max_batch_size"] = step_tokens(plan.spec, par).sequences
    found["max_seq_len"] = work.context
    if work.phase == "prefill":
        found["max_num_tokens"] = group_tokens(plan)
        found["enable_chunked_prefill"] = found["max_num_tokens"] < work.isl
    if plan.spec.model.dtype_of("kv_cache") == "fp8":
        found["kv_cache_config"] = {"dtype": "fp8"}
    found["moe_config"] = {"backend": "WIDEEP", "load_balancer": MAP}
    return found


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map, the options and the script."""
    plan = job.plan
    tables = slot_tables(plan)
    shared = {"name": plan.spec.name, "target": TARGET}
    slots = next(iter(tables.values())).size
    rows = {layer: table.reshape(-1).tolist() for layer, table in sorted(tables.items())}
    yield MAP, text_of("trtllm_map.yaml.j2", rows=rows, slots=slots, **shared)
    yield OPTIONS, text_of("trtllm_options.yaml.j2", options=options(plan), notes=list(notes(job)), **shared)
    yield (
        "launch.sh",
        text_of(
            "trtllm.sh.j2",
            notes=list(notes(job)),
            model=job.model,
            instances=instances(plan),
            options=OPTIONS,
            map=MAP,
            deepep=_leaves_nvlink(plan),
            **shared,
        ),
    )


TARGET = Target(
    title="TensorRT-LLM",
    version="1.2",
    says="any placement with as many experts of every MoE layer on each EP rank, copies included, attention by data parallelism",
    lacks="empty slots, layers on different GPUs of one EP group, experts shared by several GPUs, TP groups in attention",
    faults=faults,
    notes=notes,
    files=files,
)
