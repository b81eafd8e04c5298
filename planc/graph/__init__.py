"""What runs and what moves: the step's graph in blocks, expanded to arrays, and as networkx."""

from planc.graph.build import build_graph
from planc.graph.expand import Expanded, expand, to_networkx
from planc.graph.types import (
    COLLECTIVES,
    KINDS,
    ROWS,
    EdgeBlock,
    OpBlock,
    PlanGraph,
    TensorType,
    range_text,
    shape_text,
)

__all__ = [
    "COLLECTIVES",
    "KINDS",
    "ROWS",
    "EdgeBlock",
    "Expanded",
    "OpBlock",
    "PlanGraph",
    "TensorType",
    "build_graph",
    "expand",
    "range_text",
    "shape_text",
    "to_networkx",
]
