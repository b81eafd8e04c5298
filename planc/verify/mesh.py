"""The mesh: degrees are legal and as asked, and every op runs on exactly the ranks that its kind runs on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import OpBlock
from planc.placement import Parallelism
from planc.placement.legality import degree_faults
from planc.verify.plan import Draft
from planc.verify.structure import fault

DEGREES = ("dp", "pp", "ep", "tp", "expert_tp")


def check_degrees(draft: Draft) -> Iterator[Diagnostic]:
    """PLN104 to PLN108: the degrees are legal and the stages hold every layer once, in order. PLN111: the plan has what
    the spec asks for."""
    spec, par, asked = draft.spec, draft.parallelism, draft.spec.parallelism
    yield from degree_faults(spec, {key: getattr(par, key) for key in DEGREES})
    for key in (*DEGREES, "gating", "tp_comm"):
        want, have = getattr(asked, key), getattr(par, key)
        if want not in ("auto", have):
            yield spec.fault("PLN111", f"the spec asks for {key} {want}, but the plan has {have}", f"parallelism.{key}")
    firsts, ends = [first for first, _ in par.stages], [end for _, end in par.stages]
    contiguous = len(ends) == par.pp and [*firsts, spec.model.layers] == [0, *ends]
    if not contiguous or any(first >= end for first, end in par.stages):
        shown = ", ".join(f"{first} to {end - 1}" for first, end in par.stages)
        message = (
            f"the {par.pp} stages hold the layers {shown}, not each of 0 to {spec.model.layers - 1} once and in order"
        )
        yield spec.fault("PLN108", message, "parallelism.stages")
    elif asked.stages is not None and tuple(e - f for f, e in par.stages) != asked.stages:
        message = f"the spec asks for stages of {list(asked.stages)} layers, but the plan has {[e - f for f, e in par.stages]}"
        yield spec.fault("PLN111", message, "parallelism.stages")


def stage_of(block: OpBlock, par: Parallelism) -> int:
    """Pipeline stage of a block: its layer's; the first or last one at the ends of the step; hand-overs by rank."""
    if block.layer is not None:
        return par.stage_of_layer(block.layer)
    if block.kind in ("pp_send", "pp_recv"):
        return int(block.ranks[0, 0]) % par.replica_size // par.ep
    return 0 if block.kind in ("input", "input_split", "embed") else par.pp - 1


def check_ranks(draft: Draft) -> Iterator[Diagnostic]:
    """PLN308: a block has an op on every rank (for collectives: every group) that its kind runs on, and on no other,
    in ascending order. Experts are left to PLN312."""
    par = draft.parallelism
    if draft.blocks.world_size != par.world_size:
        yield fault("PLN308", f"the graph is of {draft.blocks.world_size} GPUs, the plan of {par.world_size}")
        return
    for block in draft.blocks.blocks:
        if block.kind == "expert":
            continue
        if block.kind == "all_reduce" and block.rows is not None:  # of expert shards; which ones, their edges say
            width = par.expert_tp
            good = block.ranks.shape[1] == width and bool((block.ranks % width == np.arange(width)).all())
            good = good and bool((block.ranks // width == block.ranks[:, :1] // width).all())
            good = good and bool((np.diff(block.ranks[:, 0]) > 0).all())
        else:
            good = any(np.array_equal(block.ranks, ranks) for ranks in _ranks_of(block, par))
        if not good:
            where = "groups of ranks" if block.collective else "ranks"
            message = f"{block.name}: its {where} are not those on which a {block.kind} op of its layer runs"
            yield fault("PLN308", message, block.name)


def _ranks_of(block: OpBlock, par: Parallelism) -> tuple[np.ndarray, ...]:
    """The rank arrays that the kind may have; several for a sum of which only the leaders may need the result."""
    stage = stage_of(block, par)
    ep_groups = par.stage_ranks(stage)
    each, tp_groups = ep_groups.reshape(-1, 1), ep_groups.reshape(-1, par.tp)
    leaders = tp_groups[:, :1]
    match block.kind:
        case "input":
            return (np.zeros((1, 1), dtype=np.int32),)
        case "output_collect":
            return (ep_groups[:1, :1],)
        case "input_split" | "dispatch" | "combine":
            return (ep_groups,)
        case "all_reduce" | "reduce_scatter" | "all_gather" | "broadcast":
            return (tp_groups,)
        case "sample":
            return (leaders,)
        case "gate" | "aggregate":
            return (leaders if par.leaders_gate else each,)
        case "residual_add":
            return each, leaders
        case "pp_send" if stage == par.pp - 1:
            return ()
        case "pp_recv" if stage == 0:
            return ()
    return (each,)
