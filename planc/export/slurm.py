"""Slurm: a batch script for SGLang, an array of jobs with one instance each."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export import manifests, sglang
from planc.export.target import Job, Target, text_of


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang under Slurm cannot be told."""
    yield from manifests.sglang_faults(job, TARGET.title)


def notes(job: Job) -> Iterator[str]:
    """What SGLang and Slurm do in their own way."""
    yield from sglang.notes(job)
    yield from manifests.machine_notes(job.plan)
    if job.image:
        yield "the image is not written: the script runs SGLang of the job's own environment"


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map and the script, which needs nothing else: SGLang's own launch script counts GPUs and ports of a whole node."""
    plan = job.plan
    yield sglang.MAP, sglang.expert_map(job.plan)
    yield (
        "launch.sbatch",
        text_of(
            "slurm.sh.j2",
            target=TARGET,
            notes=list(notes(job)),
            map=sglang.MAP,
            model=job.model,
            arguments=sglang.arguments(plan),
            variables=sglang.variables(plan),
            **manifests.shape(plan),
        ),
    )


TARGET = Target(
    title="Slurm",
    version="sbatch, SGLang " + sglang.TARGET.version,
    says="what sglang says, and jobs on alike nodes: one of an array for each instance",
    lacks="what sglang lacks, and which machine is which node of the plan",
    faults=faults,
    notes=notes,
    files=files,
)
