"""Measure every op of the grid, and write a rows file."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu import collectives, grid, operations
from benchmarks.gpu.device import Cuda, NoGpu, TooLarge, require
from benchmarks.gpu.grid import Row
from benchmarks.gpu.rows import write_facts, write_row
from benchmarks.gpu.timing import Times, time_calls
from planc.spec.load import load_gpu

ROW_SECONDS = 0.35  #: what a row takes, about: capture, warm-up and replays


def measure(gpu: str, output: Path, families: tuple[str, ...] = (), every: int = 1, plain: bool = False) -> None:
    """Measure on this machine's GPU and write ``output``; rows gather in ``output``.part, which stays where a run is cut
    short. ``every`` n: only each n-th op. Under torchrun all ranks call this; rank 0 writes. Raises NoGpu, PlancError."""
    part = load_gpu(gpu)
    torch = require()
    rank, ranks, index = collectives.world()
    device = Cuda(torch, index)
    _warn_of_another_gpu(part.name, float(part.memory), device)
    device.fill("bf16")
    together = grid.thinned(grid.collectives(ranks, families), every) if ranks > 1 else []
    alone = grid.thinned(grid.rows(families), every) if rank == 0 else []
    if rank == 0:
        if not together + alone:
            raise NoGpu("no op to measure: collectives need several GPUs, under torchrun --nproc-per-node N")
        minutes = (len(together) + len(alone)) * ROW_SECONDS / 60
        _say(f"{len(together) + len(alone)} ops, about {minutes:.0f} min")
    facts = {"gpu": part.name, "date": datetime.datetime.now(datetime.UTC).date().isoformat()} | device.facts()
    facts |= _ceilings(device)
    facts["data"] = "normally distributed random numbers, the next slice of a large pool for every call of a graph"
    unfinished = output.with_name(output.name + ".part")
    with open(unfinished if rank == 0 else os.devnull, "w", encoding="utf-8") as out:
        write_facts(out, facts)
        try:
            if together:
                for row, times, software in collectives.measure(device, together):
                    _write(out, device, row, times, software)
            skipped = _alone(out, device, alone, plain)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise NoGpu(f"the GPU no longer answers: {reason}\nrows so far are in {unfinished}") from error
    if rank == 0:
        os.replace(unfinished, output)
        for reason, count in sorted(skipped.items()):
            _say(f"left out {count}: {reason}")
        _say(f"wrote {output}")


def _alone(out: TextIO, device: Cuda, rows: Iterable[Row], plain: bool) -> dict[str, int]:
    """Measure ops of one GPU; what could not run is counted by reason, and the others go on."""
    skipped: dict[str, int] = {}
    shown = time.monotonic()
    for number, row in enumerate(rows):
        device.fill(row["dtype"])
        try:
            times, software = _one(device, row, plain)
        except (RuntimeError, TooLarge, ImportError, AttributeError, AssertionError, TypeError, ValueError) as error:
            text = str(error).splitlines()[0][:150] if str(error) else ""
            reason = f"{row['kind']} {row['dtype']}: {type(error).__name__}: {text}"
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            _write(out, device, row, times, software)
        device.release()
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            _say(f"{number + 1} ops measured, now {row['kind']} {row['dtype']}")
    return skipped


def _one(device: Cuda, row: Row, plain: bool) -> tuple[Times, str]:
    """Time one op. Its tensors go when this returns."""
    make, software = operations.build(device, row, plain)
    return time_calls(device, make, grid.bytes_of(row)), software


def _write(out: TextIO, device: Cuda, row: Row, times: Times, software: str) -> None:
    """One row. The clock is read right after its replays."""
    values: dict[str, Any] = dict(row)
    for name, seconds in (("us", times.seconds), ("us_p10", times.p10), ("us_p90", times.p90)):
        values[name] = f"{seconds * 1e6:.5g}"
    values |= {"calls": times.calls, "cold": "yes" if times.cold else "no", "timing": times.how}
    values |= {"sm_mhz": device.clock() or "", "software": software}
    write_row(out, values)
    out.flush()


def _ceilings(device: Cuda) -> dict[str, str]:
    """What no op goes beyond: bandwidth of a copy, and the time of an empty kernel."""
    launches = ", ".join(f"{seconds * 1e6:.2f} us ({how})" for how, seconds in device.launch_seconds().items())
    copy = f"{device.copy_bandwidth() / 1e9:.0f} GB/s, read plus written"
    device.release()
    return {"copy bandwidth": copy, "empty kernel": launches}


def _warn_of_another_gpu(name: str, memory: float, device: Cuda) -> None:
    """Whoever measures one GPU under the name of another gets a fit of neither."""
    found = float(device.properties.total_memory)
    if not 0.85 < found / memory < 1.15:
        _say(
            f"warning: {device.properties.name} has {found / 1e9:.0f} GB where {name} has {memory / 1e9:.0f} GB: "
            "is --gpu-name right?"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
