"""One price, prices of the ops of a block, and their arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from planc.cost.ops import Prices


class Price(NamedTuple):
    """Seconds of one op: estimate, 90 % interval, floor, and the part that no size shrinks (launches, latency).
    ``family`` names what the constants are of: errors of one family are shared, those of two are not."""

    seconds: float
    low: float
    high: float
    floor: float
    fixed: float
    provenance: str
    family: str

    @classmethod
    def of(cls, values: Iterable[float], provenance: str, family: str) -> Price:
        """From the five times in their order."""
        seconds, low, high, floor, fixed = values
        return cls(seconds, low, high, floor, fixed, provenance, family)

    @property
    def times(self) -> tuple[float, float, float, float, float]:
        """Estimate, bounds, floor and fixed part."""
        return self.seconds, self.low, self.high, self.floor, self.fixed


NOTHING = Price(0.0, 0.0, 0.0, 0.0, 0.0, "derived", "none")


@dataclass(frozen=True, eq=False)
class BlockPrices:
    """Prices of the ops of one block; float [ops] each. ``parts``: the Price rows that ops are made of, summed over kernels;
    ``links`` and ``op``: int64 [uses], the link and the op of every use of a link, ``bytes``: float [uses]; empty for
    what crosses no link. Blocks alike share one object."""

    seconds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    floor: np.ndarray
    fixed: np.ndarray
    provenance: tuple[str, ...]  #: words, worst first
    family: str
    links: np.ndarray
    op: np.ndarray
    bytes: np.ndarray


PROVENANCE_ORDER = ("spec", "derived", "extrapolated", "fitted")  #: from least to most known


def price_of(found: Prices, floor: float, fixed: float, family: str, faster: float = 1.0) -> Price:
    """One row of Prices, for links ``faster`` than those it is of: all but the fixed part takes less, and the interval is as
    wide in proportion."""
    seconds, low, high = (float(getattr(found, name)[0]) for name in ("seconds", "low", "high"))
    if faster != 1.0:
        scale = (fixed + max(0.0, seconds - fixed) / faster) / seconds
        seconds, low, high = seconds * scale, low * scale, high * scale
    word = str(found.provenance[0])
    return Price(
        max(seconds, floor),
        max(low, floor),
        max(high, floor, seconds),
        floor,
        min(fixed, max(seconds, floor)),
        word,
        family,
    )


def added(parts: Sequence[Price]) -> Price:
    """Kernels one after another."""
    if not parts:
        return NOTHING
    sums = [sum(values) for values in zip(*(p.times for p in parts), strict=True)]
    word = min((p.provenance for p in parts), key=PROVENANCE_ORDER.index)
    return Price.of(sums, word, max(parts, key=lambda p: p.seconds).family)


def less(whole: Price, part: Price) -> Price:
    """What a whole has more than a part of it. Where the two are not equally sure, or one is at its floor, bounds may have
    less difference than times: they are kept in order."""
    seconds, low, high, floor, fixed = (max(0.0, a - b) for a, b in zip(whole.times, part.times, strict=True))
    floor = min(floor, seconds)
    low, high = min(max(low, floor), seconds), max(high, seconds)
    return Price(seconds, low, high, floor, min(fixed, seconds), whole.provenance, whole.family)


def times_of(price: Price, count: int) -> Price:
    return price if count == 1 else Price.of([count * v for v in price.times], price.provenance, price.family)


def block_prices(
    rows: Sequence[Price],
    links: np.ndarray | None = None,
    op: np.ndarray | None = None,
    size: np.ndarray | None = None,
) -> BlockPrices:
    seconds, low, high, floor, fixed = np.array([row.times for row in rows]).T.copy()
    none = np.zeros(0, dtype=np.int64)
    words = tuple(sorted({row.provenance for row in rows}, key=PROVENANCE_ORDER.index))
    return BlockPrices(
        seconds,
        low,
        high,
        floor,
        fixed,
        words,
        rows[0].family,
        none if links is None else links,
        none if op is None else op,
        np.zeros(0) if size is None else size,
    )
