"""What figures 1,000 px wide share: text, colour scales for loads, axes, times, and the frame of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import ceil, floor, log10

import numpy as np

from planc.render.style import FONT
from planc.render.text import fitted, text_width, xml_escape
from planc.units import format_seconds

WIDTH, LEFT, RIGHT = 1000, 104, 20
SIZE, NAME, SMALL = 12.0, 11.0, 10.0  #: px of text, of names beside marks, and of the smallest
#: a load over the mean, up to a bound: blue is less, red more; readable to the colour-blind
RATIO = ("#2166ac", "#6baed6", "#c6dcef", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
RATIO_TO = (0.5, 0.7, 0.9, 1.1, 1.4, 2.0)
LINE = "#8a8a8a"
OURS, BOUND = "#0072b2", "#d55e00"


def text_at(
    x: float, y: float, text: str, size: float = SIZE, anchor: str = "", *, bold: bool = False, fill: str = ""
) -> str:
    """A text element; what is at its default is left out."""
    more = f' font-size="{size:g}"' if size != SIZE else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    more += ' font-weight="bold"' if bold else ""
    more += f' fill="{fill}"' if fill else ""
    return f'<text x="{round(x, 1):g}" y="{round(y, 1):g}"{more}>{xml_escape(text)}</text>'


def figure(id: str, title: str, height: float, body: Iterable[str], description: str = "") -> str:
    """A figure with its title; one with a description narrows with its page."""
    name = xml_escape(title)
    style = "font-kerning:none" + (";max-width:100%;height:auto" if description else "")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" id="{id}" '
        f'role="img" aria-label="{name}" font-family="{xml_escape(FONT)}" font-size="{SIZE:g}" style="{style}">'
    )
    white = f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>'
    heading = f'<text x="12" y="22" font-size="14" font-weight="bold">{xml_escape(fitted(title, 14, WIDTH - 24, bold=True))}</text>'
    described = f"<title>{name}</title>" + (f"<desc>{xml_escape(description)}</desc>" if description else "")
    return "\n".join([head, described, white, heading, *body, "</svg>", ""])


def colour_level(value: float, mean: float, bounds: Sequence[float]) -> int:
    """Index of the colour for ``value``: the first of ``bounds`` that it stays below, as a multiple of the mean."""
    return int(np.searchsorted(bounds, value / mean if mean else 1.0, side="right"))


def colour_scale(
    y: float, words: str, colours: Sequence[str], bounds: Sequence[float], other: tuple[str, str] | None
) -> Iterator[str]:
    """The colour scale in a line, after ``words``; ``other``: a fill and words for what has no value."""
    yield text_at(LEFT, y, words, 11)
    x = LEFT + text_width(words, 11) + 10
    names = [
        f"0–{bounds[0]:g}",
        *(f"{a:g}–{b:g}" for a, b in pairwise(bounds)),
        f"over {bounds[-1]:g}",
    ]
    for fill, name in (*zip(colours, names, strict=True), *([other] if other else [])):
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="14" height="12" fill="{fill}" stroke="{LINE}" stroke-width=".5"/>'
        yield text_at(x + 18, y, name, 11)
        x += 18 + text_width(name, 11) + 12


def axis(longest: float) -> tuple[float, int]:
    """A round step and how many of them reach ``longest``: at most five."""
    step = round_step(longest / 5)
    return step, ceil(longest / step - 1e-9)


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** floor(log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def seconds_text(value: float) -> str:
    """``2.366 ms``, ``28.12 µs``."""
    return format_seconds(value).replace("us", "µs")


def time_unit(longest: float) -> tuple[str, float]:
    """Unit for an axis that ends at ``longest`` seconds, and its seconds."""
    return next((u, f) for u, f in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if longest >= 2 * f or u == "µs")
