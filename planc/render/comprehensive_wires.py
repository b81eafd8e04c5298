"""A band before it is drawn: its rows, what every lane shows in it, and the edges that run across lanes."""

from __future__ import annotations

from typing import NamedTuple

from planc.graph import OpBlock
from planc.render.comprehensive_cells import Cell, Line
from planc.render.comprehensive_layout import OUTSIDE, Lanes, Row, Section, make_rows
from planc.verify import VerifiedPlan


class Across(NamedTuple):
    """Edges drawn as one line across lanes, as (source, target) ranks, from row to row."""

    source: int
    target: int
    comm: str
    pairs: tuple[tuple[int, int], ...]


class Band(NamedTuple):
    """A section with its blocks, their rows, the shown lanes (rank -> cell) and the lines across."""

    section: Section
    blocks: tuple[OpBlock, ...]
    rows: list[Row]
    height: float
    cells: dict[int, Cell]
    across: tuple[Across, ...]


def make_band(plan: VerifiedPlan, section: Section, lanes: Lanes) -> Band:
    """What a section shows of the kept lanes."""
    blocks = tuple(plan.blocks.blocks[i] for i in section.blocks)
    ops: dict[int, list[int]] = {rank: [] for rank in lanes.left}
    bars: dict[int, list[int]] = {rank: [] for rank in lanes.left}
    for row, block in enumerate(blocks):
        for rank in block.ranks.reshape(-1).tolist():
            if rank in lanes.left:
                (bars if block.collective else ops)[rank].append(row)
    lines, across = _lines(plan, section, lanes)
    cells = {
        rank: Cell(tuple(ops[rank]), tuple(bars[rank]), tuple(sorted(lines.get(rank, ()))))
        for rank in lanes.left
        if ops[rank] or bars[rank]
    }
    rows, height = make_rows(plan, section)
    return Band(section, blocks, rows, height, cells, tuple(across))


def _lines(plan: VerifiedPlan, section: Section, lanes: Lanes) -> tuple[dict[int, set[Line]], list[Across]]:
    """Edges as lines inside lanes (rank -> lines), and as lines across lanes."""
    lines: dict[int, set[Line]] = {}
    across: list[Across] = []
    for wire in section.wires:
        edge = plan.blocks.edges[wire.edge]
        source, target = plan.expanded.pairs(wire.edge)
        a, b = plan.blocks.blocks[edge.source].ranks[source], plan.blocks.blocks[edge.target].ranks[target]
        if edge.pattern == "rank" or wire.target == OUTSIDE:
            narrow = b if edge.pattern == "rank" and b.shape[1] < a.shape[1] else a
            for ranks in narrow.tolist():
                rank = _first_shown(ranks, lanes)
                if rank is not None:
                    lines.setdefault(rank, set()).add(Line(wire.source, wire.target, edge.comm))
            continue
        bundles: dict[int, list[tuple[int, int]]] = {}
        for origin, goal in zip(a.tolist(), b.tolist(), strict=True):
            start, end = _first_shown(origin, lanes), _first_shown(goal, lanes)
            if start is not None and end is not None:
                # a hand-over rank to rank stays in its replica; else the edges share one op, and so one line
                bundle = start // plan.parallelism.replica_size if edge.pattern.startswith("shift") else 0
                bundles.setdefault(bundle, []).append((start, end))
        across += (Across(wire.source, wire.target, edge.comm, tuple(pairs)) for pairs in bundles.values())
    return lines, across


def _first_shown(ranks: list[int], lanes: Lanes) -> int | None:
    return next((rank for rank in ranks if rank in lanes.left), None)
