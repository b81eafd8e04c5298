"""The loads of a gate over time, without a bias and with one: imbalance as lines, the load of every expert as heat maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil

import numpy as np

from planc.render.chart import (
    BOUND,
    LEFT,
    LINE,
    OURS,
    RATIO,
    RATIO_TO,
    RIGHT,
    SMALL,
    WIDTH,
    axis,
    colour_scale,
    figure,
    text_at,
)
from planc.render.text import text_width
from planc.routing.bias import Balanced, gpu_loads, imbalance

_GAP = 56  #: px between left and right panels, for the axis of the right one
_PANEL = (WIDTH - LEFT - RIGHT - _GAP) // 2
_RIGHT_PANEL = LEFT + _PANEL + _GAP
_LINES, _MAP = 150, 260  #: px of the height of lines, and of a heat map at most
_COLUMNS, _ROWS = 100, 64  #: cells of a heat map at most
_PLAIN = "#111"


def gate_loads_svg(found: Balanced, table: np.ndarray, title: str, *, even: float) -> str:
    """Upper panels: imbalance of each step per expert and per GPU, with the bias and without, and what chance leaves
    (``even``, per expert). Lower panels: every expert's load over the mean without and with the bias, experts by their load
    without it. Steps and experts too many for a cell each are shown as means of neighbours; the figure says so. ``table``:
    int [GPUs, slots], see `planc.routing.bias.gpu_loads`."""
    runs = found.before.loads, found.after.loads
    by_gpu = [imbalance(gpu_loads(loads, table)) for loads in runs]
    by_expert = [imbalance(loads) for loads in runs]
    top = max(float(line.max()) for line in (*by_expert, *by_gpu))
    wide = ceil(len(by_expert[0]) / _PANEL)
    of = f", means of {wide} steps" if wide > 1 else ""
    body = [*_keys(46)]
    body += _line_panel(LEFT, 72, f"imbalance per expert (largest load ÷ mean){of}", by_expert, top, even)
    body += _line_panel(_RIGHT_PANEL, 72, f"imbalance per GPU ({len(table):,} GPUs, policy linear)", by_gpu, top, None)
    y = 72 + _LINES + 64
    maps, height = _maps(found, y)
    return figure("gate-loads", title, height, [*body, *maps])


def _keys(y: int) -> Iterator[str]:
    """What the lines are."""
    x = float(LEFT)
    for stroke, words in (
        (_PLAIN, "without bias"),
        (OURS, "with bias"),
        (BOUND, "chance alone, were all experts equally likely"),
    ):
        yield f'<path stroke="{stroke}" stroke-width="2.5" d="M{x:.1f} {y - 4}h18"/>'
        yield text_at(x + 24, y, words, 11)
        x += 24 + text_width(words, 11) + 24


def _line_panel(
    x: int, y: int, words: str, lines: Sequence[np.ndarray], most: float, even: float | None
) -> Iterator[str]:
    """Lines over the steps in a panel whose heading is at ``y``; ``most``: the largest value of any panel."""
    step, count = axis(most)
    top, steps = y + 12, len(lines[0])
    scale = _LINES / (step * count)
    yield text_at(x, y, words)
    for mark in range(count + 1):
        level = top + _LINES - scale * step * mark
        yield f'<path stroke="#ddd" d="M{x} {level:.1f}h{_PANEL}"/>'
        yield text_at(x - 8, level + 4, f"{step * mark:g}", 11, "end")
    if even is not None:
        yield f'<path stroke="{BOUND}" stroke-width="1.5" d="M{x} {top + _LINES - scale * even:.1f}h{_PANEL}"/>'
    for stroke, line in zip((_PLAIN, OURS), lines, strict=True):
        means = _binned(line[:, None], ceil(steps / _PANEL), 1)[0]
        at = x + (np.arange(len(means)) + 0.5) * _PANEL / len(means)
        points = " ".join(f"{a:.1f} {top + _LINES - scale * v:.1f}" for a, v in zip(at, means, strict=True))
        yield f'<path fill="none" stroke="{stroke}" stroke-width="1.5" stroke-linejoin="round" d="M{points}h.1"/>'
    yield from _step_names(x, top + _LINES, steps)


def _step_names(x: int, y: float, steps: int) -> Iterator[str]:
    """Step numbers below a panel, counted from 1."""
    every = max(1, int(axis(steps)[0]))
    for number in dict.fromkeys((1, *range(every, steps + 1, every))):
        if number == 1 or number * _PANEL / steps > 40:  # not on the 1
            yield text_at(x + (number - 0.5) * _PANEL / steps, y + 15, f"{number:,}", SMALL, "middle")
    yield text_at(x - 8, y + 15, "step", SMALL, "end", fill="#444")


def _maps(found: Balanced, y: int) -> tuple[list[str], int]:
    """The heat maps from ``y`` down, and where they end."""
    before, after = found.before.loads, found.after.loads
    steps, experts = before.shape
    order = np.argsort(-before.sum(axis=0), kind="stable")
    wide, tall = ceil(steps / _COLUMNS), ceil(experts / _ROWS)
    rows = min(18, _MAP // ceil(experts / tall))
    cells = [words for words in (_cell("steps", wide), _cell("experts", tall)) if words]
    of = f"; a cell is the mean of {' and '.join(cells)}" if cells else ""
    of += ", named by the first" if tall > 1 else ""
    out = [text_at(LEFT, y, f"load of every expert, the one with most tokens without bias on top{of}")]
    out += colour_scale(y + 20, "tokens over the mean:", RATIO, RATIO_TO, None)
    y += 44
    for x, words, loads in ((LEFT, "without bias", before), (_RIGHT_PANEL, "with bias", after)):
        out.append(text_at(x, y, words, bold=True))
        out.append(text_at(x - 8, y, "expert", SMALL, "end", fill="#444"))
        out += _heat_map(x, y + 8, rows, _binned(loads[:, order] / loads.mean(axis=1, keepdims=True), wide, tall))
        out += _step_names(x, y + 8 + rows * ceil(experts / tall), steps)
        out += _expert_names(x, y + 8, rows, order[::tall])
    return out, y + 8 + rows * ceil(experts / tall) + 28


def _cell(what: str, count: int) -> str:
    return f"{count} {what}" if count > 1 else ""


def _binned(ratios: np.ndarray, wide: int, tall: int) -> np.ndarray:
    """Means over ``wide`` steps and ``tall`` experts, float [rows, columns]; those at the ends can be of fewer."""
    steps, experts = np.arange(0, ratios.shape[0], wide), np.arange(0, ratios.shape[1], tall)
    sums = np.add.reduceat(np.add.reduceat(ratios, steps, axis=0), experts, axis=1)
    sizes = np.diff([*steps, ratios.shape[0]])[:, None] * np.diff([*experts, ratios.shape[1]])[None]
    return np.asarray((sums / sizes).T)


def _heat_map(x: int, y: int, height: int, cells: np.ndarray) -> Iterator[str]:
    """One path per colour, a line as thick as a row for each run of cells of that colour; [rows, columns]."""
    levels = np.searchsorted(RATIO_TO, cells, side="right")
    rows, columns = levels.shape
    ends = [x + round(n * _PANEL / columns) for n in range(columns + 1)]
    paths = [""] * len(RATIO)
    for row in range(rows):
        cuts = [0, *(np.flatnonzero(np.diff(levels[row])) + 1).tolist(), columns]
        for a, b in pairwise(cuts):
            paths[levels[row, a]] += f"M{ends[a]} {y + (row + 0.5) * height:g}h{ends[b] - ends[a]}"
    yield f'<g stroke-width="{height}" shape-rendering="crispEdges">'
    yield from (f'<path stroke="{fill}" d="{d}"/>' for fill, d in zip(RATIO, paths, strict=True) if d)
    yield f'</g><path fill="none" stroke="{LINE}" d="M{x} {y}h{_PANEL}v{rows * height}h-{_PANEL}z"/>'


def _expert_names(x: int, y: int, height: int, experts: np.ndarray) -> Iterator[str]:
    """Experts' numbers at the left of the rows, as many as have room."""
    for row in range(0, len(experts), ceil(13 / height)):
        yield text_at(x - 8, y + (row + 0.5) * height + 3.5, f"{experts[row]}", SMALL, "end", fill="#444")
