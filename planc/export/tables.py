"""A plan as tables for notebooks and databases: who holds which expert, what a rank is and holds, who sends how much to whom,
and when every op runs. `csv` and `parquet` write the same ones.

A table comes in parts, mostly a block of the plan's graph each, in which a column is an array or one value for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_array, csr_array

from planc.diagnostics import Diagnostic
from planc.export.target import Job, refusal
from planc.graph import OpBlock
from planc.graph.traffic import link_classes
from planc.placement import ITEMS
from planc.render.style import comm_of
from planc.spec import LINK_CLASSES
from planc.verify import VerifiedPlan

MAX_ROWS = 10_000_000  #: of one table; more are refused
MANY_LINKS = 1_000_000  #: rows from which links are summed over layers, where it was not asked otherwise
LINKS = ("auto", "layer", "step")  #: values of the option `links`: a row for each layer, or the sum over a step

Value = np.ndarray | Sequence[object] | str | int | None
Part = Mapping[str, Value]  #: column -> values of some rows, or one for all of them; None is an empty cell


@dataclass(frozen=True)
class Table:
    """``types``: column -> what its cells hold; ``parts``: the rows, with all of the columns in each part."""

    name: str
    types: Mapping[str, Literal["int", "float", "text"]]
    parts: Callable[[], Iterable[Part]]


def tables(job: Job, links: str) -> list[Table]:
    """All tables of a plan; ``links``: one of `LINKS`."""
    plan = job.plan
    of_layer = links == "layer" or (links == "auto" and _most_links(plan) <= MANY_LINKS)
    return [
        Table("placement", _PLACEMENT, lambda: _placement(plan)),
        Table("ranks", _RANKS, lambda: _ranks(plan)),
        Table("links", _LINKS, lambda: _links(plan) if of_layer else _summed(plan)),
        Table("ops", _OPS, lambda: _ops(job)),
    ]


def table_faults(job: Job, title: str, links: str) -> Iterator[Diagnostic]:
    """PLN503 for tables of more than `MAX_ROWS` rows."""
    plan, par = job.plan, job.plan.parallelism
    if plan.blocks.op_count > MAX_ROWS:
        few = MAX_ROWS * par.dp // plan.blocks.op_count
        yield refusal(
            title,
            f"a table of {plan.blocks.op_count:,} ops is too large; {MAX_ROWS:,} are the most",
            f"plan {few} of the {par.dp} replicas, which share nothing: parallelism.dp: {few}, and their part of the batch",
            "parallelism.dp",
        )
    if links == "layer" and _most_links(plan) > MAX_ROWS:
        message = f"up to {_most_links(plan):,} links by layer are too many; {MAX_ROWS:,} are the most"
        yield refusal(title, message, "leave the option `links` out, or give `step`: the sum over layers")


def table_notes(job: Job, links: str) -> Iterator[str]:
    """What a reader may take for something else."""
    if links == "step" or (links == "auto" and _most_links(job.plan) > MANY_LINKS):
        yield "links are sums over the layers and micro-batches of a step; the option `links=layer` tells them apart"
    if job.plan.spec.traffic is not None:
        yield "bytes of links are those of even routing, as in the plan; times of ops follow the traffic"


def size_of(part: Part) -> int:
    """Rows of a part."""
    return next(len(cells) for cells in part.values() if isinstance(cells, np.ndarray | list))


# --- placement and ranks ------------------------------------------------------------------------------------------------

_PLACEMENT: dict[str, Literal["int", "float", "text"]] = dict.fromkeys(
    ("layer", "expert", "copy", "shard", "replica", "rank", "node", "gpu", "slot"), "int"
)
_BYTES = (*ITEMS, "reserve", "used", "capacity")
_RANKS: dict[str, Literal["int", "float", "text"]] = {
    **dict.fromkeys(("rank", "replica", "stage", "ep_index", "tp_group", "tp_index", "node", "gpu"), "int"),
    "gpu_name": "text",
    **dict.fromkeys((f"{item}_bytes" for item in _BYTES), "int"),
}


def _placement(plan: VerifiedPlan) -> Iterator[Part]:
    """A row for every rank that holds a copy of an expert or a shard of one: layer by layer, replica by replica."""
    par, cluster = plan.parallelism, plan.spec.cluster
    for layer, part in plan.placement.layers.items():
        shape = (par.dp, len(part.rank), par.expert_tp)
        shards = np.arange(par.expert_tp)
        rank = par.stage_ranks(par.stage_of_layer(layer))[:, (part.rank[:, None] + shards)].reshape(-1)
        copy = np.arange(len(part.expert)) - np.searchsorted(part.expert, part.expert)

        def each(values: np.ndarray, axis: int, shape: tuple[int, ...] = shape) -> np.ndarray:
            return np.broadcast_to(np.expand_dims(values, [n for n in range(3) if n != axis]), shape).reshape(-1)

        yield {
            "layer": layer,
            "expert": each(part.expert, 1),
            "copy": each(copy, 1),
            "shard": each(shards, 2),
            "replica": each(np.arange(par.dp), 0),
            "rank": rank,
            "node": cluster.node_of_rank[rank],
            "gpu": cluster.local_of_rank[rank],
            "slot": each(part.slot, 1),
        }


def _ranks(plan: VerifiedPlan) -> Iterator[Part]:
    """A row for every rank: its place in the plan and in the cluster, and the bytes that it holds by item."""
    par, cluster, memory = plan.parallelism, plan.spec.cluster, plan.memory
    rank = np.arange(par.world_size)
    index = rank % par.ep
    parts = {**memory.items, "reserve": memory.reserve, "used": memory.used, "capacity": memory.capacity}
    yield {
        "rank": rank,
        "replica": rank // par.replica_size,
        "stage": rank % par.replica_size // par.ep,
        "ep_index": index,
        "tp_group": index // par.tp,
        "tp_index": index % par.tp,
        "node": cluster.node_of_rank[rank],
        "gpu": cluster.local_of_rank[rank],
        "gpu_name": [cluster.groups[group].gpu.name for group in cluster.group_of_rank[rank].tolist()],
        **{f"{item}_bytes": parts[item] for item in _BYTES},
    }


# --- links ----------------------------------------------------------------------------------------------------------------

_LINKS: dict[str, Literal["int", "float", "text"]] = {
    "comm": "text",
    "kind": "text",
    "layer": "int",
    "micro_batch": "int",
    "source": "int",
    "target": "int",
    "link": "text",
    "bytes": "int",
}
_Sent = tuple[np.ndarray, np.ndarray, np.ndarray]  # source and target ranks, bytes; the two ranks differ


def _most_links(plan: VerifiedPlan) -> int:
    """Pairs of ranks that may send in the collectives of a step."""
    gating = plan.parallelism.attention_dp if plan.parallelism.leaders_gate else plan.parallelism.ep
    from_few: dict[str, int] = {"broadcast": 1, "input_split": 1, "dispatch": gating, "combine": gating}
    blocks = [block for block in plan.blocks.blocks if block.collective]
    return sum(
        len(block) * from_few.get(block.kind, int(block.ranks.shape[1])) * (block.ranks.shape[1] - 1)
        for block in blocks
    )


def _links(plan: VerifiedPlan) -> Iterator[Part]:
    """A row for every pair of ranks that exchange data in an op, with the farthest kind of link between them."""
    for comm, block, sent in _exchanges(plan):
        yield _row(plan, comm, block.kind, sent) | {"layer": block.layer, "micro_batch": block.micro_batch}


def _summed(plan: VerifiedPlan) -> Iterator[Part]:
    """The same, summed over a step for each kind of op."""
    shape = (plan.parallelism.world_size,) * 2
    totals: dict[tuple[str, str], csr_array] = {}
    for comm, block, (source, target, size) in _exchanges(plan):
        part = coo_array((size, (source, target)), shape=shape).tocsr()
        key = comm, block.kind
        totals[key] = totals[key] + part if key in totals else part
    for (comm, kind), total in totals.items():
        found = total.tocoo()
        yield _row(plan, comm, kind, (found.row, found.col, found.data)) | {"layer": None, "micro_batch": None}


def _row(plan: VerifiedPlan, comm: str, kind: str, sent: _Sent) -> dict[str, Value]:
    source, target, size = sent
    link = [LINK_CLASSES[n] for n in link_classes(plan.spec.cluster, source, target).tolist()]
    return {"comm": comm, "kind": kind, "source": source, "target": target, "link": link, "bytes": size}


def _exchanges(plan: VerifiedPlan) -> Iterator[tuple[str, OpBlock, _Sent]]:
    """(class, block, what its ranks send each other) of every collective, then of hand-overs, input and output."""
    graph = plan.blocks
    known: dict[tuple[object, ...], _Sent] = {}
    for number, block in enumerate(graph.blocks):
        if block.collective:
            comm = comm_of(block.kind)
            place = (
                id(plan.placement.layers[block.layer])
                if comm in ("dispatch", "combine") and block.layer is not None
                else 0
            )
            tensors = (*block.reads.values(), *block.writes.values())
            rows = b"" if block.rows is None else block.rows.tobytes()
            key = (block.kind, place, id(block.ranks), tensors, rows)
            if key not in known:
                known[key] = _inside(plan, number)
            yield comm, block, known[key]
    for number, edge in enumerate(graph.edges):
        source, target = graph.blocks[edge.source], graph.blocks[edge.target]
        if edge.comm in ("pp", "dp") and source.kind != "input_split":
            ops, others = plan.expanded.pairs(number)
            one, other = source.ranks[ops, 0], target.ranks[others, 0]
            away = one != other
            yield edge.comm, source, (one[away], other[away], plan.expanded.edge_bytes(number)[away])


def _inside(plan: VerifiedPlan, number: int) -> _Sent:
    """What the ranks of every op of a collective send each other."""
    block = plan.blocks.blocks[number]
    found = []
    for op, ranks in enumerate(block.ranks):
        if op == 0 or block.rows is not None:
            matrix = plan.byte_matrix(number, op) * ~np.eye(len(ranks), dtype=bool)
            source, target = np.nonzero(matrix)
        found.append((ranks[source], ranks[target], matrix[source, target]))
    one, other, size = (np.concatenate(column) for column in zip(*found, strict=True))
    return one, other, size


# --- ops ------------------------------------------------------------------------------------------------------------------

_OPS: dict[str, Literal["int", "float", "text"]] = {
    "op": "text",
    "kind": "text",
    "layer": "int",
    "micro_batch": "int",
    "rank": "int",
    "ranks": "text",
    "expert": "int",
    "rows": "int",
    "stream": "text",
    "start_us": "float",
    "end_us": "float",
}


def _ops(job: Job) -> Iterator[Part]:
    """A row for every op of the simulated step; `rank` of a local op, `ranks` of a collective. Times in µs, to a picosecond."""
    plan, line = job.plan, job.timeline
    ids = plan.expanded.ids
    for number, block in enumerate(plan.blocks.blocks):
        names = ids[plan.blocks.first_op[number] : plan.blocks.first_op[number + 1]]
        local = block.ranks.shape[1] == 1 and not block.collective
        yield {
            "op": names,
            "kind": block.kind,
            "layer": block.layer,
            "micro_batch": block.micro_batch,
            "rank": block.ranks[:, 0] if local else None,
            "ranks": None if local else [name.rpartition(".r")[2] for name in names],
            "expert": block.experts,
            "rows": block.rows,
            "stream": line.stream_of(block),
            "start_us": np.round(line.run.start[number] * 1e6, 6),
            "end_us": np.round(line.run.end[number] * 1e6, 6),
        }
