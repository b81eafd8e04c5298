"""vLLM-Ascend: a static expert map, the experts of every device, and a launch script."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export.nodes import instances, node_faults
from planc.export.slots import one_stage, redundant, slot_faults, slot_tables
from planc.export.step import gating_notes, group_tokens
from planc.export.target import Job, Target, refusal, text_of
from planc.verify import VerifiedPlan

MAP = "expert_map.json"


def faults(job: Job) -> Iterator[Diagnostic]:
    """What vLLM-Ascend cannot be told."""
    plan, par, title = job.plan, job.plan.parallelism, TARGET.title
    yield from slot_faults(plan, title)
    on_nodes = list(node_faults(plan, title))
    yield from on_nodes
    if par.pp > 1:
        message = "every pipeline stage counts its MoE layers from 0, and would read the map of the first stage"
        yield refusal(title, message, one_stage(plan), "parallelism.pp")
        return
    here = next((one.gpus for one in instances(plan) if one.gpus % par.tp), 0) if not on_nodes else 0
    if here:
        message = f"a data-parallel rank is on one node, and TP groups of {par.tp} GPUs do not divide the {here} there"
        yield refusal(title, message, f"set parallelism.tp to a divisor of {here}", "parallelism.tp")


def notes(job: Job) -> Iterator[str]:
    """What vLLM-Ascend does in its own way."""
    plan = job.plan
    gpu = plan.spec.cluster.groups[0].gpu.name
    if not re.search("ascend|910", gpu, re.IGNORECASE):
        yield f"it serves on Ascend NPUs, and the plan's devices are {gpu}"
    if plan.spec.model.dtype_of("kv_cache") == "fp8":
        yield "the KV cache is fp8 in the plan, which is not asked for"
    yield "the engine chooses how tokens are exchanged by the machine and the batch; the map is read when it starts"
    yield from gating_notes(plan)
    if redundant(plan):
        yield "of an expert's copies a rank uses one, by its number"
    if plan.spec.workload.micro_batches > 1:
        yield f"the {plan.spec.workload.micro_batches} micro-batches of the plan are not asked for"


def map_text(plan: VerifiedPlan) -> str:
    """The map: MoE layers and devices are counted from 0, in order, as the engine reads them."""
    layers = []
    for number, (_, table) in enumerate(sorted(slot_tables(plan).items())):
        devices = [{"device_id": rank, "device_expert": held} for rank, held in enumerate(table.tolist())]
        layers.append(json.dumps({"layer_id": number, "device_count": len(table), "device_list": devices}))
    return f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n' + ",\n".join(layers) + "\n]}\n"


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map and the script."""
    plan, par = job.plan, job.plan.parallelism
    yield MAP, map_text(plan).encode()
    yield (
        "launch.sh",
        text_of(
            "vllm_ascend.sh.j2",
            name=plan.spec.name,
            target=TARGET,
            model=job.model,
            map=MAP,
            tp=par.tp,
            data_parallel=par.attention_dp,
            limit="--max-num-seqs" if plan.spec.workload.phase == "decode" else "--max-num-batched-tokens",
            tokens=group_tokens(plan),
            instances=instances(plan),
            notes=list(notes(job)),
        ),
    )


TARGET = Target(
    title="vLLM-Ascend",
    version="0.23.0.post1",
    says="any placement with as many experts of every MoE layer on each EP rank, copies included",
    lacks="empty slots, pipeline stages, layers on different GPUs of one EP group, experts shared by several GPUs",
    faults=faults,
    notes=notes,
    files=files,
)
