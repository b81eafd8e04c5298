"""NCCL collectives among the ranks that torchrun started, one process a GPU.

Calls run one after the other in a CUDA graph on every rank; a sample is the mean of a replay on the slowest rank. How
many calls and replays is a function of the size alone, so that all ranks do the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.device import Cuda
from benchmarks.gpu.grid import Row
from benchmarks.gpu.timing import REPLAYS, Times, times_of


def world() -> tuple[int, int, int]:
    """(rank, ranks, GPU of this process), as torchrun tells: (0, 1, 0) without it."""
    found = os.environ.get
    return int(found("RANK", "0")), int(found("WORLD_SIZE", "1")), int(found("LOCAL_RANK", "0"))


def calls_of(size: float) -> int:
    """Calls of one replay for a message of ``size`` bytes."""
    return 100 if size <= 1 << 20 else 20 if size <= 1 << 26 else 5


def measure(device: Cuda, rows: list[Row]) -> Iterator[tuple[Row, Times, str]]:
    """Every row with its times and what ran; on ranks other than 0 for nothing. Collective: all ranks call it."""
    torch = device.torch
    dist = torch.distributed
    rank, ranks, _ = world()
    dist.init_process_group("nccl", device_id=torch.device("cuda", device.index))
    try:
        groups = {count: dist.new_group(list(range(count))) for count in (2, 4, 8) if count <= ranks}
        software = f"NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"
        for row in rows:
            group = groups[row["ranks"]]
            if rank < row["ranks"]:
                yield row, _time(device, row, group), software
            dist.barrier()
    finally:
        dist.destroy_process_group()


def _time(device: Cuda, row: Row, group: Any) -> Times:
    calls = calls_of(row["bytes"])
    run = _call(device, row, group)
    for _ in range(5):
        run()
    device.torch.cuda.synchronize()
    replay, how = device.capture([run] * calls)
    device.samples(replay, 5)
    taken = [seconds / calls for seconds in device.samples(replay, REPLAYS)]
    samples = device.torch.tensor(taken, device="cuda")
    device.torch.distributed.all_reduce(samples, op=device.torch.distributed.ReduceOp.MAX, group=group)
    found = samples.tolist()
    # the same buffers again and again: a collective reads what its producer just wrote
    return times_of(found, calls, cold=False, how=how)


def _call(device: Cuda, row: Row, group: Any) -> Callable[[], Any]:
    dist, kind, ranks = device.torch.distributed, row["kind"], row["ranks"]
    whole = device.take(row["bytes"] // 2).clone()
    part = device.take(row["bytes"] // 2 // ranks).clone()
    if kind == "all_reduce":  # in place, so that sums overflow in time, which moves as many bytes
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    other = device.torch.empty_like(whole)
    return lambda: dist.all_to_all_single(other, whole, group=group)
