"""The diagnostic value and the one exception that carries diagnostics out of the library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from planc.diagnostics.codes import CODES

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A place in a text file: 1-based line and column, with the width of the marked text on that line."""

    file: str
    line: int
    column: int
    width: int = 1


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One message. ``path`` is the dotted key in the spec or plan, ``hint`` the change that would fix it."""

    code: str
    message: str
    path: str = ""
    span: Span | None = None
    hint: str = ""
    related: tuple[str, ...] = ()
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"{self.code} is not in the table of codes")

    def sort_key(self) -> tuple[int, str, int, int, str, str]:
        """Order by place in the file; placeless messages come last."""
        if self.span is None:
            return (1, "", 0, 0, self.code, self.message)
        return (0, self.span.file, self.span.line, self.span.column, self.code, self.message)


class PlancError(Exception):
    """A spec or plan was refused. ``diagnostics`` holds every fault found, sorted by position."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        unique = dict.fromkeys(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = tuple(sorted(unique, key=Diagnostic.sort_key))
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in self.diagnostics))

    def __reduce__(self) -> tuple[type[PlancError], tuple[tuple[Diagnostic, ...]]]:
        # worker processes raise it too; by default pickle would make it of its text
        return PlancError, (self.diagnostics,)


def closest(word: str, choices: Iterable[str]) -> str:
    """A "did you mean" hint for ``word``, or an empty string when nothing is near."""
    names, word = sorted(choices), word[:80]
    longer = [name for name in names if len(word) > 2 and name.startswith(word)]
    match = longer[:1] if len(longer) == 1 else difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean `{match[0]}`?" if match else ""
