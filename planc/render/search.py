"""A search result drawn: TPS per GPU against TPS per user, and against the number of GPUs. Both are better when larger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from planc.render.chart import NAME, WIDTH, figure, seconds_text, text_at
from planc.render.plot import (
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
from planc.render.text import fitted, wrapped, xml_escape
from planc.units import counted, format_bytes

Record = Mapping[str, Any]  #: a search result of the schema planc.search/1
Row = Mapping[str, Any]  #: one of its deployments

#: a kind of mark, as the data of the interactive page has it -> what it stands for
KINDS: Final = {
    "one": "at most one expert per GPU",
    "several": "several experts per GPU",
    "baseline": "baseline",
}
COLOURS: Final = {"one": CURVE, "several": "#b0467f", "baseline": "#444"}
NOTHING = "No candidate keeps the bounds."
_OBJECTIVES = {
    "tps": "most TPS",
    "tps-per-gpu": "most TPS per GPU",
    "tpot": "shortest TPOT",
    "cost": "lowest cost per token",
    "gpus": "fewest GPUs",
}
_INTERVAL = {"one": "#9cc7e3", "several": "#dcaac8", "baseline": "#bbb"}
_DEGREES = {"dp": "DP", "pp": "PP", "ep": "EP", "tp": "TP", "expert_tp": "expert TP"}
_LEFT, _RIGHT, _HEIGHT, _SMALL_HEIGHT = 84, 24, 440, 260
#: px that the names of baselines and of the winner may stand off their points, and those of other points
_FAR, _NEAR = (0, 14, 30, 50, 75, 105, 140, 180), (0, 14, 30, 50)


class Mark(NamedTuple):
    """A deployment in a plot; ``kind``: a key of `KINDS`; ``words``: its tooltip."""

    id: str
    kind: str
    row: Row
    won: bool
    words: str


# --- in words -------------------------------------------------------------------------------------------------------------


def result_words(record: Record) -> list[str]:
    """What was searched, what for, and what was found, a sentence each."""
    winner, words = record["winner"], _OBJECTIVES.get(record["objective"], str(record["objective"]))
    shown = "the best of all candidates" if record["optimal"] else "the best found, of which there may be better"
    said = [
        f"{record['candidates']:,} candidates, {record['simulated']:,} simulated.",
        f"Objective: {words}{_bounds(record['bounds'])}.",
    ]
    if winner is None:
        return [*said, NOTHING]
    return [*said, f"Winner ({shown}): {row_words(winner)}."]


def _bounds(bounds: Row) -> str:
    """`` with TPOT at or below 50 ms, on 64 or 128 GPUs``."""
    kept = [
        f"{key.upper()} at or below {seconds_text(bounds[f'{key}_s'])}"
        for key in ("tpot", "ttft")
        if bounds.get(f"{key}_s")
    ]
    kept += [f"at least {bounds['tps']:,.0f} TPS"] if bounds.get("tps") else []
    said = f" with {' and '.join(kept)}" if kept else ""
    gpus = [f"{n:,}" for n in bounds.get("gpus") or ()]
    many = " or ".join([", ".join(gpus[:-1]), gpus[-1]] if len(gpus) > 1 else gpus)
    return f"{said}{',' if kept else ''} on {many} GPU{'s' if gpus != ['1'] else ''}" if gpus else said


def row_words(row: Row) -> str:
    """A deployment and what it gives, for captions and tooltips."""
    low, high = row["tpot_interval_s"]
    return (
        f"{degrees(row)} on {counted(row['gpus'], 'GPU')}, batch {row['batch']:,} in {row['micro_batches']} micro-"
        f"batch{'es' if row['micro_batches'] != 1 else ''}, gating {row['gating']}, {KINDS[rule_kind(row)]}: {row['tps_per_user']:,.4g} TPS "
        f"per user, {row['tps_per_gpu']:,.0f} per GPU, {row['tps']:,.0f} in all; TPOT {seconds_text(row['tpot_s'])} "
        f"({seconds_text(low)} to {seconds_text(high)}), floor {seconds_text(row['tpot_floor_s'])}; memory "
        f"{format_bytes(row['memory_used_bytes'])} of {format_bytes(row['memory_capacity_bytes'])}"
    )


def degrees(row: Row, keys: Iterable[str] = _DEGREES) -> str:
    """``DP 1 · PP 1 · EP 128 · TP 2``; of expert TP only where there is some."""
    return " · ".join(f"{_DEGREES[key]} {row[key]}" for key in keys if key != "expert_tp" or row[key] != 1)


# --- rows -----------------------------------------------------------------------------------------------------------------


def rule_kind(row: Row) -> str:
    """The kind of mark of a deployment that the search found."""
    return "one" if row["one_expert_per_gpu"] else "several"


def is_winner(row: Row, winner: Row | None) -> bool:
    """Whether a row of the front, which has more keys, is the winner."""
    return winner is not None and all(row.get(key) == value for key, value in winner.items() if key in row)


def marks_of(record: Record) -> list[Mark]:
    """All that has a place in a plot: the front, the winner where it is not of the front, and the baselines that fit.
    Numbers in ids are those of the record's lists, from 1 on."""
    front, winner = record["front"], record["winner"]
    marks = [
        Mark(f"front-{n}", rule_kind(row), row, is_winner(row, winner), row_words(row))
        for n, row in enumerate(front, 1)
    ]
    if winner is not None and not any(mark.won for mark in marks):
        marks.append(Mark("winner", rule_kind(winner), winner, True, row_words(winner)))
    return marks + [
        Mark(f"baseline-{n}", "baseline", row, False, f"{row['name']} ({row['reason']}): {row_words(row)}")
        for n, row in enumerate(record["baselines"], 1)
        if row["tps"] is not None
    ]


def outline(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other beats in both TPS per user and per GPU, ascending in the former."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["tps_per_user"], r["tps_per_gpu"]), reverse=True):
        if not kept or row["tps_per_gpu"] > kept[-1]["tps_per_gpu"]:
            kept.append(row)
    return kept[::-1]


def interval_curve(row: Row, pieces: int = 6) -> list[tuple[float, float]]:
    """TPS per user and per GPU over the interval of TPOT. The batch stays, so TPS × TPOT does."""
    low, high = row["tpot_interval_s"]
    rates = [(1 / high) * (high / low) ** (n / pieces) for n in range(pieces + 1)]
    return [(rate, row["tps_per_gpu"] * row["tpot_s"] * rate) for rate in rates]


def best_by_gpus(record: Record) -> list[Mark]:
    """The row of the front with most TPS per GPU for each number of GPUs, of those that keep the bound of TPOT."""
    bound, best = record["bounds"].get("tpot_s"), dict[int, Mark]()
    for mark in marks_of(record):
        row, known = mark.row, best.get(mark.row["gpus"])
        if mark.kind == "baseline" or (bound and row["tpot_s"] > bound):
            continue
        if known is None or row["tps_per_gpu"] > known.row["tps_per_gpu"]:
            best[row["gpus"]] = mark
    return [best[gpus] for gpus in sorted(best)]


# --- TPS per GPU against TPS per user ---------------------------------------------------------------------------------------


def search_svg(record: Record) -> str:
    """The front of a search and its baselines: TPS per GPU against TPS per user, 1,000 px wide.

    Interval: the same batch at another TPOT, so TPS per user and per GPU change alike. The line joins the rows that no
    other beats in both; at a TPS per user between two of them, the quicker one is what there is.
    """
    title = f"Throughput per GPU against throughput per user · {record['name']}"
    if not record["front"]:
        return _nothing("search", title, record)
    caption, marks, bound_s = " ".join(result_words(record)), marks_of(record), record["bounds"].get("tpot_s")
    lines = wrapped(caption, 12, WIDTH - 24)
    draw, rows_below = legend(_keys(marks, bound_s), _LEFT, WIDTH - _RIGHT)
    base = 46 + 16 * len(lines) + 10
    top = base + rows_below + 34
    plot = Box(_LEFT, top, WIDTH - _RIGHT, top + _HEIGHT)
    across, up = extent(record)
    x, x_ticks = scale(*across, plot.left, plot.right)
    y, y_ticks = scale(*up, plot.bottom, plot.top)
    places = [(x(mark.row["tps_per_user"]), y(mark.row["tps_per_gpu"])) for mark in marks]
    intervals = [[(x(a), y(b)) for a, b in interval_curve(mark.row)] for mark in marks]
    steps = _steps([(x(row["tps_per_user"]), y(row["tps_per_gpu"])) for row in outline(record["front"])])
    out = [text_at(12, 42 + 16 * i, words, fill="#444") for i, words in enumerate(lines)]
    out += draw(base)
    out += ['<g id="search-axes">', *_axes(plot, y, y_ticks, [(x(rate), short(rate)) for rate in x_ticks])]
    out += [text_at((plot.left + plot.right) / 2, plot.bottom + 34, "TPS per user (1 ÷ TPOT)", NAME, "middle"), "</g>"]
    taken = [box for curve in (*intervals, steps) for box in along(curve)]
    if bound_s:
        at = x(1 / bound_s)
        out.append(
            f'<path id="search-bound" fill="none" stroke="{BOUND}" stroke-width="1.6" stroke-dasharray="{DASH}" '
            f'd="M{at:.1f} {plot.top:g}V{plot.bottom:g}"><title>TPOT bound {seconds_text(bound_s)}</title></path>'
        )
        taken.append(Box(at - 2, plot.top, at + 2, plot.bottom))
    out += _drawn("search", marks, places, intervals, steps)
    out += labels(_names(record, marks, places), plot, _rooms(marks, places), taken)
    return figure("search", title, plot.bottom + 44, out, caption)


def _nothing(id: str, title: str, record: Record) -> str:
    """The figure of a search that found nothing."""
    lines = wrapped(" ".join(result_words({**record, "winner": None})), 12, WIDTH - 24)
    body = [text_at(12, 44 + 16 * i, words) for i, words in enumerate(lines)]
    return figure(id, title, 44 + 16 * len(lines), body, NOTHING)


def extent(record: Record) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest TPS per user, then per GPU, of all that is drawn."""
    curves = [place for mark in marks_of(record) for place in interval_curve(mark.row)]
    bound = record["bounds"].get("tpot_s")
    users = [a for a, _ in curves] + ([1 / bound] if bound else [])
    gpus = [b for _, b in curves]
    return (min(users), max(users)), (min(gpus), max(gpus))


def _keys(marks: Sequence[Mark], bound_s: float | None = None) -> list[tuple[Sample, str]]:
    """What marks and lines mean."""
    kinds = {mark.kind for mark in marks}
    keys = [(_sample(kind), words) for kind, words in KINDS.items() if kind in kinds]
    keys += [(_sample(mark.kind, won=True), "winner") for mark in marks if mark.won]
    keys += [(stroke(CURVE, 1.6), "front"), (stroke(_INTERVAL["baseline"], 1.2), "90 % interval")]
    return keys + ([(stroke(BOUND, 1.6, DASH), f"TPOT bound {seconds_text(bound_s)}")] if bound_s else [])


def _sample(kind: str, *, won: bool = False) -> Sample:
    return lambda x, y: (ring(x + 10, y) if won else "") + _mark(kind, x + 10, y)


def _axes(plot: Box, y: Scale, ticks: Sequence[float], across: Sequence[tuple[float, str]]) -> list[str]:
    """Frame, lines and numbers of the axes; ``across``: places and numbers of the level one."""
    out = grid(plot, (place for place, _ in across), map(y, ticks))
    out += numbers(across, plot.bottom + 16)
    out += [text_at(plot.left - 6, y(rate) + 4, short(rate), NAME, "end") for rate in ticks]
    return [*out, text_at(plot.left - 6, plot.top - 8, "TPS per GPU", NAME, "end")]


def _steps(places: Sequence[Place]) -> list[Place]:
    """The line of the front: down to the next row, then over to it."""
    return [*places[:1], *(corner for (a, _), (c, d) in pairwise(places) for corner in ((a, d), (c, d)))]


def _drawn(
    id: str,
    marks: Sequence[Mark],
    places: Sequence[Place],
    intervals: Sequence[Sequence[Place]],
    joined: Sequence[Place],
) -> Iterator[str]:
    """Intervals, over them the line of the front, and over both the marks."""
    for mark, curve in zip(marks, intervals, strict=True):
        colour = _INTERVAL[mark.kind]
        yield f'<path id="{id}-{mark.id}-interval" fill="none" stroke="{colour}" stroke-width="1.2" d="{line(curve)}"/>'
    yield f'<path id="{id}-line" fill="none" stroke="{CURVE}" stroke-width="1.6" d="{line(joined)}"/>'
    for mark, place in zip(marks, places, strict=True):
        shape = (ring(*place) if mark.won else "") + _mark(mark.kind, *place)
        yield f'<g id="{id}-{mark.id}"><title>{xml_escape(mark.words)}</title>{shape}</g>'


def _mark(kind: str, x: float, y: float) -> str:
    """A disc, a diamond or an open triangle."""
    colour = COLOURS[kind]
    if kind == "one":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    if kind == "several":
        return f'<path fill="{colour}" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    return f'<path fill="#fff" stroke="{colour}" stroke-width="1.5" d="M{x:.1f} {y - 5:.1f}l5 8.5h-10z"/>'


def _rooms(marks: Sequence[Mark], places: Sequence[Place]) -> list[Box]:
    return [around(place, 11 if mark.won else 7) for mark, place in zip(marks, places, strict=True)]


def _names(record: Record, marks: Sequence[Mark], places: Sequence[Place]) -> list[Label]:
    """Labels: first the winner's, then the names of baselines, then what tells the rows of the front's
    line apart, its ends first."""
    found = [mark.row for mark in marks if mark.kind != "baseline"]
    differ = [key for key in _DEGREES if len({row[key] for row in found}) > 1]
    on_line = [id(row) for row in outline(record["front"])]
    ranked: list[tuple[int, Label]] = []
    for mark, place in zip(marks, places, strict=True):
        words = _short_words(mark.row, differ)
        if mark.won:
            ranked.append((0, Label(words, place, True, _FAR)))
        elif mark.kind == "baseline":
            ranked.append((1, Label(fitted(mark.row["name"], NAME, 260), place, reach=_FAR)))
        elif id(mark.row) in on_line:
            ranked.append((2 if id(mark.row) in (on_line[0], on_line[-1]) else 3, Label(words, place, reach=_NEAR)))
    return [label for _, label in sorted(ranked, key=lambda pair: pair[0])]


def _short_words(row: Row, differ: Sequence[str]) -> str:
    """The degrees that are not the same in all rows, and the batch."""
    return " · ".join(filter(None, [degrees(row, differ), f"batch {row['batch']:,}"]))


# --- TPS per GPU against GPUs ---------------------------------------------------------------------------------------------


def search_gpus_svg(record: Record) -> str:
    """Most TPS per GPU for each number of GPUs, of the front's rows that keep the bound of TPOT; 1,000 px wide."""
    title = f"Throughput per GPU by number of GPUs · {record['name']}"
    best = best_by_gpus(record)
    if not best:
        return _nothing("search-gpus", title, record)
    bound = record["bounds"].get("tpot_s")
    caption = "For each number of GPUs the row of the front with most TPS per GPU" + (
        f", TPOT at or below {seconds_text(bound)}." if bound else "."
    )
    plot = Box(_LEFT, 106, WIDTH - _RIGHT, 106 + _SMALL_HEIGHT)
    counts = [mark.row["gpus"] for mark in best]
    rates = [rate for mark in best for _, rate in interval_curve(mark.row)]
    x, _ = scale(min(counts), max(counts), plot.left, plot.right)
    y, ticks = scale(min(rates), max(rates), plot.bottom, plot.top)
    places = [(x(mark.row["gpus"]), y(mark.row["tps_per_gpu"])) for mark in best]
    intervals = [
        [(at, y(rate)) for _, rate in interval_curve(mark.row, 1)] for mark, (at, _) in zip(best, places, strict=True)
    ]
    draw, _ = legend(_keys(best), _LEFT)
    out = [text_at(12, 42, caption, fill="#444"), *draw(66)]
    out += ['<g id="search-gpus-axes">', *_axes(plot, y, ticks, [(x(n), f"{n:,}") for n in counts])]
    out += [text_at((plot.left + plot.right) / 2, plot.bottom + 34, "GPUs", NAME, "middle"), "</g>"]
    out += _drawn("search-gpus", best, places, intervals, places)
    differ = [key for key in _DEGREES if len({mark.row[key] for mark in best}) > 1]
    wanted = [
        Label(_short_words(mark.row, differ), place, mark.won, _FAR) for mark, place in zip(best, places, strict=True)
    ]
    wanted.sort(key=lambda label: not label.bold)
    taken = [box for curve in (places, *intervals) for box in along(curve)]
    out += labels(wanted, plot, _rooms(best, places), taken)
    return figure("search-gpus", title, plot.bottom + 44, out, caption)
