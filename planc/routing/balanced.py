"""Balanced routing: token i of an EP group chooses experts i·k … i·k + k − 1 (mod E).

That is the most even routing there is: every token has k distinct experts, every expert the same number of
tokens within one, and all counts are whole, so that bytes can be conserved exactly.
"""

from __future__ import annotations

import numpy as np

from planc.units import split_evenly


def balanced_counts(tokens: np.ndarray, top_k: int, experts: int) -> np.ndarray:
    """Tokens from each source to each expert.

    ``tokens``: int [sources], tokens of each source. Returns int64 [sources, experts]; row s sums to
    ``tokens[s] * top_k``, and column sums differ by at most one.
    """
    ends = np.cumsum(tokens.astype(np.int64) * top_k)
    return np.diff(_reached(np.concatenate([[0], ends]), experts), axis=0)


def _reached(choices: np.ndarray, experts: int) -> np.ndarray:
    """[n, experts]: of the first ``choices[n]`` choices, how many fell on each expert (choice j on j mod E)."""
    rounds, rest = np.divmod(choices, experts)
    return rounds[:, None] + (np.arange(experts) < rest[:, None])


def share_counts(counts: np.ndarray, copies: int) -> np.ndarray:
    """Split one expert's tokens among its copies: the first of ``copies`` equal parts goes to the first copy, and so on.

    Copies are in rank order as sources are, so each serves the sources of its own part of the ranks, and parts differ by
    at most one token. ``counts``: int [sources]. Returns int64 [sources, copies] with the same row sums.
    """
    ends = np.cumsum(counts.astype(np.int64))
    cuts = np.cumsum(split_evenly(int(ends[-1]), copies))
    reached = np.minimum(ends[:, None], cuts[None, :])  # [sources, copies]: of these tokens, how many come before both
    upto = np.diff(np.concatenate([np.zeros((len(ends), 1), dtype=np.int64), reached], axis=1), axis=1)
    return np.diff(np.concatenate([np.zeros((1, copies), dtype=np.int64), upto], axis=0), axis=0)
