"""The gate of an MoE layer: router scores of synthetic tokens, and which experts a gate chooses by them.

A token's router logits are those of the traffic generator (`planc.routing.tokens`): the logarithms of the weights of its
topic, and standard Gumbel noise. So a gate without groups and bias chooses exactly the experts that the generator draws.
Everything here works on the exponentials of the logits, the odds: no logarithm is taken, and results are the same on
every machine that rounds by IEEE 754.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from planc.routing.tokens import arrivals, largest
from planc.spec.model import Moe

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Gate:
    """How a gate chooses ``top_k`` of ``experts`` by its scores; with ``groups`` > 1 only experts of a token's
    ``top_groups`` best groups. Raises ValueError for sizes that cannot be."""

    experts: int
    top_k: int
    score: Score = "softmax"
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError("needs 1 ≤ top_k ≤ experts")
        if self.experts % self.groups or not 1 <= self.top_groups <= self.groups or self.permitted < self.top_k:
            raise ValueError("groups divide the experts, and top_groups of them hold top_k")

    @property
    def permitted(self) -> int:
        """Experts that a token can choose from, after the limit of groups."""
        return self.top_groups * (self.experts // self.groups)


def gate_of(moe: Moe) -> Gate:
    """The gate of a model's MoE layers."""
    return Gate(moe.experts, moe.top_k, moe.gate, moe.groups, moe.top_groups)


def router_odds(
    weights: np.ndarray, topic: np.ndarray, top_k: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """(first token, odds float64 [rows, E]) of a few hundred tokens after another: the exponentials of their logits.

    ``weights``: float [topics, E], as `planc.routing.tokens.layer_weights` gives them; ``topic``: int [tokens], the row of
    each token. Softmax scores do not depend on a constant in the logits and sigmoid scores do, so the constant is chosen:
    the weights of a row sum to k. Then about k experts have odds above 1, and the sigmoid is steepest where it decides.
    """
    scale = top_k / (weights / weights.max(axis=1, keepdims=True)).sum(axis=1)
    for start, scores in arrivals(weights, topic, rng):
        yield start, scores * scale[topic[start : start + len(scores)], None]


def scores_of(odds: np.ndarray, score: Score) -> np.ndarray:
    """Scores of ``odds`` x = exp(logit), float [tokens, E]: sigmoid x ÷ (1 + x), or softmax x ÷ Σ x."""
    return np.asarray(odds / (1 + odds) if score == "sigmoid" else odds / odds.sum(axis=1, keepdims=True))


def choose(scores: np.ndarray, gate: Gate, bias: np.ndarray | None = None, count: int | None = None) -> np.ndarray:
    """The ``count`` (default: k) best experts of each token, best first, int64 [tokens, count]; of equals the first one.

    ``scores``: float [tokens, E]; ``bias``: float [E], added to the scores to choose by and to nothing else (arXiv
    2408.15664, eq. 3). Groups compete as in DeepSeek's gates: with the sum of the two best biased scores under sigmoid
    (DeepSeek-V3, arXiv 2412.19437, 2.1.2), with the best one under softmax (DeepSeek-V2, arXiv 2405.04434, 2.2.2).
    """
    count = count or gate.top_k
    ranked = scores if bias is None else scores + bias
    if gate.groups > 1:
        ranked = _within_groups(ranked, gate)
    if count > gate.top_k:
        return np.argsort(-ranked, axis=1, kind="stable")[:, :count]
    best = largest(ranked, count)
    order = np.argsort(-np.take_along_axis(ranked, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def _within_groups(scores: np.ndarray, gate: Gate) -> np.ndarray:
    """The scores, −∞ outside a token's best groups. Biased scores can be negative, so 0 would not keep them out."""
    grouped = scores.reshape(len(scores), gate.groups, -1)
    size = grouped.shape[2]
    if gate.score == "sigmoid" and size > 2:
        best = np.partition(grouped, size - 2, axis=2)[:, :, -2:].sum(axis=2)
    else:
        best = grouped.sum(axis=2) if gate.score == "sigmoid" else grouped.max(axis=2)
    out = np.argsort(-best, axis=1, kind="stable")[:, gate.top_groups :]
    limited = grouped.copy()
    np.put_along_axis(limited, out[:, :, None], -np.inf, axis=1)
    return limited.reshape(scores.shape)


def router_weights(scores: np.ndarray, chosen: np.ndarray, *, normalise: bool = True) -> np.ndarray:
    """The weights of the chosen experts' outputs, float [tokens, k]: their scores without any bias.

    ``normalise``: divided by their sum, as DeepSeek-V3, Mixtral and Qwen3 do; DeepSeek-V2 takes the scores as they are.
    """
    weights = np.take_along_axis(scores, chosen, axis=1)
    return weights / weights.sum(axis=1, keepdims=True) if normalise else weights


def capacity_of(gate: Gate, tokens: int, factor: float) -> int:
    """Tokens that an expert takes of a step at most: ⌈factor · tokens · k ÷ E⌉ (Switch, arXiv 2101.03961, eq. 3, and
    GShard, arXiv 2006.16668, of k choices a token). Raises ValueError for a factor that is not above 0."""
    if not factor > 0:
        raise ValueError("needs a capacity factor above 0")
    return max(1, ceil(factor * tokens * gate.top_k / gate.experts - 1e-9))  # 1.1 · 100 is more than 110 in floats


def admit(wishes: np.ndarray, gate: Gate, capacity: int) -> np.ndarray:
    """Which wishes are served when an expert takes ``capacity`` tokens of a step, bool like ``wishes``.

    ``wishes``: int [tokens, ≥ k], the experts that a token asks, in this order, until k of them have taken it. All tokens
    ask their first one before any asks its second (GShard), and of tokens that ask at once the earlier go first. With k
    wishes a token, what is refused is dropped; with more, it is passed on to the token's next best.
    """
    served = np.zeros(wishes.shape, dtype=bool)
    room = np.full(gate.experts, capacity)
    wanting = np.full(len(wishes), gate.top_k)
    for turn in range(wishes.shape[1]):
        asking = np.flatnonzero(wanting)
        if not len(asking) or not room.any():
            break
        expert = wishes[asking, turn]
        order = np.argsort(expert, kind="stable")
        queued = expert[order]
        taken = order[np.arange(len(queued)) - np.searchsorted(queued, queued) < room[queued]]
        served[asking[taken], turn] = True
        wanting[asking[taken]] -= 1
        room -= np.bincount(expert[taken], minlength=gate.experts)
    return served
