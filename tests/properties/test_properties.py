"""Any spec gives a plan that keeps its promises, or coded diagnostics; never another exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_specs import specs
from small_specs import small_spec

import planc
from planc.diagnostics import CODES
from planc.spec import ExpertRule
from planc.verify import load_plan, plan_json

RUN = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CALM = settings(RUN, max_examples=25)


def compiled(parts: dict[str, Any]) -> planc.VerifiedPlan | None:
    """The plan, or None when it is refused with codes; anything else that is raised is a fault of planc."""
    try:
        return planc.compile(small_spec(**json.loads(json.dumps(parts))))
    except planc.PlancError as error:
        found = error.diagnostics
    assert found
    assert all(d.code in CODES and d.message and d.severity == "error" for d in found)
    assert not any(d.code.startswith(("PLN3", "PLN9")) for d in found), found  # those are our own faults
    return None


@RUN
@given(specs())
def test_a_plan_keeps_its_promises(parts: dict[str, Any]) -> None:
    plan = compiled(parts)
    if plan is None:
        return
    assert nx.is_directed_acyclic_graph(plan.graph)
    every_expert_is_placed(plan)
    the_rule_is_kept(plan)
    tokens_are_conserved(plan)
    assert nx.is_directed_acyclic_graph(plan.graph_pairwise)
    assert plan.memory.fits
    assert plan.parallelism.world_size == plan.spec.cluster.gpus
    assert plan.limits["batch"] >= plan.spec.workload.batch
    found = plan.estimate()
    assert 0 < found.own.floor <= found.own.interval[0] <= found.own.step <= found.own.interval[1]


def every_expert_is_placed(plan: planc.VerifiedPlan) -> None:
    par, moe = plan.parallelism, plan.spec.model.moe
    found: dict[tuple[int, int, int, int], set[tuple[int, int]]] = {}
    for _, data in plan.graph.nodes(data=True):
        if data["kind"] == "expert":
            key = data["micro_batch"], data["layer"], data["gpu"] // par.replica_size, data["expert"]
            found.setdefault(key, set()).add((data["gpu"] // par.expert_tp, data["gpu"] % par.expert_tp))
    wanted = {
        (mb, layer, replica, expert)
        for mb in range(plan.spec.workload.micro_batches)
        for layer in plan.spec.model.moe_layer_ids
        for replica in range(par.dp)
        for expert in range(moe.experts if moe else 0)
    }
    assert set(found) == wanted
    for shards in found.values():  # whole copies: every shard of each
        assert len(shards) == len({holder for holder, _ in shards}) * par.expert_tp


def the_rule_is_kept(plan: planc.VerifiedPlan) -> None:
    rule, par, moe = plan.spec.expert_rule, plan.parallelism, plan.spec.model.moe
    if not isinstance(rule, ExpertRule) or moe is None:
        return
    held = [plan.placement.experts_of_rank(rank) for rank in range(par.world_size)]
    assert all(len(set(experts)) == len(experts) for layers in held for experts in layers.values())
    if rule.scope == "layer":
        most = max((len(e) for layers in held for e in layers.values()), default=0)
        allowed = max(rule.slots_per_gpu, -(-moe.experts // par.holders))
    else:
        most = max(sum(map(len, layers.values())) for layers in held)
        inside = [sum(first <= i < end for i in plan.spec.model.moe_layer_ids) for first, end in par.stages]
        allowed = max(rule.slots_per_gpu, -(-moe.experts * max(inside) // par.holders))
    assert most <= allowed
    assert plan.placement.relaxed == (most > rule.slots_per_gpu)
    assert rule.on_overflow == "rounds" or most <= rule.slots_per_gpu
    assert any(n.code == "PLN203" for n in plan.notes) or not plan.placement.relaxed


def tokens_are_conserved(plan: planc.VerifiedPlan) -> None:
    model, par, moe = plan.spec.model, plan.parallelism, plan.spec.model.moe
    if moe is None:
        return
    sources = par.attention_dp if par.leaders_gate else par.ep
    choices = sources * plan.tokens.source * moe.top_k
    row = {k: model.hidden * model.bytes_of(k) for k in ("dispatch", "combine")}
    for index, block in enumerate(plan.blocks.blocks):
        if block.kind in ("dispatch", "combine"):
            matrix = plan.byte_matrix(index)
            copies = (
                par.expert_tp if block.kind == "dispatch" else 1
            )  # every shard gets the tokens, one returns the sum
            assert matrix.sum() == choices * row[block.kind] * copies
            if block.kind == "dispatch":
                forth = matrix // row["dispatch"]
            elif par.expert_tp == 1:
                assert (matrix // row["combine"] == forth.T).all()
    if par.expert_tp == 1 and row["dispatch"] == row["combine"]:
        assert sum(plan.volumes["dispatch"].values()) == sum(plan.volumes["combine"].values())


@CALM
@given(specs())
def test_the_same_spec_gives_the_same_bytes_and_a_file_gives_the_same_plan(parts: dict[str, Any]) -> None:
    plan, again = compiled(parts), compiled(parts)
    if plan is None or again is None:
        assert plan is again
        return
    text = plan_json(plan)
    assert text == plan_json(again)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(text, encoding="utf-8")
        loaded = load_plan(file)
    assert loaded == plan
    assert plan_json(loaded) == text
    assert set(loaded.graph.edges) == set(plan.graph.edges)


@CALM
@given(specs(), st.permutations(range(3)))
def test_the_order_of_like_node_groups_changes_nothing(parts: dict[str, Any], order: list[int]) -> None:
    """Three groups of like nodes but for their names, in any order: the same places, bytes and volumes."""
    nodes = parts["cluster"]["groups"][0] | {"nodes": 1}
    names = ["a", "b", "c"]
    plans = []
    for chosen in (names, [names[i] for i in order]):
        groups = [nodes | {"name": name} for name in chosen]
        plans.append(compiled(parts | {"cluster": parts["cluster"] | {"groups": groups}}))
    one, other = plans
    if one is None or other is None:
        assert one is other
        return
    assert one.volumes == other.volumes
    assert one.parallelism == other.parallelism
    assert one.limits == other.limits
    assert all((one.memory.items[k] == other.memory.items[k]).all() for k in one.memory.items)
    assert dict(one.graph.nodes(data=True)) == dict(other.graph.nodes(data=True))


@CALM
@given(specs())
def test_replicas_are_alike(parts: dict[str, Any]) -> None:
    """Renumbering the replicas of a plan maps it to itself: same residents, ops and edges, a replica further on."""
    parts["parallelism"] |= {"dp": 2, "ep": "auto"}
    plan = compiled(parts)
    if plan is None or len(parts["cluster"]["groups"]) > 1:
        return
    par = plan.parallelism
    for item in plan.memory.items.values():
        assert (item[: par.replica_size] == item[par.replica_size :]).all()
    for block in plan.blocks.blocks:
        if block.kind in ("input", "output_collect"):
            continue
        half = len(block) // 2
        assert (block.ranks[:half] + par.replica_size == block.ranks[half:]).all()
        for array in (block.rows, block.experts):
            assert array is None or np.array_equal(array[:half], array[half:])


@RUN
@given(specs(), st.data())
def test_a_changed_plan_file_is_refused_with_codes(parts: dict[str, Any], data: st.DataObject) -> None:
    """A digit of plan.json changed: another plan that is refused, or a place where it says the same; never a crash."""
    plan = compiled(parts)
    if plan is None:
        return
    text = plan_json(plan)
    digits = [i for i, c in enumerate(text) if c.isdigit()]
    at = digits[data.draw(st.integers(0, len(digits) - 1))]
    changed = text[:at] + data.draw(st.sampled_from([d for d in "0123456789" if d != text[at]])) + text[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(changed, encoding="utf-8")
        try:
            again = plan_json(load_plan(file))
        except planc.PlancError:
            return
    assert json.loads(again) == json.loads(changed)
