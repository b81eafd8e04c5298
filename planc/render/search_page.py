"""A search result as one HTML page that needs no other file and no network: a plot with hover and filters, and tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from textwrap import wrap
from typing import Any

from planc.diagnostics import Diagnostic, PlancError
from planc.render.chart import seconds_text
from planc.render.plot import BEST, BOUND, CURVE, is_far
from planc.render.search import (
    COLOURS,
    KINDS,
    Record,
    Row,
    degrees,
    extent,
    interval_curve,
    marks_of,
    result_words,
    rule_kind,
    search_gpus_svg,
)
from planc.spec import shipped_folder
from planc.units import counted, format_bytes

#: what a reader can choose by: key of a row -> its name
FILTERS = {
    "gpus": "GPUs",
    "one_expert_per_gpu": "at most one expert per GPU",
    "tp": "TP",
    "pp": "PP",
    "micro_batches": "micro-batches",
    "gating": "gating",
}
_SYMBOLS = {"one": "circle", "several": "diamond", "baseline": "triangle-up-open"}
_NONE = "–"


def search_html(record: Record) -> str:
    """The page, some 5 MB, most of which is plotly.js. Raises PlancError (PLN432) where plotly is not installed."""
    library = _plotly_js()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(shipped_folder("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,  # names and reasons are what users wrote
    )
    sizes = {row["gpus"] for row in record["front"]}
    return environment.get_template("search.html.j2").render(
        name=record["name"],
        words=result_words(record),
        library=library,
        data=_data(record),
        filters={key: (name, _choices(record, key)) for key, name in FILTERS.items()},
        front=[_cells(row) | {"why": row["reason"]} for row in record["front"]],
        baselines=[{"name": row["name"]} | _cells(row) | {"why": row["reason"]} for row in record["baselines"]],
        pruned={reason: f"{count:,}" for reason, count in record["pruned"].items()},
        space={key: _words(value) for key, value in record["space"].items()},
        by_gpus=search_gpus_svg(record) if len(sizes) > 1 else "",
    )


def _plotly_js() -> str:
    """The text of plotly.js, which the package brings along."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        hint = "install plotly 6 or newer beside planc: `pip install 'planc[charts]'`"
        said = "the interactive page is drawn by plotly.js: there is no plotly"
        raise PlancError([Diagnostic("PLN432", said, hint=hint)]) from None
    text: str = get_plotlyjs()
    return text


# --- the plot -------------------------------------------------------------------------------------------------------------


def _data(record: Record) -> dict[str, Any]:
    """What the page's script draws. Values of filters are text, as those of a form are."""
    marks, bound = marks_of(record), record["bounds"].get("tpot_s")
    across, up = extent(record) if marks else ((1.0, 1.0), (1.0, 1.0))
    points = [
        {
            "id": mark.id,
            "kind": mark.kind,
            "won": mark.won,
            "x": mark.row["tps_per_user"],
            "y": mark.row["tps_per_gpu"],
            "tpot_s": mark.row["tpot_s"],
            "interval": interval_curve(mark.row),
            "hover": _hover(mark.row, mark.row.get("name", ""), mark.row.get("reason", "")),
            "filters": {key: _choice(mark.row[key]) for key in FILTERS},
        }
        for mark in marks
    ]
    kinds = [
        {"kind": kind, "name": name, "colour": COLOURS[kind], "symbol": _SYMBOLS[kind]} for kind, name in KINDS.items()
    ]
    return {
        "points": points,
        "kinds": [kind for kind in kinds if any(mark.kind == kind["kind"] for mark in marks)],
        "bound": None if not bound else {"x": 1 / bound, "words": f"TPOT bound {seconds_text(bound)}"},
        "axes": {"x": "log" if is_far(*across) else "linear", "y": "log" if is_far(*up) else "linear"},
        "colours": {"front": CURVE, "winner": BEST, "bound": BOUND},
    }


def _hover(row: Row, name: str, reason: str) -> str:
    """The text beside the pointer. plotly.js reads tags and entities in it, so whatever a user wrote is escaped."""
    cells = _cells(row)
    lines = [
        *wrap(name, 70),
        f"{counted(row['gpus'], 'GPU')}: {cells['degrees']}",
        cells["step"],
        cells["experts"],
        f"TPOT {cells['tpot']} ({cells['interval']}), floor {cells['floor']}",
        f"{cells['tps']} TPS, {cells['per_gpu']} per GPU, {cells['per_user']} per user",
        f"memory {cells['memory']}",
        *wrap(reason, 70),
    ]
    return "<br>".join(escape(line) for line in lines)


def _choices(record: Record, key: str) -> list[str]:
    """The values that a filter offers, ascending."""
    return [_choice(value) for value in sorted({mark.row[key] for mark in marks_of(record)})]


def _choice(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


# --- tables ---------------------------------------------------------------------------------------------------------------


def _cells(row: Row) -> dict[str, str]:
    """A deployment as the cells of a table; a dash where there is nothing to say, as of one that does not fit memory."""

    def number(key: str, form: str) -> str:
        return _NONE if row[key] is None else format(row[key], form)

    def seconds(key: str) -> str:
        return _NONE if row[key] is None else seconds_text(row[key])

    interval = row["tpot_interval_s"]
    many = row["micro_batches"]
    return {
        "gpus": number("gpus", ",d"),
        "degrees": degrees(row),
        "experts": f"{KINDS[rule_kind(row)]}; rule {row['rule']}, {row['slots_per_gpu']} slots, {row['rounds']} rounds, "
        f"spares {row['spares']}",
        "step": f"batch {number('batch', ',d')}, {many} micro-batch{'' if many == 1 else 'es'}, gating {row['gating']}, "
        f"{row['tp_comm']}, prefill and decode {row['serving']}",
        "tpot": seconds("tpot_s"),
        "interval": _NONE if interval is None else " to ".join(map(seconds_text, interval)),
        "floor": seconds("tpot_floor_s"),
        "ttft": seconds("ttft_s"),
        "tps": number("tps", ",.0f"),
        "per_gpu": number("tps_per_gpu", ",.0f"),
        "per_user": number("tps_per_user", ",.4g"),
        "memory": " of ".join(
            _NONE if row[f"memory_{key}_bytes"] is None else format_bytes(row[f"memory_{key}_bytes"])
            for key in ("used", "capacity")
        ),
    }


def _words(value: object) -> str:
    """A declared choice in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return _NONE if value is None else _choice(value)
