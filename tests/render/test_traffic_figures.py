"""The figures of a placement for known traffic, and the folding of layers that differ in their placement."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from small_specs import Compiled

import planc
from planc.pipeline import TRAFFIC_FIGURES, outputs
from planc.placement import layer_placement
from planc.render import expert_heat_map_svg, link_loads_svg
from planc.render.folding import fold_layers, placed_alike
from planc.units import decode_numbers, format_seconds
from planc.verify import VerifiedPlan

TRAFFIC = "traffic={popularity: zipf, exponent: 0.6, topics: 4, tokens: 512}"
SVG = "{http://www.w3.org/2000/svg}"
PLANS = {
    "scope model": ("moe-4l-64gpu", TRAFFIC),
    "rounds": ("deepseek-v3-128gpu", TRAFFIC, "model={base: deepseek-v3, layers: 6}"),
    "two replicas": ("moe-61l-ep64-dp2", TRAFFIC, "model={base: moe-61l, layers: 8}"),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, example: Compiled) -> VerifiedPlan:
    return example(*PLANS[request.param])


def numbers_in(path: str) -> int:
    """Boxes of a path."""
    return path.count("M")


def test_the_heat_map_shows_every_copy_of_its_layer_once(plan: VerifiedPlan) -> None:
    assert plan.certificate is not None
    root = ET.fromstring(expert_heat_map_svg(plan))
    shown = max(plan.certificate.layers, key=lambda row: (row.seconds, row.imbalance))
    part = plan.placement.layers[shown.layer]
    cells = sum(numbers_in(p.get("d", "")) for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("heat"))
    assert cells == len(part.expert)
    labels = next(g for g in root.iter(f"{SVG}g") if g.get("text-anchor") == "middle")
    assert sorted(int(t.text or "") for t in labels) == part.expert.tolist()
    assert f"layer {shown.layer}" in (root.findtext(f"{SVG}title") or "")


def test_the_heat_map_shows_every_layer_and_node(plan: VerifiedPlan) -> None:
    assert plan.certificate is not None
    root = ET.fromstring(expert_heat_map_svg(plan))
    cells = sum(numbers_in(p.get("d", "")) for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("ratio"))
    assert cells == len(plan.certificate.layers) * len(decode_numbers(plan.certificate.nodes))


def test_hot_experts_are_darker(plan: VerifiedPlan) -> None:
    """The hottest expert's cell has the darkest fill that the figure uses."""
    assert plan.certificate is not None
    root = ET.fromstring(expert_heat_map_svg(plan))
    levels = sorted(
        int(p.get("class", "")[4:]) for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("heat")
    )
    assert levels[-1] == 7 and levels[0] < 7


def test_link_bars_say_what_the_certificate_says(plan: VerifiedPlan) -> None:
    assert plan.certificate is not None
    text = link_loads_svg(plan.certificate)
    root = ET.fromstring(text)
    for row in plan.certificate.kinds:
        group = next(g for g in root.iter(f"{SVG}g") if g.get("id") == f"link-kind-{row.kind}")
        words = [t.text for t in group.iter(f"{SVG}text")]
        assert format_seconds(row.busiest_seconds) in words and format_seconds(row.identity_seconds) in words
        ours, plain = (float(r.get("width", "0")) for r in group.iter(f"{SVG}rect"))
        assert ours / plain == pytest.approx(row.busiest_seconds / row.identity_seconds, abs=0.02)
    titles = [t.text or "" for t in root.iter(f"{SVG}title")]
    assert sum(t.startswith("layer ") for t in titles) == len(plan.certificate.layers)


def test_nothing_in_them_is_dashed_and_bytes_repeat(plan: VerifiedPlan) -> None:
    assert plan.certificate is not None
    for draw in (lambda: expert_heat_map_svg(plan), lambda: link_loads_svg(plan.certificate)):
        text = draw()
        assert "dash" not in text and text == draw()
        assert len(text) < 150_000
        assert 'width="1000"' in text


def test_many_nodes_are_drawn_in_groups(example: Compiled) -> None:
    traffic = "traffic={popularity: zipf, tokens: 16}"
    plan = example(
        "deepseek-v3-ep256",
        traffic,
        "model={base: deepseek-v3, layers: 4}",
        "cluster=h100-sxm-256x1",
        "parallelism.tp=1",
    )
    root = ET.fromstring(expert_heat_map_svg(plan))
    words = " ".join(t.text or "" for t in root.iter(f"{SVG}text"))
    assert "a column is 2 nodes" in words
    cells = sum(numbers_in(p.get("d", "")) for p in root.iter(f"{SVG}path") if p.get("class", "").startswith("heat"))
    assert cells == 256


def test_a_build_writes_and_links_them_only_where_traffic_is_known(plan: VerifiedPlan, example: Compiled) -> None:
    files = dict(outputs(plan, ()))
    assert set(TRAFFIC_FIGURES) <= files.keys()
    assert all(f"]({name})" in files["deployment_plan.md"] for name in TRAFFIC_FIGURES)
    assert (
        'id="expert-heat-map"' in files["deployment_plan.html"] and 'id="link-loads"' in files["deployment_plan.html"]
    )
    plain = dict(outputs(example("moe-4l-64gpu"), ()))
    assert not set(TRAFFIC_FIGURES) & plain.keys()
    assert "Placement for known traffic" not in plain["deployment_plan.md"]


def test_the_document_has_bounds_gaps_and_spares(plan: VerifiedPlan) -> None:
    text = dict(outputs(plan, ()))["deployment_plan.md"]
    section = text.split("## Placement for known traffic")[1].split("\n## ")[0]
    assert re.search(
        r"\| busiest links, summed over layers \(dedup, planned for\) \| [\d.]+ us \| [\d.]+ us \| [\d.]+ % \|", section
    )
    assert "tokens that were not optimised on" in section
    assert "Stragglers and failures" in section and "Spare GPUs" in section
    rows = [line for line in section.split("\n") if line.startswith("|")]
    assert (
        len(
            {
                line.count("|")
                for line in rows
                if "spare GPUs of an EP group" in line or "load of the fullest GPU" in line
            }
        )
        == 1
    )


def permuted(plan: VerifiedPlan, layers: tuple[int, ...]) -> VerifiedPlan:
    """The plan with the experts of some layers in another order on the same ranks."""
    from planc.graph import build_graph
    from planc.placement import memory_table
    from planc.verify import Draft, plan_notes, verify

    parts = dict(plan.placement.layers)
    random = np.random.default_rng(0)
    for layer in layers:
        part = parts[layer]
        parts[layer] = layer_placement(part.expert, random.permutation(part.rank))
    placement = replace(plan.placement, layers=parts)
    spec, par = plan.spec, plan.parallelism
    memory = memory_table(spec, par, placement)
    notes = tuple(plan_notes(spec, par, placement))
    return verify(Draft(spec, par, plan.reasons, placement, memory, build_graph(spec, par, placement), notes))


def test_layers_fold_though_their_experts_trade_places(example: Compiled) -> None:
    plain = example("moe-61l-ep64-dp2", "model={base: moe-61l, layers: 8}")
    assert fold_layers(plain) == [(0, 2, 3), (3, 7, 5)]
    assert placed_alike(plain, 3, 7)
    mixed = permuted(plain, (5, 6))
    assert fold_layers(mixed) == [(0, 2, 3), (3, 7, 5)]
    assert not placed_alike(mixed, 3, 7) and placed_alike(mixed, 3, 4)
    texts = dict(outputs(mixed, ("simplified_moe_dag", "detailed_expert_dag")))
    for name in ("simplified_moe_dag.svg", "detailed_expert_dag.svg"):
        assert "alike but for which" in texts[name]
    assert "alike but for which" not in dict(outputs(plain, ("simplified_moe_dag",)))["simplified_moe_dag.svg"]
    assert "3 maps, all in plan.json" in texts["deployment_plan.md"]


def test_layers_on_other_ranks_do_not_fold(example: Compiled) -> None:
    """Scope model: each layer sits on ranks of its own."""
    assert [count for *_, count in fold_layers(example("moe-4l-64gpu"))] == [1, 1, 1, 1]


def test_row_counts_must_be_the_same_multiset() -> None:
    """Uneven tokens: two layers whose experts differ in number of tokens per rank are alike only as long as the counts are
    the same ones."""
    text = """
name: uneven
model: {base: moe-4l, layers: 3, hidden: 64, attention: {heads: 8, head_dim: 8}, moe: {experts: 8, intermediate: 32}}
cluster: h100-sxm-1x8
workload: {batch: 72, isl: 16}
parallelism: {dp: 1, pp: 1, ep: 8, tp: 1}
"""
    plan = planc.compile(planc.parse_spec(text))
    rows = next(b.rows for b in plan.blocks.blocks if b.kind == "expert")
    assert rows is not None
    mixed = permuted(plan, (1,))
    assert fold_layers(mixed) == [(0, 2, 3)]
