"""Specs with traffic, compiled: the rule holds, the certificate is there, copies fill spares, and bytes repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_specs import Compiled

import planc
from planc.diagnostics import PlancError
from planc.placement import copy_tokens
from planc.placement.expert_map import map_json
from planc.planner.tables import EMPTY, table_of
from planc.spec import shipped_folder
from planc.verify import plan_json

TRAFFIC = "traffic={popularity: zipf, exponent: 0.7, topics: 4, tokens: 600}"
SMALL = """
name: small
model: {{base: moe-4l, layers: {layers}, hidden: 64, attention: {{heads: 8, head_dim: 8}}, moe: {{experts: {experts}, intermediate: 32}}}}
cluster: h100-sxm-{nodes}x8
workload: {{batch: 512, isl: 16}}
parallelism: {{dp: {dp}, pp: {pp}, ep: {ep}, tp: {tp}, expert_tp: {split}}}
expert_rule: {rule}
traffic: {{popularity: zipf, exponent: 0.7, topics: 3, tokens: 400}}
"""


def small(**changes: object) -> planc.VerifiedPlan:
    values = {"layers": 4, "experts": 16, "nodes": 2, "dp": 1, "pp": 1, "ep": 16, "tp": 1, "split": 1} | changes
    values.setdefault("rule", "{scope: layer}")
    return planc.compile(planc.parse_spec(SMALL.format(**values)))


EXAMPLES = {
    "moe-61l-ep64-dp2": ("model={base: moe-61l, layers: 8}",),
    "moe-4l-64gpu": (),
    "deepseek-v3-128gpu": ("model={base: deepseek-v3, layers: 5}",),
    "qwen3-235b-a22b": ("model={base: qwen3-235b-a22b, layers: 4}",),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_with_traffic(name: str, example: Compiled, tmp_path: Path) -> None:
    plan = example(name, TRAFFIC, *EXAMPLES[name])
    record = plan.certificate
    assert record is not None and plan.spec.policy == "topology"
    o, b = record.objectives, record.bounds
    assert o.dedup is not None and b.dedup_seconds is not None and o.dedup.seconds >= b.dedup_seconds > 0
    assert record.held_out.link_seconds["result"] <= min(record.held_out.link_seconds.values()) * (1 + 1e-9)
    plan.write(tmp_path)
    assert planc.load_plan(tmp_path) == plan
    again = planc.compile(planc.load_spec(name, [TRAFFIC, *EXAMPLES[name]]))
    assert plan_json(again) == plan_json(plan)


def test_layers_get_placements_of_their_own(example: Compiled) -> None:
    plan = example("moe-61l-ep64-dp2", TRAFFIC, "model={base: moe-61l, layers: 8}")
    maps = {part.rank.tobytes() for part in plan.placement.layers.values()}
    assert len(maps) > 1
    assert all(sorted(part.rank.tolist()) == list(range(64)) for part in plan.placement.layers.values())


def test_scope_model_holds_over_all_layers(example: Compiled) -> None:
    plan = example("moe-4l-64gpu", TRAFFIC)
    ranks = np.concatenate([part.rank for part in plan.placement.layers.values()])
    assert sorted(ranks.tolist()) == list(range(64))
    assert plan.placement.rounds == 1 and not plan.placement.relaxed


def test_spares_hold_copies_where_traffic_is_known_and_none_where_told() -> None:
    filled = small(nodes=3, ep=24)
    assert {len(p.expert) for p in filled.placement.layers.values()} == {24}
    idle = small(nodes=3, ep=24, rule="{scope: layer, spares: idle}")
    assert {len(p.expert) for p in idle.placement.layers.values()} == {16}
    assert filled.certificate is not None and idle.certificate is not None
    assert filled.certificate.objectives.imbalance < idle.certificate.objectives.imbalance


def test_copies_of_hot_experts_are_the_ones_made() -> None:
    plan = small(nodes=3, ep=24)
    assert plan.certificate is not None
    from planc.units import decode_numbers

    for row in plan.certificate.layers:
        loads, copies = decode_numbers(row.loads), plan.placement.layers[row.layer].copies
        assert loads[copies > 1].min() >= loads[copies == 1].max() * 0.5
        assert copies[np.argmax(loads)] > 1


def test_copies_share_tokens_by_part_of_the_ranks() -> None:
    """The byte matrix: a source sends an expert's tokens to one copy, or to two where a part ends inside it."""
    plan = small(nodes=3, ep=24)
    from planc.graph.traffic import copy_matrix

    layer = next(iter(plan.placement.layers))
    part = plan.placement.layers[layer]
    matrix = copy_matrix(plan.spec, plan.parallelism, plan.placement, layer)
    assert (matrix.sum(axis=0) == copy_tokens(plan.spec, plan.parallelism, plan.placement, layer)).all()
    for expert in np.flatnonzero(part.copies > 1).tolist():
        shares = matrix[:, part.expert == expert]
        firsts = [int(np.flatnonzero(column)[0]) for column in shares.T]
        assert firsts == sorted(firsts)
        assert ((shares > 0).sum(axis=1) <= 2).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"pp": 2, "nodes": 4},
        {"pp": 2, "nodes": 4, "rule": "{scope: model, slots_per_gpu: 2}"},
        {"split": 2, "nodes": 4, "ep": 32},
        {"dp": 2, "nodes": 4},
        {"tp": 8},
        {"ep": 8, "nodes": 1},
        {"experts": 12, "ep": 8, "nodes": 1},
        {"rule": "none", "ep": 8, "nodes": 1},
        {"layers": 3, "pp": 2, "nodes": 4, "rule": "{scope: model}"},
    ],
    ids=str,
)
def test_every_mesh(changes: dict[str, object]) -> None:
    plan = small(**changes)
    assert plan.certificate is not None
    assert len(plan.certificate.layers) == plan.spec.model.layers
    assert "certificate" in planc.verify.plan_json(plan)


def test_what_runs_now_is_moved_from_as_little_as_can_be(tmp_path: Path) -> None:
    plan = small()
    par = plan.parallelism
    tables = np.stack([table_of(p.expert, p.rank, par.holders, 1) for p in plan.placement.layers.values()])
    (tmp_path / "now.json").write_text(map_json(tables))
    text = SMALL.format(layers=4, experts=16, nodes=2, dp=1, pp=1, ep=16, tp=1, split=1, rule="{scope: layer}")
    spec = planc.parse_spec(text + "placement: {current: now.json}\n", folder=tmp_path)
    kept = planc.compile(spec)
    assert kept.certificate is not None and kept.certificate.objectives.bytes_to_move == 0
    shuffled = np.random.default_rng(0).permuted(tables, axis=1)
    (tmp_path / "now.json").write_text(map_json(shuffled))
    moved = planc.compile(spec)
    assert moved.certificate is not None
    size = moved.certificate.expert_bytes
    assert size and moved.certificate.objectives.bytes_to_move % size == 0
    (tmp_path / "now.json").write_text(map_json(tables[:, :8]))
    with pytest.raises(PlancError) as error:
        planc.compile(spec)
    assert {d.code for d in error.value.diagnostics} == {"PLN025"}


def test_recorded_samples_of_the_reference_model() -> None:
    samples = shipped_folder("specs") / "traffic"
    for name in ("sample-topk.npz", "sample-logical-count.npz", "sample-eplb-weight.json"):
        spec = planc.load_spec(
            "moe-61l-ep64-dp2", [f"traffic={{file: '{samples / name}'}}", "placement.objective=balance"]
        )
        record = planc.compile(spec).certificate
        assert record is not None and record.traffic.name == name and record.traffic.sha256
    with pytest.raises(PlancError) as error:
        planc.compile(planc.load_spec("moe-4l-64gpu", [f"traffic={{file: '{samples / 'sample-topk.npz'}'}}"]))
    assert {d.code for d in error.value.diagnostics} == {"PLN023"}
    assert any("traffic.file" in text for d in error.value.diagnostics for text in d.related)


def test_scenarios_and_the_topology_policy_without_traffic() -> None:
    spec = planc.load_spec("moe-4l-64gpu", [TRAFFIC, "scenarios={night: {popularity: uniform, tokens: 300}}"])
    record = planc.compile(spec).certificate
    assert record is not None and record.objectives.dedup is not None
    assert record.objectives.worst_case_seconds >= record.objectives.dedup.seconds
    plain = planc.compile(planc.load_spec("moe-4l-64gpu", ["placement.policy=topology"]))
    assert plain.certificate is not None and plain.certificate.traffic.name.startswith("uniform")


def test_a_dense_model_has_nothing_to_place() -> None:
    text = "name: d\nmodel: llama-3.1-8b\ncluster: h100-sxm-1x8\nworkload: {batch: 8, isl: 16}\ntraffic: {tokens: 10}\n"
    plan = planc.compile(planc.parse_spec(text))
    assert plan.certificate is None
    assert json.loads(plan_json(plan)).get("certificate") is None


def test_empty_slots_stand_last() -> None:
    assert table_of(np.array([3, 1]), np.array([0, 0]), 2, 3).tolist() == [[1, 3, EMPTY], [EMPTY] * 3]
