"""The timeline figure: what it says and how long it draws it, checked against the timeline that it is drawn from."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_timelines import TIMELINES, made_timeline
from small_specs import Compiled

from planc.cost.step import class_of
from planc.render import timeline_svg
from planc.render.chart import seconds_text
from planc.render.timeline_lanes import LOOK, chosen_rows, strips
from planc.render.timeline_layer import LEFT, RIGHT, chosen_layer
from planc.schedule import timeline
from planc.schedule.order import takes_time

SVG = "{http://www.w3.org/2000/svg}"
ROOM = 1000 - LEFT - RIGHT


@cache
def figure(name: str) -> str:
    return timeline_svg(made_timeline(name))


def root_of(name: str) -> ET.Element:
    return ET.fromstring(figure(name))


def part(root: ET.Element, id: str) -> ET.Element:
    return next(e for e in root.iter() if e.get("id") == id)


def words(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def assert_sound(text: str, id: str) -> None:
    """Well-formed, ready for a page, no numbers that are none."""
    root = ET.fromstring(text)
    assert root.get("width") == "1000"
    assert root.get("viewBox", "").split()[:3] == ["0", "0", "1000"]
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids[0] == id
    assert len(ids) == len(set(ids))
    assert all(one.startswith(id) for one in ids)
    assert min(float(size) for size in re.findall(r'font-size="([\d.]+)"', text)) >= 11
    numbers = [value for e in root.iter() for key, value in e.items() if key in ("d", "x", "y", "width", "height")]
    assert not re.search(r"nan|inf|e[-+]?\d", " ".join(numbers))
    assert all(float(e.get("width", "1")) >= 0 for e in root.iter(f"{SVG}rect"))


@pytest.mark.parametrize("name", TIMELINES)
def test_svg_is_sound_small_and_the_same_every_time(name: str) -> None:
    text = figure(name)
    assert text == timeline_svg(made_timeline(name))
    assert len(text.encode()) <= 150_000
    assert_sound(text, "timeline")
    assert seconds_text(made_timeline(name).step) in (root_of(name).get("aria-label") or "")


def test_it_does_not_grow_with_the_cluster(example: Compiled) -> None:
    text = timeline_svg(timeline(example("deepseek-v3-10240gpu", "model={base: deepseek-v3, layers: 6}")))
    assert_sound(text, "timeline")
    assert len(text.encode()) <= 30_000
    assert "one of 10,240 that are busy alike" in text


@pytest.mark.parametrize("name", TIMELINES)
def test_the_classes_of_the_bar_add_up_to_the_step(name: str) -> None:
    made = made_timeline(name)
    bar, x = part(root_of(name), "timeline-path"), 12.0
    groups = {g.get("id", "")[14:]: g for g in bar.findall(f"{SVG}g") if g.get("id")}
    assert list(groups) == list(made.path_by_class)
    for key, seconds in made.path_by_class.items():
        share = seconds / made.step
        told = f"{100 * share:.1f} %" if share >= 0.0005 else "below 0.1 %"
        assert groups[key].findtext(f"{SVG}title") == f"{LOOK[key][0]}: {seconds_text(seconds)}, {told} of the step"
        box = groups[key].find(f"{SVG}rect")
        assert box is not None
        inset = float(box.get("x", "0")) - x
        assert -0.01 < inset < 0.8
        assert float(box.get("width", "0")) + 2 * inset == pytest.approx(976 * share, abs=0.05)
        assert (box.get("stroke-dasharray") is not None) == (bool(LOOK[key][2]) and 976 * share >= 4)
        x += 976 * share
    assert x == pytest.approx(988, abs=0.01)


def level_strokes(path: ET.Element) -> list[tuple[float, float]]:
    """(start, end) of what a path of level strokes draws."""
    out, x = [], 0.0
    for order, a in re.findall(r"([Mmh])([\d.e-]+)", path.get("d", "")):
        if order == "h":
            out.append((x, x + float(a)))
        x = float(a) if order == "M" else x + float(a)
    return out


@pytest.mark.parametrize("name", TIMELINES)
def test_streams_are_busy_in_the_picture_as_long_as_in_the_timeline(name: str) -> None:
    made, root = made_timeline(name), root_of(name)
    busy, blocks = made.stream_busy(), made.plan.blocks.blocks
    rank, far, lane, ops, start, end = made.intervals
    block_of = np.repeat(np.arange(len(blocks)), [len(b) for b in blocks])
    kinds = np.array([class_of(block) for block in blocks])[block_of[ops]]
    seen = 0
    for row in chosen_rows(made):
        for kind in ("compute", "communication"):
            streams = getattr(made.plan.spec.execution, f"{kind}_streams")
            for stream in range(streams):
                group = part(root, f"timeline-step-gpu-{row.rank}-{kind}-{stream}")
                paths = list(group.iter(f"{SVG}path"))
                drawn = [piece for p in paths for piece in level_strokes(p)]
                scale = ROOM / made.step
                assert sum(b - a for a, b in drawn) == pytest.approx(busy[row.rank, kind, stream] * scale, abs=1.0)
                here = (rank == row.rank) & (far == (kind == "communication")) & (lane == stream)
                for one in {p.get("class", "") for p in paths}:
                    own = here & (kinds == one)
                    total = sum(b - a for p in paths if p.get("class") == one for a, b in level_strokes(p))
                    assert total == pytest.approx(float((end - start)[own].sum()) * scale, abs=1.0)
                assert all(LEFT - 0.01 <= a <= b <= LEFT + ROOM + 0.01 for a, b in drawn)
                share = 100 * busy[row.rank, kind, stream] / made.step
                assert f"{share:.1f} %" in words(group)
                seen += 1
    assert seen >= 2


@pytest.mark.parametrize("name", TIMELINES)
def test_rows_are_the_ranks_of_every_stage_that_compute_most_and_least(name: str) -> None:
    made = made_timeline(name)
    par, compute = made.plan.parallelism, made.usage.compute
    rows = chosen_rows(made)
    assert len(rows) <= 8
    assert [f"GPU {row.rank}" for row in rows] == [
        w for w in words(part(root_of(name), "timeline-step")) if w.startswith("GPU ")
    ]
    by_stage: dict[int, list[int]] = {}
    for row in rows:
        by_stage.setdefault(row.rank % par.replica_size // par.ep, []).append(row.rank)
    assert {0, par.pp - 1} <= set(by_stage)
    assert len(by_stage) == min(8, par.pp)
    if made.plan.spec.execution.compute_streams > 1:
        return  # rows go by the sum over streams
    for stage, ranks in by_stage.items():
        own = compute[np.unique(par.stage_ranks(stage))]
        assert compute[ranks[0]] == pytest.approx(own.max(), rel=1e-6)
        assert compute[ranks[-1]] == pytest.approx(own.min(), rel=1e-6) or par.pp > 4
        assert (len(ranks) == 2) == (own.max() - own.min() > 1e-9 * made.step) or par.pp > 4


@pytest.mark.parametrize("name", TIMELINES)
def test_the_layer_is_one_in_the_middle_and_shows_all_its_ops(name: str) -> None:
    made, root = made_timeline(name), root_of(name)
    layer, blocks = chosen_layer(made), made.plan.blocks.blocks
    assert layer is not None
    on_path = [s for s in made.critical_path if blocks[s.block].layer == layer.number]
    assert any(blocks[s.block].micro_batch == layer.micro_batch for s in on_path)
    if made.plan.spec.model.moe is not None:
        assert layer.number in made.plan.spec.model.moe_layer_ids
    panel = part(root, "timeline-layer")
    told = [t.text or "" for t in panel.iter(f"{SVG}title")]
    for number, block in enumerate(blocks):
        if block.layer != layer.number or block.micro_batch != layer.micro_batch or not takes_time(block):
            continue
        for rank in layer.ranks:
            for op in np.nonzero((block.ranks == rank).any(axis=1))[0].tolist():
                start, end = float(made.run.start[number][op]), float(made.run.end[number][op])
                if end - start > 1e-3 * (layer.end - layer.start):
                    times = f"{seconds_text(end - start)}, from {seconds_text(start)} to {seconds_text(end)}"
                    assert f"{block.name}: {times}" in told
    assert f"{layer.name.capitalize()}, op by op" in words(panel)
    assert f"{layer.name}, drawn below" in words(part(root, "timeline-step"))


@pytest.mark.parametrize("name", TIMELINES)
def test_bars_of_the_layer_are_as_long_as_their_ops(name: str) -> None:
    """One scale for all bars that do not run across a cut of time."""
    made = made_timeline(name)
    layer = chosen_layer(made)
    assert layer is not None
    rates = []
    for group in part(root_of(name), "timeline-layer").findall(f"{SVG}g"):
        for bar in group.findall(f"{SVG}g"):
            found = re.search(r": ([\d.]+) (µs|ms|s), from", bar.findtext(f"{SVG}title") or "")
            box = bar.find(f"{SVG}rect")
            assert found is not None and box is not None
            left, wide = float(box.get("x", "0")), float(box.get("width", "0"))
            seconds = float(found[1]) * {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
            if wide > 12 and left > LEFT + 1 and left + wide < 1000 - RIGHT - 1:
                rates.append((wide + (1.4 if bar.find(f"{SVG}rect[@stroke-dasharray]") is not None else 0.8)) / seconds)
    assert np.median(rates) > 0
    off = [rate for rate in rates if abs(rate / np.median(rates) - 1) > 0.01]
    assert len(off) <= len(layer.ranks)
    assert all(rate < np.median(rates) for rate in off)


@pytest.mark.parametrize("name", TIMELINES)
def test_the_critical_path_is_drawn_over_all_of_the_step(name: str) -> None:
    made = made_timeline(name)
    covered = np.zeros(ROOM * 10, dtype=bool)
    for path in part(root_of(name), "timeline-step").findall(f"{SVG}path[@class='path']"):
        for a, b in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", path.get("d", "")):
            covered[int((float(a) - LEFT) * 10) : int((float(b) - LEFT) * 10) + 2] = True
    if made.plan.parallelism.pp <= 4:
        assert covered.mean() > 0.98
    lines = part(root_of(name), "timeline-layer").findall(f"{SVG}path[@class='path']")
    assert lines


def test_micro_batches_have_rows_of_their_own() -> None:
    made = made_timeline("two micro-batches")
    group = part(root_of("two micro-batches"), "timeline-step-gpu-0-compute-0")
    assert {"m0", "m1"} <= set(words(group))
    levels = {re.match(r"M[\d.]+ ([\d.]+)", p.get("d", ""))[1] for p in group.iter(f"{SVG}path")}  # type: ignore[index]
    assert len(levels) == made.plan.spec.workload.micro_batches == 2
    assert "micro-batches modulo 8, 0–7 from top to bottom" in figure("eight stages")
    assert "micro-batches 0–3 from top to bottom" in figure("two stages, four micro-batches")
    assert "micro-batch" not in figure("reference")


def test_experts_that_are_not_on_the_path_say_so() -> None:
    assert "experts" not in made_timeline("two micro-batches").path_by_class
    legend = words(part(root_of("two micro-batches"), "timeline-path"))
    assert legend[legend.index("experts") + 1] == "not on the path"


def test_ops_too_many_for_their_place_are_gathered_and_the_figure_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planc.render.timeline._STRIPS", 400)
    text = timeline_svg(made_timeline("two micro-batches"))
    assert re.search(r"Over the whole step, (2|4|8|16) px are gathered by class", text)
    assert len(text) < len(figure("two micro-batches"))
    assert "gathered" not in figure("two micro-batches")


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0.001, 9), st.integers(0, 3)), min_size=1, max_size=60),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_strips_keep_lengths_and_move_nothing_by_more_than_a_slot(
    steps: list[tuple[float, float, int]], slot: float
) -> None:
    gaps, lengths, kinds = (np.array(column) for column in zip(*steps, strict=True))
    end = np.cumsum(gaps + lengths)
    start = end - lengths
    found = list(strips(start, end, kinds, slot))
    for kind in range(4):
        drawn = sum(b - a for k, a, b in found if k == kind)
        assert drawn == pytest.approx(float(lengths[kinds == kind].sum()), abs=1e-6)
    for (_, _, b), (_, c, _) in pairwise(found):
        assert c >= b - 1e-6
    for at in np.arange(0.0, float(end[-1]) + slot, slot):
        for kind in range(4):
            wanted = np.clip(np.minimum(end, at + slot) - np.maximum(start, at), 0, None)[kinds == kind].sum()
            drawn = sum(max(0.0, min(b, at + slot) - max(a, at)) for k, a, b in found if k == kind)
            assert drawn == pytest.approx(float(wanted), abs=1e-6)
