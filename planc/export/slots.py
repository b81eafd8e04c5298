"""Slot tables: which expert is in which physical slot of an EP group, as engines count them.

Engines give every EP rank as many slots of every MoE layer, slot p of n lies on EP rank p // (n ÷ ranks), and none is empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.target import refusal
from planc.planner.tables import EMPTY
from planc.verify import VerifiedPlan


def slot_tables(plan: VerifiedPlan) -> dict[int, np.ndarray]:
    """MoE layer -> experts in the slots of every EP rank, int32 [holders, slots] (`EMPTY` where there is none), slots ordered
    by turn. The slots of a layer are as many as its fullest rank has."""
    par = plan.parallelism
    found = {}
    for layer, part in plan.placement.layers.items():
        table = np.full((par.holders, part.rounds), EMPTY, dtype=np.int32)
        table[part.rank // par.expert_tp, part.slot] = part.expert
        found[layer] = table
    return found


def slot_faults(plan: VerifiedPlan, title: str) -> Iterator[Diagnostic]:
    """Why slots of a plan are not those of an engine: they hold parts of experts, some are empty, or layers have different
    numbers of them."""
    par, moe = plan.parallelism, plan.spec.model.moe
    if moe is None:
        yield refusal(title, "the model has no experts to place", "export chakra, kineto, graphml or csv", "model.moe")
        return
    if par.expert_tp > 1:
        message = f"a slot holds a whole expert, and here {par.expert_tp} GPUs share one"
        yield refusal(title, message, "set parallelism.expert_tp: 1", "parallelism.expert_tp")
    tables = slot_tables(plan)
    widths = sorted({table.shape[1] for table in tables.values()})
    holes = [layer for layer, table in tables.items() if (table == EMPTY).any()]
    rule = plan.spec.expert_rule
    if getattr(rule, "scope", "layer") == "model" and (holes or len(widths) > 1):
        message = "experts of different layers are on different GPUs of one EP group, which this engine cannot have"
        full = "" if moe.experts % par.holders == 0 else " and expert_rule.spares: replicate"
        change = f"set expert_rule.scope: layer{full}, or give the layers stages of their own (parallelism.pp, with an ep as much smaller)"
        yield refusal(title, message, change, "expert_rule.scope")
    elif holes:
        table = tables[holes[0]]
        empty = int((table == EMPTY).sum())
        message = f"layer {holes[0]} leaves {empty} of {table.size} slots empty ({moe.experts} experts on {par.holders} ranks); engines have none"
        yield refusal(title, message, *_filled(plan))
    elif len(widths) > 1:
        message = f"layers have {widths[0]} to {widths[-1]} slots a rank; engines have as many in every layer"
        yield refusal(
            title, message, f"set expert_rule.slots_per_gpu: {widths[-1]} and spares: replicate", "expert_rule"
        )


def _filled(plan: VerifiedPlan) -> tuple[str, str]:
    """(the change that fills empty slots, its key)."""
    if plan.spec.policy == "given":
        return f"fill the empty slots of {plan.spec.placement.map} with further copies", "placement.map"
    if plan.spec.expert_rule == "none":
        return "set expert_rule: {spares: replicate}, so that they hold further copies", "expert_rule"
    return "set expert_rule.spares: replicate, so that they hold further copies", "expert_rule.spares"


def redundant(plan: VerifiedPlan) -> int:
    """Slots of a layer beyond one for each expert; of a plan for which `slot_faults` finds nothing, its further copies."""
    moe = plan.spec.model.moe
    assert moe is not None
    return next(iter(slot_tables(plan).values())).size - moe.experts


def one_stage(plan: VerifiedPlan) -> str:
    """The change that leaves one pipeline stage, with GPUs and batch of a replica as they are."""
    par, moe = plan.parallelism, plan.spec.model.moe
    ep = par.ep * par.pp
    fill = " and expert_rule.spares: replicate" if moe is not None and moe.experts % (ep // par.expert_tp) else ""
    return f"set parallelism.pp: 1 and ep: {ep}{fill}"
