"""Quantities with units: text in, exact numbers in base units out, and back to readable text.

Base units are B, B/s, FLOP/s, s and plain fractions. Prefixes are decimal (``GB`` = 1e9 B) or binary
(``GiB`` = 2**30 B). Parsing is exact: the number is read as a fraction, never through a float, so
``1.8 TB/s`` is the integer 1_800_000_000_000.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_TIME = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "µs": Fraction(1, 10**6), "μs": Fraction(1, 10**6)}
_TIME |= {"ms": Fraction(1, 1000), "s": Fraction(1)}


def _byte_units() -> dict[str, Fraction]:
    units: dict[str, Fraction] = {}
    for prefix, factor in (_DECIMAL | _BINARY).items():
        units[prefix + "B"] = Fraction(factor)
        for bit in ("b", "bit"):  # network vendors quote bits
            units[prefix + bit] = Fraction(factor, 8)
    return units


def _rate_units() -> dict[str, Fraction]:
    units = {f"{name}/s": factor for name, factor in _byte_units().items()}
    for prefix, factor in _DECIMAL.items():
        units[prefix + "Bps"] = Fraction(factor)
        units[prefix + "bps"] = Fraction(factor, 8)
    return units


def _flop_units() -> dict[str, Fraction]:
    names = ("FLOPS", "FLOP/s", "FLOPs", "Flops", "flops")
    return {prefix + name: Fraction(factor) for prefix, factor in _DECIMAL.items() for name in names}


#: dimension -> unit -> factor to the base unit
UNITS: dict[str, dict[str, Fraction]] = {
    "bytes": _byte_units(),
    "bytes_per_s": _rate_units(),
    "flops": _flop_units(),
    "seconds": dict(_TIME),
    "fraction": {"%": Fraction(1, 100), "": Fraction(1)},
}
EXAMPLES = {
    "bytes": "64 GB",
    "bytes_per_s": "1.8 TB/s",
    "flops": "400 TFLOPS",
    "seconds": "100 us",
    "fraction": "80 %",
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(.*?)\s*", re.DOTALL | re.ASCII)


def parse_quantity(value: object, dimension: str) -> int | float:
    """Read ``value`` as a quantity of ``dimension`` (a key of `UNITS`) in base units.

    Returns an int when the result is whole, else a float. A bare number is accepted for fractions only:
    everything else needs its unit, because "64" could be GB or GiB.

    Raises ValueError with the reason and an example of the right form.
    """
    example = EXAMPLES[dimension]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected a quantity such as `{example}`")
    text = repr(value) if isinstance(value, (int, float)) else value
    match = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        raise ValueError(f"`{text[:40]}` is not a number with a unit such as `{example}`")
    number, unit = match.groups()
    units = UNITS[dimension]
    if not unit and "" not in units:
        raise ValueError(f"`{text}` has no unit; write it like `{example}`")
    if unit not in units:
        raise ValueError(f"unknown unit `{unit}`; write it like `{example}`")
    exact = Fraction(number.replace("_", "")) * units[unit]
    return int(exact) if exact.denominator == 1 else float(exact)


def _scaled(value: float, unit: str, step: int = 1000, digits: int = 4) -> str:
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    index = 0
    scaled = float(value)
    while abs(scaled) >= step * 0.99995 and index < len(prefixes) - 1:
        scaled /= step
        index += 1
    text = f"{scaled:.{digits}g}"
    if "e" in text:
        text = f"{scaled:.0f}"
    return f"{text} {prefixes[index]}{unit}"


def format_bytes(value: float) -> str:
    """``58720256`` -> ``58.72 MB`` (decimal, four significant digits)."""
    return _scaled(value, "B")


def format_rate(value: float) -> str:
    """Bytes per second as text, decimal: ``1.8 TB/s``."""
    return _scaled(value, "B/s")


def format_flops(value: float) -> str:
    """FLOP per second as text: ``400 TFLOPS``."""
    return _scaled(value, "FLOPS")


def format_seconds(value: float) -> str:
    """Seconds as text with the unit that keeps the number readable: ``2.366 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= factor or unit == "us":
            return f"{value / factor:.4g} {unit}"
    raise AssertionError("unreachable: the last unit always returns")


def format_count(value: float) -> str:
    """A count of parameters or FLOP: ``671.03 B`` style, five significant digits."""
    for suffix, factor in ((" T", 1e12), (" B", 1e9), (" M", 1e6)):
        if abs(value) >= factor:
            return f"{value / factor:.5g}{suffix}"
    return f"{value:,.0f}"


def counted(number: int, what: str) -> str:
    """``1 entry``, ``1,024 entries``."""
    plural = what[:-1] + "ies" if what.endswith("y") else what + "s"
    return f"{number:,} {what if number == 1 else plural}"


def split_evenly(total: int, parts: int) -> list[int]:
    """``total`` items in ``parts`` shares that differ by at most one, larger shares first."""
    share, rest = divmod(total, parts)
    return [share + 1] * rest + [share] * (parts - rest)


# --- number lists as short text ---------------------------------------------------------------------------------------


def encode_numbers(numbers: list[int]) -> str:
    """Runs of a number list: ``0-63`` counts up, ``0-120/8`` in steps of 8, ``16x64`` repeats 16 64 times."""
    parts, i, n = [], 0, len(numbers)
    while i < n:
        step = numbers[i + 1] - numbers[i] if i + 1 < n else 0
        j = i + 1
        while j < n and numbers[j] - numbers[j - 1] == step and step >= 0:
            j += 1
        if step > 0 and j - i < 3:  # two numbers are no run; the second may begin the next one
            j = i + 1
        first, last, length = numbers[i], numbers[j - 1], j - i
        if length == 1:
            parts.append(str(first))
        elif step == 0:
            parts.append(f"{first}x{length}")
        else:
            parts.append(f"{first}-{last}" + (f"/{step}" if step > 1 else ""))
        i = j
    return ",".join(parts)


_RUN = re.compile(r"(\d{1,9})(?:x(\d{1,9})|-(\d{1,9})(?:/(\d{1,9}))?)?", re.ASCII)


@lru_cache(maxsize=4096)
def _decode_cached(text: str, limit: int) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split(",") if text else ():
        match = _RUN.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"`{part[:40]}` is not a number, a run such as `0-63`, `0-120/8` or `16x64`")
        first, times, last, step = match.groups()
        if times:
            length = int(times)
        else:
            stride = int(step or 1)
            if stride == 0 or (last and int(last) < int(first)):
                raise ValueError(f"the run `{part[:40]}` goes nowhere")
            length = (int(last) - int(first)) // stride + 1 if last else 1
        if len(numbers) + length > limit:
            raise ValueError(f"more than {limit:,} numbers")
        numbers.extend([int(first)] * length if times else range(int(first), int(last or first) + 1, int(step or 1)))
    return tuple(numbers)


def decode_numbers(text: str, limit: int = 4_000_000) -> np.ndarray:
    """The inverse of `encode_numbers`, int64. Raises ValueError."""
    import numpy as np  # here, so that whoever only parses quantities does not wait for it

    return np.array(_decode_cached(text, limit), dtype=np.int64)
