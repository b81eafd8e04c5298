"""A simulated step as profiler traces: Kineto's JSON of one rank, as torch.profiler writes it, and one Chrome trace of many.

An op is a kernel on a stream of every rank that it takes time on; what only marks a place (input, output, receive) is an
instant event. Communication kernels have NCCL's names, since trace tools tell communication by them. Nothing in a trace is
of the wall clock or of the host: the step begins at 0, where all kernels are launched, as a CUDA graph is. docs/traces.md
has the fields.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from planc.cost.step import class_of
from planc.diagnostics import Diagnostic, PlancError
from planc.graph import OpBlock
from planc.graph.types import ROWS, TensorType
from planc.schedule.order import on_communication_stream, takes_time
from planc.schedule.timeline import Stretch, Timeline
from planc.spec.fields import DTYPE_BYTES

MAX_KERNELS = 1_000_000  #: of one Chrome trace; what a browser still opens

_TICK = 2.0**-20  #: µs; times are whole ticks, so that in binary floating point ts + dur is exact up to 2 hours
_STREAM = 7  #: id of the first compute stream, which is PyTorch's; communication streams follow the last of them
_HOST = 4096  #: process id of the host in a rank's trace, above any device's
_FIRST = (
    100_000  #: before the first correlation id: HTA keeps numbers of events in an integer just wide enough for these
)

#: names of communication kernels: HTA knows them by `nccl…Kernel`
_NCCL = {
    "all_reduce": "ncclDevKernel_AllReduce",
    "reduce_scatter": "ncclDevKernel_ReduceScatter",
    "all_gather": "ncclDevKernel_AllGather",
    "broadcast": "ncclDevKernel_Broadcast",
    "input_split": "ncclDevKernel_Scatter",
    "dispatch": "ncclDevKernel_AllToAll_dispatch",
    "combine": "ncclDevKernel_AllToAll_combine",
    "pp_send": "ncclDevKernel_SendRecv",
}
#: names of the collectives, as c10d records them
_COLLECTIVE = {
    "all_reduce": "allreduce",
    "reduce_scatter": "_reduce_scatter_base",
    "all_gather": "_allgather_base",
    "broadcast": "broadcast",
    "input_split": "scatter",
    "dispatch": "all_to_allv",
    "combine": "all_to_allv",
    "pp_send": "send",
}
_DTYPE = {"fp8": "Float8_e4m3fn", "bf16": "BFloat16", "fp16": "Half", "fp32": "Float", "int32": "Int"}

Event = dict[str, Any]


def kineto(timeline: Timeline, rank: int) -> dict[str, Any]:
    """The trace of one rank, ready for JSON: one step, its kernels by stream, and their launches. Times in µs.

    Raises IndexError for a rank outside the plan.
    """
    world = timeline.plan.blocks.world_size
    if not 0 <= rank < world:
        raise IndexError(f"rank {rank} is outside the plan: there are 0 to {world - 1}")
    cluster = timeline.plan.spec.cluster
    device, gpu = int(cluster.local_of_rank[rank]), cluster.groups[int(cluster.group_of_rank[rank])].gpu
    events = [
        *_named(_HOST, f"host of rank {rank}", 0, {_HOST: "host"}),
        *_named(device, f"GPU {device} of rank {rank}", 1, _stream_names(timeline)),
        _complete("user_annotation", "ProfilerStep#0", _HOST, _HOST, 0.0, float(_us(timeline.step)), {}),
    ]
    kernels = list(_kernels(timeline, rank, device, _critical(timeline)))
    for kernel in kernels:
        linked = {name: kernel["args"][name] for name in ("External id", "correlation")}
        events.append(_complete("cuda_runtime", "cudaLaunchKernel", _HOST, _HOST, 0.0, 0.0, linked))
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": device, "name": gpu.name, "totalGlobalMem": gpu.memory}],
        "distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world},
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        "traceEvents": [*events, *kernels, *_marks(timeline, rank, device)],
        "traceName": f"{timeline.plan.spec.name}, rank {rank}",
    }


def chrome(timeline: Timeline, ranks: Sequence[int]) -> dict[str, Any]:
    """One trace of many ranks, ready for JSON: a process for each, and one for the critical path, with flow arrows where
    the path changes stream or rank. Times in µs.

    Raises PlancError PLN208 for more than `MAX_KERNELS` kernels.
    """
    count = int(np.isin(timeline.intervals[0], list(ranks)).sum())
    if count > MAX_KERNELS:
        hint = "write fewer ranks with --ranks"
        raise PlancError([Diagnostic("PLN208", f"a trace of {count:,} kernels would be too large to open", hint=hint)])
    plan, critical = timeline.plan, _critical(timeline)
    cluster, path = plan.spec.cluster, plan.blocks.world_size
    events = _named(path, "critical path", 0, {0: "every op of it, on whatever rank"})
    events += _path_events(timeline, path)
    at: dict[tuple[int, str], Event] = {}
    for rank in ranks:
        name = f"rank {rank} (node {cluster.node_of_rank[rank]}, GPU {cluster.local_of_rank[rank]})"
        events += _named(rank, name, rank + 1, _stream_names(timeline))
        for kernel in _kernels(timeline, rank, rank, critical):
            events.append(kernel)
            if "critical" in kernel["args"]:
                at[rank, kernel["args"]["op"]] = kernel
        events += _marks(timeline, rank, rank)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"plan": plan.spec.name},
        "traceEvents": [*events, *_arrows(timeline, at)],
    }


def packed(trace: dict[str, Any]) -> bytes:
    """The trace as gzipped JSON; the same trace gives the same bytes."""
    text = json.dumps(trace, ensure_ascii=False, allow_nan=False, separators=(",", ": "))  # HTA looks for `"rank": 0`
    return gzip.compress(text.encode(), compresslevel=3, mtime=0)


def _us(seconds: np.ndarray | float) -> np.ndarray:
    """Whole ticks, in µs."""
    return np.asarray(np.rint(np.asarray(seconds) * (1e6 / _TICK)) * _TICK)


def _in_turn(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end in µs of what follows each other. Where a start is less than a tick before the end that it followed,
    rounding apart would let the two overlap."""
    edges = np.maximum.accumulate(np.stack([_us(start), _us(end)], axis=1).reshape(-1))
    return edges[::2], edges[1::2]


# --- events ---------------------------------------------------------------------------------------------------------


def _complete(cat: str, name: str, pid: int, tid: int, ts: float, dur: float, args: dict[str, Any]) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def _named(pid: int, name: str, place: int, threads: dict[int, str]) -> list[Event]:
    """Metadata of a process and its threads."""
    facts: list[tuple[str, int, dict[str, Any]]] = [
        ("process_name", 0, {"name": name}),
        ("process_sort_index", 0, {"sort_index": place}),
    ]
    for tid, thread in threads.items():
        facts += [("thread_name", tid, {"name": thread}), ("thread_sort_index", tid, {"sort_index": tid})]
    return [{"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0.0, "args": args} for what, tid, args in facts]


def _stream(timeline: Timeline, far: bool, lane: int) -> int:
    return _STREAM + lane + (timeline.plan.spec.execution.compute_streams if far else 0)


def _stream_names(timeline: Timeline) -> dict[int, str]:
    execution = timeline.plan.spec.execution
    names = {}
    for far, kind, lanes in (
        (False, "compute", execution.compute_streams),
        (True, "communication", execution.communication_streams),
    ):
        for lane in range(lanes):
            stream = _stream(timeline, far, lane)
            names[stream] = f"stream {stream}: {kind}"
    return names


def _kernels(timeline: Timeline, rank: int, pid: int, critical: frozenset[int]) -> Iterator[Event]:
    """Kernels of one rank, stream by stream in the order of their turns."""
    graph = timeline.plan.blocks
    first, last = np.searchsorted(timeline.intervals[0], [rank, rank + 1])
    far, lane, ops, start, end = (column[first:last] for column in timeline.intervals[1:])
    turn = np.lexsort((ops, end, start, lane, far))  # an op without length comes before what starts with it
    far, lane, ops, start, end = (column[turn] for column in (far, lane, ops, start, end))
    block_of = np.searchsorted(graph.first_op, ops, side="right") - 1
    correlation = _FIRST
    for cut in np.split(np.arange(len(ops)), np.flatnonzero(np.diff(far) | np.diff(lane)) + 1):
        begin, finish = _in_turn(start[cut], end[cut])
        for n, ts, until in zip(cut.tolist(), begin.tolist(), finish.tolist(), strict=True):
            number, op = int(block_of[n]), int(ops[n])
            block = graph.blocks[number]
            own = op - int(graph.first_op[number])
            stream = _stream(timeline, bool(far[n]), int(lane[n]))
            correlation += 1
            args: dict[str, Any] = {
                "External id": correlation,
                "device": pid,
                "context": 1,
                "stream": stream,
                "correlation": correlation,
            }
            args |= _facts(timeline, number, own)
            if far[n]:
                args |= _message(timeline, block, own, rank)
            if op in critical:
                args["critical"] = True
            yield _complete("kernel", _NCCL.get(block.kind, block.kind), pid, stream, ts, until - ts, args)


def _marks(timeline: Timeline, rank: int, pid: int) -> Iterator[Event]:
    """What takes no time on the rank, as instant events."""
    for number, block in enumerate(timeline.plan.blocks.blocks):
        if takes_time(block):
            continue
        stream = _stream(timeline, on_communication_stream(block), 0)
        for own in np.flatnonzero((block.ranks == rank).any(axis=1)).tolist():
            ts = float(_us(timeline.run.start[number][own]))
            args = _facts(timeline, number, own)
            yield {"ph": "i", "s": "t", "cat": "planc", "name": block.kind, "pid": pid, "tid": stream, "ts": ts} | {
                "args": args
            }


def _facts(timeline: Timeline, number: int, own: int) -> dict[str, Any]:
    """What the plan says of an op."""
    block = timeline.plan.blocks.blocks[number]
    facts: dict[str, Any] = {"op": timeline.plan.blocks.op_id(number, own), "class": class_of(block)}
    if block.layer is not None:
        facts["layer"] = block.layer
    facts["micro batch"] = block.micro_batch
    if block.rows is not None:
        facts["rows"] = block.row_count(own)
    if block.experts is not None:
        facts["expert"] = int(block.experts[own])
    if takes_time(block):
        facts["provenance"] = timeline.prices.blocks[number].provenance[0]
    return facts


def _message(timeline: Timeline, block: OpBlock, own: int, rank: int) -> dict[str, Any]:
    """Kineto's fields of a collective: elements that the rank puts in and gets out, its own part with it."""
    ranks = block.ranks[own].tolist()
    tensor = max((block.writes if block.kind == "dispatch" else block.reads).values(), key=_elements)
    if block.kind in ("dispatch", "combine"):
        went_in, came_out = _exchanged(timeline, block, ranks.index(rank))
    else:
        rows = block.row_count(own)
        went_in, came_out = (
            sum(_elements(t) * (rows or 1 if ROWS in t.shape else 1) for t in side.values())
            for side in (block.reads, block.writes)
        )
        if block.kind == "input_split" and rank != ranks[0]:
            went_in = 0
    if block.kind == "pp_send":
        ranks.append(rank + timeline.plan.parallelism.ep)
    group = "ep" if block.kind in ("dispatch", "combine") else class_of(block)
    return {
        "Collective name": _COLLECTIVE[block.kind],
        "In msg nelems": went_in,
        "Out msg nelems": came_out,
        "Group size": len(ranks),
        "dtype": _DTYPE[tensor.dtype],
        "Process Group Name": f"{group}.{ranks[0]}",
        "Process Group Description": group,
        "Process Group Ranks": f"[{', '.join(map(str, ranks))}]",
    }


def _exchanged(timeline: Timeline, block: OpBlock, member: int) -> tuple[int, int]:
    """Elements that a member of an EP group sends and receives in dispatch or combine, a copy of a token per expert."""
    assert block.layer is not None
    sent, shards = timeline.prices.exchanges.of(block.layer).pairs, timeline.plan.parallelism.expert_tp
    outward, inward = sent[member], sent[:, member]
    if block.kind == "combine":  # the first shard of an expert sends the sum of its shards back
        outward, inward = (inward if member % shards == 0 else inward * 0), outward[::shards]
    tensor = block.writes["tokens"] if block.kind == "dispatch" else block.reads["y"]
    width = _elements(tensor)
    return round(float(outward.sum())) * width, round(float(inward.sum())) * width


def _elements(tensor: TensorType) -> int:
    """Elements of one row when the first dimension is `ROWS`, else of the whole tensor."""
    return tensor.row_bytes // DTYPE_BYTES[tensor.dtype]


# --- the critical path ----------------------------------------------------------------------------------------------


def _critical(timeline: Timeline) -> frozenset[int]:
    first_op = timeline.plan.blocks.first_op
    return frozenset(int(first_op[s.block]) + s.op for s in timeline.critical_path)


def _path(timeline: Timeline) -> list[Stretch]:
    """The ops of the critical path that take time."""
    return [s for s in timeline.critical_path if takes_time(timeline.plan.blocks.blocks[s.block])]


def _path_events(timeline: Timeline, pid: int) -> list[Event]:
    """The critical path as one row of slices; an op that still runs when the next begins (experts that start on a part)
    is cut there."""
    path = _path(timeline)
    start = np.array([s.start for s in path])
    end = np.minimum([s.end for s in path], np.append(start[1:], np.inf))
    events = []
    for stretch, ts, until in zip(path, *(edge.tolist() for edge in _in_turn(start, end)), strict=True):
        name = timeline.plan.blocks.op_id(stretch.block, stretch.op)
        args = {"waited for": stretch.cause, "delayed us": float(_us(stretch.delayed))}
        events.append(_complete("critical path", name, pid, 0, ts, until - ts, args))
    return events


def _arrows(timeline: Timeline, at: dict[tuple[int, str], Event]) -> Iterator[Event]:
    """Flow arrows along the critical path, between the kernels in ``at`` (rank, op id); none inside a stream, where order
    says the same. A path that enters a collective on one rank and leaves it on another has an arrow between the two."""
    graph, path = timeline.plan.blocks, _path(timeline)
    names = [graph.op_id(s.block, s.op) for s in path]
    members = [graph.blocks[s.block].ranks[s.op].tolist() for s in path]
    visits: list[tuple[int, str]] = []
    for (a, from_ranks), (b, to_ranks) in pairwise(zip(names, members, strict=True)):
        shared = sorted(set(from_ranks) & set(to_ranks))
        drawn = [rank for rank in shared if (rank, a) in at]
        source, target = ((drawn or shared)[0],) * 2 if shared else (from_ranks[0], to_ranks[0])
        visits += [(source, a), (target, b)]
    number = 0
    for one, other in pairwise(visits):
        if one == other or one not in at or other not in at:
            continue
        a_event, b_event = at[one], at[other]
        if (a_event["pid"], a_event["tid"]) == (b_event["pid"], b_event["tid"]):
            continue
        number += 1
        for event, way in ((a_event, {"ph": "s"}), (b_event, {"ph": "f", "bp": "e"})):
            place = {name: event[name] for name in ("pid", "tid", "ts")}
            yield way | {"cat": "critical path", "name": "critical path", "id": number} | place
