"""Recorded or generated routing: which experts each sampled token chose in each layer, and where the token was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Popularity = Literal["uniform", "zipf", "lognormal", "power_law"]


@dataclass(frozen=True, eq=False)
class TokenTraffic:
    """``topk``: int32 [tokens, layers, k], distinct experts of each token in each MoE layer (in layer order);
    ``source``: int32 [tokens], the gating source (0 … sources − 1) that routes the token; ``experts``: E."""

    topk: np.ndarray
    source: np.ndarray
    experts: int

    def loads(self) -> np.ndarray:
        """Tokens of each expert, int64 [layers, E]."""
        layers = self.topk.shape[1]
        keys = np.arange(layers)[None, :, None] * self.experts + self.topk
        return np.bincount(keys.reshape(-1), minlength=layers * self.experts).reshape(layers, self.experts)

    def split(self, share: float) -> tuple[TokenTraffic, TokenTraffic]:
        """The first ``share`` of the tokens, and the rest: to optimise on one and judge on the other."""
        cut = max(1, min(len(self.source) - 1, round(len(self.source) * share)))
        return (
            TokenTraffic(self.topk[:cut], self.source[:cut], self.experts),
            TokenTraffic(self.topk[cut:], self.source[cut:], self.experts),
        )


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
    """Draw tokens by Gumbel top-k from the popularity of each layer and the token's topic.

    Popularity, topics and their experts depend on ``seed`` alone; ``sample`` draws other tokens of the same
    distribution, for judging on tokens that were not optimised on. Raises ValueError for sizes that cannot be.
    """
    if not 1 <= top_k <= experts or min(tokens, layers, sources) < 1:
        raise ValueError("needs tokens, layers, sources ≥ 1 and 1 ≤ top_k ≤ experts")
    if experts % skew.groups or skew.top_groups * (experts // skew.groups) < top_k or skew.top_groups > skew.groups:
        raise ValueError("groups divide the experts, and top_groups of them hold top_k")
    draws = np.random.default_rng([seed, 1, sample])
    source = draws.integers(0, sources, tokens).astype(np.int32)
    topic = draws.integers(0, max(1, skew.topics), tokens)
    topk = np.empty((tokens, layers, top_k), dtype=np.int32)
    for layer in range(layers):
        shape = np.random.default_rng([seed, 0, layer])
        logits = np.log(popularity_of(skew, experts, shape))
        scores = np.broadcast_to(logits.astype(np.float32), (tokens, experts)).copy()
        if skew.topics:
            pull = skew.strength * shape.standard_normal((skew.topics, experts))
            scores += pull[topic].astype(np.float32)
        scores -= np.log(-np.log(draws.random((tokens, experts), dtype=np.float32) + 1e-12) + 1e-12)
        if skew.groups > 1:
            _limit_groups(scores, skew)
        topk[:, layer] = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    topk.sort(axis=2)
    return TokenTraffic(topk, source, experts)


def _limit_groups(scores: np.ndarray, skew: Skew) -> None:
    """Rule out the experts outside a token's best ``top_groups`` groups (a group counts with its two best scores)."""
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, skew.groups, experts // skew.groups)
    best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    order = np.argsort(-best, axis=1, kind="stable")[:, skew.top_groups :]
    np.put_along_axis(grouped, order[:, :, None], -np.inf, axis=1)
