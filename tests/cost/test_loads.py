"""The load of the slowest rank: balanced by hand, skewed by its properties."""

from __future__ import annotations

import numpy as np
import pytest

from planc.cost import loads


def _balanced(tokens: float, top_k: float, experts: float, ep: float) -> tuple[float, float, float]:
    load = loads.balanced(*(np.array([float(v)]) for v in (tokens, top_k, experts, ep)))
    return float(load.rows[0]), float(load.active[0]), float(load.padded[0])


def _skewed(tokens: list[float], exponent: float, *, ep: float = 8, fill: str = "spread") -> loads.RankLoad:
    t = np.array(tokens, dtype=float)
    full = np.full_like
    return loads.power_law(t, full(t, 8.0), full(t, 64.0), full(t, ep), full(t, exponent), fill)


@pytest.mark.parametrize(("tokens", "exponent"), [(4, 1.01), (100, 1.2), (3000, 1.2)])
def test_loads_to_measure_are_those_that_are_priced(tokens: int, exponent: float) -> None:
    found = loads.slowest_loads(64, 8, tokens, 8, exponent)
    assert found.shape == (8,) and found.min() >= 0 and found.max() <= tokens
    priced = _skewed([tokens], exponent)  # the mean of all draws; one of them is measured
    assert found.sum() == pytest.approx(priced.rows[0], rel=0.15)
    assert (found > 0).sum() == pytest.approx(priced.active[0], abs=2)


def test_balanced_by_hand() -> None:
    # 128 tokens × 8 choices on 64 ranks: 16 pairs on 4 experts, 4 rows each, padded to a tile of 16
    assert _balanced(128, 8, 256, 64) == (16, 4, 64)
    # one token: 8 pairs on 32 ranks; the rank that has one has one expert at work
    assert _balanced(1, 8, 256, 32) == (1, 1, 16)
    # more pairs than one tile
    assert _balanced(1000, 2, 8, 1) == (2000, 8, 8 * 256)
    # experts that do not divide: the fuller rank counts
    assert _balanced(60, 1, 6, 4) == (20, 2, 32)


def test_skew_means_more_on_the_slowest_rank() -> None:
    even = loads.balanced(*(np.array([v]) for v in (1024.0, 8.0, 64.0, 8.0)))
    mild, strong = _skewed([1024], 0.6), _skewed([1024], 1.2)
    assert even.rows[0] < mild.rows[0] < strong.rows[0]
    assert strong.rows[0] <= 1024 * 8


def test_an_expert_serves_a_token_once() -> None:
    one = np.ones(1)
    load = loads.power_law(100 * one, 2 * one, 8 * one, 8 * one, 3 * one, "spread")
    assert load.rows[0] <= 100


def test_few_picks_are_packed_or_spread() -> None:
    # 2 tokens × 8 choices of 64 experts, 8 ranks of 8: all loads round to 0 or 1
    packed, spread = _skewed([2], 1.01, fill="packed"), _skewed([2], 1.01, fill="spread")
    assert packed.active[0] > spread.active[0] >= 2
    assert packed.active[0] <= 8


def test_alone_on_one_rank_everything_is_local() -> None:
    load = _skewed([64, 512], 1.2, ep=1)
    assert load.rows == pytest.approx([64 * 8, 512 * 8], rel=0.02)


def test_rows_are_priced_alike_alone_and_together() -> None:
    together = _skewed([3, 1024, 17, 1024], 1.01)
    for at, tokens in enumerate((3, 1024, 17)):
        assert _skewed([tokens], 1.01).rows[0] == together.rows[at]
    assert together.rows[1] == together.rows[3]


def test_uneven_experts() -> None:
    one = np.ones(1)
    load = loads.power_law(64 * one, 2 * one, 6 * one, 4 * one, one, "spread")
    assert 2 * 64 / 4 < load.rows[0] <= 2 * 64
