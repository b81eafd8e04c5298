"""NVIDIA Dynamo: a graph of a frontend and one service of SGLang, whose replicas are the instances."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export import manifests, sglang
from planc.export.target import Job, Target, text_of


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang under Dynamo cannot be told."""
    yield from manifests.sglang_faults(job, TARGET.title)


def notes(job: Job) -> Iterator[str]:
    """What SGLang and Kubernetes do in their own way, and what is missing."""
    yield from manifests.sglang_pods(job)[1]


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The manifest, and the map where it is too large to be part of it. SGLang's options are in a file of a ConfigMap, not
    in `args`, which the operator may pass through a shell."""
    values, _, beside = manifests.sglang_pods(job)
    # the SGLang of Dynamo's images knows attention DP by its older name, which 0.5.23 takes too
    values["options"] = [(older(flag), value) for flag, value in manifests.sglang_options(job.plan)]
    values["attention_dp"] = job.plan.parallelism.attention_dp
    yield "dynamo.yaml", text_of("dynamo.yaml.j2", target=TARGET, **values)
    yield from beside


def older(flag: str) -> str:
    """A flag of SGLang 0.5.23 as SGLang 0.5.21 has it."""
    return "--dp-size" if flag == "--attn-dp-size" else flag


TARGET = Target(
    title="NVIDIA Dynamo",
    version="v1alpha1 (29a131e), SGLang 0.5.21 to " + sglang.TARGET.version,
    says="what sglang says, and pods of alike nodes: one replica of a service for each instance",
    lacks="what sglang lacks, which machine is which node of the plan, prefill and decode in one graph",
    faults=faults,
    notes=notes,
    files=files,
)
