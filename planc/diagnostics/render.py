"""Diagnostics as text for people, JSON for programs, and annotations for GitHub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from planc.diagnostics.model import Diagnostic

_COLOURS = {"error": "\033[1;31m", "warning": "\033[1;33m", "note": "\033[1;36m"}
_LONGEST_LINE = 160
_MOST_BYTES = 4_000_000  # lines are shown from the first part of a file only


@lru_cache(maxsize=8)
def _lines(file: str) -> tuple[str, ...]:
    try:
        path = Path(file)
        if path.is_file():  # a device or a pipe would be read a second time, for ever
            with path.open("rb") as handle:
                text = handle.read(_MOST_BYTES).decode("utf-8-sig", "replace")
            return tuple(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    except (OSError, ValueError):
        pass
    return ()


def _source_line(file: str, line: int) -> str | None:
    lines = _lines(file)
    return lines[line - 1] if 0 < line <= len(lines) else None


def _printable(text: str) -> str:
    """Control characters would let a spec write to the reader's terminal; show them escaped."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _one(diagnostic: Diagnostic, colour: bool) -> str:
    start, end = (_COLOURS[diagnostic.severity], "\033[0m") if colour else ("", "")
    lines = [f"{start}{diagnostic.severity}[{diagnostic.code}]{end}: {_printable(diagnostic.message)}"]
    span = diagnostic.span
    where = f" ({_printable(diagnostic.path[:_LONGEST_LINE])})" if diagnostic.path else ""
    if span is not None:
        at = "" if span.file.startswith("--") else f":{span.line}:{span.column}"  # an option has no lines
        lines.append(f"  --> {_printable(span.file)}{at}{where}")
        source = _source_line(span.file, span.line)
        if source is not None and len(source) <= _LONGEST_LINE:
            gutter = " " * len(str(span.line))
            shown = _printable(source.replace("\t", " "))
            width = max(1, min(span.width, len(shown) - span.column + 1))
            lines += [f" {gutter} |", f" {span.line} | {shown}"]
            lines.append(f" {gutter} | {' ' * (span.column - 1)}{'^' * width}")
    elif where:
        lines.append(f"  -->{where}")
    lines += [f"  = {_printable(text)}" for text in diagnostic.related]
    if diagnostic.hint:
        lines.append(f"  help: {_printable(diagnostic.hint)}")
    return "\n".join(lines)


def render_text(diagnostics: Iterable[Diagnostic], *, colour: bool = False) -> str:
    """The diagnostics as a compiler prints them: code, place, source line with carets, related facts, help."""
    _lines.cache_clear()
    return "\n".join(_one(d, colour) for d in diagnostics)


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """One JSON object ``{"diagnostics": [...]}`` with the fields of `Diagnostic`."""
    rows = [
        {
            "code": d.code,
            "severity": d.severity,
            "message": d.message,
            "path": d.path,
            "file": d.span.file if d.span else None,
            "line": d.span.line if d.span else None,
            "column": d.span.column if d.span else None,
            "hint": d.hint,
            "related": list(d.related),
        }
        for d in diagnostics
    ]
    return json.dumps({"diagnostics": rows}, indent=2, ensure_ascii=False)


def _github_escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _github_property(text: str) -> str:
    return _github_escape(text).replace(":", "%3A").replace(",", "%2C")


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """Workflow commands that GitHub shows as annotations on the changed lines."""
    rows = []
    for d in diagnostics:
        kind = "notice" if d.severity == "note" else d.severity
        place = f"file={_github_property(d.span.file)},line={d.span.line},col={d.span.column}," if d.span else ""
        text = " ".join([d.message, *d.related, d.hint]).strip()
        rows.append(f"::{kind} {place}title={d.code}::{_github_escape(text)}")
    return "\n".join(rows)
