"""Kineto traces of the simulated step, a file per rank, as torch.profiler writes them and HolisticTraceAnalysis reads them."""

from __future__ import annotations

from collections.abc import Iterator

from planc.export.target import Job, Target, nothing, time_notes
from planc.schedule.trace import kineto, packed


def notes(job: Job) -> Iterator[str]:
    """What the reader would see otherwise than planc."""
    yield "HolisticTraceAnalysis rounds times to whole microseconds unless HTA_DISABLE_NS_ROUNDING=1 is set"
    yield from time_notes(job)


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """A trace for each rank; one is made when it is asked for, so that only one is held."""
    for rank in range(job.plan.parallelism.world_size):
        yield f"rank{rank}.json.gz", packed(kineto(job.timeline, rank))


TARGET = Target(
    title="HolisticTraceAnalysis",
    version="0.5.0",
    says="every op of the simulated step on the streams of every rank, with its tensors' sizes in messages",
    lacks="who reads what: a trace has times and launches, and no edges",
    faults=nothing,
    notes=notes,
    files=files,
)
