"""Pictures of a search result: places of marks, lines and names in the figures, and what the interactive page holds."""

from __future__ import annotations

import copy
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import unescape
from itertools import pairwise
from math import log

import pytest
from search_records import NASTY, RECORDS, WIDE, Record, front_row, record

from planc.diagnostics import PlancError
from planc.render import search_gpus_svg, search_html, search_svg
from planc.render.chart import seconds_text

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = [name for name in RECORDS if name != "empty"]


def root_of(record: Record) -> ET.Element:
    return ET.fromstring(search_svg(record))


def parts(root: ET.Element) -> dict[str, ET.Element]:
    return {e.get("id", ""): e for e in root.iter() if e.get("id")}


def place(group: ET.Element) -> tuple[float, float]:
    """The middle of a mark: of its disc, or of its diamond or triangle, which are drawn from their top."""
    disc = next((c for c in group.findall(f"{SVG}circle") if c.get("r") == "4"), None)
    if disc is not None:
        return float(disc.get("cx", "")), float(disc.get("cy", ""))
    x, top, shape = re.findall(r"M([\d.]+) ([\d.]+)l([\d.]+)", group.findall(f"{SVG}path")[0].get("d", ""))[0]
    return float(x), float(top) + float(shape)


def places(path: ET.Element) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d", ""))]


def words(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def data_of(page: str) -> Record:
    """What the page's script draws."""
    text = page.partition('<script type="application/json" id="search-data">')[2].partition("</script>")[0]
    found: Record = json.loads(text)
    return found


@pytest.mark.parametrize("draw", [search_svg, search_gpus_svg])
@pytest.mark.parametrize("name", RECORDS)
def test_svg_is_sound(name: str, draw: Callable[[Record], str]) -> None:
    text = draw(RECORDS[name])
    root = ET.fromstring(text)
    assert text == draw(copy.deepcopy(RECORDS[name]))
    assert len(text.encode()) <= 60_000
    assert root.get("width") == "1000"
    assert root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(id.startswith("search") for id in ids)
    assert min(float(size) for size in re.findall(r'font-size="([\d.]+)"', text)) >= 11
    assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize("name", DRAWN)
def test_every_row_has_its_mark_and_tooltip(name: str) -> None:
    found = RECORDS[name]
    drawn = parts(root_of(found))
    fitting = [n for n, row in enumerate(found["baselines"], 1) if row["tps"] is not None]
    marks = {f"search-front-{n}" for n in range(1, len(found["front"]) + 1)} | {f"search-baseline-{n}" for n in fitting}
    assert {id for id, e in drawn.items() if e.tag == f"{SVG}g" and id != "search-axes"} == marks
    for n, row in enumerate(found["front"], 1):
        group = drawn[f"search-front-{n}"]
        told = group.findtext(f"{SVG}title") or ""
        assert f"batch {row['batch']:,} " in told and f"{row['tps_per_gpu']:,.0f} per GPU" in told
        assert f"EP {row['ep']}" in told and seconds_text(row["tpot_s"]) in told
        discs = [c for c in group.findall(f"{SVG}circle") if c.get("r") == "4"]
        assert bool(discs) == row["one_expert_per_gpu"]
    for n in fitting:
        told = drawn[f"search-baseline-{n}"].findtext(f"{SVG}title") or ""
        assert told.startswith(f"{found['baselines'][n - 1]['name']} ({found['baselines'][n - 1]['reason']})")


@pytest.mark.parametrize("name", DRAWN)
def test_kinds_of_rows_differ_in_colour(name: str) -> None:
    drawn = parts(root_of(RECORDS[name]))
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for n, row in enumerate(RECORDS[name]["front"], 1):
        shapes = [e for e in drawn[f"search-front-{n}"] if e.get("r") != "9" and e.get("fill")]
        seen[row["one_expert_per_gpu"]] |= {e.get("fill", "") for e in shapes}
    assert all(len(colours) <= 1 for colours in seen.values())
    assert not seen[True] & seen[False]


@pytest.mark.parametrize("name", DRAWN)
def test_places_are_linear_or_logarithmic(name: str) -> None:
    """Between every two marks, px are in proportion to values, or to their logarithms."""
    found = RECORDS[name]
    drawn = parts(root_of(found))
    for axis, key in ((0, "tps_per_user"), (1, "tps_per_gpu")):
        ends = sorted((row[key], place(drawn[f"search-front-{n}"])[axis]) for n, row in enumerate(found["front"], 1))
        (a, low), (b, high) = ends[0], ends[-1]
        if len(ends) < 3 or a == b:
            continue
        off = [
            max(abs(low + (high - low) * (change(v) - change(a)) / (change(b) - change(a)) - at) for v, at in ends)
            for change in (lambda v: v, log)
        ]
        assert min(off) < 0.3


def test_axes_are_logarithmic_only_where_the_ends_are_far_apart() -> None:
    assert "0" in words(root_of(RECORDS["close together"]))
    assert "0" not in words(root_of(RECORDS["wide"]))
    assert data_of(search_html(RECORDS["close together"]))["axes"] == {"x": "linear", "y": "linear"}
    assert data_of(search_html(RECORDS["wide"]))["axes"] == {"x": "log", "y": "log"}


@pytest.mark.parametrize("name", DRAWN)
def test_the_line_goes_down_and_over_from_row_to_row(name: str) -> None:
    """It joins exactly the rows that no other beats in both, so it never promises what no row gives."""
    found = RECORDS[name]
    drawn = parts(root_of(found))
    front = found["front"]
    unbeaten = [
        place(drawn[f"search-front-{n}"])
        for n, row in enumerate(front, 1)
        if not any(r["tps_per_user"] > row["tps_per_user"] and r["tps_per_gpu"] > row["tps_per_gpu"] for r in front)
    ]
    line = places(drawn["search-line"])
    for at, mark in zip(sorted(line[::2]), sorted(unbeaten), strict=True):
        assert at == pytest.approx(mark, abs=0.11)
    for n, ((a, b), (c, d)) in enumerate(pairwise(line)):
        assert (a == c and d >= b) if n % 2 == 0 else (b == d and c >= a)


@pytest.mark.parametrize("name", DRAWN)
def test_intervals_keep_the_batch(name: str) -> None:
    found = RECORDS[name]
    drawn = parts(root_of(found))
    for n in range(1, len(found["front"]) + 1):
        curve, (x, y) = places(drawn[f"search-front-{n}-interval"]), place(drawn[f"search-front-{n}"])
        assert curve[0][0] < x < curve[-1][0] and curve[-1][1] < y < curve[0][1]  # quicker is more of both
        gaps = [
            abs((x - a) * (d - b) - (c - a) * (y - b)) / max(c - a, 1e-9)
            for (a, b), (c, d) in pairwise(curve)
            if a <= x <= c
        ]
        assert gaps and min(gaps) < 1.0  # it runs through its mark


@pytest.mark.parametrize("name", DRAWN)
def test_bound_and_winner(name: str) -> None:
    found = RECORDS[name]
    root = root_of(found)
    drawn, bound = parts(root), found["bounds"]["tpot_s"]
    assert ("search-bound" in drawn) == bool(bound)
    if bound:
        assert drawn["search-bound"].get("stroke-dasharray")
        at = float(re.findall(r"M([\d.]+)", drawn["search-bound"].get("d", ""))[0])
        for n, row in enumerate(found["front"], 1):
            assert (row["tpot_s"] <= bound) == (place(drawn[f"search-front-{n}"])[0] >= at - 0.1)
    ringed = [id for id, e in drawn.items() if any(c.get("r") == "9" for c in e.findall(f"{SVG}circle"))]
    told = root.findtext(f"{SVG}desc") or ""
    if found["winner"] is None:
        assert not ringed and "No candidate keeps the bounds." in told
        return
    won = [n for n, row in enumerate(found["front"], 1) if row["batch"] == found["winner"]["batch"]]
    assert [id for id in ringed if id != "search"] == [f"search-front-{n}" for n in won]
    assert f"batch {found['winner']['batch']:,} " in told
    assert f"{found['candidates']:,} candidates" in told and f"{found['simulated']:,} simulated" in told
    assert ("the best of all candidates" in told) == found["optimal"]
    bold = [t.text or "" for t in root.iter(f"{SVG}text") if t.get("font-weight") and t.get("font-size") == "11"]
    assert len(bold) == 1 and f"batch {found['winner']['batch']:,}" in bold[0]


def test_a_winner_off_the_front_has_a_mark_of_its_own() -> None:
    winner = {key: value for key, value in front_row(777, 0.03).items() if key != "reason"}
    drawn = parts(root_of(record(WIDE, winner=winner)))
    assert any(c.get("r") == "9" for c in drawn["search-winner"].findall(f"{SVG}circle"))


@pytest.mark.parametrize("name", DRAWN)
def test_every_baseline_is_named(name: str) -> None:
    """Also the two that nearly coincide; one that does not fit memory has no place."""
    if name == "nasty":
        return  # its name is shortened
    found = RECORDS[name]
    said = words(root_of(found))
    for row in found["baselines"]:
        assert (row["name"] in said) == (row["tps"] is not None), row["name"]


def test_objective_and_bounds_in_words() -> None:
    told = root_of(RECORDS["no bound"]).findtext(f"{SVG}desc") or ""
    assert "most TPS per GPU with TTFT at or below 2 s and at least 100,000 TPS." in told
    told = root_of(RECORDS["many sizes"]).findtext(f"{SVG}desc") or ""
    assert "fewest GPUs with TPOT at or below 50 ms, on 32, 64, 96, 128, 256 or 512 GPUs." in told


def test_an_empty_front_says_so() -> None:
    for draw in (search_svg, search_gpus_svg):
        root = ET.fromstring(draw(RECORDS["empty"]))
        assert any("No candidate keeps the bounds." in text for text in words(root))
    assert any(
        "No candidate keeps" in text for text in words(ET.fromstring(search_gpus_svg(RECORDS["none in the bound"])))
    )
    assert "No candidate keeps the bounds." in search_html(record([], pruned={}, space={}))


def test_best_row_by_number_of_gpus() -> None:
    """A number of GPUs has its best row within the bound, and none where no row keeps it."""
    rows = [
        front_row(512, 0.02, gpus=64),
        front_row(900, 0.03, gpus=64),
        front_row(4000, 0.06, gpus=64),
        front_row(1, 0.9, gpus=8),
    ]
    drawn = parts(ET.fromstring(search_gpus_svg(record([*rows, front_row(2000, 0.03, gpus=128)]))))
    assert {id for id, e in drawn.items() if e.tag == f"{SVG}g"} == {
        "search-gpus-axes",
        "search-gpus-front-2",
        "search-gpus-front-5",
    }


# --- the interactive page -------------------------------------------------------------------------------------------------


def test_the_page_is_the_same_each_time_and_needs_no_other_file() -> None:
    page = search_html(RECORDS["wide"])
    assert page == search_html(copy.deepcopy(RECORDS["wide"]))
    own = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(own) < 100_000 < len(page)
    assert not re.search(r"https?://(?!www\.w3\.org)|<link|src=|href=|@import", own)
    assert "default-src 'none'" in own and "form-action 'none'" in own
    assert "showSendToCloud: false" in own and 'plotlyServerURL: ""' in own  # its own default is a server


def test_the_page_holds_every_row() -> None:
    found = RECORDS["wide"]
    page = search_html(found)
    assert len(re.findall(r'<tr data-id="front-', page)) == len(found["front"])
    assert len(re.findall(r'<tr data-id="baseline-', page)) == len(found["baselines"])
    for reason, count in found["pruned"].items():
        assert f"<td>{reason}</td><td" in page and f"{count:,}</td>" in page
    assert "rank 0 needs 96.2 GB but has 80 GB" in page
    assert "kv_cache: bf16, fp8" in page
    points = data_of(page)["points"]
    assert [p["id"] for p in points if p["won"]] == ["front-10"]
    assert len(points) == len(found["front"]) + 3
    for part in (
        "DP 1 · PP 1 · EP 128 · TP 8",
        "batch 64",
        "TPOT 9.5 ms",
        "memory 41.14 GB of 80 GB",
        "6,737 TPS",
        "most TPS per GPU",
    ):
        assert part in points[0]["hover"]


def test_what_a_user_wrote_is_text() -> None:
    """In the figure, in the page's tables, and where a script reads it; plotly.js takes tags in the text beside the pointer."""
    assert NASTY[:20] in (root_of(RECORDS["nasty"]).findtext(f"{SVG}title") or "")
    page = search_html(RECORDS["nasty"])
    own = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert "<b>" not in own and "<script>document" not in own
    assert own.count("<script") == own.count("</script>") == 2
    for point in data_of(page)["points"]:
        assert "<" not in point["hover"].replace("<br>", "")
        assert unescape(point["hover"].replace("<br>", " ")).endswith(NASTY)


def test_without_plotly_only_the_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert search_svg(RECORDS["wide"])
    with pytest.raises(PlancError) as error:
        search_html(RECORDS["wide"])
    (fault,) = error.value.diagnostics
    assert fault.code == "PLN432" and "pip install 'planc[charts]'" in fault.hint
