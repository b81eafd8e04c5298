"""A spec tree against the pydantic models, and every refusal in words, at its place, with the nearest right key."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.spec.text import Located, Path_
from planc.spec.tree import has_item

_MOST_HINTS = 100


def validate(model: type[BaseModel], located: Located, file: str) -> BaseModel:
    try:
        return model.model_validate(located.value)
    except ValidationError as error:
        rows = error.errors(include_url=False, include_context=True, include_input=True)
    rows = [row for row in rows if not _is_echo(row)]
    raise PlancError(_fault(model, located, file, dict(row), hints=n < _MOST_HINTS) for n, row in enumerate(rows))


def _is_echo(row: Mapping[str, Any]) -> bool:
    """A fault that only repeats another: a mapping given for ``expert_rule`` also fails the word ``none``."""
    if row["type"] == "too_short":  # a list whose items were refused also counts as short
        return bool(len(row["input"]) >= row["ctx"].get("min_length", 0))
    # a choice of its own that is given a mapping echoes nothing: its place ends with its key, not with a branch
    in_union = any(str(part).startswith("literal[") for part in row["loc"][-1:])
    return in_union and row["type"] == "literal_error" and isinstance(row["input"], dict)


def _fault(
    model: type[BaseModel], located: Located, file: str, row: dict[str, Any], *, hints: bool = True
) -> Diagnostic:
    path: Path_ = ()
    value = located.value
    for part in row["loc"]:  # a union adds its branch's name to the location: skip what the tree does not have
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and has_item(value, part)):
            path, value = (*path, part), value[part]
    kind, context, last = row["type"], row.get("ctx", {}), str(row["loc"][-1]) if row["loc"] else ""
    missing = kind == "missing"
    dotted = ".".join(map(str, (*path, last) if missing else path))
    table = located.keys if kind == "extra_forbidden" else located.places
    span = table.get(path) or _nearest(located, path) or Span(file, 1, 1)
    if missing and path in located.keys:
        span = located.keys[path]
    if missing:
        inside = f" in `{'.'.join(map(str, path))}`" if path else ""
        return Diagnostic("PLN011", f"the key `{last}` is missing{inside}", dotted, span, f"add `{last}:`")
    if kind == "extra_forbidden":
        known = _fields(model, path[:-1]) if hints else []
        hint = closest(str(path[-1]), known) or (f"keys here: {', '.join(known)}" if known else "")
        return Diagnostic("PLN010", f"unknown key `{str(path[-1])[:60]}`", dotted, span, hint)
    if kind in ("literal_error", "choice"):
        choices = re.findall(r"'([^']+)'", str(context.get("expected", "")))
        hint = closest(str(value), choices)
        message = f"`{str(value)[:40]}` is not one of {', '.join(choices)}" if choices else row["msg"]
        return Diagnostic("PLN015", message, dotted, span, hint)
    code = {"quantity": "PLN013", "name": "PLN016", "wrong_type": "PLN012"}.get(kind)
    code = code or ("PLN014" if kind in _RANGE_ERRORS else "PLN012")
    return Diagnostic(code, _worded(kind, context, value, row["msg"]), dotted, span)


_RANGE_ERRORS = {"range", "greater_than_equal", "greater_than", "less_than_equal", "less_than", "too_short", "too_long"}
_RANGE_ERRORS |= {"string_too_long", "int_parsing_size", "finite_number"}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def _worded(kind: str, context: dict[str, Any], value: Any, fallback: str) -> str:
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, found {kind_of(value)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{str(value)[:40]} must be {words} {context[key]:,}"
    if kind in ("too_short", "too_long"):
        return (
            f"the list has {context.get('actual_length')} items; it may have {context.get('min_length', 0)} to "
            f"{context.get('max_length', 'any number')}"
        )
    return fallback[:1].lower() + fallback[1:] if fallback[:2].istitle() else fallback


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:40] if not isinstance(value, int) or value < 10**40 else 'with many digits'}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "a mapping"


def _nearest(located: Located, path: Path_) -> Span | None:
    while path and path not in located.places:
        path = path[:-1]
    return located.places.get(path)


def _fields(model: type[BaseModel], path: Path_) -> list[str]:
    """Keys that the schema knows at ``path``."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return []
        current = _model_in(current.model_fields[part].annotation)
    return sorted(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The BaseModel class inside an annotation such as ``tuple[X, ...]`` or ``X | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((f for f in found if f is not None), None)
