"""Bands of the comprehensive map: frame, row names, bars of collectives, lines across lanes, and a cell per GPU.

Sections that show the same blocks and edges are drawn from one template, in which only the names change.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np

from planc.graph import OpBlock, range_text
from planc.render.comprehensive_cells import BASELINE, Cell, Symbols, draw_cell, draw_shape, outline
from planc.render.comprehensive_layout import OUTSIDE, SIZE, Lanes, Row, Section, block_stem, row_name, tensor_text
from planc.render.comprehensive_wires import Across, Band, make_band
from planc.render.style import COMMS, DASH
from planc.render.svg import num
from planc.render.text import fitted, text_width, xml_escape
from planc.render.view import COMM_NAMES
from planc.verify import VerifiedPlan

_NAME, _LABEL = "\x00", "\x01"  #: where a template has the section's name and its label


class Detail(Enum):
    """What tooltips tell. Cells are most of a map's bytes, so the largest maps tell less."""

    TENSORS = "layer, GPU, node, experts, tensor"
    EXPERTS = "layer, GPU, node, experts"
    GPU = "layer, GPU"


class Template(NamedTuple):
    """A band for any section that looks like the one it was made from."""

    text: str
    height: float

    def fill(self, section: Section) -> str:
        """The band of ``section``."""
        return self.text.replace(_NAME, section.name).replace(_LABEL, section.label)


def section_key(plan: VerifiedPlan, section: Section) -> tuple[object, ...]:
    """Equal for sections whose bands differ in nothing but names: blocks and edges are compared, arrays and all."""
    blocks = (plan.blocks.blocks[i] for i in section.blocks)
    looks = tuple(
        (b.kind, block_stem(b), tensor_text(b), _bytes(b.ranks), _bytes(b.rows), _bytes(b.experts)) for b in blocks
    )
    wires = []
    for wire in section.wires:
        edge = plan.blocks.edges[wire.edge]
        outside = _bytes(plan.blocks.blocks[edge.source].ranks) if wire.source == OUTSIDE else b""
        wires.append((wire.source, wire.target, edge.pattern, edge.comm, _bytes(edge.pairs), outside))
    return section.kind, looks, tuple(wires)


def _bytes(array: np.ndarray | None) -> bytes:
    return b"" if array is None else array.tobytes()


class Bands:
    """Makes templates; collects the drawings they use."""

    def __init__(self, plan: VerifiedPlan, lanes: Lanes, detail: Detail) -> None:
        self.plan, self.lanes, self.detail = plan, lanes, detail
        self.symbols = Symbols("q")
        self._templates: dict[tuple[object, ...], Template] = {}

    def template(self, section: Section) -> Template:
        """The template of a section, made once for all that look alike."""
        key = section_key(self.plan, section)
        if key not in self._templates:
            self._templates[key] = self._make(make_band(self.plan, section, self.lanes))
        return self._templates[key]

    def _make(self, band: Band) -> Template:
        drawn = {cell: self._draw(cell, band) for cell in dict.fromkeys(band.cells.values())}
        placed = {
            rank: f'<use href="#{drawn[cell]}" x="{num(self.lanes.left[rank])}"' for rank, cell in band.cells.items()
        }
        static = _frames(self.lanes, band)
        static += (_line_across(self.lanes, across, band.rows) for across in band.across)
        static += (f"{placed[rank]}/>" for rank, cell in band.cells.items() if cell.lines and not cell.ops)
        experts = ""
        for block, row in zip(band.blocks, band.rows, strict=True):
            if block.collective:
                static += _bars(self.lanes, block, row)
            if block.experts is not None:
                experts += _expert_ids(self.lanes, block, row)
        parts = [f'<use href="#{self.symbols.use("".join(static))}"/>', *_headings(self.lanes, band)]
        told = _told(band, self.plan.spec.cluster.node_of_rank, self.detail)
        kind = "" if self.detail is Detail.GPU else f' class="{band.section.kind.lower()}"'
        parts += (
            f'{placed[rank]} id="{_NAME}r{rank}"{kind}><title>{_LABEL} GPU {rank}{told[rank]}</title></use>'
            for rank, cell in band.cells.items()
            if cell.ops
        )
        if experts:
            parts.append(f'<use href="#{self.symbols.use(experts)}"/>')
        return Template("".join(parts), band.height)

    def _draw(self, cell: Cell, band: Band) -> str:
        kinds = [block.kind for block in band.blocks]
        return self.symbols.use(draw_cell(cell, kinds, band.rows, band.height, self.lanes.pitch, self.lanes.shape))


def _frames(lanes: Lanes, band: Band) -> list[str]:
    """Background, node stripes, kind and row names, for every panel that has an op or the end of a line across."""
    used = {rank for across in band.across for pair in across.pairs for rank in pair} | set(band.cells)
    parts = []
    for panel in lanes.panels:
        if used.isdisjoint(panel.ranks):
            continue
        size = f'width="{num(panel.end - panel.left)}" height="{num(band.height - 2)}"'
        parts.append(f'<rect class="mf" x="{num(panel.left)}" {size}/>')
        parts += (
            f'<rect class="mn" x="{num(s.left)}" width="{num(s.end - s.left)}" height="{num(band.height - 2)}"/>'
            for s in lanes.spans
            if s.ranks[0] in panel.ranks
        )
        if band.section.kind not in ("start", "end"):
            y = band.rows[0].top + 24
            parts.append(f'<text class="ml" x="{num(panel.left + 6)}" y="{num(y)}">{band.section.kind}</text>')
        for block, row in zip(band.blocks, band.rows, strict=True):
            if np.isin(block.ranks, panel.ranks).any():
                y = (row.top + row.bottom) / 2 + BASELINE
                name = xml_escape(row_name(block))
                parts.append(f'<text class="mr" x="{num(panel.first - 10)}" y="{num(y)}">{name}</text>')
    return parts


def _headings(lanes: Lanes, band: Band) -> list[str]:
    """The section's label at the left of every panel, and small before every further node."""
    y = band.rows[0].top
    parts = [
        f'<text class="mh" x="{num(panel.left + 6)}" y="{num(y + 11)}">{_LABEL}</text>'
        for panel in lanes.panels
        if any(rank in band.cells for rank in panel.ranks)
    ]
    firsts = {panel.ranks[0] for panel in lanes.panels}
    again = [s.left - 15 for s in lanes.spans if s.ranks[0] in band.cells and s.ranks[0] not in firsts]
    if band.section.layer is not None and again:
        spans = "".join(f'<tspan x="{num(x)}">{_LABEL}</tspan>' for x in again)
        parts.append(f'<text class="mb" y="{num(y + 9)}">{spans}</text>')
    return [*parts, "\n"]


def _told(band: Band, node_of: np.ndarray, detail: Detail) -> dict[int, str]:
    """Rank -> its node, and its experts with their tensor, else the tensor of the last op it has here."""
    if detail is Detail.GPU:
        return dict.fromkeys(band.cells, "")
    experts: dict[int, list[tuple[int, str]]] = {}
    for block in band.blocks:
        if block.experts is not None:
            for op, rank in enumerate(block.ranks[:, 0].tolist()):
                experts.setdefault(rank, []).append((int(block.experts[op]), _short_tensor(block, op)))
    texts = {}
    for rank, cell in band.cells.items():
        text = f" node {node_of[rank]}"
        own = experts.get(rank, [])
        if detail is Detail.EXPERTS or len({tensor for _, tensor in own}) <= 1:
            text += "".join(f" E{e}" for e, _ in own)
            last = own[-1][1] if own else _short_tensor(band.blocks[cell.ops[-1]]) if cell.ops else ""
            text += f" {last}" if detail is Detail.TENSORS else ""
        else:
            text += "".join(f" E{e} {tensor}" for e, tensor in own)
        texts[rank] = text.rstrip()
    return texts


def _short_tensor(block: OpBlock, op: int | None = None) -> str:
    """Shape and dtype, without the layout."""
    return tensor_text(block, op).rpartition(" ")[0]


def _line_across(lanes: Lanes, across: Across, rows: list[Row]) -> str:
    """One dashed line across lanes, with a drop from every source and to every target, and its name beside it."""
    target, pairs, comm = rows[across.target], across.pairs, across.comm
    assert target.bus is not None
    y, top = target.bus, 0.0 if across.source == OUTSIDE else rows[across.source].bottom
    above = sorted({lanes.centre(a) for a, _ in pairs})
    below = sorted({lanes.centre(b) + 8 for _, b in pairs})  # beside what comes straight down in that lane
    path = f"M{num(min(above + below))} {num(y)}H{num(max(above + below))}"
    path += "".join(f"M{num(x)} {num(top)}V{num(y)}" for x in above)
    path += "".join(f"M{num(x)} {num(y)}V{num(target.top)}" for x in below)
    text = f"{comm}: {COMM_NAMES[comm]}"
    if len(pairs) > 1 and len({b - a for a, b in pairs}) == 1:
        text = f"{comm}: each GPU r to GPU r + {pairs[0][1] - pairs[0][0]}"
    free = below[0] if below[0] > above[-1] + 20 else above[-1] + 8  # above the line nothing comes down there
    x, baseline = (free, y - 4) if len(above) <= len(below) else (below[-1] + 8, y + 11)
    return (
        f'<path class="mw" d="{path}" stroke="{COMMS[comm]}" stroke-dasharray="{DASH}"/>'
        f'<text class="ml" x="{num(x)}" y="{num(baseline)}">{xml_escape(text)}</text>'
    )


def _bars(lanes: Lanes, block: OpBlock, row: Row) -> list[str]:
    """A dashed bar per collective op over the shown lanes of its group, named once, or on every node it spans."""
    parts = []
    for op, ranks in enumerate(block.ranks.tolist()):
        if not any(rank in lanes.left for rank in ranks):
            continue
        left, right = lanes.bar(ranks)
        stem, group, tensor = block_stem(block), f"GPU {range_text(ranks)}", tensor_text(block, op)
        choices = (f"{stem} · {group} · {tensor}", f"{stem} · {group}", stem, block.kind)
        spans = [s for s in lanes.spans if left < s.left + 4 and s.end - 4 < right]
        places = [(s.left + 2, s.end - 2) for s in spans] if len(spans) > 1 else [(left, right)]
        text = ""
        for start, end in places:
            room = end - start - 8
            label = next((c for c in choices if text_width(c, SIZE) <= room), fitted(block.kind, SIZE, room))
            text += f'<tspan x="{num((start + end) / 2)}">{xml_escape(label)}</tspan>'
        y = (row.top + row.bottom) / 2 + BASELINE
        shape = draw_shape(block.kind, outline("box", left, row.top, right - left, row.bottom - row.top))
        title = xml_escape(f"{block.kind}, {group}, {tensor}")
        parts.append(f'<g class="comm"><title>{title}</title>{shape}<text y="{num(y)}">{text}</text></g>')
    return parts


def _expert_ids(lanes: Lanes, block: OpBlock, row: Row) -> str:
    """Expert ids in the shapes of an expert row."""
    assert block.experts is not None
    places = zip(block.ranks[:, 0].tolist(), block.experts.tolist(), strict=True)
    spans = "".join(f'<tspan x="{num(lanes.centre(r))}">E{e}</tspan>' for r, e in places if r in lanes.left)
    return f'<text y="{num((row.top + row.bottom) / 2 + BASELINE)}">{spans}</text>'
