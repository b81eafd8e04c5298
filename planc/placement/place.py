"""Expert placement by itself: a traffic and a cluster in, an expert map with its certificate out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.placement.degrees import resolve
from planc.placement.expert_map import map_json
from planc.placement.known_traffic import groups_of
from planc.planner import Certificate, Fabric, Group, Problem, Width, certificate, plan_groups, tables_of
from planc.planner.fabric import Transfer
from planc.planner.layer import Objective
from planc.planner.tables import EMPTY
from planc.routing import Expected, Traffic
from planc.spec import Cluster, Spec, check_spec
from planc.spec.model import expert_parameters
from planc.topology import topology

#: assumed where no model is given; said in the report
ASSUMED_HIDDEN, ASSUMED_BYTES, ASSUMED_TOP_K = 7168, 2, 8


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Slot tables int32 [MoE layers, holders, slots] (-1: empty) with what is known of them; ``seconds``: wall-clock time
    of the planning; ``assumed``: what had to be assumed, in words."""

    tables: np.ndarray
    certificate: Certificate
    seconds: float
    assumed: tuple[str, ...] = ()
    model_layers: tuple[int, tuple[int, ...]] | None = None  #: layers and MoE layers of the model, where it is known

    def text(self) -> str:
        """The map as SGLang's `--init-expert-location` reads it; see `planc.placement.expert_map.map_json`."""
        if self.model_layers is None:
            return map_json(self.tables)
        return map_json(self.tables, moe_layers=self.model_layers[1], layers=self.model_layers[0])


@dataclass(frozen=True, slots=True)
class Request:
    """What `place` is asked for. ``slots`` of a GPU and ``redundant`` copies beyond one of each expert: by default as few
    slots as hold the experts, all of them filled. ``groups`` of experts in the gate; ``top_k`` where the traffic says only
    loads; ``tokens`` of an EP group that times are for (default: those of the sample)."""

    slots: int | None = None
    redundant: int | None = None
    groups: int | None = None
    objective: Objective = "link"
    transfer: Transfer = "dedup"
    top_k: int | None = None
    tokens: float | None = None
    seed: int = 0


def expected_model(target: Spec | Cluster) -> Expected | None:
    """What a recording must fit when a model is known."""
    model = target.model if isinstance(target, Spec) else None
    if model is None or model.moe is None:
        return None
    return Expected(model.layers, model.moe_layer_ids, model.moe.experts, model.moe.top_k, model.name)


def place(
    traffic: Traffic,
    target: Spec | Cluster,
    request: Request = Request(),
    *,
    scenarios: Sequence[Traffic] = (),
    current: Callable[[int, int], np.ndarray] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    stop: bool = False,
) -> ExpertMap:
    """Place every layer's experts for ``traffic`` on a cluster (all its GPUs are one EP group, each a source and a holder)
    or on the EP groups of a deployment spec.

    ``current(experts, holders)`` gives the slot tables that run now, for fewest moves. ``workers`` processes share the
    layers; with ``stop``, Ctrl-C returns the best found so far, marked so. Raises PlancError: PLN202 for fewer slots than
    copies, PLN109 for groups that do not divide, and what the spec is refused for.
    """
    for other in scenarios:
        if (other.experts, other.layers) != (traffic.experts, traffic.layers):
            message = f"{other.name} has {other.layers} layers of {other.experts} experts, {traffic.name} {traffic.layers} of {traffic.experts}"
            raise PlancError([Diagnostic("PLN023", message, span=Span(other.name, 1, 1))])
    groups, spec = _groups(traffic, target, request, current)
    top_k = request.top_k or traffic.top_k or (spec.model.moe.top_k if spec and spec.model.moe else None)
    problem = groups[0].problem
    planned = plan_groups(
        groups,
        traffic,
        scenarios,
        top_k=min(top_k or ASSUMED_TOP_K, traffic.experts),
        workers=workers,
        progress=progress,
        stop=stop,
    )
    layers = spec.model.moe_layer_ids if spec else tuple(range(traffic.layers))
    size = expert_parameters(spec.model) * spec.model.bytes_of("expert_weights") if spec else None
    record = certificate(planned, traffic, scenarios, layers=layers, tokens=request.tokens, expert_bytes=size)
    assumed = [] if spec else [f"tokens of {ASSUMED_HIDDEN} values of {ASSUMED_BYTES} B; every GPU gates and holds"]
    if top_k is None and problem.objective == "link":
        assumed.append(f"top-{min(ASSUMED_TOP_K, traffic.experts)}")
    known = (spec.model.layers, spec.model.moe_layer_ids) if spec else None
    return ExpertMap(tables_of(planned), record, planned.seconds, tuple(assumed), known)


def _groups(
    traffic: Traffic, target: Spec | Cluster, request: Request, current: Callable[[int, int], np.ndarray] | None
) -> tuple[list[Group], Spec | None]:
    if isinstance(target, Spec):
        faults = check_spec(target)
        if faults:
            raise PlancError(faults)
        if target.model.moe is None:
            message = f"{target.model.name} has no experts to place"
            raise PlancError([target.fault("PLN023", message, "model")])
        par = resolve(target).par
        return [_asked(group, request, par.holders, current) for group in groups_of(target, par, None)], target
    ranks = np.arange(target.gpus, dtype=np.int64)
    fabric = Fabric(topology(target), ranks, ranks[:, None])
    width = Width(ASSUMED_HIDDEN * ASSUMED_BYTES, ASSUMED_HIDDEN * ASSUMED_BYTES)
    slots = -(-traffic.experts // len(ranks))
    problem = Problem(
        fabric, traffic.experts, slots, slots * len(ranks), width, request.transfer, request.objective, request.seed
    )
    group = Group(problem, tuple(range(traffic.layers)))
    return [_asked(group, request, len(ranks), current)], None


def _asked(group: Group, request: Request, holders: int, current: Callable[[int, int], np.ndarray] | None) -> Group:
    """The group with the slots, copies and groups of the request."""
    problem = group.problem
    experts = problem.experts * (len(group.rows) if group.together else 1)
    slots, redundant = request.slots, request.redundant
    copies = problem.copies
    if redundant is not None:
        copies = experts + redundant
        slots = slots or -(-copies // holders)
    elif slots is not None:
        copies = slots * holders
    else:
        slots = -(-copies // holders)
    if copies < experts or slots * holders < copies:
        text = f"{experts} experts" + (f" and {redundant} redundant copies" if redundant else "")
        message = f"{text} need {experts + (redundant or 0)} slots; {holders} GPUs × {slots} = {slots * holders}"
        hint = f"{-(-(experts + (redundant or 0)) // holders)} slots a GPU hold them"
        raise PlancError([Diagnostic("PLN202", message, span=Span("--slots", 1, 1), hint=hint)])
    most = experts * holders
    if copies > most:
        message = f"{copies:,} copies: {experts} experts have at most {most:,} on {holders} GPUs, one on each"
        raise PlancError([Diagnostic("PLN014", message, span=Span("--redundant", 1, 1))])
    divided = request.groups or problem.groups
    if divided < 1 or problem.experts % divided:
        fit = ", ".join(str(n) for n in range(1, min(problem.experts, 64) + 1) if problem.experts % n == 0)
        message = f"{divided} groups do not divide {problem.experts} experts"
        raise PlancError([Diagnostic("PLN109", message, span=Span("--groups", 1, 1), hint=f"numbers that do: {fit}")])
    tables = None if current is None else current(problem.experts, holders)[list(group.rows)]
    changed = replace(
        problem,
        slots=-(-copies // holders),
        copies=copies,
        groups=divided,
        objective=request.objective,
        transfer=request.transfer,
        seed=request.seed,
    )
    return replace(group, problem=changed, current=tables)


def empty_slots(tables: np.ndarray) -> int:
    """Slots of all layers that hold nothing."""
    return int((tables == EMPTY).sum())
