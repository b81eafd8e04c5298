"""GEXF 1.2draft: the plan's op graph for Gephi and networkx."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export.graph_xml import EDGE, LACKS, NODE, SAYS, as_text, edges, graph_faults, nodes
from planc.export.target import Job, Target, nothing
from planc.render.text import xml_escape

_SPACE = "http://www.gexf.net/1.2draft"


def faults(job: Job) -> Iterator[Diagnostic]:
    """Graphs too large to open."""
    yield from graph_faults(job.plan, TARGET.title)


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """One file: the plan's name, types of attributes, ops, edges. Labels are ids; edges are numbered, as the format asks."""
    of_node, of_edge = (as_text(types, '<attvalue for="{}" value="{}"/>') for types in (NODE, EDGE))
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<gexf xmlns="{_SPACE}" version="1.2">']
    lines.append(f"<meta><creator>planc</creator><description>{xml_escape(job.plan.spec.name)}</description></meta>")
    lines.append('<graph mode="static" defaultedgetype="directed">')
    for domain, types in (("node", NODE), ("edge", EDGE)):
        lines.append(f'<attributes class="{domain}" mode="static">')
        for number, (name, kind) in enumerate(types.items()):
            lines.append(f'<attribute id="{number}" title="{name}" type="{kind}"/>')
        lines.append("</attributes>")
    lines.append("<nodes>")
    for name, attributes in nodes(job.plan):
        lines.append(f'<node id="{name}" label="{name}"><attvalues>{of_node(attributes)}</attvalues></node>')
    lines += ["</nodes>", "<edges>"]
    for number, (s, t, attributes) in enumerate(edges(job.plan)):
        data = f"<attvalues>{of_edge(attributes)}</attvalues>"
        lines.append(f'<edge id="{number}" source="{s}" target="{t}">{data}</edge>')
    yield "plan.gexf", "\n".join([*lines, "</edges>", "</graph>", "</gexf>", ""]).encode()


TARGET = Target(
    title="GEXF",
    version="1.2draft",
    says=SAYS,
    lacks=LACKS,
    faults=faults,
    notes=nothing,
    files=files,
)
