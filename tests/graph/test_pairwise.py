"""The graph of direct edges between ranks: bytes conserved, no cycle, and the same ops reach the same ops."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
from small_specs import MOE, Compiled, small_spec

import planc
from planc.graph import COLLECTIVES

SHARED = {"moe": MOE | {"shared_experts": 1}, "vocab": 64, "first_k_dense": 1, "dense_mlp": {"intermediate": 32}}
PLANS: dict[str, Callable[[], planc.Spec]] = {
    "leader": lambda: small_spec(parallelism={"ep": 8, "tp": 4, "gating": "leader"}),
    "sharded": lambda: small_spec(model=SHARED, parallelism={"dp": 2, "ep": 4, "tp": 2}),
    "scatter": lambda: small_spec(parallelism={"ep": 8, "tp": 4, "tp_comm": "reduce_scatter"}),
    "stages and turns": lambda: small_spec(
        model={"moe": MOE | {"experts": 7}},
        parallelism={"pp": 2, "ep": 4, "tp": 2},
        workload={"batch": 40, "micro_batches": 2},
    ),
    "expert shards": lambda: small_spec(parallelism={"ep": 8, "tp": 1, "expert_tp": 2}),
    "spares": lambda: small_spec(
        model={"moe": MOE | {"experts": 5}}, parallelism={"ep": 8, "tp": 1}, expert_rule={"spares": "replicate"}
    ),
    "few tokens": lambda: small_spec(parallelism={"ep": 8, "tp": 1}, workload={"batch": 8}),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> planc.VerifiedPlan:
    return planc.compile(PLANS[request.param]())


def test_collectives_are_gone_and_nothing_else(plan: planc.VerifiedPlan) -> None:
    hub, direct = plan.graph, plan.graph_pairwise
    local = {n for n, d in hub.nodes(data=True) if d["kind"] not in COLLECTIVES}
    assert local <= set(direct)
    added = {n: d for n, d in direct.nodes(data=True) if n not in local}
    assert all(d["kind"] == "all_reduce" and "gpu" in d for d in added.values())  # sums of expert shards, a rank each
    assert bool(added) == (plan.parallelism.expert_tp > 1)
    assert all(direct.nodes[n] == hub.nodes[n] for n in local)
    assert nx.is_directed_acyclic_graph(direct)


def test_dispatched_and_combined_bytes(plan: planc.VerifiedPlan) -> None:
    direct = plan.graph_pairwise
    for comm in ("dispatch", "combine"):
        for name, index in plan.blocks.by_name.items():
            block = plan.blocks.blocks[index]
            if block.kind != comm:
                continue
            for op, ranks in enumerate(block.ranks.tolist()):
                found = np.zeros((len(ranks), len(ranks)), dtype=np.int64)
                for source, target, data in direct.edges(data=True):
                    a, b = direct.nodes[source], direct.nodes[target]
                    same = a.get("layer") == b.get("layer") == block.layer and a["micro_batch"] == block.micro_batch
                    sends = a["kind"] == "gate" and b["kind"] == "expert"
                    returns = (
                        a["kind"] in ("expert", "all_reduce")
                        and b["kind"] == "aggregate"
                        and data["tensor"].endswith("S(experts)")
                    )
                    if same and a["gpu"] in ranks and (sends if comm == "dispatch" else returns):
                        assert data["bytes"] > 0
                        found[a["gpu"] - ranks[0], b["gpu"] - ranks[0]] += data["bytes"]
                assert (found == plan.byte_matrix(index, op)).all(), name


def test_every_expert_gets_its_own_tokens(plan: planc.VerifiedPlan) -> None:
    for op, data in plan.graph.nodes(data=True):
        if data["kind"] == "expert":
            (hub,) = (
                d["bytes"]
                for s, _, d in plan.graph.in_edges(op, data=True)
                if plan.graph.nodes[s]["kind"] == "dispatch"
            )
            direct = plan.graph_pairwise
            gates = [d["bytes"] for s, _, d in direct.in_edges(op, data=True) if direct.nodes[s]["kind"] == "gate"]
            assert sum(gates) == hub


def test_communication_is_marked_where_ranks_differ(plan: planc.VerifiedPlan) -> None:
    direct = plan.graph_pairwise
    for source, target, data in direct.edges(data=True):
        moves = direct.nodes[source]["gpu"] != direct.nodes[target]["gpu"]
        assert ("comm" in data) == moves == (data.get("style") == "dashed")


def test_volumes_between_ranks(plan: planc.VerifiedPlan) -> None:
    for comm in ("dispatch", "combine", "pp"):
        found = sum(d["bytes"] for _, _, d in plan.graph_pairwise.edges(data=True) if d.get("comm") == comm)
        assert found == sum(v for link, v in plan.volumes.get(comm, {}).items() if link != "local")


@pytest.mark.parametrize("name", ["leader", "sharded", "scatter", "stages and turns"])
def test_the_same_ops_reach_the_same_ops(name: str) -> None:
    """With more tokens than experts every source sends to every expert, and direct edges reach what hubs reach."""
    plan = planc.compile(PLANS[name]())
    hub, direct = plan.graph, plan.graph_pairwise
    for op in direct:
        assert nx.descendants(direct, op) == nx.descendants(hub, op) & set(direct), op


@pytest.mark.parametrize("name", ["few tokens", "spares"])
def test_direct_edges_reach_no_more_than_hubs(name: str) -> None:
    """A token goes to few experts, and of an expert with copies only to the copy that serves its source."""
    plan = planc.compile(PLANS[name]())
    hub, direct = plan.graph, plan.graph_pairwise
    fewer = 0
    for op in direct:
        reached, through_hubs = nx.descendants(direct, op), nx.descendants(hub, op)
        assert reached <= through_hubs
        fewer += len(reached) < len(through_hubs & set(direct))
    assert fewer


def test_an_example(example: Compiled) -> None:
    plan = example("moe-4l-64gpu")
    direct = plan.graph_pairwise
    assert direct is plan.graph_pairwise
    assert nx.is_directed_acyclic_graph(direct)
    assert direct.edges["L0.gate.r0", "L0.expert.r15"] == {
        "tensor": "[16, 7168] fp16 S(experts)",
        "bytes": 229_376,
        "comm": "dispatch",
        "style": "dashed",
    }  # 128 tokens × 2 choices over 16 experts
    assert "comm" not in direct.edges["L0.gate.r0", "L0.expert.r0"]
    assert direct.edges["L0.aggregate.r0", "L1.attn_qkv.r7"]["bytes"] == 128 * 7168 * 2


def test_the_scatter_carries_every_micro_batch() -> None:
    """64 sequences on 8 ranks: 8 tokens of [64] bf16 to every other rank, in however many micro-batches they then run."""
    for micro_batches in (1, 2, 4):
        plan = planc.compile(small_spec(parallelism={"ep": 8, "tp": 1}, workload={"micro_batches": micro_batches}))
        matrix = plan.byte_matrix(plan.blocks.by_name["input_split"])
        assert matrix[0].tolist() == [0, *[8 * 64 * 2] * 7] and not matrix[1:].any()
