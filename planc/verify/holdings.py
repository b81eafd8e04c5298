"""Experts, tokens and memory: the rule, coverage, the placement, conservation, and the memory table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import Expanded, OpBlock
from planc.graph.traffic import token_matrix
from planc.placement import memory_table
from planc.spec import ExpertRule
from planc.units import format_bytes
from planc.verify.plan import Draft
from planc.verify.structure import FEW, fault


def _expert_blocks(draft: Draft) -> list[OpBlock]:
    """Expert blocks of the first micro-batch; the others run on the same weights."""
    return [b for b in draft.blocks.blocks if b.kind == "expert" and b.micro_batch == 0 and b.experts is not None]


def held_experts(draft: Draft) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(layer, expert, rank) of every expert op of the first micro-batch, int64 [ops] each, read off the graph."""
    blocks = _expert_blocks(draft)
    if not blocks:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    layers = np.concatenate([np.full(len(b), -1 if b.layer is None else b.layer, dtype=np.int64) for b in blocks])
    experts = np.concatenate([b.experts for b in blocks if b.experts is not None]).astype(np.int64)
    return layers, experts, np.concatenate([b.ranks[:, 0] for b in blocks]).astype(np.int64)


def check_rule(draft: Draft) -> Iterator[Diagnostic]:
    """PLN310: no rank holds more experts than the rule allows (with rounds, counts differ by at most one), nor two
    copies of one expert."""
    layers, experts, ranks = held_experts(draft)
    par, rule = draft.parallelism, draft.spec.expert_rule
    whole = np.stack([layers, experts, ranks])
    order = np.lexsort(whole[::-1])
    twice = np.flatnonzero((np.diff(whole[:, order], axis=1) == 0).all(axis=0))
    for i in order[twice[:FEW]].tolist():
        yield fault("PLN310", f"GPU {ranks[i]} holds two copies of expert {experts[i]} of layer {layers[i]}", f"L{layers[i]}.expert")
    if not isinstance(rule, ExpertRule):
        return
    if rule.scope == "layer":
        keys, what = layers * par.world_size + ranks, "experts of one layer"
        needed = draft.spec.model.moe.experts if draft.spec.model.moe else 0
        allowed = max(rule.slots_per_gpu, -(-needed // par.holders))
    else:
        keys, what = ranks, "experts"
        allowed = max(rule.slots_per_gpu, draft.placement.rounds if draft.placement.relaxed else 0)
    found, counts = np.unique(keys, return_counts=True)
    for i in np.flatnonzero(counts > allowed)[:FEW].tolist():
        rank = int(found[i] % par.world_size)
        message = f"GPU {rank} holds {counts[i]} {what}; the rule (scope {rule.scope}) allows {allowed}"
        yield fault("PLN310", message, f"rank {rank}")


def check_coverage(draft: Draft) -> Iterator[Diagnostic]:
    """PLN311: every expert (and every shard of it) of every MoE layer has a copy in every replica."""
    moe, par = draft.spec.model.moe, draft.parallelism
    if moe is None:
        return
    layers, experts, ranks = held_experts(draft)
    replicas = ranks // par.replica_size
    shards = ranks % par.expert_tp
    shape = (draft.spec.model.layers, par.dp, moe.experts, par.expert_tp)
    inside = (layers >= 0) & (layers < shape[0]) & (experts >= 0) & (experts < moe.experts)
    present = np.zeros(shape, dtype=bool)
    present[layers[inside], replicas[inside], experts[inside], shards[inside]] = True
    for i in np.flatnonzero(~inside)[:FEW].tolist():
        yield fault("PLN311", f"GPU {ranks[i]} runs expert {experts[i]} of layer {layers[i]}, which the model does not have")
    wanted = np.zeros(shape[0], dtype=bool)
    wanted[list(draft.spec.model.moe_layer_ids)] = True
    for layer, replica, expert, _ in np.argwhere(~present & wanted[:, None, None, None])[:FEW].tolist():
        message = f"expert {expert} of layer {layer} has no copy in replica {replica}"
        yield fault("PLN311", message, f"L{layer}.expert", "put it on a GPU of that replica")


def check_placement(draft: Draft) -> Iterator[Diagnostic]:
    """PLN312: the graph runs every expert where the placement holds it, and nowhere else."""
    par = draft.parallelism
    planned = []
    for layer, part in draft.placement.layers.items():
        firsts = par.stage_ranks(par.stage_of_layer(layer))[:, :1]
        ranks = (firsts + part.rank).reshape(-1)
        ranks = (ranks[:, None] + np.arange(par.expert_tp)).reshape(-1)
        experts = np.repeat(np.tile(part.expert, par.dp), par.expert_tp)
        planned.append((layer * 2**32 + experts.astype(np.int64)) * 2**21 + ranks)
    want = np.sort(np.concatenate(planned)) if planned else np.zeros(0, dtype=np.int64)
    layers, experts, ranks = held_experts(draft)
    found = np.sort((layers * 2**32 + experts) * 2**21 + ranks)
    if np.array_equal(found, want):
        return
    for keys, text in ((np.setdiff1d(found, want), "runs on a GPU that does not hold it"), (np.setdiff1d(want, found), "is held by a GPU that does not run it")):
        for key in keys[:FEW].tolist():
            layer, expert, rank = key >> 53, (key >> 21) & (2**32 - 1), key & (2**21 - 1)
            yield fault("PLN312", f"expert {expert} of layer {layer} {text}: GPU {rank}", f"L{layer}.expert")


def check_conservation(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN313: in every dispatch, tokens × top_k leave the sources and reach the experts, each expert op gets its
    column of the token matrix, and the sources get top_k partial outputs per token back."""
    moe, graph, par = draft.spec.model.moe, draft.blocks, draft.parallelism
    if moe is None:
        return
    into: dict[int, list[int]] = {}
    for number, edge in enumerate(graph.edges):
        into.setdefault(edge.target, []).append(number)
    received: dict[int, np.ndarray] = {}
    for index, block in enumerate(graph.blocks):
        if block.kind != "dispatch" or block.layer not in draft.placement.layers:
            continue
        sent = np.zeros(len(block), dtype=np.int64)
        for number in into.get(index, []):
            rows = graph.edges[number].tensor.shape[0] * moe.top_k
            sent += np.bincount(expanded.pairs(number)[1], minlength=len(block)) * rows
        places = id(draft.placement.layers[block.layer])
        if places not in received:
            received[places] = token_matrix(draft.spec, par, draft.placement, block.layer).sum(axis=0)
        yield from _check_dispatch(draft, expanded, index, sent, received[places])


def _check_dispatch(
    draft: Draft, expanded: Expanded, index: int, sent: np.ndarray, received: np.ndarray
) -> Iterator[Diagnostic]:
    graph, par = draft.blocks, draft.parallelism
    block = graph.blocks[index]
    got = np.zeros((par.dp, par.ep), dtype=np.int64)
    for number, edge in enumerate(graph.edges):
        target = graph.blocks[edge.target]
        if edge.source == index and target.kind == "expert" and target.rows is not None:
            ops = expanded.pairs(number)[1]
            ranks = target.ranks[ops, 0].astype(np.int64)
            np.add.at(got, (ranks // par.replica_size, ranks % par.ep), target.rows[ops])
    for replica in range(min(par.dp, len(sent))):
        arrived = int(got[replica].sum()) // par.expert_tp
        if arrived != sent[replica]:
            message = f"{graph.op_id(index, replica)}: {sent[replica]} tokens are sent, {arrived} reach an expert"
            yield fault("PLN313", message, block.name)
        elif (got[replica] != received).any():
            local = int(np.flatnonzero(got[replica] != received)[0])
            message = f"{graph.op_id(index, replica)}: rank {local} of the group gets {got[replica, local]} tokens, routing sends {received[local]}"
            yield fault("PLN313", message, block.name)


def check_memory(draft: Draft) -> Iterator[Diagnostic]:
    """PLN315: the memory table is what the placement needs. PLN201: every rank fits."""
    fresh = memory_table(draft.spec, draft.parallelism, draft.placement)
    table = draft.memory
    for name, values in fresh.items.items():
        given = table.items.get(name)
        wrong = np.flatnonzero(given != values) if given is not None and given.shape == values.shape else np.array([0])
        if len(wrong):
            rank = int(wrong[0])
            shown = int(given[rank]) if given is not None and len(given) > rank else 0
            message = f"rank {rank}: the table says {shown:,} B of {name}, the placement needs {int(values[rank]):,} B"
            yield Diagnostic("PLN315", message, f"memory.{name}")
    for rank in np.flatnonzero(fresh.headroom < 0)[:FEW].tolist():
        message = f"rank {rank} needs {format_bytes(int(fresh.used[rank]))} but has {format_bytes(int(fresh.capacity[rank]))}"
        yield Diagnostic("PLN201", message, "memory")
