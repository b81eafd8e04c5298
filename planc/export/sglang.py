"""SGLang: the expert map for `--init-expert-location`, and a launch script."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.nodes import instances, node_faults
from planc.export.slots import gating_notes, has_copies, slot_faults, slot_tables
from planc.export.target import Job, Target, text_of
from planc.placement.expert_map import map_json
from planc.verify import VerifiedPlan

MAP = "expert_location.json"


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang cannot be told."""
    plan = job.plan
    yield from slot_faults(plan, TARGET.title)
    yield from node_faults(plan, TARGET.title)


def notes(job: Job) -> Iterator[str]:
    """What SGLang does in its own way."""
    plan = job.plan
    yield from gating_notes(plan)
    if has_copies(plan):
        yield "of an expert's copies a GPU uses its own first, then one on its node"


def arguments(plan: VerifiedPlan) -> list[tuple[str, str]]:
    """(flag, value) of one instance, "" for a switch; without what differs from node to node."""
    par, work = plan.parallelism, plan.spec.workload
    moe = plan.spec.model.moe
    assert moe is not None
    slots = next(iter(slot_tables(plan).values())).size
    found = [("--tp-size", str(par.ep))]
    if par.pp > 1:
        found.append(("--pp-size", str(par.pp)))
    if par.attention_dp > 1:
        found.append(("--attn-dp-size", str(par.attention_dp)))
    found.append(("--ep-size", str(par.ep)))
    found += [("--moe-a2a-backend", "deepep"), ("--deepep-mode", _mode(plan))]
    if slots > moe.experts:
        found.append(("--ep-num-redundant-experts", str(slots - moe.experts)))
    found.append(("--ep-dispatch-algorithm", "static"))  # without one, tokens would go where experts are not
    if work.micro_batches > 1:
        found.append(("--enable-two-batch-overlap", ""))
    found.append(("--init-expert-location", MAP))
    return found


def _mode(plan: VerifiedPlan) -> str:
    asked = plan.spec.execution.all_to_all
    return "auto" if asked == "auto" else asked


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map and the script."""
    plan = job.plan
    tables = slot_tables(plan)
    layers = plan.spec.model.moe_layer_ids
    stacked = np.stack([tables[layer] for layer in layers])
    yield MAP, map_json(stacked, moe_layers=layers, layers=plan.spec.model.layers).encode()
    yield (
        "launch.sh",
        text_of(
            "sglang.sh.j2",
            name=plan.spec.name,
            target=TARGET,
            model=job.model,
            map=MAP,
            instances=instances(plan),
            arguments=arguments(plan),
            stages=[end - first for first, end in plan.parallelism.stages],
            notes=list(notes(job)),
        ),
    )


TARGET = Target(
    title="SGLang",
    version="0.5.23",
    says="any placement with as many experts of every MoE layer on each EP rank, copies included",
    lacks="empty slots, layers on different GPUs of one EP group, experts shared by several GPUs",
    faults=faults,
    notes=notes,
    files=files,
)
