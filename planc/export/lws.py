"""LeaderWorkerSet: a group of pods for every instance of SGLang, one pod a node."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export import manifests, sglang
from planc.export.target import Job, Target, text_of


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang in a LeaderWorkerSet cannot be told."""
    yield from manifests.sglang_faults(job, TARGET.title)


def notes(job: Job) -> Iterator[str]:
    """What SGLang and Kubernetes do in their own way, and what is missing."""
    yield from manifests.sglang_pods(job)[1]


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The manifest, and the map where it is too large to be part of it."""
    values, _, beside = manifests.sglang_pods(job)
    values["model"] = manifests.verbatim(job.model or manifests.MODEL)
    yield "lws.yaml", text_of("lws.yaml.j2", target=TARGET, **values)
    yield from beside


TARGET = Target(
    title="LeaderWorkerSet",
    version="v1 (83ba21e), SGLang " + sglang.TARGET.version,
    says="what sglang says, and pods of alike nodes: one group for each instance",
    lacks="what sglang lacks, and which machine is which node of the plan",
    faults=faults,
    notes=notes,
    files=files,
)
