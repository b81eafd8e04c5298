"""What the slowest rank of an EP group gets: (token, expert) pairs, active experts, rows padded to tiles.

Balanced routing spreads pairs evenly. Skewed routing follows a power law: expert loads are drawn from a density ∝
x^(−a) and the rank with the most pairs counts. The law, its limits and its rounding are those of the load generator
behind the measurements (aiconfigurator, collector/helper.py: `_generate_power_law_distribution`), so that the exponent
means the same here as there: with more pairs than experts x runs from 1 to 0.8·tokens, else from 0.01 to 2; loads are
scaled to the number of pairs and rounded; an expert serves a token once. What rounding leaves over goes to experts
without a token: to those of one rank (``packed``, the generator of TensorRT-LLM 1.3.0rc10's tables) or rank by rank in
turn (``spread``, that of 1.3.0rc20's). A fit says which. Results are means over a fixed set of draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

TILE = 16  #: rows that an expert's tokens are padded to: the smallest tile of a grouped GEMM that swaps its operands
DRAWS = 8
_CHUNK = 1 << 21  #: loads held at once


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Load of the slowest rank; float arrays of one shape."""

    rows: np.ndarray  #: (token, expert) pairs
    active: np.ndarray  #: experts with at least one token
    padded: np.ndarray  #: rows with each expert's padded up to `TILE`


def balanced(tokens: np.ndarray, top_k: np.ndarray, experts: np.ndarray, ep: np.ndarray) -> RankLoad:
    """Even routing. ``tokens`` are those of the whole EP group; all arguments float arrays of one shape."""
    local = np.ceil(experts / ep)
    rows = np.maximum(tokens * top_k * local / experts, 1.0)
    active = np.minimum(local, np.ceil(tokens * top_k * local / experts))
    return RankLoad(rows, active, active * TILE * np.ceil(rows / active / TILE))


def power_law(
    tokens: np.ndarray, top_k: np.ndarray, experts: np.ndarray, ep: np.ndarray, exponent: np.ndarray, fill: str
) -> RankLoad:
    """Skewed routing; arguments as in `balanced`, with one exponent a row and ``fill`` `packed` or `spread`."""
    keys = np.stack([experts, ep, tokens, top_k, exponent], axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    found = np.empty((len(unique), 3))
    pairs, first = unique[:, :2], 0
    while first < len(unique):  # rows are sorted by experts and ep, which share one table of draws
        last = first + int(np.searchsorted(~(pairs[first:] == pairs[first]).all(axis=1), True))
        step = max(1, _CHUNK // (DRAWS * int(pairs[first, 0])))
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            found[part] = _slowest(int(pairs[first, 0]), int(pairs[first, 1]), *unique[part, 2:].T, fill=fill)
        first = last
    rows, active, padded = found[inverse.reshape(-1)].T
    return RankLoad(rows, active, padded)


def slowest_loads(experts: int, ep: int, tokens: int, top_k: int, exponent: float, fill: str = "spread") -> np.ndarray:
    """Tokens of each expert on the rank with the most pairs, int [⌈experts ÷ ep⌉]: of the draws behind `power_law` the
    one nearest to their mean, for a measurement of what a price stands for."""
    chosen = _busiest(experts, ep, *(np.array([float(v)]) for v in (tokens, top_k, exponent)), fill=fill)[0]
    pairs = chosen.sum(axis=1)
    return np.asarray(chosen[np.abs(pairs - pairs.mean()).argmin()]).astype(int)


@lru_cache(maxsize=64)
def _uniform(experts: int) -> np.ndarray:
    """Uniform numbers, float [DRAWS, experts], the same in every run."""
    return np.random.default_rng(0).random((DRAWS, experts))


def _slowest(
    experts: int, ep: int, tokens: np.ndarray, top_k: np.ndarray, exponent: np.ndarray, *, fill: str
) -> np.ndarray:
    """Mean (pairs, active experts, padded rows) of the rank with the most pairs; float [u, 3] for [u] settings."""
    chosen = _busiest(experts, ep, tokens, top_k, exponent, fill=fill)
    padded = (np.ceil(chosen / TILE) * TILE).sum(axis=2)
    return np.asarray(np.stack([chosen.sum(axis=2), (chosen > 0).sum(axis=2), padded], axis=2).mean(axis=1))


def _busiest(
    experts: int, ep: int, tokens: np.ndarray, top_k: np.ndarray, exponent: np.ndarray, *, fill: str
) -> np.ndarray:
    """Loads of the experts of the rank with the most pairs, float [u, DRAWS, experts of a rank] for [u] settings."""
    pairs = (tokens * top_k)[:, None, None]
    dense = pairs > experts
    low = np.where(dense, 1.0, 0.01)
    high = np.where(dense, np.maximum(0.8 * tokens[:, None, None], 1.0 + 1e-9), 2.0)
    power = 1.0 - exponent[:, None, None]
    power = np.where(np.abs(power) < 1e-9, 1e-9, power)  # the limit at exponent 1 is low·(high/low)^u
    drawn = (_uniform(experts) * (high**power - low**power) + low**power) ** (1.0 / power)
    loads = np.rint(drawn / drawn.sum(axis=2, keepdims=True) * pairs)
    local = -(-experts // ep)
    short = local * ep - experts  # ranks that hold one expert less than the others
    if short:
        loads = np.concatenate([loads, np.zeros((*loads.shape[:2], short))], axis=2)
    loads = loads.reshape(*loads.shape[:2], ep, local)
    limit = tokens[:, None, None, None]
    missing = np.maximum(pairs - loads.sum(axis=(2, 3))[:, :, None], 0.0)
    missing = missing + np.maximum(loads - limit, 0.0).sum(axis=(2, 3))[:, :, None]
    loads = np.minimum(loads, limit)
    busiest = loads.sum(axis=3).argmax(axis=2)[:, :, None]
    rank = np.arange(ep)
    share = np.where(rank == busiest, missing, 0.0) if fill == "packed" else _in_turn(missing, ep)
    before = np.cumsum(loads == 0, axis=3)
    loads = loads + ((loads == 0) & (before <= share[..., None]))
    top = loads.sum(axis=3).argmax(axis=2)
    return np.asarray(np.take_along_axis(loads, top[:, :, None, None], axis=2)[:, :, 0, :])


def _in_turn(missing: np.ndarray, ep: int) -> np.ndarray:
    """``missing`` pairs dealt to ranks one by one; [u, draws, 1] → [u, draws, ep]."""
    return np.asarray(np.floor(missing / ep) + (np.arange(ep) < missing % ep))
