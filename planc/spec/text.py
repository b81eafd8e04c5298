"""YAML text to plain values with their places: 1.2 core scalars, no duplicate keys, bounded size and depth."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from planc.diagnostics import Diagnostic, PlancError, Span

MAX_SPEC_BYTES = 4_000_000
MAX_DEPTH = 32
MAX_VALUES = 200_000

Path_ = tuple[str | int, ...]
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNPRINTABLE = re.compile("[^\\t\\n\\r\\x20-\\x7e\\x85\\xa0-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_SPECIAL_FLOATS = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


@dataclass(frozen=True, slots=True)
class Located:
    """Plain values (dict, list, str, int, float, bool, None) and the place of every key path's value and key."""

    value: Any
    places: dict[Path_, Span]
    keys: dict[Path_, Span]


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_SPEC_BYTES, span: Span | None = None) -> bytes:
    """The file's bytes. Raises PlancError PLN001 (unreadable) or PLN003 (over ``limit`` bytes)."""
    name = os.fspath(path)
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode) and not name.startswith(("/dev/", "/proc/")):
            raise OSError(errno.EINVAL, "it is a named pipe, which may never be written to")
        with Path(path).open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            large = size > limit
            data = b"" if large else handle.read(size + 1 if size else limit + 1)  # a device has no size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PlancError(
            [Diagnostic("PLN001", f"cannot read {name}: {reason}", span=span or Span(name, 1, 1))]
        ) from None
    if large or len(data) > limit:
        message = f"{name} is larger than the {limit / 1e6:g} MB that a file of this kind may have"
        raise PlancError([Diagnostic("PLN003", message, span=span or Span(name, 1, 1), hint="is this the right file?")])
    return data


def decode(data: bytes, file: str) -> str:
    """UTF-8 text without a BOM or NUL. Raises PlancError PLN002 with the offset of the bad byte."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start
    else:
        offset = data.find(b"\0")
        if offset < 0:
            return text
    line = data.count(b"\n", 0, offset) + 1
    message = f"byte {offset} (0x{data[offset]:02x}) is not UTF-8 text"
    raise PlancError([Diagnostic("PLN002", message, span=Span(file, line, 1), hint="save the file as UTF-8 text")])


def scalar(text: str) -> Any:
    """A plain scalar by the YAML 1.2 core schema: ``1e9`` is a float, ``no`` a string, ``017`` is 17."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if len(text) <= 64:
        if _INT.fullmatch(text):
            return int(text)
        if _OCTAL_HEX.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            return float(text)
        if text.lower() in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[text.lower()]
    return text


def parse_yaml(text: str, file: str) -> Located:
    """Compose one YAML document. Raises PlancError PLN004, PLN005 or PLN009, with every duplicate key reported."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    composer = _Composer(file)
    try:
        for event in yaml.parse(text, Loader=loader):
            composer.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if (
            mark and error.context_mark and mark.line > text.rstrip().count("\n")
        ):  # not where the text ends: where it opened
            mark = error.context_mark
        span = Span(file, mark.line + 1, mark.column + 1) if mark else Span(file, 1, 1)
        message = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise PlancError([Diagnostic("PLN004", f"malformed YAML: {message}", span=span)]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"malformed YAML: {str(error).splitlines()[0]}"
        bad = _UNPRINTABLE.search(text)
        before = text[: bad.start()] if bad else ""
        span = Span(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise PlancError([Diagnostic("PLN004", message, span=span)]) from None
    if composer.faults:
        raise PlancError(composer.faults)
    return Located(composer.root, composer.places, composer.key_places)


def parse_json(text: str, file: str) -> Any:
    """Like `json.loads`, with keys unique and depth bounded. Raises PlancError PLN004, PLN005 or PLN009."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key, value in items:
            if key in mapping:
                twice.append(key)
            mapping[key] = value
        return mapping

    too_deep = PlancError([Diagnostic("PLN009", f"more than {MAX_DEPTH} levels of nesting", span=Span(file, 1, 1))])
    try:
        record = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        message = f"malformed JSON: {getattr(error, 'msg', error)}"
        raise PlancError([Diagnostic("PLN004", message, span=Span(file, line, column))]) from None
    level, depth = [record], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise too_deep
        parts = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [v for part in parts for v in part]
    half = _ESCAPED_HALF.search(text)
    if half is not None and not _encodes(record):  # not a whole pair, nor text after a backslash
        span = Span(file, text.count("\n", 0, half.start()) + 1, half.start() - text.rfind("\n", 0, half.start()))
        message = "malformed JSON: an escape here or further on is half of a surrogate pair, which is no character"
        raise PlancError([Diagnostic("PLN004", message, span=span)])
    if twice:
        found = [Diagnostic("PLN005", f"the key `{key[:60]}` appears twice", span=Span(file, 1, 1)) for key in twice]
        try:
            parse_yaml(text, file)
        except PlancError as error:  # says where, if the text is not too large for it
            found = [d for d in error.diagnostics if d.code == "PLN005"] or found
        raise PlancError(found)
    return record


def _encodes(record: Any) -> bool:
    """Whether every text in the values can be written as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Composer:
    """Builds values from the event stream with an explicit stack, so depth and size stay bounded."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.root: Any = None
        self.places: dict[Path_, Span] = {}
        self.key_places: dict[Path_, Span] = {}
        self.faults: list[Diagnostic] = []
        self._stack: list[tuple[Any, Path_]] = []  # open containers and their paths
        self._key: list[Any] = []  # pending key of each open mapping, or _NO_KEY
        self._anchors: dict[str, Any] = {}
        self._open_anchors: list[str | None] = []
        self._documents = 0
        self._values = 0

    def take(self, event: Any) -> None:
        """Consume one parser event."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._refuse("PLN004", "malformed YAML: more than one document in the file", event)
        elif isinstance(event, yaml.ScalarEvent):
            if event.tag not in (None, "!", "tag:yaml.org,2002:str"):
                self._refuse("PLN004", f"malformed YAML: the tag {event.tag[:60]} is not supported", event)
            plain = event.implicit[0] and event.tag is None
            value = scalar(event.value) if plain else event.value
            self._place(value, event)
            if event.anchor:
                self._anchors[event.anchor] = value
        elif isinstance(event, yaml.AliasEvent):
            name = event.anchor or ""
            if name not in self._anchors:
                self._refuse("PLN004", f"malformed YAML: the alias *{name[:60]} has no anchor before it", event)
            value = self._anchors[name]
            self._values += _size(value, MAX_VALUES)
            self._place(value, event)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if event.tag not in (None, "!", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
                self._refuse("PLN004", f"malformed YAML: the tag {event.tag[:60]} is not supported", event)
            container: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            path = self._place(container, event)
            if len(self._stack) >= MAX_DEPTH:
                self._refuse("PLN009", f"more than {MAX_DEPTH} levels of nesting", event)
            self._stack.append((container, path))
            self._key.append(_NO_KEY)
            self._open_anchors.append(event.anchor)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            container, _ = self._stack.pop()
            self._key.pop()
            anchor = self._open_anchors.pop()
            if anchor:  # only now: an alias inside its own anchor would be a loop
                self._anchors[anchor] = container

    def _span(self, event: Any) -> Span:
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 1
        return Span(self.file, start.line + 1, start.column + 1, max(1, width))

    def _refuse(self, code: str, message: str, event: Any) -> None:
        raise PlancError([*self.faults, Diagnostic(code, message, span=self._span(event))])

    def _place(self, value: Any, event: Any) -> Path_:
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse("PLN009", f"more than {MAX_VALUES:,} values", event)
        if not self._stack:
            self.root, self.places[()] = value, self._span(event)
            return ()
        container, path = self._stack[-1]
        if isinstance(container, list):
            container.append(value)
            path = (*path, len(container) - 1)
        elif self._key[-1] is _NO_KEY:
            self._take_key(value, event, container, path)
            return path
        else:
            path = (*path, self._key[-1])
            container[self._key[-1]] = value
            self._key[-1] = _NO_KEY
        self.places[path] = self._span(event)
        return path

    def _take_key(self, key: Any, event: Any, container: dict[Any, Any], path: Path_) -> None:
        if isinstance(key, (dict, list)):
            self._refuse("PLN004", "malformed YAML: a key must be plain text", event)
        key = key if isinstance(key, str) else event.value if isinstance(event, yaml.ScalarEvent) else str(key)
        if key in container:
            first = self.key_places[(*path, key)]
            dotted = ".".join(map(str, (*path, key)))
            message = f"the key `{key[:60]}` appears twice; it was first given on line {first.line}"
            self.faults.append(Diagnostic("PLN005", message, dotted, self._span(event), "keep one of the two"))
        else:
            self.key_places[(*path, key)] = self._span(event)
        self._key[-1] = key


_NO_KEY = object()


def _size(value: Any, limit: int) -> int:
    """Values inside ``value``, counted up to ``limit``."""
    count, stack = 0, [value]
    while stack and count <= limit:
        item = stack.pop()
        count += 1
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return count
