"""Slot tables: which expert is in which physical slot of an EP group, as engines count them.

Engines give every EP rank as many slots of every MoE layer, slot p of n lies on EP rank p // (n ÷ ranks), and none is empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.target import refusal
from planc.placement import step_tokens
from planc.placement.expert_map import EMPTY
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


def gating_notes(plan: VerifiedPlan) -> Iterator[str]:
    """Who routes tokens in engines, where the plan has it otherwise."""
    if plan.parallelism.leaders_gate:
        yield "every GPU of a TP group routes its share of the tokens; the plan's leaders, which route for all, are planc's own"


def has_copies(plan: VerifiedPlan) -> bool:
    """Whether an expert has further copies."""
    return any((part.copies > 1).any() for part in plan.placement.layers.values())


def one_stage(plan: VerifiedPlan) -> str:
    """The change that leaves one pipeline stage, with GPUs and batch of a replica as they are."""
    par, moe = plan.parallelism, plan.spec.model.moe
    ep = par.ep * par.pp
    fill = " and expert_rule.spares: replicate" if moe is not None and moe.experts % (ep // par.expert_tp) else ""
    return f"set parallelism.pp: 1 and ep: {ep}{fill}"


LOW_LATENCY_TOKENS = 1024  #: of a rank, the most that DeepEP's low-latency dispatch can have room for


def is_low_latency(plan: VerifiedPlan) -> bool:
    """Whether the plan's dispatch is the one for few tokens."""
    asked = plan.spec.execution.all_to_all
    return asked == "low_latency" or (asked == "auto" and plan.spec.workload.phase == "decode")


def group_tokens(plan: VerifiedPlan) -> int:
    """Tokens that a TP group takes in a step: one of each of its sequences, or a chunk of prompts."""
    tokens, work = step_tokens(plan.spec, plan.parallelism), plan.spec.workload
    return tokens.sequences if work.phase == "decode" else tokens.group * work.micro_batches


def low_latency_faults(plan: VerifiedPlan, title: str, tokens: int) -> Iterator[Diagnostic]:
    """Why DeepEP's low-latency dispatch, where the plan has it, cannot take the ``tokens`` of a rank and step."""
    if is_low_latency(plan) and tokens > LOW_LATENCY_TOKENS:
        message = (
            f"low-latency dispatch takes {LOW_LATENCY_TOKENS:,} tokens of a rank at most, and the plan has {tokens:,}"
        )
        yield refusal(title, message, "set execution.all_to_all: normal, or lower the batch", "execution.all_to_all")
