"""One layer of the timeline figure, op by op: bars with names and durations on the streams of a few ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np

from planc.cost.step import CLASSES
from planc.graph import OpBlock
from planc.render.chart import NAME, WIDTH, round_step, seconds_text, text_at, time_unit
from planc.render.style import DASH
from planc.render.text import text_width, xml_escape
from planc.render.timeline_lanes import LOOK, SAME, Lane, busy_by_rank, on_path
from planc.schedule import Timeline
from planc.schedule.order import takes_time

LEFT, RIGHT = 124, 64
GREY, PATH = "#f0f0f0", "#111"
_ROOM = WIDTH - LEFT - RIGHT
_AFTER = 110  #: px after the layer's end, where what comes next begins: labels of its last ops have room there
_HIGH, _LINE, _GAP = 32, 14, 12  #: px of a bar, of a line of names beside its lane, and between lanes
_LABELS = 9  #: lines of labels beside a lane at most
_RANKS = 3
_SLANT = 9  #: px from the middle of the mark where time is cut to what is beside it
_LONG, _CUT = (
    0.4,
    0.16,
)  #: time in which nothing begins or ends is cut when it is more of the layer than this; width left
_NAMES = {
    "attn_qkv": "QKV",
    "attn_core": "attention",
    "attn_out": "output projection",
    "residual_add": "add",
    "dense_up": "MLP up",
    "dense_down": "MLP down",
    "lm_head": "LM head",
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "pp_send": "send",
}


@dataclass(frozen=True)
class Layer:
    """The layer that is drawn: one micro-batch of it, on ``ranks`` (the one on the critical path first)."""

    number: int
    micro_batch: int
    ranks: tuple[int, ...]
    start: float
    end: float
    name: str


class _Bar(NamedTuple):
    """An op on a lane: px, its text, its block and seconds; ``own``: of the layer that is drawn."""

    left: float
    right: float
    words: str
    block: int
    start: float
    end: float
    own: bool


class _Time(NamedTuple):
    """Where times are drawn. ``cut``: the stretch of time that is drawn shorter than the rest; ``mark``: px of its mark."""

    place: Callable[[float], float]
    cut: tuple[float, float] | None = None
    mark: float = -1.0

    def widest(self, left: float, right: float) -> tuple[float, float]:
        """Of the stretch from ``left`` to ``right`` px what is free of the mark: the larger part."""
        if not left < self.mark < right:
            return left, right
        before, after = (left, self.mark - _SLANT), (self.mark + _SLANT, right)
        return max(before, after, key=lambda part: part[1] - part[0])


def chosen_layer(timeline: Timeline) -> Layer | None:
    """The layer in the middle of the critical path, an MoE layer where there is one, with the ranks that show it."""
    blocks = timeline.plan.blocks.blocks
    moe = {block.layer for block in blocks if block.kind == "dispatch"} - {None}
    path = [s for s in timeline.critical_path if blocks[s.block].layer is not None and takes_time(blocks[s.block])]
    path = [s for s in path if blocks[s.block].layer in moe] or path
    if not path:
        return None
    whole = timeline.step
    middle = min(path, key=lambda s: abs(s.start + s.end - whole))
    number, micro = blocks[middle.block].layer, blocks[middle.block].micro_batch
    assert number is not None
    local = [s for s in path if blocks[s.block].layer == number and blocks[s.block].ranks.shape[1] == 1]
    first = min(local or [middle], key=lambda s: abs(s.start + s.end - whole))
    ranks = _ranks(timeline, int(blocks[first.block].ranks[first.op, 0]), number)
    begins, ends = [], []
    for n, block in enumerate(blocks):
        if block.layer == number and block.micro_batch == micro and takes_time(block):
            here = np.nonzero(block.ranks == ranks[0])[0]
            begins += timeline.run.start[n][here].tolist()
            ends += timeline.run.end[n][here].tolist()
    many = timeline.plan.spec.workload.micro_batches > 1
    name = f"layer {number}" + (f" of micro-batch {micro}" if many else "")
    return Layer(number, micro, tuple(ranks), min(begins), max(ends), name)


def _ranks(timeline: Timeline, first: int, layer: int) -> list[int]:
    """``first``, and of the ranks of its stage those that are busy most and least, where they are not busy alike."""
    par = timeline.plan.parallelism
    near = SAME * timeline.step
    busy = [np.round(t / near) for t in busy_by_rank(timeline)]
    members = np.unique(par.stage_ranks(par.stage_of_layer(layer)))
    out = [first]
    for rank in (int(members[pick(busy[0][members])]) for pick in (np.argmax, np.argmin)):
        if all(any(b[rank] != b[other] for b in busy) for other in out):
            out.append(rank)
    return out[:_RANKS]


def layer_panel(
    timeline: Timeline, layer: Layer, lanes: Mapping[int, Sequence[Lane]], kinds: np.ndarray, y: float
) -> tuple[list[str], float]:
    """The layer from ``y`` down, and where it ends."""
    time = _time(layer, [lane for rank in layer.ranks for lane in lanes[rank]])
    words = f"{layer.name.capitalize()}, op by op"
    wide = text_width(words, 12, bold=True)
    more = f"from {seconds_text(layer.start)} on, {seconds_text(layer.end - layer.start)} long"
    many = timeline.plan.spec.workload.micro_batches > 1
    more += " · pale: other layers" + (" or micro-batches (m)" if many else "")
    more += f" · //: {seconds_text(time.cut[1] - time.cut[0])} are drawn shorter" if time.cut else ""
    head = [text_at(12, y + 12, words, bold=True), text_at(12 + wide + 12, y + 12, more, fill="#444")]
    body: list[str] = []
    top = at = y + 26
    missing = 0
    for rank in layer.ranks:
        tracks: list[tuple[Lane, float]] = []
        for number, lane in enumerate(lanes[rank]):
            bars = _bars(timeline, layer, lane, time)
            labels, lacking = _labels(bars, time)
            missing += lacking
            lines = 1 + max((line for _, line in labels), default=-1)
            at += 0 if lane.far else lines * _LINE
            if not number:
                at += 0 if lines else _LINE
                body.append(text_at(12, at - 4, f"GPU {rank}", NAME, bold=True))
            body += _lane(timeline, layer, lane, bars, labels, kinds, at, time, len(lanes[rank]) > 2)
            tracks.append((lane, at))
            at += _HIGH + _GAP + (lines * _LINE if lane.far else 0)
        body += _path(timeline, rank, tracks, time)
        at += 6
    end = at - _GAP
    out = ['<g id="timeline-layer">', *head, *_axis(layer, time, top, end), *body]
    if missing:
        out.append(text_at(LEFT, end + 32, f"No room for names of the shortest ops: {missing}.", NAME, fill="#444"))
    return [*out, "</g>"], end + (38 if missing else 20)


# --- time -----------------------------------------------------------------------------------------------------------------


def _time(layer: Layer, lanes: Sequence[Lane]) -> _Time:
    """Seconds to px. Time in which nothing begins or ends on the lanes is drawn shorter where it would leave little room for
    all else."""
    marks = np.concatenate([lane.start for lane in lanes] + [lane.end for lane in lanes])
    inside = marks[(marks > layer.start) & (marks < layer.end)]
    marks = np.unique(np.concatenate([inside, [layer.start, layer.end]]))
    gaps, span, room = np.diff(marks), layer.end - layer.start, float(_ROOM - _AFTER)
    longest = int(np.argmax(gaps))
    if gaps[longest] <= _LONG * span or len(gaps) == 1:
        return _Time(lambda t: LEFT + room * (t - layer.start) / span)
    cut, rate = (float(marks[longest]), float(marks[longest + 1])), room * (1 - _CUT) / (span - float(gaps[longest]))
    first = LEFT + rate * (cut[0] - layer.start)
    last = first + room * _CUT

    def place(t: float) -> float:
        if t <= cut[0]:
            return LEFT + rate * (t - layer.start)
        if t >= cut[1]:
            return last + rate * (t - cut[1])
        return first + (last - first) * (t - cut[0]) / (cut[1] - cut[0])

    return _Time(place, cut, last - 2 * _SLANT)


def _axis(layer: Layer, time: _Time, top: float, end: float) -> Iterator[str]:
    """Upright lines with times since the layer's start below; none where time is cut."""
    span = layer.end - layer.start
    unit, factor = time_unit(span)
    rate = time.place(layer.end + span) - time.place(layer.end)  # px of as long as the layer is
    step = round_step(64 * span / factor / rate)
    places: list[tuple[float, float]] = []
    for n in range(ceil(2 * span / factor / step) + 1):
        at = layer.start + n * step * factor
        x = time.place(at)
        hidden = time.cut is not None and time.cut[0] < at < time.cut[1]
        if not hidden and x <= WIDTH - RIGHT and (not places or x - places[-1][0] >= 40):
            places.append((x, round(n * step, 6)))
    lines = "".join(f"M{x:.1f} {top:g}V{end:g}" for x, _ in places)
    yield f'<path stroke="#ddd" d="{lines}"/>'
    yield from (text_at(x, end + 14, f"{t:g}", NAME, "middle") for x, t in places)
    yield text_at(LEFT - 14, end + 14, f"from its start, {unit}", NAME, "end")


# --- bars and their names -------------------------------------------------------------------------------------------------


def _bars(timeline: Timeline, layer: Layer, lane: Lane, time: _Time) -> list[_Bar]:
    """Ops of a lane as far as they can be seen."""
    blocks, many = timeline.plan.blocks.blocks, timeline.plan.spec.workload.micro_batches > 1
    out = []
    for number, start, end in zip(lane.block.tolist(), lane.start.tolist(), lane.end.tolist(), strict=True):
        left, right = max(time.place(start), LEFT), min(time.place(end), WIDTH - RIGHT)
        if right - left > 0.05:
            block = blocks[number]
            own = block.layer == layer.number and block.micro_batch == layer.micro_batch
            words = _name(timeline, block) if own or not many else f"m{block.micro_batch} {_name(timeline, block)}"
            out.append(_Bar(left, right, words, number, start, end, own))
    return out


def _name(timeline: Timeline, block: OpBlock) -> str:
    if block.kind == "expert":
        turns = max(b.slot for b in timeline.plan.blocks.blocks if b.layer == block.layer)
        return f"expert {block.slot + 1}" if turns else "experts"
    return _NAMES.get(block.kind, block.kind.replace("_", " "))


def _fits(bar: _Bar, time: _Time) -> bool:
    left, right = time.widest(bar.left, bar.right)
    return max(text_width(words, NAME) for words in (bar.words, seconds_text(bar.end - bar.start))) + 8 <= right - left


def _beside(bar: _Bar) -> str:
    return f"{bar.words} {seconds_text(bar.end - bar.start)}"


def _labels(bars: Sequence[_Bar], time: _Time) -> tuple[list[tuple[_Bar, int]], int]:
    """Bars too narrow for their names, with the line beside the lane (0 is next to it) on which each name stands; and how
    many of the shortest are left out where there are too many. What begins after the layer has none.

    A leader runs from the middle of the bar to the name right of it. A name stands farther from the lane than the names of
    all later bars whose leaders would run into it; so nothing crosses.
    """
    wanting = [bar for bar in bars if not _fits(bar, time) and bar.right <= WIDTH - RIGHT - _AFTER + 1]
    chosen: list[tuple[_Bar, int]] = []
    for bar in sorted(wanting, key=lambda bar: (not bar.own, bar.start - bar.end)):
        found = _on_lines([bar, *(other for other, _ in chosen)])
        if max(line for _, line in found) < _LABELS:
            chosen = found
    return chosen, len(wanting) - len(chosen)


def _on_lines(bars: Sequence[_Bar]) -> list[tuple[_Bar, int]]:
    found: list[tuple[_Bar, int]] = []
    for bar in sorted(bars, reverse=True):
        end = _middle(bar) + 8 + text_width(_beside(bar), NAME)
        found.append((bar, max((line + 1 for other, line in found if _middle(other) < end), default=0)))
    return found


def _middle(bar: _Bar) -> float:
    return (bar.left + bar.right) / 2


def _lane(
    timeline: Timeline,
    layer: Layer,
    lane: Lane,
    bars: Sequence[_Bar],
    labels: Sequence[tuple[_Bar, int]],
    kinds: np.ndarray,
    y: float,
    time: _Time,
    numbered: bool,
) -> Iterator[str]:
    """One stream: idle grey, bars, and the names that have no room in them."""
    kind = "communication" if lane.far else "compute"
    yield f'<g id="timeline-layer-gpu-{lane.rank}-{kind}-{lane.stream}" class="{kind}">'
    yield f'<rect x="{LEFT}" y="{y:g}" width="{_ROOM}" height="{_HIGH}" fill="{GREY}"/>'
    yield text_at(LEFT - 8, y + _HIGH / 2 + 4, kind + (f" {lane.stream + 1}" if numbered else ""), NAME, "end")
    yield from _idle(layer, bars, y, time)
    for bar in bars:
        said = f"{timeline.plan.blocks.blocks[bar.block].name}: {_told(bar)}"
        shape = _shape(bar, *LOOK[CLASSES[int(kinds[bar.block])]][1:], y)
        words = ""
        if _fits(bar, time):
            middle = sum(time.widest(bar.left, bar.right)) / 2
            words = text_at(middle, y + 14, bar.words, NAME, "middle")
            words += text_at(middle, y + 27, seconds_text(bar.end - bar.start), NAME, "middle")
        yield f"<g><title>{xml_escape(said)}</title>{shape}{words}</g>"
    if time.cut:
        yield _cut_mark(time.mark, y)
    yield from _leaders(labels, lane.far, y)
    yield "</g>"


def _told(bar: _Bar) -> str:
    return f"{seconds_text(bar.end - bar.start)}, from {seconds_text(bar.start)} to {seconds_text(bar.end)}"


def _shape(bar: _Bar, fill: str, stroke: str, y: float) -> str:
    """A bar; communication has a dashed outline. Outlines are inside, and left out where they would be all there is."""
    wide, inset = bar.right - bar.left, 0.7 if stroke else 0.4
    look = (
        f'stroke="{stroke}" stroke-width="1.4" stroke-dasharray="{DASH}"'
        if stroke
        else 'stroke="#444" stroke-width=".8"'
    )
    if wide < 6 * inset:
        look, inset = "", 0.0
    pale = "" if bar.own else ' fill-opacity=".4" stroke-opacity=".6"'
    return (
        f'<rect x="{bar.left + inset:.2f}" y="{y + inset:g}" width="{wide - 2 * inset:.2f}" height="{_HIGH - 2 * inset:g}" '
        f'fill="{fill}" {look}{pale}/>'
    )


def _idle(layer: Layer, bars: Sequence[_Bar], y: float, time: _Time) -> Iterator[str]:
    """How long nothing runs, where it is inside the layer and there is room to say so."""
    ends = [(layer.start, layer.start), *((bar.start, bar.end) for bar in bars), (layer.end, layer.end)]
    for (_, before), (after, _) in pairwise(ends):
        if before < layer.start or after > layer.end:
            continue
        left, right = time.widest(time.place(before), time.place(after))
        words = f"idle {seconds_text(after - before)}"
        if text_width(words, NAME) + 8 <= right - left:
            yield text_at((left + right) / 2, y + _HIGH / 2 + 4, words, NAME, "middle", fill="#555")


def _cut_mark(x: float, y: float) -> str:
    """Two strokes across a lane, white between them."""
    high = _HIGH + 4
    slope = f"l6 {-high}"
    return (
        f'<path fill="#fff" d="M{x - 6:.1f} {y + _HIGH + 2:g}{slope}h6l-6 {high}z"/>'
        f'<path fill="none" stroke="#444" d="M{x - 6:.1f} {y + _HIGH + 2:g}{slope}m0 {high}{slope}"/>'
    )


def _leaders(labels: Sequence[tuple[_Bar, int]], far: bool, y: float) -> Iterator[str]:
    """Lines from bars to the names beside the lane: above computation, below communication."""
    for bar, line in labels:
        base = y + _HIGH + 12 + line * _LINE if far else y - 4 - line * _LINE
        edge = y + _HIGH if far else y
        lead = f"M{_middle(bar):.1f} {edge:g}V{base if far else base - 8:g}"
        yield f'<path class="leader" fill="none" stroke="#777" stroke-width=".7" d="{lead}"/>'
        yield text_at(_middle(bar) + 3, base, _beside(bar), NAME)


def _path(timeline: Timeline, rank: int, tracks: Sequence[tuple[Lane, float]], time: _Time) -> Iterator[str]:
    """The critical path on a rank: a line below computation and above communication, joined where it goes from one to the
    other."""
    level: dict[tuple[int, float], float] = {}
    for lane, y in tracks:
        own = y - 3.5 if lane.far else y + _HIGH + 3.5
        level |= dict.fromkeys(zip(lane.block.tolist(), lane.start.tolist(), strict=True), own)
    line, pen = "", (-1.0, -1.0)
    for block, start, end in on_path(timeline, rank):
        left, right = max(time.place(start), LEFT), min(time.place(end), WIDTH - RIGHT)
        if right - left <= 0.05:
            continue
        y = level[block, start]
        joined = len(tracks) == 2 and abs(left - pen[0]) < 0.05
        if not joined:
            line += f"M{left:.1f} {y:g}"
        elif y != pen[1]:
            line += f"V{y:g}"
        line += f"H{right:.1f}"
        pen = right, y
    if line:
        yield f'<path class="path" fill="none" stroke="{PATH}" stroke-width="2.5" d="{line}"/>'
