"""The verifier: a table of rules, run in two rounds, that turns a draft into a `VerifiedPlan` or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from planc.diagnostics import Diagnostic, PlancError
from planc.graph import Expanded, expand
from planc.verify.holdings import check_conservation, check_coverage, check_memory, check_placement, check_rule
from planc.verify.plan import Check, Draft, VerifiedPlan
from planc.verify.structure import check_blocks, check_communication, check_connected, check_cycles, check_ports
from planc.verify.tensors import check_edges, check_partial_sums, check_rows, check_sizes


class Rule(NamedTuple):
    """A check with what it promises, the codes it fails with, and what it counts."""

    name: str
    codes: tuple[str, ...]
    what: str
    check: Callable[[Draft, Expanded], Iterator[Diagnostic]]


#: in the order they run. `check_blocks` comes before all of them: they index by the ranks and ports it vouches for
RULES = (
    Rule("acyclic, by blocks and by ops", ("PLN301", "PLN302"), "ops", check_cycles),
    Rule("connected from input to output", ("PLN303",), "ops", check_connected),
    Rule("every port fed, no edge twice", ("PLN314", "PLN317"), "edges", check_ports),
    Rule("shape, dtype and layout on every edge", ("PLN304", "PLN305", "PLN306"), "edges", lambda d, _: check_edges(d)),
    Rule("row counts agree", ("PLN304",), "edges", check_rows),
    Rule("sizes follow from the model", ("PLN304",), "ops", lambda d, _: check_sizes(d)),
    Rule("partial sums reduced exactly once", ("PLN307", "PLN306"), "ops", lambda d, _: check_partial_sums(d)),
    Rule("communication marked exactly where ranks differ", ("PLN309",), "edges", check_communication),
    Rule("at-most-one-expert rule", ("PLN310",), "experts", lambda d, _: check_rule(d)),
    Rule("every expert in every replica", ("PLN311",), "experts", lambda d, _: check_coverage(d)),
    Rule("experts run where they are placed", ("PLN312",), "experts", lambda d, _: check_placement(d)),
    Rule("tokens conserved through dispatch and combine", ("PLN313",), "experts", check_conservation),
    Rule("memory table exact, every rank fits", ("PLN315", "PLN201"), "ranks", lambda d, _: check_memory(d)),
)


def faults(draft: Draft) -> tuple[list[Diagnostic], Expanded | None]:
    """Every fault of the draft, and its expanded graph when the blocks are sound."""
    found = list(check_blocks(draft))
    if found:
        return found, None
    expanded = expand(draft.blocks)
    return [fault for rule in RULES for fault in rule.check(draft, expanded)], expanded


def verify(draft: Draft) -> VerifiedPlan:
    """Check everything; raises PlancError with every fault found."""
    found, expanded = faults(draft)
    if found or expanded is None:
        raise PlancError(found)
    graph = draft.blocks
    experts = sum(len(b) for b in graph.blocks if b.kind == "expert" and b.micro_batch == 0)
    counts = {
        "ops": graph.op_count,
        "edges": len(expanded.source),
        "experts": experts,
        "ranks": draft.parallelism.world_size,
    }
    first = Check("ops have a kind, ports and GPUs", ("PLN308", "PLN314", "PLN317"), graph.op_count, "ops")
    checks = (first, *(Check(r.name, r.codes, counts[r.what], r.what) for r in RULES))
    plan = VerifiedPlan(
        draft.spec,
        draft.parallelism,
        draft.reasons,
        draft.placement,
        draft.memory,
        graph,
        draft.notes,
        checks,
    )
    plan.__dict__["expanded"] = expanded  # already made: keep it for whoever asks
    return plan
