"""The gate: scores that reproduce the generator's tokens, limits of groups, a bias that moves choices and no weights, and
capacity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planc.routing import Skew, generate_tokens
from planc.routing.gate import Gate, admit, capacity_of, choose, gate_of, router_odds, router_weights, scores_of
from planc.routing.tokens import layer_weights, source_and_topic, token_noise
from planc.spec import load_model

SCORES = np.array(  # three tokens, four experts
    [
        [0.9, 0.5, 0.3, 0.1],
        [0.8, 0.1, 0.6, 0.2],
        [0.4, 0.3, 0.2, 0.1],
    ]
)


def odds(skew: Skew, gate: Gate, tokens: int = 1500, seed: int = 3, layer: int = 0) -> np.ndarray:
    weights = layer_weights(skew, gate.experts, seed, layer)
    _, topic = source_and_topic(tokens=tokens, sources=8, topics=skew.topics, seed=seed, sample=0)
    return np.concatenate([part for _, part in router_odds(weights, topic, gate.top_k, token_noise(seed, 0, layer))])


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "skew", [Skew(), Skew("zipf", 0.8), Skew("lognormal", 1.0, topics=5), Skew("power_law", 0.7, topics=3)]
)
def test_without_groups_and_bias_the_choices_are_the_generators(skew: Skew, score) -> None:
    gate = Gate(32, 4, score)
    tokens = generate_tokens(tokens=1500, layers=2, experts=32, top_k=4, sources=8, skew=skew, seed=3)
    for layer in range(2):
        chosen = choose(scores_of(odds(skew, gate, layer=layer), score), gate)
        assert np.array_equal(np.sort(chosen, axis=1), tokens.topk[:, layer])


def test_scores_are_softmax_and_sigmoid_of_the_logits() -> None:
    values = odds(Skew("zipf"), Gate(16, 2), tokens=50)
    logits = np.log(values)
    assert scores_of(values, "sigmoid") == pytest.approx(1 / (1 + np.exp(-logits)))
    softmax = scores_of(values, "softmax")
    assert softmax == pytest.approx(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    assert softmax.sum(axis=1) == pytest.approx(np.ones(50))


def test_the_kth_expert_scores_about_a_half_under_sigmoid() -> None:
    gate = Gate(64, 8, "sigmoid")
    scores = scores_of(odds(Skew(), gate), "sigmoid")
    last = np.take_along_axis(scores, choose(scores, gate)[:, -1:], axis=1)
    assert abs(np.median(last) - 0.5) < 0.05


# --- choices ---------------------------------------------------------------------------------------------------------


def test_choices_by_hand() -> None:
    gate = Gate(4, 2)
    assert choose(SCORES, gate).tolist() == [[0, 1], [0, 2], [0, 1]]
    # −0.5 on expert 0: 0.4, 0.3 and −0.1 are left of it
    assert choose(SCORES, gate, np.array([-0.5, 0, 0, 0])).tolist() == [[1, 0], [2, 0], [1, 2]]
    assert choose(SCORES, gate, count=4).tolist() == [[0, 1, 2, 3], [0, 2, 3, 1], [0, 1, 2, 3]]


def test_equal_scores_go_to_the_first_experts() -> None:
    for count in (2, 3):
        assert choose(np.ones((1, 4)), Gate(4, 2), count=count).tolist() == [list(range(count))]


def test_a_bias_changes_the_choice_and_no_weight() -> None:
    gate, bias = Gate(4, 2), np.array([-0.5, 0, 0.15, 0])
    chosen = choose(SCORES, gate, bias)
    assert chosen.tolist() == [[1, 2], [2, 0], [2, 1]]
    raw = router_weights(SCORES, chosen, normalise=False)
    assert raw.tolist() == [[0.5, 0.3], [0.6, 0.8], [0.2, 0.3]]  # the scores as they were
    assert router_weights(SCORES, chosen) == pytest.approx(np.array([[5 / 8, 3 / 8], [3 / 7, 4 / 7], [2 / 5, 3 / 5]]))


def test_groups_compete_with_two_scores_under_sigmoid_and_one_under_softmax() -> None:
    scores = np.array([[0.9, 0.0, 0.1, 0.5, 0.6, 0.2]])  # groups of three: best 0.9 and 0.6, sums of two 1.0 and 1.1
    assert choose(scores, Gate(6, 2, "softmax", 2, 1)).tolist() == [[0, 2]]
    assert choose(scores, Gate(6, 2, "sigmoid", 2, 1)).tolist() == [[4, 3]]
    # the bias counts in the groups' competition: 0.9 + 0.2 and 0.1 + 0.2 are the better two
    assert choose(scores, Gate(6, 2, "sigmoid", 2, 1), np.array([0.2, 0, 0, 0, 0, 0])).tolist() == [[0, 2]]


def test_experts_of_other_groups_are_out_even_where_biased_scores_are_negative() -> None:
    bias = np.array([-2.0, -2.0, -3.0, -3.0])
    assert choose(SCORES, Gate(4, 2, "sigmoid", 2, 1), bias).tolist() == [[0, 1]] * 3


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    groups=st.sampled_from([1, 2, 4, 8]),
    size=st.integers(1, 4),
    score=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 99),
)
def test_any_gate_chooses_distinct_experts_of_few_groups(data, groups: int, size: int, score, seed: int) -> None:
    top_groups = data.draw(st.integers(1, groups))
    gate = Gate(groups * size, data.draw(st.integers(1, top_groups * size)), score, groups, top_groups)
    rng = np.random.default_rng(seed)
    scores, bias = rng.random((40, gate.experts)), rng.normal(size=gate.experts)
    chosen = choose(scores, gate, bias)
    assert (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all()
    assert max(len(set(row)) for row in (chosen // size).tolist()) <= top_groups
    biased = np.take_along_axis(scores + bias, chosen, axis=1)
    assert (np.diff(biased, axis=1) <= 0).all()  # best first
    assert np.array_equal(
        choose(scores, gate, np.full(gate.experts, 0.25)), choose(scores, gate)
    )  # only differences count
    if gate.permitted > gate.top_k:
        assert np.array_equal(choose(scores, gate, bias, gate.permitted)[:, : gate.top_k], chosen)


def test_gates_of_models() -> None:
    def of(name: str) -> Gate:
        moe = load_model(name).moe
        assert moe is not None
        return gate_of(moe)

    assert of("deepseek-v3") == Gate(256, 8, "sigmoid", 8, 4)
    assert of("deepseek-v2") == Gate(160, 6, "softmax", 8, 3)
    assert of("mixtral-8x7b") == Gate(8, 2)


@pytest.mark.parametrize(
    "wrong", [(4, 5), (4, 0), (6, 2, "sigmoid", 4), (8, 3, "sigmoid", 4, 1), (8, 2, "softmax", 2, 3)]
)
def test_impossible_gates_are_refused(wrong: tuple) -> None:
    with pytest.raises(ValueError):
        Gate(*wrong)


# --- capacity --------------------------------------------------------------------------------------------------------


def test_capacity_by_hand() -> None:
    gate = Gate(4, 2)
    assert [capacity_of(gate, 3, f) for f in (1.0, 1.25, 2.0, 0.01)] == [2, 2, 3, 1]  # of 3 · 2 ÷ 4 = 1.5
    assert capacity_of(gate, 200, 1.1) == 110  # in floats 1.1 · 100 is a little more
    assert capacity_of(gate, 1, 1e-12) == 1
    wishes = choose(SCORES, gate)  # [0, 1], [0, 2], [0, 1]: expert 0 is asked three times, expert 1 twice
    assert admit(wishes, gate, 2).tolist() == [[True, True], [True, True], [False, True]]
    assert admit(wishes, gate, 1).tolist() == [[True, True], [False, True], [False, False]]
    # passed on: the third token has 1, and asks 2, which has served the second token, and then 3
    ranked = choose(SCORES, gate, count=4)
    assert admit(ranked, gate, 1).tolist() == [[True, True, False, False], [False, True, True, False], [False] * 4]
    assert admit(ranked, gate, 2).sum(axis=1).tolist() == [2, 2, 2]
    with pytest.raises(ValueError):
        capacity_of(gate, 3, 0.0)


def test_first_choices_go_before_second_ones_of_earlier_tokens() -> None:
    wishes = np.array([[0, 1], [1, 0]])
    assert admit(wishes, Gate(2, 2), 1).tolist() == [[True, False], [True, False]]


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 60),
    k=st.integers(1, 4),
    capacity=st.integers(0, 40),
    more=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_capacity_properties(tokens: int, k: int, capacity: int, more: int, seed: int) -> None:
    gate = Gate(8, k)
    wishes = choose(np.random.default_rng(seed).random((tokens, 8)) + np.arange(8) / 8, gate, count=k + more)
    served = admit(wishes, gate, capacity)
    loads = np.bincount(wishes[served], minlength=8)
    assert loads.max() <= capacity
    assert served.sum(axis=1).max() <= k
    # whoever went away with less than k was refused by experts that are full
    short = np.flatnonzero(served.sum(axis=1) < k)
    assert (loads[wishes[short][~served[short]]] == capacity).all()
    if capacity >= tokens:
        assert served[:, :k].all() and not served[:, k:].any()
