"""Chakra execution traces as bytes: the parts of protobuf's wire format that they use, written and strictly read.

A file is a `GlobalMetadata` message and any number of `Node` messages, each after its length as a varint. Numbers of fields
and of types are those of `schema/protobuf/et_def.proto` in mlcommons/chakra at 6dc63e1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache

#: types of nodes
COMP, SEND, RECV, COLL = 4, 5, 6, 7
NODE_NAMES = {
    0: "INVALID",
    1: "METADATA",
    2: "MEM_LOAD",
    3: "MEM_STORE",
    COMP: "COMP",
    SEND: "SEND",
    RECV: "RECV",
    COLL: "COLL",
}
#: kinds of collectives
ALL_REDUCE, ALL_GATHER, BROADCAST, ALL_TO_ALL, REDUCE_SCATTER = 0, 2, 5, 6, 7
COMM_NAMES = {
    ALL_REDUCE: "ALL_REDUCE",
    1: "REDUCE",
    ALL_GATHER: "ALL_GATHER",
    3: "GATHER",
    4: "SCATTER",
    BROADCAST: "BROADCAST",
    ALL_TO_ALL: "ALL_TO_ALL",
    REDUCE_SCATTER: "REDUCE_SCATTER",
    8: "REDUCE_SCATTER_BLOCK",
    9: "BARRIER",
}
#: field of an attribute's value
INT32, INT64, UINT64, BOOL, STRING = 7, 9, 13, 27, 29

Value = int | float | bool | str
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  #: wire types
_SCALARS = {3: _FIXED64, 5: _FIXED32, INT32: _VARINT, INT64: _VARINT, 11: _VARINT, UINT64: _VARINT, BOOL: _VARINT}
_LONGEST = 10  #: bytes of a varint


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a rank's trace. ``micros``: its duration, µs; ``attributes``: those with a single value."""

    id: int
    name: str
    type: int
    ctrl_deps: tuple[int, ...] = ()
    data_deps: tuple[int, ...] = ()
    micros: int = 0
    attributes: Mapping[str, Value] = field(default_factory=dict)


# --- writing ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def varint(number: int) -> bytes:
    """A whole number from 0 on, seven bits a byte, the least first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _number(at: int, value: int) -> bytes:
    return varint(at << 3 | _VARINT) + varint(value)


def _bytes(at: int, content: bytes) -> bytes:
    return varint(at << 3 | _LENGTH) + varint(len(content)) + content


def attribute(name: str, kind: int, value: int | str) -> bytes:
    """The field of a node, or of the metadata with ``at`` 2, that holds an attribute. ``kind``: the field of its value."""
    return _bytes(10, _attribute(name, kind, value))


def _attribute(name: str, kind: int, value: int | str) -> bytes:
    told = _bytes(kind, value.encode()) if isinstance(value, str) else _number(kind, value)
    return _bytes(1, name.encode()) + told  # a member of a oneof is written even where it is 0


def metadata(values: Mapping[str, int | str]) -> bytes:
    """The first message of a file, with its length. Numbers become int64 attributes."""
    parts = (
        _bytes(2, _attribute(name, STRING if isinstance(value, str) else INT64, value))
        for name, value in values.items()
    )
    return delimited(_bytes(1, b"0.0.4") + b"".join(parts))


@cache
def head(name: str, kind: int) -> bytes:
    """Name and type of a node."""
    return _bytes(2, name.encode()) + _number(3, kind)


def node(number: int, begin: bytes, ctrl: Iterable[int], data: Iterable[int], rest: bytes) -> bytes:
    """A node with its length. ``begin``: its `head`; ``rest``: its duration and attributes."""
    parts = [b"\x08", varint(number), begin]
    for at, deps in ((4, ctrl), (5, data)):
        packed = b"".join(map(varint, deps))
        if packed:
            parts.append(_bytes(at, packed))
    parts.append(rest)
    return delimited(b"".join(parts))


def duration(micros: int) -> bytes:
    """The field with a node's duration, µs."""
    return _number(7, micros)


def delimited(message: bytes) -> bytes:
    """A message with its length."""
    return varint(len(message)) + message


# --- reading ----------------------------------------------------------------------------------------------------------


def parse(content: bytes) -> tuple[dict[str, Value], list[Node]]:
    """(attributes of the metadata, nodes in the order of the file). Raises ValueError with what is wrong with the bytes;
    fields that are not known are passed over."""
    messages = list(_messages(content))
    if not messages:
        raise ValueError("the file is empty")
    about = dict(_read_attribute(part) for at, part in _fields(messages[0]) if at == 2 and _is_bytes(part, "attr"))
    return {k: v for k, v in about.items() if v is not None}, [_read_node(message) for message in messages[1:]]


def _messages(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        size, at = _read_varint(content, at)
        if at + size > len(content):
            raise ValueError(f"a message of {size} bytes ends after {len(content) - at}")
        yield content[at : at + size]
        at += size


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    """(the number, where it ends)."""
    number = 0
    for place in range(_LONGEST):
        if at + place >= len(content):
            raise ValueError("a number is cut off")
        byte = content[at + place]
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            if number >> 64:
                break
            return number, at + place + 1
    raise ValueError("a number is longer than 64 bits")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields: a number for a varint, bytes for everything else."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire, number = key & 7, key >> 3
        if number == 0:
            raise ValueError("a field has number 0")
        if wire == _VARINT:
            value, at = _read_varint(message, at)
            yield number, value
            continue
        if wire == _LENGTH:
            size, at = _read_varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"field {number} has wire type {wire}")
        if at + size > len(message):
            raise ValueError(f"field {number} is cut off")
        yield number, message[at : at + size]
        at += size


def _is_bytes(value: int | bytes, name: str) -> bool:
    if not isinstance(value, bytes):
        raise ValueError(f"`{name}` is a number")
    return True


def _read_node(message: bytes) -> Node:
    numbers = {1: 0, 3: 0, 6: 0, 7: 0}
    name, deps = "", {4: [], 5: []}  # type: ignore[var-annotated]
    attributes: dict[str, Value] = {}
    for at, value in _fields(message):
        if at in numbers:
            if isinstance(value, bytes):
                raise ValueError(f"field {at} of a node is no number")
            numbers[at] = value
        elif at in deps:
            deps[at] += [value] if isinstance(value, int) else _packed(value)
        elif at in (2, 8, 9, 10):
            if isinstance(value, int):
                raise ValueError(f"field {at} of a node is a number")
            if at == 2:
                name = value.decode()  # a UnicodeDecodeError is a ValueError
            elif at == 10:
                key, told = _read_attribute(value)
                if told is not None:
                    attributes[key] = told
    if not numbers[3]:
        raise ValueError("a node has no type")
    return Node(numbers[1], name, numbers[3], tuple(deps[4]), tuple(deps[5]), numbers[7], attributes)


def _packed(content: bytes) -> list[int]:
    found, at = [], 0
    while at < len(content):
        number, at = _read_varint(content, at)
        found.append(number)
    return found


@lru_cache(maxsize=1 << 16)
def _read_attribute(message: int | bytes) -> tuple[str, Value | None]:
    """(name, value), None where it is a list or of a kind that is not known. Most are the same in many nodes."""
    assert isinstance(message, bytes)
    name, value = "", None
    for at, told in _fields(message):
        if at in _SCALARS:
            value = _scalar(at, told)
        elif at in (1, STRING):
            if isinstance(told, int):
                raise ValueError(f"field {at} of an attribute is a number")
            name, value = (told.decode(), value) if at == 1 else (name, told.decode())
    return name, value


def _scalar(at: int, told: int | bytes) -> Value:
    wire = _VARINT if isinstance(told, int) else {4: _FIXED32, 8: _FIXED64}.get(len(told), _LENGTH)
    if wire != _SCALARS[at]:
        raise ValueError(f"field {at} of an attribute has another wire type")
    if isinstance(told, bytes):
        return float(struct.unpack("<d" if at == 3 else "<f", told)[0])
    if at == BOOL:
        return bool(told)
    return told - (1 << 64) if at in (INT32, INT64) and told >> 63 else told
