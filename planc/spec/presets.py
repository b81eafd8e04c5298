"""Models, clusters and GPUs by name: shipped presets, files, bases with overrides, and `--set`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.spec.text import MAX_DEPTH, Located, Path_, decode, parse_yaml, read_bytes
from planc.spec.tree import at, graft, has_item, merge, subtree, without
from planc.spec.validate import kind_of

_PACKAGE = Path(__file__).resolve().parent.parent
_SIZED_CLUSTER = re.compile(r"(.+)-(\d{1,6})x(\d{1,4})")
_MAX_BASES = 16
_MAX_GROUPS = 64
_GROUP_KEYS = ("nodes", "gpus_per_node", "gpu", "nvlink_domain")
_INDEX = re.compile(r"[0-9]{1,9}")


def shipped_folder(name: str) -> Path:
    """The folder ``specs`` or ``templates`` that ships with planc: inside the wheel, else beside the package."""
    inside = _PACKAGE / f"_{name}"
    return inside if inside.is_dir() else _PACKAGE.parent / name


def preset_names(kind: str) -> list[str]:
    """Names of the shipped presets of a kind: ``models``, ``clusters``, ``gpus`` or ``fits``."""
    return sorted(path.stem for path in (shipped_folder("specs") / kind).glob("*.yaml"))


def read_tree(path: str, span: Span | None) -> Located:
    return parse_yaml(decode(read_bytes(path, span=span), path), path)


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


def resolve_part(part: Located, kind: str, folder: Path, chain: tuple[Path, ...]) -> Located:
    """A model, cluster or GPU: a name, a mapping with ``base``, or a plain mapping, as one plain mapping."""
    if isinstance(part.value, str):
        return _resolve_name(part.value, kind, folder, chain, part.places.get(()))
    if not (isinstance(part.value, dict) and "base" in part.value):
        return _resolve_gpus(part, folder) if kind == "clusters" else part
    base_span = part.places.get(("base",))
    if not isinstance(part.value["base"], str):
        raise PlancError([Diagnostic("PLN012", "`base` is the name of a preset or a file", "base", base_span)])
    base = _resolve_name(part.value["base"], kind, folder, chain, base_span)
    over = without(part, ("base",))
    if "groups" in over.value:  # the base's shorthand for one group gives way
        base = without(base, _GROUP_KEYS)
    merged = merge(base, over)
    return _resolve_gpus(merged, folder) if kind == "clusters" else merged


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
    located = read_tree(str(path), span)
    if not isinstance(located.value, dict):
        message = f"{path} is a mapping of keys to values, not {kind_of(located.value)}"
        raise PlancError([Diagnostic("PLN012", message, span=located.places.get((), Span(str(path), 1, 1)))])
    return resolve_part(located, kind, path.parent, (*chain, resolved))


def _resize(base: Located, name: str, nodes: int, gpus_per_node: int, span: Span | None) -> Located:
    """``NAME-16x8``: the cluster preset NAME with 16 nodes of 8 GPUs."""
    if "groups" in base.value:
        message = f"`{name}`: a size suffix needs a preset with one node group"
        raise PlancError([Diagnostic("PLN111", message, span=span, hint="set the sizes in `groups`")])
    value = {"name": name, "nodes": nodes, "gpus_per_node": gpus_per_node}
    places: dict[Path_, Span] = {(key,): span for key in value} if span else {}
    return merge(base, Located(value, places, dict(places)))


def override(located: Located, overrides: Iterable[str]) -> Located:
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
        parent = at(located.value, head[:-1])
        exists = (
            head[-1] in parent if isinstance(parent, dict) else isinstance(parent, list) and has_item(parent, head[-1])
        )
        value = parent[head[-1]] if exists else None
        if isinstance(value, str) and head[-1] in ("model", "cluster", "gpu"):
            span = located.places.get(head)
            located = graft(located, head, Located({"base": value}, {("base",): span} if span else {}, {}))
        elif value is None and isinstance(parent, dict) and isinstance(head[-1], str):
            located = graft(located, head, Located({}, {}, {}))
        elif not isinstance(value, (dict, list)):
            message = f"`{'.'.join(map(str, head))[:80]}` holds {kind_of(value)}, so nothing can be set inside it"
            raise PlancError([Diagnostic("PLN008", message, span=Span(shown, 1, 1))])
    parent = at(located.value, path[:-1])
    if not (isinstance(parent, dict) and isinstance(path[-1], str)) and not (
        isinstance(parent, list) and has_item(parent, path[-1])
    ):
        message = f"`{'.'.join(map(str, path))[:80]}` does not name a place in the spec"
        raise PlancError([Diagnostic("PLN008", message, span=Span(shown, 1, 1))])
    return graft(located, path, part)


def one_group(located: Located) -> Located:
    """A cluster with ``nodes`` and ``gpu`` at its top is a cluster of one group."""
    cluster = located.value.get("cluster")
    keys = [k for k in _GROUP_KEYS if isinstance(cluster, dict) and k in cluster]
    if not keys:
        return located
    if "groups" in cluster:
        message = f"`{keys[0]}` and `groups` are two ways to say the same: give one"
        span = located.keys.get(("cluster", keys[0]))
        raise PlancError([Diagnostic("PLN111", message, f"cluster.{keys[0]}", span)])
    part = subtree(located, ("cluster",))
    value = {k: v for k, v in part.value.items() if k not in keys} | {"groups": [{k: part.value[k] for k in keys}]}

    def moved(table: Mapping[Path_, Span]) -> dict[Path_, Span]:
        return {(("groups", 0, *p) if p[:1] and p[0] in keys else p): s for p, s in table.items()}

    places = moved(part.places)
    if () in part.places:
        places[("groups",)] = places[("groups", 0)] = part.places[()]
    return graft(located, ("cluster",), Located(value, places, moved(part.keys)))


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
        part = subtree(cluster, path)
        if isinstance(part.value, str) or (isinstance(part.value, dict) and "base" in part.value):
            cluster = graft(cluster, path, resolve_part(part, "gpus", folder, ()))
    return cluster


def split_sources(located: Located) -> tuple[Located, dict[str, str]]:
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
