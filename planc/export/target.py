"""What an export target is, and what it is given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from planc.diagnostics import Diagnostic
from planc.verify import VerifiedPlan

if TYPE_CHECKING:
    from jinja2 import Environment

    from planc.schedule import Timeline


@dataclass(frozen=True, eq=False)
class Job:
    """A plan to export, with what it does not say: ``model``, the checkpoint (a folder, or a name on a hub), and ``image``,
    the container that serves it; empty where they are not known yet, and files then name a placeholder."""

    plan: VerifiedPlan
    model: str = ""
    image: str = ""
    options: Mapping[str, str] = field(default_factory=dict)  #: of a single target, such as `chakra.all_to_all`

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step, made when a target first asks for it; recorded traffic is left aside (see `time_notes`)."""
        from planc.schedule import known_traffic, timeline

        return timeline(self.plan, traffic=known_traffic(self.plan, files=False))


@dataclass(frozen=True)
class Target:
    """A form that a plan can be written in.

    ``title`` and ``version``: the program that reads it, and the version whose names of options are used; ``says`` and
    ``lacks``: what the form can and cannot express; ``faults``: why a plan cannot be written in it, each with the smallest
    change (PLN503); ``notes``: what the reader decides in its own way; ``files``: (name, content) of what is written, names
    relative to the target's folder. ``options``: key -> what may be given, with a default first.
    """

    title: str
    version: str
    says: str
    lacks: str
    faults: Callable[[Job], Iterable[Diagnostic]]
    notes: Callable[[Job], Iterable[str]]
    files: Callable[[Job], Iterable[tuple[str, bytes]]]
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def nothing(_: Job) -> tuple[()]:
    """No fault, or no note."""
    return ()


def refusal(title: str, message: str, change: str, path: str = "") -> Diagnostic:
    """PLN503: a target cannot express a plan; ``change`` is the smallest that it could, ``path`` the key to change."""
    return Diagnostic("PLN503", f"{title}: {message}", path=path, hint=change)


def time_notes(job: Job) -> Iterator[str]:
    """What the times of the simulated step do not rest on."""
    traffic = job.plan.spec.traffic
    if traffic is not None and traffic.file and job.plan.spec.model.moe is not None:
        yield "times are those of even routing, without the recording that the spec names; `planc trace` reads it"


def too_large(plan: VerifiedPlan, title: str, what: str, count: int, most: int) -> Iterator[Diagnostic]:
    """PLN503 where ``count`` of ``what`` is more than ``most``, with as many replicas as are not."""
    par = plan.parallelism
    if count > most:
        fit = most * par.dp // count
        change = f"plan {fit} of the {par.dp} replicas, which share nothing: parallelism.dp: {fit}, with their part of the cluster and the batch"
        message = f"{count:,} {what} are too many for one file; {most:,} are the most"
        yield refusal(title, message, change if fit else "export `chakra`, a file for each rank", "parallelism.dp")


def text_of(template: str, **values: Any) -> bytes:
    """A template of ``templates/export/`` filled in."""
    return _environment().get_template(template).render(**values).encode("utf-8", "surrogateescape")


@cache
def _environment() -> Environment:
    import shlex

    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from planc.spec import shipped_folder

    environment = Environment(
        loader=FileSystemLoader(shipped_folder("templates") / "export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell and YAML; what a user wrote goes through `sh` or `yaml`
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["yaml"] = _yaml
    environment.filters["chomp"] = lambda text: str(text).removesuffix("\n")
    return environment


def _yaml(value: Any) -> str:
    """A value as JSON, which is YAML when characters that YAML's readers refuse or fold are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text
    )
