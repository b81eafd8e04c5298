"""Throughput against time per output token over a sweep of batches: what a deployment gives at which latency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from planc.render.chart import NAME, WIDTH, figure, seconds_text, text_at, time_unit
from planc.render.plot import (
    BAND,
    BOUND,
    CURVE,
    DASH,
    Box,
    Label,
    Place,
    Sample,
    Scale,
    along,
    around,
    grid,
    labels,
    legend,
    line,
    numbers,
    ring,
    scale,
    short,
    stroke,
)
from planc.render.text import wrapped, xml_escape
from planc.schedule import Point

LEFT, RIGHT, _HEIGHT = 84, 84, 420
_FLOOR = "#555"


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
    plot = Box(LEFT, top, WIDTH - RIGHT, top + _HEIGHT)
    x, y, ticks = _axes(points, bound_s, plot)
    out = [text_at(12, 42 + 16 * i, words, fill="#444") for i, words in enumerate(lines)]
    out += _legend(points, bound_s, best, top - 22)
    out += ticks
    out += _band(points, x, y)
    out += _curves(points, x, y)
    if bound_s is not None:
        out += _bound(bound_s, x, plot)
    out += _marks(points, best, x, y)
    out += _batches(points, best, x, y, plot, bound_s)
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


def _axes(points: Sequence[Point], bound_s: float | None, plot: Box) -> tuple[Scale, Scale, list[str]]:
    """Places of TPOT and TPS, and the lines and numbers of the axes."""
    times = [t for p in points for t in (p.tpot, p.low, p.high, p.floor) if t > 0] + [bound_s or points[0].tpot]
    rates = [p.tps for p in points] + [p.tps * p.tpot / t for p in points for t in (p.low, p.high, p.floor) if t > 0]
    left, top, right, bottom = plot
    x, x_ticks = scale(min(times), max(times), left, right)
    y, y_ticks = scale(min(rates), max(rates), bottom, top)
    unit, factor = time_unit(max(times))
    out = ['<g id="tps-tpot-axes">', *grid(plot, map(x, x_ticks), map(y, y_ticks))]
    out += numbers([(x(t), f"{t / factor:.4g}") for t in x_ticks], bottom + 16)
    out.append(text_at((left + right) / 2, bottom + 34, f"TPOT, {unit}", NAME, "middle"))
    out += [text_at(left - 6, y(rate) + 4, short(rate), NAME, "end") for rate in y_ticks]
    out.append(text_at(left - 6, top - 8, "TPS", NAME, "end"))
    gpus = {round(p.tps / p.tps_per_gpu) for p in points if p.tps_per_gpu > 0}
    if len(gpus) == 1:
        count = gpus.pop()
        each, each_ticks = scale(min(rates) / count, max(rates) / count, bottom, top)
        strokes = "".join(f"M{right} {each(rate):.1f}h5" for rate in each_ticks)
        out.append(f'<path fill="none" stroke="#8a8a8a" d="{strokes}"/>')
        out += [text_at(right + 9, each(rate) + 4, short(rate), NAME) for rate in each_ticks]
        out.append(text_at(right + 6, top - 8, "TPS per GPU", NAME))
    return x, y, [*out, "</g>"]


# --- what is drawn ----------------------------------------------------------------------------------------------------------


def _at(point: Point, seconds: float, x: Scale, y: Scale) -> Place:
    """Where the point would be with another TPOT."""
    return x(seconds), y(point.tps * point.tpot / seconds)


def _band(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[str]:
    quick = [_at(p, p.low, x, y) for p in points]
    slow = [_at(p, p.high, x, y) for p in points]
    wide = 1 if len(points) > 1 else 7  # the interval of one point is a line
    yield f'<path id="tps-tpot-interval" fill="{BAND}" stroke="{BAND}" stroke-width="{wide}" d="{line(quick + slow[::-1])}z"/>'


def _curves(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[str]:
    floors = [_at(p, p.floor, x, y) for p in points if p.floor > 0]
    if floors:
        yield f'<path id="tps-tpot-floor" fill="none" stroke="{_FLOOR}" stroke-width="1.2" d="{line(floors)}"/>'
    yield f'<path id="tps-tpot-line" fill="none" stroke="{CURVE}" stroke-width="2" d="{line([(x(p.tpot), y(p.tps)) for p in points])}"/>'


def _bound(bound_s: float, x: Scale, plot: Box) -> Iterator[str]:
    place = x(bound_s)
    yield f'<path id="tps-tpot-bound" fill="none" stroke="{BOUND}" stroke-width="1.6" stroke-dasharray="{DASH}" '
    yield f'd="M{place:.1f} {plot.top:g}V{plot.bottom:g}"><title>TPOT bound {seconds_text(bound_s)}</title></path>'


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
    look = f'fill="{CURVE}"' if feasible else f'fill="#fff" stroke="{CURVE}" stroke-width="1.5"'
    return f'{ring(x, y) if best else ""}<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}/>'


def _batches(
    points: Sequence[Point],
    best: Point | None,
    x: Scale,
    y: Scale,
    plot: Box,
    bound_s: float | None,
) -> Iterator[str]:
    """Batch numbers beside their points, where there is room for them: first for the best point and the ends of the sweep."""
    places = [(x(p.tpot), y(p.tps)) for p in points]
    marks = [around(place, 11 if point is best else 6) for point, place in zip(points, places, strict=True)]
    lines = list(along(places))
    if bound_s is not None:
        lines.append(Box(x(bound_s) - 2, plot.top, x(bound_s) + 2, plot.bottom))
    order = sorted(range(len(points)), key=lambda n: (points[n] is not best, n not in (0, len(points) - 1), n))
    return labels([Label(f"{points[n].batch:,}", places[n], points[n] is best) for n in order], plot, marks, lines)


def _legend(points: Sequence[Point], bound_s: float | None, best: Point | None, y: float) -> list[str]:
    """What lines and marks mean, in a line."""
    keys: list[tuple[Sample, str]] = [
        (lambda x, y: stroke(CURVE, 2)(x, y) + _mark(x + 10, y, True, False), "TPOT and TPS, batch at each point"),
        (lambda x, y: f'<rect x="{x:.1f}" y="{y - 5:g}" width="20" height="10" fill="{BAND}"/>', "90 % interval"),
        (stroke(_FLOOR, 1.2), "floor"),
    ]
    if bound_s is not None:
        keys.append((stroke(BOUND, 1.6, DASH), f"TPOT bound {seconds_text(bound_s)}"))
    if best is not None:
        keys.append((lambda x, y: _mark(x + 10, y, True, True), "best under the bound"))
    if any(not p.fits for p in points):
        keys.append((lambda x, y: _mark(x + 10, y, False, False), "does not fit memory"))
    draw, _ = legend(keys, LEFT + 16)
    return draw(y)
