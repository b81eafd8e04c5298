"""Who holds what: degrees, expert placement under the at-most-one-expert rule, and memory per rank."""

from planc.placement.degrees import Placed, resolve
from planc.placement.experts import LayerPlacement, Placement, check_rule, layer_placement, place_experts
from planc.placement.memory import (
    ITEMS,
    WEIGHT_ITEMS,
    MemoryTable,
    copy_tokens,
    largest_that_fits,
    memory_table,
    working_sets,
)
from planc.placement.mesh import Parallelism, StepTokens, step_tokens
from planc.placement.policy import POLICIES, POLICY_NAMES

__all__ = [
    "ITEMS",
    "POLICIES",
    "POLICY_NAMES",
    "WEIGHT_ITEMS",
    "LayerPlacement",
    "MemoryTable",
    "Parallelism",
    "Placed",
    "Placement",
    "StepTokens",
    "check_rule",
    "copy_tokens",
    "largest_that_fits",
    "layer_placement",
    "memory_table",
    "place_experts",
    "resolve",
    "step_tokens",
    "working_sets",
]
