"""Degrees left on `auto`: every candidate in order of preference, the first that is legal and fits memory wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from planc.diagnostics import Diagnostic, PlancError
from planc.placement.experts import Placement, place_experts
from planc.placement.legality import degree_faults, divisors, least_excess, rule_faults
from planc.placement.memory import MemoryTable, memory_table
from planc.placement.mesh import Parallelism
from planc.placement.overflow import overflow_fault
from planc.placement.reasons import degree_reasons, note_refusal
from planc.placement.stages import Degrees, make_parallelism
from planc.planner.certificate import Certificate
from planc.spec import ExpertRule, Spec
from planc.spec.model import expert_parameters
from planc.units import format_bytes


@dataclass(frozen=True)
class Placed:
    """Degrees with the reason for each, who holds what, and the bytes that follow."""

    par: Parallelism
    reasons: dict[str, str]
    placement: Placement
    memory: MemoryTable
    certificate: Certificate | None = None  #: what is known of a placement made for known traffic


def resolve(spec: Spec) -> Placed:
    """Choose the degrees and place the experts.

    Raises PlancError with the 1xx faults of the degrees given, or PLN201, PLN202 or PLN204 with the arithmetic.
    """
    faults: list[Diagnostic] = []
    tried = 0
    refused: Counter[str] = Counter()
    everywhere: Counter[tuple[str, str]] = Counter()
    closest: Placed | None = None
    hopeless: list[tuple[float, Degrees]] = []
    passed_over: dict[str, list[str]] = {"dp": [], "pp": [], "ep": [], "tp": [], "expert_tp": []}
    candidates = list(_candidates(spec))
    filling = [d for d in candidates if d["dp"] * d["pp"] * d["ep"] == spec.cluster.gpus]
    for degrees in filling or candidates:
        tried += 1
        found = degree_faults(spec, degrees)
        if not found and (excess := least_excess(spec, degrees)) > 0:
            refused["PLN201"] += 1
            hopeless.append((excess, degrees))
            note_refusal(spec, degrees, f"at least {excess / 1e9:.1f} GB more than a GPU has", passed_over)
            continue
        if not found:
            par = make_parallelism(spec, degrees)
            found = rule_faults(spec, par)
        if found:
            faults += found
            refused.update({d.code for d in found})
            everywhere.update({(d.code, d.path) for d in found})
            continue
        placement = place_experts(spec, par)
        memory = memory_table(spec, par, placement)
        placed = Placed(par, degree_reasons(spec, par, passed_over), placement, memory)
        if memory.fits:
            return placed
        used, room = memory.used[memory.fullest] / 1e9, memory.capacity[memory.fullest] / 1e9
        note_refusal(spec, degrees, f"{used:.1f} of {room:.1f} GB on rank {memory.fullest}", passed_over)
        refused["PLN201"] += 1
        if closest is None or memory.headroom.min() > closest.memory.headroom.min():
            closest = placed
    if closest is not None and (split := _with_split_experts(spec, closest)) is not None:
        return split
    shared = {key for key, n in everywhere.items() if n == tried}
    if shared:  # whatever is chosen for the degrees on auto, these remain: say each once
        raise PlancError({(f.code, f.path): f for f in reversed(faults) if (f.code, f.path) in shared}.values())
    if closest is None and hopeless:
        par = make_parallelism(spec, min(hopeless, key=lambda h: h[0])[1])
        placement = place_experts(spec, par)
        closest = Placed(par, {}, placement, memory_table(spec, par, placement))
    raise PlancError(_refusal(spec, faults, tried, refused, closest))


def _with_split_experts(spec: Spec, closest: Placed) -> Placed | None:
    """The plan with the least expert TP that fits, where one whole expert does not fit beside the other residents of a
    rank; None where that is not what is wrong, or no split helps."""
    rank = closest.memory.fullest
    room = closest.memory.headroom[rank] + closest.memory.items["experts"][rank]
    whole = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights")
    if spec.parallelism.expert_tp != "auto" or closest.par.expert_tp > 1 or not 0 < room < whole:
        return None
    for split in divisors(spec.cluster.smallest_domain())[1:]:
        asked = spec.parallelism.model_copy(update={"expert_tp": split})
        try:
            placed = resolve(spec.model_copy(update={"parallelism": asked}))
        except PlancError:
            continue
        reason = f"one expert does not fit beside the {format_bytes(int(closest.memory.capacity[rank] - room))} of the rest of rank {rank}"
        return replace(placed, reasons=placed.reasons | {"expert_tp": reason})
    return None


def _refusal(
    spec: Spec, faults: list[Diagnostic], tried: int, refused: Counter[str], closest: Placed | None
) -> list[Diagnostic]:
    """Why no candidate was taken: the closest one with its arithmetic, else what made each illegal."""
    short = [fault for fault in faults if fault.code == "PLN202"]
    if closest is None and short:  # the rule is what stands in the way: the candidate with the most slots says it best
        return short[:1]
    if closest is None:
        reasons = tuple(f"{n} of {tried} candidates: {code}" for code, n in sorted(refused.items()))
        examples = tuple(dict.fromkeys(f.message for f in faults))[:4]
        message = f"none of {tried} combinations of the degrees on auto is legal"
        return [
            spec.fault("PLN204", message, "parallelism", "give a degree, or change the cluster", reasons + examples)
        ]
    fault = overflow_fault(spec, closest.par, closest.placement, closest.memory)
    if tried == 1:
        return [fault]
    p = closest.par
    message = f"none of {tried} combinations of the degrees on auto fits; the closest is dp {p.dp}, pp {p.pp}, ep {p.ep}, tp {p.tp}"
    return [spec.fault("PLN204", message, "parallelism", fault.hint, (fault.message, *fault.related))]


# --- candidates ---------------------------------------------------------------------------------------------------


def _candidates(spec: Spec) -> Iterator[Degrees]:
    """Degrees in order of preference: few stages; the smallest EP group with a slot for every expert, else the
    largest; unsplit experts; small tp."""
    asked, gpus = spec.parallelism, spec.cluster.gpus
    stages = [len(asked.stages)] if asked.stages else None
    pps = [asked.pp] if asked.pp != "auto" else stages or [d for d in divisors(gpus) if d <= spec.model.layers]
    tps = [asked.tp] if asked.tp != "auto" else divisors(spec.cluster.smallest_domain())
    splits = [asked.expert_tp] if asked.expert_tp != "auto" else _expert_splits(spec)
    for pp in pps:
        for ep in _ep_candidates(spec, pp):
            dp = asked.dp if asked.dp != "auto" else max(1, gpus // (pp * ep))
            for expert_tp in splits:
                for tp in tps:
                    yield {"dp": dp, "pp": pp, "ep": ep, "tp": tp, "expert_tp": expert_tp}


def _expert_splits(spec: Spec) -> list[int]:
    """1, and more only where one whole expert does not fit the smallest GPU."""
    smallest = min(g.gpu.memory * (1 - g.gpu.reserve) for g in spec.cluster.groups)
    whole = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights")
    return [1] if whole <= smallest else divisors(spec.cluster.smallest_domain())


def _ep_candidates(spec: Spec, pp: int) -> list[int]:
    asked, gpus = spec.parallelism, spec.cluster.gpus
    if asked.ep != "auto":
        return [asked.ep]
    if asked.dp != "auto":
        return [max(1, gpus // (asked.dp * pp))]
    wanted = _experts_wanting_a_rank(spec, pp)
    options = divisors(max(1, gpus // pp))
    roomy = [d for d in options if d >= wanted]
    return roomy + sorted((d for d in options if d < wanted), reverse=True)


def _experts_wanting_a_rank(spec: Spec, pp: int) -> int:
    moe, rule = spec.model.moe, spec.expert_rule
    if moe is None:
        return 1
    if not isinstance(rule, ExpertRule):
        return min(moe.experts, spec.cluster.smallest_domain())  # traditional EP stays inside a node
    experts = moe.experts if rule.scope == "layer" else moe.experts * -(-len(spec.model.moe_layer_ids) // pp)
    return -(-experts // rule.slots_per_gpu)
