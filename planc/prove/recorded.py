"""Proofs that plans carry: made at a build, repeated when a plan is checked again."""

from __future__ import annotations

from dataclasses import replace

from planc.diagnostics import Diagnostic, PlancError
from planc.graph import range_text
from planc.prove.proof import TOLERANCE, Proof, prove
from planc.verify import VerifiedPlan
from planc.verify.proof_record import ProofRecord


def faults_of(proof: Proof) -> list[Diagnostic]:
    """PLN421 for every op at which the plan and the model part ways; none for a proof that holds."""
    found = [Diagnostic("PLN421", f"{op}: {why}", hint="report it: planc made this plan") for op, why in proof.faults]
    if not found and not proof.holds:
        found = [Diagnostic("PLN421", "the plan moves other bytes than its byte matrices say", "bytes")]
    return found


def record_of(proof: Proof, *, tokens: int, scale: int) -> ProofRecord:
    """What a plan keeps of a proof that holds."""
    return ProofRecord(
        layers=range_text(sorted(proof.layers.values())),
        steps=proof.steps,
        tokens=tokens,
        scale=scale,
        seed=proof.seed,
        ops=proof.ops,
        tokens_routed=proof.tokens,
        sizes=proof.sizes,
        bytes=dict(sorted(proof.bytes_moved.items())),
        tolerance=TOLERANCE,
    )


def proved(plan: VerifiedPlan, *, tokens: int = 2, scale: int = 1, steps: int = 2, seed: int = 0) -> VerifiedPlan:
    """The plan with its proof. Raises PlancError PLN421 where it does not compute what the model does."""
    proof = prove(plan, tokens=tokens, scale=scale, steps=steps, seed=seed)
    found = faults_of(proof)
    if found:
        raise PlancError(found)
    made = replace(plan, proof=record_of(proof, tokens=tokens, scale=scale))
    made.__dict__["expanded"] = plan.expanded
    return made


def prove_again(plan: VerifiedPlan) -> str:
    """Repeat the proof that a plan carries; what was looked at in words, empty where it carries none. Raises PlancError
    PLN421 where it does not hold, PLN422 where the file says otherwise."""
    said = plan.proof
    if said is None:
        return ""
    options = {"tokens": said.tokens, "scale": said.scale, "steps": said.steps, "seed": said.seed}
    if not all(1 <= options[name] <= 64 for name in ("tokens", "scale", "steps")):
        raise PlancError([Diagnostic("PLN422", "tokens, scale and steps of a proof are from 1 to 64", "proof")])
    again = proved(plan, **options).proof
    assert again is not None
    found = [
        Diagnostic(
            "PLN422", f"the file says {getattr(said, name)}, done again it is {getattr(again, name)}", f"proof.{name}"
        )
        for name in ProofRecord.model_fields
        if getattr(said, name) != getattr(again, name)
    ]
    if found:
        raise PlancError(found)
    return f"executed again: {again.ops:,} ops on {plan.parallelism.world_size} ranks compute what the model does"
