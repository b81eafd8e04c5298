"""Who holds which expert: the rule in both scopes, rounds, spare slots, policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from small_specs import MOE, Small

import planc
from planc.placement import LayerPlacement, Placed
from planc.placement.degrees import resolve
from planc.placement.experts import fill_spares
from planc.placement.policy import POLICIES


def placed(small: Small, experts: int, *, layers: int = 2, gpus: int = 8, **rule: object) -> Placed:
    """Experts of some layers on one EP group."""
    return resolve(
        small(
            model={"layers": layers, "moe": MOE | {"experts": experts, "top_k": min(2, experts)}},
            cluster={"groups": [{"nodes": gpus // 4, "gpus_per_node": 4}]},
            parallelism={"dp": 1, "pp": 1, "ep": gpus, "tp": 1},
            expert_rule=rule,
        )
    )


def counts(part: LayerPlacement, gpus: int) -> list[int]:
    """Experts of a layer on each rank."""
    return np.bincount(part.rank, minlength=gpus).tolist()


def turns_are_counted(part: LayerPlacement) -> bool:
    """Whether the turns of every rank are 0, 1, 2, …"""
    of_rank: dict[int, list[int]] = {}
    for rank, slot in zip(part.rank.tolist(), part.slot.tolist(), strict=True):
        of_rank.setdefault(rank, []).append(slot)
    return all(sorted(slots) == list(range(len(slots))) for slots in of_rank.values())


@pytest.mark.parametrize(("experts", "rounds"), [(1, 1), (3, 1), (8, 1), (9, 2), (16, 2), (17, 3), (20, 3)])
def test_scope_layer(small: Small, experts: int, rounds: int) -> None:
    placement = placed(small, experts, scope="layer").placement
    for part in placement.layers.values():
        held = counts(part, 8)
        assert sorted(part.expert.tolist()) == list(range(experts))
        assert max(held) == rounds == part.rounds
        assert max(held) - min(held) <= 1
        assert turns_are_counted(part)
    assert (placement.rounds, placement.relaxed) == (rounds, experts > 8)


@pytest.mark.parametrize(
    ("experts", "layers", "gpus", "rounds"),
    [(2, 4, 16, 1), (4, 4, 16, 1), (2, 4, 8, 1), (3, 3, 8, 2), (8, 3, 8, 3), (5, 3, 8, 2)],
)
def test_scope_model(small: Small, experts: int, layers: int, gpus: int, rounds: int) -> None:
    placement = placed(small, experts, layers=layers, gpus=gpus, scope="model").placement
    in_all = np.sum([counts(part, gpus) for part in placement.layers.values()], axis=0)
    assert in_all.sum() == experts * layers
    assert in_all.max() == rounds
    assert in_all.max() - in_all.min() <= 1
    assert all(sorted(part.expert.tolist()) == list(range(experts)) for part in placement.layers.values())
    assert (placement.rounds, placement.relaxed) == (rounds, experts * layers > gpus)


@pytest.mark.parametrize(("scope", "needed"), [("layer", 9), ("model", 18)])
def test_overflow_as_an_error_says_the_arithmetic(small: Small, scope: str, needed: int) -> None:
    with pytest.raises(planc.PlancError) as error:
        placed(small, 9, scope=scope, on_overflow="error")
    (fault,) = error.value.diagnostics
    assert fault.code == "PLN202"
    assert f"{needed} experts need a slot, but 8 × 1 = 8 slots exist" in fault.message
    assert f"ep {needed} needs {needed} GPUs" in fault.hint


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_overflow_as_an_error_accepts_what_fits(small: Small, scope: str) -> None:
    assert not placed(small, 4, scope=scope, on_overflow="error").placement.relaxed


def test_two_slots_per_gpu_are_no_relaxation(small: Small) -> None:
    assert not placed(small, 16, slots_per_gpu=2).placement.relaxed
    assert placed(small, 17, slots_per_gpu=2).placement.relaxed


def test_every_replica_and_stage_holds_all_experts(small: Small) -> None:
    spec = small(
        cluster={"groups": [{"nodes": 4, "gpus_per_node": 4}]}, parallelism={"dp": 2, "pp": 2, "ep": 4, "tp": 1}
    )
    placement = resolve(spec).placement
    for layer, replica in itertools.product(range(2), range(2)):
        ranks = range(replica * 8 + layer * 4, replica * 8 + layer * 4 + 4)
        held = [e for r in ranks for e in placement.experts_of_rank(r)[layer]]
        assert sorted(held) == list(range(8))
        for expert in range(8):
            copies = placement.ranks_of_expert(layer, expert)
            assert [c[0] // 8 for c in copies] == [0, 1]


# --- spare slots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(
    ("experts", "gpus", "slots"), [(5, 8, 1), (3, 8, 1), (8, 8, 1), (6, 8, 2), (2, 8, 2), (1, 8, 1)]
)
def test_spare_slots_hold_copies(small: Small, scope: str, experts: int, gpus: int, slots: int) -> None:
    layers = 2 if scope == "layer" else 1
    placement = placed(
        small, experts, layers=layers, gpus=gpus, scope=scope, slots_per_gpu=slots, spares="replicate"
    ).placement
    for part in placement.layers.values():
        held = list(zip(part.expert.tolist(), part.rank.tolist(), strict=True))
        assert len(set(held)) == len(held)  # no rank has two copies of one expert
        assert counts(part, gpus) == [min(slots, experts)] * gpus
        assert part.copies.max() - part.copies.min() <= 1  # equal loads, equal numbers of copies
    assert not placement.relaxed


def test_spare_slots_in_scope_model_hold_copies_of_all_layers(small: Small) -> None:
    placement = placed(small, 3, layers=2, gpus=8, scope="model", spares="replicate").placement
    assert np.sum([counts(part, 8) for part in placement.layers.values()], axis=0).tolist() == [1] * 8
    assert sorted(n for part in placement.layers.values() for n in part.copies.tolist()) == [1, 1, 1, 1, 2, 2]


def best_by_brute_force(holder: list[int], holders: int, slots: int, load: list[float]) -> float:
    """The smallest possible load of the most loaded copy, over every way to fill the free slots."""
    experts = range(len(holder))
    first = [[e for e in experts if holder[e] == h] for h in range(holders)]
    choices = []
    for mine in first:
        others = [e for e in experts if e not in mine]
        choices.append(list(itertools.combinations(others, min(slots - len(mine), len(others)))))
    best = float("inf")
    for pick in itertools.product(*choices):
        copies = [1 + sum(e in more for more in pick) for e in experts]
        best = min(best, max(load[e] / copies[e] for e in experts))
    return best


LOADS = [[1.0, 1.0, 1.0], [8.0, 1.0, 1.0], [5.0, 4.0, 1.0], [3.0, 2.0, 2.0], [1.0, 6.0, 3.0, 1.0], [7.0, 7.0, 1.0, 2.0]]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("holders", "slots"), [(4, 1), (5, 1), (6, 1), (4, 2), (5, 2), (4, 3)])
def test_copies_go_where_they_help_most(load: list[float], holders: int, slots: int) -> None:
    holder = list(range(len(load)))
    expert, where = fill_spares(np.array(holder), holders, slots, np.array(load))
    copies = np.bincount(expert)
    assert len(set(zip(expert.tolist(), where.tolist(), strict=True))) == len(expert)
    assert max(np.array(load) / copies) == pytest.approx(best_by_brute_force(holder, holders, slots, load))


def test_tokens_are_shared_among_copies(small: Small) -> None:
    spec = small(
        model={"moe": MOE | {"experts": 3}},
        parallelism={"dp": 1, "pp": 1, "ep": 8, "tp": 1},
        expert_rule={"spares": "replicate"},
    )
    plan = planc.compile(spec)
    tokens = plan.byte_matrix(plan.blocks.by_name["L0.dispatch"]) // (64 * 2)
    assert tokens.sum(axis=1).tolist() == [8 * 2] * 8
    assert tokens.sum() == 128
    received = tokens.sum(axis=0)
    of_expert = [
        int(received[plan.placement.layers[0].rank[plan.placement.layers[0].expert == e]].sum()) for e in range(3)
    ]
    assert sorted(of_expert) == [42, 43, 43]
    assert received.max() - received.min() <= 43 / 2 - 42 / 3 + 1


# --- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", range(1, 20))
def test_round_robin_spreads_over_nodes(experts: int) -> None:
    node = np.repeat(np.arange(4), 4)
    holder = POLICIES["round_robin"](experts, node)
    per_node = np.bincount(node[holder], minlength=4)
    assert per_node.max() - per_node.min() <= 1
    per_holder = np.bincount(holder, minlength=16)
    assert per_holder.max() - per_holder.min() <= 1
    neighbours = node[holder[:-1]] != node[holder[1:]]
    assert neighbours.all()  # consecutive experts never share a node


def test_round_robin_on_nodes_of_unequal_size() -> None:
    node = np.array([0] * 8 + [1] * 4)
    holder = POLICIES["round_robin"](12, node)
    assert sorted(holder.tolist()) == list(range(12))
    assert node[holder[:8]].tolist() == [0, 1] * 4  # in turn until the smaller node is full


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("experts", [1, 5, 8, 11, 16, 23])
def test_every_policy_keeps_its_promise(policy: str, experts: int) -> None:
    holder = POLICIES[policy](experts, np.array([0, 0, 0, 1, 1, 2, 2, 2]))
    assert len(holder) == experts
    per_holder = np.bincount(holder, minlength=8)
    assert per_holder.max() - per_holder.min() <= 1


def test_linear_keeps_neighbours_together() -> None:
    assert POLICIES["linear"](10, np.zeros(4, dtype=np.int32)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_an_unknown_policy_is_refused(small: Small) -> None:
    with pytest.raises(planc.PlancError) as error:
        planc.compile(small(placement={"policy": "random"}))
    assert [d.code for d in error.value.diagnostics] == ["PLN015"]
