"""Degrees left on `auto`: every candidate in order of preference, the first that is legal and fits memory wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from planc.diagnostics import Diagnostic, PlancError
from planc.placement.experts import Placement, check_rule, place_experts
from planc.placement.memory import MemoryTable, kv_bytes_per_token, memory_table
from planc.placement.mesh import Parallelism, tp_groups_fit
from planc.placement.overflow import overflow_fault
from planc.placement.stages import Degrees, make_parallelism
from planc.spec import ExpertRule, Spec
from planc.spec.model import attention_parameters, expert_parameters
from planc.units import format_bytes


@dataclass(frozen=True)
class Placed:
    """Degrees with the reason for each, who holds what, and the bytes that follow."""

    par: Parallelism
    reasons: dict[str, str]
    placement: Placement
    memory: MemoryTable


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
            _note_refusal(spec, degrees, f"at least {excess / 1e9:.1f} GB more than a GPU has", passed_over)
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
        placed = Placed(par, _reasons(spec, par, passed_over), placement, memory)
        if memory.fits:
            return placed
        used, room = memory.used[memory.fullest] / 1e9, memory.capacity[memory.fullest] / 1e9
        _note_refusal(spec, degrees, f"{used:.1f} of {room:.1f} GB on rank {memory.fullest}", passed_over)
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
    for split in _divisors(spec.cluster.smallest_domain())[1:]:
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


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _list_divisors(n: int) -> str:
    """The divisors of ``n`` up to 64, for a hint."""
    return ", ".join(str(d) for d in _divisors(n) if d <= 64)


def _candidates(spec: Spec) -> Iterator[Degrees]:
    """Degrees in order of preference: few stages; the smallest EP group with a slot for every expert, else the
    largest; unsplit experts; small tp."""
    asked, gpus = spec.parallelism, spec.cluster.gpus
    stages = [len(asked.stages)] if asked.stages else None
    pps = [asked.pp] if asked.pp != "auto" else stages or [d for d in _divisors(gpus) if d <= spec.model.layers]
    tps = [asked.tp] if asked.tp != "auto" else _divisors(spec.cluster.smallest_domain())
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
    return [1] if whole <= smallest else _divisors(spec.cluster.smallest_domain())


def _ep_candidates(spec: Spec, pp: int) -> list[int]:
    asked, gpus = spec.parallelism, spec.cluster.gpus
    if asked.ep != "auto":
        return [asked.ep]
    if asked.dp != "auto":
        return [max(1, gpus // (asked.dp * pp))]
    wanted = _experts_wanting_a_rank(spec, pp)
    options = _divisors(max(1, gpus // pp))
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


def least_excess(spec: Spec, d: Degrees) -> float:
    """Bytes by which the mean rank overflows at least: layers' attention, experts and KV cache, spread evenly, less the
    mean memory. Above zero no placement can fit, whatever the stages; a bound that costs nothing to compute."""
    model, groups = spec.model, spec.cluster.groups
    room = sum(g.nodes * g.gpus_per_node * g.gpu.memory * (1 - g.gpu.reserve) for g in groups) / spec.cluster.gpus
    sequences = -(-spec.workload.batch // (d["dp"] * (d["ep"] // d["tp"])))
    layer = sum(attention_parameters(model, d["tp"])) * model.bytes_of("weights")
    layer += sequences * spec.workload.context * kv_bytes_per_token(model, d["tp"])
    experts = len(model.moe_layer_ids) * (model.moe.experts if model.moe else 0) * expert_parameters(model)
    shared = experts * model.bytes_of("expert_weights") / (d["pp"] * d["ep"])
    return model.layers * layer / d["pp"] + shared - room - 1.0  # a byte for rounding


# --- legality -----------------------------------------------------------------------------------------------------


def degree_faults(spec: Spec, d: Degrees) -> list[Diagnostic]:
    """Every rule of the mesh that the degrees break."""
    model, cluster, faults = spec.model, spec.cluster, []

    def fault(code: str, message: str, key: str, hint: str = "") -> None:
        faults.append(spec.fault(code, message, f"parallelism.{key}", hint))

    dp, pp, ep, tp, expert_tp = d["dp"], d["pp"], d["ep"], d["tp"], d["expert_tp"]
    world = dp * pp * ep
    if world != cluster.gpus:
        message = f"dp {dp} × pp {pp} × ep {ep} = {world} GPUs, but the cluster has {cluster.gpus}"
        blame = next((k for k in ("ep", "dp", "pp") if getattr(spec.parallelism, k) != "auto"), "ep")
        fault("PLN106", message, blame, _fill_hint(spec, d))
    if pp > model.layers:
        fault("PLN108", f"pp {pp} exceeds the {model.layers} layers", "pp")
    if ep % tp:
        fault("PLN107", f"tp {tp} does not divide ep {ep}", "tp", f"degrees that do: {_list_divisors(ep)}")
    if ep % expert_tp:
        fault(
            "PLN107",
            f"expert_tp {expert_tp} does not divide ep {ep}",
            "expert_tp",
            f"degrees that do: {_list_divisors(ep)}",
        )
    for name, degree in (("tp", tp), ("expert_tp", expert_tp)):
        if degree > cluster.smallest_domain() or not tp_groups_fit(cluster, degree):
            message = f"{name} {degree} leaves an NVLink domain of {cluster.smallest_domain()} GPUs"
            fit = ", ".join(map(str, _divisors(cluster.smallest_domain())))
            fault("PLN105", message, name, f"degrees that do: {fit}")
    faults += _width_faults(spec, tp, expert_tp)
    return faults


def given_degree_faults(spec: Spec) -> list[Diagnostic]:
    """Faults of the degrees that the spec gives, whatever those on auto become; for reporting beside other faults."""
    asked = {key: getattr(spec.parallelism, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}
    open_keys = {f"parallelism.{key}" for key, value in asked.items() if value == "auto"}
    found = degree_faults(spec, {key: 1 if value == "auto" else value for key, value in asked.items()})
    undecided = {"PLN106"} if open_keys & {"parallelism.dp", "parallelism.pp", "parallelism.ep"} else set()
    undecided |= {"PLN107"} if "parallelism.ep" in open_keys else set()
    return [fault for fault in found if fault.path not in open_keys and fault.code not in undecided]


def _fill_hint(spec: Spec, d: Degrees) -> str:
    others = d["pp"] * d["ep"]
    if spec.cluster.gpus % others == 0:
        return f"dp {spec.cluster.gpus // others} fills it"
    per_node = spec.cluster.groups[0].gpus_per_node
    world = d["dp"] * others
    return (
        f"{world // per_node} nodes of {per_node} would do"
        if world % per_node == 0
        else "set one of dp, pp, ep to auto"
    )


def _width_faults(spec: Spec, tp: int, expert_tp: int) -> list[Diagnostic]:
    model, a = spec.model, spec.model.attention
    faults = []
    if a.heads % tp:
        fit = [t for t in _divisors(a.heads) if t <= spec.cluster.smallest_domain()]
        hint = f"degrees that do: {', '.join(map(str, fit))}"
        faults.append(
            spec.fault("PLN104", f"tp {tp} does not divide the {a.heads} attention heads", "parallelism.tp", hint)
        )
    if a.kind == "gqa" and a.kv_heads % tp and tp % a.kv_heads:
        message = f"tp {tp} neither divides the {a.kv_heads} KV heads nor is a multiple of them"
        faults.append(spec.fault("PLN104", message, "parallelism.tp"))
    widths = (
        [("dense_mlp.intermediate", model.dense_mlp.intermediate, tp)]
        if model.dense_layer_ids and model.dense_mlp
        else []
    )
    if model.moe is not None:
        widths.append(("moe.intermediate", model.moe.intermediate, expert_tp))
        if model.moe.shared_width and spec.parallelism.gating == "leader":
            widths.append(("moe.shared_intermediate", model.moe.shared_width, tp))
    if spec.parallelism.tp_comm == "reduce_scatter":
        widths.append(("hidden", model.hidden, tp))
    for key, width, degree in widths:
        if width % degree:
            name = "expert_tp" if key == "moe.intermediate" else "tp"
            message = f"{name} {degree} does not divide {key} {width}"
            faults.append(
                spec.fault("PLN107", message, f"parallelism.{name}", f"degrees that do: {_list_divisors(width)}")
            )
    return faults


def rule_faults(spec: Spec, par: Parallelism) -> list[Diagnostic]:
    """PLN202 when the experts exceed the slots and the rule says so."""
    needed, slots = check_rule(spec, par)
    rule = spec.expert_rule
    if not isinstance(rule, ExpertRule) or rule.on_overflow != "error" or needed <= slots:
        return []
    message = f"scope {rule.scope}: {needed} experts need a slot, but {par.holders} × {rule.slots_per_gpu} = {slots} slots exist"
    return [spec.fault("PLN202", message, "expert_rule.on_overflow", overflow_hint(spec, par, needed))]


def overflow_hint(spec: Spec, par: Parallelism, needed: int) -> str:
    """The GPUs that would lift a shortage of expert slots."""
    rule = spec.expert_rule
    slots = rule.slots_per_gpu if isinstance(rule, ExpertRule) else 1
    ep = -(-needed // slots) * par.expert_tp
    gpus = ep * par.pp * par.dp
    per_node = spec.cluster.groups[0].gpus_per_node
    more = -(-(gpus - spec.cluster.gpus) // per_node)
    fewer_replicas = spec.cluster.gpus // (par.pp * ep)
    hint = f"ep {ep} needs {gpus} GPUs with dp {par.dp}: add {more} nodes of {per_node}"
    if par.dp > 1 and fewer_replicas >= 1:
        hint += f", or set dp {fewer_replicas} and ep {spec.cluster.gpus // (fewer_replicas * par.pp)}"
    return hint


# --- reasons ------------------------------------------------------------------------------------------------------


def _note_refusal(spec: Spec, degrees: Degrees, why: str, passed_over: dict[str, list[str]]) -> None:
    """Remember why a candidate was passed over, under the first key on auto that could change it."""
    for key in ("tp", "ep", "dp", "pp"):
        if getattr(spec.parallelism, key) == "auto":
            passed_over[key].append(f"{key} {degrees[key]} needs {why}")
            return


def _reasons(spec: Spec, par: Parallelism, passed_over: dict[str, list[str]]) -> dict[str, str]:
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
