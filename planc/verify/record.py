"""plan.json: a verified plan as plain values. The file holds the whole graph, so that it can be checked by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from planc.graph import PlanGraph
from planc.placement import ITEMS, LayerPlacement, MemoryTable, Placement
from planc.planner.certificate import Certificate
from planc.verify.codec import encode_numbers
from planc.verify.plan import VerifiedPlan
from planc.verify.proof_record import ProofRecord

SCHEMA = "planc.plan/1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ParallelismRecord(_Part):
    """Resolved degrees; ``stages`` are (first, end) layers."""

    dp: int
    pp: int
    ep: int
    tp: int
    expert_tp: int
    stages: list[list[int]]
    gating: Literal["leader", "sharded"]
    tp_comm: Literal["all_reduce", "reduce_scatter"]
    world_size: int
    attention_dp: int


class CopiesRecord(_Part):
    """The expert copies of the named layers inside every EP group: three columns of one table."""

    layers: str
    experts: str
    ranks: str
    slots: str


class PlacementRecord(_Part):
    """Who holds which expert; ``rounds`` is r, ``relaxed`` whether r exceeds the rule."""

    rounds: int
    relaxed: bool
    layers: list[CopiesRecord]


class MemoryRecord(_Part):
    """Bytes by item of ranks that hold the same."""

    ranks: str
    items: dict[str, int]
    reserve: int
    capacity: int
    used: int


class BlockRecord(_Part):
    """Like ops. ``ranks`` is the first rank of each op, ``group`` how many ranks follow each other from it."""

    name: str
    kind: str
    ranks: str
    group: int = 1
    layer: int | None = None
    micro_batch: int = 0
    slot: int = 0
    split: int = 1
    reads: dict[str, str] = {}
    writes: dict[str, str] = {}
    rows: str | None = None
    experts: str | None = None


class EdgeRecord(_Part):
    """Edges from port ``source`` (``block.port``) to port ``target`` by a pattern."""

    source: str
    target: str
    tensor: str
    pattern: str = "rank"
    comm: Literal["", "tp", "dispatch", "combine", "pp", "dp"] = ""
    pairs: list[list[int]] | None = None


class GraphRecord(_Part):
    """The step's graph in blocks."""

    world_size: int
    ops: int
    edges_expanded: int
    blocks: list[BlockRecord]
    edges: list[EdgeRecord]


class NoteRecord(_Part):
    """A warning or note for the reader."""

    code: str
    severity: Literal["warning", "note"]
    message: str
    path: str
    hint: str


class PlanFile(_Part):
    """The whole of plan.json."""

    schema_: Literal["planc.plan/1"] = Field(alias="schema")
    spec: dict[str, Any]
    sources: dict[str, str]
    parallelism: ParallelismRecord
    reasons: dict[str, str]
    placement: PlacementRecord
    memory: list[MemoryRecord]
    limits: dict[str, int]
    tokens: dict[str, int]
    volumes: dict[str, dict[str, int]]
    graph: GraphRecord
    notes: list[NoteRecord]
    checks: list[dict[str, Any]]
    certificate: Certificate | None = None
    proof: ProofRecord | None = None


def plan_record(plan: VerifiedPlan) -> dict[str, Any]:
    """The plan as plain values in the order of `PlanFile`; equal plans give equal records."""
    par, graph = plan.parallelism, plan.blocks
    known: dict[int, str] = {}

    def text(array: np.ndarray) -> str:
        if id(array) not in known:
            known[id(array)] = encode_numbers(array.tolist())
        return known[id(array)]

    extra = {name: part.model_dump() for name in ("certificate", "proof") if (part := getattr(plan, name)) is not None}
    degrees = {key: getattr(par, key) for key in ParallelismRecord.model_fields if key != "stages"}
    tokens = plan.tokens
    return {
        "schema": SCHEMA,
        "spec": plan.spec.model_dump(mode="json"),
        "sources": dict(sorted(plan.spec.sources.items())),
        "parallelism": degrees | {"stages": [list(s) for s in par.stages]},
        "reasons": dict(sorted(plan.reasons.items())),
        "placement": _placement_record(plan.placement, text),
        "memory": _memory_record(plan.memory),
        "limits": plan.limits,
        "tokens": {key: getattr(tokens, key) for key in tokens.__slots__},
        "volumes": plan.volumes,
        "graph": {
            "world_size": graph.world_size,
            "ops": graph.op_count,
            "edges_expanded": len(plan.expanded.source),
            "blocks": _block_records(graph, known),
            "edges": list(_edge_records(graph)),
        },
        "notes": [
            {"code": n.code, "severity": n.severity, "message": n.message, "path": n.path, "hint": n.hint}
            for n in plan.notes
        ],
        "checks": [{"name": c.name, "codes": list(c.codes), "count": c.count, "what": c.what} for c in plan.checks],
        **extra,
    }


def _placement_record(placement: Placement, text: Any) -> dict[str, Any]:
    layers: dict[int, tuple[LayerPlacement, list[int]]] = {}
    for layer, part in sorted(placement.layers.items()):
        layers.setdefault(id(part), (part, []))[1].append(layer)
    rows = [
        {"layers": encode_numbers(ids), "experts": text(p.expert), "ranks": text(p.rank), "slots": text(p.slot)}
        for p, ids in layers.values()
    ]
    return {"rounds": placement.rounds, "relaxed": placement.relaxed, "layers": rows}


def _memory_record(memory: MemoryTable) -> list[dict[str, Any]]:
    """Classes of ranks with the same bytes, in the order of their first rank."""
    columns = np.stack([*(memory.items[name] for name in ITEMS), memory.reserve, memory.capacity])
    _, first, inverse = np.unique(columns, axis=1, return_index=True, return_inverse=True)
    rows = []
    for number in np.argsort(first).tolist():
        rank = int(first[number])
        rows.append(
            {
                "ranks": encode_numbers(np.flatnonzero(inverse.reshape(-1) == number).tolist()),
                "items": {name: int(memory.items[name][rank]) for name in ITEMS},
                "reserve": int(memory.reserve[rank]),
                "capacity": int(memory.capacity[rank]),
                "used": int(memory.used[rank]),
            }
        )
    return rows


def _block_records(graph: PlanGraph, known: dict[int, str]) -> list[dict[str, Any]]:
    firsts: dict[int, str] = {}

    def numbers(array: np.ndarray) -> str:
        if id(array) not in known:
            known[id(array)] = encode_numbers(array.tolist())
        return known[id(array)]

    rows = []
    for block in graph.blocks:
        if id(block.ranks) not in firsts:
            firsts[id(block.ranks)] = encode_numbers(block.ranks[:, 0].tolist())
        row: dict[str, Any] = {"name": block.name, "kind": block.kind, "ranks": firsts[id(block.ranks)]}
        row |= {"group": block.ranks.shape[1]} if block.ranks.shape[1] > 1 else {}
        row |= {"layer": block.layer} if block.layer is not None else {}
        row |= {k: v for k in ("micro_batch", "slot") if (v := getattr(block, k))}
        row |= {"split": block.split} if block.split > 1 else {}
        row |= {"reads": {p: t.text() for p, t in block.reads.items()}} if block.reads else {}
        row |= {"writes": {p: t.text() for p, t in block.writes.items()}} if block.writes else {}
        row |= {k: numbers(v) for k in ("rows", "experts") if (v := getattr(block, k)) is not None}
        rows.append(row)
    return rows


def _edge_records(graph: PlanGraph) -> Iterator[dict[str, Any]]:
    for edge in graph.edges:
        row: dict[str, Any] = {
            "source": f"{graph.blocks[edge.source].name}.{edge.out}",
            "target": f"{graph.blocks[edge.target].name}.{edge.into}",
            "tensor": edge.tensor.text(),
        }
        row |= {"pattern": edge.pattern} if edge.pattern != "rank" else {}
        row |= {"comm": edge.comm} if edge.comm else {}
        row |= {"pairs": edge.pairs.tolist()} if edge.pairs is not None else {}
        yield row


def plan_json(plan: VerifiedPlan) -> str:
    """The text of plan.json: one block, edge and memory class a line, so that files can be compared line by line."""
    lines = ["{"]
    record = plan_record(plan)
    for number, (key, value) in enumerate(record.items()):
        comma = "," if number < len(record) - 1 else ""
        if key == "graph":
            lines.append(' "graph": {')
            lines += [f'  "{k}": {json.dumps(value[k])},' for k in ("world_size", "ops", "edges_expanded")]
            lines += [*_rows("blocks", value["blocks"], "  ", ","), *_rows("edges", value["edges"], "  ", "")]
            lines.append(" }" + comma)
        elif isinstance(value, list) and value:
            lines += _rows(key, value, " ", comma)
        else:
            text = json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
            lines.append(f" {json.dumps(key)}: {text}{comma}")
    return "\n".join([*lines, "}", ""])


def _rows(key: str, rows: list[Any], indent: str, comma: str) -> list[str]:
    texts = [f"{indent} {json.dumps(row, ensure_ascii=False)}" for row in rows]
    return [f"{indent}{json.dumps(key)}: [", ",\n".join(texts), f"{indent}]{comma}"]
