"""Slot tables: which expert is in which slot of which holder, int32 [holders, slots], `EMPTY` where none is."""

from __future__ import annotations

import numpy as np

EMPTY = -1  #: stands for no expert in a slot


def copies_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expert, holder) of every copy, ordered by expert and then holder: the i-th copy of an expert in this order serves
    the i-th share of the sources. int64 [copies] each."""
    holder = np.repeat(np.arange(len(table)), table.shape[1])
    expert = table.reshape(-1).astype(np.int64)
    held = expert != EMPTY
    order = np.lexsort((holder[held], expert[held]))
    return expert[held][order], holder[held][order]


def table_of(expert: np.ndarray, holder: np.ndarray, holders: int, slots: int) -> np.ndarray:
    """The table with these copies, experts ascending on every holder and empty slots last. Raises ValueError when a
    holder has more than ``slots`` copies."""
    order = np.lexsort((expert, holder))
    expert, holder = expert[order], holder[order]
    turn = np.arange(len(holder)) - np.searchsorted(holder, holder)
    if len(turn) and turn.max() >= slots:
        raise ValueError(f"a holder has {turn.max() + 1} copies and {slots} slots")
    table = np.full((holders, slots), EMPTY, dtype=np.int32)
    table[holder, turn] = expert
    return table


def tidy(table: np.ndarray) -> np.ndarray:
    """The same copies with experts ascending on every holder and empty slots last."""
    return table_of(*copies_of(table), *table.shape)


def counts_of(table: np.ndarray, experts: int) -> np.ndarray:
    """Copies of each expert, int64 [E]."""
    return np.bincount(table[table != EMPTY], minlength=experts)


def copy_index(counts: np.ndarray, expert: np.ndarray, source: np.ndarray, sources: int) -> np.ndarray:
    """Which copy serves a token: the tokens of source s go to copy ⌊s · c ÷ sources⌋ of an expert with c copies, so that
    copies share the sources evenly and each serves neighbours. ``expert``: int [tokens, k]; ``source``: int [tokens].
    Returns the copy's number in the order of `copies_of`, int64 [tokens, k]."""
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.asarray(first[expert] + source[:, None] * counts[expert] // sources)
