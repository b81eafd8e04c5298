"""The plan's op graph for the XML formats of graph programs: ops and edges with typed attributes, those of `plan.graph`.

Types have the same names in all of these formats. Attributes that repeat from op to op are made once, and text is joined: a
writer that takes a graph object needs ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from planc.diagnostics import Diagnostic
from planc.export.target import too_large
from planc.graph.expand import edge_rows, node_attributes
from planc.graph.types import EdgeBlock, shape_text
from planc.render.text import xml_escape
from planc.verify import VerifiedPlan

MAX_EDGES = 1_000_000  #: what reads XML holds the whole graph as objects: some kilobytes an edge
SAYS = "every op with its kind, layer, ranks and expert, every edge with its tensor, bytes and class of communication"
LACKS = f"times, who sends what inside a collective, graphs of more than {MAX_EDGES:,} edges"

#: attribute -> type; an op has `gpu`, the rank that it is on, or `ranks`, those of its group
NODE = {
    "kind": "string",
    "micro_batch": "long",
    "layer": "long",
    "shape": "string",
    "dtype": "string",
    "layout": "string",
    "gpu": "long",
    "ranks": "string",
    "expert": "long",
}
#: `communication`: whether data leaves its rank; `comm` is then its class
EDGE = {
    "shape": "string",
    "dtype": "string",
    "layout": "string",
    "bytes": "long",
    "communication": "boolean",
    "comm": "string",
}

Attributes = Mapping[str, object]


def graph_faults(plan: VerifiedPlan, title: str) -> Iterator[Diagnostic]:
    """PLN503 for a graph of more than `MAX_EDGES` edges."""
    yield from too_large(plan, title, "edges", len(plan.expanded.source), MAX_EDGES)


def nodes(plan: VerifiedPlan) -> Iterator[tuple[str, Attributes]]:
    """(id, attributes) of every op; ids are ready for XML."""
    ids = iter(_ids(plan))
    for block in plan.blocks.blocks:
        for attributes in node_attributes(block):
            shape = attributes.get("shape")
            yield next(ids), attributes | ({"shape": shape_text(shape)} if isinstance(shape, tuple) else {})


def edges(plan: VerifiedPlan) -> Iterator[tuple[str, str, Attributes]]:
    """(id of the source, id of the target, attributes) of every edge."""
    ids, every = _ids(plan), plan.expanded
    for number, edge in enumerate(plan.blocks.edges):
        part = slice(every.first_edge[number], every.first_edge[number + 1])
        source, target = every.source[part].tolist(), every.target[part].tolist()
        rows = edge_rows(plan.blocks, edge, *every.pairs(number))
        counts = [None] * len(source) if rows is None else rows.tolist()
        alike = {count: _carried(edge, count) for count in set(counts)}
        for s, t, count in zip(source, target, counts, strict=True):
            yield ids[s], ids[t], alike[count]


def _carried(edge: EdgeBlock, rows: int | None) -> Attributes:
    """What an edge carries, of as many rows."""
    tensor = edge.tensor
    size = tensor.row_bytes * (1 if rows is None else rows)
    about = {"shape": shape_text(tensor.shape, rows), "dtype": tensor.dtype, "layout": tensor.layout, "bytes": size}
    return about | ({"communication": True, "comm": edge.comm} if edge.comm else {"communication": False})


def _ids(plan: VerifiedPlan) -> list[str]:
    return [xml_escape(name) for name in plan.expanded.ids]


def as_text(types: Mapping[str, str], datum: str) -> Callable[[Attributes], str]:
    """Attributes -> XML: for each of them ``datum``, a format of its place in ``types`` and its value."""
    place = {key: number for number, key in enumerate(types)}

    @cache
    def one(key: str, value: object) -> str:
        text = str(value).lower() if isinstance(value, bool) else xml_escape(str(value))
        return datum.format(place[key], text)

    return lambda attributes: "".join([one(key, value) for key, value in attributes.items()])
