"""Measured times against prices, by family."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu.rows import Rows
from planc.cost.ops import CHOICES, Costs
from planc.diagnostics import PlancError

HEADER = ("family", "rows", "measured ÷ price", "p10", "p90", "error, median", "p90", "held", "provenance")


def check(rows: Rows, costs: Costs) -> str:
    """A table of text, a line a kind, dtype and variant: rows; median, 10th and 90th percentile of measured ÷ price;
    median and 90th percentile of |price ÷ measured − 1|; the share of rows within the 90 % interval; where prices come
    from. What has no price says why."""
    lines = []
    for (kind, dtype), (at, sizes) in rows.ops.groups.items():
        columns = {name: np.array(values) for name, values in sizes.items()}
        measured = rows.seconds[np.array(at)]
        variants = _variants(columns, len(at))
        for variant in np.unique(variants):
            mine = variants == variant
            name = " ".join(word for word in (kind, dtype, str(variant)) if word)
            try:
                price = costs.price(kind, {key: value[mine] for key, value in columns.items()}, dtype)
            except (PlancError, KeyError) as error:
                codes = [d.code for d in error.diagnostics] if isinstance(error, PlancError) else ["PLN110"]
                lines.append((name, f"{mine.sum()}", f"no price ({', '.join(codes)})", *[""] * 6))
                continue
            ratio = measured[mine] / price.seconds
            held = (measured[mine] >= price.low) & (measured[mine] <= price.high)
            error_of = np.abs(1.0 / ratio - 1.0)
            words, counts = np.unique(price.provenance, return_counts=True)
            numbers = [f"{value:.2f}" for value in np.quantile(ratio, (0.5, 0.1, 0.9))]
            errors = [f"{value:.1%}" for value in np.quantile(error_of, (0.5, 0.9))]
            where = ", ".join(f"{word} {count}" for word, count in zip(words.tolist(), counts.tolist(), strict=True))
            lines.append((name, f"{mine.sum()}", *numbers, *errors, f"{held.mean():.0%}", where))
    return _text([HEADER, *sorted(lines)])


def _variants(columns: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """What splits a kind and dtype further: library, mode, or skewed experts. Text [rows]."""
    for name in CHOICES:
        if name in columns:
            return columns[name]
    if "skew" in columns:
        return np.where(columns["skew"] > 0, "skewed", "balanced")
    return np.full(rows, "")


def _text(lines: list[tuple[str, ...]]) -> str:
    """Cells in columns: words to the left, numbers to the right."""
    wide = [max(len(line[place]) for line in lines) for place in range(len(HEADER))]
    last = len(HEADER) - 1
    shown = [
        "  ".join(
            cell.ljust(wide[place]) if place in (0, last) else cell.rjust(wide[place])
            for place, cell in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*shown, ""])
