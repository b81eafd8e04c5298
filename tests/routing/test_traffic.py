"""Traffic: split in time, drawn from loads, and named after its generator."""

from __future__ import annotations

import numpy as np
import pytest

from planc.routing import Skew, TokenTraffic, Traffic, generated, tokens_of_loads
from planc.routing.traffic import words_of

SIZES = {"tokens": 1000, "layers": 3, "experts": 32, "top_k": 4, "sources": 8}


def of_loads(loads: np.ndarray) -> Traffic:
    return Traffic("x", "loads", loads.shape[2], loads.astype(float), None)


# --- generated -------------------------------------------------------------------------------------------------------


def test_generated_traffic_is_its_tokens() -> None:
    traffic = generated(Skew("zipf", topics=16), **SIZES, seed=5)
    assert (traffic.name, traffic.digest) == ("zipf 1.0, 16 topics, seed 5", "")
    assert traffic.origin.startswith("generated: zipf 1.0, 16 topics, seed 5; 1,000 tokens of 8 sources")
    assert (traffic.layers, traffic.experts, traffic.top_k) == (3, 32, 4)
    assert traffic.tokens is not None
    assert traffic.tokens.sources == 8
    assert traffic.loads.dtype == np.float64
    assert np.array_equal(traffic.loads, traffic.tokens.loads()[None])
    assert traffic.loads.sum() == 1000 * 3 * 4
    again, other = generated(Skew("zipf", topics=16), **SIZES, seed=5), generated(Skew("zipf"), **SIZES, seed=6)
    assert np.array_equal(traffic.tokens.topk, again.tokens.topk)
    assert not np.array_equal(traffic.tokens.topk, other.tokens.topk)


@pytest.mark.parametrize(
    ("skew", "words"),
    [
        (Skew(), "uniform"),
        (Skew("uniform", 3.0, topics=1), "uniform, 1 topic"),
        (Skew("power_law", 2), "power law 2.0"),
        (Skew("lognormal", 0.5, topics=4, strength=3), "lognormal 0.5, 4 topics of strength 3.0"),
        (Skew("zipf", groups=8, top_groups=4), "zipf 1.0, 4 of 8 groups"),
    ],
)
def test_a_skew_in_words(skew: Skew, words: str) -> None:
    assert words_of(skew) == words


# --- split -----------------------------------------------------------------------------------------------------------


def test_tokens_are_split_in_time() -> None:
    traffic = generated(Skew("zipf"), **SIZES)
    first, rest = traffic.split(0.7)
    assert rest is not None
    assert np.array_equal(np.concatenate([first.tokens.topk, rest.tokens.topk]), traffic.tokens.topk)
    assert [len(part.tokens.source) for part in (first, rest)] == [700, 300]
    assert np.array_equal(first.loads + rest.loads, traffic.loads)
    assert np.array_equal(first.loads, first.tokens.loads()[None])
    assert (first.name, first.tokens.sources) == (traffic.name, 8)
    assert first.origin.endswith("; tokens 1 to 700 of 1,000")
    assert rest.origin.endswith("; tokens 701 to 1,000 of 1,000")


@pytest.mark.parametrize(("share", "steps"), [(0.5, 3), (0.8, 5), (0.01, 1), (0.99, 5), (0, 1), (1, 5)])
def test_loads_are_split_by_steps(share: float, steps: int) -> None:
    traffic = of_loads(np.random.default_rng(0).integers(1, 9, (6, 2, 4)))
    first, rest = traffic.split(share)
    assert rest is not None
    assert np.array_equal(first.loads, traffic.loads[:steps])
    assert np.array_equal(rest.loads, traffic.loads[steps:])
    assert rest.origin.endswith(f"; steps {steps + 1} to 6 of 6")


def test_one_step_or_one_token_is_not_split() -> None:
    for traffic in (of_loads(np.ones((1, 2, 4))), generated(Skew(), **(SIZES | {"tokens": 1}))):
        assert traffic.split(0.5) == (traffic, None)
    one = generated(Skew(), **(SIZES | {"tokens": 1})).tokens
    with pytest.raises(ValueError, match="two tokens"):
        one.split(0.5)


def test_a_layer_silent_in_one_part_has_its_load_over_all_steps() -> None:
    loads = np.ones((4, 3, 2))
    loads[:2, 1] = 0  # layer 1 gets its first tokens in step 2
    loads[2:, 1] = [1, 3]
    loads[1, 2] = 0  # silent in one step only
    first, rest = Traffic("x", "loads", 2, loads, None).split(0.5)
    assert rest is not None
    assert np.array_equal(first.loads.sum(axis=0)[1], [2, 6])
    assert np.array_equal(first.loads[:, 1], [[1, 3], [1, 3]])
    assert np.array_equal(first.loads[:, 2], loads[:2, 2])
    assert np.array_equal(rest.loads, loads[2:])
    assert (loads[:2, 1] == 0).all()  # the recording itself is left alone


# --- tokens drawn from loads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(16, 2), (64, 2), (64, 8)])
def test_drawn_tokens_have_the_loads_they_are_drawn_from(experts: int, top_k: int) -> None:
    """Drawn with the loads as plain weights, the largest load would come out a quarter too small at 64 and 8."""
    sizes = {"tokens": 20_000, "layers": 2, "experts": experts, "top_k": top_k, "sources": 4}
    recorded = generated(Skew("zipf", 0.8), **sizes, seed=1).loads
    tokens = tokens_of_loads(of_loads(recorded), tokens=20_000, top_k=top_k, sources=4, seed=2)
    drawn = tokens.loads()
    assert drawn.sum() == recorded.sum()
    assert np.abs(drawn - recorded[0]).sum() / recorded.sum() < 0.05
    assert drawn.max(axis=1) == pytest.approx(recorded[0].max(axis=1), rel=0.08)


def test_drawn_tokens_choose_distinct_experts_on_all_sources() -> None:
    loads = np.zeros((2, 2, 8))
    loads[0, 0, :3] = [1000, 1, 1]
    loads[1, 1, 4:] = 1e-20
    tokens = tokens_of_loads(of_loads(loads), tokens=500, top_k=3, sources=5, seed=0)
    assert (tokens.topk.dtype, tokens.source.dtype, tokens.sources) == (np.int32, np.int32, 5)
    assert (np.diff(tokens.topk, axis=2) > 0).all()
    assert (tokens.topk[:, 0] == [0, 1, 2]).all()  # only three experts have load
    assert set(tokens.topk[:, 1].ravel().tolist()) == {4, 5, 6, 7}
    assert set(tokens.source.tolist()) == set(range(5))
    all_of_one = tokens_of_loads(of_loads(np.eye(8)[None, :1]), tokens=50, top_k=3, sources=1, seed=0)
    assert (all_of_one.topk[:, 0, 0] == 0).all()
    assert (np.diff(all_of_one.topk, axis=2) > 0).all()


def test_drawn_tokens_depend_on_the_seed_alone() -> None:
    traffic = of_loads(np.random.default_rng(0).integers(1, 9, (1, 2, 8)))
    one, same, other = (tokens_of_loads(traffic, tokens=100, top_k=2, sources=4, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.topk, same.topk)
    assert np.array_equal(one.source, same.source)
    assert not np.array_equal(one.topk, other.topk)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"top_k": 9}, {"top_k": 0}, {"sources": 0}])
def test_impossible_draws_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="needs tokens"):
        tokens_of_loads(of_loads(np.ones((1, 2, 8))), **({"tokens": 5, "top_k": 2, "sources": 2} | wrong))


# --- sources ---------------------------------------------------------------------------------------------------------


def on(source: list[int], sources: int, count: int) -> list[int]:
    topk = np.zeros((len(source), 1, 1), dtype=np.int32)
    found = TokenTraffic(topk, np.array(source, dtype=np.int32), 2, sources).on_sources(count)
    assert found.dtype == np.int64
    return found.tolist()


def test_tokens_without_a_source_are_dealt_in_turn() -> None:
    assert on([0] * 7, 0, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_recorded_sources_are_kept() -> None:
    assert on([2, 0, 1, 2], 3, 3) == [2, 0, 1, 2]


def test_more_sources_than_recorded() -> None:
    assert on([0, 0, 1, 0, 1, 1], 2, 4) == [0, 1, 2, 0, 3, 2]
    assert on([0, 1, 1, 1, 1], 2, 5) == [0, 2, 3, 4, 2]  # source 0 stands for 0 and 1, source 1 for 2, 3 and 4


def test_fewer_sources_than_recorded() -> None:
    assert on([0, 1, 2, 3, 4, 5], 6, 2) == [0, 0, 0, 1, 1, 1]
    assert on([0, 1, 2], 3, 2) == [0, 0, 1]
    assert on([0, 5, 3], 6, 1) == [0, 0, 0]


@pytest.mark.parametrize("recorded", [1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 64])
def test_every_source_gets_tokens_and_none_is_out_of_range(recorded: int, count: int) -> None:
    source = np.random.default_rng(0).permutation(np.arange(recorded * 640) % recorded)
    found = np.bincount(on(source.tolist(), recorded, count))
    assert len(found) == count
    assert found.min() > 0
    if count % recorded == 0 or recorded % count == 0:
        assert found.max() - found.min() <= 1


def test_there_is_at_least_one_source() -> None:
    with pytest.raises(ValueError, match="one source"):
        on([0], 1, 0)
