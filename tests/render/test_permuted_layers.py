"""Layers that differ in which expert is on which GPU: what still folds, what must not, and what every output then says."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_specs import Compiled, Small

import planc
from planc.graph import OpBlock, PlanGraph, build_graph
from planc.placement import layer_placement, memory_table
from planc.render import PAGE_FIGURES, deployment_view, detailed_view, simplified_view, svg
from planc.render.comprehensive import comprehensive_svg
from planc.render.folding import fold_layers, fold_replicas, micro_batches_alike, placed_alike
from planc.report.facts import MAX_ROWS, placement_rows
from planc.spec.fields import parse_ranges
from planc.verify import Draft, VerifiedPlan, plan_notes, verify

SVG = "{http://www.w3.org/2000/svg}"
ALIKE = "alike but for which expert is on which GPU"
MIXTRAL = ("mixtral-8x7b", "cluster=h100-sxm-2x8", "parallelism={dp: 1, pp: 1, ep: 16, tp: 4, expert_tp: 2}")
PLANS: dict[str, tuple[tuple[str, ...], list[tuple[int, int, int]]]] = {
    "two replicas": (("moe-61l-ep64-dp2", "model={base: moe-61l, layers: 8}"), [(0, 2, 3), (3, 7, 5)]),
    "turns": (("deepseek-v3-128gpu", "model={base: deepseek-v3, layers: 7}"), [(0, 2, 3), (3, 6, 4)]),
    "shards": ((*MIXTRAL, "model={base: mixtral-8x7b, layers: 5}"), [(0, 4, 5)]),
    "micro-batches": (
        ("moe-61l-ep64-dp2", "model={base: moe-61l, layers: 6}", "workload.micro_batches=2"),
        [(0, 2, 3), (3, 5, 3)],
    ),
    "stages": (
        ("moe-61l-ep64-dp2", "model={base: moe-61l, layers: 9}", "parallelism={dp: 2, pp: 2, ep: 32, tp: 8}",
         "expert_rule={scope: layer, on_overflow: rounds}"),
        [(0, 2, 3), (3, 4, 2), (5, 8, 4)],
    ),
}  # fmt: skip


def permuted(plan: VerifiedPlan, seed: int = 0) -> VerifiedPlan:
    """The plan with the copies of every layer in another order on the same places."""
    random = np.random.default_rng(seed)
    layers = {i: layer_placement(p.expert, random.permutation(p.rank)) for i, p in plan.placement.layers.items()}
    return placed(plan, layers)


def placed(plan: VerifiedPlan, layers: dict[int, Any]) -> VerifiedPlan:
    """The plan with other expert placements, verified again."""
    spec, par, placement = plan.spec, plan.parallelism, replace(plan.placement, layers=layers)
    memory, graph = memory_table(spec, par, placement), build_graph(spec, par, placement)
    return verify(Draft(spec, par, plan.reasons, placement, memory, graph, tuple(plan_notes(spec, par, placement))))


def with_blocks(plan: VerifiedPlan, **changes: dict[str, Any]) -> VerifiedPlan:
    """The plan with fields of named blocks changed (``L3_expert`` stands for ``L3.expert``) and not verified."""
    graph = plan.blocks
    blocks = [replace(b, **changes.get(b.name.replace(".", "_"), {})) for b in graph.blocks]
    return replace(plan, blocks=PlanGraph(tuple(blocks), graph.edges, graph.world_size))


def block(plan: VerifiedPlan, name: str) -> OpBlock:
    return plan.blocks.blocks[plan.blocks.by_name[name]]


def exchanged(values: np.ndarray | None, a: int, b: int) -> np.ndarray:
    """A copy with two entries exchanged."""
    assert values is not None
    result = values.copy()
    result[[a, b]] = result[[b, a]]
    return result


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_layers_fold_and_the_figures_say_in_what_they_differ(name: str, example: Compiled) -> None:
    args, runs = PLANS[name]
    plain = example(*args)
    mixed = permuted(plain)
    assert fold_layers(plain) == fold_layers(mixed) == runs
    moe = [run for run in runs if run[0] in mixed.placement.layers]
    for first, last, _ in runs:
        assert placed_alike(plain, first, last)
        assert placed_alike(mixed, first, last) == (first not in mixed.placement.layers)
    for plan, differ in ((plain, False), (mixed, True)):
        view = simplified_view(plan)
        named = ", ".join(f"{first}–{last} (×{count})" for first, last, count in moe)
        assert (f"Layers {named} are proven {ALIKE}" in view.caption) == differ
        notes = [f.note for f in view.frames if "MoE" in f.title]
        assert [("alike but for which GPU has which expert" in note) for note in notes] == [differ] * len(moe)
        assert not any(note.endswith("…") for note in notes)
        same = detailed_view(plan).caption
        first, last, count = moe[0]
        proof = ALIKE if differ else "identical"
        assert f"Layers {first}–{last} are {proof} (proven, ×{count})" in same


def test_one_layer_of_its_own_breaks_only_identity(example: Compiled) -> None:
    plain = example(*PLANS["turns"][0])
    one = placed(plain, {**plain.placement.layers, 5: permuted(plain).placement.layers[5]})
    assert fold_layers(one) == [(0, 2, 3), (3, 6, 4)]
    assert placed_alike(one, 3, 4) and not placed_alike(one, 3, 6) and not placed_alike(one, 4, 5)


def test_the_tokens_must_stay_with_their_experts(example: Compiled) -> None:
    """Rows that trade places without their experts: the same row counts, the same experts, and still another layer."""
    plan = example(*PLANS["two replicas"][0])
    expert = block(plan, "L3.expert")
    assert expert.rows is not None
    rows = expert.rows.copy()
    rows[[0, 64]] += 2  # expert 0 of both replicas
    uneven = with_blocks(plan, **{f"L{i}_expert": {"rows": rows} for i in range(3, 8)})
    assert fold_layers(uneven) == [(0, 2, 3), (3, 7, 5)]
    both = with_blocks(uneven, L5_expert={"rows": exchanged(rows, 0, 9), "experts": exchanged(expert.experts, 0, 9)})
    assert fold_layers(both) == [(0, 2, 3), (3, 7, 5)]
    assert not placed_alike(both, 3, 7)
    alone = with_blocks(uneven, L5_expert={"rows": exchanged(rows, 0, 9)})
    assert fold_layers(alone) == [(0, 2, 3), (3, 4, 2), (5, 5, 1), (6, 7, 2)]


def test_experts_must_stay_in_their_replica(example: Compiled) -> None:
    plan = example(*PLANS["two replicas"][0])
    moved = exchanged(block(plan, "L5.expert").experts, 3, 64 + 9)
    assert (5, 5, 1) in fold_layers(with_blocks(plan, L5_expert={"experts": moved}))
    inside = exchanged(block(plan, "L5.expert").experts, 3, 9)
    assert (3, 7, 5) in fold_layers(with_blocks(plan, L5_expert={"experts": inside}))


def test_shards_of_a_copy_must_stay_together(example: Compiled) -> None:
    plan = example(*PLANS["shards"][0])
    experts = block(plan, "L2.expert").experts
    torn = {"experts": exchanged(experts, 1, 3)}  # the second shards of two experts
    assert (2, 2, 1) in fold_layers(with_blocks(plan, L2_expert=torn))
    other = {"experts": exchanged(experts, 5, 7)}
    assert {(2, 2, 1), (3, 3, 1)} <= set(fold_layers(with_blocks(plan, L2_expert=torn, L3_expert=other)))
    whole = exchanged(exchanged(experts, 0, 2), 1, 3)
    assert fold_layers(with_blocks(plan, L2_expert={"experts": whole})) == [(0, 4, 5)]


def test_sums_of_shards_must_follow_their_shards(example: Compiled) -> None:
    """Rows of the all-reduce trade places, those of the experts do not."""
    plan = example(*PLANS["shards"][0])
    rows, sums = (block(plan, f"L2.{name}").rows for name in ("expert", "expert_all_reduce"))
    assert rows is not None and sums is not None
    rows, sums = rows.copy(), sums.copy()
    rows[:2] += 3
    sums[:1] += 3
    every = {f"L{i}_expert": {"rows": rows} for i in range(5)} | {
        f"L{i}_expert_all_reduce": {"rows": sums} for i in range(5)
    }
    assert fold_layers(with_blocks(plan, **every)) == [(0, 4, 5)]
    apart = every | {"L2_expert_all_reduce": {"rows": exchanged(sums, 0, 1)}}
    assert (2, 2, 1) in fold_layers(with_blocks(plan, **apart))


def test_another_number_of_experts_on_a_rank_is_another_layer(example: Compiled) -> None:
    """Turns: GPU 0 gets three experts and GPU 1 one, so that other ops run on other ranks."""
    plan = example(*PLANS["turns"][0])
    part = plan.placement.layers[4]
    rank = part.rank.copy()
    rank[np.flatnonzero(rank == 1)[0]] = 0
    graph = build_graph(
        plan.spec, plan.parallelism,
        replace(plan.placement, layers={**plan.placement.layers, 4: layer_placement(part.expert, rank)}),
    )  # fmt: skip
    assert fold_layers(replace(plan, blocks=graph)) == [(0, 2, 3), (3, 3, 1), (4, 4, 1), (5, 6, 2)]


def test_identity_is_judged_by_blocks_and_not_by_the_placement(example: Compiled) -> None:
    plan = example(*PLANS["two replicas"][0])
    moved = with_blocks(plan, L5_expert={"experts": exchanged(block(plan, "L5.expert").experts, 3, 9)})
    assert not placed_alike(moved, 3, 7)


def test_micro_batches_must_be_identical(example: Compiled) -> None:
    """Micro-batches drawn as one have every expert on the same rank: the looser comparison is for layers alone."""
    plan = permuted(example(*PLANS["micro-batches"][0]))
    assert micro_batches_alike(plan)
    moved = exchanged(block(plan, "m1.L4.expert").experts, 0, 9)
    assert not micro_batches_alike(with_blocks(plan, m1_L4_expert={"experts": moved}))


def test_replicas_are_still_proven_identical(example: Compiled) -> None:
    plan = permuted(example(*PLANS["two replicas"][0]))
    assert fold_replicas(plan) == [(0, 1, 2)]


def test_layers_on_other_ranks_are_drawn_apart(example: Compiled) -> None:
    """Scope model: each layer is on GPUs of its own, permuted over all of the EP group."""
    plain = example("moe-4l-64gpu")
    order = np.random.default_rng(0).permutation(64)
    mixed = placed(plain, {i: layer_placement(p.expert, order[p.rank]) for i, p in plain.placement.layers.items()})
    assert [count for *_, count in fold_layers(mixed)] == [1, 1, 1, 1]
    view = simplified_view(mixed)
    assert "alike" not in view.caption + "".join(f.note for f in view.frames)


def test_runs_that_are_not_drawn_are_not_called_more_than_unlike(example: Compiled) -> None:
    plain = example("moe-61l-ep64-dp2", "parallelism={dp: 1, pp: 1, ep: 128, tp: 8}", "expert_rule.spares=idle")
    random = np.random.default_rng(0)
    mixed = placed(
        plain,
        {
            i: layer_placement(p.expert, random.permutation(128)[: len(p.rank)])
            for i, p in plain.placement.layers.items()
        },
    )
    assert len(fold_layers(mixed)) == 59
    view = simplified_view(mixed)
    assert "Layers 5–60, each run of them unlike the one before, are only named." in view.caption
    rest = next(n for n in view.nodes if n.kind == "fold")
    assert rest.lines[2] == "each differs from the one before it in ops, GPUs, copies or tokens · stage 0"


# --- what the figures and the table say ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two replicas", "turns", "shards"])
def test_detailed_figure_shows_the_layer_s_own_placement(name: str, example: Compiled) -> None:
    plan = permuted(example(*PLANS[name][0]))
    width = plan.parallelism.expert_tp
    for layer in (min(plan.placement.layers), max(plan.placement.layers)):
        part = plan.placement.layers[layer]
        wanted = sorted((e, r) for e, r in zip(part.expert.tolist(), part.rank.tolist(), strict=True))
        found = []
        for n in detailed_view(plan, layer).nodes:
            if n.kind == "expert":
                place = n.attributes.get("gpu") or n.attributes["ranks"]
                found.append((int(n.attributes["expert"]), parse_ranges(place)[0]))
                assert len(parse_ranges(place)) == width
                assert n.id.startswith(f"L{layer}.") and (n.id in plan.graph or width > 1)
        assert sorted(found) == wanted


@pytest.mark.parametrize("name", ["two replicas", "turns"])
def test_comprehensive_figure_names_every_layer_s_experts(name: str, example: Compiled) -> None:
    plan = permuted(example(*PLANS[name][0]))
    root = ET.fromstring(comprehensive_svg(plan))
    symbols = {e.get("id"): e for e in root.iter() if e.get("id")}
    size = plan.parallelism.replica_size
    for layer, part in plan.placement.layers.items():
        band = symbols[f"L{layer}"]
        uses = band.findall(f"{SVG}use")
        lanes = {float(u.get("x", "")): int((u.get("id") or "").split("r")[1]) for u in uses if u.get("id")}
        starts = np.array(sorted(lanes))
        found = set()
        for use in uses:
            texts = [] if use.get("id") else symbols[(use.get("href") or "")[1:]].iter(f"{SVG}tspan")
            for span in texts:
                if re.fullmatch(r"E\d+", span.text or ""):
                    lane = starts[np.searchsorted(starts, float(span.get("x", "")), side="right") - 1]
                    found.add((int((span.text or "")[1:]), lanes[float(lane)]))
        pairs = list(zip(part.expert.tolist(), part.rank.tolist(), strict=True))
        assert found == {(e, r + d * size) for e, r in pairs for d in range(plan.parallelism.dp)}


def test_deployment_figure_counts_experts_that_change_from_layer_to_layer(example: Compiled) -> None:
    plain = example(*PLANS["two replicas"][0])
    holders = [n.lines[0] for n in deployment_view(plain).nodes if n.kind == "holder"]
    assert holders[0] == "experts 0–7"
    holders = [n.lines[0] for n in deployment_view(permuted(plain)).nodes if n.kind == "holder"]
    assert holders == ["8 experts of each of 5 layers"] * 8
    scope = example("moe-4l-64gpu")
    assert [n.lines[0] for n in deployment_view(scope).nodes if n.kind == "holder"][:2] == ["L0 E0–7", "L0 E8–15"]
    order = np.random.default_rng(0).permutation(64)
    mixed = placed(scope, {i: layer_placement(p.expert, order[p.rank]) for i, p in scope.placement.layers.items()})
    sizes = {i: np.bincount(p.rank // 8, minlength=8) for i, p in mixed.placement.layers.items()}
    for node, words in enumerate(n.lines[0] for n in deployment_view(mixed).nodes if n.kind == "holder"):
        here = [int(size[node]) for size in sizes.values()]
        assert words == f"{min(here)}–{max(here)} experts of each of 4 layers" or len(words) < 32
        assert not words.endswith("…")


def test_page_figures_stay_small(example: Compiled) -> None:
    plan = permuted(example("deepseek-v3-ep256", "model={base: deepseek-v3, layers: 12}"))
    for make in PAGE_FIGURES.values():
        assert len(svg(make(plan)).encode()) <= 150_000


def rows_of(plan: VerifiedPlan, layers: dict[int, Any]) -> list[dict[str, str]]:
    return placement_rows(replace(plan, placement=replace(plan.placement, layers=layers)))


def layers_in(rows: Sequence[dict[str, str]]) -> list[int]:
    return sorted(layer for row in rows for layer in parse_ranges(row["layers"]))


def test_table_has_one_row_for_layers_with_a_map_each(example: Compiled) -> None:
    plain = example("moe-61l-ep64-dp2")
    (row,) = placement_rows(plain)
    assert row["map"].startswith("E0 on GPU 0, E1 on GPU 1")
    mixed = permuted(plain)
    (row,) = placement_rows(mixed)
    part = mixed.placement.layers[3]
    assert row["layers"] == "3-60"
    assert row["map"].startswith(
        f"58 maps, all in plan.json; layer 3: E0 on GPU {part.rank[0]}, E1 on GPU {part.rank[1]}, "
    )
    assert [row[k] for k in ("experts", "copies", "rank_count", "idle", "rounds", "tokens")] == [
        "64",
        "64",
        "64",
        "0",
        "1",
        "16",
    ]


def test_table_joins_layers_on_different_gpus_when_they_are_many(example: Compiled) -> None:
    plain = example("moe-61l-ep64-dp2", "parallelism={dp: 1, pp: 1, ep: 128, tp: 8}", "expert_rule.spares=idle")
    random = np.random.default_rng(0)
    part = plain.placement.layers[3]
    own = {i: layer_placement(part.expert, random.permutation(128)[:64]) for i in plain.placement.layers}
    (row,) = rows_of(plain, own)
    assert row["map"].startswith("58 maps on different GPUs, all in plan.json; layer 3: ")
    assert (row["rank_count"], row["idle"], row["layers"]) == ("64", "64", "3-60")
    few = {i: own[i] for i in range(3, 7)}
    assert [r["layers"] for r in rows_of(plain, few)] == ["3", "4", "5", "6"]


def test_table_ends_with_a_row_for_the_rest(small: Small) -> None:
    """Layers that hold 8 to 19 copies: more kinds than the table has rows."""
    plan = planc.compile(
        small(model={"layers": 12}, parallelism={"ep": 8}, expert_rule={"slots_per_gpu": 3, "spares": "replicate"})
    )
    layers = {}
    for layer in range(12):
        copies = np.arange(8 + layer)
        layers[layer] = layer_placement(copies % 8, (copies + copies // 8) % 8)
    rows = rows_of(plan, layers)
    assert len(rows) == MAX_ROWS
    assert layers_in(rows) == list(range(12))
    assert rows[0]["copies"] == "8" and rows[-1]["copies"] == "15–19"
    assert rows[-1]["map"] == "… 5 more maps, all in plan.json"
    assert rows[-1]["rounds"] == "2–3"
    assert len(rows_of(plan, {i: layers[i] for i in range(MAX_ROWS)})) == MAX_ROWS
    assert "more maps" not in rows_of(plan, {i: layers[i] for i in range(MAX_ROWS)})[-1]["map"]
