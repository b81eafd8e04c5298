"""GraphML and GEXF say what `plan.graph` says, as networkx reads them; Mermaid says what the simplified figure says."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from random_specs import specs
from small_specs import Compiled, small_spec

import planc
from planc.diagnostics import Diagnostic
from planc.export import Job, graph_xml, mermaid, refusals, target, write
from planc.render.simplified import simplified_view
from planc.render.view import View

HOSTILE = "a <b>&\"q\" 'x' `y` ]]> #quot; %%{init: {}}%% é"
DENSE = {"model": {"moe": None, "dense_mlp": {"intermediate": 64}}}
NAMES = ("reference", "stages", "micro-batches", "copies", "dense")


def plan_of(name: str, example: Compiled) -> planc.VerifiedPlan:
    if name == "reference":
        return example("moe-61l-ep64-dp2")
    if name == "stages":
        return example("moe-4l-16gpu-baseline")
    if name == "micro-batches":
        return example("moe-4l-64gpu", "workload.micro_batches=2")
    if name == "copies":
        parts: dict[str, Any] = {
            "model": {"moe": {"experts": 3, "top_k": 2, "intermediate": 32}, "vocab": 512},
            "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 2, "expert_tp": 2},
            "expert_rule": {"scope": "layer", "slots_per_gpu": 1, "spares": "replicate"},
        }
        return planc.compile(small_spec(**parts))
    return planc.compile(small_spec(**DENSE))


def written(name: str, plan: planc.VerifiedPlan) -> bytes:
    [(_, content)] = target(name).files(Job(plan))
    return content


def named(plan: planc.VerifiedPlan, name: str) -> planc.VerifiedPlan:
    """The same plan with a name that no spec may have."""
    return dataclasses.replace(plan, spec=plan.spec.model_copy(update={"name": name}))


# --- GraphML and GEXF -----------------------------------------------------------------------------------------------------


def read(form: str, content: bytes) -> nx.DiGraph:
    """The graph as networkx reads it, without the labels and edge numbers that GEXF asks for."""
    if form == "graphml":
        return nx.read_graphml(io.BytesIO(content))
    graph = nx.read_gexf(io.BytesIO(content))
    for node, facts in graph.nodes(data=True):
        assert facts.pop("label") == node
    assert sorted(int(facts.pop("id")) for *_, facts in graph.edges(data=True)) == list(range(graph.size()))
    return graph


def of_node(facts: dict[str, Any]) -> dict[str, Any]:
    """Attributes of `plan.graph` as text holds them: a shape in brackets, `m` for rows that differ."""
    shape = ["m" if size < 0 else str(size) for size in facts["shape"]] if "shape" in facts else None
    return facts | ({"shape": f"[{', '.join(shape)}]"} if shape is not None else {})


def of_edge(facts: dict[str, Any]) -> dict[str, Any]:
    shape, rest = re.fullmatch(r"(\[[^]]*\]) (.*)", facts["tensor"]).groups()  # type: ignore[union-attr]
    dtype, layout = rest.split(" ")
    marks = {"comm": facts["comm"]} if "comm" in facts else {}
    about = {"shape": shape, "dtype": dtype, "layout": layout, "bytes": facts["bytes"]}
    return about | {"communication": "style" in facts} | marks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["graphml", "gexf"])
def test_networkx_reads_the_plans_graph(form: str, name: str, example: Compiled) -> None:
    plan = plan_of(name, example)
    found = read(form, written(form, plan))
    assert found.is_directed() and not found.is_multigraph()
    assert list(found) == list(plan.graph)
    for node, facts in plan.graph.nodes(data=True):
        assert found.nodes[node] == of_node(facts), node
    assert set(found.edges) == set(plan.graph.edges)
    for source, end, facts in plan.graph.edges(data=True):
        told = found.edges[source, end]
        assert told == of_edge(facts), (source, end)
        assert type(told["bytes"]) is int and type(told["communication"]) is bool
    assert any(facts["communication"] for *_, facts in found.edges(data=True))


@pytest.mark.parametrize("form", ["graphml", "gexf"])
def test_attributes_are_declared_with_their_types(form: str, example: Compiled) -> None:
    root = ElementTree.fromstring(written(form, plan_of("stages", example)))
    if form == "graphml":
        keys = {(k.get("for"), k.get("attr.name")): k.get("attr.type") for k in root if k.tag.endswith("}key")}
        assert keys.pop(("graph", "plan")) == "string"
    else:
        space = "{http://www.gexf.net/1.2draft}"
        lists = root.findall(f"{space}graph/{space}attributes")
        keys = {(some.get("class"), one.get("title")): one.get("type") for some in lists for one in some}
    assert keys == {("node", key): kind for key, kind in graph_xml.NODE.items()} | {
        ("edge", key): kind for key, kind in graph_xml.EDGE.items()
    }
    assert {keys["node", "layer"], keys["node", "gpu"], keys["edge", "bytes"]} == {"long"}
    assert keys["edge", "communication"] == "boolean"


@pytest.mark.parametrize("form", ["graphml", "gexf"])
def test_names_are_escaped(form: str, example: Compiled) -> None:
    """Of the plan, and of ops, should a plan.json ever name them so. XML has no control characters: they become blanks."""
    plan = plan_of("stages", example)
    blocks = list(plan.blocks.blocks)
    blocks[3] = dataclasses.replace(blocks[3], name=HOSTILE, kind=HOSTILE)
    odd = named(
        dataclasses.replace(plan, blocks=dataclasses.replace(plan.blocks, blocks=tuple(blocks))), f"{HOSTILE}\n\x01"
    )
    found = read(form, written(form, odd))
    assert set(found) == set(odd.graph) and set(found.edges) == set(odd.graph.edges)
    assert {facts["kind"] for node, facts in found.nodes(data=True) if node.startswith(HOSTILE)} == {HOSTILE}
    if form == "graphml":
        assert found.graph["plan"] == f"{HOSTILE}  "
    else:
        root = ElementTree.fromstring(written(form, odd))
        assert [e.text for e in root.iter() if e.tag.endswith("}description")] == [f"{HOSTILE}  "]


@pytest.mark.parametrize("form", ["graphml", "gexf", "mermaid"])
def test_the_same_plan_gives_the_same_bytes(form: str) -> None:
    first, again = (planc.compile(planc.load_spec("moe-4l-16gpu-baseline")) for _ in range(2))
    assert written(form, first) == written(form, again)


@pytest.mark.parametrize("form", ["graphml", "gexf"])
def test_a_graph_too_large_is_refused_and_the_change_helps(
    form: str, example: Compiled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of("reference", example)
    monkeypatch.setattr(graph_xml, "MAX_EDGES", plan.graph.size() * 2 // 3)
    [fault] = refusals(plan, [form])[form]
    assert fault.code == "PLN503" and "parallelism.dp: 1" in fault.hint and "56,210 edges are too many" in fault.message
    with pytest.raises(planc.PlancError):
        write(plan, [form], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    half = example(
        "moe-61l-ep64-dp2",
        "parallelism.dp=1",
        "workload.batch=512",
        "cluster.groups=[{nodes: 8, gpus_per_node: 8, gpu: reference-h100}]",
    )
    assert not refusals(half, [form])[form]
    monkeypatch.setattr(graph_xml, "MAX_EDGES", 100)
    assert "chakra" in refusals(plan, [form])[form][0].hint


# --- Mermaid --------------------------------------------------------------------------------------------------------------

TEXT = r'"([^"<>&`|]|<b>|</b>|<br/>)*"'  #: only the tags that planc writes; everything else is an entity
NODE = re.compile(rf" +(n\d+)(?:\(\[({TEXT})\]\)|\(({TEXT})\)|\[({TEXT})\]|\[/({TEXT})/\])")
FRAME = re.compile(rf" +subgraph (f\d+)\[({TEXT})\]")
EDGE = re.compile(rf"  (n\d+) (-->|-\.->)(?:\|({TEXT})\|)? (n\d+)")
STYLE = re.compile(r"  classDef (c\d+) fill:#[0-9a-f]{6},stroke:#[0-9a-f]{3,6}(,stroke-dasharray:5 3)?,color:#111")
CLASS = re.compile(r"  class (n\d+(?:,n\d+)*) (c\d+)")
LINKS = re.compile(r"  linkStyle (\d+(?:,\d+)*) stroke:(#[0-9a-f]{6}),stroke-width:1.5px,stroke-dasharray:5 3")


@dataclasses.dataclass
class Chart:
    """What a flowchart says."""

    title: str = ""
    nodes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  #: id -> lines, tags gone
    shapes: dict[str, str] = dataclasses.field(default_factory=dict)
    inside: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  #: id -> titles of frames, outermost first
    edges: list[tuple[str, str, bool, str]] = dataclasses.field(default_factory=list)  #: source, target, dashed, label
    dashed: set[str] = dataclasses.field(default_factory=set)  #: nodes with a dashed outline
    colours: dict[int, str] = dataclasses.field(default_factory=dict)  #: edge -> colour


def lines_of(quoted: str) -> list[str]:
    """A quoted text as its lines, entities resolved."""
    plain = re.sub(r"</?b>", "", quoted[1:-1]).split("<br/>")
    return [re.sub(r"#(\d+);", lambda m: chr(int(m[1])), line) for line in plain]


def parsed(content: bytes) -> Chart:
    """A flowchart read by the grammar above; whatever else a line holds is an error."""
    lines = content.decode().split("\n")
    begin = lines.index("flowchart TB")
    assert lines[0] == lines[begin - 1] == "---" and lines[-1] == ""
    assert lines[2 : begin - 1] == ["config:", "  flowchart:", "    subGraphTitleMargin: {top: 4, bottom: 16}"]
    assert lines[1].startswith("title: ") and "%" not in lines[1]
    chart, frames, styles = Chart(json.loads(lines[1].removeprefix("title: "))), [], {}
    for line in lines[begin + 1 : -1]:
        if found := NODE.fullmatch(line):
            assert found[1] not in chart.nodes and not chart.edges
            text = next(group for group in found.groups()[1:] if group and group.startswith('"'))
            chart.nodes[found[1]] = lines_of(text)
            chart.shapes[found[1]] = line.strip()[len(found[1])] + line.strip()[len(found[1]) + 1]
            chart.inside[found[1]] = tuple(frames)
        elif found := FRAME.fullmatch(line):
            frames.append(lines_of(found[2])[0])
        elif line.strip() == "end":
            frames.pop()
        elif found := EDGE.fullmatch(line):
            assert not frames and {found[1], found[5]} <= chart.nodes.keys()
            chart.edges.append(
                (found[1], found[5], found[2] == "-.->", " ".join(lines_of(found[3])) if found[3] else "")
            )
        elif found := STYLE.fullmatch(line):
            styles[found[1]] = bool(found[2])
        elif found := CLASS.fullmatch(line):
            chart.dashed |= set(found[1].split(",")) if styles[found[2]] else set()
        elif found := LINKS.fullmatch(line):
            chart.colours |= dict.fromkeys(map(int, found[1].split(",")), found[2])
        else:
            raise AssertionError(f"not a line of a flowchart: {line}")
    assert not frames
    return chart


def same_as(chart: Chart, view: View) -> None:
    """The flowchart has the nodes, words, frames, edges and dashes of the figure."""
    assert chart.title == view.title
    assert Counter(tuple(lines) for lines in chart.nodes.values()) == Counter(node.lines for node in view.nodes)
    names = {node.id: f"n{number}" for number, node in enumerate(view.nodes)}
    for node in view.nodes:
        name = names[node.id]
        assert chart.nodes[name] == list(node.lines) and (name in chart.dashed) == bool(node.outline)
        shape = {"ellipse": "([", "round": '("', "box": '["', "parallelogram": "[/"}[node.shape]
        assert chart.shapes[name] == shape
        around = [f for f in view.frames if f.x < node.x < f.x + f.width and f.y < node.y < f.y + f.height]
        titles = tuple(f.title for f in sorted(around, key=lambda f: -f.height))
        assert len(titles) == len(chart.inside[name])
        assert all(told.startswith(title) for told, title in zip(chart.inside[name], titles, strict=True))
    assert [edge[:3] for edge in chart.edges] == [(names[e.source], names[e.target], bool(e.comm)) for e in view.edges]
    told: set[tuple[str, str, str]] = set()
    for number, (edge, (source, end, _, label)) in enumerate(zip(view.edges, chart.edges, strict=True)):
        assert (number in chart.colours) == bool(edge.comm)
        ends = {("from", source, edge.tensor), ("to", end, edge.tensor)}
        if edge.tensor == "order" or ends & told:  # beside one that says it, or nothing to say
            assert not label
        else:
            assert label == (f"{edge.comm} · {edge.tensor}" if edge.comm else edge.tensor)
            told |= ends
    colours = {(edge.comm, chart.colours.get(number)) for number, edge in enumerate(view.edges)}
    assert len(colours) == len({comm for comm, _ in colours}) == len({colour for _, colour in colours})


@pytest.mark.parametrize("name", NAMES)
def test_the_flowchart_is_the_figure(name: str, example: Compiled) -> None:
    plan = plan_of(name, example)
    view = simplified_view(plan)
    assert len(view.edges) <= mermaid.MAX_EDGES
    same_as(parsed(written("mermaid", plan)), view)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=specs())
def test_any_plan_is_read_back(parts: dict[str, Any]) -> None:
    try:
        plan = planc.compile(small_spec(**parts))
    except planc.PlancError:
        assume(False)
        raise
    for form in ("graphml", "gexf"):
        found = read(form, written(form, plan))
        assert dict(found.nodes(data=True)) == {n: of_node(facts) for n, facts in plan.graph.nodes(data=True)}
        assert {e: found.edges[e] for e in found.edges} == {e: of_edge(plan.graph.edges[e]) for e in plan.graph.edges}
    chart, view = parsed(written("mermaid", plan)), simplified_view(plan)
    assert len(chart.edges) <= mermaid.MAX_EDGES
    if len(view.edges) <= mermaid.MAX_EDGES:
        same_as(chart, view)


SHIPPED = sorted(path.stem for path in (Path(planc.__file__).parent.parent / "specs").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_flowchart_stays_small(name: str, example: Compiled) -> None:
    assert len(parsed(written("mermaid", example(name))).edges) <= mermaid.MAX_EDGES


def test_fewer_layers_are_drawn_where_the_figure_is_large() -> None:
    """Six layers, each on GPUs of its own, with three turns of experts: more than Mermaid's readers follow."""
    plan = planc.compile(
        small_spec(
            model={"layers": 6, "moe": {"experts": 24, "top_k": 2, "intermediate": 32, "gated": False}},
            expert_rule={"scope": "model", "slots_per_gpu": 18},
            parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1},
        )
    )
    assert len(simplified_view(plan).edges) > mermaid.MAX_EDGES
    chart = parsed(written("mermaid", plan))
    assert len(chart.edges) <= mermaid.MAX_EDGES
    assert any("not drawn" in " ".join(lines) for lines in chart.nodes.values())
    assert not refusals(plan, ["mermaid"])["mermaid"]


def test_what_no_cut_makes_small_is_refused(example: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mermaid, "MAX_EDGES", 5)
    [fault] = refusals(plan_of("stages", example), ["mermaid"])["mermaid"]
    assert isinstance(fault, Diagnostic) and fault.code == "PLN503" and "5 are the most" in fault.message


def test_text_cannot_leave_its_quotes(example: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("dense", example)
    view = simplified_view(plan)
    node = dataclasses.replace(view.nodes[0], lines=(HOSTILE[:8],), width=400.0, height=400.0)
    frames = (dataclasses.replace(view.frames[0], title=HOSTILE), *view.frames[1:])
    odd = dataclasses.replace(view, nodes=(node, *view.nodes[1:]), frames=frames, title=f"{HOSTILE}\n---\n")
    monkeypatch.setattr(mermaid, "_view", lambda plan: odd)
    chart = parsed(written("mermaid", plan))
    assert chart.nodes["n0"] == [HOSTILE[:8]] and chart.title == f"{HOSTILE}\n---\n"
    assert any(title.startswith(HOSTILE) for titles in chart.inside.values() for title in titles)
    assert len(chart.edges) == len(view.edges)
