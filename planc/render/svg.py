"""A view as SVG: one string, no dependency. Ids start with the figure's name, so that figures can share a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from planc.graph import COLLECTIVES
from planc.render.style import COMMS, DASH, FONT
from planc.render.text import xml_escape
from planc.render.view import (
    HEAD,
    LINE,
    MARGIN,
    SIZE,
    SKEW,
    TITLE_SIZE,
    Edge,
    Frame,
    Label,
    LegendItem,
    Node,
    Point,
    View,
    caption_lines,
)

INK, LINE_INK, FRAME_INK, QUIET = "#111", "#333", "#9a9a9a", "#444"
LIMIT = 150_000  #: bytes of a figure in a page
#: what tooltips say, from most to least; a figure too large for its page says less
_EVERYTHING, _TENSORS, _NODES, _NOTHING = 3, 2, 1, 0


def svg(view: View) -> str:
    """The figure, to be written to a file or put into an HTML page as it is. Tooltips shrink before it passes `LIMIT`."""
    for tooltips in (_EVERYTHING, _TENSORS, _NODES, _NOTHING):
        text = _written(view, tooltips)
        if len(text.encode()) <= LIMIT:
            break
    return text


def _written(view: View, tooltips: int) -> str:
    size = f'viewBox="0 0 {num(view.width)} {num(view.height)}" width="{num(view.width)}" height="{num(view.height)}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} id="{xml_escape(view.name)}" class="planc-figure" role="img" '
        f'aria-label="{xml_escape(view.title)}" font-family="{xml_escape(FONT)}" font-size="{num(SIZE)}" '
        f'fill="{INK}" style="font-kerning:none;max-width:100%;height:auto" text-rendering="geometricPrecision">',
        f"<title>{xml_escape(view.title)}</title><desc>{xml_escape(view.caption)}</desc>",
        _markers(view),
        f'<rect class="page" width="{num(view.width)}" height="{num(view.height)}" fill="#ffffff"/>',
        f'<text class="title" x="{num(MARGIN)}" y="28" font-size="{num(TITLE_SIZE)}" font-weight="bold">'
        f"{xml_escape(view.title)}</text>",
        *_caption(view),
        *(_frame(view.name, frame) for frame in view.frames),
        *_edges(view.edges, view.name, tooltips),
        '<g class="nodes" text-anchor="middle">',
        *(_node(view.name, node, tooltips > _NOTHING) for node in view.nodes),
        "</g>",
        *(_label(label) for label in view.labels),
        *(_label(edge.label, f"label {edge.comm}".strip()) for edge in view.edges if edge.label),
        *(_sample(item, view.name) for item in view.legend),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def num(value: float) -> str:
    """A coordinate with at most one decimal: ``12``, ``12.5``."""
    text = f"{value:.1f}"
    return text.removesuffix(".0")


def _caption(view: View) -> list[str]:
    return [
        f'<text class="caption" x="{num(MARGIN)}" y="{num(48 + i * LINE)}" fill="{QUIET}">{xml_escape(line)}</text>'
        for i, line in enumerate(caption_lines(view.caption))
    ]


# --- edges ----------------------------------------------------------------------------------------------------------


def _colour(comm: str) -> str:
    return COMMS[comm] if comm else LINE_INK


def _classes(view: View) -> list[str]:
    """Classes of lines that the figure and its legend use, in a fixed order."""
    used = {edge.comm for edge in view.edges} | {item.comm for item in view.legend}
    return [comm for comm in ("", *COMMS) if comm in used]


def _markers(view: View) -> str:
    heads = (
        f'<marker id="{view.name}-arrow-{comm or "local"}" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" '
        f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 .5L8 4L0 7.5z" fill="{_colour(comm)}"/>'
        "</marker>"
        for comm in _classes(view)
    )
    return f"<defs>{''.join(heads)}</defs>"


def _edges(edges: Sequence[Edge], name: str, tooltips: int) -> list[str]:
    """Lines, a group per class. A stretch that an earlier line of the class drew is not drawn again: dashes laid over
    dashes would look solid. So lines that join a trunk end at it, and only the one that drew its end has the head."""
    parts = []
    for comm in ("", *COMMS):
        chosen = [edge for edge in edges if edge.comm == comm]
        if not chosen:
            continue
        look = f'class="edges {comm or "local"}" fill="none" stroke="{_colour(comm)}" stroke-width="1.3"'
        dash = f' stroke-dasharray="{DASH}"' if comm else ""
        with_head: list[str] = []
        without: list[str] = []
        drawn: dict[tuple[bool, float], list[tuple[float, float]]] = {}
        for edge in chosen:
            path, head = _path(edge.points, drawn)
            title = f"{edge.source} → {edge.target}: {edge.tensor}" if tooltips == _EVERYTHING else edge.tensor
            text = f'<path d="{path}"><title>{xml_escape(title)}</title></path>'
            text = f'<path d="{path}"/>' if tooltips < _TENSORS else text
            (with_head if head else without).append(text)
        if with_head:
            parts += [f'<g {look}{dash} marker-end="url(#{name}-arrow-{comm or "local"})">', *with_head, "</g>"]
        if without:
            parts += [f"<g {look}{dash}>", *without, "</g>"]
    return parts


def _path(points: Sequence[Point], drawn: dict[tuple[bool, float], list[tuple[float, float]]]) -> tuple[str, bool]:
    """Path data of what is not drawn yet, and whether it reaches the end of the line."""
    text, pen = "", None
    for start, end in pairwise(points):
        for a, b in _undrawn(start, end, drawn):
            if a != pen:
                text += f"M{num(a[0])} {num(a[1])}"
            text += (
                f"V{num(b[1])}" if a[0] == b[0] else f"H{num(b[0])}" if a[1] == b[1] else f"L{num(b[0])} {num(b[1])}"
            )
            pen = b
    return text or f"M{num(points[-1][0])} {num(points[-1][1])}", pen == points[-1]


def _undrawn(
    start: Point, end: Point, drawn: dict[tuple[bool, float], list[tuple[float, float]]]
) -> list[tuple[Point, Point]]:
    """The parts of an upright or level stretch that no earlier line covers, in drawing order."""
    upright = start[0] == end[0]
    if not upright and start[1] != end[1]:
        return [(start, end)]
    fixed, axis = (start[0], 1) if upright else (start[1], 0)
    low, high = sorted((start[axis], end[axis]))
    covered = drawn.setdefault((upright, fixed), [])
    free, at = [], low
    for first, last in sorted(covered):
        if first > at and at < high:
            free.append((at, min(first, high)))
        at = max(at, last)
    if at < high:
        free.append((at, high))
    covered += free
    ordered = free if end[axis] > start[axis] else [(b, a) for a, b in reversed(free)]
    return [((fixed, a), (fixed, b)) if upright else ((a, fixed), (b, fixed)) for a, b in ordered]


# --- shapes and text ------------------------------------------------------------------------------------------------


def _frame(name: str, frame: Frame) -> str:
    x, y, width = frame.x, frame.y, frame.width
    note = _label(Label(frame.note, x + width - 12, y + HEAD - 7, "end"), "note") if frame.note else ""
    return (
        f'<g id="{xml_escape(f"{name}-{frame.id}")}" class="frame"><rect x="{num(x)}" y="{num(y)}" width="{num(width)}" '
        f'height="{num(frame.height)}" rx="6" fill="none" stroke="{FRAME_INK}"/>'
        f"{_label(Label(frame.title, x + 16, y + HEAD - 7, bold=True), 'frame-title')}{note}</g>"
    )


def _node(name: str, node: Node, tooltip: bool) -> str:
    kind = f"{node.kind} {node.outline}" if node.kind in COLLECTIVES else node.kind
    middle = node.x + node.width / 2
    first = node.y + node.height / 2 - len(node.lines) * LINE / 2 + LINE - 3.5
    text = "".join(
        f'<text x="{num(middle)}" y="{num(first + i * LINE)}"{_bold(node.bold and i == 0)}>{xml_escape(line)}</text>'
        for i, line in enumerate(node.lines)
    )
    title = f"<title>{xml_escape(node.tooltip)}</title>" if tooltip else ""
    shape = _shape(node.shape, node.x, node.y, node.width, node.height, node.fill, node.outline)
    return f'<g id="{xml_escape(f"{name}-{node.id}")}" class="node {kind}">{title}{shape}{text}</g>'


def _bold(bold: bool) -> str:
    return ' font-weight="bold"' if bold else ""


def _shape(shape: str, x: float, y: float, width: float, height: float, fill: str, outline: str) -> str:
    """The outline of a shape; dashed for a collective."""
    dash = f' stroke-width="1.6" stroke-dasharray="{DASH}"' if outline else ""
    look = f'fill="{fill}" stroke="{_colour(outline)}"{dash}'
    if shape == "ellipse":
        middle = f'cx="{num(x + width / 2)}" cy="{num(y + height / 2)}"'
        return f'<ellipse {middle} rx="{num(width / 2)}" ry="{num(height / 2)}" {look}/>'
    if shape == "parallelogram":
        corners = ((x + SKEW, y), (x + width, y), (x + width - SKEW, y + height), (x, y + height))
        return f'<polygon points="{_points(corners)}" {look}/>'
    rounded = ' rx="12"' if shape == "round" else ""
    return f'<rect x="{num(x)}" y="{num(y)}" width="{num(width)}" height="{num(height)}"{rounded} {look}/>'


def _points(points: Iterable[Point]) -> str:
    return " ".join(f"{num(x)},{num(y)}" for x, y in points)


def _label(label: Label, kind: str = "note") -> str:
    anchor = "" if label.anchor == "start" else f' text-anchor="{label.anchor}"'
    return (
        f'<text class="{kind}" x="{num(label.x)}" y="{num(label.y)}"{anchor}{_bold(label.bold)}>'
        f"{xml_escape(label.text)}</text>"
    )


def _sample(item: LegendItem, name: str) -> str:
    """One legend entry: a small shape or a line, and its text."""
    if item.shape:
        drawn = _shape(item.shape, item.x, item.y - 6, 30, 12, item.colour, "dp" if item.dashed else "")
        drawn = drawn.replace('rx="12"', 'rx="6"')
    else:
        dash = f' stroke-dasharray="{DASH}"' if item.dashed else ""
        drawn = (
            f'<path d="M{num(item.x)} {num(item.y)}H{num(item.x + 30)}" fill="none" stroke="{item.colour}" '
            f'stroke-width="1.3"{dash} marker-end="url(#{name}-arrow-{item.comm or "local"})"/>'
        )
    kind = f"legend {item.comm}" if item.dashed else "legend"
    text = f'<text x="{num(item.x + 36)}" y="{num(item.y + 4)}">{xml_escape(item.text)}</text>'
    return f'<g class="{kind.strip()}">{drawn}{text}</g>'
