"""Recorded or generated routing: which experts each sampled token chose in each layer, and where the token was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Popularity = Literal["uniform", "zipf", "lognormal", "power_law"]


@dataclass(frozen=True, eq=False)
class TokenTraffic:
    """``topk``: int32 [tokens, layers, k], distinct experts of each token in each MoE layer (in layer order);
    ``source``: int32 [tokens], the gating source (0 … sources − 1) that routes the token; ``experts``: E;
    ``sources``: how many gating sources there were, 0 where that was not recorded (then ``source`` is all zeros and
    tokens are dealt to sources in turn, see `on_sources`)."""

    topk: np.ndarray
    source: np.ndarray
    experts: int
    sources: int = 0

    def loads(self) -> np.ndarray:
        """Tokens of each expert, int64 [layers, E]."""
        layers = self.topk.shape[1]
        return np.stack([np.bincount(self.topk[:, i].reshape(-1), minlength=self.experts) for i in range(layers)])

    def split(self, share: float) -> tuple[TokenTraffic, TokenTraffic]:
        """The first ``share`` of the tokens, and the rest: to optimise on one and judge on the other. Both have at
        least one token. Raises ValueError for fewer than two tokens."""
        if len(self.source) < 2:
            raise ValueError("needs two tokens or more")
        cut = max(1, min(len(self.source) - 1, round(len(self.source) * share)))
        return (
            TokenTraffic(self.topk[:cut], self.source[:cut], self.experts, self.sources),
            TokenTraffic(self.topk[cut:], self.source[cut:], self.experts, self.sources),
        )

    def on_sources(self, count: int) -> np.ndarray:
        """The gating source 0 … ``count`` − 1 of each token when there are ``count`` of them, int64 [tokens].

        Not recorded: token i is on source i mod ``count``. Recorded with as many sources: as recorded. Otherwise
        recorded source s stands for the sources s·count/sources … (s + 1)·count/sources − 1, at least one, and its
        tokens are dealt to them in turn. Raises ValueError for ``count`` < 1.
        """
        if count < 1:
            raise ValueError("needs one source or more")
        if not self.sources:
            return np.arange(len(self.source), dtype=np.int64) % count
        source = self.source.astype(np.int64)
        if self.sources == count:
            return source
        first = source * count // self.sources
        run = np.maximum(1, (source + 1) * count // self.sources - first)
        order = np.argsort(source, kind="stable")
        turn = np.empty_like(source)  # how many tokens of its source came before a token
        turn[order] = np.arange(len(source)) - np.searchsorted(source[order], source[order])
        return np.asarray(first + turn % run)


@dataclass(frozen=True, slots=True)
class Skew:
    """How tokens are spread. ``topics`` groups of co-activated experts pull their tokens together with ``strength``
    (in logits); 0 topics: experts are chosen independently. ``groups`` > 1 limits a token to ``top_groups`` of equal
    expert groups, as node-limited gates do."""

    popularity: Popularity = "uniform"
    exponent: float = 1.0
    topics: int = 0
    strength: float = 2.0
    groups: int = 1
    top_groups: int = 1


def popularity_of(skew: Skew, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Probability weights of one layer's experts in random order, float [E], sum 1.

    uniform: equal; zipf: rank^−a; power_law: Pareto draws with tail index a; lognormal: exp(a · normal).
    """
    if skew.popularity == "uniform":
        weights = np.ones(experts)
    elif skew.popularity == "zipf":
        weights = rng.permutation(np.arange(1, experts + 1, dtype=float) ** -skew.exponent)
    elif skew.popularity == "power_law":
        weights = 1.0 + rng.pareto(max(skew.exponent, 0.05), experts)
    else:
        weights = np.exp(skew.exponent * rng.standard_normal(experts))
    return np.asarray(weights / weights.sum())


def generate_tokens(
    *, tokens: int, layers: int, experts: int, top_k: int, sources: int, skew: Skew, seed: int, sample: int = 0
) -> TokenTraffic:
    """Draw tokens by an exponential race from the popularity of each layer and the token's topic.

    Popularity, topics and their experts depend on ``seed`` alone; ``sample`` draws other tokens of the same
    distribution, for judging on tokens that were not optimised on. Raises ValueError for sizes that cannot be.
    """
    if not 1 <= top_k <= experts or min(tokens, layers, sources) < 1:
        raise ValueError("needs tokens, layers, sources ≥ 1 and 1 ≤ top_k ≤ experts")
    if experts % skew.groups or skew.top_groups * (experts // skew.groups) < top_k or skew.top_groups > skew.groups:
        raise ValueError("groups divide the experts, and top_groups of them hold top_k")
    source, topic = source_and_topic(tokens=tokens, sources=sources, topics=skew.topics, seed=seed, sample=sample)
    topk = np.empty((tokens, layers, top_k), dtype=np.int32)
    for layer in range(layers):
        weights, noise = layer_weights(skew, experts, seed, layer), token_noise(seed, sample, layer)
        topk[:, layer] = race(weights, topic, top_k, noise, groups=skew.groups, top_groups=skew.top_groups)
    return TokenTraffic(topk, source, experts, sources)


def source_and_topic(
    *, tokens: int, sources: int, topics: int, seed: int, sample: int
) -> tuple[np.ndarray, np.ndarray]:
    """The gating source, int32 [tokens], and the topic, int64 [tokens] (all 0 without topics), of each token."""
    draws = np.random.default_rng([seed, 1, sample])
    source = draws.integers(0, sources, tokens).astype(np.int32)
    return source, draws.integers(0, max(1, topics), tokens)


def layer_weights(skew: Skew, experts: int, seed: int, layer: int) -> np.ndarray:
    """The rates at which the experts of a layer arrive for tokens of each topic, float [topics or 1, E]; only the ratios
    in a row count."""
    shape = np.random.default_rng([seed, 0, layer])
    weights = popularity_of(skew, experts, shape)[None]
    if skew.topics:
        pull = skew.strength * shape.standard_normal((skew.topics, experts))
        weights = weights * np.exp(pull - pull.max(axis=1, keepdims=True))
    return weights


def token_noise(seed: int, sample: int, layer: int) -> np.random.Generator:
    """What the race of a layer is run with."""
    return np.random.default_rng([seed, 1, sample, layer])


_ROWS = 512  #: tokens drawn at once: their scores stay in the CPU's cache
_LEAST = 1e-30  #: what is less than this share of the largest weight counts as this: no score is 0, infinite or NaN


def race(
    weights: np.ndarray,
    kind: np.ndarray,
    top_k: int,
    rng: np.random.Generator,
    *,
    groups: int = 1,
    top_groups: int = 1,
) -> np.ndarray:
    """Draw k distinct experts for each token: the first k to arrive when expert e arrives at rate ``weights[kind, e]``.

    ``weights``: float [kinds, E]; ``kind``: int [tokens], the row of each token. The same distribution as drawing one
    expert after another in proportion to the weights without putting back (Gumbel top-k), without logarithms. With
    ``groups`` > 1 only experts of the ``top_groups`` best groups are chosen; a group counts with the sum of the
    logarithms of its two best scores. Returns int32 [tokens, k], ascending in each row.
    """
    chosen = np.empty((len(kind), top_k), dtype=np.int32)
    for start, scores in arrivals(weights, kind, rng):
        if groups > 1:
            _limit_groups(scores, groups, top_groups)
        chosen[start : start + len(scores)] = largest(scores, top_k)
    return chosen


def arrivals(weights: np.ndarray, kind: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """(first token, scores float32 [rows, E]) of a few hundred tokens after another, all above 0: the reciprocals of the
    times at which experts arrive, for rates whose largest is 1. Their logarithms are the tokens' logits: those of the
    weights and standard Gumbel noise."""
    experts = weights.shape[1]
    rates = np.maximum(weights / weights.max(axis=1, keepdims=True), _LEAST).astype(np.float32)
    for start in range(0, len(kind), _ROWS):
        rows = kind[start : start + _ROWS]
        scores = rng.standard_exponential((len(rows), experts), dtype=np.float32)
        np.maximum(scores, _LEAST, out=scores)
        np.divide(rates[rows], scores, out=scores)
        yield start, scores


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest of each row are, ascending, int [rows, k]; of equal scores the first ones."""
    rows, width = scores.shape
    bar = np.partition(scores, width - k, axis=1)[:, width - k, None]
    in_ = scores >= bar
    for row in np.flatnonzero(in_.sum(axis=1) != k).tolist():  # more than one expert exactly at the bar
        in_[row] = False
        in_[row, np.argsort(-scores[row], kind="stable")[:k]] = True
    return np.asarray(np.flatnonzero(in_).reshape(rows, k) % width)


def _limit_groups(scores: np.ndarray, groups: int, top_groups: int) -> None:
    """Set the scores outside a token's best ``top_groups`` groups to −1. The sum of two logarithms orders groups as the
    product does."""
    grouped = scores.reshape(len(scores), groups, -1)
    best = np.sort(grouped, axis=2)[:, :, -2:].astype(np.float64).prod(axis=2)
    out = np.argsort(-best, axis=1, kind="stable")[:, top_groups:]
    np.put_along_axis(grouped, out[:, :, None], -1.0, axis=1)
