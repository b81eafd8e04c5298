"""What one process is told of a small plan: plain values, without pickles, and of the graph its own ops alone.

The spec travels as plan.json has it and is made small again by the process; degrees and placement of the kept layers, its
own ops in program order, the edges that touch them, and the groups of the whole plan (communicators are made by all
processes in one order) are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from planc.graph import EdgeBlock, OpBlock, PlanGraph, expand
from planc.placement import LayerPlacement, Parallelism, Placement, memory_table
from planc.prove.execute import program_order
from planc.prove.kinds import dispatch_copies
from planc.prove.shrink import Small, shrink, small_spec
from planc.spec.load import spec_from_values
from planc.units import split_evenly
from planc.verify import Draft, VerifiedPlan
from planc.verify.codec import decode_tensor

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Share:
    """A record read back. ``program``: (block, op) of ``small.graph`` in the order to run; ``process_of``: rank -> process;
    ``groups``: processes of every communicator, in the order to make them; ``copies``: (block, op) of a dispatch -> expert ->
    members that hold each copy's shards; ``collecting``: (block, op) of the output's gather -> its processes."""

    process: int
    small: Small
    name: str
    seed: int
    steps: int
    process_of: list[int]
    program: list[tuple[int, int]]
    groups: list[tuple[int, ...]]
    copies: dict[tuple[int, int], dict[int, list[list[int]]]]
    collecting: dict[tuple[int, int], list[int]]

    @property
    def ranks(self) -> list[int]:
        """Ranks that the process stands for."""
        return [rank for rank, process in enumerate(self.process_of) if process == self.process]


def crossings(graph: PlanGraph, number: int, source: int, target: int) -> Iterator[tuple[int, int, int]]:
    """(member of the source op, its rank, rank where it is read) of one edge from op to op."""
    edge = graph.edges[number]
    origin, block = graph.blocks[edge.source], graph.blocks[edge.target]
    kind, _, by = edge.pattern.partition(":")
    there = block.ranks[target].tolist()
    if block.kind == "input_split":
        there = there[:1]  # the batch comes to the first member, which scatters it
    for n, rank in enumerate(origin.ranks[source].tolist()):
        if kind == "rank" and origin.kind != "input":
            yield from ((n, rank, rank) for to in there if to == rank)
        elif kind == "shift":
            yield from ((n, rank, to) for to in there if to == rank + int(by))
        elif not (n and kind == "group" and not block.collective):  # of a replicated value one copy is read
            yield from ((n, rank, to) for to in there)


def shares(plan: VerifiedPlan | Draft, processes: int, **sizes: int) -> list[Record]:
    """Records of all processes, in their order. ``sizes``: `layers`, `tokens`, `scale`, `steps` and `seed` of `prove`."""
    layers, tokens, scale = sizes.get("layers", 1), sizes.get("tokens", 2), sizes.get("scale", 1)
    steps = sizes.get("steps", 2) if plan.spec.workload.phase == "decode" else 1
    small = shrink(plan, layers=layers, tokens=tokens, scale=scale, steps=steps)
    graph, par = small.graph, small.draft.parallelism
    if not 1 <= processes <= par.world_size:
        raise ValueError(f"{processes} processes cannot share {par.world_size} ranks")
    process_of = [n for n, size in enumerate(split_evenly(par.world_size, processes)) for _ in range(size)]
    order = program_order(graph)
    pairs = [
        list(zip(*(side.tolist() for side in expand(graph).pairs(n)), strict=True)) for n in range(len(graph.edges))
    ]
    mine = [_own_ops(graph, pairs, process_of, n) for n in range(processes)]
    common: Record = {
        "name": plan.spec.name,
        "spec": plan.spec.model_dump(mode="json"),
        "sources": dict(plan.spec.sources),
        "tokens": tokens,
        "scale": scale,
        "seed": sizes.get("seed", 0),
        "steps": steps,
        "layers": [small.layers[n] for n in range(len(small.layers))],
        "parallelism": {name: getattr(par, name) for name in ("dp", "pp", "ep", "tp", "expert_tp", "gating", "tp_comm")}
        | {"stages": [list(stage) for stage in par.stages]},
        "placement": {
            "rounds": small.draft.placement.rounds,
            "relaxed": small.draft.placement.relaxed,
            "layers": [
                {"layer": layer} | {key: getattr(part, key).tolist() for key in ("expert", "rank", "slot")}
                for layer, part in small.draft.placement.layers.items()
            ],
        },
        "process_of": process_of,
        "groups": _groups(graph, mine, process_of),
    }
    return [common | _part(graph, pairs, order, mine, n) for n in range(processes)]


def _own_ops(
    graph: PlanGraph, pairs: list[list[tuple[int, int]]], process_of: list[int], process: int
) -> set[tuple[int, int]]:
    """Ops that a process takes part in: those on its ranks, and the gather of the output where it has some."""
    own = {
        (number, op)
        for number, block in enumerate(graph.blocks)
        for op, ranks in enumerate(block.ranks.tolist())
        if any(process_of[rank] == process for rank in ranks)
    }
    for number, edge in enumerate(graph.edges):
        if graph.blocks[edge.target].kind == "output_collect":
            own |= {
                (edge.target, target)
                for source, target in pairs[number]
                if any(process_of[rank] == process for _, rank, _ in crossings(graph, number, source, target))
            }
    return own


def _groups(graph: PlanGraph, mine: list[set[tuple[int, int]]], process_of: list[int]) -> list[list[int]]:
    """Processes of every communicator, each once, in one order for all."""
    found = set()
    for number, block in enumerate(graph.blocks):
        if block.collective:
            found |= {tuple(sorted({process_of[rank] for rank in ranks})) for ranks in block.ranks.tolist()}
        elif block.kind == "output_collect":
            found |= {tuple(n for n, own in enumerate(mine) if (number, op) in own) for op in range(len(block))}
    return [list(group) for group in sorted(found) if len(group) > 1]


def _part(
    graph: PlanGraph,
    pairs: list[list[tuple[int, int]]],
    order: list[int],
    mine: list[set[tuple[int, int]]],
    process: int,
) -> Record:
    """Blocks and edges with the ops of one process and those at the other end of their edges, which it does not run."""
    own = mine[process]
    touched = [
        [pair for pair in pairs[n] if (e.source, pair[0]) in own or (e.target, pair[1]) in own]
        for n, e in enumerate(graph.edges)
    ]
    kept: list[set[int]] = [set() for _ in graph.blocks]
    for number, op in own:
        kept[number].add(op)
    for edge, some in zip(graph.edges, touched, strict=True):
        kept[edge.source] |= {source for source, _ in some}
        kept[edge.target] |= {target for _, target in some}
    ops = [sorted(some) for some in kept]
    index = [{op: n for n, op in enumerate(some)} for some in ops]
    blocks = [
        {
            "name": block.name,
            "kind": block.kind,
            "group": block.ranks.shape[1],
            "ranks": block.ranks[ops[n]].tolist(),
            "layer": block.layer,
            "micro_batch": block.micro_batch,
            "slot": block.slot,
            "split": block.split,
            "reads": {port: tensor.text() for port, tensor in block.reads.items()},
            "writes": {port: tensor.text() for port, tensor in block.writes.items()},
            "rows": None if block.rows is None else block.rows[ops[n]].tolist(),
            "experts": None if block.experts is None else block.experts[ops[n]].tolist(),
        }
        for n, block in enumerate(graph.blocks)
    ]
    edges = [
        {
            "ends": [edge.source, edge.out, edge.target, edge.into],
            "tensor": edge.tensor.text(),
            "pattern": edge.pattern,
            "comm": edge.comm,
            "pairs": [[index[edge.source][a], index[edge.target][b]] for a, b in some],
        }
        for edge, some in zip(graph.edges, touched, strict=True)
    ]
    everywhere = dispatch_copies(graph)
    copies = [
        [
            number,
            index[number][op],
            [[expert, holders] for expert, holders in everywhere.get((number, op), {}).items()],
        ]
        for number, op in sorted(own)
        if graph.blocks[number].kind == "dispatch"
    ]
    collecting = [
        [number, index[number][op], [n for n, some in enumerate(mine) if (number, op) in some]]
        for number, op in sorted(own)
        if graph.blocks[number].kind == "output_collect"
    ]
    program = [[number, index[number][op]] for number in order for op in ops[number] if (number, op) in own]
    return {
        "process": process,
        "blocks": blocks,
        "edges": edges,
        "copies": copies,
        "collecting": collecting,
        "program": program,
    }


def read_share(record: Record) -> Share:
    """The inverse of `shares`, in the process itself."""
    degrees = dict(record["parallelism"])
    par = Parallelism(**degrees | {"stages": tuple((a, b) for a, b in degrees["stages"])})
    kept = record["layers"]
    layers = {
        row["layer"]: LayerPlacement(*(np.array(row[key], dtype=np.int32) for key in ("expert", "rank", "slot")))
        for row in record["placement"]["layers"]
    }
    placement = Placement(par, layers, record["placement"]["rounds"], record["placement"]["relaxed"])
    spec = small_spec(
        spec_from_values(record["spec"], record["sources"], "spec"),
        par,
        kept,
        record["tokens"],
        record["scale"],
        record["steps"],
    )
    blocks = [
        OpBlock(
            row["name"],
            row["kind"],
            np.array(row["ranks"], dtype=np.int32).reshape(-1, row["group"]),
            row["layer"],
            row["micro_batch"],
            row["slot"],
            row["split"],
            {port: decode_tensor(text) for port, text in row["reads"].items()},
            {port: decode_tensor(text) for port, text in row["writes"].items()},
            None if row["rows"] is None else np.array(row["rows"], dtype=np.int64),
            None if row["experts"] is None else np.array(row["experts"], dtype=np.int32),
        )
        for row in record["blocks"]
    ]
    edges = []
    for row in record["edges"]:
        source, out, target, into = row["ends"]
        pairs = np.array(row["pairs"], dtype=np.int64).reshape(-1, 2)
        edges.append(
            EdgeBlock(source, out, target, into, decode_tensor(row["tensor"]), row["pattern"], row["comm"], pairs)
        )
    graph = PlanGraph(tuple(blocks), tuple(edges), par.world_size)
    draft = Draft(spec, par, {}, placement, memory_table(spec, par, placement), graph)
    return Share(
        record["process"],
        Small(draft, graph, dict(enumerate(kept))),
        record["name"],
        record["seed"],
        record["steps"],
        record["process_of"],
        [(number, op) for number, op in record["program"]],
        [tuple(group) for group in record["groups"]],
        {(number, op): dict(rows) for number, op, rows in record["copies"]},
        {(number, op): processes for number, op, processes in record["collecting"]},
    )
