"""The comprehensive figure: its DOT parsed back by Graphviz, and its map read as XML and checked for overlaps."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import planc
from planc.render.comprehensive import MAX_OPS, Filter, comprehensive_dot, comprehensive_size, comprehensive_svg
from planc.render.comprehensive_layout import SHORT, SIZE
from planc.render.style import COMMS, OPS
from planc.render.text import text_width
from planc.verify import VerifiedPlan

SPECS = Path(__file__).parents[2] / "specs"
SVG = "{http://www.w3.org/2000/svg}"
SMALL, REFERENCE = "moe-4l-16gpu-baseline", "moe-61l-ep64-dp2"
FEW = Filter(layers=frozenset({0, 3, 4}), nodes=frozenset({0, 1}))


@cache
def plan_of(name: str) -> VerifiedPlan:
    return planc.compile(planc.load_spec(SPECS / f"{name}.yaml"))


@cache
def map_of(name: str, keep: Filter | None = None) -> str:
    return comprehensive_svg(plan_of(name), keep)


def graphviz(program: str, *args: str, text: str) -> subprocess.CompletedProcess[str]:
    """Run a Graphviz program on DOT text. The tests need it; the product does not."""
    if shutil.which(program) is None:
        pytest.fail(f"no `{program}` on the path: install Graphviz, on Debian the package `graphviz`")
    return subprocess.run([program, *args], input=text, capture_output=True, text=True, check=False)


def parsed(text: str) -> tuple[list[str], list[tuple[str, str]], list[tuple[str, str]]]:
    """Node names, edges, and (style, comm) of each edge, as Graphviz reads them."""
    script = 'N{print("N\t", $.name)} E{print("E\t", $.tail.name, "\t", $.head.name, "\t", $.style, "\t", $.comm)}'
    result = graphviz("gvpr", script, text=text)
    assert result.returncode == 0
    assert result.stderr == ""
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    nodes = [row[1] for row in rows if row[0] == "N"]
    edges = [row for row in rows if row[0] == "E"]
    return nodes, [(row[1], row[2]) for row in edges], [(row[3], row[4]) for row in edges]


def attributes(text: str, node: str) -> dict[str, str]:
    """Attributes written on the statement of a node."""
    line = next(line for line in text.splitlines() if line.startswith(f'"{node}" ['))
    return {key: value.strip('"') for key, value in re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|[^,\]]+)', line)}


# --- DOT ------------------------------------------------------------------------------------------------------------


@pytest.mark.graphviz
@pytest.mark.parametrize("name", [SMALL, "moe-4l-64gpu", "deepseek-v3-128gpu", REFERENCE])
def test_dot_holds_exactly_the_ops_and_edges_of_the_plan(name: str) -> None:
    plan = plan_of(name)
    ids = plan.expanded.ids
    expected = {
        (ids[s], ids[t]) for s, t in zip(plan.expanded.source.tolist(), plan.expanded.target.tolist(), strict=True)
    }
    nodes, edges, looks = parsed(comprehensive_dot(plan))
    assert set(nodes) == set(ids)
    assert set(edges) == expected
    assert (len(nodes), len(edges)) == (len(ids), len(expected))
    assert all((style == "dashed") == (comm in COMMS) for style, comm in looks)
    assert {comm for _, comm in looks} - {""} == {e.comm for e in plan.blocks.edges} - {""}


@pytest.mark.graphviz
@pytest.mark.parametrize("name", [SMALL, REFERENCE])
def test_graphviz_finds_no_cycle_and_counts_alike(name: str) -> None:
    plan = plan_of(name)
    text = comprehensive_dot(plan)
    assert graphviz("acyclic", "-n", text=text).returncode == 0
    counted = graphviz("gc", "-n", "-e", text=text).stdout.split()
    assert counted[:2] == [str(plan.blocks.op_count), str(len(plan.expanded.source))]


def test_every_statement_says_all_there_is_to_say() -> None:
    text = comprehensive_dot(plan_of(REFERENCE))
    expert = attributes(text, "L3.expert.r81")
    assert expert["pos"].endswith("!")
    assert {key: expert[key] for key in ("kind", "layer", "gpu", "expert", "tensor", "dtype", "shape")} == {
        "kind": "expert", "layer": "3", "gpu": "81", "expert": "17", "tensor": "[16, 7168] bf16 S(experts)",
        "dtype": "bf16", "shape": "ellipse",
    }  # fmt: skip
    assert expert["label"] == r"L3 expert E17\nGPU 81"
    dispatch = attributes(text, "L3.dispatch.r64-127")
    assert (dispatch["kind"], dispatch["ranks"], dispatch["style"]) == ("dispatch", "64-127", "dashed,filled")
    assert "gpu" not in dispatch
    assert "layer" not in attributes(text, "output_collect.r0")
    assert (
        '"L3.gate.r0" -> "L3.dispatch.r0-63" [tensor="[64, 7168] bf16 R", bytes=917504, comm=dispatch, style=dashed'
        in text
    )


def test_only_collectives_have_a_dashed_outline() -> None:
    lines = [
        line
        for line in comprehensive_dot(plan_of("mixtral-8x7b")).splitlines()
        if " -> " not in line and "kind=" in line
    ]
    assert lines
    for line in lines:
        kind = re.search(r"kind=(\w+)", line)
        assert kind is not None
        assert ("dashed" in line) == (OPS[kind[1]].family == "collective")


@pytest.mark.graphviz
def test_neato_keeps_the_positions() -> None:
    plan = plan_of(SMALL)
    placed = graphviz("neato", "-n2", "-Tplain", text=comprehensive_dot(plan)).stdout
    where = {row[1]: (float(row[2]), float(row[3])) for row in map(str.split, placed.splitlines()) if row[0] == "node"}
    names = [f"L0.expert.s0.r{rank}" for rank in range(8)]
    xs = [where.get(name, where.get(f'"{name}"', (0.0, 0.0)))[0] for name in names]
    assert all(b - a == pytest.approx(200 / 72, abs=0.01) for a, b in pairwise(xs))
    assert len(set(where.values())) == plan.blocks.op_count


@pytest.mark.graphviz
def test_filter_keeps_ops_and_the_edges_between_them() -> None:
    plan, keep = plan_of(REFERENCE), Filter(layers=frozenset({3, 4}), nodes=frozenset({1}))
    nodes, edges, _ = parsed(comprehensive_dot(plan, keep))
    assert {n.split(".")[0] for n in nodes} == {"L3", "L4"}
    assert "L3.dispatch.r0-63" in nodes
    assert "L3.dispatch.r64-127" not in nodes
    assert {n for n in nodes if ".expert." in n} == {f"L{i}.expert.r{r}" for i in (3, 4) for r in range(8, 16)}
    ids = plan.expanded.ids
    every = (
        (ids[s], ids[t]) for s, t in zip(plan.expanded.source.tolist(), plan.expanded.target.tolist(), strict=True)
    )
    assert set(edges) == {(s, t) for s, t in every if {s, t} <= set(nodes)}


@pytest.mark.graphviz
def test_filter_says_what_the_plan_does_not_have() -> None:
    plan = plan_of(REFERENCE)
    assert FEW.outside(plan) == []
    wrong = Filter(frozenset({61}), frozenset({0, 16}), frozenset({2}))
    assert [text.split(":")[0] for text in wrong.outside(plan)] == ["no layer 61", "no node 16", "no replica 2"]
    assert len(parsed(comprehensive_dot(plan, wrong))[0]) == 0
    assert "No op of this plan" in comprehensive_svg(plan, wrong)


def test_same_text_under_any_hash_seed() -> None:
    script = (
        "import hashlib, planc; from planc.render.comprehensive import comprehensive_dot, comprehensive_svg;"
        f"p = planc.compile(planc.load_spec({str(SPECS / 'moe-4l-64gpu.yaml')!r}));"
        "t = comprehensive_dot(p) + comprehensive_svg(p); print(hashlib.sha256(t.encode()).hexdigest())"
    )
    root = str(SPECS.parent)
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": root},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    plan = plan_of("moe-4l-64gpu")
    assert digests == {hashlib.sha256((comprehensive_dot(plan) + comprehensive_svg(plan)).encode()).hexdigest()}


def test_a_filter_of_nothing_keeps_all() -> None:
    plan = plan_of(SMALL)
    assert comprehensive_dot(plan, Filter()) == comprehensive_dot(plan)
    assert comprehensive_svg(plan, Filter()) == comprehensive_svg(plan)


def test_size_is_the_number_of_ops() -> None:
    assert comprehensive_size(plan_of(REFERENCE)) == 37356 < MAX_OPS


# --- map ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        (SMALL, 50_000),
        (REFERENCE, 1_000_000),
        ("deepseek-v3-128gpu", 1_000_000),
        ("qwen3-235b-a22b", 1_000_000),
        ("deepseek-v3-ep256", 2_000_000),
    ],
)
def test_map_is_sound_and_small(name: str, limit: int) -> None:
    text = map_of(name)
    assert len(text.encode()) <= limit
    root = ET.fromstring(text)
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))
    assert {use.attrib["href"].removeprefix("#") for use in root.iter(f"{SVG}use")} <= set(ids)
    assert root.find(f"{SVG}title") is not None


@pytest.mark.parametrize("name", [SMALL, REFERENCE, "deepseek-v3-128gpu"])
def test_one_cell_per_layer_and_gpu_with_its_tooltip(name: str) -> None:
    plan, root = plan_of(name), ET.fromstring(map_of(name))
    par, node_of = plan.parallelism, plan.spec.cluster.node_of_rank
    found = {
        use.attrib["id"]: use for use in root.iter(f"{SVG}use") if re.fullmatch(r"L\d+r\d+", use.attrib.get("id", ""))
    }
    expected = {
        f"L{layer}r{rank}": (layer, rank)
        for layer in range(plan.spec.model.layers)
        for rank in par.stage_ranks(par.stage_of_layer(layer)).reshape(-1).tolist()
    }
    assert set(found) == set(expected)
    experts = {rank: plan.placement.experts_of_rank(rank) for rank in range(par.world_size)}
    for key, (layer, rank) in expected.items():
        title = found[key].findtext(f"{SVG}title") or ""
        assert title.startswith(f"L{layer} GPU {rank} node {node_of[rank]} "), title
        assert re.findall(r" E(\d+)", title) == [str(e) for e in experts[rank].get(layer, [])]
        assert re.search(r"\[[\d, -]+\] \w+$", title), title
        assert found[key].attrib["class"] in ("moe", "dense")


class Item(NamedTuple):
    """Something drawn: its class, box, text and whether it is dashed."""

    kind: str
    left: float
    top: float
    right: float
    bottom: float
    text: str = ""
    dashed: bool = False

    def meets(self, other: Item, slack: float = 0.0) -> bool:
        """Whether the boxes overlap by more than ``slack`` both ways."""
        across = min(self.right, other.right) - max(self.left, other.left)
        along = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > slack and along > slack


def drawn(text: str) -> list[Item]:
    """Everything in a map, each ``<use>`` replaced by what it shows, with absolute boxes."""
    root = ET.fromstring(text)
    named = {e.attrib["id"]: e for e in root.iter() if "id" in e.attrib}
    sizes = {"mh": 14.0, "mg": 10.0, "md": 11.0, "mt": 12.0, "mk": 11.0, "mz": 18.0}
    anchors = dict.fromkeys(("ml", "mh", "mt", "mk", "mz"), 0.0) | {"mr": 1.0}

    def walk(e: ET.Element, x: float, y: float) -> Iterator[Item]:
        if e.tag == f"{SVG}defs":
            return
        if move := re.match(r"translate\((\S+) (\S+)\)", e.get("transform", "")):
            x, y = x + float(move[1]), y + float(move[2])
        if e.tag == f"{SVG}use":
            yield from walk(named[e.attrib["href"][1:]], x + float(e.get("x", 0)), y + float(e.get("y", 0)))
        elif e.tag == f"{SVG}path":
            yield from strokes(e, x, y)
        elif e.tag == f"{SVG}text":
            kind = e.get("class", "")
            for part in [e, *e]:
                if part.text:
                    size, at = sizes.get(kind, SIZE), x + float(part.get("x") or e.attrib["x"])
                    base = y + float(part.get("y") or e.attrib["y"])
                    width = text_width(part.text, size, bold=kind in ("mh", "mb", "mg", "md", "mz"))
                    left = at - width * anchors.get(kind, 0.5)
                    yield Item("text", left, base - 0.72 * size, left + width, base + 0.2 * size, part.text)
        else:
            for child in e:
                yield from walk(child, x, y)

    return list(walk(root, 0.0, 0.0))


def strokes(path: ET.Element, x: float, y: float) -> Iterator[Item]:
    """The stretches of a line, or the box of a shape."""
    dashed = "stroke-dasharray" in path.attrib
    points = list(corners(path.attrib["d"]))
    if path.get("class") == "mw":
        for (_, ax, ay), (pen, bx, by) in pairwise(points):
            if pen != "M":
                yield Item("line", x + min(ax, bx), y + min(ay, by), x + max(ax, bx), y + max(ay, by), "", dashed)
        return
    for start in [i for i, p in enumerate(points) if p[0] == "M"]:
        end = next((i for i in range(start + 1, len(points)) if points[i][0] == "M"), len(points))
        xs, ys = [p[1] for p in points[start:end]], [p[2] for p in points[start:end]]
        half = (max(xs) - min(xs)) / 2 if max(ys) == min(ys) else 0  # an ellipse: two arcs from side to side
        tall = 6.5 if half else 0
        yield Item(path.get("class", ""), x + min(xs), y + min(ys) - tall, x + max(xs), y + max(ys) + tall, "", dashed)


def corners(d: str) -> Iterator[tuple[str, float, float]]:
    """(command, x, y) of each end point of path data."""
    x = y = 0.0
    for pen, rest in re.findall(r"([MHVLhvaz])([^MHVLhvaz]*)", d):
        n = [float(v) for v in rest.split()]
        if pen in "ML":
            x, y = n
        elif pen in "Hh":
            x = n[0] + (x if pen == "h" else 0)
        elif pen in "Vv":
            y = n[0] + (y if pen == "v" else 0)
        elif pen == "a":
            x, y = x + n[5], y + n[6]
        if pen != "z":
            yield pen, x, y


PICTURES = [
    (SMALL, None), ("moe-4l-64gpu", None), ("mixtral-8x7b", None), (REFERENCE, FEW), ("deepseek-v3-128gpu", FEW),
    ("hetero-h100-h200", FEW),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keep"), PICTURES)
def test_nothing_overlaps_or_is_clipped(name: str, keep: Filter | None) -> None:
    text = map_of(name, keep)
    items = drawn(text)
    width, height = (float(v) for v in re.findall(r'(?:width|height)="([\d.]+)"', text)[:2])
    assert min(min(i.left, i.top) for i in items) >= 0
    assert all(i.right <= width and i.bottom <= height for i in items)
    lines = [i for i in items if i.kind == "line"]
    texts = [i for i in items if i.kind == "text"]
    shapes = [i for i in items if i.kind not in ("line", "text")]
    assert lines
    assert shapes
    for group in by_height(texts, texts):
        assert not group[0].meets(group[1], 0.1), group
    for line, shape in by_height(lines, shapes):
        wide = line._replace(left=line.left - 0.5, right=line.right + 0.5, top=line.top - 0.5, bottom=line.bottom + 0.5)
        side = 3.1 if shape.kind == "routing" else 1.6  # lines end on the outline, which leans or is round
        inner = shape._replace(
            left=shape.left + side, right=shape.right - side, top=shape.top + 1.6, bottom=shape.bottom - 1.6
        )
        assert not wide.meets(inner), (line, shape)
    for line, label in by_height(lines, texts):
        wide = line._replace(left=line.left - 0.5, right=line.right + 0.5)
        assert not wide.meets(label, 0.1), (line, label)
    for a, b in by_height(shapes, shapes):
        assert not a.meets(b, 0.1), (a, b)


def by_height(first: list[Item], second: list[Item]) -> Iterator[tuple[Item, Item]]:
    """Pairs that share some height."""
    rows: dict[int, list[Item]] = {}
    for item in second:
        for row in range(int(item.top) // 20, int(item.bottom) // 20 + 1):
            rows.setdefault(row, []).append(item)
    for item in first:
        for row in range(int(item.top) // 20, int(item.bottom) // 20 + 1):
            yield from ((item, other) for other in rows.get(row, ()) if other is not item)


@pytest.mark.parametrize(("name", "keep"), PICTURES)
def test_dashed_in_the_map_is_communication_and_nothing_else(name: str, keep: Filter | None) -> None:
    plan, root = plan_of(name), ET.fromstring(map_of(name, keep))
    colours = set(COMMS.values())
    for path in root.iter(f"{SVG}path"):
        assert ("stroke-dasharray" in path.attrib) == (path.get("stroke") in colours)
    families = {OPS[b.kind].family.replace(" ", "-") for b in plan.blocks.blocks}
    shown = {path.get("class") for path in root.iter(f"{SVG}path")} - {"mw"}
    assert shown <= families
    assert "collective" in shown


@pytest.mark.parametrize("kind", sorted(SHORT))
def test_short_names_fit_their_shapes(kind: str) -> None:
    room = {"ellipse": 36 * 0.82, "parallelogram": 36 - 5 - 3, "round": 36 - 2, "box": 36 - 2}[OPS[kind].shape]
    assert text_width(SHORT[kind], SIZE) <= room


def test_expert_ids_and_gpus_are_visible_text() -> None:
    words = {i.text for i in drawn(map_of(REFERENCE, FEW)) if i.kind == "text"}
    assert {f"E{e}" for e in range(16)} <= words
    assert {f"GPU {r}" for r in range(16)} <= words
    assert {"L0", "L3", "L4", "node 0", "node 1", "expert [16, 7168] bf16 S(experts)"} <= words


def test_gpu_labels_come_again_every_eight_layers() -> None:
    strips = re.findall(r'<use href="#lanes"', map_of(REFERENCE))
    assert len(strips) == 1 + 60 // 8


@pytest.mark.graphviz
def test_names_are_escaped() -> None:
    plan = plan_of(SMALL)
    name = "a<b>&\"'"
    hostile = dataclasses.replace(plan, spec=plan.spec.model_copy(update={"name": name}))
    root = ET.fromstring(comprehensive_svg(hostile))
    assert root.findtext(f"{SVG}title") == f"comprehensive_moe_dag: {name}"
    nodes, _, _ = parsed(comprehensive_dot(hostile))
    assert set(nodes) == set(plan.expanded.ids)


@pytest.mark.graphviz
def test_like_micro_batches_are_drawn_once_and_all_listed(tmp_path: Path) -> None:
    text = (SPECS / f"{SMALL}.yaml").read_text().replace("osl: 256}", "osl: 256, micro_batches: 2}")
    (tmp_path / "two.yaml").write_text(text)
    plan = planc.compile(planc.load_spec(tmp_path / "two.yaml"))
    svg = comprehensive_svg(plan)
    assert "×2 micro-batches" in svg
    assert len(re.findall(r'id="L\d+r\d+"', svg)) == 4 * 8
    nodes, _, _ = parsed(comprehensive_dot(plan))
    assert set(nodes) == set(plan.expanded.ids)
    assert "m1.L3.gate.r8" in nodes
