"""Spec files to a `Spec`: resolve presets, apply overrides, validate."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable
from pathlib import Path

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.cluster import Cluster, Gpu
from planc.spec.deployment import Spec
from planc.spec.model import Model
from planc.spec.presets import one_group, override, preset_names, read_tree, resolve_part, shipped_folder, split_sources
from planc.spec.text import Located, Path_, parse_yaml
from planc.spec.tree import graft, subtree, without
from planc.spec.validate import kind_of, validate

__all__ = [
    "load_cluster",
    "load_gpu",
    "load_model",
    "load_spec",
    "load_target",
    "parse_spec",
    "preset_names",
    "shipped_folder",
    "spec_from_tree",
    "spec_from_values",
]


def load_spec(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Spec:
    """Read a deployment spec; ``overrides`` are ``dotted.key=value`` texts that win over the file.

    A bare name such as ``mixtral-8x7b`` is an example spec that ships with planc. Raises PlancError with every fault
    found (0xx codes), sorted by position.
    """
    shipped = shipped_folder("specs") / f"{path}.yaml"
    if len(Path(path).parts) == 1 and not os.path.isfile(path) and os.path.isfile(shipped):
        path = shipped
    located = read_tree(os.fspath(path), None)
    return spec_from_tree(override(located, overrides), Path(path).parent, os.fspath(path))


def parse_spec(text: str, *, file: str = "<text>", folder: str | os.PathLike[str] = ".") -> Spec:
    """Like `load_spec`, for a spec held in a string; relative names are looked up in ``folder``."""
    return spec_from_tree(parse_yaml(text, file), Path(folder), file)


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read one model file or model preset by name. Raises PlancError like `load_spec`."""
    located = resolve_part(Located(os.fspath(path), {}, {}), "models", Path("."), ())
    located, _ = split_sources(located)
    return typing.cast(Model, validate(Model, located, os.fspath(path)))


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read one cluster file or cluster preset by name (`h100-sxm-32x8`). Raises PlancError like `load_spec`."""
    located = resolve_part(Located(os.fspath(path), {}, {}), "clusters", Path("."), ())
    whole = Located({"cluster": located.value}, _inside(located.places), _inside(located.keys))
    located, _ = split_sources(subtree(one_group(whole), ("cluster",)))
    return typing.cast(Cluster, validate(Cluster, located, os.fspath(path)))


def load_gpu(path: str | os.PathLike[str]) -> Gpu:
    """Read one GPU file or GPU preset by name. Raises PlancError like `load_spec`."""
    located = resolve_part(Located(os.fspath(path), {}, {}), "gpus", Path("."), ())
    located, _ = split_sources(located)
    return typing.cast(Gpu, validate(Gpu, located, os.fspath(path)))


def _inside(table: dict[Path_, Span]) -> dict[Path_, Span]:
    return {("cluster", *path): span for path, span in table.items()}


def load_target(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Spec | Cluster:
    """A deployment spec (which has a `model`), or a cluster alone: a file or a name that ships. Raises PlancError like
    `load_spec`."""
    name = os.fspath(path)
    shipped = (shipped_folder("specs") / f"{name}.yaml").is_file() and len(Path(name).parts) == 1
    if os.path.isfile(name):
        value = read_tree(name, None).value
        if not (isinstance(value, dict) and {"model", "workload"} & set(value)):
            return load_cluster(name if "/" in name or name.endswith((".yaml", ".yml")) else f"./{name}")
        return load_spec(name, overrides)
    return load_spec(name, overrides) if shipped or os.path.exists(name) else load_cluster(name)


def spec_from_values(values: object, sources: dict[str, str], file: str) -> Spec:
    """A spec from plain values that are already whole, as a plan.json holds them."""
    spec = typing.cast(Spec, validate(Spec, Located(values, {}, {}), file))
    spec._sources.update(sources)
    return spec


def spec_from_tree(located: Located, folder: Path, file: str) -> Spec:
    """Resolve the presets of a spec tree and validate it."""
    if not isinstance(located.value, dict):
        message = f"a spec is a mapping of keys to values, not {kind_of(located.value)}"
        raise PlancError([Diagnostic("PLN012", message, span=located.places.get((), Span(file, 1, 1)))])
    faults: list[Diagnostic] = []
    unresolved: list[str] = []
    for key, kind in (("model", "models"), ("cluster", "clusters")):
        try:
            if key in located.value:
                located = graft(located, (key,), resolve_part(subtree(located, (key,)), kind, folder, ()))
        except PlancError as error:
            faults += error.diagnostics
            unresolved.append(key)
    if faults:
        raise PlancError(faults + _other_faults(without(located, tuple(unresolved)), unresolved, file))
    located = one_group(located)
    located, sources = split_sources(located)
    spec = typing.cast(Spec, validate(Spec, located, file))
    spec._places.update({".".join(map(str, path)): span for path, span in located.places.items()})
    spec._sources.update(sources)
    spec._folder = folder
    return spec


def _other_faults(located: Located, unresolved: list[str], file: str) -> list[Diagnostic]:
    """Faults of a spec beside the parts that could not be found, so that all are reported at once."""
    try:
        validate(Spec, split_sources(one_group(located))[0], file)
    except PlancError as error:
        return [fault for fault in error.diagnostics if fault.path not in unresolved]
    return []
