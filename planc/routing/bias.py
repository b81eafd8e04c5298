"""Load balancing by gate bias: steps of tokens through a gate, with a bias that follows the loads and without one.

After each step every expert's bias goes up if it had fewer tokens than the mean and down if it had more (auxiliary-loss-free
balancing: arXiv 2408.15664, used by DeepSeek-V3, arXiv 2412.19437). Both gates see the same tokens, so that every
difference is the bias's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planc.routing.gate import Gate, admit, capacity_of, choose, router_odds, scores_of
from planc.routing.tokens import source_and_topic, token_noise

Rule = Literal["sign", "proportional"]
Overflow = Literal["drop", "next"]


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens of one MoE layer over time. ``weights``: float [topics or 1, E], see `planc.routing.tokens.layer_weights`;
    ``tokens`` of a step; ``drift``: standard deviation, in logits, of what is added to the log popularity of each expert
    from one step to the next (a random walk: after n steps drift · √n). ``seed``, ``layer`` (row among MoE layers) and ``sources``
    decide the tokens: without drift, step s has those of sample s of `generate_tokens`."""

    weights: np.ndarray
    tokens: int
    drift: float = 0.0
    seed: int = 0
    layer: int = 0
    sources: int = 1


@dataclass(frozen=True, eq=False)
class Run:
    """What one gate did. Int64 [steps, E]: ``loads``, tokens that chose an expert, and ``served``, tokens that it took
    (the same without a capacity). Int64 [steps], counts of (token, choice) pairs: ``changed``, not chosen by the unbiased
    gate; ``passed_on``, served by an expert after the token's k best; ``dropped``, served by none. ``weight_lost``: float
    [steps], mean over tokens of 1 − scores of the experts that serve it ÷ scores of the k that the unbiased gate chooses."""

    loads: np.ndarray
    served: np.ndarray
    changed: np.ndarray
    passed_on: np.ndarray
    dropped: np.ndarray
    weight_lost: np.ndarray


@dataclass(frozen=True, eq=False)
class Balanced:
    """``before``: the gate without bias, ``after``: with it, on the same tokens. ``bias``: float [steps + 1, E], at the start
    of every step and after the last; ``capacity``: tokens of an expert and step, None without a limit."""

    gate: Gate
    stream: Stream
    before: Run
    after: Run
    bias: np.ndarray
    capacity: int | None


def balance(
    gate: Gate,
    stream: Stream,
    *,
    steps: int,
    rate: float,
    rule: Rule = "sign",
    capacity_factor: float | None = None,
    overflow: Overflow = "drop",
    progress: Callable[[int, int], None] | None = None,
) -> Balanced:
    """Send ``steps`` steps of tokens through the gate, and adjust its bias after each, starting from none.

    ``rate``: see `adjusted`. ``capacity_factor``: see `capacity_of`; what an expert has no room for is dropped, or passed on
    to the token's next best that has (``overflow``). The bias follows the choices, not what the capacity leaves of them.
    ``progress`` is called with (steps done, of how many).
    The same arguments give the same arrays. Raises ValueError for fewer than one step or token, and like `capacity_of`.
    """
    if min(steps, stream.tokens) < 1:
        raise ValueError("needs steps and tokens ≥ 1")
    capacity = None if capacity_factor is None else capacity_of(gate, stream.tokens, capacity_factor)
    wishes = gate.permitted if capacity is not None and overflow == "next" else gate.top_k
    before, after = _empty(steps, gate.experts), _empty(steps, gate.experts)
    bias = np.zeros((steps + 1, gate.experts))
    walk = popularity_walk(stream, steps)
    for step in range(steps):
        plain, ours, best = _choices(gate, stream, step, stream.weights * walk[step], bias[step], wishes)
        _record(before, step, plain, plain, best, gate, capacity)
        _record(after, step, ours, plain, best, gate, capacity)
        bias[step + 1] = adjusted(bias[step], after.loads[step], rate, rule)
        if progress is not None:
            progress(step + 1, steps)
    return Balanced(gate, stream, before, after, bias, capacity)


def adjusted(bias: np.ndarray, loads: np.ndarray, rate: float, rule: Rule = "sign") -> np.ndarray:
    """The bias for the next step, float [E]: b + rate · sign(mean − load) (arXiv 2408.15664, algorithm 1), or with the rule
    ``proportional`` b + rate · (mean − load) ÷ mean (its variant by the size of the error, here relative to the mean, so that
    a rate means the same for any number of tokens). ``loads``: [E] of the step just gone; ``rate``: in scores a step."""
    mean = loads.mean()
    error = np.sign(mean - loads) if rule == "sign" else (mean - loads) / mean
    return np.asarray(bias + rate * error)


def popularity_walk(stream: Stream, steps: int) -> np.ndarray:
    """What the weights are multiplied with in each step, float [steps, E]: 1 in the first, then exp of a random walk."""
    moves = np.random.default_rng([stream.seed, 3, stream.layer]).standard_normal((steps, stream.weights.shape[1]))
    moves[0] = 0
    return np.asarray(np.exp(stream.drift * np.cumsum(moves, axis=0)))


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Choices:
    """``wishes``: int [tokens, ≥ k], best first; ``scores``: of them, without bias, float like it."""

    wishes: np.ndarray
    scores: np.ndarray


def _choices(
    gate: Gate, stream: Stream, step: int, weights: np.ndarray, bias: np.ndarray, wishes: int
) -> tuple[_Choices, _Choices, np.ndarray]:
    """The step's choices without the bias and with it, and what the k best of each token score, float [tokens]."""
    _, topic = source_and_topic(
        tokens=stream.tokens, sources=stream.sources, topics=len(weights), seed=stream.seed, sample=step
    )
    noise = token_noise(stream.seed, step, stream.layer)
    made = [
        _Choices(np.empty((stream.tokens, wishes), dtype=np.int32), np.empty((stream.tokens, wishes))) for _ in range(2)
    ]
    for start, odds in router_odds(weights, topic, gate.top_k, noise):
        scores = scores_of(odds, gate.score)
        rows = slice(start, start + len(odds))
        for part, added in zip(made, (None, bias), strict=True):
            part.wishes[rows] = choose(scores, gate, added, wishes)
            part.scores[rows] = np.take_along_axis(scores, part.wishes[rows].astype(np.int64), axis=1)
    plain, ours = made
    return plain, ours, plain.scores[:, : gate.top_k].sum(axis=1)


def _record(
    run: Run, step: int, made: _Choices, plain: _Choices, best: np.ndarray, gate: Gate, capacity: int | None
) -> None:
    """Write the step into the run. ``best``: scores of the unbiased gate's k experts of each token, float [tokens]."""
    chosen = made.wishes[:, : gate.top_k]
    served = np.ones(chosen.shape, dtype=bool) if capacity is None else admit(made.wishes, gate, capacity)
    run.loads[step] = np.bincount(chosen.reshape(-1), minlength=gate.experts)
    run.served[step] = np.bincount(made.wishes[served], minlength=gate.experts)
    kept = (chosen[:, :, None] == plain.wishes[:, None, : gate.top_k]).any(axis=2)
    run.changed[step] = kept.size - kept.sum()
    run.passed_on[step] = served[:, gate.top_k :].sum()
    run.dropped[step] = chosen.size - served.sum()
    run.weight_lost[step] = (1 - (made.scores * served).sum(axis=1) / best).mean()


def _empty(steps: int, experts: int) -> Run:
    loads, served = np.zeros((2, steps, experts), dtype=np.int64)
    changed, passed_on, dropped = np.zeros((3, steps), dtype=np.int64)
    return Run(loads, served, changed, passed_on, dropped, np.zeros(steps))


# --- measures ---------------------------------------------------------------------------------------------------------


def imbalance(loads: np.ndarray) -> np.ndarray:
    """Largest load ÷ mean load along the last axis, float [...]: 1 is even."""
    return np.asarray(loads.max(axis=-1) / loads.mean(axis=-1))


def variance(loads: np.ndarray) -> np.ndarray:
    """Variance of the loads along the last axis, in tokens², float [...]: mean square of the distance from the mean."""
    return np.asarray(loads.var(axis=-1))


def gpu_loads(loads: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Tokens of each GPU, float [steps, GPUs]. ``loads``: [steps, E]; ``table``: int [GPUs, slots], the expert in each slot
    and −1 in empty ones. Copies of an expert share its tokens evenly. Raises ValueError for an expert without a copy."""
    gpu, slot = np.nonzero(table >= 0)
    held = np.zeros((len(table), loads.shape[-1]))
    np.add.at(held, (gpu, table[gpu, slot]), 1.0)
    copies = held.sum(axis=0)
    if not copies.all():
        raise ValueError("every expert needs a copy")
    return np.asarray(loads @ (held / copies).T)


def even_imbalance(gate: Gate, tokens: int, *, samples: int = 200, seed: int = 0) -> float:
    """The imbalance per expert that chance alone leaves when every expert is as likely as any other: the mean over
    ``samples`` steps of binomial loads. No bias that is fixed before a step can be expected to do better."""
    loads = np.random.default_rng([seed, 4]).binomial(tokens, gate.top_k / gate.experts, (samples, gate.experts))
    return float((loads.max(axis=1) * gate.experts / (tokens * gate.top_k)).mean())
