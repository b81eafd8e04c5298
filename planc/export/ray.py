"""Ray Serve LLM: an application of vLLM whose data-parallel group is one instance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from planc.diagnostics import Diagnostic
from planc.export import manifests, vllm
from planc.export.target import Job, Target, text_of

#: GPU -> Ray's name of it (ray/util/accelerators/accelerators.py); of others Ray is asked for any
ACCELERATORS = {
    "a100-sxm-80gb": "A100",
    "b200-sxm": "B200",
    "gb200": "GB200",
    "h100-sxm": "H100",
    "h200-sxm": "H200",
    "mi300x": "AMD-Instinct-MI300X-OAM",
}


def faults(job: Job) -> Iterator[Diagnostic]:
    """What Ray Serve LLM cannot be told."""
    yield from manifests.vllm_faults(job, TARGET.title)


def notes(job: Job) -> Iterator[str]:
    """What vLLM and Ray do in their own way, and what is missing."""
    gpu = job.plan.spec.cluster.groups[0].gpu.name
    yield from vllm.notes(manifests.vllm_job(job))
    yield "Ray packs an instance on the nodes that have GPUs free; free nodes of the plan's size make it the plan's"
    if gpu not in ACCELERATORS:
        yield f"Ray has no name for {gpu}, so that it may take any GPU of the cluster"
    if job.image:
        yield "the image is not written: Ray's own nodes start with it"
    yield from manifests.placeholder_notes("", job.model or manifests.MODEL)


def engine_kwargs(job: Job) -> dict[str, Any]:
    """vLLM's arguments by their names in Python."""
    found: dict[str, Any] = {}
    for flag, value in vllm.arguments(manifests.vllm_job(job)):
        number_or_object = value.isdecimal() or value.startswith("'{")  # an object is quoted for a shell
        found[flag[2:].replace("-", "_")] = json.loads(value.strip("'")) if number_or_object else value or True
    return found


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The configuration for `serve run`, and how the checkpoint is relabelled where it has to be."""
    plan = job.plan
    yield (
        "serve.yaml",
        text_of(
            "ray.yaml.j2",
            target=TARGET,
            notes=list(notes(job)),
            parallel=plan.parallelism.attention_dp > 1,
            accelerator=ACCELERATORS.get(plan.spec.cluster.groups[0].gpu.name),
            model=job.model or manifests.MODEL,
            engine=engine_kwargs(job),
            variables=vllm.variables(plan),
            **manifests.shape(plan),
        ),
    )
    yield from vllm.recipe(manifests.vllm_job(job))


TARGET = Target(
    title="Ray Serve LLM",
    version="2.60.0, vLLM " + vllm.TARGET.version,
    says="what vllm says, and instances on alike GPUs",
    lacks="what vllm lacks, and nodes, which Ray picks",
    faults=faults,
    notes=notes,
    files=files,
)
