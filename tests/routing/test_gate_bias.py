"""Balancing by bias: the rules by hand, what is conserved, how far imbalance falls and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.routing import Skew, generate_tokens
from planc.routing.bias import (
    Balanced,
    Stream,
    adjusted,
    balance,
    even_imbalance,
    gpu_loads,
    imbalance,
    popularity_walk,
    variance,
)
from planc.routing.gate import Gate
from planc.routing.tokens import layer_weights

GATE = Gate(32, 4, "sigmoid")
SKEW = Skew("zipf", 0.8, topics=4)


def stream(skew: Skew = SKEW, gate: Gate = GATE, tokens: int = 800, seed: int = 5, **more) -> Stream:
    return Stream(layer_weights(skew, gate.experts, seed, more.get("layer", 0)), tokens, seed=seed, **more)


@pytest.fixture(scope="module")
def settled() -> Balanced:
    return balance(GATE, stream(), steps=120, rate=0.01)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_rules_by_hand() -> None:
    bias, loads = np.array([0.0, 0.1, 0.2, 0.3]), np.array([8, 4, 4, 0])
    assert adjusted(bias, loads, 0.01) == pytest.approx([-0.01, 0.1, 0.2, 0.31])
    assert adjusted(bias, loads, 0.01, "proportional") == pytest.approx([-0.01, 0.1, 0.2, 0.31])
    assert adjusted(bias, np.array([6, 5, 4, 1]), 0.01) == pytest.approx([-0.01, 0.09, 0.2, 0.31])
    assert adjusted(bias, np.array([6, 5, 4, 1]), 0.01, "proportional") == pytest.approx([-0.005, 0.0975, 0.2, 0.3075])


def test_measures_by_hand() -> None:
    loads = np.array([[8, 4, 4, 0], [4, 4, 4, 4]])
    assert imbalance(loads).tolist() == [2.0, 1.0]
    assert variance(loads).tolist() == [8.0, 0.0]
    two = np.array([[0, 3], [1, 2]])
    assert gpu_loads(loads, two).tolist() == [[8, 8], [8, 8]]
    copied = np.array([[0, 3], [0, 1], [2, -1]])  # expert 0 twice, one empty slot
    assert gpu_loads(loads, copied).tolist() == [[4, 8, 4], [6, 6, 4]]
    with pytest.raises(ValueError):
        gpu_loads(loads, np.array([[0, 1], [2, -1]]))


def test_one_step_by_hand() -> None:
    """Two experts, top-1, softmax: the bias moves exactly the tokens whose scores are nearer than it."""
    gate, tokens = Gate(2, 1), Stream(np.array([[3.0, 1.0]]), 4000, seed=1)
    found = balance(gate, tokens, steps=2, rate=0.2)
    # arrives first with probability 3/4; the popular one gets −0.2 and the other +0.2 after step 0
    assert found.before.loads[0, 0] / 4000 == pytest.approx(0.75, abs=0.02)
    assert found.bias.tolist()[:2] == [[0.0, 0.0], [-0.2, 0.2]]
    # p = x₀ ÷ (x₀ + x₁) with x = w ÷ Exp: chosen if p > 1 − p + 0.4, p > 0.7, E₀ ÷ E₁ < 9/7: 9/(9 + 7)
    assert found.after.loads[1, 0] / 4000 == pytest.approx(9 / 16, abs=0.02)
    assert found.after.changed[1] == found.before.loads[1, 0] - found.after.loads[1, 0]


# --- what always holds -----------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    score=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.sampled_from([(1, 1), (4, 2)]),
    rule=st.sampled_from(["sign", "proportional"]),
    rate=st.floats(0, 0.5),
    factor=st.one_of(st.none(), st.floats(0.05, 3)),
    overflow=st.sampled_from(["drop", "next"]),
    seed=st.integers(0, 50),
)
def test_pairs_are_conserved(score, groups, rule, rate, factor, overflow, seed) -> None:
    gate = Gate(16, 3, score, *groups)
    asked = {"steps": 4, "rate": rate, "rule": rule, "capacity_factor": factor, "overflow": overflow}
    found = balance(gate, stream(Skew("lognormal", 1.0, topics=3), gate, tokens=60, seed=seed), **asked)
    for run in (found.before, found.after):
        assert (run.loads.sum(axis=1) == 60 * 3).all()
        assert (run.served.sum(axis=1) + run.dropped == 60 * 3).all()
        assert found.capacity is None or run.served.max() <= found.capacity
        assert (run.changed >= 0).all() and (run.changed <= 60 * 3).all()
        assert run.weight_lost.max() <= 1
        assert groups[0] > 1 or run.weight_lost.min() > -1e-9  # the best groups need not hold the best experts
        if factor is None:
            assert np.array_equal(run.loads, run.served) and not run.dropped.any()
        if overflow == "drop":
            assert not run.passed_on.any()
    assert not found.before.changed.any()
    assert np.array_equal(found.before.loads[0], found.after.loads[0])  # no bias yet


def test_no_rate_is_no_bias() -> None:
    found = balance(GATE, stream(), steps=3, rate=0.0)
    assert not found.bias.any() and not found.after.changed.any() and not found.after.weight_lost.any()
    assert np.array_equal(found.before.loads, found.after.loads)


def test_steps_without_drift_are_samples_of_the_generator() -> None:
    found = balance(GATE, stream(layer=1, sources=8), steps=3, rate=0.01)
    for step in range(3):
        tokens = generate_tokens(tokens=800, layers=2, experts=32, top_k=4, sources=8, skew=SKEW, seed=5, sample=step)
        assert np.array_equal(found.before.loads[step], tokens.loads()[1])


def test_the_same_seed_gives_the_same_bytes() -> None:
    def run(seed: int) -> list[bytes]:
        found = balance(GATE, stream(seed=seed, drift=0.1), steps=6, rate=0.01, capacity_factor=1.1, overflow="next")
        return [
            found.bias.tobytes(),
            found.after.loads.tobytes(),
            found.after.served.tobytes(),
            found.after.weight_lost.tobytes(),
        ]

    assert run(5) == run(5)
    assert all(a != b for a, b in zip(run(5), run(6), strict=True))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"tokens": 0}, {"capacity_factor": 0.0}])
def test_impossible_sizes_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        balance(GATE, stream(tokens=wrong.pop("tokens", 10)), **({"steps": 1, "rate": 0.1} | wrong))


# --- what a bias does ------------------------------------------------------------------------------------------------


def test_imbalance_falls_to_what_chance_leaves(settled: Balanced) -> None:
    last = slice(90, 120)
    before, after = (imbalance(run.loads[last]).mean() for run in (settled.before, settled.after))
    even = even_imbalance(GATE, 800)
    assert before > 2.8
    assert even < after < 1.35  # 1.23 by chance
    assert variance(settled.after.loads[last]).mean() < variance(settled.before.loads[last]).mean() / 25
    assert settled.bias[-1][settled.before.loads.sum(axis=0).argmax()] < 0


def test_a_bias_costs_decisions_and_weight(settled: Balanced) -> None:
    changed = settled.after.changed / (800 * 4)
    assert 0 == changed[0] < changed[10] < changed[110] < 0.5
    assert 0 < settled.after.weight_lost[10] < settled.after.weight_lost[110] < changed[110]
    # to lose a choice is to lose no more than its whole weight, and what replaces it has most of that
    assert settled.after.weight_lost[110] < 0.2


def test_uniform_traffic_has_nothing_to_balance() -> None:
    found = balance(GATE, stream(Skew()), steps=40, rate=0.001)
    even = even_imbalance(GATE, 800)
    assert imbalance(found.before.loads).mean() == pytest.approx(even, rel=0.05)
    assert imbalance(found.after.loads).mean() == pytest.approx(even, rel=0.05)
    assert found.after.changed.max() < 0.02 * 800 * 4


def test_a_bias_saves_drops() -> None:
    found = balance(GATE, stream(), steps=80, rate=0.01, capacity_factor=1.25)
    assert found.capacity == 125
    assert found.before.dropped[-20:].mean() > 0.2 * 3200
    assert found.after.dropped[-20:].mean() < 0.01 * 3200
    passed = balance(GATE, stream(), steps=5, rate=0.01, capacity_factor=1.25, overflow="next")
    assert np.array_equal(passed.before.loads, found.before.loads[:5])
    assert passed.before.dropped.sum() == 0
    assert (passed.before.passed_on <= found.before.dropped[:5]).all() and passed.before.passed_on.min() > 0
    assert (passed.before.weight_lost < found.before.weight_lost[:5]).all()


def test_a_bias_follows_drift() -> None:
    """A bias frozen after half the steps falls behind one that goes on."""
    moving = stream(drift=0.08)
    walk = popularity_walk(moving, 120)
    assert (walk[0] == 1).all()
    assert np.diff(np.log(walk), axis=0).std() == pytest.approx(0.08, rel=0.05)
    on = balance(GATE, moving, steps=120, rate=0.01)
    still = balance(GATE, stream(), steps=120, rate=0.01)
    after = imbalance(on.after.loads[90:]).mean()
    assert imbalance(still.after.loads[90:]).mean() < after < 0.6 * imbalance(on.before.loads[90:]).mean()


def test_chance_by_hand() -> None:
    """One token and top-1 of two: the fuller of two binomials of one draw has 0 or 1, 3 times in 4 one, over a mean of ½."""
    assert even_imbalance(Gate(2, 1), 1, samples=20_000) == pytest.approx(1.5, abs=0.02)
    assert even_imbalance(Gate(8, 8), 10) == 1.0
