"""Random valid specs: what planc compiles and verifies is also what the model computes, op by op, byte by byte.

PLANC_PROOFS says how many specs are drawn; above the default they are drawn anew each time (`make nightly`)."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from test_properties import compiled, specs

from planc.prove import prove

FEW = 120
EXAMPLES = int(os.environ.get("PLANC_PROOFS", str(FEW)))
MANY = EXAMPLES > FEW
RUN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not MANY,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def richer(draw: st.DrawFn) -> dict[str, Any]:
    """The specs of the other properties, with what only the numbers show: kinds of gates, biases, norms of q and k."""
    parts = draw(specs())
    attention, moe = parts["model"]["attention"], parts["model"]["moe"]
    attention |= {"bias": draw(st.booleans()), "out_bias": draw(st.booleans())}
    if attention["kind"] != "mla":
        attention["qk_norm"] = draw(st.booleans())
    if attention["kind"] == "gqa":
        attention["kv_heads"] = draw(st.sampled_from([n for n in (1, 2, 4, 8) if attention["heads"] % n == 0]))
    if moe is not None:
        moe |= {
            "gate": draw(st.sampled_from(["softmax", "sigmoid"])),
            "gate_bias": draw(st.booleans()),
            "expert_bias": draw(st.booleans()),
            "shared_gate": bool(moe["shared_experts"]) and draw(st.booleans()),
            "top_k": draw(st.integers(1, min(8, moe["experts"]))),
        }
        fit = [n for n in (1, 2, 4) if moe["experts"] % n == 0]
        moe["groups"] = draw(st.sampled_from(fit))
        moe["top_groups"] = draw(st.integers(-(-moe["top_k"] * moe["groups"] // moe["experts"]), moe["groups"]))
    if draw(st.integers(0, 9)) == 0:
        parts["placement"] = {"policy": "topology"}
        parts["traffic"] = {"popularity": "zipf", "exponent": 0.7, "topics": 2, "tokens": 100}
    return parts


@RUN
@given(richer(), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_plan_computes_what_the_model_does(parts: dict[str, Any], tokens: int, steps: int, seed: int) -> None:
    plan = compiled(parts)
    if plan is None:
        return
    proof = prove(plan, layers=2, tokens=tokens, steps=steps, seed=seed)
    note(f"{proof.faults[:3]} moved {proof.bytes_moved} planned {proof.bytes_planned}")
    assert proof.holds
