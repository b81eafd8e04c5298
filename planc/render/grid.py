"""Shapes in rows between two bars, joined to them by trunks: one trunk at the left feeds every row from above, one at
the right collects from below. No line crosses a shape or another line, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planc.graph.types import Comm
from planc.render.view import Edge, Node, Point

ABOVE, BELOW = 14.0, 8.0  #: from a row to the line that feeds it, and to the line that collects from it
GAP = ABOVE + BELOW + 6  #: between rows
Facts = Mapping[str, tuple[str, int]]  #: node id -> (tensor, bytes) of its edge


def centred(count: int, columns: int, first: float, pitch: float) -> list[float]:
    """Middles of ``count`` shapes in a row with room for ``columns``."""
    left = first + (columns - min(count, columns)) * pitch / 2
    return [left + (i + 0.5) * pitch for i in range(count)]


def fed(
    source: Node, rows: Sequence[Sequence[Node]], trunk: float, comm: Comm, facts: Facts, way: Sequence[Point] = ()
) -> list[Edge]:
    """Edges down the trunk to the top of every shape: from the bottom of ``source``, or along ``way``, which ends
    at the trunk."""
    edges = []
    for row in rows:
        level = min(n.y for n in row) - ABOVE
        for n in row:
            x, y = n.top
            points = (*(way or [(trunk, source.y + source.height)]), (trunk, level), (x, level), (x, y))
            edges.append(Edge(source.id, n.id, points, None, comm, *facts[n.id]))
    return edges


def collected(rows: Sequence[Sequence[Node]], target: Node, trunk: float, comm: Comm, facts: Facts) -> list[Edge]:
    """Edges from the bottom of every shape to the trunk and down it to the top of ``target``."""
    edges = []
    for row in rows:
        level = max(n.y + n.height for n in row) + BELOW
        for n in row:
            x, y = n.bottom
            points = ((x, y), (x, level), (trunk, level), (trunk, target.y))
            edges.append(Edge(n.id, target.id, points, None, comm, *facts[n.id]))
    return edges


def straight(sources: Sequence[Node], targets: Sequence[Node], comm: Comm, facts: Facts) -> list[Edge]:
    """Upright edges between a bar and the shapes above or below it; the facts are those of the shapes."""
    edges = []
    for a in sources:
        for b in targets:
            small = a if a.width <= b.width else b
            x = small.x + small.width / 2
            edges.append(Edge(a.id, b.id, ((x, a.y + a.height), (x, b.y)), None, comm, *facts[small.id]))
    return edges
