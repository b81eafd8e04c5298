"""Why each degree is what it is, in words for the plan."""

from __future__ import annotations

from planc.placement.experts import check_rule
from planc.placement.mesh import Parallelism
from planc.placement.stages import Degrees
from planc.spec import ExpertRule, Spec


def note_refusal(spec: Spec, degrees: Degrees, why: str, passed_over: dict[str, list[str]]) -> None:
    """Remember why a candidate was passed over, under the first key on auto that could change it."""
    for key in ("tp", "ep", "dp", "pp"):
        if getattr(spec.parallelism, key) == "auto":
            passed_over[key].append(f"{key} {degrees[key]} needs {why}")
            return


def degree_reasons(spec: Spec, par: Parallelism, passed_over: dict[str, list[str]]) -> dict[str, str]:
    asked, moe = spec.parallelism, spec.model.moe
    why: dict[str, str] = {}
    for key in ("dp", "pp", "ep", "tp", "expert_tp"):
        if getattr(asked, key) != "auto":
            why[key] = "given in the spec"
    domain = spec.cluster.smallest_domain()
    why.setdefault(
        "tp",
        f"smallest degree inside an NVLink domain of {domain} GPUs that divides {spec.model.attention.heads} heads and fits memory",
    )
    others = {"dp": ("pp", "ep"), "pp": ("dp", "ep"), "ep": ("dp", "pp")}
    for key, (one, two) in others.items():  # with the other two given, the third follows
        if getattr(asked, one) != "auto" and getattr(asked, two) != "auto":
            given = f"{one} {getattr(par, one)} × {two} {getattr(par, two)}"
            why.setdefault(key, f"{spec.cluster.gpus} GPUs ÷ ({given})")
    why.setdefault("pp", "fewest pipeline stages that fit memory")
    why.setdefault("dp", f"{spec.cluster.gpus} GPUs ÷ (pp {par.pp} × ep {par.ep})")
    why.setdefault(
        "expert_tp", "one expert fits one rank" if par.expert_tp == 1 else "one expert does not fit one rank"
    )
    needed, slots = check_rule(spec, par)
    if asked.dp != "auto":
        why.setdefault("ep", f"{spec.cluster.gpus} GPUs ÷ (dp {par.dp} × pp {par.pp})")
    elif moe is None:
        why.setdefault("ep", "smallest group that fits memory; the model has no experts")
    elif not isinstance(spec.expert_rule, ExpertRule):
        why.setdefault("ep", "no expert rule: smallest group of at least an NVLink domain that fits memory")
    elif slots >= needed:
        why.setdefault("ep", f"smallest divisor of the GPUs with a slot for each of {needed} experts that fits memory")
    else:
        why.setdefault("ep", f"largest EP group the cluster has; {needed} experts share its {slots} slots in rounds")
    if asked.stages is not None:
        why["stages"] = "given in the spec"
    elif par.pp > 1:
        why["stages"] = "contiguous runs with the smallest largest sum of bytes read per step"
    for key, texts in passed_over.items():
        if texts and getattr(asked, key) == "auto":
            why[key] += f" ({'; '.join(dict.fromkeys(texts[-3:]))})"
    return why
