"""The heat map of experts on nodes and the link bars: what they say, checked against the certificate that they are drawn from."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from made_certificates import CASES, Case, Made, made

from planc.planner import Certificate
from planc.render.placement import expert_heat_map_svg, link_bars_svg
from planc.units import decode_numbers, format_seconds

SVG = "{http://www.w3.org/2000/svg}"
HEAT = ["#fffbe6", "#fee8a8", "#fecf66", "#fdae3d", "#ec7014", "#b3400a", "#6e2602"]
RATIO = ["#2166ac", "#6baed6", "#c6dcef", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"]
NUMBERED = [
    "8 nodes",
    "32 nodes",
    "scope model",
    "two slots",
    "2 nodes",
    "two stages",
    "copies",
    "shards",
    "one node",
    "loads only",
]
FIGURES: dict[str, Callable[[Made], str]] = {
    "expert-heat-map": lambda m: expert_heat_map_svg(*m),
    "link-bars": lambda m: link_bars_svg(m.certificate),
}
_MADE: dict[str, Made] = {}


def of(name: str) -> Made:
    """The made-up certificate of a case, made once."""
    return _MADE.setdefault(name, made(CASES[name]))


def heat_map(case: Made) -> ET.Element:
    return ET.fromstring(expert_heat_map_svg(*case))


def part(root: ET.Element, id: str) -> ET.Element:
    """The element with an id."""
    return next(e for e in root.iter() if e.get("id") == id)


def words(root: ET.Element) -> list[str]:
    """All texts in their order."""
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def titles(root: ET.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}title")]


class Cell(NamedTuple):
    """A cell with a number, as its tooltip, its text and its fill say."""

    node: int
    rank: int
    expert: int | None
    tokens: float
    label: str
    fill: str


def numbered_cells(root: ET.Element) -> list[Cell]:
    found = []
    for group in part(root, "expert-heat-map-layer").iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title") or ""
        match = re.fullmatch(
            r"node (\d+), GPU (\d+), (?:no expert|expert (\d+)(?: \(one of \d+ copies\))?: ([\d,]+) tokens)", title
        )
        if match is not None:
            path = group.find(f"{SVG}path")
            assert path is not None
            expert = None if match[3] is None else int(match[3])
            tokens = float((match[4] or "0").replace(",", ""))
            label = group.findtext(f"{SVG}text") or ""
            found.append(Cell(int(match[1]), int(match[2]), expert, tokens, label, path.get("fill", "")))
    return found


def busiest(certificate: Certificate) -> int:
    """Layer of the largest seconds; of several, or without times, the most uneven."""
    rows = sorted(certificate.layers, key=lambda r: (-r.seconds, -r.imbalance))
    return rows[0].layer


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("name", CASES)
def test_svg_is_sound_small_and_ready_for_a_page(name: str, figure: str) -> None:
    text = FIGURES[figure](of(name))
    root = ET.fromstring(text)
    assert text == FIGURES[figure](of(name))
    assert len(text.encode()) <= 150_000
    assert root.get("width") == "1000"
    assert root.get("viewBox", "").split()[:3] == ["0", "0", "1000"]
    assert root.get("role") == "img"
    assert root.get("aria-label") == root.findtext(f"{SVG}title")
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids[0] == figure
    assert len(ids) == len(set(ids))
    assert all(id.startswith(figure) for id in ids)
    assert "class=" not in text
    assert "dash" not in text
    assert min(float(size) for size in re.findall(r'font-size="([\d.]+)"', text)) >= 10
    assert "nan" not in text.lower().replace("nano", "")


@pytest.mark.parametrize("name", NUMBERED)
def test_every_place_of_the_busiest_layer_is_a_cell_with_its_expert(name: str) -> None:
    case, (certificate, placement, node_of_rank) = CASES[name], of(name)
    layer = busiest(certificate)
    root = heat_map(of(name))
    assert f"layer {layer}" in (root.get("aria-label") or "")
    row = next(r for r in certificate.layers if r.layer == layer)
    loads, layout = decode_numbers(row.loads), placement.layers[layer]
    first = placement.par.stage_of_layer(layer) * placement.par.ep
    wanted = sorted(
        (int(node_of_rank[first + rank]), first + rank, expert, round(loads[expert] / layout.copies[expert]))
        for expert, rank in zip(layout.expert.tolist(), layout.rank.tolist(), strict=True)
    )
    cells = numbered_cells(root)
    held = [cell for cell in cells if cell.expert is not None]
    assert sorted((c.node, c.rank, c.expert, round(c.tokens)) for c in held) == wanted
    assert all(cell.label == str(cell.expert) for cell in held)
    assert len(cells) == placement.par.holders * layout.rounds
    assert all(cell.label == "" and cell.fill == "#ffffff" for cell in cells if cell.expert is None)
    assert ("no expert" in words(root)) == (len(held) < len(cells)) == (case.scope == "model")


@pytest.mark.parametrize("name", NUMBERED)
def test_hotter_is_darker_by_the_scale_that_is_drawn(name: str) -> None:
    root = heat_map(of(name))
    held = [cell for cell in numbered_cells(root) if cell.expert is not None]
    mean = sum(cell.tokens for cell in held) / len(held)
    bounds = [0.25, 0.5, 0.8, 1.25, 2.0, 4.0]
    for cell in held:
        level = sum(cell.tokens / mean >= bound for bound in bounds)
        edge = min(abs(cell.tokens / mean - bound) for bound in bounds) < 2 / mean  # the tooltip is rounded
        assert edge or cell.fill == HEAT[level], cell
    drawn = words(part(root, "expert-heat-map-layer"))
    assert [w for w in drawn if re.fullmatch(r"[\d.]+–[\d.]+|over [\d.]+", w)] == [
        f"0–{bounds[0]:g}", *(f"{a:g}–{b:g}" for a, b in pairwise(bounds)), "over 4"
    ]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERED)
def test_node_totals_stand_under_their_columns(name: str) -> None:
    certificate, placement, node_of_rank = of(name)
    layer = busiest(certificate)
    row = next(r for r in certificate.layers if r.layer == layer)
    stage = placement.par.stage_ranks(placement.par.stage_of_layer(layer))[0]
    totals = decode_numbers(row.node_tokens)[np.unique(node_of_rank[stage])]
    drawn = words(part(heat_map(of(name)), "expert-heat-map-layer"))
    if f"{totals[0]:,}" in drawn or len(totals) < 32:
        assert [w for w in drawn if re.fullmatch(r"[\d,]+", w)][-len(totals) :] == [f"{t:,}" for t in totals]
    else:
        short = [f"{t / 1000:.0f}k" if t >= 9950 else f"{t / 1000:.1f}k" for t in totals]
        assert [w for w in drawn if w.endswith("k")] == short


def test_turns_and_shards_are_named_at_the_left() -> None:
    assert {"local 0 · turn 1", "local 7 · turn 2"} <= set(words(heat_map(of("two slots"))))
    assert {"local 0–1", "local 6–7"} <= set(words(heat_map(of("shards"))))
    assert "which expert every 2 GPUs hold" in " ".join(words(heat_map(of("shards"))))
    assert "local 7" in words(heat_map(of("8 nodes")))


def columns(case: Case, certificate: Certificate) -> int:
    """Nodes of a column of the lower panel."""
    most = min(876 // 6, 7000 // len(certificate.layers))
    return -(-case.nodes // most)


def lower_fills(root: ET.Element, count: int) -> list[list[str]]:
    """Fill of every cell of the lower panel, by row and column, read off the lines that are drawn."""
    pitch = min(120.0, 876 / count)
    starts = [round(n * pitch) for n in range(count)]
    rows = []
    for group in part(root, "expert-heat-map-layers").findall(f"{SVG}g"):
        fills: dict[int, str] = {}
        for path in group.iter(f"{SVG}path"):
            x = 0
            for order, a in re.findall(r"([Mmh])([\d.-]+)", path.get("d", "")):
                if order == "h":
                    fills |= dict.fromkeys(
                        (n for n, s in enumerate(starts) if x <= s < x + int(a)), path.get("stroke", "")
                    )
                x = int(a) - 104 if order == "M" else x + int(a)
        rows.append([fills[n] for n in range(count)])
    return rows


@pytest.mark.parametrize("name", CASES)
def test_lower_panel_colours_every_node_by_its_share_in_the_layer(name: str) -> None:
    case, (certificate, placement, node_of_rank) = CASES[name], of(name)
    size = columns(case, certificate)
    root = heat_map(of(name))
    count = -(-case.nodes // size)
    drawn = lower_fills(root, count)
    assert len(drawn) == case.layers
    for row, record in zip(drawn, certificate.layers, strict=True):
        stage = placement.par.stage_ranks(placement.par.stage_of_layer(record.layer))[0]
        own = set(node_of_rank[stage].tolist())
        tokens = decode_numbers(record.node_tokens)
        mean = tokens.sum() / len(own)
        for number, fill in enumerate(row):
            inside = [n for n in range(number * size, min(case.nodes, (number + 1) * size)) if n in own]
            if not inside:
                assert fill == "#dddddd"
                continue
            ratio = tokens[inside].mean() / mean
            assert fill == RATIO[sum(bool(ratio >= b) for b in (0.5, 0.7, 0.9, 1.1, 1.4, 2.0))]
    heading = " ".join(words(part(root, "expert-heat-map-layers")))
    assert ("a column is a node" in heading) == (size == 1)
    assert (f"the mean of {size} nodes" in heading) == (size > 1)
    assert ("other stages" in heading) == (case.pp > 1)


def test_lower_panel_says_numbers_in_tooltips() -> None:
    """A tooltip per cell where that is few enough, else one per layer."""
    certificate, _, _ = of("8 nodes")
    told = [t for t in titles(part(heat_map(of("8 nodes")), "expert-heat-map-layers")) if "times the mean" in t]
    tokens = [decode_numbers(record.node_tokens) for record in certificate.layers]
    assert told == [
        f"layer {record.layer}, node {n}: {own[n]:,} tokens, {own[n] / own.mean():.2f} times the mean"
        for record, own in zip(certificate.layers, tokens, strict=True)
        for n in range(8)
    ]
    certificate, _, _ = of("32 nodes")
    told = [t for t in titles(part(heat_map(of("32 nodes")), "expert-heat-map-layers")) if "times the mean" in t]
    assert len(told) == 58
    own = decode_numbers(certificate.layers[0].node_tokens)
    assert told[0] == (
        f"layer 3: most at node {own.argmax()}, {own.max() / own.mean():.2f} times the mean; "
        f"least at node {own.argmin()}, {own.min() / own.mean():.2f}"
    )


def test_the_layer_of_the_upper_panel_is_marked_and_named_in_the_lower_one() -> None:
    for name in CASES:
        layer = busiest(of(name).certificate)
        lower = part(heat_map(of(name)), "expert-heat-map-layers")
        assert f"layer {layer}, shown above" in titles(lower)
        bold = [
            t.text for t in lower.iter(f"{SVG}text") if t.get("font-weight") == "bold" and "layer" in (t.text or "")
        ]
        assert bold == [f"layer {layer}"]


def test_nodes_too_many_for_numbers_have_a_tooltip_each() -> None:
    certificate, placement, node_of_rank = of("128 nodes")
    layer = busiest(certificate)
    upper = part(heat_map(of("128 nodes")), "expert-heat-map-layer")
    assert numbered_cells(heat_map(of("128 nodes"))) == []
    assert "no room for experts' numbers" in " ".join(words(upper))
    row = next(r for r in certificate.layers if r.layer == layer)
    tokens, layout = decode_numbers(row.node_tokens), placement.layers[layer]
    loads = decode_numbers(row.loads)
    told = titles(upper)
    assert len(told) == 128
    for node, title in enumerate(told):
        here = node_of_rank[layout.rank] == node
        hot = layout.expert[here][np.argmax(loads[layout.expert[here]])]
        assert title.startswith(f"node {node}: {tokens[node]:,} tokens; most, {loads[hot]:,}, for expert {hot} on GPU ")
    lines = [p for p in upper.iter(f"{SVG}path") if p.get("stroke") in HEAT]
    assert sum(p.get("d", "").count("M") for p in lines) == 1024


def test_of_too_many_nodes_the_fullest_are_drawn_and_the_figure_says_so() -> None:
    certificate, _, _ = of("1,280 nodes")
    row = next(r for r in certificate.layers if r.layer == busiest(certificate))
    root = heat_map(of("1,280 nodes"))
    shown = list(dict.fromkeys(cell.node for cell in numbered_cells(root)))
    assert f"of 1,280 nodes the {len(shown)} with most tokens, the others left out" in " ".join(words(root))
    tokens = decode_numbers(row.node_tokens)
    assert len(shown) >= 20
    assert tokens[shown].min() >= np.sort(tokens)[-len(shown)] - 1  # totals in the record are rounded
    bold = [t.text for t in part(root, "expert-heat-map-layer").iter(f"{SVG}text") if t.get("font-weight") == "bold"]
    assert bold == [str(node) for node in shown]


# --- link bars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].links])
def test_a_pair_of_bars_for_every_kind_of_link(name: str) -> None:
    certificate = of(name).certificate
    root = ET.fromstring(link_bars_svg(certificate))
    groups = [g for g in root.findall(f"{SVG}g") if g.get("id") != "link-bars-layers"]
    assert [g.get("id") for g in groups] == [f"link-bars-{row.kind}" for row in certificate.kinds]
    longest = max(max(row.busiest_seconds, row.identity_seconds) for row in certificate.kinds)
    scale = max(float(r.get("width", "0")) for g in groups for r in g.iter(f"{SVG}rect"))
    for group, row in zip(groups, certificate.kinds, strict=True):
        ours, plain = group.findall(f"{SVG}rect")
        assert ours.get("fill") == "#0072b2" and plain.get("fill") == "none"
        assert float(ours.get("width", "0")) / scale == pytest.approx(row.busiest_seconds / longest, abs=0.005)
        assert float(plain.get("width", "0")) / scale == pytest.approx(row.identity_seconds / longest, abs=0.005)
        mark = float(re.findall(r"M([\d.]+)", group.findall(f"{SVG}path")[-1].get("d", ""))[0])
        assert (mark - 104) / scale == pytest.approx(row.mean_seconds / longest, abs=0.005)
        said = f"{format_seconds(row.busiest_seconds)}, mean {format_seconds(row.mean_seconds)}"
        assert [t.text for t in group.findall(f"{SVG}text")] == [
            row.kind.replace("_", " "),
            f"{row.links:,} links",
            said,
            format_seconds(row.identity_seconds),
        ]
        assert said in (group.findtext(f"{SVG}title") or "")


def test_kinds_without_links_are_left_out() -> None:
    kinds = {
        name: re.findall(r'id="link-bars-((?:nvlink|nic|spine)_\w+)"', FIGURES["link-bars"](of(name))) for name in CASES
    }
    assert kinds["one node"] == ["nvlink_up", "nvlink_down"]
    assert kinds["8 nodes"] == ["nvlink_up", "nvlink_down", "nic_up", "nic_down"]
    assert len(kinds["32 nodes"]) == 6
    assert kinds["loads only"] == []
    assert "No link times" in FIGURES["link-bars"](of("loads only"))


@pytest.mark.parametrize("name", ["8 nodes", "scope model", "middling"])
def test_a_bar_for_every_layer_with_identity_and_bound(name: str) -> None:
    certificate = of(name).certificate
    root = ET.fromstring(link_bars_svg(certificate))
    strip = part(root, "link-bars-layers")
    marks = [t.text or "" for t in strip.findall(f"{SVG}text") if (t.text or "").endswith(" us")]
    top = max(float(m.split()[0]) for m in marks) * 1e-6
    assert top >= max(max(r.seconds, r.identity_seconds) for r in certificate.layers) - 1e-12
    groups = strip.findall(f"{SVG}g")
    assert [g.get("id") for g in groups] == [f"link-bars-layer-{row.layer}" for row in certificate.layers]
    for group, row in zip(groups, certificate.layers, strict=True):
        ours, plain = group.findall(f"{SVG}rect")
        foot = float(ours.get("y", "0")) + float(ours.get("height", "0"))
        assert float(ours.get("height", "0")) == pytest.approx(150 * row.seconds / top, abs=0.1)
        assert float(plain.get("height", "0")) == pytest.approx(150 * row.identity_seconds / top, abs=0.1)
        level = float(re.findall(r"M[\d.]+ ([\d.]+)", group.findall(f"{SVG}path")[0].get("d", ""))[0])
        assert foot - level == pytest.approx(150 * row.bound_seconds / top, abs=0.2)
        title = group.findtext(f"{SVG}title") or ""
        for said in (row.seconds, row.identity_seconds, row.bound_seconds):
            assert format_seconds(said) in title


def test_scale_of_the_layers_is_round() -> None:
    for name, longest in (("8 nodes", 3.3e-6), ("scope model", 9.9e-5), ("2 nodes", 0.0123)):
        certificate = of(name).certificate
        factor = longest / max(r.identity_seconds for r in certificate.layers)
        rows = [
            r.model_copy(update={"seconds": r.seconds * factor / 2, "identity_seconds": r.identity_seconds * factor})
            for r in certificate.layers
        ]
        strip = part(ET.fromstring(link_bars_svg(certificate.model_copy(update={"layers": rows}))), "link-bars-layers")
        marks = [t.text or "" for t in strip.findall(f"{SVG}text") if re.fullmatch(r"[\d.]+ (us|ms|s)", t.text or "")]
        assert 3 <= len(marks) <= 6
        step = float(marks[1].split()[0])
        assert f"{step:e}".rstrip("0").split("e")[0].rstrip("0").rstrip(".") in ("1", "2", "2.5", "5")


def test_names_are_escaped() -> None:
    certificate, placement, node_of_rank = of("8 nodes")
    layers = [r.model_copy(update={"busiest": "nic <a&b> \"'"}) for r in certificate.layers]
    odd = certificate.model_copy(update={"layers": layers})
    assert "nic <a&b> \"'" in " ".join(words(ET.fromstring(expert_heat_map_svg(odd, placement, node_of_rank))))
    assert "nic <a&b> \"'" in " ".join(titles(ET.fromstring(link_bars_svg(odd))))
