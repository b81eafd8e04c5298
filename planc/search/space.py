"""The declared space: every combination of degrees and choices that a deployment may have, and why some are no plan.

A `Shape` is all of a plan but its batch. Which shapes a model and a cluster allow is decided by the rules that `planc build`
itself applies (`planc.placement.legality`); what they refuse is counted by the code of the refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from planc.diagnostics import CODES
from planc.placement.legality import degree_faults, divisors
from planc.spec import ExpertRule, Spec
from planc.spec.cluster import Cluster, NodeGroup
from planc.spec.deployment import ParallelismSpec, Workload
from planc.spec.model import Dtypes, Model

Axes = Mapping[str, tuple[Any, ...]]

NO_EXPERTS = "expert TP: the model has no experts"
SLOTS_REASON = "experts of a layer per GPU: not of the space (slots_per_gpu)"


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """All of a plan but its batch. ``split``: stages `balanced` by cost, or `even`; ``spares``: slots that no expert needs stay
    `idle`, or hold further copies (`replicate`); ``scope``: of the expert rule, `none` where there is none; ``dtypes``:
    (role, dtype) pairs that differ from the spec's."""

    dp: int
    pp: int
    ep: int
    tp: int
    expert_tp: int = 1
    gating: str = "sharded"
    tp_comm: str = "all_reduce"
    micro_batches: int = 1
    split: str = "balanced"
    scope: str = "layer"
    spares: str = "idle"
    serving: str = "apart"
    dtypes: tuple[tuple[str, str], ...] = ()

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.dp * self.pp * self.ep

    @property
    def groups(self) -> int:
        """TP groups: each has its own sequences."""
        return self.dp * self.ep // self.tp

    @property
    def leaders(self) -> bool:
        """Whether the first rank of a TP group gates for all."""
        return self.gating == "leader" and self.tp > 1


#: axis -> its words, or None where it takes numbers
AXES: dict[str, tuple[str, ...] | None] = {
    "gpus": None,
    "dp": None,
    "pp": None,
    "ep": None,
    "tp": None,
    "expert_tp": None,
    "micro_batches": None,
    "batch": None,
    "slots_per_gpu": None,
    "gating": ("leader", "sharded"),
    "tp_comm": ("all_reduce", "reduce_scatter"),
    "split": ("balanced", "even"),
    "scope": ("layer", "model", "none"),
    "spares": ("idle", "replicate"),
    "serving": ("apart", "together"),
}
#: most stages of a pipeline, and micro-batches beside as many as there are stages, that are looked at unless asked for
STAGES, PARTS = 4, (1, 2)
SLOTS = 16  #: experts of a layer on one GPU, likewise


def declared(spec: Spec, asked: Axes) -> dict[str, tuple[Any, ...]]:
    """Values of every axis: as asked, else what the cluster and the model allow. `micro_batches` follow the stages of a shape
    where they are not asked for, and every batch is looked at where none is."""
    sizes = asked.get("gpus", (spec.cluster.gpus,))
    all_divisors = tuple(sorted({d for n in sizes for d in divisors(n)}))
    inside = tuple(divisors(spec.cluster.smallest_domain()))
    rule = spec.expert_rule
    found: dict[str, tuple[Any, ...]] = {
        "gpus": tuple(sizes),
        "dp": all_divisors,
        "pp": tuple(d for d in all_divisors if d <= min(STAGES, spec.model.layers)),
        "ep": all_divisors,
        "tp": inside,
        "expert_tp": inside if spec.model.moe else (1,),
        "slots_per_gpu": tuple(range(1, SLOTS + 1)),
        "gating": ("leader", "sharded"),
        "tp_comm": ("all_reduce", "reduce_scatter"),
        "split": ("balanced", "even"),
        "scope": (rule.scope if isinstance(rule, ExpertRule) else "none",),
        "spares": ("idle", "replicate") if spec.model.moe else ("idle",),
        "serving": (spec.execution.serving,),
    }
    dense = {} if spec.model.moe else {"gating": ("sharded",), "tp_comm": ("all_reduce",)}
    return found | dense | {key: tuple(values) for key, values in asked.items()}


def shapes(spec: Spec, space: Axes) -> tuple[list[Shape], Counter[str]]:
    """(legal shapes in a fixed order, combinations refused by reason). Combinations that mean the same plan count once: gating
    and `tp_comm` where tp is 1, stages of one stage, spare slots where there are none."""
    found: list[Shape] = []
    refused: Counter[str] = Counter()
    roles = [key for key in space if key.startswith("dtypes.")]
    dtypes = [
        tuple(zip((role.removeprefix("dtypes.") for role in roles), values, strict=True))
        for values in product(*(space[role] for role in roles))
    ]
    for gpus in space["gpus"]:
        whole = with_cluster(spec, gpus)
        for pp, ep, dp in product(space["pp"], space["ep"], space["dp"]):
            if dp * pp * ep != gpus:
                continue  # of another size: no combination of this one
            for tp, expert_tp in product(space["tp"], space["expert_tp"]):
                if spec.model.moe is None and expert_tp > 1:
                    refused[NO_EXPERTS] += 1
                    continue
                base = Shape(dp, pp, ep, tp, expert_tp)
                if ep % expert_tp == 0 and slots_of(spec, base) not in space["slots_per_gpu"]:
                    refused[SLOTS_REASON] += 1
                    continue
                variants = list(_variants(spec, base, space, dtypes))
                reasons: dict[tuple[str, str], str] = {}
                for shape in variants:
                    choice = shape.gating, shape.tp_comm
                    if choice not in reasons:
                        reasons[choice] = _refusal(whole, shape)
                    if reasons[choice]:
                        refused[reasons[choice]] += 1
                    else:
                        found.append(shape)
    return found, refused


def _variants(spec: Spec, base: Shape, space: Axes, dtypes: Iterable[tuple[tuple[str, str], ...]]) -> Iterable[Shape]:
    """The shapes of these degrees; choices that make no difference are made once."""
    moe, rule = spec.model.moe, spec.expert_rule
    choice = base.tp > 1 and moe is not None
    gatings = space["gating"] if choice else space["gating"][-1:]
    comms = space["tp_comm"] if choice else space["tp_comm"][:1]
    splits = space["split"] if base.pp > 1 else space["split"][:1]
    spare = moe is not None and moe.experts % max(1, base.ep // base.expert_tp) > 0 and isinstance(rule, ExpertRule)
    spares = space["spares"] if spare else space["spares"][:1]
    parts = space.get("micro_batches") or tuple(sorted({*PARTS, base.pp}))
    for gating, comm, split, kept, part, serving, scope, dtype in product(
        gatings, comms, splits, spares, parts, space["serving"], space["scope"], dtypes
    ):
        if comm == "reduce_scatter" and gating == "leader":
            continue  # the leader needs the whole sum: the builder reduces for it alone
        yield replace(
            base,
            gating=gating,
            tp_comm=comm,
            split=split,
            spares=kept,
            micro_batches=part,
            serving=serving,
            scope=scope,
            dtypes=dtype,
        )


def _refusal(spec: Spec, shape: Shape) -> str:
    """Why the shape's degrees are no plan, in words; empty where they are one."""
    asked = spec.parallelism.model_copy(update={"gating": shape.gating, "tp_comm": shape.tp_comm})
    degrees = {key: getattr(shape, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}
    faults = degree_faults(spec.model_copy(update={"parallelism": asked}), degrees)
    return reason_of(faults[0].code) if faults else ""


def reason_of(code: str) -> str:
    """A refusal's code with its title."""
    return f"{code}: {CODES[code].title}"


# --- specs ------------------------------------------------------------------------------------------------------------


def with_cluster(spec: Spec, gpus: int) -> Spec:
    """The spec on the first ``gpus`` GPUs of its cluster."""
    if gpus == spec.cluster.gpus:
        return spec
    return spec.model_copy(update={"cluster": first_gpus(spec.cluster, gpus)})


def first_gpus(cluster: Cluster, gpus: int) -> Cluster:
    """The first nodes of a cluster: as many as have ``gpus`` GPUs, the last of them perhaps in part."""
    groups: list[NodeGroup] = []
    left = gpus
    for group in cluster.groups:
        nodes, rest = divmod(min(left, group.nodes * group.gpus_per_node), group.gpus_per_node)
        if nodes:
            groups.append(group.model_copy(update={"nodes": nodes}))
        if rest:  # a node of its own kind
            domain = 0 if group.nvlink_domain in (0, group.gpus_per_node) else group.nvlink_domain
            groups.append(group.model_copy(update={"nodes": 1, "gpus_per_node": rest, "nvlink_domain": domain}))
        left -= nodes * group.gpus_per_node + rest
        if not left:
            break
    # made anew: a copy keeps what was derived from the whole
    return Cluster(name=cluster.name, source=cluster.source, groups=tuple(groups), links=cluster.links)


def spec_of(spec: Spec, shape: Shape, batch: int, *, prefill_chunk: int = 0) -> Spec:
    """The deployment spec of a candidate: what `planc build` compiles to its plan; with ``prefill_chunk`` prompt tokens of a TP
    group, a prefill step. Traffic is left out: candidates are compared under even routing; and so is a map, which fits one shape."""
    work: dict[str, Any] = {"batch": batch, "phase": "decode", "micro_batches": shape.micro_batches}
    if prefill_chunk:
        work |= {"phase": "prefill", "prefill_chunk": prefill_chunk}
    stages = None if shape.split == "balanced" or shape.pp == 1 else even_stages(spec.model.layers, shape.pp)
    degrees = {f.name: getattr(shape, f.name) for f in fields(shape) if f.name in ParallelismSpec.model_fields}
    changes: dict[str, Any] = {
        "workload": Workload(**spec.workload.model_dump() | work),
        "parallelism": ParallelismSpec(**degrees | {"stages": stages}),
        "expert_rule": rule_of(spec, shape),
        "execution": spec.execution.model_copy(update={"serving": shape.serving}),
        "traffic": None,
        "scenarios": {},
    }
    if spec.policy == "given":
        changes["placement"] = spec.placement.model_copy(update={"policy": "linear", "map": ""})
    if shape.dtypes:
        changes["model"] = _with_dtypes(spec.model, dict(shape.dtypes))
    return with_cluster(spec, shape.gpus).model_copy(update=changes)


def rule_of(spec: Spec, shape: Shape) -> ExpertRule | str:
    """The expert rule of a shape: as few slots as hold the experts, so that rounds are what the degrees need."""
    moe = spec.model.moe
    if shape.scope == "none" or moe is None:
        return "none" if shape.scope == "none" else spec.expert_rule
    choices: dict[str, Any] = {"scope": shape.scope, "spares": shape.spares}
    return ExpertRule(slots_per_gpu=slots_of(spec, shape), on_overflow="rounds", **choices)


def slots_of(spec: Spec, shape: Shape) -> int:
    """Experts of one layer on a GPU, as even as they can be."""
    moe = spec.model.moe
    return 1 if moe is None else -(-moe.experts * shape.expert_tp // shape.ep)


def even_stages(layers: int, pp: int) -> list[int]:
    """Layers of stages as alike as can be, the first with one more."""
    share, rest = divmod(layers, pp)
    return [share + (n < rest) for n in range(pp)]


def _with_dtypes(model: Model, changed: Mapping[str, str]) -> Model:
    dtypes = Dtypes(**model.dtypes.model_dump() | dict(changed))
    return Model.model_construct(**{name: getattr(model, name) for name in Model.model_fields} | {"dtypes": dtypes})
