"""The diagnostic value and its three forms."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from planc.diagnostics import CODES, Diagnostic, PlancError, Span, closest, render_github, render_json, render_text


def test_codes_have_a_title_and_an_explanation() -> None:
    for code, (title, explanation, since, status) in CODES.items():
        assert re.fullmatch(r"PLN\d{3}", code)
        assert 5 < len(title) < 40
        assert explanation.endswith(".")
        assert (since, status) == ("0.1", "stable")
    assert list(CODES) == sorted(CODES)
    assert len({code.title for code in CODES.values()}) == len(CODES)


def test_every_code_in_the_sources_is_in_the_table() -> None:
    package = Path(__file__).parent.parent.parent / "planc"
    used = {
        code
        for file in package.rglob("*.py")
        if file.name != "codes.py"
        for code in re.findall(r'"(PLN\d{3})"', file.read_text())
    }
    assert used <= CODES.keys()
    with pytest.raises(KeyError):
        Diagnostic("PLN998", "no such code")


def test_faults_are_sorted_and_said_once() -> None:
    def at(file: str, line: int, column: int = 1, code: str = "PLN010") -> Diagnostic:
        return Diagnostic(code, "m", span=Span(file, line, column))

    nowhere = Diagnostic("PLN001", "m")
    ordered = [at("a", 2), at("a", 10), at("a", 10, 3), at("a", 10, 3, "PLN012"), at("b", 1), nowhere]
    error = PlancError([*reversed(ordered), nowhere, at("a", 2)])
    assert list(error.diagnostics) == ordered
    assert str(error).count("PLN") == len(ordered)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("expert_rul", "did you mean `expert_rule`?"),
        ("exp", "did you mean `expert_rule`?"),
        ("", ""),
        ("zzz", ""),
        ("x" * 10**6, ""),
    ],
)
def test_closest(word: str, hint: str) -> None:
    assert closest(word, ["expert_rule", "placement"]) == hint


def shown(text: str, span: tuple[int, int, int], folder: Path, **more: str) -> list[str]:
    file = folder / "spec.yaml"
    file.write_bytes(text.encode())
    lines = render_text([Diagnostic("PLN012", "wrong", "a.b", Span(str(file), *span), **more)]).split("\n")
    assert lines[0] == "error[PLN012]: wrong"
    assert lines[1] == f"  --> {file}:{span[0]}:{span[1]} (a.b)"
    return lines[2:]


def test_the_line_and_its_carets(tmp_path: Path) -> None:
    assert shown("x: 1\na: b c\n", (2, 4, 3), tmp_path) == ["   |", " 2 | a: b c", "   |    ^^^"]
    assert shown("x\r\ny: 5\r\n", (2, 1, 1), tmp_path, hint="do") == ["   |", " 2 | y: 5", "   | ^", "  help: do"]
    assert shown("\ufeffa: 1", (1, 1, 1), tmp_path) == ["   |", " 1 | a: 1", "   | ^"]
    assert shown("\ta: 1", (1, 2, 1), tmp_path) == ["   |", " 1 |  a: 1", "   |  ^"]
    assert shown("a: bbbb", (1, 4, 400), tmp_path) == ["   |", " 1 | a: bbbb", "   |    ^^^^"]
    assert shown("a\n" * 99 + "b", (100, 1, 1), tmp_path)[1] == " 100 | b"


def test_a_line_that_is_not_shown(tmp_path: Path) -> None:
    assert shown("a: " + "x" * 500, (1, 1, 1), tmp_path) == []
    assert shown("a: 1", (7, 1, 1), tmp_path) == []
    os.mkfifo(tmp_path / "pipe")  # reading it again would wait for ever
    for file in ("nowhere.yaml", str(tmp_path), str(tmp_path / "pipe"), "/dev/zero", "a\0b", "--set a=b", "x" * 5000):
        assert len(render_text([Diagnostic("PLN001", "m", span=Span(file, 1, 1))]).split("\n")) == 2


def test_related_facts_and_colour() -> None:
    diagnostic = Diagnostic("PLN201", "too much", "a", related=("1 GB", "2 GB"), severity="warning")
    assert render_text([diagnostic]) == "warning[PLN201]: too much\n  --> (a)\n  = 1 GB\n  = 2 GB"
    assert render_text([diagnostic], colour=True).startswith("\033[1;33mwarning[PLN201]\033[0m: ")


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    lines = shown("a: \033[2J\u202e", (1, 1, 1), tmp_path)
    assert lines[1] == " 1 | a: \\x1b[2J\\u202e"
    text = render_text([Diagnostic("PLN012", "\033]0;x\a", "\r\b", Span("\033.yaml", 1, 1), "\x9b31m", ("\x00",))])
    assert text.replace("\n", "").isprintable()


def test_many_faults_of_one_file_are_shown_soon(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("k: 1\n" * 20_000)
    text = render_text(Diagnostic("PLN005", "again", span=Span(str(file), n, 1)) for n in range(1, 20_001))
    assert text.count(" | k: 1") == 20_000


def test_json() -> None:
    rows = [
        Diagnostic("PLN012", 'a "quoted"\nline', "p", Span("f", 3, 4), "h", ("r",)),
        Diagnostic("PLN205", "é", severity="note"),
    ]
    found = json.loads(render_json(rows))["diagnostics"]
    assert found[0] == {
        "code": "PLN012", "severity": "error", "message": 'a "quoted"\nline', "path": "p",
        "file": "f", "line": 3, "column": 4, "hint": "h", "related": ["r"],
    }  # fmt: skip
    assert (found[1]["file"], found[1]["line"], found[1]["severity"], found[1]["message"]) == (None, None, "note", "é")


def test_github_escapes_what_would_end_the_command() -> None:
    diagnostic = Diagnostic("PLN012", "50 %\n::set-output::", "p", Span("a,b:c\n%.yaml", 3, 4), "h", ("r",))
    assert (
        render_github([diagnostic])
        == "::error file=a%2Cb%3Ac%0A%25.yaml,line=3,col=4,title=PLN012::50 %25%0A::set-output:: r h"
    )
    assert render_github([Diagnostic("PLN205", "m", severity="note")]) == "::notice title=PLN205::m"
