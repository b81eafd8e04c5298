"""How many copies each expert gets: the split of slots among experts that makes the largest share smallest."""

from __future__ import annotations

import numpy as np


def apportion(loads: np.ndarray, copies: int, most: int) -> np.ndarray:
    """Copies of each expert so that the largest load of a copy is as small as it can be.

    ``loads``: float [layers, E]; ``copies``: copies of a layer together (≥ E); ``most``: copies of one expert at most
    (a holder never has two). Returns int64 [layers, E]; rows sum to ``copies``, or to ``E * most`` if that is less.

    Exact: giving the next copy to the expert with the largest share is the optimal min-max apportionment, because the
    largest share can only fall by splitting the expert that has it.
    """
    counts = np.ones(loads.shape, dtype=np.int64)
    layers, experts = loads.shape
    share = loads.astype(float).copy()
    every = np.arange(layers)
    if most == 1:
        return counts
    for _ in range(min(copies, experts * most) - experts):
        chosen = np.argmax(share, axis=1)
        counts[every, chosen] += 1
        now = counts[every, chosen]
        share[every, chosen] = np.where(now < most, loads[every, chosen] / now, -1.0)
    return counts


def smallest_largest_share(loads: np.ndarray, copies: int, most: int) -> np.ndarray:
    """The largest load of a copy under `apportion`, float [layers]: no split of the slots has a smaller one."""
    return np.asarray((loads / apportion(loads, copies, most)).max(axis=1))


def copies_for(loads: np.ndarray, target: float) -> np.ndarray:
    """Copies of a layer needed so that no copy carries more than ``target``: Σ⌈load ÷ target⌉, int64 [layers]."""
    return np.asarray(np.maximum(1, np.ceil(loads / target - 1e-12)).sum(axis=1).astype(np.int64))
