"""The page figures in a real browser: what is drawn where, measured by the browser itself."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import planc
from planc.render import PAGE_FIGURES, svg
from planc.render.text import text_width

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
COMMS = {"tp", "dispatch", "combine", "pp", "dp"}

#: writes, for every figure and for the page's font and the widest one, what each text and line measures
SCRIPT = """
const box = e => { const b = e.getBBox(); return [b.x, b.y, b.width, b.height]; };
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
const figures = [...document.querySelectorAll('svg.planc-figure')];
const result = [];
for (const font of ['', 'DejaVu Sans']) {
  if (font) figures.forEach(f => f.setAttribute('font-family', font));
  result.push(...figures.map(measure));
}
const out = document.createElement('pre');
out.id = 'result';
out.textContent = JSON.stringify(result);
document.body.replaceChildren(out);
"""


@pytest.fixture(scope="module", params=SPECS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]
) -> list[dict[str, Any]]:
    """What Chromium measures of all page figures of one spec, together in one page."""
    plan = planc.compile(planc.load_spec(ROOT / "specs" / f"{request.param}.yaml"))
    page = tmp_path_factory.mktemp("page") / "figures.html"
    figures = "\n".join(svg(make(plan)) for make in PAGE_FIGURES.values())
    head = '<!doctype html><html><head><meta charset="utf-8"></head><body style="margin:0">'
    page.write_text(f"{head}{figures}<script>{SCRIPT}</script></body></html>", encoding="utf-8")
    text = dump_dom(page).partition('<pre id="result">')[2].partition("</pre>")[0]
    found: list[dict[str, Any]] = json.loads(html.unescape(text))
    assert [f["name"] for f in found] == [*PAGE_FIGURES, *PAGE_FIGURES]
    return found


def _inside(inner: list[float], outer: list[float], slack: float) -> bool:
    return (
        inner[0] >= outer[0] - slack
        and inner[1] >= outer[1] - slack
        and inner[0] + inner[2] <= outer[0] + outer[2] + slack
        and inner[1] + inner[3] <= outer[1] + outer[3] + slack
    )


def test_text_lies_inside_its_shape_and_the_page(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        for text in figure["texts"]:
            assert _inside(text["box"], [0, 0, 1000, figure["page"]], 0), (figure["name"], text)
            if text["shape"]:
                assert _inside(text["box"], text["shape"], 0.5), (figure["name"], text)


def test_no_two_texts_overlap(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        texts = sorted(figure["texts"], key=lambda t: t["box"][1])
        for i, a in enumerate(texts):
            ax, ay, aw, ah = a["box"]
            for b in texts[i + 1 :]:
                bx, by, bw, _ = b["box"]
                if by >= ay + ah - 0.5:
                    break
                assert bx >= ax + aw - 0.5 or ax >= bx + bw - 0.5, (figure["name"], a["text"], b["text"])


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
