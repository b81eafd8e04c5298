"""GraphML: the plan's op graph for networkx, yEd, Gephi and Cytoscape."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export.graph_xml import EDGE, LACKS, NODE, SAYS, as_text, edges, graph_faults, nodes
from planc.export.target import Job, Target, nothing
from planc.render.text import xml_escape

_SPACE = "http://graphml.graphdrawing.org/xmlns"


def faults(job: Job) -> Iterator[Diagnostic]:
    """Graphs too large to open."""
    yield from graph_faults(job.plan, TARGET.title)


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """One file: types of attributes, the plan's name, ops, edges."""
    of_node, of_edge = as_text(NODE, '<data key="n{}">{}</data>'), as_text(EDGE, '<data key="e{}">{}</data>')
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<graphml xmlns="{_SPACE}">']
    lines.append('<key id="plan" for="graph" attr.name="plan" attr.type="string"/>')
    for domain, types in (("node", NODE), ("edge", EDGE)):
        for number, (name, kind) in enumerate(types.items()):
            lines.append(f'<key id="{domain[0]}{number}" for="{domain}" attr.name="{name}" attr.type="{kind}"/>')
    lines += ['<graph edgedefault="directed">', f'<data key="plan">{xml_escape(job.plan.spec.name)}</data>']
    lines += [f'<node id="{name}">{of_node(attributes)}</node>' for name, attributes in nodes(job.plan)]
    lines += [f'<edge source="{s}" target="{t}">{of_edge(attributes)}</edge>' for s, t, attributes in edges(job.plan)]
    yield "plan.graphml", "\n".join([*lines, "</graph>", "</graphml>", ""]).encode()


TARGET = Target(
    title="GraphML",
    version="1.0",
    says=SAYS,
    lacks=LACKS,
    faults=faults,
    notes=nothing,
    files=files,
)
