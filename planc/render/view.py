"""What a figure shows, before any format: nodes, edges, frames and labels with their places on the page, in px.

The SVG and the DOT of a figure are both written from one `View`. Text fits its shape by construction: a `Node` whose
lines do not fit cannot be made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from planc.graph import COLLECTIVES
from planc.graph.types import Comm
from planc.render.style import COMMS, EXPERT, OPS, OpStyle, Shape
from planc.render.text import fitted, text_width, wrapped

WIDTH = 1000.0  #: every page figure
MARGIN = 16.0
SIZE, LINE = 11.0, 14.0  #: text size and line height; 11 px is the smallest that reads on a page
TITLE_SIZE = 16.0
HEAD = 24.0  #: height of a frame's title row
PAD = 2.0  #: between text and outline
SKEW = 10.0  #: how far the sides of a parallelogram lean

#: what stands for many ops at once
GROUPS: dict[str, OpStyle] = {
    "tp_group": OpStyle("box", "#d4ecfa", "GPUs: attention, dense MLP, gate"),
    "holder": OpStyle("box", EXPERT, "GPUs: experts"),
    "fold": OpStyle("box", "#f2f2f2", "named, not drawn"),
}
COMM_NAMES: dict[str, str] = {
    "tp": "inside a TP group",
    "dispatch": "tokens to experts",
    "combine": "outputs back",
    "pp": "pipeline hand-over",
    "dp": "between replicas, input and output",
}
Point = tuple[float, float]


def style_of(kind: str) -> OpStyle:
    """Shape, fill and family of an op kind or of a kind in `GROUPS`."""
    return GROUPS.get(kind) or OPS[kind]


@dataclass(frozen=True, slots=True)
class Node:
    """A shape with lines of text, the first one bold; ``x``, ``y`` is its upper left corner."""

    id: str
    lines: tuple[str, ...]
    shape: Shape
    fill: str
    kind: str
    x: float
    y: float
    width: float
    height: float
    tooltip: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    outline: str = ""  #: communication class of a collective, whose outline is dashed
    bold: bool = True  #: whether the first line is bold

    def __post_init__(self) -> None:
        if not fits(self.lines, self.shape, self.width, self.height, bold=self.bold):
            raise AssertionError(f"{self.id}: {self.lines} do not fit {self.shape} {self.width} × {self.height}")

    @property
    def top(self) -> Point:
        """Middle of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """Middle of the lower side."""
        return self.x + self.width / 2, self.y + self.height

    @property
    def left(self) -> Point:
        """Middle of the left side, on the outline."""
        return self.x + self._inset, self.y + self.height / 2

    @property
    def right(self) -> Point:
        """Middle of the right side, on the outline."""
        return self.x + self.width - self._inset, self.y + self.height / 2

    @property
    def _inset(self) -> float:
        return SKEW / 2 if self.shape == "parallelogram" else 0.0


@dataclass(frozen=True, slots=True)
class Label:
    """Free text; ``y`` is its baseline."""

    text: str
    x: float
    y: float
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False

    @property
    def width(self) -> float:
        """An upper bound of the text's width."""
        return text_width(self.text, SIZE, bold=self.bold)


@dataclass(frozen=True, slots=True)
class Edge:
    """Data from ``source`` to ``target`` (node ids) along ``points``; ``comm`` is its class when it leaves the GPU."""

    source: str
    target: str
    points: tuple[Point, ...]
    label: Label | None = None
    comm: Comm = ""
    tensor: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """A group: a thin solid frame with a title at its upper left and a note at its upper right."""

    id: str
    title: str
    x: float
    y: float
    width: float
    height: float
    note: str = ""

    def __post_init__(self) -> None:
        title, note = text_width(self.title, SIZE, bold=True), text_width(self.note, SIZE)
        if title + note + (44 if self.note else 28) > self.width:
            raise AssertionError(f"{self.id}: `{self.title}` and `{self.note}` do not fit {self.width}")


@dataclass(frozen=True, slots=True)
class LegendItem:
    """A sample and what it means: a shape, or a line when ``shape`` is empty."""

    text: str
    x: float
    y: float
    shape: Shape | Literal[""]
    colour: str
    comm: str = ""
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """A whole figure. ``caption`` says what it shows and what it folds."""

    name: str
    title: str
    caption: str
    width: float
    height: float
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    frames: tuple[Frame, ...]
    labels: tuple[Label, ...]
    legend: tuple[LegendItem, ...]


def fits(lines: Sequence[str], shape: Shape, width: float, height: float, *, bold: bool = True) -> bool:
    """Whether every line lies inside the shape when the block of lines is centred in it."""
    top = -len(lines) * LINE / 2
    for i, line in enumerate(lines):
        half = text_width(line, SIZE, bold=bold and i == 0) / 2 + PAD
        upper, lower = top + i * LINE + 2, top + (i + 1) * LINE - 1  # ink, not the whole line
        reach = max(abs(upper), abs(lower))
        if reach > height / 2 or half > _half_width(shape, width, height, reach):
            return False
    return True


def _half_width(shape: Shape, width: float, height: float, reach: float) -> float:
    """Room to either side of the middle, ``reach`` px above and below it."""
    if shape == "ellipse":
        return width / 2 * math.sqrt(max(0.0, 1 - (2 * reach / height) ** 2))
    if shape == "parallelogram":
        return (width - SKEW) / 2 - SKEW * reach / height
    return width / 2


def shortened(lines: Sequence[str], shape: Shape, width: float, height: float, *, bold: bool = True) -> tuple[str, ...]:
    """The lines, each cut to what the shape holds at its place."""
    top = -len(lines) * LINE / 2
    cut = []
    for i, line in enumerate(lines):
        reach = max(abs(top + i * LINE + 2), abs(top + (i + 1) * LINE - 1))
        room = 2 * (_half_width(shape, width, height, min(reach, height / 2)) - PAD)
        cut.append(fitted(line, SIZE, room, bold=bold and i == 0))
    return tuple(cut)


def needed_height(lines: Sequence[str], shape: Shape, width: float, *, bold: bool = True) -> float | None:
    """The least height at which the lines fit, or None when no height helps."""
    height = LINE * len(lines) + 8
    while height <= 2 * LINE * len(lines) + 40:
        if fits(lines, shape, width, height, bold=bold):
            return height
        height += 2
    return None


def node(
    id: str,
    kind: str,
    lines: Sequence[str],
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    tooltip: str = "",
    attributes: Mapping[str, str] | None = None,
    comm: str = "",
    bold: bool = True,
) -> Node:
    """A node in the style of its kind, its lines cut to fit; ``comm`` is the class of a collective."""
    style = style_of(kind)
    shown = shortened(lines, style.shape, width, height, bold=bold)
    outline = comm if kind in COLLECTIVES else ""
    return Node(
        id, shown, style.shape, style.fill, kind, x, y, width, height,
        tooltip or ", ".join(lines), dict(attributes or {}), outline, bold,
    )  # fmt: skip


def frame(id: str, title: str, x: float, y: float, width: float, height: float, note: str = "") -> Frame:
    """A frame whose title and note are shortened to what its width holds."""
    title = fitted(title, SIZE, width - 28, bold=True)
    room = width - 44 - text_width(title, SIZE, bold=True)
    return Frame(id, title, x, y, width, height, fitted(note, SIZE, room) if room > 60 else "")


def caption_lines(caption: str) -> list[str]:
    """The caption as it is drawn."""
    return wrapped(caption, SIZE, WIDTH - 2 * MARGIN)


def content_top(caption: str) -> float:
    """Where a figure's content begins, below title and caption."""
    return 36 + LINE * len(caption_lines(caption)) + 14


def compose(
    name: str,
    title: str,
    caption: str,
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    frames: Sequence[Frame] = (),
    labels: Sequence[Label] = (),
) -> View:
    """The figure with its legend below everything else."""
    ends = [n.y + n.height for n in nodes] + [f.y + f.height for f in frames] + [y for e in edges for _, y in e.points]
    legend = _legend(nodes, edges, max(ends) + 24)
    bottom = legend[-1].y + 22
    title = fitted(title, TITLE_SIZE, WIDTH - 2 * MARGIN, bold=True)
    return View(name, title, caption, WIDTH, bottom, tuple(nodes), tuple(edges), tuple(frames), tuple(labels), legend)


def _legend(nodes: Sequence[Node], edges: Sequence[Edge], top: float) -> tuple[LegendItem, ...]:
    """Samples of what the figure uses, in rows."""
    samples: dict[str, tuple[Shape | Literal[""], str, str, bool]] = {}
    for n in nodes:
        text = "collective (dashed outline)" if n.outline else style_of(n.kind).family
        samples.setdefault(text, (n.shape, n.fill, "", bool(n.outline)))
    classes = {e.comm for e in edges} | {n.outline for n in nodes}
    for comm, text in COMM_NAMES.items():
        if comm in classes:
            samples[f"{comm}: {text}"] = ("", COMMS[comm], comm, True)
    if "" in {e.comm for e in edges}:
        samples["stays on its GPU"] = ("", "#333333", "", False)
    items: list[LegendItem] = []
    x, y = MARGIN, top
    for text, (shape, colour, comm, dashed) in samples.items():
        step = 36 + text_width(text, SIZE) + 22
        if x + step > WIDTH and items:
            x, y = MARGIN, y + 22
        items.append(LegendItem(text, x, y, shape, colour, comm, dashed))
        x += step
    return tuple(items)
