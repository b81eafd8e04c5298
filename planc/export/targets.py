"""Every target by name, and the way from a plan to the files of some of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.export.target import Job, Target
from planc.files import write_whole
from planc.verify import VerifiedPlan

#: name on the command line, and of the folder -> module with the `TARGET`; adding one is a line here
TARGETS = {
    "sglang": "planc.export.sglang",
    "trtllm": "planc.export.trtllm",
    "vllm": "planc.export.vllm",
    "vllm-ascend": "planc.export.vllm_ascend",
    "lws": "planc.export.lws",
    "kserve": "planc.export.kserve",
    "dynamo": "planc.export.dynamo",
    "ray": "planc.export.ray",
    "slurm": "planc.export.slurm",
    "chakra": "planc.export.chakra",
    "kineto": "planc.export.kineto",
    "graphml": "planc.export.graphml",
    "gexf": "planc.export.gexf",
    "mermaid": "planc.export.mermaid",
    "csv": "planc.export.csv_files",
    "parquet": "planc.export.parquet_files",
}
ALL = "all"
LIST, FORMAT = "planc-export.json", "planc-export-1"  #: the list of what exports wrote into a folder


def target(name: str) -> Target:
    """The target of a name. Raises PlancError PLN502 where there is none."""
    if name not in TARGETS:
        message = f"`{name[:40]}` is not an export target; there are {', '.join(TARGETS)}, and `{ALL}`"
        raise PlancError([Diagnostic("PLN502", message, "--to", Span("--to", 1, 1), closest(name.lower(), TARGETS))])
    found: Target = import_module(TARGETS[name]).TARGET
    return found


def refusals(
    plan: VerifiedPlan, names: Iterable[str] = TARGETS, options: Mapping[str, str] | None = None
) -> dict[str, list[Diagnostic]]:
    """Target -> why it cannot express the plan (PLN503), empty where it can. Raises PlancError PLN502 for a name or one of
    the ``options`` (`TARGET.KEY` -> value) that there is none of."""
    names = list(names)
    job = Job(plan, options=options_of(names, options or {}))
    return {name: list(target(name).faults(job)) for name in names}


@dataclass(frozen=True)
class Exported:
    """What became of an export: the files of the targets, what readers decide in their own way, and for `all` the targets that
    cannot express the plan (PLN503)."""

    paths: list[Path]
    notes: dict[str, list[str]]
    refused: dict[str, list[Diagnostic]]


def write(
    plan: VerifiedPlan,
    targets: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    model: str = "",
    image: str = "",
    options: Mapping[str, str] | None = None,
) -> Exported:
    """Write a plan for ``targets`` into ``folder``, a folder for each. `all`: every target that can express the plan.

    ``model``: the checkpoint to serve; ``image``: the container; ``options``: `TARGET.KEY` -> value. `planc-export.json` lists
    what was written; files that it lists of an earlier export of the same targets are removed, others are never touched.
    Raises PlancError: PLN502 for a name or option that there is none of, PLN503 for a plan that a target cannot express,
    PLN017; nothing is written then.
    """
    asked = asked_for(targets)
    job = Job(plan, model, image, options_of(asked, options or {}))
    refused = {name: found for name in asked if (found := list(target(name).faults(job)))}
    if refused and ALL not in targets:
        raise PlancError(fault for found in refused.values() for fault in found)
    notes = {name: list(target(name).notes(job)) for name in asked if name not in refused}
    before = _listed(Path(folder))
    files: dict[str, list[str]] = {name: [] for name in notes}
    listed = [f"{name}/{file}" for name in asked for file in before.get(name, {}).get("files", ())]
    stale = [path for path in listed if os.path.isfile(Path(folder) / path)]

    def made() -> Iterator[tuple[str, bytes]]:
        for name in notes:
            for file, content in target(name).files(job):
                files[name].append(file)
                yield f"{name}/{file}", content
        now = {name: _record(job, name, notes[name], files[name]) for name in notes}
        kept = {name: record for name, record in before.items() if name not in asked}
        told = {"format": FORMAT, "targets": {name: (now | kept)[name] for name in TARGETS if name in now | kept}}
        yield LIST, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()

    paths = write_whole(folder, made(), stale)
    for name in refused:
        with suppress(OSError):
            (Path(folder) / name).rmdir()  # what an earlier export leaves when it had no other files there
    return Exported(paths[:-1], notes, refused)


def _record(job: Job, name: str, notes: list[str], files: list[str]) -> dict[str, Any]:
    one = target(name)
    reader = f"{one.title} {one.version}".strip()
    return {"plan": job.plan.spec.name, "reader": reader, "notes": notes, "files": files}


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What earlier exports wrote into the folder, by target; a list that planc did not write says nothing."""
    try:
        record = json.loads((folder / LIST).read_bytes()) if os.path.isfile(folder / LIST) else {}
        if record.get("format") != FORMAT:
            return {}
        found = {name: record["targets"][name] for name in TARGETS if name in record["targets"]}
        names = [file for one in found.values() for file in one["files"]]
        plain = all(PurePosixPath(file).name and not {"..", "/"} & {*PurePosixPath(file).parts} for file in names)
        json.dumps(found, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return found if plain else {}


def asked_for(names: Sequence[str]) -> list[str]:
    """The targets of these names, `all` among them, in the order of the table. Raises PlancError PLN502."""
    for name in set(names) - {ALL}:
        target(name)
    if ALL in names:
        return list(TARGETS)
    return [name for name in TARGETS if name in names]


def options_of(names: Iterable[str], asked: Mapping[str, str]) -> dict[str, str]:
    """`TARGET.KEY` -> value for every option of the targets, as asked or by default. Raises PlancError PLN502."""
    known = {f"{name}.{key}": values for name in names for key, values in target(name).options.items()}
    for key, value in asked.items():
        if key not in known or value not in known[key]:
            told = ", ".join(f"{k}={'|'.join(v)}" for k, v in known.items()) or "none for these targets"
            message = f"`{key}={value}`"[:80] + " is not an option of the targets asked for"
            raise PlancError([Diagnostic("PLN502", message, "--option", Span("--option", 1, 1), f"options: {told}")])
    return {key: values[0] for key, values in known.items()} | dict(asked)
