"""Generated routing: valid, reproducible, and as skewed as asked."""

from __future__ import annotations

import numpy as np
import pytest

from planc.routing import tokens as tokens_module
from planc.routing.tokens import Skew, generate_tokens, race

SIZES = {"tokens": 2000, "layers": 3, "experts": 32, "top_k": 4, "sources": 8, "seed": 7}


def imbalance(skew: Skew) -> float:
    loads = generate_tokens(**SIZES, skew=skew).loads()
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())


def test_tokens_choose_distinct_experts():
    traffic = generate_tokens(**SIZES, skew=Skew("zipf"))
    assert traffic.topk.shape == (2000, 3, 4)
    assert (np.diff(traffic.topk, axis=2) > 0).all()
    assert traffic.topk.min() >= 0 and traffic.topk.max() < 32
    assert traffic.loads().sum() == 2000 * 3 * 4
    assert set(traffic.source.tolist()) == set(range(8))
    assert (traffic.topk.dtype, traffic.source.dtype, traffic.sources) == (np.int32, np.int32, 8)


def test_the_seed_decides_and_samples_differ():
    one, same = (generate_tokens(**SIZES, skew=Skew("lognormal")) for _ in range(2))
    other = generate_tokens(**SIZES, skew=Skew("lognormal"), sample=1)
    assert (one.topk == same.topk).all() and (one.topk != other.topk).any()
    # another sample of the same distribution: the same experts are popular
    assert np.corrcoef(one.loads()[0], other.loads()[0])[0, 1] > 0.95


def test_a_layer_does_not_depend_on_the_others_nor_on_how_many_tokens_are_drawn_at_once(monkeypatch):
    whole = generate_tokens(**SIZES, skew=Skew("zipf", topics=3))
    assert (generate_tokens(**SIZES | {"layers": 2}, skew=Skew("zipf", topics=3)).topk == whole.topk[:, :2]).all()
    monkeypatch.setattr(tokens_module, "_ROWS", 77)
    assert (generate_tokens(**SIZES, skew=Skew("zipf", topics=3)).topk == whole.topk).all()


def test_a_race_draws_one_after_another_in_proportion_to_the_weights():
    weights = np.array([[5.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    kind = np.arange(200_000) % 2
    chosen = race(weights, kind, 2, np.random.default_rng(0))
    for row in range(2):
        p = weights[row] / weights[row].sum()
        first_or_second = [p[e] + sum(p[o] * p[e] / (1 - p[o]) for o in range(4) if o != e) for e in range(4)]
        shares = np.bincount(chosen[kind == row].ravel(), minlength=4) / 100_000
        assert shares == pytest.approx(first_or_second, abs=0.006)


def test_the_largest_of_equal_scores_are_the_first():
    scores = np.array([[1, 2, 2, 2, 3], [5, 4, 3, 2, 1], [0, 0, 0, 0, 0]], dtype=np.float32)
    assert tokens_module.largest(scores, 3).tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    assert tokens_module.largest(scores, 5).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_extreme_weights_draw_distinct_experts():
    for skew in (Skew("zipf", 60.0), Skew("lognormal", 40.0), Skew("power_law", 0.01), Skew(topics=2, strength=500.0)):
        topk = generate_tokens(**SIZES, skew=skew).topk
        assert (np.diff(topk, axis=2) > 0).all() and topk.min() >= 0 and topk.max() < 32, skew


def test_experts_that_hardly_count_are_drawn_alike():
    chosen = race(np.array([[1.0, 1e-60, 1e-50, 1e-40]]), np.zeros(300, dtype=int), 2, np.random.default_rng(0))
    assert (chosen[:, 0] == 0).all()
    assert (np.bincount(chosen[:, 1], minlength=4)[1:] > 70).all()


def test_skew_grows_with_its_exponent():
    assert imbalance(Skew("uniform")) < 1.2
    assert imbalance(Skew("zipf", 0.5)) < imbalance(Skew("zipf", 1.5))
    assert imbalance(Skew("lognormal", 0.3)) < imbalance(Skew("lognormal", 1.5))
    assert imbalance(Skew("power_law", 3.0)) < imbalance(Skew("power_law", 0.8))


def test_topics_make_experts_appear_together():
    def together(skew: Skew) -> float:
        chosen = np.zeros((2000, 32))
        np.put_along_axis(chosen, generate_tokens(**SIZES, skew=skew).topk[:, 0], 1, axis=1)
        pairs = np.corrcoef(chosen.T)
        return float(np.abs(pairs[~np.eye(32, dtype=bool)]).mean())

    assert together(Skew(topics=4, strength=3.0)) > 2 * together(Skew())


def test_groups_limit_a_token_to_a_few_of_them():
    traffic = generate_tokens(**SIZES, skew=Skew(groups=8, top_groups=2))
    groups = traffic.topk // 4
    assert max(len(set(row)) for row in groups.reshape(-1, 4).tolist()) == 2
    assert set(groups.ravel().tolist()) == set(range(8))


def test_a_group_counts_with_its_two_best_scores():
    """By product of the scores: 9 · 1 < 4 · 3, though 9 is the best score and 9 + 1 the best sum."""
    scores = np.array([[9, 1, 1, 4, 3, 0.5, 3, 2, 1]], dtype=np.float32)
    tokens_module._limit_groups(scores, 3, 1)
    assert scores.tolist() == [[-1, -1, -1, 4, 3, 0.5, -1, -1, -1]]
    alone = np.array([[2, 7, 5]], dtype=np.float32)  # groups of one expert
    tokens_module._limit_groups(alone, 3, 2)
    assert alone.tolist() == [[-1, 7, 5]]


def test_split_keeps_every_token():
    traffic = generate_tokens(**SIZES, skew=Skew())
    train, test = traffic.split(0.75)
    assert (len(train.source), len(test.source)) == (1500, 500)
    assert (train.loads() + test.loads() == traffic.loads()).all()
    assert (train.sources, test.sources) == (8, 8)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 33}, {"tokens": 0}, {"skew": Skew(groups=5)}, {"skew": Skew(groups=8, top_groups=9)}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        generate_tokens(**({"skew": Skew()} | SIZES | wrong))
