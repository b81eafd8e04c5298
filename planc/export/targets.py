"""Every target by name, and the way from a plan to the files of some of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

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


def target(name: str) -> Target:
    """The target of a name. Raises PlancError PLN502 where there is none."""
    if name not in TARGETS:
        message = f"`{name[:40]}` is not an export target; there are {', '.join(TARGETS)}, and `{ALL}`"
        raise PlancError([Diagnostic("PLN502", message, "--to", Span("--to", 1, 1), closest(name, TARGETS))])
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


def files(job: Job, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(path under the folder, content) of all files of the targets."""
    for name in names:
        for path, content in target(name).files(job):
            yield f"{name}/{path}", content


def write(
    plan: VerifiedPlan,
    targets: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    model: str = "",
    image: str = "",
    options: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a plan for ``targets`` into ``folder``, a folder for each, and return the paths. `all`: every target that can
    express the plan.

    ``model``: the checkpoint to serve; ``image``: the container; ``options``: `TARGET.KEY` -> value. Files that an earlier
    export of the same targets left are removed. Raises PlancError: PLN502 for a name or option that there is none of, PLN503
    for a plan that a target cannot express, PLN017; nothing is written then.
    """
    asked = asked_for(targets)
    refused = refusals(plan, asked, options)
    found = [fault for faults in refused.values() for fault in faults]
    if found and ALL not in targets:
        raise PlancError(found)
    names = [name for name, faults in refused.items() if not faults]
    job = Job(plan, model, image, options_of(asked, options or {}))
    base = Path(folder)
    before = [
        path.relative_to(base).as_posix()
        for name in names
        for path in sorted((base / name).rglob("*"))
        if path.is_file()
    ]
    return write_whole(folder, files(job, names), before)


def asked_for(names: Sequence[str]) -> list[str]:
    """The targets of these names, `all` among them, in the order of the table. Raises PlancError PLN502."""
    if ALL in names:
        return list(TARGETS)
    for name in names:
        target(name)
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
