"""Ray Serve LLM: an application of vLLM whose data-parallel group is one instance."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export import manifests
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
    yield from manifests.vllm_notes(job.plan)
    yield "Ray packs an instance on the nodes that have GPUs free; free nodes of the plan's size make it the plan's"
    if gpu not in ACCELERATORS:
        yield f"Ray has no name for {gpu}, so that it may take any GPU of the cluster"
    if job.image:
        yield "the image is not written: Ray's own nodes start with it"
    yield from manifests.placeholder_notes("", job.model or manifests.MODEL)


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The configuration for `serve run`."""
    plan, par = job.plan, job.plan.parallelism
    sizes = {"tensor_parallel_size": par.tp, "pipeline_parallel_size": par.pp, "data_parallel_size": par.attention_dp}
    engine = {name: size for name, size in sizes.items() if size > 1}
    yield (
        "serve.yaml",
        text_of(
            "ray.yaml.j2",
            target=TARGET,
            notes=list(notes(job)),
            parallel=par.attention_dp > 1,
            accelerator=ACCELERATORS.get(plan.spec.cluster.groups[0].gpu.name),
            model=job.model or manifests.MODEL,
            engine=engine | {"enable_expert_parallel": True} | manifests.vllm_experts(plan),
            **manifests.shape(plan),
        ),
    )


TARGET = Target(
    title="Ray Serve LLM",
    version="2.60.0",
    says="one-to-one placements in the order of experts; instances on alike GPUs",
    lacks="other placements, copies, stages of several TP groups, nodes",
    faults=faults,
    notes=notes,
    files=files,
)
