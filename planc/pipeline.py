"""The compiler on one page: spec → check → place → graph → verify → write."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.files import write_whole
from planc.graph import build_graph
from planc.placement import POLICY_NAMES, Placed, resolve
from planc.placement.legality import given_degree_faults
from planc.spec import Spec, check_spec
from planc.verify import Draft, VerifiedPlan, load_plan, plan_json, plan_notes, verify

if TYPE_CHECKING:
    from planc.schedule import Timeline


def compile(spec: Spec, *, workers: int = 1, progress: Progress | None = None) -> VerifiedPlan:
    """Compile a deployment spec to a verified plan.

    Where the spec gives traffic, ``workers`` processes plan its layers (the result is the same for any number) and
    ``progress`` is called with (layers planned, of how many). Raises PlancError with every contradiction in the spec
    (1xx), or with why no placement fits (2xx).
    """
    placed = place(spec)
    if spec.policy == "topology":
        from planc.placement.known_traffic import place_for_traffic  # brings scipy: only where it is needed

        placed = place_for_traffic(spec, placed, workers=workers, progress=progress)
    elif spec.policy == "given":
        from planc.placement.given import place_as_given

        placed = place_as_given(spec, placed)
    graph = build_graph(spec, placed.par, placed.placement)
    notes = tuple(plan_notes(spec, placed.par, placed.placement))
    parts = placed.par, placed.reasons, placed.placement, placed.memory, graph, notes, placed.certificate
    return verify(Draft(spec, *parts))


Progress = Callable[[int, int], None]


def place(spec: Spec) -> Placed:
    """Check the spec, choose its degrees and place its experts, as the policy `linear` does where traffic or a map decides;
    builds no graph. Raises PlancError like `compile`."""
    faults = check_spec(spec)
    if spec.placement.policy not in POLICY_NAMES:
        message = f"`{spec.placement.policy}` is not a placement policy; there are {', '.join(POLICY_NAMES)}"
        faults.append(spec.fault("PLN015", message, "placement.policy"))
    if faults:
        sound = all(fault.code != "PLN103" for fault in faults)  # degrees are judged against sound attention sizes
        raise PlancError([*faults, *(given_degree_faults(spec) if sound else ())])
    return resolve(spec)


def file_faults(spec: Spec, placed: Placed) -> list[Diagnostic]:
    """Faults of the recordings and the expert map that the spec names, which `place` does not read."""
    found: list[Diagnostic] = []
    if spec.policy == "given":
        from planc.placement.given import file_faults as map_faults

        found += map_faults(spec, placed.par)
    if spec.policy == "topology" or spec.traffic is not None:
        from planc.placement.known_traffic import file_faults as traffic_faults

        found += traffic_faults(spec, placed.par)
    return found


# --- outputs --------------------------------------------------------------------------------------------------------

TRAFFIC_FIGURES = ("expert_heat_map.svg", "link_loads.svg")  #: of plans made for known traffic
FIGURES = ("comprehensive_moe_dag", "simplified_moe_dag", "detailed_expert_dag", "complete_deployment_dag")


def outputs(plan: VerifiedPlan, figures: Iterable[str] = FIGURES) -> Iterator[tuple[str, str]]:
    """(file name, text) of everything that a build writes, plan.json last; the same plan gives the same bytes.

    The comprehensive figure is left out of plans with more than `planc.render.comprehensive.MAX_OPS` ops.
    """
    from planc.render import (
        PAGE_FIGURES,
        comprehensive,
        dot,
        expert_heat_map_svg,
        link_bars_svg,
        memory_svg,
        svg,
        timeline_svg,
    )
    from planc.report import document_html, document_markdown
    from planc.schedule import estimate, known_traffic

    captions: dict[str, str] = {}
    # a recording may not be at hand when the files are checked again, so it has no part in what they say
    found = estimate(plan, traffic=known_traffic(plan, files=False))
    pictures = {"memory.svg": memory_svg(plan), "timeline.svg": timeline_svg(found.own)}
    if plan.certificate is not None:
        pictures["expert_heat_map.svg"] = expert_heat_map_svg(
            plan.certificate, plan.placement, plan.spec.cluster.node_of_rank
        )
        if plan.certificate.kinds:
            pictures["link_loads.svg"] = link_bars_svg(plan.certificate)
    yield from pictures.items()
    for name in drawn(plan, figures):
        if name in PAGE_FIGURES:
            view = PAGE_FIGURES[name](plan)
            captions[name] = view.title
            pictures[f"{name}.svg"] = svg(view)
            yield f"{name}.svg", pictures[f"{name}.svg"]
            yield f"{name}.dot", dot(view)
        else:
            captions[name] = "every op of every layer on every GPU"
            yield f"{name}.svg", comprehensive.comprehensive_svg(plan)
            yield f"{name}.dot", comprehensive.comprehensive_dot(plan)
    markdown = document_markdown(plan, captions, found)
    yield "deployment_plan.md", markdown
    yield "deployment_plan.html", document_html(plan, markdown, pictures)
    yield "plan.json", plan_json(plan)


def drawn(plan: VerifiedPlan, figures: Iterable[str]) -> list[str]:
    """Those of the figures that the plan gets: a detailed figure needs experts, a comprehensive one a bounded size."""
    from planc.render import comprehensive

    names = [name for name in FIGURES if name in set(figures)]
    if not plan.placement.layers:
        names = [name for name in names if name != "detailed_expert_dag"]
    if plan.blocks.op_count > comprehensive.MAX_OPS:
        names = [name for name in names if name != "comprehensive_moe_dag"]
    return names


def write(plan: VerifiedPlan, folder: str | os.PathLike[str], figures: Iterable[str] = FIGURES) -> list[Path]:
    """Write the plan's files into ``folder`` and return their paths.

    Figures of an earlier build that this one does not draw are removed. Raises PlancError PLN017.
    """
    files = ((name, text.encode()) for name, text in outputs(plan, figures))
    return write_whole(folder, files, [f"{f}.{ext}" for f in FIGURES for ext in ("svg", "dot")] + [*TRAFFIC_FIGURES])


TRACE_OF_MANY = "step.json.gz"  #: the Chrome trace; that of one rank is rank-N.json.gz


def write_traces(
    timeline: Timeline,
    folder: str | os.PathLike[str],
    ranks: Iterable[int] | None = None,
    *,
    together: bool = False,
) -> list[Path]:
    """Write the traces of ``ranks`` (default: all) into ``folder`` and return their paths: a file per rank, or ``together``
    one of all, with the critical path. Traces that an earlier run left there are removed, so that a tool that reads the
    folder sees one step. Raises PlancError PLN017, PLN208."""
    from planc.schedule.trace import chrome, kineto, packed

    chosen = sorted(ranks if ranks is not None else range(timeline.plan.blocks.world_size))
    files: Iterable[tuple[str, bytes]]
    if together:
        files = [(TRACE_OF_MANY, packed(chrome(timeline, chosen)))]
    else:
        files = ((f"rank-{rank}.json.gz", packed(kineto(timeline, rank))) for rank in chosen)
    return write_whole(folder, files, _traces_in(Path(folder)))


def _traces_in(folder: Path) -> Iterator[str]:
    """Names of the traces that an earlier run left in the folder."""
    yield from (path.name for path in folder.glob("rank-*.json.gz") if re.fullmatch(r"rank-\d+\.json\.gz", path.name))
    yield TRACE_OF_MANY


def verify_folder(folder: str | os.PathLike[str]) -> tuple[VerifiedPlan, list[str]]:
    """Check a written plan from its files alone: plan.json by every rule of the verifier, and every other file that
    a build writes against what the plan says. Returns the plan and the names of the files compared.

    Raises PlancError with every fault found.
    """
    plan = load_plan(folder)
    base = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    present = [name for name in FIGURES if (base / f"{name}.svg").exists() or (base / f"{name}.dot").exists()]
    compared, faults = [], []
    for name, text in outputs(plan, present):
        path = base / name
        if not path.exists():
            faults.append(
                Diagnostic("PLN316", f"{name} is missing", span=Span(str(path), 1, 1), hint="build the plan again")
            )
            continue
        compared.append(name)
        found = path.read_bytes()
        if found != text.encode():
            faults.append(_difference(path, found, text.encode()))
    if faults:
        raise PlancError(faults)
    return plan, compared


def measure_again(plan: VerifiedPlan, traffic: str | None = None) -> str:
    """Measure the link times of a plan made for known traffic again, from the traffic (a recorded file may be given).
    Returns what was looked at, empty without a certificate. Raises PlancError PLN318 for what is said otherwise."""
    if plan.certificate is None:
        return ""
    from planc.placement.known_traffic import link_faults

    found, looked_at = link_faults(plan.spec, plan.parallelism, plan.placement, plan.certificate, traffic)
    if found:
        raise PlancError(found)
    return looked_at


def _difference(path: Path, found: bytes, want: bytes) -> Diagnostic:
    """The first line in which a file differs from what the plan says."""
    pairs = zip_longest(found.split(b"\n"), want.split(b"\n"))
    number, (a, b) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    shown = [
        (b"(end of file)" if text is None else text or b"(empty line)")[:100].decode("utf-8", "replace")
        for text in (a, b)
    ]
    message = f"{path.name} no longer says what plan.json says"
    if path.name == "plan.json":
        message = "plan.json holds a sound plan, but not in the form that planc writes"
    related = (f"found:  {shown[0]}", f"wanted: {shown[1]}")
    return Diagnostic(
        "PLN316",
        message,
        span=Span(str(path), number, 1),
        hint="build the plan again, or undo the edit",
        related=related,
    )
