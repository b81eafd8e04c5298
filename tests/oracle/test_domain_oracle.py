"""The reference plan and the headline comparison against figures worked out by hand.

Every expected number is a literal of that hand arithmetic, or plain Python on such literals; none comes from planc.
"""

from __future__ import annotations

import numpy as np
import pytest
from small_specs import Compiled, Small

import planc
from planc.cost import step_floors
from planc.placement.degrees import resolve
from planc.spec import parameter_counts

REFERENCE = "moe-61l-ep64-dp2"
EXPERT_BYTES = 58_720_256
MOE_LAYERS = range(3, 61)


@pytest.fixture(scope="module")
def plan(example: Compiled) -> planc.VerifiedPlan:
    return example(REFERENCE)


# --- weights --------------------------------------------------------------------------------------------------------


def test_parameters_of_the_model(plan: planc.VerifiedPlan) -> None:
    counts = parameter_counts(plan.spec.model)
    assert counts["experts"] == 58 * 64 * 29_360_128
    assert counts["attention"] == 61 * 469_762_048
    assert counts["dense_mlp"] == 3 * 29_360_128
    assert counts["gates"] == 58 * 7168 * 64


def test_experts_of_every_rank(plan: planc.VerifiedPlan) -> None:
    experts = plan.memory.items["experts"]
    assert (experts == 58 * EXPERT_BYTES).all()
    assert round(float(experts[0]) / 1e9, 3) == 3.406


def test_attention_at_tp_8(plan: planc.VerifiedPlan) -> None:
    assert (plan.parallelism.tp, plan.parallelism.attention_dp) == (8, 8)
    attention = plan.memory.items["attention"]
    assert (attention == 61 * 939_524_096 // 8).all()
    assert round(939_524_096 / 8 / 1e6, 1) == 117.4
    assert round(float(attention[5]) / 1e9, 3) == 7.164


def test_all_attention_is_57_gb() -> None:
    assert round(61 * 939_524_096 / 1e9, 1) == 57.3


def test_tp_1_does_not_fit(example: Compiled) -> None:
    with pytest.raises(planc.PlancError) as error:
        example(REFERENCE, "parallelism.tp=1")
    assert [d.code for d in error.value.diagnostics] == ["PLN201"]
    assert "attention 57.31 GB" in [" ".join(row.split()) for row in error.value.diagnostics[0].related]
    with pytest.raises(planc.PlancError):  # beside any KV cache: one sequence of one token per GPU
        example(REFERENCE, "parallelism.tp=1", "workload={batch: 128, isl: 1}")
    assert example(REFERENCE, "parallelism.tp=auto").parallelism.tp > 1


def test_dense_mlp_and_gates(plan: planc.VerifiedPlan) -> None:
    dense, gates = plan.memory.items["dense_mlp"], plan.memory.items["gates"]
    assert (dense == 22_020_096).all()  # 3 layers × 58,720,256 B ÷ 8: 22.0 MB
    leaders = np.arange(128) % 8 == 0
    assert (gates[leaders] == 58 * 917_504).all()
    assert (gates[~leaders] == 0).all()
    assert round(58 * 917_504 / 1e6, 1) == 53.2


def test_weights_of_a_gating_rank(plan: planc.VerifiedPlan) -> None:
    assert plan.memory.weights[0] == 3_405_774_848 + 7_163_871_232 + 22_020_096 + 53_215_232
    assert round(float(plan.memory.weights[0]) / 1e9, 3) == 10.645


def test_kv_cache(plan: planc.VerifiedPlan) -> None:
    kv = plan.memory.items["kv_cache"]
    sequences = 1024 // 16  # 16 TP groups in both replicas
    assert 65_536 == 2 * 128 * 128 * 2
    assert (kv == sequences * (1024 + 256) * 499_712).all()
    assert 499_712 == 65_536 * 61 // 8


# --- floors and balance ---------------------------------------------------------------------------------------------


def test_floors(plan: planc.VerifiedPlan) -> None:
    floors = step_floors(plan)
    assert round(floors.expert_read * 1e6, 2) == 40.78
    assert round(floors.expert_read * 58 * 1e3, 2) == 2.37
    assert round(floors.attention_read * 1e6, 2) == 81.56
    assert round(floors.attention_read * 61 * 1e3, 2) == 4.97
    assert round(floors.balance_tokens, 1) == 166.7


# --- experts --------------------------------------------------------------------------------------------------------


def test_every_rank_holds_58_experts(plan: planc.VerifiedPlan) -> None:
    held = [plan.placement.experts_of_rank(rank) for rank in range(128)]
    assert sum(len(e) for layers in held for e in layers.values()) == 7_424
    assert all(sorted(layers) == list(MOE_LAYERS) for layers in held)
    assert all(len(experts) == 1 for layers in held for experts in layers.values())
    ops = [data for _, data in plan.graph.nodes(data=True) if data["kind"] == "expert"]
    assert len(ops) == 7_424
    assert len({(d["layer"], d["expert"], d["gpu"] // 64) for d in ops}) == 7_424


def hand_tokens(
    sources: list[int], tokens: int, top_k: int, experts: int, ranks_of: list[list[int]], ep: int
) -> list[list[int]]:
    """Balanced routing in plain Python: choice n of the group goes to expert n mod E, copy after copy."""
    matrix = [[0] * ep for _ in range(ep)]
    turn = [0] * experts
    choice = 0
    for source in sources:
        for _ in range(tokens * top_k):
            expert = choice % experts
            copies = ranks_of[expert]
            matrix[source][copies[turn[expert] % len(copies)]] += 1
            turn[expert] += 1
            choice += 1
    return matrix


def test_dispatch_and_combine_bytes(plan: planc.VerifiedPlan) -> None:
    tokens = hand_tokens([8 * g for g in range(8)], 64, 2, 64, [[e] for e in range(64)], 64)
    assert sum(map(sum, tokens)) == 8 * 64 * 2
    dispatch = plan.byte_matrix(plan.blocks.by_name["L3.dispatch"])
    combine = plan.byte_matrix(plan.blocks.by_name["L60.combine"], op=1)
    want = np.array(tokens) * 7168 * 2
    assert (dispatch == want).all()
    assert (combine == want.T).all()
    total = 58 * 2 * 8 * 64 * 2 * 7168 * 2  # layers, replicas, TP groups, tokens, top-k, bytes of a token
    for comm in ("dispatch", "combine"):
        assert sum(plan.volumes[comm].values()) == total


def test_tensor_parallel_bytes(plan: planc.VerifiedPlan) -> None:
    t = 64 * 7168 * 2  # the tokens of a TP group
    reductions = 61 + 3  # every attention, and the dense MLPs
    exchanged = 16 * 2 * 7 * t  # per reduction and over 16 groups: every rank sends and receives 7 of 8 chunks
    broadcast = 16 * 7 * t
    assert plan.volumes["tp"]["nvlink"] == reductions * exchanged + 58 * broadcast
    assert sum(plan.volumes["tp"].values()) == plan.volumes["tp"]["nvlink"]


def test_link_classes_of_dispatch(plan: planc.VerifiedPlan) -> None:
    tokens = hand_tokens([8 * g for g in range(8)], 64, 2, 64, [[e] for e in range(64)], 64)
    found = {"local": 0, "nvlink": 0, "nic": 0, "spine": 0}
    for i in range(64):
        for j in range(64):
            link = "local" if i == j else "nvlink" if i // 8 == j // 8 else "nic"
            found[link] += tokens[i][j] * 7168 * 2 * 58 * 2
    assert plan.volumes["dispatch"] == found


# --- the headline comparison ----------------------------------------------------------------------------------------


def test_64_gpus_one_expert_each(example: Compiled) -> None:
    plan = example("moe-4l-64gpu")
    assert plan.placement.rounds == 1
    assert not plan.placement.relaxed
    per_rank = [plan.placement.experts_of_rank(rank) for rank in range(64)]
    assert all(len(layers) == 1 for layers in per_rank)  # each rank in use for exactly one layer
    assert all(len(experts) == 1 for layers in per_rank for experts in layers.values())
    for layer in range(4):
        assert sum(layer in layers for layers in per_rank) == 16
        assert sorted(layers[layer][0] for layers in per_rank if layer in layers) == list(range(16))


def test_the_variant_with_four_stages(example: Compiled) -> None:
    plan = example("moe-4l-64gpu", "parallelism={dp: 1, pp: 4, ep: 16, tp: 8, gating: leader}")
    assert plan.parallelism.stages == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert all(plan.placement.experts_of_rank(r) == {r // 16: [r % 16]} for r in range(64))


def test_the_baseline(example: Compiled) -> None:
    plan = example("moe-4l-16gpu-baseline")
    assert plan.parallelism.stages == ((0, 2), (2, 4))
    for rank in range(16):
        held = plan.placement.experts_of_rank(rank)
        assert sorted(held) == ([0, 1] if rank < 8 else [2, 3])
        assert [len(e) for e in held.values()] == [2, 2]
    slots = {d["gpu"]: 0 for _, d in plan.graph.nodes(data=True) if d["kind"] == "expert"}
    for _, data in plan.graph.nodes(data=True):
        if data["kind"] == "expert":
            slots[data["gpu"]] += 1
    assert slots == dict.fromkeys(range(16), 4)
    for layer in range(4):  # one after another
        for rank in range(layer // 2 * 8, layer // 2 * 8 + 8):
            assert plan.graph.has_edge(f"L{layer}.expert.s0.r{rank}", f"L{layer}.expert.s1.r{rank}")


def test_baseline_dispatch_bytes(example: Compiled) -> None:
    plan = example("moe-4l-16gpu-baseline")
    tokens = hand_tokens([0], 1024, 2, 16, [[e // 2] for e in range(16)], 8)
    assert (plan.byte_matrix(plan.blocks.by_name["L0.dispatch"]) == np.array(tokens) * 7168 * 2).all()


def test_61_layers_on_two_stages(small: Small) -> None:
    model = {"layers": 61, "first_k_dense": 3, "dense_mlp": {"intermediate": 32, "gated": False}}
    spec = small(model=model, parallelism={"dp": 1, "pp": 2, "ep": 4, "tp": 1, "stages": [31, 30]})
    assert resolve(spec).par.stages == ((0, 31), (31, 61))
    alike = small(model={"layers": 61}, parallelism={"dp": 1, "pp": 2, "ep": 4, "tp": 1})
    assert resolve(alike).par.stages == ((0, 31), (31, 61))  # layers of equal cost


def test_reference_layers_on_two_stages(example: Compiled) -> None:
    plan = example(REFERENCE, "parallelism={dp: 1, pp: 2, ep: 64, tp: 8, gating: leader}")
    assert sorted(end - first for first, end in plan.parallelism.stages) == [30, 31]
