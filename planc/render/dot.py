"""A view as Graphviz DOT: the nodes and edges of the SVG at the same places, for `dot` and for `neato -n2`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from planc.render.style import COMMS
from planc.render.svg import FRAME_INK, num
from planc.render.text import dot_quote, text_width
from planc.render.view import HEAD, SIZE, Edge, Frame, Node, Point, View

_SHAPES = {"ellipse": "ellipse", "box": "box", "round": "box", "parallelogram": "parallelogram"}
_INK = "#333333"  #: Graphviz reads no short colours
_ARROW = 7.0  #: length of an arrowhead in points


def dot(view: View) -> str:
    """The figure as DOT: 1 px is 1 point, y counts upwards. Frames are clusters; only communication is dashed."""
    lines = [
        f"digraph {dot_quote(view.name)} {{",
        f"  graph {_attributes({'label': view.title, 'comment': view.caption, 'fontname': 'Helvetica', 'bb': _box(view)})};",
        f"  node {_attributes({'fontname': 'Helvetica', 'fontsize': num(SIZE), 'fixedsize': 'true', 'margin': '0'})};",
        f"  edge {_attributes({'fontname': 'Helvetica', 'fontsize': num(SIZE), 'arrowsize': '0.7'})};",
    ]
    inside = _members(view)
    roots = [frame for frame in view.frames if _parent(frame, view.frames) is None]
    for frame in roots:
        lines += _cluster(view, frame, inside, "  ")
    lines += [_node(node, view.height, "  ") for node in inside[None]]
    lines += [_edge(edge, view.height) for edge in view.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _box(view: View) -> str:
    return f"0,0,{num(view.width)},{num(view.height)}"


def _attributes(values: Mapping[str, str]) -> str:
    return "[" + ", ".join(f"{key}={dot_quote(value)}" for key, value in values.items()) + "]"


def _holds(frame: Frame, x: float, y: float) -> bool:
    return frame.x <= x <= frame.x + frame.width and frame.y <= y <= frame.y + frame.height


def _parent(frame: Frame, frames: tuple[Frame, ...]) -> Frame | None:
    """The smallest other frame around a frame."""
    around = [
        f
        for f in frames
        if f is not frame and _holds(f, frame.x, frame.y) and _holds(f, frame.x + frame.width, frame.y + frame.height)
    ]
    return min(around, key=lambda f: f.width * f.height, default=None)


def _members(view: View) -> dict[str | None, list[Node]]:
    """Id of the innermost frame (None: none) -> its nodes."""
    found: dict[str | None, list[Node]] = {None: []} | {frame.id: [] for frame in view.frames}
    for node in view.nodes:
        x, y = node.x + node.width / 2, node.y + node.height / 2
        inner = min((f for f in view.frames if _holds(f, x, y)), key=lambda f: f.width * f.height, default=None)
        found[inner.id if inner else None].append(node)
    return found


def _cluster(view: View, frame: Frame, inside: dict[str | None, list[Node]], indent: str) -> list[str]:
    title = frame.title + (f"  ·  {frame.note}" if frame.note else "")
    low, high = (
        _place((frame.x, frame.y + frame.height), view.height),
        _place((frame.x + frame.width, frame.y), view.height),
    )
    middle = frame.x + 16 + text_width(title, SIZE) / 2, frame.y + HEAD / 2
    look = {"label": title, "labeljust": "l", "style": "solid", "color": FRAME_INK, "fontname": "Helvetica"}
    look |= {"fontsize": num(SIZE), "bb": f"{low},{high}", "lp": _place(middle, view.height)}
    lines = [f"{indent}subgraph {dot_quote('cluster_' + frame.id)} {{", f"{indent}  graph {_attributes(look)};"]
    for child in view.frames:
        if _parent(child, view.frames) is frame:
            lines += _cluster(view, child, inside, indent + "  ")
    lines += [_node(node, view.height, indent + "  ") for node in inside[frame.id]]
    return [*lines, indent + "}"]


def _node(node: Node, height: float, indent: str) -> str:
    style = "filled" + (",rounded" if node.shape == "round" else "") + (",dashed" if node.outline else "")
    middle = (node.x + node.width / 2, node.y + node.height / 2)
    values = {
        "kind": node.kind,
        **node.attributes,
        "label": "\n".join(node.lines),
        "tooltip": node.tooltip,
        "shape": _SHAPES[node.shape],
        "style": style,
        "fillcolor": node.fill,
        "color": COMMS[node.outline] if node.outline else _INK,
        "pos": _place(middle, height),
        "width": f"{node.width / 72:.4f}",
        "height": f"{node.height / 72:.4f}",
    }
    return f"{indent}{dot_quote(node.id)} {_attributes(values)};"


def _place(point: Point, height: float) -> str:
    return f"{num(point[0])},{num(height - point[1])}"


def _edge(edge: Edge, height: float) -> str:
    values = {"tensor": edge.tensor, "bytes": str(edge.bytes), "color": COMMS[edge.comm] if edge.comm else _INK}
    if edge.comm:
        values |= {"style": "dashed", "comm": edge.comm}
    values["pos"] = _spline(edge.points, height)
    if edge.label is not None:
        label = edge.label
        shift = {"start": label.width / 2, "middle": 0.0, "end": -label.width / 2}[label.anchor]
        values |= {"label": label.text, "lp": _place((label.x + shift, label.y - 4), height)}
    return f"  {dot_quote(edge.source)} -> {dot_quote(edge.target)} {_attributes(values)};"


def _spline(points: tuple[Point, ...], height: float) -> str:
    """Corners as the control points of straight Bézier stretches, ending where the arrowhead begins."""
    (x, y), (tip_x, tip_y) = points[-2], points[-1]
    length = max(abs(tip_x - x) + abs(tip_y - y), 0.1)
    back = min(_ARROW, 0.9 * length) / length
    end = tip_x + (x - tip_x) * back, tip_y + (y - tip_y) * back
    corners = [*points[:-1], end]
    places = [_place(corners[0], height)]
    for (ax, ay), (bx, by) in pairwise(corners):
        thirds = ((ax + (bx - ax) / 3, ay + (by - ay) / 3), (ax + 2 * (bx - ax) / 3, ay + 2 * (by - ay) / 3), (bx, by))
        places += [_place(p, height) for p in thirds]
    return f"e,{_place(points[-1], height)} " + " ".join(places)
