"""Robust least squares on log errors, cross-validation, and the interval of a family's prices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from planc.cost.hardware import Hardware
from planc.cost.ops import rough

from .families import Family, Table, namespace, rounded

FOLDS = 5


@dataclass
class Judged:
    """One family on one GPU. Ratios are measured ÷ predicted."""

    family: Family
    gpu: str
    constants: dict[str, float]
    seconds: np.ndarray
    inside: np.ndarray  #: by the constants of all rows
    by_row: np.ndarray
    by_shape: np.ndarray
    covered: float
    interval: dict[str, list[float]]
    valid: dict[str, list[float]]
    source: str = ""  #: of the rows, for the fit file
    fill: str = ""  #: of skewed loads (`planc.cost.loads`)


def judge(
    family: Family,
    gpu: str,
    table: Table,
    hw: Hardware,
    constants: dict[str, float] | None = None,
    least_outside: float = 1.0,
) -> Judged:
    """Fit (or take given ``constants``), cross-validate, and find the interval, which reaches down to
    ``least_outside`` at least outside the sizes of the table. ValueError where all rows are of one shape."""
    if constants is None:
        constants = {name: rounded(name, value) for name, value in search(family, hw, table, family.start, 6).items()}
    start = {name: value if name.endswith("power") else max(value, 1e-14) for name, value in constants.items()}
    by = [folds(table, by_shape) for by_shape in (False, True)]
    by_row, by_shape = (cross_validate(family, hw, table, start, fold) for fold in by)
    apart = rough_rows(family, table.columns)
    parts = {"inside": ~apart, "rough": apart} if apart.any() and not apart.all() else {"inside": apart | True}
    interval = {}
    for word, at in parts.items():
        tail = max(0.0, 0.05 - 0.8 / at.sum())  # quantiles of few rows lie too close together
        low, high = np.quantile(by_row[at], (tail, 1.0 - tail))
        interval[word] = [min(float(low), 1.0), max(float(high), 1.0)]
    ends = np.quantile(held_out_ends(family, hw, table, start), (0.05, 0.95))
    shapes = np.quantile(by_shape, (0.05, 0.95))
    shapes, ends = np.clip(shapes, 1 / 3, 3), np.clip(ends, 1 / 3, 3)  # beyond, a fit of too few rows went astray
    low, high = interval["inside"]
    widest = [min(pair[0] for pair in interval.values()), max(pair[1] for pair in interval.values())]
    interval["outside"] = [
        min(*shapes, *ends, low**1.5, widest[0], 0.85, least_outside),
        max(*shapes, *ends, high**1.5, widest[1], 1.18),
    ]
    predicted = family.form(namespace(constants), hw, table.columns)
    return Judged(
        family,
        gpu,
        constants,
        table.seconds,
        table.seconds / predicted,
        by_row,
        by_shape,
        coverage(by_row, by[0], apart),
        {
            word: [float(f"{v:.3g}") for v in interval[word]]
            for word in ("inside", "outside", "rough")
            if word in interval
        },
        {name: [float(table.columns[name].min()), float(table.columns[name].max())] for name in family.sizes},
    )


def search(family: Family, hw: Hardware, table: Table, start: dict[str, float], tries: int = 1) -> dict[str, float]:
    """Constants that minimise a robust sum of squared log errors (soft L1 beyond 5 %); further ``tries`` start from
    points drawn around ``start``, with a fixed seed."""
    names = list(start)
    plain = np.array([name.endswith("power") for name in names])
    low = np.where(plain, -4.0, -60.0)
    high = np.array(
        [4.0 if p else 0.0 if n.endswith("efficiency") else 60.0 for n, p in zip(names, plain, strict=True)]
    )
    high = np.array([np.log(16.0) if n.endswith("overlap") else h for n, h in zip(names, high, strict=True)])
    low = np.array([np.log(0.55) if n.endswith("overlap") else v for n, v in zip(names, low, strict=True)])
    first = np.array([v if p else np.log(v) for v, p in zip(start.values(), plain, strict=True)])
    values = lambda x: dict(zip(names, np.where(plain, x, np.exp(np.where(plain, 0.0, x))).tolist(), strict=True))  # noqa: E731
    measured = np.log(table.seconds)

    def errors(x: np.ndarray) -> np.ndarray:
        return np.log(family.form(namespace(values(x)), hw, table.columns)) - measured

    rng, best = np.random.default_rng(0), None
    for attempt in range(tries):
        begin = first + (rng.normal(0.0, 0.3, len(first)) if attempt else 0.0)
        begin = np.clip(begin, low + 1e-6, high - 1e-6)
        found = least_squares(errors, begin, bounds=(low, high), loss="soft_l1", f_scale=0.05, max_nfev=200)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return values(best.x)


def folds(table: Table, by_shape: bool) -> np.ndarray:
    """Fold of every row, int [rows]: of rows one by one, or of whole shapes."""
    rng = np.random.default_rng(1)
    if not by_shape:
        return rng.permutation(len(table.seconds)) % FOLDS
    return (rng.permutation(table.shape.max() + 1) % FOLDS)[table.shape]


def cross_validate(family: Family, hw: Hardware, table: Table, start: dict[str, float], fold: np.ndarray) -> np.ndarray:
    """Measured ÷ predicted of every row, predicted by constants fitted without the row's fold."""
    ratio = np.empty(len(table.seconds))
    for one in np.unique(fold):
        at = fold == one
        if at.all():
            raise ValueError(f"{family.name}: one shape only")
        constants = search(family, hw, table.take(~at), start)
        part = table.take(at)
        ratio[at] = part.seconds / family.form(namespace(constants), hw, part.columns)
    return ratio


def held_out_ends(family: Family, hw: Hardware, table: Table, start: dict[str, float]) -> np.ndarray:
    """Measured ÷ predicted of the tenth of rows with the shortest and the tenth with the longest times (of each number
    of nodes or ranks), by constants fitted to those between: how a fit does outside its range."""
    outer = np.zeros(len(table.seconds), dtype=bool)
    members = table.columns.get("nodes", table.columns.get("ranks", np.ones(len(outer))))
    for one in np.unique(members):
        at = members == one
        low, high = np.quantile(table.seconds[at], (0.1, 0.9))
        outer |= at & ((table.seconds < low) | (table.seconds > high))
    constants = search(family, hw, table.take(~outer), start)
    part = table.take(outer)
    return np.asarray(part.seconds / family.form(namespace(constants), hw, part.columns))


def rough_rows(family: Family, s: dict[str, np.ndarray]) -> np.ndarray:
    """Rows whose interval is their own (`planc.cost.ops.rough`)."""
    return np.broadcast_to(rough(family.name, s), len(next(iter(s.values()))))


def coverage(ratio: np.ndarray, fold: np.ndarray, apart: np.ndarray) -> float:
    """Share of rows within the 5 % and 95 % quantiles of the other folds' ratios; rows of ``apart`` among themselves."""
    inside = np.empty(len(ratio), dtype=bool)
    for one in np.unique(fold):
        for group in (apart, ~apart):
            at = (fold == one) & group
            if at.any():
                others = ratio[(fold != one) & group]
                tail = max(0.0, 0.05 - 0.8 / len(others))
                low, high = np.quantile(others, (tail, 1.0 - tail))
                inside[at] = (ratio[at] >= min(low, 1.0)) & (ratio[at] <= max(high, 1.0))
    return float(inside.mean())
