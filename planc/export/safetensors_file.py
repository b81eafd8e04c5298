"""Safetensors files: an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps.

Only headers are held in memory; tensors are copied as spans of bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.text import decode, parse_json

#: element type -> bits
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
METADATA = "__metadata__"
CHUNK = 4 << 20  #: bytes of a tensor held at a time
_LONGEST_HEADER = 100_000_000
_MOST_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class Tensor:
    """``start`` and ``end``: bytes from where the data of its file begins."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A file's header: tensors by name, in the order of the header; ``data``: the byte at which their data begins; ``state``:
    what tells whether the file is still the same."""

    path: Path
    data: int
    metadata: dict[str, str] | None
    tensors: dict[str, Tensor]
    state: tuple[int, ...]


def _state(handle: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(handle.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: Path) -> Shard:
    """The header of a safetensors file. Raises PlancError: PLN001, and PLN505 for a file that its header does not describe
    byte by byte."""
    try:
        if not path.is_file():
            raise damaged(path, "it is no file")
        with path.open("rb") as handle:
            state = _state(handle)
            size = state[2]
            length = int.from_bytes(handle.read(8), "little") if size >= 8 else 0
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise damaged(path, f"its {size} bytes do not begin with the length of a header")
            text = handle.read(length)
            if not text.startswith(b"{"):
                raise damaged(path, "its header does not begin with `{`")
    except OSError as error:
        raise PlancError([Diagnostic("PLN001", f"cannot read {path}: {error.strerror}")]) from None
    try:
        record = parse_json(decode(text, str(path)), str(path))
    except PlancError as error:
        raise damaged(path, f"its header cannot be read ({error.diagnostics[0].message})") from None
    metadata = record.pop(METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise damaged(path, f"{METADATA} is not a mapping of texts")
    if any(not name.isprintable() for name in record):
        raise damaged(path, "the name of a tensor has unprintable characters")
    tensors = {name: _tensor(path, name, entry) for name, entry in record.items()}
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            raise damaged(path, f"`{name[:80]}` begins at byte {tensor.start} of the data and not at {at}")
        at = tensor.end
    if 8 + length + at != size:
        raise damaged(path, f"it has {size} bytes, and its header tells of {8 + length + at}")
    return Shard(path, 8 + length, metadata, tensors, state)


def _tensor(path: Path, name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"`{name[:80]}` has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"`{name[:80]}` has the unknown dtype {str(dtype)[:20]}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > _MOST_DIMENSIONS:
        raise damaged(path, f"`{name[:80]}` has a shape or data_offsets that are not whole numbers")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise damaged(path, f"`{name[:80]}`: {dtype} {shape} is not {offsets[1] - offsets[0]} bytes")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def header_bytes(metadata: dict[str, str] | None, tensors: dict[str, Tensor]) -> bytes:
    """Length and header, padded with spaces so that the data begins at a multiple of 8."""
    record: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    for name, tensor in tensors.items():
        offsets = [tensor.start, tensor.end]
        record[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_spans(shard: Shard, target: IO[bytes], spans: Iterable[tuple[int, int]]) -> None:
    """Append spans (first byte, bytes) of the file to ``target``, a chunk at a time. Raises PlancError PLN505 where the file
    ends before a span does, or is not the one any more that the header was read from."""
    buffer = memoryview(bytearray(CHUNK))
    with shard.path.open("rb", buffering=0) as source:
        for first, size in spans:
            source.seek(first)
            rest = size
            while rest:
                got = source.readinto(buffer[: min(rest, CHUNK)])
                if not got:
                    raise damaged(shard.path, f"it ends {rest} bytes before byte {first + size}")
                target.write(buffer[:got])
                rest -= got
        if _state(source) != shard.state:
            raise damaged(shard.path, "it was changed while it was copied")


def damaged(path: Path, message: str) -> PlancError:
    """PLN505 for a file."""
    hint = "download the file again, and compare its size and checksum with those of its source"
    return PlancError([Diagnostic("PLN505", f"{path.name}: {message}", span=Span(str(path), 1, 1), hint=hint)])
