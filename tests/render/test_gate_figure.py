"""The figure of a gate's loads: lines and cells say what the arrays say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from planc.render import gate_loads_svg
from planc.render.svg import LIMIT
from planc.render.text import text_width
from planc.routing import Skew
from planc.routing.bias import Balanced, Stream, balance, imbalance
from planc.routing.gate import Gate
from planc.routing.tokens import layer_weights

SVG = "{http://www.w3.org/2000/svg}"
RATIO = ["#2166ac", "#6baed6", "#c6dcef", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"]


def run(steps: int, experts: int, tokens: int = 100, rate: float = 0.01) -> Balanced:
    weights = layer_weights(Skew("zipf", 0.8), experts, 0, 0)
    return balance(Gate(experts, 2), Stream(weights, tokens), steps=steps, rate=rate)


def drawn(found: Balanced) -> ET.Element:
    table = np.arange(found.gate.experts).reshape(-1, 2)
    return ET.fromstring(gate_loads_svg(found, table, "Loads", even=1.1))


def maps(root: ET.Element) -> list[dict[tuple[float, float], int]]:
    """Of either heat map: (x, y) of the start of a run -> level of its colour."""
    found = []
    for group in root.iter(f"{SVG}g"):
        cells = {}
        for path in group:
            for x, y in re.findall(r"M([\d.]+) ([\d.]+)h\d+", path.get("d") or ""):
                cells[float(x), float(y)] = RATIO.index(path.get("stroke") or "")
        found.append(cells)
    return found


def test_lines_are_the_imbalance_of_every_step() -> None:
    found = run(12, 8)
    lines = [p for p in drawn(found).iter(f"{SVG}path") if p.get("stroke-linejoin")]
    assert [p.get("stroke") for p in lines] == ["#111", "#0072b2"] * 2
    for path, loads in zip(lines[:2], (found.before.loads, found.after.loads), strict=True):
        heights = [float(y) for y in re.findall(r"[M ][\d.]+ ([\d.]+)", path.get("d") or "")]
        assert len(heights) == 12
        assert np.corrcoef(heights, imbalance(loads))[0, 1] == pytest.approx(-1, abs=1e-3)


def test_the_first_column_has_the_colours_of_the_first_step() -> None:
    found = run(10, 8)
    order = np.argsort(-found.before.loads.sum(axis=0), kind="stable")
    for cells, loads in zip(maps(drawn(found)), (found.before.loads, found.after.loads), strict=True):
        left = min(x for x, _ in cells)
        levels = [level for (x, _), level in sorted(cells.items(), key=lambda c: c[0][1]) if x == left]
        ratios = loads[0, order] / loads[0].mean()
        assert levels == np.searchsorted([0.5, 0.7, 0.9, 1.1, 1.4, 2.0], ratios, side="right").tolist()


@pytest.mark.parametrize(("steps", "experts"), [(1, 2), (3, 8), (450, 8), (40, 256), (60, 384), (1100, 130)])
def test_any_size_fits_the_page(steps: int, experts: int) -> None:
    root = drawn(run(steps, experts, tokens=20))
    width, height = float(root.get("width") or 0), float(root.get("height") or 0)
    assert width == 1000 and 300 < height < 700
    assert len(ET.tostring(root)) < LIMIT
    spots: list[tuple[float, float, float]] = []
    for text in root.iter(f"{SVG}text"):
        size = float(text.get("font-size") or 12)
        assert size >= 10
        wide = text_width(text.text or "", size, bold=text.get("font-weight") == "bold")
        x, y = float(text.get("x") or 0), float(text.get("y") or 0)
        x -= {"end": wide, "middle": wide / 2}.get(text.get("text-anchor") or "", 0)
        assert x >= 0 and x + wide <= width and y < height, text.text
        spots.append((x, x + wide, y))
    for number, (a, b, y) in enumerate(spots):  # no text on another
        for c, d, other in spots[:number]:
            assert abs(y - other) >= 10 or b <= c or d <= a, (a, b, y, c, d, other)
    said = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert ("the mean of" in said) == (steps > 100 or experts > 64)
