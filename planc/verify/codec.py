"""Tensors as short text, for plan.json; number lists are in `planc.units`."""

from __future__ import annotations

import re

from planc.graph import ROWS, TensorType
from planc.units import decode_numbers, encode_numbers

__all__ = ["decode_numbers", "decode_tensor", "encode_numbers"]

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
