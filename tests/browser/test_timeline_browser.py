"""The timeline and the plot of TPS against TPOT in a real browser, all cases in one page: what is drawn where, measured by
the browser itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_timelines import SWEEPS, TIMELINES, made_timeline
from pages import inside, measured_page, named, no_two_texts_overlap, texts_are_readable

from planc.render import timeline_svg, tps_tpot_svg

pytestmark = pytest.mark.browser

#: what each text and shape of a figure measures
MEASURE = """
function measure(figure) {
  const scale = figure.getBoundingClientRect().width / 1000;
  const texts = [...figure.querySelectorAll('text')].map(t => {
    const bar = t.parentNode.querySelector(':scope > title + rect'), style = getComputedStyle(t);
    return {text: t.textContent, box: box(t), bar: bar ? box(bar) : null, bold: style.fontWeight >= 600,
            size: parseFloat(style.fontSize), shown: parseFloat(style.fontSize) * scale, length: t.getComputedTextLength()};
  });
  const shapes = [...figure.querySelectorAll('path,rect,circle')].map(e => {
    const lane = e.closest('g.compute,g.communication'), style = getComputedStyle(e);
    return {tag: e.tagName, id: e.id, box: box(e), kind: e.getAttribute('class') || '', dash: style.strokeDasharray,
            stroke: style.stroke, path: e.getAttribute('d'), of: lane ? lane.getAttribute('class') : '', lane: lane ? lane.id : '',
            bar: e.tagName === 'rect' && e.previousElementSibling?.tagName === 'title'};
  });
  return {name: figure.parentNode.id, scale, page: figure.viewBox.baseVal.height, texts, shapes};
}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]) -> list[dict[str, Any]]:
    """What Chromium measures of the figures of every case."""
    figures = [(f"{name}, timeline", timeline_svg(made_timeline(name))) for name in TIMELINES]
    figures += [
        (f"{name}, sweep", tps_tpot_svg(points, bound_s=bound, name="lab")) for name, (points, bound) in SWEEPS.items()
    ]
    found = measured_page(tmp_path_factory.mktemp("page"), dump_dom, named(figures), MEASURE)
    assert [f["name"] for f in found] == [name for name, _ in figures] * 2
    return found


def _meet(a: list[float], b: list[float], slack: float = 0.0) -> bool:
    return (
        a[0] + slack < b[0] + b[2]
        and b[0] + slack < a[0] + a[2]
        and a[1] + slack < b[1] + b[3]
        and b[1] + slack < a[1] + a[3]
    )


def test_everything_lies_inside_the_page(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        page = [0, 0, 1000, figure["page"]]
        for item in (*figure["texts"], *figure["shapes"]):
            assert inside(item["box"], page, 0.01), (figure["name"], item)


def test_text_lies_inside_its_bar(measured: list[dict[str, Any]]) -> None:
    held = 0
    for figure in measured:
        for text in figure["texts"]:
            if text["bar"]:
                held += 1
                assert inside(text["box"], text["bar"], 0.5), (figure["name"], text)
    assert held > 200


def test_no_two_texts_overlap(measured: list[dict[str, Any]]) -> None:
    no_two_texts_overlap(measured, 2)


def test_text_is_large_enough_and_as_wide_as_was_counted_on(measured: list[dict[str, Any]]) -> None:
    texts_are_readable(measured, 11)


def test_communication_is_dashed_and_nothing_else_but_the_bound(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        dashed = [shape for shape in figure["shapes"] if shape["dash"] != "none"]
        if "sweep" in figure["name"]:
            lines = [s for s in dashed if s["id"] == "tps-tpot-bound"]
            assert len(dashed) == 2 * len(lines)  # and its sample in the legend
            continue
        assert dashed
        assert all(shape["tag"] == "rect" and shape["of"] == "communication" for shape in dashed), figure["name"]
        bars = [s for s in figure["shapes"] if s["bar"] and s["of"] == "communication" and s["stroke"] != "none"]
        assert all(bar["dash"] != "none" for bar in bars), figure["name"]


def test_bars_of_a_lane_do_not_overlap(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        lanes: dict[str, list[list[float]]] = {}
        for shape in figure["shapes"]:
            if shape["bar"] and shape["lane"].startswith("timeline-layer"):
                lanes.setdefault(shape["lane"], []).append(shape["box"])
        assert lanes or "sweep" in figure["name"]
        for boxes in lanes.values():
            for a, b in pairwise(sorted(boxes)):
                assert b[0] >= a[0] + a[2] - 0.02, (figure["name"], a, b)


def _stretches(path: str) -> list[list[float]]:
    """Boxes of the level and upright stretches of a path, a pixel wide."""
    out, x, y = [], 0.0, 0.0
    for order, a, b in re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", path):
        to = (float(a), float(b)) if order == "M" else (float(a), y) if order == "H" else (x, float(a))
        if order != "M":
            out.append([min(x, to[0]) - 0.5, min(y, to[1]) - 0.5, abs(x - to[0]) + 1, abs(y - to[1]) + 1])
        x, y = to
    return out


def test_leaders_and_the_path_run_over_no_text(measured: list[dict[str, Any]]) -> None:
    leaders = 0
    for figure in measured:
        for shape in figure["shapes"]:
            if shape["kind"] in ("leader", "path"):
                leaders += shape["kind"] == "leader"
                for stretch in _stretches(shape["path"]):
                    met = [t["text"] for t in figure["texts"] if _meet(stretch, t["box"], 0.5)]
                    assert not met, (figure["name"], stretch, met)
    assert leaders > 100


def test_batch_numbers_stand_clear_of_points_and_of_the_bound(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        if "sweep" not in figure["name"]:
            continue
        batches = {f"{p.batch:,}" for p in SWEEPS[figure["name"].removesuffix(", sweep")][0]}
        plot = next(s["box"] for s in figure["shapes"] if s["tag"] == "rect" and s["box"][3] == 420)
        labels = [t for t in figure["texts"] if t["text"] in batches and inside(t["box"], plot)]
        assert len(labels) >= min(3, len(batches))
        marks = [s["box"] for s in figure["shapes"] if s["tag"] == "circle" or s["id"] == "tps-tpot-bound"]
        for label in labels:
            x, y, wide, high = label["box"]
            assert not any(_meet([x, y + 2, wide, high - 4], mark) for mark in marks), (figure["name"], label)
