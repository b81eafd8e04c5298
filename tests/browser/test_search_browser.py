"""Pictures of a search result in a real browser: what is drawn where, and the interactive page with its filters at work."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import inside, measured_page, named, no_two_texts_overlap, texts_are_readable
from search_records import NASTY, RECORDS, Record

from planc.render import search_gpus_svg, search_html, search_svg

pytestmark = pytest.mark.browser
Box = list[float]

#: what each text, mark and line of a figure measures; lines in pieces of 2 px
MEASURE = """
function measure(figure) {
  const scale = figure.getBoundingClientRect().width / 1000;
  const texts = [...figure.querySelectorAll('text')].map(t => {
    const style = getComputedStyle(t);
    return {text: t.textContent, box: box(t), bold: style.fontWeight >= 600, size: parseFloat(style.fontSize),
            shown: parseFloat(style.fontSize) * scale, length: t.getComputedTextLength()};
  });
  const shapes = [...figure.querySelectorAll('path,rect,circle')].map(e => ({id: e.id, box: box(e)}));
  const marks = [...figure.querySelectorAll('g')].filter(g => !g.id.endsWith('-axes')).map(g => (
    {id: g.id, box: box(g), title: (g.querySelector(':scope > title') || {}).textContent || ''}));
  const lines = [...figure.querySelectorAll('path.leader,path[id]')].map(path => {
    const places = [];
    for (let at = 0; at <= path.getTotalLength(); at += 2) { const p = path.getPointAtLength(at); places.push([p.x, p.y]); }
    return {id: path.id, leader: path.classList.contains('leader'), places};
  });
  return {name: figure.parentNode.id, scale, page: figure.viewBox.baseVal.height, texts, shapes, marks, lines};
}
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]) -> list[dict[str, Any]]:
    """What Chromium measures of both figures of every record."""
    figures = [(f"{name}, front", search_svg(record)) for name, record in RECORDS.items()]
    figures += [(f"{name}, gpus", search_gpus_svg(record)) for name, record in RECORDS.items()]
    found = measured_page(tmp_path_factory.mktemp("page"), dump_dom, named(figures), MEASURE)
    assert [f["name"] for f in found] == [name for name, _ in figures] * 2
    return found


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _letters(box: Box) -> Box:
    """The part of a text's box that letters fill: the box is as high as the font."""
    x, y, wide, high = box
    return [x, y + 2, wide, high - 4]


def test_everything_lies_inside_the_page(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        for item in (*figure["texts"], *figure["shapes"]):
            assert inside(item["box"], [0, 0, 1000, figure["page"]], 0.01), (figure["name"], item)


def test_no_two_texts_overlap(measured: list[dict[str, Any]]) -> None:
    no_two_texts_overlap(measured, 2)


def test_text_is_large_enough_and_as_wide_as_was_counted_on(measured: list[dict[str, Any]]) -> None:
    texts_are_readable(measured, 11)


def test_texts_stand_clear_of_marks_and_lines(measured: list[dict[str, Any]]) -> None:
    leaders = 0
    for figure in measured:
        for text in figure["texts"]:
            letters = _letters(text["box"])
            assert not [m["id"] for m in figure["marks"] if _meet(letters, m["box"])], (figure["name"], text["text"])
            for line in figure["lines"]:
                over = [at for at in line["places"] if _meet(letters, [*at, 0.1, 0.1])]
                assert not over, (figure["name"], text, line["id"], over)
        leaders += sum(line["leader"] for line in figure["lines"])
    assert leaders > 20


def test_every_mark_has_a_tooltip(measured: list[dict[str, Any]]) -> None:
    for figure in measured:
        assert figure["marks"] or "No candidate" in figure["texts"][-1]["text"]
        assert all("TPOT" in mark["title"] for mark in figure["marks"]), figure["name"]


# --- the interactive page -------------------------------------------------------------------------------------------------

#: added to the page: watches for what must not happen, before any script of the page runs …
WATCH = """<script>
const wrong = [];
addEventListener('error', e => wrong.push(String(e.message)));
addEventListener('unhandledrejection', e => wrong.push(String(e.reason)));
document.addEventListener('securitypolicyviolation', e => wrong.push(e.violatedDirective + ' ' + e.blockedURI));
</script>"""
#: … and then uses it as a reader does
USE = """<script>
const look = () => ({
  shown: document.getElementById('search-shown').value,
  marks: Object.fromEntries([...document.querySelectorAll('.scatterlayer .trace')]
    .map(t => [t.__data__[0].trace.name, t.querySelectorAll('path.point').length])),  // an empty one is not there
  rows: [...document.querySelectorAll('tr[data-id]')].filter(row => row.getClientRects().length).map(row => row.dataset.id),
});
const set = (key, value) => {
  form.elements[key].value = value;
  form.elements[key].dispatchEvent(new Event('input', {bubbles: true}));
};
const result = {all: look(), choices: {}, filtered: {}};
for (const field of form.querySelectorAll('select')) result.choices[field.name] = [...field.options].map(o => o.value);
for (const [key, value] of %s) { set(key, value); result.filtered[key] = look(); set(key, ''); }
result.again = look();
Plotly.Fx.hover(plot, [{curveNumber: 3, pointNumber: 0}]);
result.hover = [...document.querySelectorAll('.hoverlayer .hovertext tspan, .hoverlayer .hovertext text')].map(t => t.textContent);
result.buttons = [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title);
result.loaded = performance.getEntriesByType('resource').map(entry => entry.name);
result.title = document.title;
result.wrong = wrong;
const out = document.createElement('pre');
out.id = 'result';
out.textContent = JSON.stringify(result);
document.body.replaceChildren(out);
</script>"""
FILTERS = [
    ("tp", "8"),
    ("one_expert_per_gpu", "yes"),
    ("micro_batches", "1"),
    ("gating", "leader"),
    ("pp", "2"),
    ("tpot_ms", "20"),
]


def used(
    folder: Path, dump_dom: Callable[[Path], str], record: Record, filters: list[tuple[str, str]]
) -> dict[str, Any]:
    """What a reader finds on the page, and with each filter alone."""
    page = (
        search_html(record)
        .replace("<body>", f"<body>{WATCH}", 1)
        .replace("</body>", USE % json.dumps(filters) + "</body>")
    )
    file = folder / "search.html"
    file.write_text(page, encoding="utf-8")
    # the page's own policy is part of what is tested, so it holds for what is added as well
    text = dump_dom(file).rpartition('<pre id="result">')[2].partition("</pre>")[0]
    found: dict[str, Any] = json.loads(html.unescape(text))
    assert found["wrong"] == []
    assert found["loaded"] == []
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, dump_dom: Callable[[Path], str]) -> dict[str, Any]:
    return used(tmp_path_factory.mktemp("search"), dump_dom, RECORDS["wide"], FILTERS)


def test_the_page_draws_every_point(page: dict[str, Any]) -> None:
    found = RECORDS["wide"]
    one = sum(row["one_expert_per_gpu"] for row in found["front"])
    by_name = page["all"]["marks"]
    assert by_name["at most one expert per GPU"] == one
    assert by_name["several experts per GPU"] == len(found["front"]) - one
    assert by_name["baseline"] == 3 and by_name["winner"] == 1
    assert page["all"]["shown"] == "17 of 17 points"
    assert len(page["all"]["rows"]) == 18  # with the baseline that does not fit
    assert len(page["buttons"]) == 6 and not re.search("share|cloud|logo", " ".join(page["buttons"]), re.IGNORECASE)


def test_filters_leave_the_points_and_rows_that_they_name(page: dict[str, Any]) -> None:
    found = RECORDS["wide"]
    rows = {f"front-{n}": row for n, row in enumerate(found["front"], 1)}
    rows |= {f"baseline-{n}": row for n, row in enumerate(found["baselines"], 1) if row["tps"] is not None}
    for key, value in FILTERS:
        if key == "tpot_ms":
            kept = {id for id, row in rows.items() if row["tpot_s"] * 1000 <= float(value)}
        else:
            wanted: object = {"yes": True, "no": False}.get(value, int(value) if value.isdigit() else value)
            kept = {id for id, row in rows.items() if row[key] == wanted}
        after = page["filtered"][key]
        assert after["shown"] == f"{len(kept)} of {len(rows)} points", key
        assert set(after["rows"]) & rows.keys() == kept, key
        assert sum(after["marks"].values()) - after["marks"].get("winner", 0) == len(kept), key
        assert after["marks"].get("winner", 0) == ("front-10" in kept), key
        assert len(kept) < len(rows), key
    assert page["again"] == page["all"]


def test_filters_offer_what_there_is(page: dict[str, Any]) -> None:
    assert page["choices"]["tp"] == ["", "1", "2", "4", "8"]
    assert page["choices"]["one_expert_per_gpu"] == ["", "no", "yes"]
    assert page["choices"]["gpus"] == ["", "128"]


def test_hover_tells_the_deployment(page: dict[str, Any]) -> None:
    said = " ".join(page["hover"])
    for part in (
        "128 GPUs: DP 1 · PP 1 · EP 128 · TP 8",
        "batch 128",
        "TPOT 10.26 ms",
        "memory 41.28 GB of 80 GB",
        "most TPS per GPU",
    ):
        assert part in said


def test_what_a_user_wrote_does_nothing(tmp_path: Path, dump_dom: Callable[[Path], str]) -> None:
    found = used(tmp_path, dump_dom, RECORDS["nasty"], [("tpot_ms", "15")])
    assert found["title"] == NASTY
    assert found["filtered"]["tpot_ms"]["shown"] == "1 of 3 points"
    assert "<b>&amp;</b>" in " ".join(found["hover"])


@pytest.mark.parametrize("name", ["empty", "many sizes"])
def test_other_pages_draw_without_a_fault(name: str, tmp_path: Path, dump_dom: Callable[[Path], str]) -> None:
    found = used(tmp_path, dump_dom, RECORDS[name], [("tpot_ms", "1")])
    assert found["filtered"]["tpot_ms"]["shown"].startswith("0 of")
