"""Spec files to a `Spec`: find presets, merge bases and overrides, validate, and place every fault."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.spec.deployment import Spec
from planc.spec.model import Model
from planc.spec.text import MAX_DEPTH, Located, Path_, decode, parse_yaml, read_bytes

_PACKAGE = Path(__file__).resolve().parent.parent
_SIZED_CLUSTER = re.compile(r"(.+)-(\d{1,6})x(\d{1,4})")
_MAX_BASES = 16
_MAX_GROUPS = 64
_MOST_HINTS = 100
_GROUP_KEYS = ("nodes", "gpus_per_node", "gpu", "nvlink_domain")
_INDEX = re.compile(r"[0-9]{1,9}")


def shipped_folder(name: str) -> Path:
    """The folder ``specs`` or ``templates`` that ships with planc: inside the wheel, else beside the package."""
    inside = _PACKAGE / f"_{name}"
    return inside if inside.is_dir() else _PACKAGE.parent / name


def preset_names(kind: str) -> list[str]:
    """Names of the shipped presets of a kind: ``models``, ``clusters`` or ``gpus``."""
    return sorted(path.stem for path in (shipped_folder("specs") / kind).glob("*.yaml"))


def load_spec(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Spec:
    """Read a deployment spec; ``overrides`` are ``dotted.key=value`` texts that win over the file.

    A bare name such as ``mixtral-8x7b`` is an example spec that ships with planc. Raises PlancError with every fault
    found (0xx codes), sorted by position.
    """
    shipped = shipped_folder("specs") / f"{path}.yaml"
    if len(Path(path).parts) == 1 and not os.path.exists(path) and os.path.isfile(shipped):
        path = shipped
    located = _read(os.fspath(path), None)
    return spec_from_tree(_override(located, overrides), Path(path).parent, os.fspath(path))


def parse_spec(text: str, *, file: str = "<text>", folder: str | os.PathLike[str] = ".") -> Spec:
    """Like `load_spec`, for a spec held in a string; relative names are looked up in ``folder``."""
    return spec_from_tree(parse_yaml(text, file), Path(folder), file)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read one model file or model preset by name. Raises PlancError like `load_spec`."""
    located = _resolve(Located(os.fspath(path), {}, {}), "models", Path("."), ())
    located, _ = _split_sources(located)
    return typing.cast(Model, _validate(Model, located, os.fspath(path)))


def spec_from_values(values: object, sources: dict[str, str], file: str) -> Spec:
    """A spec from plain values that are already whole, as a plan.json holds them."""
    spec = typing.cast(Spec, _validate(Spec, Located(values, {}, {}), file))
    spec._sources.update(sources)
    return spec


def spec_from_tree(located: Located, folder: Path, file: str) -> Spec:
    """Resolve the presets of a spec tree and validate it."""
    if not isinstance(located.value, dict):
        message = f"a spec is a mapping of keys to values, not {_kind_of(located.value)}"
        raise PlancError([Diagnostic("PLN012", message, span=located.places.get((), Span(file, 1, 1)))])
    faults: list[Diagnostic] = []
    for key, kind in (("model", "models"), ("cluster", "clusters")):
        try:
            if key in located.value:
                located = _graft(located, (key,), _resolve(_subtree(located, (key,)), kind, folder, ()))
        except PlancError as error:
            faults += error.diagnostics
    if faults:
        raise PlancError(faults)
    located = _one_group(located)
    located, sources = _split_sources(located)
    spec = typing.cast(Spec, _validate(Spec, located, file))
    spec._places.update({".".join(map(str, path)): span for path, span in located.places.items()})
    spec._sources.update(sources)
    return spec


# --- trees -----------------------------------------------------------------------------------------------------


def _read(path: str, span: Span | None) -> Located:
    return parse_yaml(decode(read_bytes(path, span=span), path), path)


def _at(value: Any, path: Path_) -> Any:
    for part in path:
        value = value[part]
    return value


def _subtree(located: Located, path: Path_) -> Located:
    n = len(path)
    places = {p[n:]: s for p, s in located.places.items() if p[:n] == path}
    keys = {p[n:]: s for p, s in located.keys.items() if p[:n] == path and len(p) > n}
    return Located(_at(located.value, path), places, keys)


def _graft(located: Located, path: Path_, part: Located) -> Located:
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


def _merge(base: Located, over: Located) -> Located:
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


# --- presets, bases, overrides -----------------------------------------------------------------------------------


def _find(name: str, kind: str, folder: Path, span: Span | None) -> Path:
    try:
        is_file = name.endswith((".yaml", ".yml")) or "/" in name
        inside = Path(name) if is_file else Path(kind, f"{name}.yaml")
        for candidate in (folder / inside, shipped_folder("specs") / inside):
            if candidate.is_file():
                return candidate
    except (OSError, ValueError):
        pass
    names = preset_names(kind)
    hint = closest(name, names) or f"shipped {kind}: {', '.join(names)}"
    raise PlancError(
        [Diagnostic("PLN007", f"no file and no preset named `{name[:80]}` in {kind}", span=span, hint=hint)]
    )


def _resolve(part: Located, kind: str, folder: Path, chain: tuple[Path, ...]) -> Located:
    """A model, cluster or GPU: a name, a mapping with ``base``, or a plain mapping, as one plain mapping."""
    if isinstance(part.value, str):
        return _resolve_name(part.value, kind, folder, chain, part.places.get(()))
    if not (isinstance(part.value, dict) and "base" in part.value):
        return _resolve_gpus(part, folder) if kind == "clusters" else part
    base_span = part.places.get(("base",))
    if not isinstance(part.value["base"], str):
        raise PlancError([Diagnostic("PLN012", "`base` is the name of a preset or a file", "base", base_span)])
    base = _resolve_name(part.value["base"], kind, folder, chain, base_span)
    over = _without(part, ("base",))
    if "groups" in over.value:  # the base's shorthand for one group gives way
        base = _without(base, _GROUP_KEYS)
    merged = _merge(base, over)
    return _resolve_gpus(merged, folder) if kind == "clusters" else merged


def _without(located: Located, keys: tuple[str, ...]) -> Located:
    return Located(
        {k: v for k, v in located.value.items() if k not in keys},
        {p: s for p, s in located.places.items() if p[:1] == () or p[0] not in keys},
        {p: s for p, s in located.keys.items() if p[0] not in keys},
    )


def _resolve_name(name: str, kind: str, folder: Path, chain: tuple[Path, ...], span: Span | None) -> Located:
    try:
        path = _find(name, kind, folder, span)
    except PlancError:
        sized = _SIZED_CLUSTER.fullmatch(name) if kind == "clusters" else None
        if sized is None or _SIZED_CLUSTER.fullmatch(sized[1]):
            raise
        base = _resolve_name(sized[1], kind, folder, chain, span)
        return _resize(base, name, int(sized[2]), int(sized[3]), span)
    resolved = path.resolve()
    if resolved in chain or len(chain) >= _MAX_BASES:
        loop = " -> ".join(p.name for p in (*chain, resolved))
        raise PlancError([Diagnostic("PLN006", f"include cycle: {loop}", span=span, hint="remove one `base`")])
    located = _read(str(path), span)
    if not isinstance(located.value, dict):
        message = f"{path} is a mapping of keys to values, not {_kind_of(located.value)}"
        raise PlancError([Diagnostic("PLN012", message, span=located.places.get((), Span(str(path), 1, 1)))])
    return _resolve(located, kind, path.parent, (*chain, resolved))


def _resize(base: Located, name: str, nodes: int, gpus_per_node: int, span: Span | None) -> Located:
    """``NAME-16x8``: the cluster preset NAME with 16 nodes of 8 GPUs."""
    if "groups" in base.value:
        message = f"`{name}`: a size suffix needs a preset with one node group"
        raise PlancError([Diagnostic("PLN111", message, span=span, hint="set the sizes in `groups`")])
    value = {"name": name, "nodes": nodes, "gpus_per_node": gpus_per_node}
    places: dict[Path_, Span] = {(key,): span for key in value} if span else {}
    return _merge(base, Located(value, places, dict(places)))


def _override(located: Located, overrides: Iterable[str]) -> Located:
    """Apply ``dotted.key=value`` texts; a named model, cluster or GPU becomes the base of what is set in it."""
    for text in overrides:
        shown = f"--set {text[:80]}"
        dotted, equals, value = text.partition("=")
        parts: list[str | int] = [int(p) if _INDEX.fullmatch(p) else p for p in dotted.strip().split(".")]
        if not equals or not all(p != "" for p in parts) or len(parts) > MAX_DEPTH:
            message = f"`{text[:80]}` is not KEY=VALUE"
            raise PlancError([Diagnostic("PLN008", message, span=Span(shown, 1, 1), hint="--set workload.batch=512")])
        part = parse_yaml(value, shown)
        places = {p: Span(shown, 1, 1) for p in part.places}
        located = _set(
            located, tuple(parts), Located(part.value, places, {p: Span(shown, 1, 1) for p in part.keys}), shown
        )
    return located


def _set(located: Located, path: Path_, part: Located, shown: str) -> Located:
    for n in range(1, len(path)):
        head = path[:n]
        parent = _at(located.value, head[:-1])
        exists = head[-1] in parent if isinstance(parent, dict) else isinstance(parent, list) and _has(parent, head[-1])
        value = parent[head[-1]] if exists else None
        if isinstance(value, str) and head[-1] in ("model", "cluster", "gpu"):
            span = located.places.get(head)
            located = _graft(located, head, Located({"base": value}, {("base",): span} if span else {}, {}))
        elif value is None and isinstance(parent, dict) and isinstance(head[-1], str):
            located = _graft(located, head, Located({}, {}, {}))
        elif not isinstance(value, (dict, list)):
            message = f"`{'.'.join(map(str, head))[:80]}` holds {_kind_of(value)}, so nothing can be set inside it"
            raise PlancError([Diagnostic("PLN008", message, span=Span(shown, 1, 1))])
    parent = _at(located.value, path[:-1])
    if not (isinstance(parent, dict) and isinstance(path[-1], str)) and not (
        isinstance(parent, list) and _has(parent, path[-1])
    ):
        message = f"`{'.'.join(map(str, path))[:80]}` does not name a place in the spec"
        raise PlancError([Diagnostic("PLN008", message, span=Span(shown, 1, 1))])
    return _graft(located, path, part)


def _has(items: list[Any], index: str | int) -> bool:
    return isinstance(index, int) and 0 <= index < len(items)


def _one_group(located: Located) -> Located:
    """A cluster with ``nodes`` and ``gpu`` at its top is a cluster of one group."""
    cluster = located.value.get("cluster")
    keys = [k for k in _GROUP_KEYS if isinstance(cluster, dict) and k in cluster]
    if not keys:
        return located
    if "groups" in cluster:
        message = f"`{keys[0]}` and `groups` are two ways to say the same: give one"
        span = located.keys.get(("cluster", keys[0]))
        raise PlancError([Diagnostic("PLN111", message, f"cluster.{keys[0]}", span)])
    part = _subtree(located, ("cluster",))
    value = {k: v for k, v in part.value.items() if k not in keys} | {"groups": [{k: part.value[k] for k in keys}]}

    def moved(table: Mapping[Path_, Span]) -> dict[Path_, Span]:
        return {(("groups", 0, *p) if p[:1] and p[0] in keys else p): s for p, s in table.items()}

    places = moved(part.places)
    if () in part.places:
        places[("groups",)] = places[("groups", 0)] = part.places[()]
    return _graft(located, ("cluster",), Located(value, places, moved(part.keys)))


def _resolve_gpus(cluster: Located, folder: Path) -> Located:
    """The GPUs of a cluster by name or with a base, as plain mappings; ``folder`` is where the cluster is written."""
    if not isinstance(cluster.value, dict):
        return cluster
    groups = cluster.value.get("groups")
    paths: list[Path_] = [("gpu",)] if "gpu" in cluster.value else []
    if isinstance(groups, list) and len(groups) > _MAX_GROUPS:
        message = f"{len(groups):,} node groups; a cluster has at most {_MAX_GROUPS}"
        raise PlancError([Diagnostic("PLN014", message, "cluster.groups", cluster.places.get(("groups",)))])
    for i, group in enumerate(groups if isinstance(groups, list) else ()):
        if isinstance(group, dict) and "gpu" in group:
            paths.append(("groups", i, "gpu"))
    for path in paths:
        part = _subtree(cluster, path)
        if isinstance(part.value, str) or (isinstance(part.value, dict) and "base" in part.value):
            cluster = _graft(cluster, path, _resolve(part, "gpus", folder, ()))
    return cluster


def _split_sources(located: Located) -> tuple[Located, dict[str, str]]:
    """Take ``{value: X, source: TEXT}`` apart: X stays in the tree, TEXT goes to the table of sources."""
    sources: dict[str, str] = {}

    def walk(value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            if set(value) == {"value", "source"} and isinstance(value["source"], str):
                sources[".".join(map(str, path))] = value["source"]
                located.places[path] = located.places.get((*path, "value"), located.places.get(path, Span("", 1, 1)))
                return value["value"]
            return {k: walk(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, (*path, i)) for i, v in enumerate(value)]
        return value

    return Located(walk(located.value, ()), located.places, located.keys), sources


# --- validation ---------------------------------------------------------------------------------------------------


def _validate(model: type[BaseModel], located: Located, file: str) -> BaseModel:
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
    return row["type"] == "literal_error" and isinstance(row["input"], dict)


def _fault(
    model: type[BaseModel], located: Located, file: str, row: dict[str, Any], *, hints: bool = True
) -> Diagnostic:
    path: Path_ = ()
    value = located.value
    for part in row["loc"]:  # a union adds its branch's name to the location: skip what the tree does not have
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and _has(value, part)):
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
        return f"expected {_EXPECTED[kind]}, found {_kind_of(value)}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{str(value)[:40]} must be {words} {context[key]:,}"
    if kind in ("too_short", "too_long"):
        return (
            f"the list has {context.get('actual_length')} items; it may have {context.get('min_length', 0)} to "
            f"{context.get('max_length', 'any number')}"
        )
    return fallback[:1].lower() + fallback[1:] if fallback[:2].istitle() else fallback


def _kind_of(value: Any) -> str:
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
