"""A traffic file as named arrays of numbers: npz, npy, JSON, or JSON lines.

Nothing in a file is trusted: pickles are never opened, and what a file claims about its sizes is checked before memory is
taken for it.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.spec.text import decode, parse_json
from planc.units import counted

MAX_FILE_BYTES = 2_000_000_000
MAX_JSON_BYTES = 512_000_000  # one JSON value becomes many Python objects
MAX_ARRAY_BYTES = 8_000_000_000  # all arrays of an npz, unpacked
MOST_FAULTS = 5  #: faults of one kind that are shown


_LOADS = ((2, 3), "[layers, experts] or [steps, layers, experts]")
#: key -> the numbers of dimensions it may have, and its axes in words
_SHAPES = {
    "topk_ids": ((3,), "[tokens, layers, k]"),
    "topk_ids of a line": ((2,), "[layers, k]"),
    "source_rank": ((1,), "[tokens]"),
    "experts": ((0, 1), "one number"),
    "num_experts": ((0, 1), "one number"),
    "logical_count": _LOADS,
    "logical_expert_load": _LOADS,
    "expert_load": _LOADS,
    "weight": _LOADS,
    "physical_to_logical_map": ((2,), "[layers, physical experts]"),
    "phy2log": ((2,), "[layers, physical experts]"),
}
#: what a file is about, the first of these that it has -> what may stand beside it
_KEYS = {
    "topk_ids": ("source_rank", "experts", "num_experts"),
    "logical_count": (),
    "logical_expert_load": (),
    "expert_load": ("physical_to_logical_map",),
    "weight": (),
}
_KEYS_HINT = "planc reads the keys " + ", ".join(f"`{key}`" for key in _KEYS)
_WHOLE = {
    "topk_ids",
    "topk_ids of a line",
    "source_rank",
    "experts",
    "num_experts",
    "physical_to_logical_map",
    "phy2log",
}
_NPZ_HINT = 'save plain arrays of numbers: np.savez("trace.npz", topk_ids=np.asarray(ids, dtype=np.int32))'
_KINDS_HINT = "planc reads .npz, .npy, .jsonl and .json files; " + _KEYS_HINT.removeprefix("planc reads ")
_TWO_OBJECTS = re.compile(rb"\s*\{[^\n]*\}[ \t\r]*\n\s*\{")  # an object on one line and then another
#: what reading a damaged zip raises, by its documentation and by trying
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
)


class Opened(NamedTuple):
    """A file as arrays of numbers, with the key it is about and, of JSON lines, the line of each token."""

    file: str
    key: str
    arrays: dict[str, np.ndarray]
    lines: list[int] | None = None


def open_arrays(data: bytes, file: str) -> Opened:
    """The file's arrays, by what its first bytes are; its ending only decides what text is."""
    ending = Path(file).suffix.lower()
    head = data[:4096].removeprefix(b"\xef\xbb\xbf")
    if data[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _open_npz(data, file)
    if data.startswith(b"\x93NUMPY"):
        return Opened(file, "weight", {"weight": npy_array(data, "weight", file)})
    if ending in (".jsonl", ".ndjson") or _TWO_OBJECTS.match(data):
        return _open_lines(data, file)
    if data.strip() and (ending == ".json" or head.lstrip()[:1] in (b"{", b"[")):
        return _open_json(data, file)
    if ending in (".pt", ".pth"):
        raise PlancError([_torch_file(file)])
    message, hint = f"{plain(file)} is not a traffic file", _KINDS_HINT
    if not data:
        message = f"{plain(file)} is empty"
    elif data.startswith(b"\x80"):
        message, hint = f"{plain(file)} is a pickle, and planc never opens pickles", _NPZ_HINT
    elif data.startswith(b"\x1f\x8b"):
        message, hint = f"{plain(file)} is packed with gzip", "unpack it with gunzip first"
    elif ending in (".npz", ".npy"):
        message = f"{plain(file)} is damaged: it does not begin as a file that ends in {ending}"
    raise PlancError([fault("PLN021", file, message, hint)])


def _open_npz(data: bytes, file: str) -> Opened:
    """The arrays of a zip of npy files that planc knows; others are not unpacked."""
    names, read = npz_members(data, file)
    return _pick(names, read, file)


def npz_members(data: bytes, file: str, limit: int | None = None) -> tuple[list[str], Callable[[str], np.ndarray]]:
    """(names of the arrays in a zip of npy files, what reads one of them). Raises PlancError PLN021, also for arrays of over
    ``limit`` bytes in all (default: `MAX_ARRAY_BYTES`)."""
    limit = MAX_ARRAY_BYTES if limit is None else limit
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    except _ZIP_FAULTS as error:
        raise PlancError([_damaged(file, "the zip archive", error)]) from None
    if any(name.endswith("data.pkl") for name in members):
        raise PlancError([_torch_file(file)])
    size = sum(info.file_size for info in members.values())
    if size > limit:
        message = f"the arrays are {size / 1e9:,.3g} GB unpacked; planc reads {limit / 1e9:g} GB at most"
        raise PlancError([fault("PLN021", file, message, "record fewer tokens or steps, or save smaller dtypes")])

    def read(key: str) -> np.ndarray:
        try:
            with archive.open(members[key]) as member:
                raw = member.read(members[key].file_size)  # a size given bounds what is unpacked, whatever the zip says
        except _ZIP_FAULTS as error:
            raise PlancError([_damaged(file, f"`{key}`", error)]) from None
        return npy_array(raw, key, file)

    return list(members), read


def npy_array(raw: bytes, key: str, file: str) -> np.ndarray:
    """The array of an npy file's bytes, without a copy. Its header is checked against its bytes before anything is
    allocated, and arrays of objects are refused: those are pickles."""
    handle = io.BytesIO(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers written by Python 2 and of odd escapes
            version = np.lib.format.read_magic(handle)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, in_columns, dtype = header[version](handle)
    except Exception as error:  # numpy parses the header as Python text, and damaged text fails in many ways
        raise PlancError([_damaged(file, f"the header of `{key}`", error)]) from None
    _check_kind(shape, dtype, key, file)
    needed, there = math.prod(shape) * dtype.itemsize, len(raw) - handle.tell()
    if needed != there:
        message = f"`{key}` is damaged: {shape_text(shape)} of {dtype} are {needed:,} bytes, but the file has {there:,}"
        raise PlancError([fault("PLN021", file, message, "save the array again, or copy the file again")])
    order = "F" if in_columns else "C"
    return np.frombuffer(raw, dtype, offset=handle.tell()).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]


def _open_json(data: bytes, file: str) -> Opened:
    """A JSON object with known keys, or a bare list of lists of loads."""
    if len(data) > MAX_JSON_BYTES:
        message = f"{plain(file)} is larger than the {MAX_JSON_BYTES / 1e6:g} MB that a JSON file may have"
        raise PlancError([fault("PLN003", file, message, "save the arrays with np.savez")])
    record = parse_json(decode(data, file), file)
    if isinstance(record, list):
        record = {"weight": record}
    if not isinstance(record, dict):
        message = f"the file holds {_shown(record)}, not an object or a list of lists"
        raise PlancError([fault("PLN021", file, message, _KEYS_HINT)])
    return _pick(record, lambda key: _of_lists(record[key], key, file), file)


def _open_lines(data: bytes, file: str) -> Opened:
    """One token a line: ``{"topk_ids": [[k ids] of each layer], "source_rank": 3}``."""
    ids: list[np.ndarray] = []
    ranks: list[int | None] = []
    lines: list[int] = []
    faults: list[Diagnostic] = []
    for number, text in enumerate(decode(data, file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            token, rank = _line(text, file)
            if ids and (token.shape != ids[0].shape or (rank is None) != (ranks[0] is None)):
                raise PlancError([_unlike(token, rank, ids[0], lines[0], file)])
        except PlancError as error:
            faults += [replace(d, span=Span(file, number, d.span.column if d.span else 1)) for d in error.diagnostics]
            if len(faults) >= MOST_FAULTS:
                break
            continue
        ids.append(token)
        ranks.append(rank)
        lines.append(number)
    if faults:
        raise PlancError(faults)
    if not ids:
        hint = 'write one token a line: {"topk_ids": [[4, 7], [0, 3]]}'
        raise PlancError([fault("PLN022", file, f"{plain(file)} has no tokens", hint)])
    arrays = {"topk_ids": np.stack(ids)}
    if ranks[0] is not None:
        arrays["source_rank"] = np.array(ranks, dtype=np.int64)
    return Opened(file, "topk_ids", arrays, lines)


def _line(text: str, file: str) -> tuple[np.ndarray, int | None]:
    """A line's ids [layers, k] and source rank."""
    record = parse_json(text, file)
    hint = 'write {"topk_ids": [[4, 7], [0, 3]]}: a list of experts for each layer'
    if not isinstance(record, dict):
        raise PlancError([fault("PLN021", file, f"the line holds {_shown(record)}, not an object", hint)])
    if "topk_ids" not in record:
        names = [plain(key[:40]) for key in list(record)[:8]]
        near = next((word for word in (closest(name, ("topk_ids",)) for name in names) if word), "")
        message = "the line has no `topk_ids`; it has " + (", ".join(f"`{name}`" for name in names) or "no keys")
        raise PlancError([fault("PLN021", file, message, near or hint)])
    rank = record.get("source_rank")
    if "source_rank" in record and (type(rank) is not int or abs(rank) >= 2**63):
        message = f"`source_rank` is {_shown(rank)}, not a whole number"
        raise PlancError([fault("PLN021", file, message, "give the rank that gated the token, such as 3")])
    return _of_lists(record["topk_ids"], "topk_ids of a line", file), rank


def _unlike(token: np.ndarray, rank: int | None, first: np.ndarray, line: int, file: str) -> Diagnostic:
    """A line that is not like the first one."""
    if token.shape != first.shape:
        message = f"`topk_ids` has shape {shape_text(token.shape)}, but on line {line} {shape_text(first.shape)}"
        return fault("PLN021", file, message, "give every token the same layers, and as many experts in each")
    here, there = ("no", "one") if rank is None else ("a", "none")
    message = f"the line has {here} `source_rank`, but line {line} has {there}"
    return fault("PLN021", file, message, "give `source_rank` on every line, or on none")


def _pick(found: Iterable[str], read: Callable[[str], np.ndarray], file: str) -> Opened:
    """Read the arrays that planc knows, of the names found."""
    names = set(found)
    main = next((key for key in _KEYS if key in names), None)
    if main is None:
        shown = [name[:40] for name in sorted(names) if name.isprintable()][:8]
        message = "no key that planc knows; the file has " + (", ".join(f"`{name}`" for name in shown) or "none")
        near = [hint for hint in (closest(name, _KEYS) for name in shown) if hint]
        raise PlancError([fault("PLN021", file, message, "; ".join([*near[:1], _KEYS_HINT]))])
    arrays: dict[str, np.ndarray] = {}
    faults: list[Diagnostic] = []
    for key in (main, *(key for key in _KEYS[main] if key in names)):
        try:
            arrays[key] = read(key)
        except PlancError as error:
            faults += error.diagnostics
    if faults:
        raise PlancError(faults)
    return Opened(file, main, arrays)


def _of_lists(value: Any, key: str, file: str) -> np.ndarray:
    """Nested lists of numbers as an array."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError):
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        name = _name(key)
        message = f"`{name}` is not an even table of numbers: {_first_uneven(value)}"
        hint = f"`{name}` is {_SHAPES[key][1]}, lists of equal length that hold nothing but numbers"
        raise PlancError([fault("PLN021", file, message, hint)])
    _check_kind(array.shape, array.dtype, key, file)
    return array


def _first_uneven(value: Any) -> str:
    """Why nested lists are not an array of numbers: the first entry that differs from those beside it."""
    level: list[tuple[str, Any]] = [("it", value)]
    while level:
        for path, entry in level:
            if not isinstance(entry, (list, int, float)) or isinstance(entry, bool):
                return f"{path} is {_shown(entry)}"
            if isinstance(entry, int) and abs(entry) >= 2**63:
                return f"{path} is a number of more than 64 bits"
        first_path, first = level[0]
        for path, entry in level:
            if isinstance(entry, list) != isinstance(first, list):
                numbers, lists = (first_path, path) if isinstance(entry, list) else (path, first_path)
                return f"{numbers} is a number, but {lists} a list"
            if isinstance(entry, list) and len(entry) != len(first):
                return f"{first_path} has {counted(len(first), 'entry')}, but {path} {len(entry)}"
        level = [
            (f"{'' if path == 'it' else path}[{i}]", part)
            for path, entry in level
            if isinstance(entry, list)
            for i, part in enumerate(entry)
        ]
    return "its numbers are of kinds that do not go together"


def _check_kind(shape: tuple[int, ...], dtype: np.dtype[Any], key: str, file: str) -> None:
    """Refuse arrays of another dtype or number of dimensions than the key has, and empty ones."""
    dimensions, axes = _SHAPES[key]
    name = _name(key)
    if not all(type(size) is int for size in shape):  # Python's True would be one
        raise PlancError([_damaged(file, f"the header of `{name}`", ValueError("sizes are not whole numbers"))])
    if dtype.hasobject:
        message = f"`{name}` is a pickled array of Python objects, and planc never opens pickles"
        raise PlancError([fault("PLN021", file, message, _NPZ_HINT)])
    if dtype.kind not in "iuf":
        message = f"`{name}` holds {plain(str(dtype))[:60]}, not numbers"
        raise PlancError([fault("PLN021", file, message, f"save `{name}` as int32 or float32")])
    if len(shape) not in dimensions:
        message = f"`{name}` has {counted(len(shape), 'dimension')}, shape {shape_text(shape)}, instead of {axes}"
        raise PlancError([fault("PLN021", file, message, f"save `{name}` as {axes}")])
    if min(shape, default=1) < 0:
        raise PlancError([_damaged(file, f"the header of `{name}`", ValueError("negative size"))])
    if 0 in shape:
        message = f"`{name}` is empty: its shape is {shape_text(shape)}"
        raise PlancError([fault("PLN022", file, message, f"save {axes} with at least one of each")])
    if key in _WHOLE and dtype.kind == "f":
        message = f"`{name}` holds {dtype}, but ids are whole numbers"
        raise PlancError([fault("PLN021", file, message, f"save `{name}` as int32")])


# --- words -----------------------------------------------------------------------------------------------------------


def fault(code: str, file: str, message: str, hint: str) -> Diagnostic:
    return Diagnostic(code, message, span=Span(file, 1, 1), hint=hint)


def _damaged(file: str, what: str, error: Exception) -> Diagnostic:
    reason = plain(str(error).split("\n", maxsplit=1)[0])[:100].strip(". ") or type(error).__name__
    return fault("PLN021", file, f"{what} is damaged: {reason}", "save it again, or copy the file again")


def _torch_file(file: str) -> Diagnostic:
    name, stem = plain(Path(file).name), plain(Path(file).stem)
    saved = f'np.savez("{stem}.npz", logical_count=torch.load("{name}")["logical_count"].numpy())'
    message = f"{plain(file)} is a PyTorch file: it holds pickles, and planc never opens pickles"
    return fault("PLN021", file, message, f"save its arrays with numpy: {saved}")


def _name(key: str) -> str:
    """A key of `_SHAPES` as the file has it."""
    return key.removesuffix(" of a line")


def shape_text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(n) if abs(n) < 10**20 else "…" for n in shape[:6]) + (", …]" if len(shape) > 6 else "]")


def plain(text: str) -> str:
    """Text from outside planc on one line, without what a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _shown(value: Any) -> str:
    """A JSON value, cut to a few words."""
    text = (
        json.dumps(value)
        if not isinstance(value, (list, dict))
        else "a list"
        if isinstance(value, list)
        else "an object"
    )
    return text if len(text) <= 40 else text[:37] + "…"
