"""How many copies each expert gets: the best split of the slots, and the closed form for how many a target needs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.planner.apportion import apportion, copies_for, smallest_largest_share

LOADS = {
    "skewed": [900.0, 120.0, 70.0, 5.0],
    "equal": [6.0, 6.0, 6.0, 6.0],
    "some without load": [8.0, 0.0, 3.0, 0.0],
    "no load at all": [0.0, 0.0, 0.0],
    "ties": [6.0, 3.0, 2.0, 6.0],
    "one expert": [5.0],
}


@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LOADS)
def test_no_other_split_of_the_slots_has_a_smaller_largest_share(name: str, most: int) -> None:
    loads = np.array([LOADS[name]])
    experts = loads.shape[1]
    every = np.array(list(product(range(1, most + 1), repeat=experts)))
    for copies in range(experts, experts * most + 3):
        counts = apportion(loads, copies, most)
        possible = every[every.sum(axis=1) == min(copies, experts * most)]
        assert counts.sum() == min(copies, experts * most) and counts.min() >= 1 and counts.max() <= most
        least = (loads / possible).max(axis=1).min()
        assert (loads / counts).max() == pytest.approx(least)
        assert smallest_largest_share(loads, copies, most)[0] == pytest.approx(least)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(0, 40), st.integers(1, 12))
def test_more_copies_never_raise_the_largest_share(weights: list[int], extra: int, most: int) -> None:
    loads = np.array([weights, weights[::-1]], dtype=float)
    copies = len(weights) + extra
    counts, more = apportion(loads, copies, most), apportion(loads, copies + 1, most)
    assert counts.min() >= 1 and counts.max() <= most
    assert (counts.sum(axis=1) == min(copies, len(weights) * most)).all()
    assert (more >= counts).all() and (more.sum(axis=1) - counts.sum(axis=1) <= 1).all()
    first, second = (smallest_largest_share(loads, n, most) for n in (copies, copies + 1))
    assert (second <= first).all()
    assert first[0] == first[1]  # the order of experts does not matter


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=12), st.integers(1, 120))
def test_so_many_copies_meet_a_target_and_one_fewer_does_not(weights: list[int], target: int) -> None:
    """Also where the target divides a load exactly."""
    loads = np.array([weights], dtype=float)
    needed = int(copies_for(loads, float(target))[0])
    assert needed == sum(max(1, -(-w // target)) for w in weights)
    assert smallest_largest_share(loads, needed, needed)[0] <= target * (1 + 1e-9)
    if needed > len(weights):
        assert smallest_largest_share(loads, needed - 1, needed)[0] > target
