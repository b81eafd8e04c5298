"""KServe: an LLMInferenceService, whose workers run vLLM data parallel with expert parallelism."""

from __future__ import annotations

import re
from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export import manifests, vllm
from planc.export.nodes import instances
from planc.export.slots import one_stage
from planc.export.target import Job, Target, refusal, text_of

#: vLLM's flags that KServe makes of `spec.parallelism`
FIELDS = ("--tensor-parallel-size", "--data-parallel-size", "--enable-expert-parallel")


def faults(job: Job) -> Iterator[Diagnostic]:
    """What an LLMInferenceService cannot be told."""
    plan, par, title = job.plan, job.plan.parallelism, TARGET.title
    found = list(manifests.vllm_faults(job, title))
    yield from found
    if par.pp > 1 and not any(fault.path == "parallelism.pp" for fault in found):
        message = "workers are either data parallel or pipeline stages, and stages start without expert parallelism"
        yield refusal(title, message, one_stage(plan), "parallelism.pp")
    if not found and instances(plan)[0].gpus % par.tp:
        gpus = instances(plan)[0].gpus
        message = f"a TP group of {par.tp} GPUs spans nodes, on each of which an instance has {gpus}"
        yield refusal(title, message, f"set parallelism.tp to a divisor of {gpus}", "parallelism.tp")


def notes(job: Job) -> Iterator[str]:
    """What vLLM and KServe do in their own way, and what is missing."""
    yield from vllm.notes(manifests.vllm_job(job))
    yield from manifests.machine_notes(job.plan)
    uri = model_uri(job.model)
    yield from manifests.placeholder_notes("", uri)
    if "://" not in uri and uri != manifests.MODEL:
        yield "KServe takes no folder of a machine: give --model a name on the hub, or hf://, s3://, pvc:// or oci://"


def model_uri(model: str) -> str:
    """Where KServe fetches a checkpoint from: a name on the hub as `hf://`, all else as it is."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        return f"hf://{model}"
    return model or manifests.MODEL


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The manifest, and how the checkpoint is relabelled where it has to be."""
    plan, par = job.plan, job.plan.parallelism
    flags = [pair for pair in vllm.arguments(manifests.vllm_job(job)) if pair[0] not in FIELDS]
    yield (
        "kserve.yaml",
        text_of(
            "kserve.yaml.j2",
            target=TARGET,
            notes=list(notes(job)),
            image=job.image,
            uri=model_uri(job.model),
            data=par.attention_dp,
            data_local=instances(plan)[0].gpus // par.tp,
            tensor=par.tp,
            flags=" ".join(word for pair in flags for word in pair if word),
            **manifests.shape(plan),
        ),
    )
    yield from vllm.recipe(manifests.vllm_job(job))


TARGET = Target(
    title="KServe",
    version="v1alpha1 (5c0493d), vLLM " + vllm.TARGET.version,
    says="what vllm says, TP groups inside nodes, and pods of alike nodes",
    lacks="what vllm lacks, pipeline stages, and which machine is which node of the plan",
    faults=faults,
    notes=notes,
    files=files,
)
