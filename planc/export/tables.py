"""A plan as tables for notebooks and databases: who holds which expert, what a rank is and holds, who sends how much to whom,
and when every op runs. `csv` and `parquet` write the same ones.

A table comes in parts, mostly a block of the plan's graph each, in which a column is an array or one value for all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.links import Part, links_by_op, links_by_step, most_links
from planc.export.target import Job, refusal, time_notes, too_large
from planc.placement import ITEMS
from planc.verify import VerifiedPlan

MAX_ROWS = 10_000_000  #: of one table; more are refused
MANY_LINKS = 1_000_000  #: rows from which links are summed over the step, where it was not asked otherwise
LINKS = ("auto", "op", "step")  #: values of the option `links`: those of every op, or the sum over a step
SAYS = "placement, ranks with their memory, bytes between ranks, ops with their times"
LACKS = f"which op reads what, tables of more than {MAX_ROWS:,} rows"


Types = Mapping[str, Literal["int", "float", "text"]]  #: column -> what its cells hold
_BYTES = (*ITEMS, "reserve", "used", "capacity")
COLUMNS: dict[str, Types] = {
    "placement": dict.fromkeys(("layer", "expert", "copy", "shard", "replica", "rank", "node", "gpu", "slot"), "int"),
    "ranks": {
        **dict.fromkeys(("rank", "replica", "stage", "ep_index", "tp_group", "tp_index", "node", "gpu"), "int"),
        "gpu_name": "text",
        **dict.fromkeys((f"{item}_bytes" for item in _BYTES), "int"),
    },
    "links": {
        **dict.fromkeys(("comm", "kind", "op"), "text"),
        **dict.fromkeys(("layer", "micro_batch", "source", "target"), "int"),
        "link": "text",
        "bytes": "int",
    },
    "ops": {
        **dict.fromkeys(("op", "kind"), "text"),
        **dict.fromkeys(("layer", "micro_batch", "rank"), "int"),
        "ranks": "text",
        **dict.fromkeys(("expert", "rows"), "int"),
        "stream": "text",
        **dict.fromkeys(("start_us", "end_us"), "float"),
    },
}


@dataclass(frozen=True)
class Table:
    """``types``: its columns in order; ``parts``: the rows, with all of the columns in each part."""

    name: str
    types: Types
    parts: Iterable[Part]


def tables(job: Job, option: str) -> Iterator[Table]:
    """All tables of a plan; ``option``: the name of the target's option that is one of `LINKS`."""
    plan = job.plan
    links = links_by_op if _by_op(job, option) else links_by_step
    parts = {"placement": _placement(plan), "ranks": _ranks(plan), "links": links(plan), "ops": _ops(job)}
    for name, types in COLUMNS.items():
        yield Table(name, types, parts[name])


def _by_op(job: Job, option: str) -> bool:
    asked = job.options.get(option, LINKS[0])
    return asked == "op" or (asked == "auto" and most_links(job.plan) <= MANY_LINKS)


def table_faults(job: Job, title: str, option: str) -> Iterator[Diagnostic]:
    """PLN503 for tables of more than `MAX_ROWS` rows."""
    plan = job.plan
    yield from too_large(plan, title, "ops", plan.blocks.op_count, MAX_ROWS)
    if _by_op(job, option) and most_links(plan) > MAX_ROWS:
        message = f"up to {most_links(plan):,} links op by op are too many; {MAX_ROWS:,} are the most"
        yield refusal(title, message, f"leave the option {option} out, or give `step`, the sum over a step")


def table_notes(job: Job, option: str) -> Iterator[str]:
    """What a reader may take for something else."""
    if not _by_op(job, option):
        yield f"links are sums over a step by kind of op; the option {option}=op tells ops apart"
    yield from time_notes(job)
    if job.timeline.prices.traffic is not None:
        yield "bytes of links are those of even routing, as in the plan; times of ops follow the traffic"


def size_of(part: Part) -> int:
    """Rows of a part."""
    return next(len(cells) for cells in part.values() if isinstance(cells, np.ndarray))


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
    names = np.array([group.gpu.name for group in cluster.groups], dtype=object)
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
        "gpu_name": names[cluster.group_of_rank[rank]],
        **{f"{item}_bytes": parts[item] for item in _BYTES},
    }


def _ops(job: Job) -> Iterator[Part]:
    """A row for every op of the simulated step; `rank` of a local op, `ranks` of a collective. Times in µs, to a picosecond."""
    plan, line = job.plan, job.timeline
    ids = plan.expanded.ids
    for number, block in enumerate(plan.blocks.blocks):
        names = ids[plan.blocks.first_op[number] : plan.blocks.first_op[number + 1]]
        local = block.ranks.shape[1] == 1 and not block.collective
        yield {
            "op": np.array(names, dtype=object),
            "kind": block.kind,
            "layer": block.layer,
            "micro_batch": block.micro_batch,
            "rank": block.ranks[:, 0] if local else None,
            "ranks": None if local else np.array([name.rpartition(".r")[2] for name in names], dtype=object),
            "expert": block.experts,
            "rows": block.rows,
            "stream": line.stream_of(block),
            "start_us": np.round(line.run.start[number] * 1e6, 6),
            "end_us": np.round(line.run.end[number] * 1e6, 6),
        }
