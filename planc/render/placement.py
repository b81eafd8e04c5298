"""Two figures of a placement for known traffic: experts on nodes as a heat map, and link loads as bars. Both are 1,000 px
wide, for the plan document, and are drawn from the placement's certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np

from planc.placement import Placement
from planc.planner import Certificate
from planc.planner.certificate import KindRecord, LayerRecord
from planc.render.chart import round_step
from planc.render.chart import text as _text
from planc.render.style import FONT
from planc.render.text import fitted, named, numbers_text, text_width, wrapped, xml_escape
from planc.units import decode_numbers, format_seconds

WIDTH, LEFT, RIGHT = 1000, 104, 20
_ROOM = WIDTH - LEFT - RIGHT
_SIZE, _SMALL = 12.0, 10.0  #: px of text, and of the smallest
_NARROW, _TALL = 6, 46  #: px of the narrowest column of a node; rows of the tallest one with numbers in its cells
#: cells of the upper panel with numbers and without, of the lower one, and there with a tooltip each: as many as a figure
#: below 150 kB has room for
_NUMBERED, _BARE, _LAYERED, _TOLD = 600, 3000, 7000, 480
#: tokens over the mean of a copy, up to a bound: light to dark, readable to the colour-blind; white text from `_DARK` on
_HEAT = ("#fffbe6", "#fee8a8", "#fecf66", "#fdae3d", "#ec7014", "#b3400a", "#6e2602")
_HEAT_TO, _DARK = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0), 5
#: tokens of a node over the mean of a node, up to a bound: blue is less, red more
_RATIO = ("#2166ac", "#6baed6", "#c6dcef", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
_RATIO_TO = (0.5, 0.7, 0.9, 1.1, 1.4, 2.0)
_NONE, _LINE = "#dddddd", "#8a8a8a"
_OURS, _BOUND = "#0072b2", "#d55e00"


class _Cell(NamedTuple):
    """A place for a copy: world rank (the first of its shards), turn, expert (-1: empty), tokens, copies of the expert."""

    rank: int
    turn: int
    expert: int
    tokens: float
    copies: int


# --- the heat map -----------------------------------------------------------------------------------------------------


def expert_heat_map_svg(certificate: Certificate, placement: Placement, node_of_rank: np.ndarray) -> str:
    """Upper panel: which expert is on which GPU in the layer with the busiest link (the most uneven one where link times are
    not known), a column per node. Lower panel: what every node gets in every layer, over the layer's mean.

    ``node_of_rank``: int [world] or longer, ascending. Of nodes too many for a column each, the upper panel shows those
    with most tokens, the lower one means of neighbours; the figure says so.
    """
    shown = max(certificate.layers, key=lambda row: (row.seconds, row.imbalance))
    columns = _columns(placement, node_of_rank, shown)
    caption = _about(shown)
    upper, y = _upper(shown, columns, placement.par.expert_tp, node_of_rank, 50 + 16 * len(caption))
    lower, height = _lower(certificate, placement, node_of_rank, shown.layer, y + 34)
    body = [*(_text(12, 42 + 16 * i, line, fill="#444") for i, line in enumerate(caption)), *upper, *lower]
    count = len(certificate.layers)
    title = f"Experts on nodes · layer {shown.layer}" + (f", and all {count} MoE layers" if count > 1 else "")
    return _svg("expert-heat-map", title, height, body)


def _about(shown: LayerRecord) -> list[str]:
    """Why this layer is shown, in lines."""
    if not shown.seconds:
        words = (
            f"Layer {shown.layer} is the most uneven: its fullest GPU has {shown.imbalance:.2f} times the mean load."
        )
    else:
        words = (
            f"Layer {shown.layer} has the busiest links, in dispatch {shown.busiest.replace('_', ' ')}; dispatch and combine "
            f"take {format_seconds(shown.seconds)} together ({format_seconds(shown.identity_seconds)} with identity placement)."
        )
    return wrapped(words, _SIZE, WIDTH - 24)


def _columns(placement: Placement, node_of_rank: np.ndarray, record: LayerRecord) -> dict[int, list[_Cell]]:
    """Node -> its places for copies of the layer in the first replica, by rank and turn."""
    par, part = placement.par, placement.layers[record.layer]
    ranks = par.stage_ranks(par.stage_of_layer(record.layer))[0]
    tokens = decode_numbers(record.loads) / np.maximum(part.copies, 1)
    held = {
        (int(ranks[0]) + rank, turn): expert
        for expert, rank, turn in zip(part.expert.tolist(), part.rank.tolist(), part.slot.tolist(), strict=True)
    }
    columns: dict[int, list[_Cell]] = {}
    for rank in ranks[:: par.expert_tp].tolist():
        for turn in range(part.rounds):
            expert = held.get((rank, turn), -1)
            facts = (float(tokens[expert]), int(part.copies[expert])) if expert >= 0 else (0.0, 0)
            columns.setdefault(int(node_of_rank[rank]), []).append(_Cell(rank, turn, expert, *facts))
    return columns


def _upper(
    shown: LayerRecord, columns: dict[int, list[_Cell]], shards: int, node_of_rank: np.ndarray, y: int
) -> tuple[list[str], int]:
    """The layer's panel from ``y`` down, and where it ends."""
    copies = [cell for column in columns.values() for cell in column if cell.expert >= 0]
    empty = len(copies) < sum(map(len, columns.values()))
    mean = sum(cell.tokens for cell in copies) / max(1, len(copies))
    columns, numbered, left_out = _chosen(columns)
    rows = max(map(len, columns.values()))
    height = max(12, min(18, 560 // rows)) if numbered else max(3, min(10, 300 // rows))
    what = "which expert each GPU holds" if shards == 1 else f"which expert every {shards} GPUs hold"
    heading = f"layer {shown.layer}: {what}; a column is a node{left_out}"
    words = f"tokens of the expert here, over the mean ({mean:,.0f}):"
    out = ['<g id="expert-heat-map-layer">', _text(LEFT, y, fitted(heading, _SIZE, _ROOM))]
    out += _scale(y + 20, words, _HEAT, _HEAT_TO, ("#ffffff", "no expert") if empty else None)
    top, pitch = y + 32, _pitch(len(columns))
    out += (_numbered if numbered else _bare)(columns, top, height, pitch, mean)
    out += _place_names(list(columns.values()), shards, node_of_rank, top, height)
    feet, y = _feet(columns, top + rows * height, pitch)
    return [*out, *feet, "</g>"], y


def _pitch(columns: int) -> float:
    """Width of a column."""
    return min(120.0, _ROOM / columns)


def _chosen(columns: dict[int, list[_Cell]]) -> tuple[dict[int, list[_Cell]], bool, str]:
    """The nodes that are drawn, whether their cells have room for numbers, and what is left out."""
    rows, nodes = max(map(len, columns.values())), len(columns)
    widest = max(text_width(str(cell.expert), _SMALL) for column in columns.values() for cell in column) + 5
    if rows <= _TALL and nodes * widest <= _ROOM and nodes * rows <= _NUMBERED:
        return columns, True, ""
    if nodes * _NARROW <= _ROOM and nodes * rows <= _BARE:
        return columns, False, "; no room for experts' numbers, the tooltips have the hottest"
    widest = max(widest, max(text_width(str(node), _SMALL, bold=True) for node in columns) + 6)
    room = min(_ROOM // widest, _NUMBERED // rows) if rows <= _TALL else min(_ROOM // _NARROW, _BARE // rows)
    full = sorted(columns, key=lambda node: (-_tokens(columns[node]), node))[: max(1, int(room))]
    words = f"; of {nodes:,} nodes the {len(full)} with most tokens, the others left out"
    return {node: columns[node] for node in full}, rows <= _TALL, words


def _tokens(column: Sequence[_Cell]) -> float:
    """Tokens that arrive at a node."""
    return sum(cell.tokens for cell in column)


def _fill(cell: _Cell, mean: float) -> str:
    return _HEAT[_level(cell.tokens, mean, _HEAT_TO)] if cell.expert >= 0 else "#ffffff"


def _numbered(columns: dict[int, list[_Cell]], top: int, height: int, pitch: float, mean: float) -> Iterator[str]:
    """Cells with the expert's number, and a tooltip each."""
    yield f'<g stroke="{_LINE}" stroke-width=".5" font-size="{_SMALL:g}" text-anchor="middle">'
    for number, (node, column) in enumerate(columns.items()):
        x, end = LEFT + round(number * pitch), LEFT + round((number + 1) * pitch)
        for row, cell in enumerate(column):
            y, fill = top + row * height, _fill(cell, mean)
            what = "no expert"
            if cell.expert >= 0:
                copies = f" (one of {cell.copies} copies)" if cell.copies > 1 else ""
                what = f"expert {cell.expert}{copies}: {cell.tokens:,.0f} tokens"
            yield f"<g><title>node {node}, GPU {cell.rank}, {what}</title>"
            yield f'<path fill="{fill}" d="M{x} {y}h{end - x - 1}v{height - 1}h{x + 1 - end}z"/>'
            if cell.expert >= 0:
                ink = ' fill="#fff"' if fill in _HEAT[_DARK:] else ""
                middle = f'x="{(x + end - 1) / 2:g}" y="{y + height / 2 + 3:g}"'
                yield f'<text stroke="none" {middle}{ink}>{cell.expert}</text>'
            yield "</g>"
    yield "</g>"


def _bare(columns: dict[int, list[_Cell]], top: int, height: int, pitch: float, mean: float) -> Iterator[str]:
    """Cells without numbers, one path per colour, and a tooltip per node."""
    lines: dict[str, str] = {}
    areas = []
    for number, (node, column) in enumerate(columns.items()):
        x, end = LEFT + round(number * pitch), LEFT + round((number + 1) * pitch)
        for row, cell in enumerate(column):
            fill = _fill(cell, mean)
            lines[fill] = lines.get(fill, "") + f"M{x} {top + row * height + (height - 1) / 2:g}h{end - x - 1}"
        hot = max(column, key=lambda cell: cell.tokens)
        most = f"; most, {hot.tokens:,.0f}, for expert {hot.expert} on GPU {hot.rank}" if hot.tokens else ""
        area = f'<path d="M{x} {top}h{end - x}v{height * len(column)}h{x - end}z">'
        areas.append(f"{area}<title>node {node}: {_tokens(column):,.0f} tokens{most}</title></path>")
    yield f'<g stroke-width="{height - 1}" shape-rendering="crispEdges">'
    yield from (f'<path stroke="{fill}" d="{line}"/>' for fill, line in sorted(lines.items()))
    yield '</g><g fill="none" pointer-events="all">'
    yield from areas
    yield "</g>"


def _place_names(
    columns: Sequence[Sequence[_Cell]], shards: int, node_of_rank: np.ndarray, top: int, height: int
) -> Iterator[str]:
    """``local 3 · turn 2`` at the left of the rows, where the same row is the same place in every node."""
    first = [[cell.rank - int(np.searchsorted(node_of_rank, node_of_rank[cell.rank])) for cell in c] for c in columns]
    longest = max(first, key=len)
    if any(places != longest[: len(places)] for places in first):
        return
    turns = [cell.turn for cell in max(columns, key=len)]
    for row in range(0, len(longest), ceil(13 / height)):
        name = f"local {numbers_text(range(longest[row], longest[row] + shards))}"
        name += f" · turn {turns[row] + 1}" if max(turns) else ""
        y = top + (row + 0.5) * height + 3
        yield _text(LEFT - 6, y, fitted(name, _SMALL, LEFT - 12), _SMALL, "end", fill="#444")


def _feet(columns: dict[int, list[_Cell]], y: int, pitch: float) -> tuple[list[str], int]:
    """Node numbers and their tokens under the columns (bars where numbers have no room), and where they end."""
    out = list(_column_names([str(node) for node in columns], y + 14, pitch))
    totals = [_tokens(column) for column in columns.values()]
    short = [f"{t / 1000:.0f}k" if t >= 9_950 else f"{t / 1000:.1f}k" for t in totals]
    forms = [f"{t:,.0f}" for t in totals], short, [f"{t / 1e6:.1f}M" for t in totals]
    fitting = [form for form in forms if max(text_width(t, _SMALL) for t in form) + 4 <= pitch]
    if fitting:
        middles = ((n + 0.5) * pitch + LEFT for n in range(len(totals)))
        out += [_text(x, y + 28, t, _SMALL, "middle") for x, t in zip(middles, fitting[0], strict=True)]
        return [*out, _text(LEFT - 6, y + 28, "tokens", _SMALL, "end", fill="#444")], y + 32
    bars = ""
    for n, total in enumerate(totals):
        size = round(24 * total / max(1.0, *totals), 1)
        bars += f"M{LEFT + round(n * pitch)} {y + 46:g}v{-size:g}h{max(1, int(pitch) - 1)}v{size:g}z"
    out.append(f'<path fill="{_LINE}" d="{bars}"/>')
    out.append(_text(LEFT - 6, y + 36, f"up to {max(totals):,.0f}", _SMALL, "end", fill="#444"))
    return [*out, _text(LEFT - 6, y + 47, "tokens", _SMALL, "end", fill="#444")], y + 50


def _column_names(names: Sequence[str], y: float, pitch: float) -> Iterator[str]:
    """Node numbers below columns, as many as have room."""
    yield _text(LEFT - 6, y, "node", _SMALL, "end", fill="#444")
    step = ceil((max(text_width(name, _SMALL, bold=True) for name in names) + 6) / pitch)
    for number in range(0, len(names), step):
        yield _text(LEFT + (number + 0.5) * pitch, y, names[number], _SMALL, "middle", bold=True)


def _lower(
    certificate: Certificate, placement: Placement, node_of_rank: np.ndarray, shown: int, y: int
) -> tuple[list[str], int]:
    """Layers × nodes from ``y`` down, and where it ends."""
    layers, nodes = certificate.layers, decode_numbers(certificate.nodes)
    size = ceil(len(nodes) / min(_ROOM // _NARROW, max(1, _LAYERED // len(layers))))
    starts = range(0, len(nodes), size)
    names = [named("node", nodes[s : s + size].tolist()) for s in starts]
    rows, pitch = max(4, min(18, 420 // len(layers))), _pitch(len(starts))
    each = (
        "a column is a node" if size == 1 else f"a column is the mean of {size} nodes (at the end it may be of fewer)"
    )
    out = [
        '<g id="expert-heat-map-layers">',
        _text(LEFT, y, f"all MoE layers: tokens that arrive at each node; {each}"),
    ]
    other = (_NONE, "other stages' nodes") if placement.par.pp > 1 else None
    out += _scale(y + 20, "over the layer's mean:", _RATIO, _RATIO_TO, other)
    y += 32
    right, end = LEFT + round(len(starts) * pitch), y + rows * len(layers)
    for number, record in enumerate(layers):
        stage = placement.par.stage_ranks(placement.par.stage_of_layer(record.layer))[0]
        means = _means(decode_numbers(record.node_tokens), np.isin(nodes, node_of_rank[stage]), size)
        out += _row(record.layer, names, means, (y + number * rows, rows, pitch), len(layers) * len(starts) <= _TOLD)
    out.append(f'<path fill="none" stroke="{_LINE}" d="M{LEFT} {y}H{right}V{end}H{LEFT}z"/>')
    marked = next(number for number, record in enumerate(layers) if record.layer == shown)
    middle = y + (marked + 0.5) * rows
    out.append(f'<path d="M{right + 3} {middle:g}l8 -4v8z"><title>layer {shown}, shown above</title></path>')
    step = ceil(13 / rows)
    for number in range(marked % step, len(layers), step):
        words, bold = f"layer {layers[number].layer}", number == marked
        out.append(_text(LEFT - 6, y + (number + 0.5) * rows + 4, words, _SMALL, "end", bold=bold))
    out += _column_names([str(nodes[s]) for s in starts], end + 14, pitch)
    return [*out, "</g>"], end + 26


def _means(tokens: np.ndarray, inside: np.ndarray, size: int) -> np.ndarray:
    """Tokens of the nodes in each column and their ratio to the mean of all, float [columns, 2]; nodes that are not
    ``inside`` the layer's stage do not count, and a column of none of them is NaN."""
    starts = np.arange(0, len(tokens), size)
    counts = np.add.reduceat(inside.astype(int), starts)
    held = np.where(inside, tokens, 0)
    means = np.where(counts > 0, np.add.reduceat(held, starts) / np.maximum(counts, 1), np.nan)
    mean = held.sum() / max(1, int(inside.sum()))
    return np.stack([means, means / mean if mean else np.where(counts > 0, 1.0, np.nan)], axis=1)


def _row(
    layer: int, names: Sequence[str], means: np.ndarray, place: tuple[int, int, float], told: bool
) -> Iterator[str]:
    """One layer as lines as thick as the row. ``means``: see `_means`; ``place``: y, height, pitch of columns; ``told``:
    a tooltip per cell, else one for the row."""
    y, height, pitch = place
    ratios = means[:, 1]
    most, least = int(np.nanargmax(ratios)), int(np.nanargmin(ratios))
    yield f'<g stroke-width="{height}" shape-rendering="crispEdges">'
    if not told:
        words = (
            f"most at {names[most]}, {ratios[most]:.2f} times the mean; least at {names[least]}, {ratios[least]:.2f}"
        )
        yield f"<title>layer {layer}: {words}</title>"
    lines: dict[str, str] = {}
    ends: dict[str, int] = {}
    for number, (tokens, ratio) in enumerate(means.tolist()):
        x, end = round(number * pitch), round((number + 1) * pitch)
        fill = _NONE if np.isnan(ratio) else _RATIO[_level(ratio, 1.0, _RATIO_TO)]
        start = f"M{LEFT} {y + height / 2:g}"
        if told and not np.isnan(ratio):
            words = f"layer {layer}, {names[number]}: {tokens:,.0f} tokens, {ratio:.2f} times the mean"
            yield f'<path stroke="{fill}" d="M{LEFT + x} {y + height / 2:g}h{end - x}"><title>{words}</title></path>'
        else:  # relative moves: a figure of many columns has thousands of cells
            gap = x - ends.get(fill, 0)
            lines[fill] = lines.get(fill, start) + (f"m{gap} 0" if gap else "") + f"h{end - x}"
            ends[fill] = end
    yield from (f'<path stroke="{fill}" d="{line}"/>' for fill, line in lines.items())
    yield "</g>"


def _level(value: float, mean: float, bounds: Sequence[float]) -> int:
    """Index of the colour for ``value``: the first of ``bounds`` that it stays below, as a multiple of the mean."""
    return int(np.searchsorted(bounds, value / mean if mean else 1.0, side="right"))


def _scale(
    y: float, words: str, colours: Sequence[str], bounds: Sequence[float], other: tuple[str, str] | None
) -> Iterator[str]:
    """The colour scale in a line, after ``words``; ``other``: a fill and words for what has no value."""
    yield _text(LEFT, y, words, 11)
    x = LEFT + text_width(words, 11) + 10
    names = [
        f"0–{bounds[0]:g}",
        *(f"{a:g}–{b:g}" for a, b in pairwise(bounds)),
        f"over {bounds[-1]:g}",
    ]
    for fill, name in (*zip(colours, names, strict=True), *([other] if other else [])):
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="14" height="12" fill="{fill}" stroke="{_LINE}" stroke-width=".5"/>'
        yield _text(x + 18, y, name, 11)
        x += 18 + text_width(name, 11) + 12


# --- link loads -------------------------------------------------------------------------------------------------------


def link_bars_svg(certificate: Certificate) -> str:
    """Upper panel: the busiest and the mean link of each kind beside identity placement (dispatch, mean over layers). Lower
    panel: the busiest link of every MoE layer (dispatch and combine) beside identity placement and the bound."""
    copy = "one copy of a token to each node" if certificate.transfer == "dedup" else "one copy to each expert"
    title = f"Link loads · {certificate.tokens:,.0f} tokens of an EP group, {copy}"
    if not certificate.kinds:
        words = "No link times: the traffic is loads of experts, without the tokens that would take the links."
        return _svg("link-bars", title, 60, [_text(12, 44, words, fill="#444")])
    kinds, y = _kind_bars(certificate.kinds, 48)
    layers, height = _layer_bars(certificate.layers, y + 30)
    return _svg("link-bars", title, height, [*kinds, *layers])


def _kind_bars(kinds: Sequence[KindRecord], y: int) -> tuple[list[str], int]:
    """Two bars per kind from ``y`` down, and where they end."""
    keys = (("fill", "this placement"), ("outline", "identity placement"), ("mean", "mean link with this placement"))
    out = [_text(LEFT, y, "busiest link of each kind in dispatch, mean over layers"), *_keys(y + 20, keys)]
    longest = max(max(row.busiest_seconds, row.identity_seconds) for row in kinds) or 1.0
    room = _ROOM - max(text_width(_said(row), 11) for row in kinds) - 8
    for number, row in enumerate(kinds):
        top, name = y + 36 + 44 * number, row.kind.replace("_", " ")
        ours, plain, mean = (room * s / longest for s in (row.busiest_seconds, row.identity_seconds, row.mean_seconds))
        out += [
            f'<g id="link-bars-{row.kind}"><title>{name}: busiest {_said(row)}; with identity placement '
            f"{format_seconds(row.identity_seconds)}</title>",
            _text(LEFT - 8, top + 12, name, anchor="end"),
            _text(LEFT - 8, top + 27, f"{row.links:,} link{'s' if row.links != 1 else ''}", _SMALL, "end", fill="#444"),
            f'<rect x="{LEFT}" y="{top}" width="{max(1.0, ours):.1f}" height="15" fill="{_OURS}"/>',
            _text(LEFT + ours + 6, top + 12, _said(row), 11),
            f'<rect x="{LEFT + 0.5}" y="{top + 17.5}" width="{max(1.0, plain - 1):.1f}" height="14" fill="none" stroke="#111"/>',
            _text(LEFT + plain + 6, top + 29, f"{format_seconds(row.identity_seconds)}", 11),
            f"{_tick(LEFT + mean, top - 2, 19)}</g>",
        ]
    return out, y + 36 + 44 * len(kinds)


def _said(row: KindRecord) -> str:
    return f"{format_seconds(row.busiest_seconds)}, mean {format_seconds(row.mean_seconds)}"


def _layer_bars(layers: Sequence[LayerRecord], y: int) -> tuple[list[str], int]:
    """A bar per MoE layer from ``y`` down, and where they end."""
    keys = (("fill", "this placement"), ("outline", "identity placement"), ("bound", "no placement is below"))
    out = [
        '<g id="link-bars-layers">',
        _text(LEFT, y, "every MoE layer: its busiest link in dispatch and in combine, added"),
    ]
    out += _keys(y + 20, keys)
    step, steps = _axis(max(max(row.seconds, row.identity_seconds) for row in layers) or 1e-6)
    top, size = y + 44, 150
    for mark in range(steps + 1):
        level = top + size - size * mark / steps
        out.append(f'<path stroke="#ddd" d="M{LEFT} {level:.1f}H{WIDTH - RIGHT}"/>')
        out.append(_text(LEFT - 8, level + 4, format_seconds(mark * step), 11, "end"))
    pitch = min(60.0, _ROOM / len(layers))
    width = max(1.0, 0.7 * pitch)
    for number, row in enumerate(layers):
        x = LEFT + (number + 0.5) * pitch - width / 2
        ours, plain, bound = (size * s / (step * steps) for s in (row.seconds, row.identity_seconds, row.bound_seconds))
        end = top + size
        out += [
            f'<g id="link-bars-layer-{row.layer}"><title>layer {row.layer}: {format_seconds(row.seconds)}, identity placement '
            f"{format_seconds(row.identity_seconds)}, bound {format_seconds(row.bound_seconds)}; busiest in dispatch: "
            f"{xml_escape(row.busiest.replace('_', ' '))}</title>",
            f'<rect x="{x:.1f}" y="{end - ours:.1f}" width="{width:.1f}" height="{ours:.1f}" fill="{_OURS}"/>',
            f'<rect x="{x:.1f}" y="{end - plain:.1f}" width="{width:.1f}" height="{plain:.1f}" fill="none" stroke="#111"/>',
            f'<path stroke="{_BOUND}" stroke-width="2.5" d="M{x - 1:.1f} {end - bound:.1f}h{width + 2:.1f}"/></g>',
        ]
    every = ceil((max(text_width(str(row.layer), _SMALL) for row in layers) + 6) / pitch)
    for number in range(0, len(layers), every):
        out.append(_text(LEFT + (number + 0.5) * pitch, top + size + 14, str(layers[number].layer), _SMALL, "middle"))
    out.append(_text(LEFT - 8, top + size + 18, "layer", 11, "end"))
    return [*out, "</g>"], top + size + 28


def _axis(longest: float) -> tuple[float, int]:
    """A round step and how many of them reach ``longest``: at most five."""
    step = round_step(longest / 5)
    return step, ceil(longest / step - 1e-9)


def _keys(y: int, keys: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What bars and ticks mean, in a line."""
    x = float(LEFT)
    for sort, words in keys:
        if sort in ("fill", "outline"):
            look = f'fill="{_OURS}"' if sort == "fill" else 'fill="none" stroke="#111"'
            yield f'<rect x="{x + 0.5:.1f}" y="{y - 9.5}" width="14" height="10" {look}/>'
        elif sort == "mean":
            yield _tick(x + 8, y - 11, 13)
        else:
            yield f'<path stroke="{_BOUND}" stroke-width="2.5" d="M{x:.1f} {y - 4}h15"/>'
        yield _text(x + 20, y, words, 11)
        x += 20 + text_width(words, 11) + 20


def _tick(x: float, y: float, height: int) -> str:
    """An upright mark that shows on a bar and beside it."""
    line = f'd="M{x:.1f} {y}v{height}"'
    return f'<path stroke="#fff" stroke-width="5" {line}/><path stroke="#111" stroke-width="2.5" {line}/>'


# --- both -------------------------------------------------------------------------------------------------------------


def _svg(id: str, title: str, height: int, body: Iterable[str]) -> str:
    """A figure with its title."""
    name = xml_escape(title)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" id="{id}" '
        f'role="img" aria-label="{name}" font-family="{xml_escape(FONT)}" font-size="{_SIZE:g}" style="font-kerning:none">'
    )
    white = f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    heading = f'<text x="12" y="22" font-size="14" font-weight="bold">{xml_escape(fitted(title, 14, WIDTH - 24, bold=True))}</text>'
    return "\n".join([head, f"<title>{name}</title>", white, heading, *body, "</svg>", ""])
