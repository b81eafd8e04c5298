"""The plan document: every section is there, its numbers are the plan's, and nothing in it can break out of its place."""

import re
from xml.etree import ElementTree

import pytest
from small_specs import small_spec

import planc
from planc.cost import step_floors
from planc.pipeline import FIGURES, outputs
from planc.report import document_html, document_markdown
from planc.schedule import Sweep
from planc.units import format_bytes, format_seconds

SECTIONS = (
    "Summary",
    "Model",
    "Cluster",
    "Parallel strategy",
    "Expert placement",
    "Memory",
    "The step",
    "Communication volume of one step",
    "Prediction",
    "Floors at planned utilisation",
    "When one expert per GPU is the right plan",
    "Beside traditional EP 4–8 on the same GPUs",
    "Risks",
    "Claims",
    "Verification",
    "Sources of the hardware numbers",
)


@pytest.fixture(scope="module")
def plan():
    return planc.compile(planc.load_spec("moe-4l-64gpu"))


@pytest.fixture(scope="module")
def text(plan):
    return document_markdown(plan, dict.fromkeys(FIGURES, "a figure"), plan.estimate())


def test_every_section_is_there(text):
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == SECTIONS


def test_numbers_follow_the_plan(text):
    """The same template on another workload says other numbers: none is fixed text."""
    other = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=512", "workload.isl=300"]))
    changed = document_markdown(other, dict.fromkeys(FIGURES, "a figure"), other.estimate())
    for name in ("used",):
        assert format_bytes(int(getattr(other.memory, name).max())) in changed
    floors = step_floors(other)
    assert format_seconds(floors.kv_read) in changed and format_seconds(floors.kv_read) not in text
    differing = {a for a in text.splitlines() if a not in changed.splitlines()}
    for start in ("| step |", "| kv cache |", "| dispatch |", "| KV cache of a micro-batch |", "| proposed |"):
        assert any(line.startswith(start) for line in differing), start


def test_claim_below_the_floor_is_said(plan, text):
    found = plan.estimate()
    assert found.floors["tpot_s"] > 2.2e-3
    row = next(line for line in text.splitlines() if line.startswith("| proposed |"))
    assert "990 sequences in flight" in row and "7,031 TPS per GPU" in row and row.count("impossible") == 2
    # up to the stated input lengths the claim is predicted, and above the floor; beyond them it is not
    predicted, floor = (int(isl) for isl in re.findall(r"up to isl (\d+)", row))
    sweep = Sweep(plan)
    assert sweep.at(batch=990, isl=predicted).tpot <= 2.2e-3 < sweep.at(batch=990, isl=predicted + 16).tpot
    assert sweep.at(batch=990, isl=floor).floor <= 2.2e-3 < sweep.at(batch=990, isl=floor + 16).floor


def test_the_prediction_is_the_librarys(plan, text):
    found = plan.estimate()
    low, high = found.intervals["tpot_s"]
    row = f"| TPOT | {format_seconds(found.tpot)} | {format_seconds(low)} to {format_seconds(high)} | {format_seconds(found.floors['tpot_s'])} |"
    assert row in text
    assert f"| attention | {format_seconds(found.own.path_by_class['attention'])} |" in text
    assert "![Timeline of the step](timeline.svg)" in text and "| spec | 100.0 % |" in text


def test_traffic_is_in_the_prediction():
    """Generated traffic counts; a recording does not, since it may not be there when the files are checked again."""
    skewed = {"popularity": "zipf", "exponent": 1.0, "tokens": 512}
    even, made = (planc.compile(small_spec(workload={"batch": 40_000}, **part)) for part in ({}, {"traffic": skewed}))
    texts = [dict(outputs(p, []))["deployment_plan.md"] for p in (even, made)]
    steps = [re.search(r"\*\*step\*\* \| \*\*(.*?)\*\*", t)[1] for t in texts]
    assert steps[0] == format_seconds(even.estimate().own.step)
    assert steps[1] == format_seconds(made.estimate().own.step) != steps[0]
    assert "choose experts evenly" in texts[0] and "follow from the spec's traffic" in texts[1]


def test_optimality_follows_from_numbers():
    low = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=64"]))
    high = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=4096", "workload.isl=100"]))
    rows = [document_markdown(p, {}, p.estimate()).splitlines() for p in (low, high)]
    found = [next(line for line in r if line.startswith("| compute-bound experts |")) for r in rows]
    assert "**no**" in found[0] and "| yes |" in found[1]


def test_page_is_self_contained_and_escaped(plan, text):
    page = document_html(plan, text + "\n\n<script>alert(1)</script>\n", {"memory.svg": "<svg/>"})
    assert "<script" not in page and "src=" not in page
    assert "<figure><svg/></figure>" in page and "<p><figure>" not in page
    hostile = plan.spec.model_copy(update={"name": "a<b>|`x`&\n# no"})
    object.__setattr__(plan, "spec", hostile)
    try:
        again = document_markdown(plan, {}, plan.estimate())
        assert "<b>" not in again and again.count("\n# ") == 0
        body = document_html(plan, again, {})
        assert "<b>" not in body
    finally:
        object.__setattr__(plan, "spec", hostile.model_copy(update={"name": "moe-4l-64gpu"}))


@pytest.mark.parametrize("name", ["moe-4l-16gpu-baseline", "hetero-h100-h200"])
def test_outputs_are_the_same_twice_and_svgs_are_xml(name):
    first = dict(outputs(planc.compile(planc.load_spec(name))))
    second = dict(outputs(planc.compile(planc.load_spec(name))))
    assert first == second
    assert set(first) == {f"{f}.{e}" for f in FIGURES for e in ("svg", "dot")} | {
        "memory.svg",
        "timeline.svg",
        "deployment_plan.md",
        "deployment_plan.html",
        "plan.json",
    }
    for file, content in first.items():
        if file.endswith(".svg"):
            ElementTree.fromstring(content)


def test_dense_model_has_a_plan_and_no_expert_section():
    spec = planc.parse_spec(
        "name: dense\nmodel: llama-3.1-8b\ncluster: h100-sxm-1x8\nworkload: {batch: 64, isl: 1024}\n"
    )
    plan = planc.compile(spec)
    files = dict(outputs(plan))
    assert "detailed_expert_dag.svg" not in files and "The model has no experts." in files["deployment_plan.md"]
