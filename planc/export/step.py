"""What engines are told of the plan's step: tokens that a rank takes at a time, and who routes them."""

from __future__ import annotations

from collections.abc import Iterator

from planc.cost.step import exchange_mode
from planc.diagnostics import Diagnostic
from planc.export.target import refusal
from planc.placement import step_tokens
from planc.verify import VerifiedPlan

LOW_LATENCY_TOKENS = 1024  #: of a rank, the most that DeepEP's low-latency dispatch can have room for


def group_tokens(plan: VerifiedPlan) -> int:
    """Tokens that a TP group takes in a step: one of each of its sequences, or a chunk of prompts."""
    tokens, work = step_tokens(plan.spec, plan.parallelism), plan.spec.workload
    return tokens.sequences if work.phase == "decode" else tokens.group * work.micro_batches


def low_latency_faults(plan: VerifiedPlan, title: str, tokens: int) -> Iterator[Diagnostic]:
    """Why DeepEP's low-latency dispatch, where the plan has it, cannot take the ``tokens`` of a rank and step."""
    if exchange_mode(plan.spec) == "low_latency" and tokens > LOW_LATENCY_TOKENS:
        message = (
            f"low-latency dispatch takes {LOW_LATENCY_TOKENS:,} tokens of a rank at most, and the plan has {tokens:,}"
        )
        yield refusal(title, message, "set execution.all_to_all: normal, or lower the batch", "execution.all_to_all")


def gating_notes(plan: VerifiedPlan) -> Iterator[str]:
    """Who routes tokens in engines, where the plan has it otherwise."""
    if plan.parallelism.leaders_gate:
        yield "every GPU of a TP group routes its share of the tokens; the plan's leaders, which route for all, are planc's own"
