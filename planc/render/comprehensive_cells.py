"""One lane in one band: the small shapes of a GPU's ops, and the lines between its rows. Cells that look the same
share one symbol, so what is drawn here is drawn a few dozen times at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from planc.graph import COLLECTIVES
from planc.render.comprehensive_layout import GUTTER, OUTSIDE, SHORT, Row
from planc.render.style import COMMS, DASH, OPS, OpStyle, comm_of
from planc.render.svg import num
from planc.render.text import xml_escape

SKEW, ROUND = 5.0, 5.0  #: how far the sides of a parallelogram lean; radius of round corners
BASELINE = 3.2  #: from the middle of a line of text to its baseline
INK = "#444444"


class Line(NamedTuple):
    """A line from row to row of a lane; `OUTSIDE` as source is the band's upper edge, as target its lower one."""

    source: int
    target: int
    comm: str


class Cell(NamedTuple):
    """What a lane shows in a band: the rows where it has an op of its own, those where a bar covers it, its lines."""

    ops: tuple[int, ...]
    bars: tuple[int, ...]
    lines: tuple[Line, ...]


@dataclass
class Symbols:
    """Drawings in ``<defs>``, each once: drawing -> id."""

    prefix: str
    ids: dict[str, str] = field(default_factory=dict)

    def use(self, drawing: str) -> str:
        """Id of a drawing."""
        return self.ids.setdefault(drawing, f"{self.prefix}{len(self.ids)}")

    def definitions(self) -> list[str]:
        """The content of ``<defs>``."""
        return [f'<g id="{name}">{drawing}</g>' for drawing, name in self.ids.items()]


def outline(shape: str, x: float, y: float, width: float, height: float) -> str:
    """Path data of a shape."""
    if shape == "ellipse":
        rx, ry = num(width / 2), num(height / 2)
        return f"M{num(x)} {num(y + height / 2)}a{rx} {ry} 0 1 0 {num(width)} 0a{rx} {ry} 0 1 0 {num(-width)} 0z"
    if shape == "parallelogram":
        return f"M{num(x + SKEW)} {num(y)}H{num(x + width)}L{num(x + width - SKEW)} {num(y + height)}H{num(x)}z"
    if shape == "round":
        corner = f"{num(ROUND)} {num(ROUND)} 0 0 1"
        return (
            f"M{num(x + ROUND)} {num(y)}h{num(width - 2 * ROUND)}a{corner} {num(ROUND)} {num(ROUND)}"
            f"v{num(height - 2 * ROUND)}a{corner} {num(-ROUND)} {num(ROUND)}h{num(2 * ROUND - width)}"
            f"a{corner} {num(-ROUND)} {num(-ROUND)}v{num(2 * ROUND - height)}a{corner} {num(ROUND)} {num(-ROUND)}z"
        )
    return f"M{num(x)} {num(y)}h{num(width)}v{num(height)}h{num(-width)}z"


def draw_shape(kind: str, path: str) -> str:
    """Outlines of ops of a kind. A collective's outline is dashed, nothing else is."""
    style = OPS[kind]
    look = 'stroke="#333333"'
    if kind in COLLECTIVES:
        look = f'stroke="{COMMS[comm_of(kind)]}" stroke-width="1.4" stroke-dasharray="{DASH}"'
    return f'<path class="{style.family.replace(" ", "-")}" d="{path}" fill="{style.fill}" {look}/>'


def draw_cell(cell: Cell, kinds: Sequence[str], rows: Sequence[Row], height: float, pitch: float, width: float) -> str:
    """Shapes and lines of a lane, its left edge at x 0. Lines come first; none of them crosses a shape.

    Shapes of one look are one path, and all names one text: a browser lays out each text and path of each cell.
    """
    lane = _Lane(cell, kinds, rows, height, pitch, width)
    paths: dict[OpStyle, tuple[str, str]] = {}
    names = ""
    for r in cell.ops:
        style = OPS[kinds[r]]
        drawn = outline(style.shape, (pitch - width) / 2, rows[r].top, width, rows[r].bottom - rows[r].top)
        paths[style] = (kinds[r], paths.get(style, ("", ""))[1] + drawn)
        if short := SHORT.get(kinds[r]):
            y = (rows[r].top + rows[r].bottom) / 2 + BASELINE
            names += f'<tspan x="{num(pitch / 2)}" y="{num(y)}">{xml_escape(short)}</tspan>'
    shapes = "".join(draw_shape(kind, path) for kind, path in paths.values())
    return lane.lines() + shapes + (f"<text>{names}</text>" if names else "")


class _Trunk(NamedTuple):
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    comm: str


class _Lane:
    """Draws the lines of one cell: straight down where nothing is between, else beside the shapes."""

    def __init__(
        self, cell: Cell, kinds: Sequence[str], rows: Sequence[Row], height: float, pitch: float, width: float
    ) -> None:
        self.cell, self.kinds, self.rows = cell, kinds, rows
        self.height, self.pitch, self.width, self.middle = height, pitch, width, pitch / 2
        self.occupied = sorted({*cell.ops, *cell.bars})
        side = (pitch - width) / 2
        self.tracks = [side - GUTTER / 2, pitch - side + GUTTER / 2, side - GUTTER + 1, pitch - side + GUTTER - 1]

    def lines(self) -> str:
        """All lines, a path per class of communication."""
        paths: dict[str, str] = {}
        for line in self.cell.lines:
            if not self._between(line.source, line.target):
                paths[line.comm] = paths.get(line.comm, "") + self._straight(line)
        free = [-1.0] * len(self.tracks)
        for trunk in self._trunks():
            start, end = self._start(min(trunk.sources, key=self._start)), self._end(trunk.targets)
            track = next((i for i, until in enumerate(free) if until < start), len(free) - 1)
            free[track] = end
            paths[trunk.comm] = paths.get(trunk.comm, "") + self._beside(trunk, self.tracks[track])
        return "".join(
            f'<path class="mw" d="{path}" stroke="{COMMS[comm]}" stroke-dasharray="3 2"/>'
            if comm
            else f'<path class="mw" d="{path}" stroke="{INK}"/>'
            for comm, path in sorted(paths.items())
        )

    def _between(self, source: int, target: int) -> list[int]:
        """Rows that a straight line from row to row would cross."""
        end = len(self.rows) if target == OUTSIDE else target
        return [r for r in self.occupied if source < r < end]

    def _start(self, row: int) -> float:
        return 0.0 if row == OUTSIDE else self.rows[row].bottom

    def _end(self, targets: Sequence[int]) -> float:
        return self.height if OUTSIDE in targets else max(self.rows[t].top for t in targets)

    def _straight(self, line: Line) -> str:
        return f"M{num(self.middle)} {num(self._start(line.source))}V{num(self._end((line.target,)))}"

    def _trunks(self) -> list[_Trunk]:
        """Lines that skip rows, joined where they share their source, or their target and kind of source."""
        skipping = [line for line in self.cell.lines if self._between(line.source, line.target)]
        fan = {(a.source, a.comm) for a in skipping for b in skipping if a[::2] == b[::2] and a != b}
        joined: dict[tuple[object, ...], list[Line]] = {}
        for line in skipping:
            kind = "" if line.source == OUTSIDE else self.kinds[line.source]
            key = (
                ("from", line.source, line.comm)
                if (line.source, line.comm) in fan
                else ("to", line.target, kind, line.comm)
            )
            joined.setdefault(key, []).append(line)
        trunks = [
            _Trunk(tuple(sorted({x.source for x in lines})), tuple(sorted({x.target for x in lines})), lines[0].comm)
            for lines in joined.values()
        ]
        return sorted(trunks, key=lambda t: (t.sources, t.targets, t.comm))

    def _beside(self, trunk: _Trunk, x: float) -> str:
        """A line at ``x`` beside the shapes, interrupted where bars lie across it, with its ends."""
        path, top, bottom = "", self.height, self._end(trunk.targets)
        for source in trunk.sources:
            y = self._start(source)
            if source == OUTSIDE or source in self.cell.ops:
                y += 3.0
                aside = (
                    0.0 if source == OUTSIDE else 10.0 if x > self.middle else -10.0
                )  # clear of the line straight down
                path += f"M{num(self.middle + aside)} {num(y - (4 if aside else 3))}V{num(y)}H{num(x)}"
            top = min(top, y)
        for target in trunk.targets:
            if target == OUTSIDE:
                bottom -= 3.0
                path += f"M{num(x)} {num(bottom)}H{num(self.middle)}V{num(bottom + 3)}"
            elif target in self.cell.ops:
                row = self.rows[target]
                y = (row.top + row.bottom) / 2
                bottom = max(bottom, y)
                inset = SKEW / 2 if OPS[self.kinds[target]].shape == "parallelogram" else 0.0
                reach = self.width / 2 - inset
                path += f"M{num(x)} {num(y)}H{num(self.middle + (reach if x > self.middle else -reach))}"
        for row_number in self.cell.bars:
            row = self.rows[row_number]
            if top < row.top and row.bottom < bottom:
                path += f"M{num(x)} {num(top)}V{num(row.top - 1)}"
                top = row.bottom + 1
        return path + f"M{num(x)} {num(top)}V{num(bottom)}"
