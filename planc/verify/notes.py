"""What a reader of a plan must be told: relaxed rule, small EP, padding. Derived, so that a plan file cannot hide it."""

from __future__ import annotations

from planc.diagnostics import Diagnostic, Severity
from planc.placement import Parallelism, Placement, check_rule, step_tokens
from planc.placement.legality import overflow_hint
from planc.spec import ExpertRule, Spec

LARGE_EP = 16  #: EP from which it is "large EP"


def plan_notes(spec: Spec, par: Parallelism, placement: Placement) -> list[Diagnostic]:
    """Warnings and notes that a reader of the plan must know: relaxed rule, small EP, padding."""
    model = spec.model
    found: list[Diagnostic] = []

    def note(code: str, message: str, path: str, hint: str = "", *, warning: bool = False) -> None:
        severity: Severity = "warning" if warning else "note"
        found.append(Diagnostic(code, message, path, spec.span(path), hint, (), severity))

    needed, slots = check_rule(spec, par)
    if placement.relaxed:
        rounds = placement.rounds
        message = f"{needed} experts on {slots} slots: relaxed to r = {rounds} experts a GPU, run one after another"
        note("PLN203", message, "expert_rule", overflow_hint(spec, par, needed), warning=True)
    if model.moe is not None and par.ep < LARGE_EP:
        note("PLN205", f"ep {par.ep} is below {LARGE_EP}, so this is not large EP", "parallelism.ep")
    padded = step_tokens(spec, par).padded
    if spec.workload.phase == "decode" and padded != spec.workload.batch:
        message = f"batch {spec.workload.batch} is planned as {padded} slots, the same number on every TP group"
        note("PLN206", message, "workload.batch", warning=padded > 1.25 * spec.workload.batch)
    if model.vocab % par.tp:
        message = f"the vocabulary of {model.vocab} is padded to a multiple of tp {par.tp}"
        note("PLN207", message, "model.vocab")
    if not isinstance(spec.expert_rule, ExpertRule) and placement.rounds > 1:
        message = f"no expert rule: up to {placement.rounds} experts of a layer share a GPU and run one after another"
        note("PLN203", message, "expert_rule")
    return found
