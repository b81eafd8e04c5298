"""Parts that charts share: text, the page around them, round axis steps, times as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log10

from planc.render.style import FONT
from planc.render.text import fitted, xml_escape
from planc.units import format_seconds

WIDTH = 1000
SIZE, SMALL = 12.0, 11.0  #: px of text, and of the smallest


def seconds_text(value: float) -> str:
    """``2.366 ms``, ``28.12 µs``."""
    return format_seconds(value).replace("us", "µs")


def round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** floor(log10(least))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= least * (1 - 1e-9))


def time_unit(longest: float) -> tuple[str, float]:
    """Unit for an axis that ends at ``longest`` seconds, and its seconds."""
    return next((u, f) for u, f in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if longest >= 2 * f or u == "µs")


def text(
    x: float, y: float, words: str, size: float = SIZE, anchor: str = "", *, bold: bool = False, fill: str = ""
) -> str:
    """A text element; what is at its default is left out."""
    more = f' font-size="{size:g}"' if size != SIZE else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    more += ' font-weight="bold"' if bold else ""
    more += f' fill="{fill}"' if fill else ""
    return f'<text x="{round(x, 1):g}" y="{round(y, 1):g}"{more}>{xml_escape(words)}</text>'


def page(id: str, title: str, description: str, height: float, body: Iterable[str]) -> str:
    """A figure with its title."""
    name = xml_escape(title)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'id="{id}" role="img" aria-label="{name}" font-family="{xml_escape(FONT)}" font-size="{SIZE:g}" '
        'style="font-kerning:none;max-width:100%;height:auto">'
    )
    white = f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>'
    shown = xml_escape(fitted(title, 14, WIDTH - 24, bold=True))
    heading = f'<text x="12" y="22" font-size="14" font-weight="bold">{shown}</text>'
    described = f"<title>{name}</title><desc>{xml_escape(description)}</desc>"
    return "\n".join([head, described, white, heading, *body, "</svg>", ""])
