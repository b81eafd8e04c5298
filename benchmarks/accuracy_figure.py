"""Predicted against measured, log-log, one panel per family: a small SVG writer for one figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT, EDGE, COLUMNS = 230, 210, 44, 4
COLOURS = {"h100-sxm": "#1f6fb4", "h200-sxm": "#c8541b"}
_MOST_POINTS = 400  #: of a family and GPU, evenly taken, so that the file stays small


@dataclass(frozen=True)
class Panel:
    """A family: measured and predicted seconds of each GPU, and the line under its title."""

    title: str
    note: str
    points: dict[str, tuple[np.ndarray, np.ndarray]]


TITLE = "Predicted against measured time of every family, cross-validated"
HEADING = "Predicted (up) against measured (across), µs, every row predicted by constants fitted without it"


def draw(panels: list[Panel], title: str = TITLE, heading: str = HEADING, unit: float = 1e-6) -> str:
    """The figure as SVG text; ``unit`` of the axes in seconds."""
    rows = math.ceil(len(panels) / COLUMNS)
    wide, tall = COLUMNS * WIDTH + 20, rows * HEIGHT + 60
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}" height="{tall}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{title}</title>",
        f'<rect width="{wide}" height="{tall}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="14">{heading}</text>',
    ]
    for place, (gpu, colour) in enumerate(COLOURS.items()):
        out.append(f'<circle cx="{18 + 110 * place}" cy="36" r="4" fill="{colour}"/>')
        out.append(f'<text x="{28 + 110 * place}" y="40">{gpu}</text>')
    out.append('<text x="240" y="40" fill="#666">grey line: equal · dashed: a factor of 1.25 off</text>')
    for index, panel in enumerate(panels):
        out += _panel(panel, index % COLUMNS * WIDTH, 50 + index // COLUMNS * HEIGHT, unit)
    return "\n".join([*out, "</svg>", ""])


def _panel(panel: Panel, left: float, top: float, unit: float) -> list[str]:
    values = np.concatenate([np.concatenate(pair) for pair in panel.points.values()]) / unit
    low, high = math.floor(math.log10(values.min()) * 2) / 2, math.ceil(math.log10(values.max()) * 2) / 2
    x0, x1, y0, y1 = left + EDGE, left + WIDTH - 10, top + HEIGHT - 28, top + 34

    def across(value: float) -> float:
        return x0 + (x1 - x0) * (math.log10(value) - low) / (high - low)

    def up(value: float) -> float:
        return y0 + (y1 - y0) * (math.log10(value) - low) / (high - low)

    out = [f'<text x="{x0}" y="{top + 14}" font-weight="bold">{panel.title}</text>']
    out.append(f'<text x="{x0}" y="{top + 27}" fill="#666">{panel.note}</text>')
    out.append(f'<rect x="{x0}" y="{y1}" width="{x1 - x0}" height="{y0 - y1}" fill="none" stroke="#999"/>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        x, y = across(10.0**power), up(10.0**power)
        out.append(f'<path d="M{x:.1f} {y0}V{y1}M{x0} {y:.1f}H{x1}" stroke="#e4e4e4"/>')
        label = _label(power)
        out.append(f'<text x="{x:.1f}" y="{y0 + 13}" text-anchor="middle">{label}</text>')
        out.append(f'<text x="{x0 - 4}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    bottom, most = 10.0**low, 10.0**high
    for factor, dash in ((1.0, ""), (1.25, ' stroke-dasharray="3 3"'), (0.8, ' stroke-dasharray="3 3"')):
        first, last = max(bottom, bottom / factor), min(most, most / factor)
        line = f"M{across(first):.1f} {up(first * factor):.1f}L{across(last):.1f} {up(last * factor):.1f}"
        out.append(f'<path d="{line}" stroke="#888" fill="none"{dash}/>')
    for gpu, (measured, predicted) in panel.points.items():
        step = max(1, len(measured) // _MOST_POINTS)
        pairs = zip(measured[::step] / unit, predicted[::step] / unit, strict=True)
        dots = "".join(f"M{across(a):.1f} {up(b):.1f}h0" for a, b in pairs)
        out.append(
            f'<path d="{dots}" stroke="{COLOURS[gpu]}" stroke-width="2.4" stroke-linecap="round" stroke-opacity="0.45"/>'
        )
    return out


def _label(power: int) -> str:
    """A power of ten, short enough to stand a decade from the next."""
    if power < 3:
        return f"{10.0**power:g}"
    return f"{10 ** (power % 3)}{'kMGT'[power // 3 - 1]}"
