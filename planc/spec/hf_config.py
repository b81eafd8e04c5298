"""A Hugging Face `config.json` as fields that can be read with their types checked and their places known."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, Severity, Span
from planc.spec.text import parse_json

_MAX_WIDTH = 10**7


@dataclass
class ConfigReader:
    """The config's fields, read with their types checked; faults and notes pile up instead of stopping the import."""

    file: str
    text: str
    config: dict[str, Any]
    start: int = 0  # where in the text the config begins: keys of a nested config are looked for after it
    owner: str = ""  # the config class whose documented defaults are used
    faults: list[Diagnostic] = field(default_factory=list)
    notes: list[Diagnostic] = field(default_factory=list)

    def span(self, key: str) -> Span:
        """Place of the key in the file, or the file's start."""
        match = re.compile(r'"' + re.escape(key) + r'"\s*:').search(self.text, self.start)
        if match is None:
            return Span(self.file, 1, 1)
        line_start = self.text.rfind("\n", 0, match.start()) + 1
        line = self.text.count("\n", 0, match.start()) + 1
        return Span(self.file, line, match.start() - line_start + 1, len(key) + 2)

    def note(self, message: str, path: str, key: str = "", severity: Severity = "note") -> None:
        """Tell the reader of the plan something about ``path`` that the config does not say."""
        self.notes.append(Diagnostic("PLN020", message, path, self.span(key), severity=severity))

    def fault(self, message: str, path: str, key: str) -> None:
        """An unusable field."""
        hint = f"give `{key}` in config.json, or write the model file by hand with `{path}`"
        self.faults.append(Diagnostic("PLN020", message, path, self.span(key), hint))

    def _value(self, key: str, path: str, default: Any) -> Any:
        """The key's value; else the documented default, with a note; else None, with a fault."""
        value = self.config.get(key)
        if value is not None:
            return value
        if default is None:
            self.fault(f"`{key}` is not in the config, and `{path}` needs it", path, key)
            return None
        shown = json.dumps(default)
        self.note(f"`{key}` is not in the config: {self.owner}'s default {shown} is used for `{path}`", path, key)
        return default

    def integer(self, key: str, path: str, low: int = 1, high: int = _MAX_WIDTH, default: int | None = None) -> int:
        """A whole number in ``low`` … ``high``. A fault returns ``low``, so that reading can go on."""
        value = self._value(key, path, default)
        if value is None:
            return low
        if type(value) is not int:
            self.fault(f"`{key}` is {shown(value)}, not a whole number", path, key)
        elif not low <= value <= high:
            self.fault(f"`{key}` is {shown(value)}, outside {low:,} to {high:,}", path, key)
        else:
            return value
        return low

    def flag(self, key: str, path: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, path, default)
        if not isinstance(value, bool):
            self.fault(f"`{key}` is {shown(value)}, not true or false", path, key)
            return default
        return value

    def word(self, key: str, path: str, choices: tuple[str, ...], default: str) -> str:
        """One of ``choices``."""
        value = self._value(key, path, default)
        if value not in choices:
            self.fault(f"`{key}` is {shown(value)}, not one of {', '.join(choices)}", path, key)
            return default
        return str(value)

    def layer_list(self, key: str, path: str, layers: int) -> list[int]:
        """A list of layer numbers below ``layers``; absent means none of them."""
        value = self._value(key, path, [])
        if isinstance(value, list) and all(type(v) is int and 0 <= v < layers for v in value):
            return value
        self.fault(f"`{key}` is {shown(value)}, not a list of layer numbers below {layers}", path, key)
        return []


def shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**15:
        return "a number of more than 15 digits"
    return f"`{json.dumps(value)[:40]}`"


def parse_config(text: str, file: str) -> dict[str, Any]:
    """The JSON object in ``text``. Raises PlancError PLN004, PLN005, PLN009 or PLN020."""
    value = parse_json(text, file)
    if not isinstance(value, dict):
        message = f"a config.json is one JSON object, not {shown(value)}"
        raise PlancError([Diagnostic("PLN020", message, span=Span(file, 1, 1))])
    return value
