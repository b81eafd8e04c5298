"""Mermaid: the simplified figure as a flowchart for Markdown, with the figure's words, colours and dashes.

Mermaid does the layout, so places on the page only say what lies in which frame. Ids are numbers, and text is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export.target import Job, Target, nothing, refusal
from planc.render.simplified import MAX_RUNS, simplified_view
from planc.render.style import COMMS
from planc.render.view import Edge, Frame, Node, View
from planc.verify import VerifiedPlan

MAX_EDGES = 100  #: what stays readable; Mermaid itself stops at 500
_ROOM = (
    "config:",
    "  flowchart:",
    "    subGraphTitleMargin: {top: 4, bottom: 16}",
)  #: so that no shape touches a frame's title
_LONG = 26  #: characters of a label that Mermaid may break; it is broken behind the shape then, as in the figure
_SHAPES = {"ellipse": ("([", "])"), "round": ("(", ")"), "box": ("[", "]"), "parallelogram": ("[/", "/]")}
_SPECIAL = {ord(c): f"#{ord(c)};" for c in '#"&<>`%;{}|\\'}  #: Mermaid's entities: a number between # and ;


def faults(job: Job) -> Iterator[Diagnostic]:
    """Figures with too many edges, however few layers they show."""
    view = _view(job.plan)
    if len(view.edges) > MAX_EDGES:
        message = f"the outline of this plan has {len(view.edges)} edges; {MAX_EDGES} are the most that stay readable"
        yield refusal(TARGET.title, message, "plan fewer replicas that differ: parallelism.dp", "parallelism.dp")


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """One file, to be shown as it is or put between ```` ```mermaid ```` and ```` ``` ````."""
    yield "plan.mmd", _flowchart(_view(job.plan)).encode()


def _view(plan: VerifiedPlan) -> View:
    """The figure with as many runs of layers as `MAX_EDGES` allows, at least one."""
    for most in range(MAX_RUNS, 0, -1):
        view = simplified_view(plan, most)
        if len(view.edges) <= MAX_EDGES:
            break
    return view


def _flowchart(view: View) -> str:
    names = {node.id: f"n{number}" for number, node in enumerate(view.nodes)}
    looks = {look: f"c{number}" for number, look in enumerate(dict.fromkeys(map(_look, view.nodes)))}
    title = json.dumps(view.title, ensure_ascii=False).replace("%", "\\u0025")  # no directive of Mermaid's
    lines = ["---", f"title: {title}", *_ROOM, "---", "flowchart TB"]
    lines += _inside(view, None, names)
    lines += [f"  {line}" for line in _edges(view.edges, names)]
    for look, name in looks.items():
        chosen = ",".join(names[node.id] for node in view.nodes if _look(node) == look)
        lines += [f"  classDef {name} {look}", f"  class {chosen} {name}"]
    for comm, colour in COMMS.items():
        chosen = ",".join(str(number) for number, edge in enumerate(view.edges) if edge.comm == comm)
        if chosen:
            lines.append(f"  linkStyle {chosen} stroke:{colour},stroke-width:1.5px,stroke-dasharray:5 3")
    return "\n".join([*lines, ""])


def _look(node: Node) -> str:
    """Fill, and the outline of a collective: dashed, in the colour of its class."""
    outline = f"stroke:{COMMS[node.outline]},stroke-dasharray:5 3" if node.outline else "stroke:#333"
    return f"fill:{node.fill},{outline},color:#111"


def _inside(view: View, frame: Frame | None, names: dict[str, str], depth: int = 1) -> Iterator[str]:
    """Lines of what lies in a frame, and in none that is smaller; None is the page."""
    pad = "  " * depth
    for node in view.nodes:
        if _around(view, node.x + node.width / 2, node.y + node.height / 2) is frame:
            left, right = _SHAPES[node.shape]
            first, *rest = node.lines
            text = "<br/>".join([f"<b>{_text(first)}</b>" if node.bold else _text(first), *map(_text, rest)])
            yield f'{pad}{names[node.id]}{left}"{text}"{right}'
    for number, inner in enumerate(view.frames):
        if inner is not frame and _around(view, inner.x, inner.y, inner) is frame:
            title = " · ".join(_text(part) for part in (inner.title, inner.note.partition(";")[0]) if part)
            yield f'{pad}subgraph f{number}["{title}"]'
            yield from _inside(view, inner, names, depth + 1)
            yield f"{pad}end"


def _around(view: View, x: float, y: float, but: Frame | None = None) -> Frame | None:
    """The smallest frame around a point."""
    found = [
        frame
        for frame in view.frames
        if frame is not but and frame.x <= x <= frame.x + frame.width and frame.y <= y <= frame.y + frame.height
    ]
    return min(found, key=lambda frame: frame.height, default=None)


def _edges(edges: tuple[Edge, ...], names: dict[str, str]) -> Iterator[str]:
    """A line each, in order. Of the edges that carry one tensor from a node, or to one, the first is labelled; the order of
    experts on a GPU carries none."""
    told: set[tuple[str, str]] = set()
    for edge in edges:
        arrow, label = "-.->" if edge.comm else "-->", ""
        ends = {(f"from {edge.source}", edge.tensor), (f"to {edge.target}", edge.tensor)}
        if edge.tensor != "order" and not ends & told:
            told |= ends
            text = _text(f"{edge.comm} · {edge.tensor}" if edge.comm else edge.tensor)
            label = f'|"{text.replace("] ", "]<br/>", 1) if len(text) > _LONG else text}"|'
        yield f"{names[edge.source]} {arrow}{label} {names[edge.target]}"


def _text(text: str) -> str:
    return " ".join(text.split()).translate(_SPECIAL)


TARGET = Target(
    title="Mermaid",
    version="11 and 12",
    says="the plan in outline: one layer of every kind, replicas folded, tensors and classes of communication",
    lacks=f"single ops of GPUs, times, figures of more than {MAX_EDGES} edges",
    faults=faults,
    notes=nothing,
    files=files,
)
