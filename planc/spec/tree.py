"""Spec trees with the places of their values: take a part out, put one in, merge one over another."""

from __future__ import annotations

from typing import Any

from planc.diagnostics import Span
from planc.spec.text import Located, Path_


def at(value: Any, path: Path_) -> Any:
    for part in path:
        value = value[part]
    return value


def subtree(located: Located, path: Path_) -> Located:
    n = len(path)
    places = {p[n:]: s for p, s in located.places.items() if p[:n] == path}
    keys = {p[n:]: s for p, s in located.keys.items() if p[:n] == path and len(p) > n}
    return Located(at(located.value, path), places, keys)


def graft(located: Located, path: Path_, part: Located) -> Located:
    """``located`` with the value at ``path`` replaced by ``part``."""
    n = len(path)

    def replace(value: Any, rest: Path_) -> Any:
        if not rest:
            return part.value
        if isinstance(value, list):
            return [replace(v, rest[1:]) if i == rest[0] else v for i, v in enumerate(value)]
        return value | {rest[0]: replace(value.get(rest[0]), rest[1:])}

    places = {p: s for p, s in located.places.items() if p[:n] != path}
    places |= {path + p: s for p, s in part.places.items()}
    keys = {p: s for p, s in located.keys.items() if p[:n] != path or len(p) <= n}
    keys |= {path + p: s for p, s in part.keys.items()}
    return Located(replace(located.value, path), places, keys)


def merge(base: Located, over: Located) -> Located:
    """``over`` on top of ``base``: mappings merge key by key, everything else is replaced, and so is a mapping by one
    that names a base of its own or is a `{value, source}`."""
    replaced: set[Path_] = set()

    def walk(low: Any, high: Any, path: Path_) -> Any:
        if not (isinstance(low, dict) and isinstance(high, dict)) or "base" in high or "value" in high:
            replaced.add(path)
            return high
        return low | {k: walk(low[k], v, (*path, k)) if k in low else v for k, v in high.items()}

    value = walk(base.value, over.value, ())

    def kept(table: dict[Path_, Span]) -> dict[Path_, Span]:
        return {p: s for p, s in table.items() if not any(p[:n] in replaced for n in range(len(p) + 1))}

    return Located(value, kept(base.places) | over.places, kept(base.keys) | over.keys)


def without(located: Located, keys: tuple[str, ...]) -> Located:
    return Located(
        {k: v for k, v in located.value.items() if k not in keys},
        {p: s for p, s in located.places.items() if p[:1] == () or p[0] not in keys},
        {p: s for p, s in located.keys.items() if p[0] not in keys},
    )


def has_item(items: list[Any], index: str | int) -> bool:
    return isinstance(index, int) and 0 <= index < len(items)
