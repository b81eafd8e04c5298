"""The page figures in a real browser: what is drawn where, measured by the browser itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import inside, measured_page, no_two_texts_overlap

import planc
from planc.render import PAGE_FIGURES, svg
from planc.render.text import text_width

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
COMMS = {"tp", "dispatch", "combine", "pp", "dp"}

#: what each text and line of a figure measures
MEASURE = """
const classes = e => (e && e.getAttribute('class') || '').split(' ');
function measure(figure) {
  const scale = figure.getBoundingClientRect().width / 1000;
  const texts = [...figure.querySelectorAll('text')].map(t => {
    const node = t.closest('g.node'), style = getComputedStyle(t);
    return {text: t.textContent, box: box(t), bold: style.fontWeight >= 600, size: parseFloat(style.fontSize),
            shown: parseFloat(style.fontSize) * scale, length: t.getComputedTextLength(),
            node: node ? node.id : '', shape: node ? box(node.querySelector('rect,ellipse,polygon')) : null};
  });
  const lines = [...figure.querySelectorAll('path,rect,ellipse,polygon')].filter(e => !e.closest('defs')).map(e => {
    const group = e.closest('g');
    return {tag: e.tagName, classes: classes(group), dash: getComputedStyle(e).strokeDasharray, id: group ? group.id : ''};
  });
  return {name: figure.id, page: figure.viewBox.baseVal.height, scale, texts, lines};
}
"""


@pytest.fixture(scope="module", params=SPECS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]
) -> list[dict[str, Any]]:
    """What Chromium measures of all page figures of one spec, together in one page."""
    plan = planc.compile(planc.load_spec(ROOT / "specs" / f"{request.param}.yaml"))
    figures = "\n".join(svg(make(plan)) for make in PAGE_FIGURES.values())
    found = measured_page(tmp_path_factory.mktemp("page"), dump_dom, figures, MEASURE, "svg.planc-figure")
    assert [f["name"] for f in found] == [*PAGE_FIGURES, *PAGE_FIGURES]
    return found


def test_text_lies_inside_its_shape_and_the_page(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        for text in figure["texts"]:
            assert inside(text["box"], [0, 0, 1000, figure["page"]], 0), (figure["name"], text)
            if text["shape"]:
                assert inside(text["box"], text["shape"], 0.5), (figure["name"], text)


def test_no_two_texts_overlap(measured: list[dict[str, Any]]) -> None:
    no_two_texts_overlap(measured, 0.5)


def test_text_is_at_least_eleven_pixels(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        assert figure["scale"] == pytest.approx(1)
        assert min(t["shown"] for t in figure["texts"]) >= 11


def test_widths_are_an_upper_bound(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        for text in figure["texts"]:
            assert text["length"] <= text_width(text["text"], text["size"], bold=text["bold"]) + 0.1, text


def test_dashes_are_on_communication_and_nothing_else(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        dashed = [line for line in figure["lines"] if line["dash"] != "none"]
        assert dashed
        for line in figure["lines"]:
            communication = bool(COMMS & set(line["classes"]))
            assert (line["dash"] != "none") == (communication or _collective_sample(line)), (figure["name"], line)


def _collective_sample(line: dict[str, Any]) -> bool:
    return "legend" in line["classes"] and line["tag"] == "rect" and line["dash"] != "none"
