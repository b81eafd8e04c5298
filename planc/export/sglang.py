"""SGLang: the expert map for `--init-expert-location`, and a launch script."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.nodes import instances, node_faults
from planc.export.slots import gating_notes, has_copies, slot_faults, slot_tables
from planc.export.target import Job, Target, refusal, text_of
from planc.placement.expert_map import map_json
from planc.verify import VerifiedPlan

MAP = "expert_location.json"


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang cannot be told."""
    plan, par = job.plan, job.plan.parallelism
    on_nodes = list(node_faults(plan, TARGET.title))
    yield from (*slot_faults(plan, TARGET.title), *on_nodes)
    sizes = [] if on_nodes else [len(one.nodes) for one in instances(plan)]
    nodes = next((nodes for nodes in sizes if nodes % par.pp and par.pp % nodes), 0)
    if nodes:
        message = f"a node has whole stages, or a stage whole nodes, and here {nodes} nodes have {par.pp} stages"
        yield refusal(TARGET.title, message, "set parallelism.pp: 1, or stages that fill nodes", "parallelism.pp")


def notes(job: Job) -> Iterator[str]:
    """What SGLang does in its own way."""
    plan, work = job.plan, job.plan.spec.workload
    yield from gating_notes(plan)
    if has_copies(plan):
        yield "of an expert's copies a GPU uses its own first, then one on its node"
    if work.micro_batches > 1 and not _overlaps(plan):
        why = "it overlaps two" if plan.parallelism.pp == 1 else "pipeline stages take batches of their own"
        yield f"the {work.micro_batches} micro-batches of the plan are not asked for: {why}"


def _overlaps(plan: VerifiedPlan) -> bool:
    """Whether the engine's overlap of two batches is the plan's."""
    return plan.spec.workload.micro_batches == 2 and plan.parallelism.pp == 1


def arguments(plan: VerifiedPlan) -> list[tuple[str, str]]:
    """(flag, value) of one instance, "" for a switch; without what differs from node to node."""
    par = plan.parallelism
    moe = plan.spec.model.moe
    assert moe is not None
    slots = next(iter(slot_tables(plan).values())).size
    found = [("--tp-size", str(par.ep))]
    if par.pp > 1:
        found.append(("--pp-size", str(par.pp)))
    if par.attention_dp > 1:
        found.append(("--attn-dp-size", str(par.attention_dp)))
    found.append(("--ep-size", str(par.ep)))
    found += [("--moe-a2a-backend", "deepep"), ("--deepep-mode", plan.spec.execution.all_to_all)]
    if slots > moe.experts:
        found.append(("--ep-num-redundant-experts", str(slots - moe.experts)))
    found.append(("--ep-dispatch-algorithm", "static"))  # without one, tokens would go where experts are not
    if _overlaps(plan):
        found.append(("--enable-two-batch-overlap", ""))
    found.append(("--init-expert-location", MAP))
    return found


def expert_map(plan: VerifiedPlan) -> bytes:
    """The map that `--init-expert-location` reads."""
    tables, layers = slot_tables(plan), plan.spec.model.moe_layer_ids
    stacked = np.stack([tables[layer] for layer in layers])
    return map_json(stacked, moe_layers=layers, layers=plan.spec.model.layers).encode()


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map and the script."""
    plan = job.plan
    yield MAP, expert_map(plan)
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
            stages=plan.parallelism.stage_sizes,
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
