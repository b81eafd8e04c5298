"""Throughput against time per output token over a sweep of batches: what a deployment gives at which latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import floor, log10
from typing import NamedTuple

from planc.render.chart import NAME, WIDTH, figure, round_step, seconds_text, text_at, time_unit
from planc.render.text import text_width, wrapped, xml_escape
from planc.schedule import Point

LEFT, RIGHT, _HEIGHT = 84, 84, 420
_ROOM = WIDTH - LEFT - RIGHT
_LINE, _BAND, _FLOOR, _BOUND, _BEST = "#0072b2", "#cfe4f3", "#555", "#b3400a", "#009e73"
_DASH = "7 4"
_FAR = 8.0  #: an axis whose ends are farther apart than this factor is logarithmic


def best_under(points: Sequence[Point], bound_s: float) -> Point | None:
    """The feasible point with most tokens per second whose TPOT does not pass the bound; of several, the quickest."""
    inside = [point for point in points if point.fits and point.tpot <= bound_s]
    return max(inside, key=lambda point: (point.tps, -point.tpot), default=None)


def tps_tpot_svg(points: Sequence[Point], *, bound_s: float | None = None, name: str = "") -> str:
    """TPS (left axis; per GPU on the right one) against TPOT for the batches of a sweep, 1,000 px wide.

    A batch at another TPOT has another TPS: the interval and the floor of every point lie on the curve TPS × TPOT of its
    batch. ``bound_s``: the TPOT that is asked for; ``name``: the deployment, for the title.
    """
    title = "Throughput against time per output token" + (f" · {name}" if name else "")
    points = sorted(points, key=lambda point: point.batch)
    if not points:
        return figure("tps-tpot", title, 60, [text_at(12, 44, "No batch was simulated.")], "No batch was simulated.")
    best = best_under(points, bound_s) if bound_s is not None else None
    caption = _caption(points, bound_s, best)
    lines = wrapped(caption, 12, WIDTH - 24)
    top = 46 + 16 * len(lines) + 30
    x, y, ticks = _axes(points, bound_s, top)
    out = [text_at(12, 42 + 16 * i, line, fill="#444") for i, line in enumerate(lines)]
    out += _legend(points, bound_s, best, top - 22)
    out += ticks
    out += _band(points, x, y)
    out += _curves(points, x, y)
    if bound_s is not None:
        out += _bound(bound_s, x, top)
    out += _marks(points, best, x, y)
    out += _batches(points, best, x, y, _Box(LEFT, top, WIDTH - RIGHT, top + _HEIGHT), bound_s)
    return figure("tps-tpot", title, top + _HEIGHT + 44, out, caption)


def _caption(points: Sequence[Point], bound_s: float | None, best: Point | None) -> str:
    many = f"Batches {points[0].batch:,} to {points[-1].batch:,}, all GPUs together, a point per batch."
    words = many if len(points) > 1 else f"Batch {points[0].batch:,}, all GPUs together."
    if bound_s is None:
        return words
    if best is None:
        return f"{words} No feasible batch keeps TPOT at or below {seconds_text(bound_s)}."
    words += (
        f" Most tokens with TPOT at or below {seconds_text(bound_s)}: batch {best.batch:,} with {best.tps:,.0f} TPS "
        f"({best.tps_per_gpu:,.0f} per GPU) at {seconds_text(best.tpot)}"
    )
    return words + (
        f"; its interval reaches {seconds_text(best.high)}, past the bound." if best.high > bound_s else "."
    )


# --- axes -----------------------------------------------------------------------------------------------------------------

Scale = Callable[[float], float]


def _axes(points: Sequence[Point], bound_s: float | None, top: float) -> tuple[Scale, Scale, list[str]]:
    """Places of TPOT and TPS, and the lines and numbers of the axes."""
    times = [t for p in points for t in (p.tpot, p.low, p.high, p.floor) if t > 0] + [bound_s or points[0].tpot]
    rates = [p.tps for p in points] + [p.tps * p.tpot / t for p in points for t in (p.low, p.high, p.floor) if t > 0]
    bottom = top + _HEIGHT
    x, x_ticks = _scale(min(times), max(times), LEFT, WIDTH - RIGHT)
    y, y_ticks = _scale(min(rates), max(rates), bottom, top)
    unit, factor = time_unit(max(times))
    out = ['<g id="tps-tpot-axes">']
    lines = "".join(f"M{x(t):.1f} {top}V{bottom}" for t in x_ticks) + "".join(
        f"M{LEFT} {y(r):.1f}H{WIDTH - RIGHT}" for r in y_ticks
    )
    out.append(f'<path fill="none" stroke="#e2e2e2" d="{lines}"/>')
    out.append(f'<rect x="{LEFT}" y="{top}" width="{_ROOM}" height="{_HEIGHT}" fill="none" stroke="#8a8a8a"/>')
    out += _numbers([(x(t), f"{t / factor:.4g}") for t in x_ticks], bottom + 16)
    out.append(text_at(LEFT + _ROOM / 2, bottom + 34, f"TPOT, {unit}", NAME, "middle"))
    out += [text_at(LEFT - 6, y(rate) + 4, _short(rate), NAME, "end") for rate in y_ticks]
    out.append(text_at(LEFT - 6, top - 8, "TPS", NAME, "end"))
    gpus = {round(p.tps / p.tps_per_gpu) for p in points if p.tps_per_gpu > 0}
    if len(gpus) == 1:
        count = gpus.pop()
        each, each_ticks = _scale(min(rates) / count, max(rates) / count, bottom, top)
        strokes = "".join(f"M{WIDTH - RIGHT} {each(rate):.1f}h5" for rate in each_ticks)
        out.append(f'<path fill="none" stroke="#8a8a8a" d="{strokes}"/>')
        out += [text_at(WIDTH - RIGHT + 9, each(rate) + 4, _short(rate), NAME) for rate in each_ticks]
        out.append(text_at(WIDTH - RIGHT + 6, top - 8, "TPS per GPU", NAME))
    return x, y, [*out, "</g>"]


def _scale(low: float, high: float, start: float, end: float) -> tuple[Scale, list[float]]:
    """Values to px and the values that are named: logarithmic where the ends are far apart, else from zero on."""
    if high <= _FAR * low:
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


def _numbers(places: Sequence[tuple[float, str]], y: float) -> Iterator[str]:
    """Numbers below the axis, as many as have room."""
    free = 0.0
    for x, words in places:
        half = text_width(words, NAME) / 2
        if x - half >= free:
            yield text_at(x, y, words, NAME, "middle")
            free = x + half + 8


def _short(value: float) -> str:
    """``950``, ``12k``, ``1.5M``."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= 10 * factor or (unit == "M" and value >= factor):
            return f"{value / factor:.4g}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.3g}"


# --- what is drawn ----------------------------------------------------------------------------------------------------------


def _at(point: Point, seconds: float, x: Scale, y: Scale) -> tuple[float, float]:
    """Where the point would be with another TPOT."""
    return x(seconds), y(point.tps * point.tpot / seconds)


def _line(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)


def _band(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[str]:
    quick = [_at(p, p.low, x, y) for p in points]
    slow = [_at(p, p.high, x, y) for p in points]
    wide = 1 if len(points) > 1 else 7  # the interval of one point is a line
    yield f'<path id="tps-tpot-interval" fill="{_BAND}" stroke="{_BAND}" stroke-width="{wide}" d="{_line(quick + slow[::-1])}z"/>'


def _curves(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[str]:
    floors = [_at(p, p.floor, x, y) for p in points if p.floor > 0]
    if floors:
        yield f'<path id="tps-tpot-floor" fill="none" stroke="{_FLOOR}" stroke-width="1.2" d="{_line(floors)}"/>'
    yield f'<path id="tps-tpot-line" fill="none" stroke="{_LINE}" stroke-width="2" d="{_line([(x(p.tpot), y(p.tps)) for p in points])}"/>'


def _bound(bound_s: float, x: Scale, top: float) -> Iterator[str]:
    place = x(bound_s)
    yield f'<path id="tps-tpot-bound" fill="none" stroke="{_BOUND}" stroke-width="1.6" stroke-dasharray="{_DASH}" '
    yield f'd="M{place:.1f} {top}V{top + _HEIGHT}"><title>TPOT bound {seconds_text(bound_s)}</title></path>'


def _marks(points: Sequence[Point], best: Point | None, x: Scale, y: Scale) -> Iterator[str]:
    for point in points:
        said = (
            f"batch {point.batch:,}: {point.tps:,.0f} TPS, {point.tps_per_gpu:,.0f} per GPU, TPOT {seconds_text(point.tpot)} "
            f"({seconds_text(point.low)} to {seconds_text(point.high)}), floor {seconds_text(point.floor)}"
        )
        said += "" if point.fits else ", does not fit memory"
        a, b = x(point.tpot), y(point.tps)
        yield f'<g id="tps-tpot-{point.batch}"><title>{xml_escape(said)}</title>{_mark(a, b, point.fits, point is best)}</g>'


def _mark(x: float, y: float, feasible: bool, best: bool) -> str:
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke="{_BEST}" stroke-width="2.5"/>' if best else ""
    look = f'fill="{_LINE}"' if feasible else f'fill="#fff" stroke="{_LINE}" stroke-width="1.5"'
    return f'{ring}<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}/>'


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        """Whether the two overlap."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, other: _Box) -> bool:
        """Whether the other lies inside."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


def _batches(
    points: Sequence[Point],
    best: Point | None,
    x: Scale,
    y: Scale,
    plot: _Box,
    bound_s: float | None,
) -> Iterator[str]:
    """Batch numbers beside their points, where there is room for them: first for the best point and the ends of the sweep."""
    places = [(x(p.tpot), y(p.tps)) for p in points]
    taken = [_Box(a - 6, b - 6, a + 6, b + 6) for a, b in places]
    for (a, b), (c, d) in pairwise(places):  # the line between points, in pieces
        pieces = int(max(abs(c - a), abs(d - b)) / 6) + 1
        for n in range(pieces + 1):
            u, v = a + (c - a) * n / pieces, b + (d - b) * n / pieces
            taken.append(_Box(u - 1, v - 1, u + 1, v + 1))
    if bound_s is not None:
        taken.append(_Box(x(bound_s) - 2, plot.top, x(bound_s) + 2, plot.bottom))
    if best is not None:
        a, b = places[list(points).index(best)]
        taken.append(_Box(a - 11, b - 11, a + 11, b + 11))
    order = sorted(range(len(points)), key=lambda n: (points[n] is not best, n not in (0, len(points) - 1), n))
    for n in order:
        words, bold = f"{points[n].batch:,}", points[n] is best
        wide, (a, b) = text_width(words, NAME, bold=bold), places[n]
        away = 12 if bold else 7
        corners = (
            (a - away - wide, b - away - 4),
            (a + away, b + away + 4),
            (a - wide / 2, b - away - 8),
            (a - wide / 2, b + away + 8),
            (a - away - 4 - wide, b),
            (a + away + 4, b),
            (a - away - wide, b + away + 4),
            (a + away, b - away - 4),
        )
        for left, middle in corners:
            box = _Box(left - 1, middle - 7, left + wide + 1, middle + 7)
            if plot.holds(box) and not any(box.meets(other) for other in taken):
                taken.append(box)
                yield text_at(left, middle + 4, words, NAME, bold=bold)
                break


def _legend(points: Sequence[Point], bound_s: float | None, best: Point | None, y: float) -> Iterator[str]:
    """What lines and marks mean, in a line."""
    level = y - 4
    line = 'fill="none" stroke="{}" stroke-width="{}" d="M{:.1f} {:g}h20"'
    x = float(LEFT + 16)
    keys = [("line", "TPOT and TPS, batch at each point"), ("band", "90 % interval"), ("floor", "floor")]
    keys += [("bound", f"TPOT bound {seconds_text(bound_s)}")] if bound_s is not None else []
    keys += [("best", "best under the bound")] if best is not None else []
    keys += [("unfit", "does not fit memory")] if any(not p.fits for p in points) else []
    for kind, words in keys:
        if kind == "band":
            yield f'<rect x="{x:.1f}" y="{level - 5:g}" width="20" height="10" fill="{_BAND}"/>'
        elif kind in ("best", "unfit"):
            yield _mark(x + 10, level, kind == "best", kind == "best")
        else:
            colour, wide = {"line": (_LINE, 2), "floor": (_FLOOR, 1.2), "bound": (_BOUND, 1.6)}[kind]
            dash = f' stroke-dasharray="{_DASH}"' if kind == "bound" else ""
            yield f"<path {line.format(colour, wide, x, level)}{dash}/>"
            yield _mark(x + 10, level, True, False) if kind == "line" else ""
        yield text_at(x + 26, y, words, NAME)
        x += 26 + text_width(words, NAME) + 16
