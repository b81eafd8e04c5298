"""The compiler on one page: spec → check → place → graph → verify → write."""

from __future__ import annotations

from planc.diagnostics import Diagnostic, PlancError
from planc.graph import build_graph
from planc.placement import POLICIES, Placed, check_rule, resolve, step_tokens
from planc.placement.degrees import overflow_hint
from planc.spec import ExpertRule, Spec, check_spec
from planc.verify import Draft, VerifiedPlan, verify

LARGE_EP = 16


def compile(spec: Spec) -> VerifiedPlan:
    """Compile a deployment spec to a verified plan.

    Raises PlancError with every contradiction in the spec (1xx), or with why no placement fits (2xx).
    """
    placed = place(spec)
    graph = build_graph(spec, placed.par, placed.placement)
    notes = tuple(plan_notes(spec, placed))
    return verify(Draft(spec, placed.par, placed.reasons, placed.placement, placed.memory, graph, notes))


def place(spec: Spec) -> Placed:
    """Check the spec, choose its degrees and place its experts; builds no graph. Raises PlancError like `compile`."""
    faults = check_spec(spec)
    if spec.placement.policy not in POLICIES:
        message = f"`{spec.placement.policy}` is not a placement policy; there are {', '.join(POLICIES)}"
        faults.append(spec.fault("PLN015", message, "placement.policy"))
    if faults:
        raise PlancError(faults)
    return resolve(spec)


def plan_notes(spec: Spec, placed: Placed) -> list[Diagnostic]:
    """Warnings and notes that a reader of the plan must know: relaxed rule, small EP, padding."""
    par, model = placed.par, spec.model
    found: list[Diagnostic] = []

    def note(code: str, message: str, path: str, hint: str = "", *, warning: bool = False) -> None:
        severity = "warning" if warning else "note"
        found.append(Diagnostic(code, message, path, spec.span(path), hint, (), severity))

    needed, slots = check_rule(spec, par)
    if placed.placement.relaxed:
        rounds = placed.placement.rounds
        message = f"{needed} experts on {slots} slots: relaxed to r = {rounds} experts a GPU, run one after another"
        note("PLN203", message, "expert_rule", overflow_hint(spec, par, needed), warning=True)
    if model.moe is not None and par.ep < LARGE_EP:
        note("PLN205", f"ep {par.ep} is below {LARGE_EP}, so this is not large EP", "parallelism.ep")
    padded = step_tokens(spec, par).padded
    if spec.workload.phase == "decode" and padded != spec.workload.batch:
        message = f"batch {spec.workload.batch} is planned as {padded} slots, the same number on every TP group"
        note("PLN206", message, "workload.batch")
    if model.vocab % par.tp:
        message = f"the vocabulary of {model.vocab} is padded to a multiple of tp {par.tp}"
        note("PLN207", message, "model.vocab")
    if not isinstance(spec.expert_rule, ExpertRule) and placed.placement.rounds > 1:
        message = f"no expert rule: up to {placed.placement.rounds} experts of a layer share a GPU and run one after another"
        note("PLN203", message, "expert_rule")
    return found
