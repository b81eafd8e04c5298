"""The verifier: a table of rules, run in two rounds, that turns a draft into a `VerifiedPlan` or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from planc.diagnostics import Diagnostic, PlancError
from planc.graph import Expanded, expand
from planc.verify.certificate import check_certificate
from planc.verify.holdings import check_conservation, check_coverage, check_memory, check_placement, check_rule
from planc.verify.mesh import check_degrees, check_ranks
from planc.verify.plan import Check, Draft, VerifiedPlan
from planc.verify.structure import check_blocks, check_connected, check_cycles, check_ports
from planc.verify.tensors import check_anchors, check_edges, check_partial_sums, check_rows, check_sizes
from planc.verify.wiring import check_communication, check_joins, check_sources


class Rule(NamedTuple):
    """A check with what it promises, the codes it fails with, and what it counts. It is left out where one of the
    codes in ``unless`` was found before it: what it could say then would follow from those faults."""

    name: str
    codes: tuple[str, ...]
    what: str
    check: Callable[[Draft, Expanded], Iterator[Diagnostic]]
    unless: tuple[str, ...] = ()


_CYCLES = ("PLN301", "PLN302")
_WIRES = (*_CYCLES, "PLN307", "PLN314", "PLN317")
_HELD = ("PLN310", "PLN311", "PLN312")

#: in the order they run. The checks of `_FIRST` come before all of them: they index by the ranks and ports it vouches for
RULES = (
    Rule("acyclic, by blocks and by ops", ("PLN301", "PLN302"), "ops", check_cycles),
    Rule("partial sums reduced exactly once", ("PLN307", "PLN306"), "ops", lambda d, _: check_partial_sums(d), _CYCLES),
    Rule("every port fed, no edge twice", ("PLN314", "PLN317"), "edges", check_ports, _CYCLES),
    Rule("every port fed by what its kind reads", ("PLN314", "PLN310"), "edges", lambda d, _: check_sources(d), _WIRES),
    Rule("edges join ranks that belong together", ("PLN314",), "edges", check_joins, _WIRES),
    Rule("communication marked exactly where ranks differ", ("PLN309",), "edges", check_communication, _WIRES),
    Rule("shape, dtype and layout on every edge", ("PLN304", "PLN305", "PLN306"), "edges", lambda d, _: check_edges(d)),
    Rule("row counts agree", ("PLN304",), "edges", check_rows),
    Rule("sizes follow from the model", ("PLN304",), "ops", lambda d, _: check_sizes(d)),
    Rule(
        "tokens, dtypes and layouts follow from the spec",
        ("PLN304", "PLN305", "PLN306"),
        "ops",
        lambda d, _: check_anchors(d),
    ),
    Rule("every expert in every replica", ("PLN311",), "experts", lambda d, _: check_coverage(d)),
    Rule("experts run where they are placed", ("PLN312",), "experts", lambda d, _: check_placement(d)),
    Rule("at-most-one-expert rule", ("PLN310",), "experts", lambda d, _: check_rule(d), ("PLN311", "PLN312")),
    Rule(
        "tokens conserved through dispatch and combine",
        ("PLN313",),
        "experts",
        check_conservation,
        (*_WIRES, *_HELD, "PLN304"),
    ),
    Rule("connected from input to output", ("PLN303",), "ops", check_connected, (*_WIRES, "PLN312", "PLN313")),
    Rule(
        "memory table exact, every rank fits",
        ("PLN315", "PLN201"),
        "ranks",
        lambda d, _: check_memory(d),
        ("PLN311", "PLN312"),
    ),
    Rule(
        "certificate, where traffic is known, follows from placement and loads",
        ("PLN318",),
        "experts",
        lambda d, _: check_certificate(d),
        ("PLN310", "PLN311", "PLN312"),
    ),
)

#: without the first of these faults the next is not looked for
_FIRST = (check_degrees, check_blocks, check_ranks)


def faults(draft: Draft) -> tuple[list[Diagnostic], Expanded | None]:
    """Every fault of the draft, and its expanded graph when the blocks are sound."""
    found: list[Diagnostic] = []
    for check in _FIRST:
        found += check(draft)
        if found:
            return found, None
    expanded = expand(draft.blocks)
    for rule in RULES:
        if not any(fault.code in rule.unless for fault in found):
            found += rule.check(draft, expanded)
    return found, expanded


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
    first = (
        Check(
            "degrees legal and as asked",
            ("PLN104", "PLN105", "PLN106", "PLN107", "PLN108", "PLN111"),
            counts["ranks"],
            "ranks",
        ),
        Check("ops have a kind, ports and GPUs", ("PLN308", "PLN314", "PLN317"), graph.op_count, "ops"),
    )
    checks = (*first, *(Check(r.name, r.codes, counts[r.what], r.what) for r in RULES))
    plan = VerifiedPlan(
        draft.spec,
        draft.parallelism,
        draft.reasons,
        draft.placement,
        draft.memory,
        graph,
        draft.notes,
        checks,
        draft.certificate,
        draft.proof,
    )
    plan.__dict__["expanded"] = expanded  # already made: keep it for whoever asks
    return plan
