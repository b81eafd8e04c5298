"""The plot of TPS against TPOT: places of points, band, floor and bound, checked against the sweep."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from math import log

import pytest
from made_timelines import SWEEPS, sweep

from planc.render import best_under, tps_tpot_svg
from planc.schedule import Point

SVG = "{http://www.w3.org/2000/svg}"


def root_of(name: str) -> ET.Element:
    points, bound = SWEEPS[name]
    return ET.fromstring(tps_tpot_svg(points, bound_s=bound, name="lab"))


def part(root: ET.Element, id: str) -> ET.Element:
    return next(e for e in root.iter() if e.get("id") == id)


def places(path: ET.Element) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.get("d", ""))]


def words(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", SWEEPS)
def test_svg_is_sound(name: str) -> None:
    points, bound = SWEEPS[name]
    text = tps_tpot_svg(points, bound_s=bound)
    root = ET.fromstring(text)
    assert text == tps_tpot_svg(list(reversed(points)), bound_s=bound)
    assert len(text.encode()) <= 30_000
    assert root.get("width") == "1000"
    assert root.findtext(f"{SVG}title") and root.findtext(f"{SVG}desc")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(id.startswith("tps-tpot") for id in ids)
    assert min(float(size) for size in re.findall(r'font-size="([\d.]+)"', text)) >= 11
    assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize("name", SWEEPS)
def test_points_are_joined_in_the_order_of_batches(name: str) -> None:
    points, _ = SWEEPS[name]
    root = root_of(name)
    ordered = sorted(points, key=lambda p: p.batch)
    line = places(part(root, "tps-tpot-line"))
    for point, place in zip(ordered, line, strict=True):
        group = part(root, f"tps-tpot-{point.batch}")
        dots = [c for c in group.iter(f"{SVG}circle") if c.get("r") == "4"]
        assert [(float(c.get("cx", "0")), float(c.get("cy", "0"))) for c in dots] == [place]
        assert f"{point.tps:,.0f} TPS" in (group.findtext(f"{SVG}title") or "")
        assert (dots[0].get("fill") == "#fff") == (not point.fits)


@pytest.mark.parametrize("name", ["doubling", "three decades", "wanders"])
def test_places_are_on_the_axes_that_are_drawn(name: str) -> None:
    """Between every two points, px are in proportion to values, or to their logarithms."""
    points = sorted(SWEEPS[name][0], key=lambda p: p.batch)
    line = places(part(root_of(name), "tps-tpot-line"))
    for axis, value in ((0, lambda p: p.tpot), (1, lambda p: p.tps)):
        ends = sorted((value(p), place[axis]) for p, place in zip(points, line, strict=True))
        (a, low), (b, high) = ends[0], ends[-1]
        for change in (lambda v: v, log):
            off = [abs(low + (high - low) * (change(v) - change(a)) / (change(b) - change(a)) - at) for v, at in ends]
            if max(off) < 0.3:
                break
        else:
            pytest.fail("neither linear nor logarithmic")


@pytest.mark.parametrize("name", SWEEPS)
def test_band_floor_and_bound(name: str) -> None:
    points, bound = SWEEPS[name]
    root = root_of(name)
    line = places(part(root, "tps-tpot-line"))
    band, floors = places(part(root, "tps-tpot-interval")), places(part(root, "tps-tpot-floor"))
    count = len(points)
    assert len(band) == 2 * count and len(floors) == count
    for (x, y), quick, slow, floor in zip(line, band[:count], band[count:][::-1], floors, strict=True):
        assert floor[0] < quick[0] < x < slow[0]
        assert floor[1] < quick[1] < y < slow[1]  # y grows downwards: quicker is more
    drawn = [e for e in root.iter() if e.get("id") == "tps-tpot-bound"]
    assert len(drawn) == (bound is not None)
    if bound is not None:
        x = float(re.findall(r"M([\d.]+)", drawn[0].get("d", ""))[0])
        assert drawn[0].get("stroke-dasharray")
        ordered = sorted(points, key=lambda p: p.batch)
        assert [p.tpot <= bound for p in ordered] == [at[0] <= x for at in line]


@pytest.mark.parametrize("name", SWEEPS)
def test_the_best_point_under_the_bound_is_marked_and_told(name: str) -> None:
    points, bound = SWEEPS[name]
    root = root_of(name)
    ringed = [
        g.get("id")
        for g in root.iter(f"{SVG}g")
        if any(c.get("r") == "9" for c in g.findall(f"{SVG}circle")) and g.get("id")
    ]
    fitting = [p for p in points if p.fits and bound is not None and p.tpot <= bound]
    best = max(fitting, key=lambda p: p.tps, default=None)
    assert ringed == ([f"tps-tpot-{best.batch}"] if best else [])
    told = root.findtext(f"{SVG}desc") or ""
    if best:
        assert f"batch {best.batch:,} with {best.tps:,.0f} TPS ({best.tps_per_gpu:,.0f} per GPU)" in told
        assert f"{best.batch:,}" in words(root)
        assert bound is not None
        assert ("past the bound" in told) == (best.high > bound)
    elif bound is not None:
        assert "No feasible batch" in told


def test_best_under_takes_only_what_fits() -> None:
    points = sweep([100, 200, 400], 1e-3, 1e-6, room=200)
    best = best_under(points, 1.0)
    assert best is not None and best.batch == 200
    assert best_under(points, 1e-3) is None


def test_per_gpu_has_an_axis_only_where_all_points_have_as_many_gpus() -> None:
    few, many = sweep([64], 1e-3, 1e-6, gpus=8), sweep([128], 1e-3, 1e-6, gpus=16)
    assert "TPS per GPU" in words(ET.fromstring(tps_tpot_svg(few)))
    assert "TPS per GPU" not in words(ET.fromstring(tps_tpot_svg([*few, *many])))


def test_no_points() -> None:
    nothing: list[Point] = []
    assert "No batch was simulated." in words(ET.fromstring(tps_tpot_svg(nothing)))
