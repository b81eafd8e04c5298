"""The timeline figure: where the step's time goes, the whole step on a few ranks, and one layer op by op. 1,000 px wide, for
the plan document. Sizes do not grow with the cluster: ranks are chosen by role, and ops too narrow to see are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor

import numpy as np

from planc.cost.step import CLASSES
from planc.render.chart import NAME, WIDTH, figure, round_step, seconds_text, text_at, time_unit
from planc.render.style import DASH
from planc.render.text import text_width, wrapped, xml_escape
from planc.render.timeline_lanes import LOOK, Lane, Row, chosen_rows, classes_of, lanes_of, on_path, strips
from planc.render.timeline_layer import GREY, LEFT, PATH, RIGHT, Layer, chosen_layer, layer_panel
from planc.schedule import Timeline

_ROOM = WIDTH - LEFT - RIGHT
_STRIPS = 7000  #: strips of the overview at most: about 100 kB
_ABREAST = 8  #: rows of a lane at most, one per micro-batch
_HEIGHTS = {1: 18, 2: 12, 3: 8, 4: 7}  #: px of a micro-batch's row by their number


def timeline_svg(timeline: Timeline) -> str:
    """The simulated step: a bar of its critical path by class of op; what the streams of representative ranks do over the
    whole step; and every op of one layer, the one in the middle of the critical path (an MoE layer where there is one).
    The critical path is marked in both, so it needs no figure of its own."""
    rows, kinds = chosen_rows(timeline), classes_of(timeline)
    layer = chosen_layer(timeline)
    ranks = sorted({row.rank for row in rows} | set(layer.ranks if layer else ()))
    lanes = lanes_of(timeline, ranks)
    slot, drawn = _drawn(timeline, [lane for row in rows for lane in lanes[row.rank]], kinds)
    plan = timeline.plan
    title = f"Timeline of a {plan.spec.workload.phase} step · {plan.spec.name} · {seconds_text(timeline.step)}"
    caption = _caption(timeline, slot)
    lines = wrapped(caption, 12, WIDTH - 24)
    body = [text_at(12, 42 + 16 * i, line, fill="#444") for i, line in enumerate(lines)]
    shown = {int(kinds[n]) for members in lanes.values() for lane in members for n in np.unique(lane.block)}
    part, y = _path_bar(timeline, [CLASSES[n] for n in sorted(shown)], 46 + 16 * len(lines))
    body += part
    part, y = _overview(timeline, rows, lanes, drawn, layer, y + 28)
    body += part
    if layer is not None:
        part, y = layer_panel(timeline, layer, lanes, kinds, y + 30)
        body += part
    return figure("timeline", title, round(y + 6), body, caption)


def _caption(timeline: Timeline, slot: float) -> str:
    low, high = timeline.interval
    words = (
        f"Simulated from the price of every op: 90 % interval {seconds_text(low)} to {seconds_text(high)}, floor "
        f"{seconds_text(timeline.floor)}."
    )
    if abs(timeline.period - timeline.step) > 1e-4 * timeline.step:
        words += f" Where steps follow each other, one takes {seconds_text(timeline.period)}."
    words += " Grey: the stream is idle. Black line: the critical path."
    return words + (f" Over the whole step, {slot:g} px are gathered by class." if slot > 1 else "")


# --- the critical path by class -----------------------------------------------------------------------------------------


def _path_bar(timeline: Timeline, shown: Sequence[str], y: float) -> tuple[list[str], float]:
    """A bar as long as the step, and what its parts and all colours mean; from ``y`` down, and where it ends."""
    seconds, whole = timeline.path_by_class, timeline.step
    out = ['<g id="timeline-path">', text_at(12, y + 12, "The critical path by class of op", bold=True)]
    x, top = 12.0, y + 20
    for name, own in seconds.items():
        words, fill, stroke = LOOK[name]
        width, share = (WIDTH - 24) * own / whole, _percent(own / whole)
        shape = _box(x, top, width, 26, fill, stroke)
        said = f"{words}: {seconds_text(own)}, {share} of the step"
        out.append(f'<g id="timeline-path-{name}"{_kind(stroke)}><title>{xml_escape(said)}</title>{shape}')
        label = next((t for t in (f"{words} {share}", share) if text_width(t, NAME) + 10 <= width), "")
        out.append((text_at(x + width / 2, top + 17, label, NAME, "middle") if label else "") + "</g>")
        x += width
    entries = [name for name in CLASSES if name in shown or name in seconds]
    columns = 5
    for number, name in enumerate(entries):
        words, fill, stroke = LOOK[name]
        x, at = 12 + (WIDTH - 24) / columns * (number % columns), top + 38 + 32 * (number // columns)
        share = "not on the path"
        if name in seconds:
            share = f"{seconds_text(seconds[name])} · {_percent(seconds[name] / whole)}"
        out.append(f"<g{_kind(stroke)}>{_box(x, at, 16, 12, fill, stroke)}{text_at(x + 22, at + 10, words, NAME)}")
        out.append(f"{text_at(x + 22, at + 24, share, NAME, fill='#444')}</g>")
    return [*out, "</g>"], top + 38 + 32 * -(-len(entries) // columns)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "below 0.1 %"


def _kind(stroke: str) -> str:
    return ' class="communication"' if stroke else ""


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    """A filled box; communication has a dashed outline, inside its area."""
    line = (
        f'stroke="{stroke}" stroke-width="1.4" stroke-dasharray="{DASH}"'
        if stroke
        else 'stroke="#555" stroke-width=".7"'
    )
    if width < 4:
        line = ""  # an outline would hide what it is around
    inset = min(0.7, width / 4) if line else 0.0
    return (
        f'<rect x="{x + inset:.2f}" y="{y + inset:g}" width="{width - 2 * inset:.2f}" height="{height - 2 * inset:g}" '
        f'fill="{fill}" {line}/>'
    )


# --- the whole step -----------------------------------------------------------------------------------------------------

Strips = Mapping[tuple[int, bool, int], Mapping[tuple[int, int], list[tuple[float, float]]]]


def _drawn(timeline: Timeline, lanes: Sequence[Lane], kinds: np.ndarray) -> tuple[float, Strips]:
    """Width of the slots in which ops are gathered, the narrowest of which the figure stays small; and (rank, far, stream)
    -> (row, class) -> (start, end) of the strips, px."""
    micro = np.array([block.micro_batch for block in timeline.plan.blocks.blocks])
    rows = min(_ABREAST, int(micro.max()) + 1)
    scale, slot = _ROOM / timeline.step, 1.0
    while True:
        out: dict[tuple[int, bool, int], dict[tuple[int, int], list[tuple[float, float]]]] = {}
        count = 0
        for lane in lanes:
            own = out.setdefault((lane.rank, lane.far, lane.stream), {})
            for row in range(rows):
                at = micro[lane.block] % rows == row
                for kind, start, end in strips(
                    lane.start[at] * scale, lane.end[at] * scale, kinds[lane.block[at]], slot
                ):
                    own.setdefault((row, kind), []).append((start, end))
                    count += 1
        if count <= _STRIPS or slot >= 16:
            return slot, out
        slot *= 2


def _overview(
    timeline: Timeline,
    rows: Sequence[Row],
    lanes: Mapping[int, Sequence[Lane]],
    drawn: Strips,
    layer: Layer | None,
    y: float,
) -> tuple[list[str], float]:
    """The streams of the chosen ranks over the step from ``y`` down, and where it ends."""
    micro = timeline.plan.spec.workload.micro_batches
    abreast = min(_ABREAST, micro)
    height = _HEIGHTS.get(abreast, 5) * abreast
    heading = "The whole step on representative GPUs"
    if abreast > 2:
        heading += (
            f" · in a lane, micro-batches {'' if micro == abreast else 'modulo 8, '}0–{abreast - 1} from top to bottom"
        )
    out = ['<g id="timeline-step">', text_at(12, y + 12, heading, bold=True)]
    top = y + 40 if layer else y + 24
    out.append(text_at(WIDTH - 12, top + 12, "busy", NAME, "end"))
    at, tracks = top, []
    for row in rows:
        tracks.append((row, at))
        at += 18 + len(lanes[row.rank]) * (height + 8) + 6
    end = at - 8
    out += _grid(timeline.step, top - 2, end)
    if layer is not None:
        out += _place(timeline, layer, y + 32, top - 2, end)
    step = timeline.step
    for row, start in tracks:
        out += _row(timeline, step, row, lanes[row.rank], drawn, start, height, abreast)
    return [*out, "</g>"], end + 18


def _grid(step: float, top: float, end: float) -> Iterator[str]:
    """Upright lines with times below."""
    unit, factor = time_unit(step)
    width = round_step(step / factor / 9)
    ticks = [n * width for n in range(floor(step / factor / width + 1e-9) + 1)]
    lines = "".join(f"M{LEFT + _ROOM * t * factor / step:.1f} {top:g}V{end:g}" for t in ticks)
    yield f'<path stroke="#ddd" d="{lines}"/>'
    for tick in ticks:
        yield text_at(LEFT + _ROOM * tick * factor / step, end + 14, f"{tick:g}", NAME, "middle")
    yield text_at(LEFT - 14, end + 14, f"time, {unit}", NAME, "end")


def _place(timeline: Timeline, layer: Layer, y: float, top: float, end: float) -> Iterator[str]:
    """Where in the step the layer below is."""
    left, right = (LEFT + _ROOM * t / timeline.step for t in (layer.start, layer.end))
    words = f"{layer.name}, drawn below"
    middle = min((left + right) / 2, WIDTH - 12 - text_width(words, NAME) / 2)
    yield f'<rect id="timeline-step-layer" x="{left:.1f}" y="{top:g}" width="{right - left:.1f}" height="{end - top:g}" '
    yield 'fill="#ffedb0"/>'
    yield f'<path fill="none" stroke="{PATH}" d="M{left:.1f} {top + 4:g}v-5H{right:.1f}v5"/>'
    yield text_at(middle, y, words, NAME, "middle")


def _row(
    timeline: Timeline,
    step: float,
    row: Row,
    lanes: Sequence[Lane],
    drawn: Strips,
    y: float,
    height: float,
    abreast: int,
) -> Iterator[str]:
    """One rank: its name, its streams, and between them the line where it is on the critical path."""
    name = f"GPU {row.rank}"
    wide = text_width(name, NAME, bold=True)
    yield text_at(LEFT, y + 12, name, NAME, bold=True) + text_at(LEFT + wide + 10, y + 12, row.words, NAME, fill="#444")
    scale = _ROOM / step
    near = sum(not lane.far for lane in lanes)
    for number, lane in enumerate(lanes):
        top = y + 18 + number * (height + 8)
        kind = "communication" if lane.far else "compute"
        many = (len(lanes) - near if lane.far else near) > 1
        yield f'<g id="timeline-step-gpu-{row.rank}-{kind}-{lane.stream}" class="{kind}">'
        yield f'<rect x="{LEFT}" y="{top:g}" width="{_ROOM}" height="{height}" fill="{GREY}"/>'
        own = drawn[lane.rank, lane.far, lane.stream]
        size = height / abreast
        yield f'<g fill="none" stroke-width="{size if abreast == 1 else size - 1:g}">'
        for (part, number_of_class), pieces in sorted(own.items()):
            name, line = CLASSES[number_of_class], _strokes(pieces, top + (part + 0.5) * size)
            yield f'<path class="{name}" stroke="{LOOK[name][1]}" d="{line}"/>'
        yield "</g>"
        if abreast == 2:
            yield from (text_at(LEFT - 4, top + 10 + 12 * m, f"m{m}", NAME, "end", fill="#444") for m in range(2))
        label = kind + (f" {lane.stream + 1}" if many else "")
        room = LEFT - (26 if abreast == 2 else 6)
        yield text_at(room, top + height / 2 + 4, label, NAME, "end")
        busy = float((lane.end - lane.start).sum()) / step
        yield text_at(WIDTH - 12, top + height / 2 + 4, f"{100 * busy:.1f} %", NAME, "end") + "</g>"
    pieces = [(LEFT + start * scale, LEFT + end * scale) for _, start, end in on_path(timeline, row.rank)]
    if pieces:
        level = y + 18 + near * (height + 8) - 4
        merged = _merged(pieces, 0.4)
        strokes = "".join(f"M{a:.1f} {level:g}H{max(b, a + 0.4):.1f}" for a, b in merged)
        yield f'<path class="path" fill="none" stroke="{PATH}" stroke-width="2.5" d="{strokes}"/>'


def _strokes(pieces: Sequence[tuple[float, float]], y: float) -> str:
    """Level strokes with relative moves between rounded places, so that rounding does not add up."""
    out, pen = f"M{LEFT} {y:g}", 0
    for start, end in pieces:
        a, b = round(100 * start), round(100 * end)
        if b > a:
            out += (f"m{(a - pen) / 100:g} 0" if a != pen else "") + f"h{(b - a) / 100:g}"
            pen = b
    return out


def _merged(pieces: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Intervals in their order, those less than ``gap`` apart made one."""
    out: list[tuple[float, float]] = []
    for start, end in pieces:
        if out and start - out[-1][1] < gap:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out
