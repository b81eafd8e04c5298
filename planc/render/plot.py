"""What plots of points share: scales, the numbers on axes, a legend, and labels that keep clear of points and lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import dist, floor, log10
from typing import NamedTuple

from planc.render.chart import NAME, WIDTH, round_step, text_at
from planc.render.text import text_width

Scale = Callable[[float], float]  #: a value to px
Place = tuple[float, float]  #: px from the left and from the top
Sample = Callable[[float, float], str]  #: what a legend shows 20 px wide from x on, at the level y

#: colours of the line, of intervals, of the bound that is asked for, and of what is best under it
CURVE, BAND, BOUND, BEST = "#0072b2", "#cfe4f3", "#b3400a", "#009e73"
DASH = "7 4"
_FAR = 8.0  #: an axis whose ends are farther apart than this factor is logarithmic


class Box(NamedTuple):
    """A part of the figure, in px."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


class Label(NamedTuple):
    """Words for a point; bold is for a point that has a ring. ``reach``: px that it may stand off, tried in turn."""

    words: str
    place: Place
    bold: bool = False
    reach: Sequence[float] = (0,)


# --- axes -----------------------------------------------------------------------------------------------------------------


def is_far(low: float, high: float) -> bool:
    """Whether an axis with these ends is logarithmic."""
    return high > _FAR * low


def scale(low: float, high: float, start: float, end: float) -> tuple[Scale, list[float]]:
    """Values to px and the values that are named: logarithmic where the ends are far apart, else from zero on."""
    if not is_far(low, high):
        step = round_step(high * 1.06 / 8)
        last = high * 1.06
        return lambda v: start + (end - start) * v / last, [n * step for n in range(floor(last / step) + 1)]
    first, last = log10(low / 1.15), log10(high * 1.15)
    powers = range(floor(first), floor(last) + 1)
    values = [f * 10.0**power for power in powers for f in (1, 2, 5)]
    return (
        lambda v: start + (end - start) * (log10(v) - first) / (last - first),
        [v for v in values if first <= log10(v) <= last],
    )


def grid(plot: Box, across: Iterable[float], up: Iterable[float]) -> list[str]:
    """The frame of a plot and the lines of its axes; ``across`` and ``up``: px of the values that are named."""
    lines = "".join(f"M{x:.1f} {plot.top:g}V{plot.bottom:g}" for x in across)
    lines += "".join(f"M{plot.left:g} {y:.1f}H{plot.right:g}" for y in up)
    size = f'width="{plot.right - plot.left:g}" height="{plot.bottom - plot.top:g}"'
    return [
        f'<path fill="none" stroke="#e2e2e2" d="{lines}"/>',
        f'<rect x="{plot.left:g}" y="{plot.top:g}" {size} fill="none" stroke="#8a8a8a"/>',
    ]


def numbers(places: Sequence[tuple[float, str]], y: float) -> Iterator[str]:
    """Numbers below the axis, as many as have room."""
    free = 0.0
    for x, words in places:
        half = text_width(words, NAME) / 2
        if x - half >= free:
            yield text_at(x, y, words, NAME, "middle")
            free = x + half + 8


def short(value: float) -> str:
    """``950``, ``12k``, ``1.5M``."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * factor or (unit == "M" and value >= factor):
            return f"{value / factor:.4g}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.3g}"


# --- lines, marks and their legend -------------------------------------------------------------------------------------------


def line(places: Iterable[Place]) -> str:
    """The path through the places."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def ring(x: float, y: float) -> str:
    """Around the mark of what is best."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{BEST}" stroke-width="2.5"/>'


def stroke(colour: str, wide: float, dash: str = "") -> Sample:
    """The sample of a line in a legend."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return lambda x, y: f'<path fill="none" stroke="{colour}" stroke-width="{wide}" d="M{x:.1f} {y:g}h20"{dashes}/>'


def legend(
    keys: Sequence[tuple[Sample, str]], left: float, right: float = WIDTH
) -> tuple[Callable[[float], list[str]], float]:
    """What lines and marks mean, in rows from ``left`` to ``right``: drawn from the first row's base line on, and px of
    the rows below the first."""
    places, x, row = [], left, 0.0
    for _, words in keys:
        wide = 26 + text_width(words, NAME) + 16
        if x > left and x + wide - 16 > right:
            x, row = left, row + 18
        places.append((x, row))
        x += wide

    def draw(y: float) -> list[str]:
        return [
            sample(x, y + row - 4) + text_at(x + 26, y + row, words, NAME)
            for (x, row), (sample, words) in zip(places, keys, strict=True)
        ]

    return draw, row


# --- labels ---------------------------------------------------------------------------------------------------------------


def around(place: Place, radius: float) -> Box:
    """The room of a mark."""
    x, y = place
    return Box(x - radius, y - radius, x + radius, y + radius)


def along(places: Sequence[Place]) -> Iterator[Box]:
    """The room of a line through the places, in pieces."""
    for (a, b), (c, d) in pairwise(places):
        pieces = int(max(abs(c - a), abs(d - b)) / 6) + 1
        for n in range(pieces + 1):
            u, v = a + (c - a) * n / pieces, b + (d - b) * n / pieces
            yield Box(u - 1, v - 1, u + 1, v + 1)


def labels(wanted: Iterable[Label], plot: Box, marks: Sequence[Box], lines: Sequence[Box]) -> Iterator[str]:
    """The labels that have room inside ``plot`` clear of marks, lines and one another, the first wanted first.

    A label that stands off its point has a leader, which keeps clear of other labels and marks and may cross lines.
    """
    solid, thin = list(marks), list(lines)
    for label in wanted:
        near = around(label.place, 8)  # marks that coincide with the point: no leader could keep clear of them
        for box, off in _rooms(label):
            if not plot.holds(box) or any(box.meets(other) for other in (*solid, *thin)):
                continue
            lead = _leader(label, box) if off else []
            if any(piece.meets(other) for piece in along(lead) for other in solid if not other.meets(near)):
                continue
            solid.append(box)
            thin += along(lead)
            if lead:
                yield f'<path class="leader" fill="none" stroke="#8a8a8a" stroke-width=".8" d="{line(lead)}"/>'
            if lead and box.right <= label.place[0]:  # widths are upper bounds: the text ends where its leader does
                yield text_at(box.right - 1, box.top + 11, label.words, NAME, "end", bold=label.bold)
            else:
                yield text_at(box.left + 1, box.top + 11, label.words, NAME, bold=label.bold)
            break


def _rooms(label: Label) -> Iterator[tuple[Box, float]]:
    """Places to try for a label, nearest first, and how far each stands off."""
    wide, (a, b) = text_width(label.words, NAME, bold=label.bold), label.place
    for off in label.reach:
        away = (12 if label.bold else 7) + off
        corners = [
            (a - away - wide, b - away - 4),
            (a + away, b + away + 4),
            (a - wide / 2, b - away - 8),
            (a - wide / 2, b + away + 8),
            (a - away - 4 - wide, b),
            (a + away + 4, b),
            (a - away - wide, b + away + 4),
            (a + away, b - away - 4),
        ]
        if off:  # steeper ones too, and flatter ones
            for u, v in ((away / 2, away + 8), (2 * away, away)):
                corners += [(left, b + down) for down in (v, -v) for left in (a - u - wide, a + u)]
        for left, middle in corners:
            yield Box(left - 1, middle - 7, left + wide + 1, middle + 7), off


def _leader(label: Label, box: Box) -> list[Place]:
    """From the rim of a point's mark to just before its label's box."""
    x, y = label.place
    to = min(max(x, box.left - 2), box.right + 2), min(max(y, box.top), box.bottom)
    part = (11 if label.bold else 6) / dist(label.place, to)
    return [(x + part * (to[0] - x), y + part * (to[1] - y)), to]
