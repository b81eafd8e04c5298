"""The plan document: every section is there, its numbers are the plan's, and nothing in it can break out of its place."""

import re
from xml.etree import ElementTree

import pytest

import planc
from planc.cost import step_floors
from planc.pipeline import FIGURES, outputs
from planc.report import document_html, document_markdown
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
    "Floors",
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
    return document_markdown(plan, dict.fromkeys(FIGURES, "a figure"))


def test_every_section_is_there(text):
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == SECTIONS


def test_numbers_follow_the_plan(text):
    """The same template on another workload says other numbers: none is fixed text."""
    other = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=512", "workload.isl=300"]))
    changed = document_markdown(other, dict.fromkeys(FIGURES, "a figure"))
    for name in ("used",):
        assert format_bytes(int(getattr(other.memory, name).max())) in changed
    floors = step_floors(other)
    assert format_seconds(floors.kv_read) in changed and format_seconds(floors.kv_read) not in text
    differing = {a for a in text.splitlines() if a not in changed.splitlines()}
    for start in ("| step |", "| kv cache |", "| dispatch |", "| KV cache of a micro-batch |", "| proposed |"):
        assert any(line.startswith(start) for line in differing), start


def test_claim_below_the_floor_is_said(plan, text):
    floors = step_floors(plan)
    assert floors.step > 2.2e-3
    row = next(line for line in text.splitlines() if line.startswith("| proposed |"))
    assert "990 sequences in flight" in row and "7,031 TPS per GPU" in row and "below the floor" in row
    # up to the stated input length the claim is above what memory reads need, and beyond it is not
    limit = int(re.search(r"up to isl (\d+)", row)[1])
    per_token = floors.kv_read / 1024
    assert floors.weights_read + limit * per_token <= 2.2e-3 < floors.weights_read + (limit + 1) * per_token


def test_optimality_follows_from_numbers():
    low = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=64"]))
    high = planc.compile(planc.load_spec("moe-4l-64gpu", ["workload.batch=4096", "workload.isl=100"]))
    rows = [document_markdown(p, {}).splitlines() for p in (low, high)]
    found = [next(line for line in r if line.startswith("| compute-bound experts |")) for r in rows]
    assert "**no**" in found[0] and "| yes |" in found[1]


def test_page_is_self_contained_and_escaped(plan, text):
    page = document_html(plan, text + "\n\n<script>alert(1)</script>\n", {"memory.svg": "<svg/>"})
    assert "<script" not in page and "src=" not in page
    assert "<figure><svg/></figure>" in page and "<p><figure>" not in page
    hostile = plan.spec.model_copy(update={"name": "a<b>|`x`&\n# no"})
    object.__setattr__(plan, "spec", hostile)
    try:
        again = document_markdown(plan, {})
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
