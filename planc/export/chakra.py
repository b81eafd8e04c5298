"""Chakra execution traces, one a rank, of one simulated step, and the files with which ASTRA-sim's analytical back-end runs them.

Nodes of a rank are its ops in program order. They depend on what they read on their rank and, so that collectives meet in one
order everywhere, on the op before them on their kind of stream. `input` and `output_collect`, which take no time, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from planc.export import chakra_file as wire
from planc.export.astra_sim import configuration
from planc.export.target import Job, Target, nothing, time_notes
from planc.graph import OpBlock
from planc.verify import VerifiedPlan

PREFIX = "trace"
_LEFT_OUT = ("input", "output_collect")
_START = 1  #: id of every rank's first node: a simulator may not begin with a collective
_COMM = {
    "all_reduce": wire.ALL_REDUCE,
    "reduce_scatter": wire.REDUCE_SCATTER,
    "all_gather": wire.ALL_GATHER,
    "broadcast": wire.BROADCAST,
    "input_split": wire.BROADCAST,  # as many bytes to each rank as the scatter gives it
    "dispatch": wire.ALL_TO_ALL,
    "combine": wire.ALL_TO_ALL,
}


def notes(job: Job) -> Iterator[str]:
    """What a simulator that reads the traces sees otherwise than planc."""
    plan = job.plan
    yield from time_notes(job)
    execution, cluster = plan.spec.execution, plan.spec.cluster
    way = job.options.get("chakra.all_to_all", "mean")
    if plan.spec.model.moe is not None and way != "p2p":
        yield f"a collective is even: dispatch and combine carry the {way} of their chunks (chakra.all_to_all={way})"
    if len(np.unique(cluster.domain_of_rank[: plan.parallelism.world_size])) > 1:
        yield "the network is one flat switch at the NIC's bandwidth, also between GPUs that NVLink joins"
    if execution.expert_chunks > 1:
        yield "experts start when all that dispatch brings is there, not on its parts"
    if max(execution.compute_streams, execution.communication_streams) > 1:
        yield "ops of one kind of stream keep one order on a rank, as simulators have one slot for each"


@dataclass(frozen=True, slots=True)
class _Part:
    """A block as its ranks see it. ``feeds``: blocks that it reads on the same rank; ``op``: the op of every rank, -1 where it
    has none; ``rest``: fields of each op's node behind its dependencies; ``peer``: distance to the other rank of a hand-over;
    ``pairs``: bytes between the ranks of an EP group where they are sent one by one."""

    name: str
    kind: int
    far: bool
    feeds: tuple[int, ...]
    op: list[int]
    rest: list[bytes]
    peer: int = 0
    tag: int = 0
    pairs: np.ndarray | None = None
    nanos: list[int] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    size: int = 0
    own: bytes = b""


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """Traces, rank by rank, and the configuration of the simulator."""
    plan, way = job.plan, job.options.get("chakra.all_to_all", "mean")
    groups: dict[tuple[int, ...], int] = {}
    edges = _edges_into(plan)
    parts = {
        number: _part(job, number, edges[number], way, groups)
        for number in job.timeline.order
        if _written(plan, number)
    }
    world = plan.parallelism.world_size
    about = wire.metadata({"planc.plan": plan.spec.name, "planc.all_to_all": way, "planc.world": world})
    for rank in range(world):
        yield f"{PREFIX}.{rank}.et", about + b"".join(_nodes(parts, rank))
    yield from configuration(plan, groups, PREFIX, way, list(notes(job)))


def _written(plan: VerifiedPlan, number: int) -> bool:
    return plan.blocks.blocks[number].kind not in _LEFT_OUT


def _part(job: Job, number: int, edges: list[tuple[int, str]], way: str, groups: dict[tuple[int, ...], int]) -> _Part:
    """A block as its ranks see it; groups that are new get a number."""
    plan, line = job.plan, job.timeline
    graph = plan.blocks
    block = graph.blocks[number]
    far = line.stream_of(block) == "communication"
    seconds = line.run.end[number] - line.run.start[number] if far else line.prices.blocks[number].seconds
    nanos = np.maximum(np.rint(seconds * 1e9).astype(np.int64), 1).tolist()
    op = np.full(plan.parallelism.world_size, -1)
    op[block.ranks] = np.arange(len(block))[:, None]
    own = _own(block)
    common: dict[str, Any] = {
        "far": far,
        "feeds": tuple(source for source, pattern in edges if pattern == "rank"),
        "op": op.tolist(),
    }
    if block.kind in ("pp_send", "pp_recv"):
        sends = block.kind == "pp_send"
        size = next(iter(block.reads.values())).row_bytes
        tag = number if sends else next(source for source, pattern in edges if pattern.startswith("shift"))
        peer = plan.parallelism.ep if sends else -plan.parallelism.ep
        rest = [_timed(n) + own if sends else own for n in nanos]
        return _Part(block.name, wire.SEND if sends else wire.RECV, rest=rest, peer=peer, tag=tag, size=size, **common)
    if not block.collective or block.ranks.shape[1] == 1:
        experts = [b""] * len(block) if block.experts is None else [_expert(e) for e in block.experts.tolist()]
        rest = [_work(n) + own + expert for n, expert in zip(nanos, experts, strict=True)]
        return _Part(block.name, wire.COMP, rest=rest, **common)
    if block.kind in ("dispatch", "combine") and way == "p2p":
        firsts, matrix = block.ranks[:, 0].tolist(), _pairs(job, number)
        return _Part(
            block.name, wire.COLL, rest=[], tag=number, pairs=matrix, nanos=nanos, firsts=firsts, own=own, **common
        )
    rest = []
    even = _even(_pairs(job, number), way) if block.kind in ("dispatch", "combine") else 0
    for at, ranks in enumerate(block.ranks.tolist()):
        group = groups.setdefault(tuple(ranks), len(groups) + 1)
        rest.append(_timed(nanos[at]) + _collective(_COMM[block.kind], even or _size(plan, block, at), group) + own)
    return _Part(block.name, wire.COLL, rest=rest, **common)


def _edges_into(plan: VerifiedPlan) -> list[list[tuple[int, str]]]:
    """(block that is read, pattern) of the edges into every block, without those from blocks that are left out."""
    found: list[list[tuple[int, str]]] = [[] for _ in plan.blocks.blocks]
    for edge in plan.blocks.edges:
        if _written(plan, edge.source):
            found[edge.target].append((edge.source, edge.pattern))
    return found


def _size(plan: VerifiedPlan, block: OpBlock, op: int) -> int:
    """`comm_size` as ASTRA-sim counts it: what a rank has before a sum or gather, and what each gets in a broadcast."""
    told = block.writes if block.kind in ("broadcast", "input_split") else block.reads
    tensor = next(iter(told.values()))
    rows = block.row_count(op) if tensor.shape[0] < 0 else None
    times = plan.spec.workload.micro_batches if block.kind == "input_split" else 1
    return max(1, tensor.row_bytes * (1 if rows is None else rows) * times)


def _pairs(job: Job, number: int) -> np.ndarray:
    """Bytes that ranks of an EP group send to each other in a dispatch or combine, int64 [ep, ep]; 0 to oneself. With known
    traffic they are what prices count, else whole tokens."""
    plan, block = job.plan, job.plan.blocks.blocks[number]
    assert block.layer is not None
    if job.timeline.prices.traffic is None:
        matrix = plan.byte_matrix(number)
    else:
        from planc.cost.exchange import first_shards

        tokens = job.timeline.prices.exchanges.of(block.layer).pairs
        if block.kind == "combine":
            tokens = first_shards(tokens, plan.parallelism.expert_tp).T
        width = (block.writes if block.kind == "dispatch" else block.reads)[
            "tokens" if block.kind == "dispatch" else "y"
        ]
        matrix = np.rint(tokens * width.row_bytes).astype(np.int64)
    matrix = matrix.copy()
    np.fill_diagonal(matrix, 0)
    return matrix


def _even(matrix: np.ndarray, way: str) -> int:
    """`comm_size` of an even all-to-all: a rank's chunks, its own included. Chunks are as large as the mean of those between
    two ranks, or as the largest."""
    n = len(matrix)
    chunk = int(matrix.max()) if way == "max" else -(-int(matrix.sum()) // (n * (n - 1)))
    return n * max(1, chunk)


# --- nodes ------------------------------------------------------------------------------------------------------------


def _nodes(parts: dict[int, _Part], rank: int) -> Iterator[bytes]:
    """The nodes of one rank, each with its length."""
    yield wire.node(_START, wire.head("start", wire.COMP), (), (), _work(1) + _text("planc.op", "start"))
    number, last = _START, [_START, _START]
    ends: dict[int, tuple[int, ...]] = {}
    for block, part in parts.items():
        op = part.op[rank]
        if op < 0:
            continue
        data = sorted({end for feed in part.feeds for end in ends.get(feed, ())})
        before = _START if part.kind == wire.RECV else last[part.far]
        ctrl = () if before in data else (before,)
        if part.pairs is not None:
            made, ends[block], last[1] = _one_by_one(part, op, rank, number, data, before)
            number += len(made)
            yield from made
            continue
        number += 1
        rest = part.rest[op]
        if part.peer:
            ends_of = (rank, rank + part.peer) if part.kind == wire.SEND else (rank + part.peer, rank)
            rest += _message(*ends_of, part.tag, part.size)
        yield wire.node(number, wire.head(part.name, part.kind), ctrl, data, rest)
        ends[block] = (number,)
        if part.kind != wire.RECV:  # it occupies nothing
            last[part.far] = number


def _one_by_one(
    part: _Part, op: int, rank: int, number: int, data: list[int], before: int
) -> tuple[list[bytes], tuple[int, ...], int]:
    """Dispatch or combine as messages: (nodes, ids after which it is done, the last that occupies the stream). Every rank sends
    to its neighbour first."""
    assert part.pairs is not None
    first, n = part.firsts[op], len(part.pairs)
    own = rank - first
    turn = (own + 1 + np.arange(n - 1)) % n
    made, ends, last = [], list(data), before
    targets = [int(t) for t in turn if part.pairs[own, t]]
    sources = [int(s) for s in turn[::-1] if part.pairs[s, own]]
    for target in targets:
        number += 1
        rest = _timed(max(1, part.nanos[op] // len(targets))) + part.own
        rest += _message(rank, first + target, part.tag, int(part.pairs[own, target]))
        made.append(wire.node(number, wire.head(part.name, wire.SEND), () if last in data else (last,), data, rest))
        last = number
    ends = [last] if targets else ends
    for source in sources:
        number += 1
        rest = part.own + _message(first + source, rank, part.tag, int(part.pairs[source, own]))
        made.append(wire.node(number, wire.head(part.name, wire.RECV), (before,), (), rest))
        ends.append(number)
    return made, tuple(ends), last


def _own(block: OpBlock) -> bytes:
    """Attributes that all ops of a block have."""
    found = _text("planc.op", block.kind) + wire.attribute("planc.micro_batch", wire.INT64, block.micro_batch)
    return found if block.layer is None else found + wire.attribute("planc.layer", wire.INT64, block.layer)


@cache
def _text(name: str, value: str) -> bytes:
    return wire.attribute(name, wire.STRING, value)


@cache
def _expert(expert: int) -> bytes:
    return wire.attribute("planc.expert", wire.INT64, expert)


@cache
def _timed(nanos: int) -> bytes:
    """Duration of a node, in whole µs (at least one) and exactly, and that it runs on the GPU."""
    exact = wire.attribute("planc.ns", wire.INT64, nanos)
    return wire.duration(max(1, round(nanos / 1000))) + wire.attribute("is_cpu_op", wire.BOOL, 0) + exact


@cache
def _work(nanos: int) -> bytes:
    """What makes ASTRA-sim's roofline take ``nanos`` ns: it cuts off the fraction of ops ÷ 10¹² s, so one op is added, without
    which 1 in 48 durations would be 1 ns short."""
    ops = wire.attribute("num_ops", wire.INT64, nanos * 1000 + 1)
    return _timed(nanos) + ops + wire.attribute("tensor_size", wire.UINT64, 1)


@cache
def _collective(kind: int, size: int, group: int) -> bytes:
    parts: Iterable[bytes] = (
        wire.attribute("comm_type", wire.INT64, kind),
        wire.attribute("comm_size", wire.INT64, size),
        wire.attribute("pg_name", wire.STRING, str(group)),
    )
    return b"".join(parts)


def _message(source: int, target: int, tag: int, size: int) -> bytes:
    ends = {"comm_src": source, "comm_dst": target, "comm_tag": tag}
    told = (wire.attribute(name, wire.INT32, value) for name, value in ends.items())
    return b"".join(told) + wire.attribute("comm_size", wire.INT64, size)


TARGET = Target(
    title="Chakra traces for ASTRA-sim",
    version="1.0.0",
    says="every plan: one step, op by op on every rank, with its collectives, messages, groups and planned durations",
    lacks="memory, tokens, unequal chunks of one collective, NVLink and NICs at once",
    faults=nothing,
    notes=notes,
    files=files,
    options={"all_to_all": ("mean", "max", "p2p")},
)
