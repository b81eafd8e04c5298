"""Generated routing: valid, reproducible, and as skewed as asked."""

from __future__ import annotations

import numpy as np
import pytest

from planc.routing.tokens import Skew, generate_tokens

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


def test_the_seed_decides_and_samples_differ():
    one, same = (generate_tokens(**SIZES, skew=Skew("lognormal")) for _ in range(2))
    other = generate_tokens(**SIZES, skew=Skew("lognormal"), sample=1)
    assert (one.topk == same.topk).all() and (one.topk != other.topk).any()
    # another sample of the same distribution: the same experts are popular
    assert np.corrcoef(one.loads()[0], other.loads()[0])[0, 1] > 0.95


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


def test_split_keeps_every_token():
    traffic = generate_tokens(**SIZES, skew=Skew())
    train, test = traffic.split(0.75)
    assert (len(train.source), len(test.source)) == (1500, 500)
    assert (train.loads() + test.loads() == traffic.loads()).all()


@pytest.mark.parametrize(
    "wrong", [{"top_k": 33}, {"tokens": 0}, {"skew": Skew(groups=5)}, {"skew": Skew(groups=8, top_groups=9)}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        generate_tokens(**({"skew": Skew()} | SIZES | wrong))
