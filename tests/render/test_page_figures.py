"""The page figures without a browser: every example spec, and plans that fold, split, repeat and leave spares."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import planc
from planc.graph import PlanGraph
from planc.render import PAGE_FIGURES, Node, View, dot, svg
from planc.render.folding import fold_layers, fold_replicas, lane_classes
from planc.render.text import dot_quote, fitted, numbers_text, text_width, wrapped, xml_escape
from planc.render.view import SIZE, fits, node
from planc.verify import VerifiedPlan

ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
_WORK = "workload: {phase: decode, batch: 1000, isl: 1024, osl: 256}\n"
VARIANTS = {
    "pp4": "model: moe-61l\ncluster: reference-h100\n" + _WORK + "parallelism: {dp: 1, pp: 4, ep: 32, tp: 8}\n",
    "pp8-turns": "model: moe-61l\ncluster: reference-h100\n"
    + _WORK
    + "parallelism: {dp: 2, pp: 8, ep: 8, tp: 8}\nexpert_rule: none\n",
    "micro-batches": "model: moe-61l\ncluster: reference-h100\nworkload: {phase: decode, batch: 1024, isl: 1024, osl: 256, "
    "micro_batches: 2}\nparallelism: {dp: 1, pp: 2, ep: 64, tp: 8}\n",
    "expert-tp": "model: mixtral-8x7b\ncluster: h100-sxm-2x8\n"
    + _WORK
    + "parallelism: {dp: 1, pp: 1, ep: 16, tp: 4, expert_tp: 2}\n",
    "idle": "model: moe-4l\ncluster: reference-h100-8x8\n"
    + _WORK
    + "parallelism: {dp: 1, pp: 1, ep: 64, tp: 8, gating: sharded}\nexpert_rule: {scope: layer, spares: idle}\n",
    "copies": "model: moe-4l\ncluster: reference-h100-8x8\n"
    + _WORK
    + "parallelism: {dp: 1, pp: 1, ep: 64, tp: 8}\nexpert_rule: {scope: layer, spares: replicate}\n",
    "uneven": "model: deepseek-v2\ncluster: h100-sxm-8x8\nworkload: {phase: decode, batch: 77, isl: 1024, osl: 256}\n"
    "parallelism: {dp: 1, pp: 1, ep: 64, tp: 8, tp_comm: reduce_scatter, gating: sharded}\n",
    "dense": "model: llama-3.1-8b\ncluster: h100-sxm-1x8\n" + _WORK + "parallelism: {dp: 2, pp: 2, ep: 2, tp: 2}\n",
    "prefill": "model: deepseek-v3\ncluster: h100-sxm-32x8\nworkload: {phase: prefill, batch: 512, isl: 8192, osl: 1024}\n"
    "parallelism: {dp: 1, pp: 1, ep: 256, tp: 8}\n",
}
_PLANS: dict[str, VerifiedPlan] = {}


def plan_of(name: str) -> VerifiedPlan:
    """The compiled plan of an example spec or variant, compiled once."""
    if name not in _PLANS:
        text = VARIANTS.get(name)
        path = ROOT / "specs" / f"{name}.yaml"
        spec = (
            planc.load_spec(path) if text is None else planc.parse_spec(f"name: {name}\n{text}", folder=ROOT / "specs")
        )
        _PLANS[name] = planc.compile(spec)
    return _PLANS[name]


def cases() -> Iterator[tuple[str, str]]:
    """Every plan with every figure that it gets."""
    for name in (*SPECS, *VARIANTS):
        for figure in PAGE_FIGURES:
            if (name, figure) != ("dense", "detailed_expert_dag"):
                yield name, figure


def tool(name: str) -> str:
    """A program of Graphviz; the test fails, and says what to install, when it is missing."""
    path = shutil.which(name)
    assert path is not None, f"`{name}` is missing: install the Debian package graphviz"
    return path


@pytest.fixture(params=list(cases()), ids="-".join)
def view(request: pytest.FixtureRequest) -> View:
    """One figure of one plan."""
    name, figure = request.param
    return PAGE_FIGURES[figure](plan_of(name))


def _tags(root: ET.Element, tag: str) -> list[ET.Element]:
    return list(root.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_svg_is_well_formed_small_and_readable(view: View) -> None:
    text = svg(view)
    root = ET.fromstring(text)
    assert len(text.encode()) <= 150_000
    assert root.get("width") == "1000"
    assert root.get("viewBox", "").split()[2] == "1000"
    sizes = re.findall(r'font-size="([\d.]+)"', text)
    assert sizes
    assert min(float(size) for size in sizes) >= 11
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(found == view.name or found.startswith(f"{view.name}-") for found in ids)
    assert root.get("role") == "img"
    assert root.get("aria-label")


def test_every_node_is_drawn_with_id_class_and_tooltip(view: View) -> None:
    root = ET.fromstring(svg(view))
    groups = {g.get("id"): g for g in _tags(root, "g") if "node" in (g.get("class") or "").split()}
    assert set(groups) == {f"{view.name}-{n.id}" for n in view.nodes}
    for n in view.nodes:
        group = groups[f"{view.name}-{n.id}"]
        assert n.kind in (group.get("class") or "").split()
        assert group[0].tag.endswith("title")
        assert group[0].text
        assert [t.text for t in _tags(group, "text")] == list(n.lines)


def test_everything_lies_inside_the_page(view: View) -> None:
    for n in view.nodes:
        assert n.x >= 0
        assert n.x + n.width <= view.width
        assert n.y >= 0
        assert n.y + n.height <= view.height
    for edge in view.edges:
        assert all(0 <= x <= view.width and 0 <= y <= view.height for x, y in edge.points)
    for frame in view.frames:
        assert frame.x >= 0
        assert frame.x + frame.width <= view.width
    for item in view.legend:
        assert item.x + 36 + text_width(item.text, SIZE) <= view.width
        assert item.y + 8 <= view.height


def test_nodes_do_not_overlap_and_hold_their_text(view: View) -> None:
    for a, b in combinations(view.nodes, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, (a.id, b.id)
    for n in view.nodes:
        assert fits(n.lines, n.shape, n.width, n.height, bold=n.bold), n.id


def _touches(n: Node, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a stretch of a line passes through the inside of a node's box."""
    left, right = sorted((a[0], b[0]))
    top, bottom = sorted((a[1], b[1]))
    return right > n.x + 1 and left < n.x + n.width - 1 and bottom > n.y + 1 and top < n.y + n.height - 1


def test_no_line_runs_over_a_shape_or_a_label(view: View) -> None:
    labels = [*view.labels, *(e.label for e in view.edges if e.label)]
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}
    boxes = [(t.x - shift[t.anchor] * t.width, t.y - 9, t.width, 11.0, t.text) for t in labels]
    for edge in view.edges:
        for a, b in zip(edge.points, edge.points[1:], strict=False):
            assert a[0] == b[0] or a[1] == b[1], (edge.source, edge.target)
            for n in view.nodes:
                assert n.id in (edge.source, edge.target) or not _touches(n, a, b), (edge.source, edge.target, n.id)
            for x, y, width, height, text in boxes:
                label = Node("label", (), "box", "", "fold", x - 1, y - 1, width + 2, height + 2)
                assert not _touches(label, a, b), (edge.source, edge.target, text)


def test_dashed_is_communication_and_nothing_else(view: View) -> None:
    root = ET.fromstring(svg(view))
    comms = {"tp", "dispatch", "combine", "pp", "dp"}
    dashed = [g for g in _tags(root, "g") if g.get("stroke-dasharray")]
    assert all(comms & set((g.get("class") or "").split()) for g in dashed)
    solid = [g for g in _tags(root, "g") if "edges" in (g.get("class") or "").split() and not g.get("stroke-dasharray")]
    assert all((g.get("class") or "").split() == ["edges", "local"] for g in solid)
    for g in _tags(root, "g"):
        classes = set((g.get("class") or "").split())
        if "node" in classes:
            assert any(child.get("stroke-dasharray") for child in g) == bool(comms & classes)
        if "frame" in classes:
            assert not any(child.get("stroke-dasharray") for child in g)


def test_every_edge_of_the_view_is_in_the_svg_once(view: View) -> None:
    root = ET.fromstring(svg(view))
    paths = [p for g in _tags(root, "g") if "edges" in (g.get("class") or "").split() for p in _tags(g, "path")]
    assert len(paths) == len(view.edges)
    assert len({(e.source, e.target) for e in view.edges}) == len(view.edges)


@pytest.mark.graphviz
def test_dot_holds_the_same_nodes_and_edges(view: View, tmp_path: Path) -> None:
    source = tmp_path / "figure.dot"
    source.write_text(dot(view), encoding="utf-8")
    program = (
        'N {print("N\\t", $.name)} E {print("E\\t", $.tail.name, "\\t", $.head.name, "\\t", $.style, "\\t", $.comm)}'
    )
    found = subprocess.run([tool("gvpr"), program, source], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    assert sorted(row[1] for row in rows if row[0] == "N") == sorted(n.id for n in view.nodes)
    edges = sorted(tuple(row[1:]) for row in rows if row[0] == "E")
    assert edges == sorted((e.source, e.target, "dashed" if e.comm else "", e.comm) for e in view.edges)
    counted = subprocess.run([tool("gc"), "-n", "-e", source], capture_output=True, text=True, check=True).stdout
    assert counted.split()[:2] == [str(len(view.nodes)), str(len(view.edges))]
    assert subprocess.run([tool("acyclic"), "-n", source], capture_output=True, check=False).returncode == 0


@pytest.mark.graphviz
def test_neato_keeps_the_places(view: View, tmp_path: Path) -> None:
    source = tmp_path / "figure.dot"
    source.write_text(dot(view), encoding="utf-8")
    done = subprocess.run([tool("neato"), "-n2", "-Tplain", source], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    places = {}
    for line in done.stdout.replace("\\\n", "").splitlines():  # long lines are broken
        words = shlex.split(line) if line.startswith("node ") else []
        if words:
            places[words[1]] = float(words[2]) * 72, float(words[3]) * 72
    left = min(x for x, _ in places.values()) - min(n.x + n.width / 2 for n in view.nodes)
    low = min(y for _, y in places.values()) - min(view.height - n.y - n.height / 2 for n in view.nodes)
    for n in view.nodes:
        x, y = places[n.id]
        assert abs(x - left - n.x - n.width / 2) < 0.5
        assert abs(y - low - (view.height - n.y - n.height / 2)) < 0.5


@pytest.mark.parametrize(("name", "figure"), [c for c in cases() if c[0] in SPECS])
def test_nothing_is_cut_in_the_examples(name: str, figure: str) -> None:
    view = PAGE_FIGURES[figure](plan_of(name))
    assert [line for n in view.nodes for line in n.lines if line.endswith("…")] == []


@pytest.mark.graphviz
@pytest.mark.parametrize(("name", "figure"), [c for c in cases() if c[0] in SPECS and "10240" not in c[0]])
def test_dot_accepts_the_file_without_a_warning(name: str, figure: str, tmp_path: Path) -> None:
    source = tmp_path / "figure.dot"
    source.write_text(dot(PAGE_FIGURES[figure](plan_of(name))), encoding="utf-8")
    done = subprocess.run(
        [tool("dot"), "-Tsvg", "-o", tmp_path / "o.svg", source], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_same_bytes_under_two_hash_seeds(tmp_path: Path) -> None:
    program = (
        "import sys, planc, hashlib\nfrom planc.render import PAGE_FIGURES, dot, svg\n"
        "for name in ('moe-61l-ep64-dp2', 'deepseek-v3-128gpu'):\n"
        "    plan = planc.compile(planc.load_spec(f'specs/{name}.yaml'))\n"
        "    for make in PAGE_FIGURES.values():\n"
        "        view = make(plan)\n"
        "        print(hashlib.sha256((svg(view) + dot(view)).encode()).hexdigest())\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 6


# --- what the figures say -------------------------------------------------------------------------------------------


def test_detailed_figure_has_every_expert_with_its_own_edges() -> None:
    for name, layer, experts in (
        ("moe-61l-ep64-dp2", 3, 64),
        ("deepseek-v3-ep256", 3, 256),
        ("deepseek-v3-128gpu", 5, 256),
    ):
        plan = plan_of(name)
        view = PAGE_FIGURES["detailed_expert_dag"](plan)
        found = [n for n in view.nodes if n.kind == "expert"]
        assert sorted(int(n.attributes["expert"]) for n in found) == list(range(experts))
        for n in found:
            assert [e.comm for e in view.edges if e.target == n.id] == ["dispatch"]
            assert [e.comm for e in view.edges if e.source == n.id] == ["combine"]
            assert n.id.split(".")[0] == "L3"
            assert n.id in plan.graph
        assert layer in plan.placement.layers


def test_detailed_figure_agrees_with_the_reference_arithmetic() -> None:
    view = PAGE_FIGURES["detailed_expert_dag"](plan_of("moe-61l-ep64-dp2"))
    into = next(e for e in view.edges if e.target == "L3.expert.r17")
    assert into.bytes == 16 * 7168 * 2  # 512 tokens × top-2 over 64 experts, bf16
    assert into.tensor == "[16, 7168] bf16 S(experts)"
    expert = next(n for n in view.nodes if n.id == "L3.expert.r17")
    assert expert.lines == ("E17", "GPU 17 · 16 tok", "in 229.4 kB", "out 229.4 kB")


def test_detailed_figure_of_another_layer_and_replica() -> None:
    from planc.render import detailed_view

    view = detailed_view(plan_of("moe-61l-ep64-dp2"), layer=60, replica=1)
    assert {n.attributes["gpu"] for n in view.nodes if n.kind == "expert"} == {str(r) for r in range(64, 128)}
    with pytest.raises(ValueError, match="no routed experts"):
        detailed_view(plan_of("moe-61l-ep64-dp2"), layer=0)
    with pytest.raises(ValueError, match="replica 2"):
        detailed_view(plan_of("moe-61l-ep64-dp2"), replica=2)


def test_simplified_figure_names_its_folds() -> None:
    view = PAGE_FIGURES["simplified_moe_dag"](plan_of("moe-61l-ep64-dp2"))
    assert [(f.title.split(" · ")[0], f.note.split(",")[0]) for f in view.frames[1:]] == [
        ("layers 0–2", "×3"),
        ("layers 3–60", "×58"),
    ]
    assert "0–2 (×3), 3–60 (×58)" in view.caption
    kinds = [n.kind for n in view.nodes]
    assert {"attn_qkv", "dense_up", "gate", "dispatch", "expert", "combine", "aggregate", "broadcast"} <= set(kinds)


def test_deployment_figure_shows_all_gpus() -> None:
    view = PAGE_FIGURES["complete_deployment_dag"](plan_of("moe-61l-ep64-dp2"))
    groups = [n.attributes["ranks"] for n in view.nodes if n.kind == "tp_group"]
    assert groups == [f"{r}-{r + 7}" for r in range(0, 64, 8)]
    assert [n.attributes["ranks"] for n in view.nodes if n.kind == "fold"] == ["64-127"]


# --- proofs of folds --------------------------------------------------------------------------------------------------


def _with_block(plan: VerifiedPlan, name: str, **changes: Any) -> VerifiedPlan:
    graph = plan.blocks
    blocks = [replace(b, **changes) if b.name == name else b for b in graph.blocks]
    return replace(plan, blocks=PlanGraph(tuple(blocks), graph.edges, graph.world_size))


def test_layers_fold_only_while_their_blocks_are_equal() -> None:
    plan = plan_of("moe-61l-ep64-dp2")
    assert fold_layers(plan) == [(0, 2, 3), (3, 60, 58)]
    expert = plan.blocks.blocks[plan.blocks.by_name["L30.expert"]]
    assert expert.rows is not None
    rows = expert.rows.copy()
    rows[5] += 1
    for change in ({"rows": rows}, {"split": 2}, {"ranks": expert.ranks[::-1]}, {"reads": {}}, {"kind": "gate"}):
        broken = _with_block(plan, "L30.expert", **change)
        assert fold_layers(broken) == [(0, 2, 3), (3, 29, 27), (30, 30, 1), (31, 60, 30)]


def test_layers_fold_only_while_their_edges_are_equal() -> None:
    plan = plan_of("moe-61l-ep64-dp2")
    graph = plan.blocks
    where = next(i for i, e in enumerate(graph.edges) if graph.blocks[e.target].name == "L30.dispatch")
    edges = list(graph.edges)
    edges[where] = replace(edges[where], comm="tp")
    broken = replace(plan, blocks=PlanGraph(graph.blocks, tuple(edges), graph.world_size))
    assert (30, 30, 1) in fold_layers(broken)
    where = next(i for i, e in enumerate(graph.edges) if graph.blocks[e.target].name == "L31.attn_qkv")
    edges = list(graph.edges)
    edges[where] = replace(edges[where], pattern="group:128")
    broken = replace(plan, blocks=PlanGraph(graph.blocks, tuple(edges), graph.world_size))
    assert fold_layers(broken) == [(0, 2, 3), (3, 30, 28), (31, 60, 30)]


def test_replicas_fold_only_while_shifted_ops_are_equal() -> None:
    plan = plan_of("moe-61l-ep64-dp2")
    assert fold_replicas(plan) == [(0, 1, 2)]
    expert = plan.blocks.blocks[plan.blocks.by_name["L30.expert"]]
    assert expert.experts is not None
    swapped = expert.experts.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fold_replicas(_with_block(plan, "L30.expert", experts=swapped)) == [(0, 0, 1), (1, 1, 1)]
    assert (lane_classes(_with_block(plan, "L30.expert", experts=swapped), 8) == 0).all()


def test_lanes_on_other_gpus_are_not_alike() -> None:
    classes = lane_classes(plan_of("hetero-h100-h200"), 8).tolist()
    assert classes == [0, 0, 0, 0, 1, 1, 1, 1]


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_helpers() -> None:
    assert numbers_text([0, 8, 16, 24]) == "0, 8 … 24"
    assert numbers_text([0, 1, 2, 7]) == "0–2, 7"
    assert text_width(fitted("a long line of text", SIZE, 40), SIZE) <= 40
    assert all(text_width(line, SIZE) <= 90 for line in wrapped("some words to be broken into lines", SIZE, 90))
    assert xml_escape("<a b='1'>&\x00") == "&lt;a b=&#39;1&#39;&gt;&amp; "
    assert dot_quote('a "b" \\N\nc') == '"a \\"b\\" \\\\N\\nc"'


def test_a_node_whose_text_does_not_fit_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        Node("x", ("a text that is far too long",), "ellipse", "#ffffff", "gate", 0, 0, 60, 40)
    cut = node("x", "gate", ("a text that is far too long",), 0, 0, 60, 40)
    assert cut.lines[0].endswith("…")
    assert cut.tooltip == "a text that is far too long"
