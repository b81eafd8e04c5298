"""The YAML reader: 1.2 core scalars, places, and every way a text can be refused."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from planc.diagnostics import PlancError
from planc.spec import load_spec
from planc.spec.text import MAX_DEPTH, MAX_SPEC_BYTES, decode, parse_yaml, read_bytes, scalar

#: YAML 1.2.2, 10.3.2 (core schema); what YAML 1.1 would say differs in the second half
SCALARS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    "0": 0, "-0": 0, "12": 12, "+12": 12, "-12": -12, "0o14": 12, "0x1F": 31, "0xff": 255,
    "1.5": 1.5, "-.5": -0.5, "5.": 5.0, "1e3": 1000.0, "1e9": 1e9, "4.8e12": 4.8e12, "2E-5": 2e-5, "+1.0e+2": 100.0,
    ".inf": math.inf, "+.INF": math.inf, "-.Inf": -math.inf, "9" * 64: int("9" * 64),
    "017": 17, "08": 8, "0b11": "0b11", "1_000": "1_000", "1:30": "1:30", "190:20:30": "190:20:30",
    "no": "no", "No": "No", "yes": "yes", "on": "on", "off": "off", "y": "y", "n": "n", "nULL": "nULL", "tRue": "tRue",
    "2024-01-01": "2024-01-01", "=": "=", "<<": "<<", "0x": "0x", "0o8": "0o8", "-0x1": "-0x1", "1e": "1e", "e3": "e3",
    ".": ".", "+": "+", "inf": "inf", "nan": "nan", "1 GB": "1 GB", "٣": "٣", "9" * 65: "9" * 65,
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalar(text: str) -> None:
    value = scalar(text)
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


def test_nan() -> None:
    assert all(math.isnan(scalar(text)) for text in (".nan", ".NaN", ".NAN"))


VALUES = {
    "a: 1\r\nb: '1'\r\n": {"a": 1, "b": "1"},
    "\ufeffa: 1": {"a": 1},
    "a: |\n  1\n": {"a": "1\n"},
    'a: "1"\nb: ! 1\nc: !!str 1': {"a": "1", "b": "1", "c": "1"},
    "a: !!map {}\nb: !!seq []": {"a": {}, "b": []},
    "a: &x [1, {b: 2}]\nc: *x": {"a": [1, {"b": 2}], "c": [1, {"b": 2}]},
    "a: &x 1\nb: &x 2\nc: *x": {"a": 1, "b": 2, "c": 2},
    "&k a: 1\nb: {*k : 2}": {"a": 1, "b": {"a": 2}},
    "1: a\ntrue: b\n~: c\n1.0: d": {"1": "a", "true": "b", "~": "c", "1.0": "d"},
    "<<: {a: 1}\na: 2": {"<<": {"a": 1}, "a": 2},
    "%YAML 1.1\n--- {a: no}\n...\n": {"a": "no"},
    "--- # only this\n": None,
    "# nothing": None,
    "": None,
    " \n\n": None,
    "'été 🚀'": "été 🚀",
}


@pytest.mark.parametrize("text", VALUES)
def test_value(text: str) -> None:
    assert parse_yaml(decode(text.encode(), "f"), "f").value == VALUES[text]


def test_places_of_values_and_keys() -> None:
    found = parse_yaml("a:\n  - b: 'x y'\n  - &n 7\nc: *n\n", "f")
    at = {path: (s.line, s.column, s.width) for path, s in found.places.items()}
    assert at[("a", 0, "b")] == (2, 8, 5)
    assert at[("a", 1)] == (3, 5, 4)
    assert at[("c",)] == (4, 4, 2)
    assert at[()] == (1, 1, 1)
    assert {path: (s.line, s.column) for path, s in found.keys.items()} == {
        ("a",): (1, 1),
        ("a", 0, "b"): (2, 5),
        ("c",): (4, 1),
    }


ANY = 0
REFUSED: dict[str, tuple[str, int, int]] = {
    "a: [1, 2": ("PLN004", 1, 4),
    "a: 'x\n\n": ("PLN004", 1, 4),
    "a: b: c": ("PLN004", 1, 5),
    "a: 1\n\tb: 2": ("PLN004", 2, ANY),
    "a: {b: 1}}": ("PLN004", 1, 10),
    "- a\nb: 1": ("PLN004", 2, 1),
    "a: @x": ("PLN004", 1, 4),
    "%YAML 3": ("PLN004", 1, ANY),
    "a: 1\n---\nb: 2": ("PLN004", 2, 1),
    "a: 1\n...\nb": ("PLN004", 3, 1),
    "a: *b": ("PLN004", 1, 4),
    "a: &b [*b]": ("PLN004", 1, 8),
    "a: &b {c: [*b]}": ("PLN004", 1, 12),
    "a: !!int 3": ("PLN004", 1, 4),
    "a: !!binary aGk=": ("PLN004", 1, 4),
    "a: !!python/object/apply:os.system [id]": ("PLN004", 1, 4),
    "a: !mine {b: 1}": ("PLN004", 1, 4),
    "!mine\na: 1": ("PLN004", 1, 1),
    "[a]: 1": ("PLN004", 1, 1),
    "{a: 1}: 2": ("PLN004", 1, 1),
    "a: 1\nb: '\x07'": ("PLN004", 2, 5),
    "a: '\x7f'": ("PLN004", 1, 5),
    'a: "\\ud800"': ("PLN004", 1, ANY),
    "a: 1\nb: 2\na: 3": ("PLN005", 3, 1),
    "a: 1\n'a': 3": ("PLN005", 2, 1),
    "1: a\n'1': b": ("PLN005", 2, 1),
    "&k a: 1\n*k : 2": ("PLN005", 2, 1),
    "[" * (MAX_DEPTH + 1): ("PLN009", 1, MAX_DEPTH + 1),
    "{a: " * 100_000: ("PLN009", 1, ANY),
    "- " * 100_000: ("PLN009", 1, ANY),
    "[" + "1," * 200_000 + "]": ("PLN009", 1, ANY),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:30]))
def test_refused(text: str) -> None:
    with pytest.raises(PlancError) as error:
        parse_yaml(text, "f")
    (found,) = error.value.diagnostics
    code, line, column = REFUSED[text]
    assert found.span is not None
    assert (found.code, found.span.file, found.span.line) == (code, "f", line)
    assert column in (ANY, found.span.column)
    assert len(found.message) < 200


def test_every_duplicate_key_is_reported() -> None:
    with pytest.raises(PlancError) as error:
        parse_yaml("a: 1\nb: {c: 1, c: 2, c: 3}\na: 2\nd:\n  - e: 1\n    e: 2", "f")
    found = [(d.code, d.span and d.span.line, d.path) for d in error.value.diagnostics]
    assert found == [("PLN005", 2, "b.c"), ("PLN005", 2, "b.c"), ("PLN005", 3, "a"), ("PLN005", 6, "d.0.e")]


def test_nesting_up_to_the_limit() -> None:
    value = parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f").value
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("line", ["a{n}: &a{n} [*a{m}, *a{m}, *a{m}]", "a{n}: &a{n} {{k: *a{m}, l: *a{m}, m: *a{m}}}"])
def test_billion_laughs(line: str) -> None:
    bomb = "\n".join(["a0: &a0 [x]", *(line.format(n=n, m=n - 1) for n in range(1, 30))])
    start = time.perf_counter()
    with pytest.raises(PlancError, match="PLN009"):
        parse_yaml(bomb, "f")
    assert time.perf_counter() - start < 2


BYTES = {
    b"a: \xff\n": (1, 3),
    b"ok\n\x80": (2, 3),
    "a: é".encode("latin-1"): (1, 3),
    b"a: 1\nb: \0": (2, 8),
    b"\xff\xfea\0": (1, 0),
}
BYTES |= {
    bytes(range(256)): (2, 128),
    b"\x7fELF\x02\x01\x01\x00\x00": (1, 7),
    b"PK\x03\x04\xf0\x28\x8c\xbc": (1, 4),
    b"\xed\xa0\x80": (1, 0),
}


@pytest.mark.parametrize("data", BYTES, ids=lambda data: repr(data[:12]))
def test_not_text(data: bytes) -> None:
    with pytest.raises(PlancError) as error:
        decode(data, "f")
    (found,) = error.value.diagnostics
    line, offset = BYTES[data]
    assert found.span is not None
    assert (found.code, found.span.line) == ("PLN002", line)
    assert f"byte {offset} " in found.message


def test_a_file_of_50_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    with file.open("wb") as handle:
        handle.truncate(50_000_000)
    start = time.perf_counter()
    with pytest.raises(PlancError, match="PLN003"):
        load_spec(file)
    assert time.perf_counter() - start < 1
    file.write_bytes(b"# " + b"x" * (MAX_SPEC_BYTES - 2))
    assert len(read_bytes(file)) == MAX_SPEC_BYTES


@pytest.mark.parametrize(
    "name", ["nowhere.yaml", "", ".", "x" * 5000, "a\0b", "loop.yaml", "plain.yaml/spec.yaml", "dangling"]
)
def test_unreadable(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "plain.yaml").write_text("a: 1")
    with pytest.raises(PlancError, match="PLN001"):
        load_spec(f"{tmp_path}/{name}" if name else "")


def test_an_endless_device_is_refused() -> None:
    with pytest.raises(PlancError, match="PLN003"):
        load_spec("/dev/zero")
