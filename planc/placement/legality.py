"""Rules of the mesh: which degrees a model and a cluster allow, and a bound on what cannot fit."""

from __future__ import annotations

from planc.diagnostics import Diagnostic
from planc.placement.experts import check_rule
from planc.placement.memory import kv_bytes_per_token
from planc.placement.mesh import Parallelism, tp_groups_fit
from planc.placement.stages import Degrees
from planc.spec import ExpertRule, Spec
from planc.spec.model import attention_parameters, expert_parameters


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def list_divisors(n: int) -> str:
    """The divisors of ``n`` up to 64, for a hint."""
    return ", ".join(str(d) for d in divisors(n) if d <= 64)


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
        fault("PLN107", f"tp {tp} does not divide ep {ep}", "tp", f"degrees that do: {list_divisors(ep)}")
    if ep % expert_tp:
        fault(
            "PLN107",
            f"expert_tp {expert_tp} does not divide ep {ep}",
            "expert_tp",
            f"degrees that do: {list_divisors(ep)}",
        )
    for name, degree in (("tp", tp), ("expert_tp", expert_tp)):
        if degree > cluster.smallest_domain() or not tp_groups_fit(cluster, degree):
            message = f"{name} {degree} leaves an NVLink domain of {cluster.smallest_domain()} GPUs"
            fit = ", ".join(map(str, divisors(cluster.smallest_domain())))
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
        fit = [t for t in divisors(a.heads) if t <= spec.cluster.smallest_domain()]
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
                spec.fault("PLN107", message, f"parallelism.{name}", f"degrees that do: {list_divisors(width)}")
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
