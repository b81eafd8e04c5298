"""Number lists and tensors as short text, for plan.json."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from planc.graph import ROWS, TensorType


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
    return np.array(_decode_cached(text, limit), dtype=np.int64)


_TENSOR = re.compile(r"\[([^\]]*)\] (bf16|fp16|fp8|fp32|int32) (R|P|S\([a-z]+\))")


def decode_tensor(text: str) -> TensorType:
    """The inverse of `TensorType.text`. Raises ValueError."""
    match = _TENSOR.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text[:60]}` is not a tensor such as `[64, 7168] bf16 R`")
    sizes = [part.strip() for part in match[1].split(",")]
    if len(sizes) > 8 or not all((s == "m" and n == 0) or re.fullmatch(r"[0-9]{1,12}", s) for n, s in enumerate(sizes)):
        raise ValueError(f"`{text[:60]}` has a size that is neither a number nor, in the first place, m")
    return TensorType(tuple(ROWS if s == "m" else int(s) for s in sizes), match[2], match[3])
