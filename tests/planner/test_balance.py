"""Even load: exact numbers of copies, packings that keep the rules, never worse than the published greedy, near the bound."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.planner.apportion import apportion, copies_for, smallest_largest_share
from planc.planner.balance import balanced, holder_loads, longest_first, lower_bound, repacked
from planc.planner.tables import EMPTY


def loads_of(kind: str, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "zipf":
        return np.stack([random.permutation(np.arange(1, experts + 1) ** -1.0) for _ in range(layers)]) * 1e5
    return np.exp(float(kind) * random.standard_normal((layers, experts))) * 1e3


def published_greedy(loads: np.ndarray, holders: int, slots: int) -> float:
    """Expert-parallel load balancing as it is described: the next copy to the expert with the largest share; then the
    heaviest copy onto the emptiest holder that has room. Two copies of an expert may meet. The fullest holder's load."""
    counts = [1] * len(loads)
    for _ in range(holders * slots - len(loads)):
        counts[max(range(len(loads)), key=lambda e: loads[e] / counts[e])] += 1
    total, used = [0.0] * holders, [0] * holders
    for share in sorted((loads[e] / c for e, c in enumerate(counts) for _ in range(c)), reverse=True):
        target = min((h for h in range(holders) if used[h] < slots), key=lambda h: total[h])
        total[target] += share
        used[target] += 1
    return max(total)


def check_table(table: np.ndarray, counts: np.ndarray) -> None:
    """The rules: copies as counted, no expert twice on a holder, holders differ by at most one copy."""
    for part, number in zip(table, counts, strict=True):
        held = [row[row != EMPTY].tolist() for row in part]
        assert all(len(set(row)) == len(row) for row in held)
        assert np.ptp([len(row) for row in held]) <= 1
        assert (np.bincount(part[part != EMPTY], minlength=len(number)) == number).all()
        assert (number >= 1).all()


def compositions(total: int, parts: int, most: int):
    return (c for c in product(range(1, most + 1), repeat=parts) if sum(c) == total)


@pytest.mark.parametrize("seed", range(6))
def test_apportionment_is_the_best_of_all(seed: int) -> None:
    loads = loads_of("1", 1, 4, seed)
    for copies in range(4, 11):
        counts = apportion(loads, copies, 4)
        assert counts.sum() == copies and counts.max() <= 4
        best = min(max(load / n for load, n in zip(loads[0], c, strict=True)) for c in compositions(copies, 4, 4))
        assert (loads / counts).max() == pytest.approx(best)


def test_no_more_copies_than_holders() -> None:
    assert apportion(np.array([[100.0, 1.0, 1.0]]), 9, 3).tolist() == [[3, 3, 3]]
    assert apportion(np.array([[100.0, 1.0, 0.0]]), 30, 3).sum() == 9
    assert apportion(np.array([[100.0, 1.0]]), 2, 1).tolist() == [[1, 1]]


def test_spares_for_a_target_in_closed_form() -> None:
    """With that many copies the largest share is below the target, with one fewer it is not."""
    loads = loads_of("1", 8, 32)
    for target in (loads.mean() * t for t in (3.0, 1.5, 1.1)):
        for row, needed in zip(loads, copies_for(loads, target).tolist(), strict=True):
            assert smallest_largest_share(row[None], needed, needed)[0] <= target * (1 + 1e-12)
            if needed > 32:
                assert smallest_largest_share(row[None], needed - 1, needed)[0] > target


@pytest.mark.parametrize(("experts", "holders", "copies"), [(64, 64, 64), (64, 72, 72), (64, 80, 80)])
def test_one_slot_is_the_optimum(experts: int, holders: int, copies: int) -> None:
    loads = loads_of("1", 5, experts)
    table, counts = balanced(loads, apportion(loads, copies, holders), holders, 1)
    check_table(table, counts)
    assert holder_loads(table, loads, counts).max(axis=1) == pytest.approx(lower_bound(loads, copies, holders, 1))


@pytest.mark.parametrize("kind", ["1", "0.5", "zipf"])
@pytest.mark.parametrize(("experts", "holders", "slots"), [(256, 32, 9), (256, 64, 5), (128, 32, 5)])
def test_with_spare_slots_it_beats_the_greedy_and_meets_the_bound(
    kind: str, experts: int, holders: int, slots: int
) -> None:
    loads = loads_of(kind, 6, experts, seed=3)
    table, counts = balanced(loads, apportion(loads, holders * slots, holders), holders, slots)
    check_table(table, counts)
    fullest = holder_loads(table, loads, counts).max(axis=1)
    gap = fullest / lower_bound(loads, holders * slots, holders, slots) - 1
    assert gap.min() >= -1e-12 and gap.mean() <= 0.002 and gap.max() <= 0.005
    for row, mine in zip(loads, fullest, strict=True):
        assert mine <= published_greedy(row, holders, slots) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["1", "zipf"])
def test_two_slots_are_never_worse_and_mostly_better(kind: str) -> None:
    loads = loads_of(kind, 12, 64, seed=1)
    table, counts = balanced(loads, apportion(loads, 96, 48), 48, 2)
    check_table(table, counts)
    greedy = np.array([published_greedy(row, 48, 2) for row in loads])
    mine = holder_loads(table, loads, counts).max(axis=1)
    assert (mine <= greedy * (1 + 1e-9)).all()
    assert mine.sum() < greedy.sum() * 0.99


def brute_force(loads: np.ndarray, counts: np.ndarray, holders: int, slots: int) -> float:
    """The least fullest holder over all placements of these copies."""
    share = loads / counts
    copies = [e for e, n in enumerate(counts.tolist()) for _ in range(n)]
    best = np.inf
    for at in product(range(holders), repeat=len(copies)):
        pairs = set(zip(copies, at, strict=True))
        if len(pairs) < len(copies) or max(np.bincount(at, minlength=holders)) > slots:
            continue
        best = min(best, np.bincount(at, weights=share[copies], minlength=holders).max())
    return float(best)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("experts", "holders", "slots", "copies"), [(4, 2, 3, 6), (5, 3, 2, 6), (6, 3, 2, 6), (4, 3, 2, 6)]
)
def test_tiny_cases_against_all_placements(seed: int, experts: int, holders: int, slots: int, copies: int) -> None:
    loads = loads_of("1", 1, experts, seed)
    optimum = min(
        brute_force(loads[0], np.array(c), holders, slots) for c in compositions(copies, experts, min(holders, copies))
    )
    table, counts = balanced(loads, apportion(loads, copies, holders), holders, slots)
    check_table(table, counts)
    found = float(holder_loads(table, loads, counts).max())
    assert lower_bound(loads, copies, holders, slots)[0] <= optimum * (1 + 1e-12)
    assert optimum * (1 - 1e-12) <= found <= optimum * 1.1


def test_bound_without_spares_knows_who_must_meet() -> None:
    """Four experts on two holders: the heaviest beside the lightest, and two of the three heaviest together."""
    assert lower_bound(np.array([[10.0, 1.0, 1.0, 1.0]]), 4, 2, 2)[0] == 11
    assert lower_bound(np.array([[6.0, 6.0, 6.0, 0.0]]), 4, 2, 2)[0] == 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 12),
    st.integers(0, 2**31),
)
def test_any_loads_are_packed_by_the_rules(weights: list[float], holders: int, extra: int, seed: int) -> None:
    experts = len(weights)
    copies = min(experts + extra, experts * holders)
    slots = -(-copies // holders)
    loads = np.array([weights, np.random.default_rng(seed).permutation(weights)]) + 1e-9
    counts = apportion(loads, copies, holders)
    check_table(longest_first(loads, counts, holders, slots), counts)
    table, counts = balanced(loads, counts, holders, slots)
    check_table(table, counts)
    assert counts.sum(axis=1).tolist() == [copies] * 2
    bound = lower_bound(loads, copies, holders, slots)
    assert (holder_loads(table, loads, counts).max(axis=1) >= bound * (1 - 1e-9)).all()


@pytest.mark.parametrize(("weights", "holders", "copies"), [((1.2, 3.1, 947.3), 3, 7), ((0.5, 7.0, 7.0, 1.0), 6, 14)])
def test_moving_copies_comes_to_an_end(weights: tuple[float, ...], holders: int, copies: int) -> None:
    """Two moves once undid each other for ever: one for the fullest holder, one for all full ones."""
    loads = np.array([weights])
    table, counts = balanced(loads, apportion(loads, copies, holders), holders, -(-copies // holders))
    check_table(table, counts)


def test_repacking_stays_on_the_node_and_evens_it() -> None:
    loads = loads_of("1", 1, 24)[0]
    node = np.repeat(np.arange(3), 4)
    table = np.random.default_rng(0).permutation(24).reshape(12, 2).astype(np.int32)
    found = repacked(table, loads, node)
    for n in range(3):
        assert sorted(found[node == n].ravel()) == sorted(table[node == n].ravel())
        assert loads[found[node == n]].sum(axis=1).max() <= loads[table[node == n]].sum(axis=1).max()
