"""The placement figures in a real browser, all cases in one page: what is drawn where, measured by the browser itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_certificates import CASES, made
from pages import inside, measured_page, named, no_two_texts_overlap, texts_are_readable

from planc.render.placement import expert_heat_map_svg, link_bars_svg

pytestmark = pytest.mark.browser

#: what each text and shape of a figure measures
MEASURE = """
function measure(figure) {
  const scale = figure.getBoundingClientRect().width / 1000;
  const texts = [...figure.querySelectorAll('text')].map(t => {
    const cell = t.parentNode.id ? null : t.parentNode.querySelector(':scope > title ~ path');
    const style = getComputedStyle(t);
    return {text: t.textContent, box: box(t), cell: cell ? box(cell) : null, bold: style.fontWeight >= 600,
            size: parseFloat(style.fontSize), shown: parseFloat(style.fontSize) * scale, length: t.getComputedTextLength()};
  });
  const shapes = [...figure.querySelectorAll('path,rect')].map(e =>
    ({box: box(e), dash: getComputedStyle(e).strokeDasharray}));
  const parts = [...figure.querySelectorAll('[id]')].map(e => ({id: e.id, box: box(e), titles: e.querySelectorAll('title').length}));
  return {name: figure.parentNode.id, scale, page: figure.viewBox.baseVal.height, texts, shapes, parts};
}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]) -> list[dict[str, Any]]:
    """What Chromium measures of both figures of every case."""
    figures = []
    for name, case in CASES.items():
        certificate, placement, node_of_rank = made(case)
        figures.append((f"{name}, heat map", expert_heat_map_svg(certificate, placement, node_of_rank)))
        figures.append((f"{name}, links", link_bars_svg(certificate)))
    found = measured_page(tmp_path_factory.mktemp("page"), dump_dom, named(figures), MEASURE)
    assert [f["name"] for f in found] == [name for name, _ in figures] * 2
    return found


def test_everything_lies_inside_the_page(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        page = [0, 0, 1000, figure["page"]]
        for item in (*figure["texts"], *figure["shapes"]):
            assert inside(item["box"], page), (figure["name"], item)


def test_numbers_lie_inside_their_cells(measured: list[dict[str, Any]]) -> None:
    held = 0
    for figure in measured:
        for text in figure["texts"]:
            if text["cell"] and text["text"].isdigit() and "heat map" in figure["name"]:
                held += 1
                cell = text["cell"]
                assert inside([text["box"][0], cell[1], text["box"][2], 0], cell), (figure["name"], text)
                middle = text["box"][1] + text["box"][3] / 2
                assert abs(middle - cell[1] - cell[3] / 2) <= 2, (figure["name"], text)
    assert held > 1000


def test_no_two_texts_overlap(measured: list[dict[str, Any]]) -> None:
    no_two_texts_overlap(measured, 2)


def test_text_is_large_enough_and_as_wide_as_was_counted_on(measured: list[dict[str, Any]]) -> None:
    texts_are_readable(measured, 10)


def test_nothing_is_dashed(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        assert figure["shapes"] or "loads only" in figure["name"]
        assert {shape["dash"] for shape in figure["shapes"]} <= {"none"}, figure["name"]


def test_values_are_outside_the_bars_they_stand_beside(measured: list[dict[str, Any]]) -> None:
    """The mean's mark and the bars end before the text that gives their values begins."""
    for figure in measured:
        if "links" not in figure["name"]:
            continue
        values = [t for t in figure["texts"] if ", mean " in t["text"]]
        assert values or "loads only" in figure["name"]
        for text in values:
            x, y, _, height = text["box"]
            level = y + height / 2
            beside = [
                s["box"]
                for s in figure["shapes"]
                if s["box"][1] <= level <= s["box"][1] + s["box"][3] and s["box"][2] < 900
            ]
            assert all(left + width <= x for left, _, width, _ in beside), (figure["name"], text)


def test_parts_have_ids_and_tooltips(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        titles = {part["id"]: part["titles"] for part in figure["parts"]}
        if "heat map" in figure["name"]:
            assert titles["expert-heat-map-layer"] > 0 and titles["expert-heat-map-layers"] > 1
        elif "loads only" not in figure["name"]:
            assert all(count > 0 for count in titles.values())
            assert len(titles) > 3
