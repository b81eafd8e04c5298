"""Experts, tokens and memory: the rule, coverage, the placement, conservation, and the memory table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import Expanded
from planc.graph.expand import edge_rows
from planc.placement import check_rule as rule_slots
from planc.placement import copy_tokens, memory_table, step_tokens
from planc.spec import ExpertRule
from planc.units import format_bytes
from planc.verify.plan import Draft
from planc.verify.structure import FEW, fault


def held_experts(draft: Draft, micro_batch: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(layer, expert, rank) of every expert op of a micro-batch, int64 [ops] each, read off the graph."""
    blocks = [b for b in draft.blocks.blocks if b.kind == "expert" and b.micro_batch == micro_batch]
    if not blocks:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    layers = np.concatenate([np.full(len(b), b.layer, dtype=np.int64) for b in blocks])
    experts = np.concatenate([b.experts for b in blocks if b.experts is not None]).astype(np.int64)
    return layers, experts, np.concatenate([b.ranks[:, 0] for b in blocks]).astype(np.int64)


def check_rule(draft: Draft) -> Iterator[Diagnostic]:
    """PLN310: no rank holds more experts than the rule allows (in rounds, counts differ by at most one), nor two copies
    of one expert; no expert has a second copy unless spare slots are filled; r and `relaxed` say what is held."""
    layers, experts, ranks = held_experts(draft)
    par = draft.parallelism
    copies = (layers * 65536 + experts) * par.world_size
    twice = _repeated(copies + ranks)
    for key in twice[:FEW]:
        layer, expert = divmod(key // par.world_size, 65536)
        message = f"GPU {key % par.world_size} holds two copies of expert {expert} of layer {layer}"
        yield fault("PLN310", message, f"L{layer}.expert")
    if not twice and not draft.spec.replicates:
        replicas, shards = ranks // par.replica_size, ranks % par.expert_tp
        for key in _repeated(copies + replicas * par.expert_tp + shards)[:FEW]:
            layer, expert = divmod(key // par.world_size, 65536)
            message = f"expert {expert} of layer {layer} has a second copy, but spare slots stay idle"
            yield fault("PLN310", message, f"L{layer}.expert")
    yield from _check_counts(draft, layers, ranks)


def _repeated(keys: np.ndarray) -> list[int]:
    """The keys that occur more than once, ascending."""
    ordered = np.sort(keys)
    return sorted(set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()))


def _check_counts(draft: Draft, layers: np.ndarray, ranks: np.ndarray) -> Iterator[Diagnostic]:
    """How many experts the ranks hold, against the rule and against what the plan says of itself."""
    par, rule, placement = draft.parallelism, draft.spec.expert_rule, draft.placement
    by_layer = not isinstance(rule, ExpertRule) or rule.scope == "layer"
    ids = draft.spec.model.moe_layer_ids if by_layer else (0,)
    number = np.searchsorted(np.array(ids), layers) if by_layer else np.zeros_like(layers)
    cells = np.bincount(number * par.world_size + ranks, minlength=len(ids) * par.world_size)
    counts = cells.reshape(-1, par.world_size)
    rounds = int(counts.max(initial=0))
    limit = rounds
    if isinstance(rule, ExpertRule):
        needed, slots = rule_slots(draft.spec, par)
        limit = (
            rule.slots_per_gpu if rule.on_overflow == "error" else max(rule.slots_per_gpu, -(-needed // par.holders))
        )
        what = "experts of one layer" if by_layer else "experts"
        for _, rank in np.argwhere(counts > limit)[:FEW].tolist():
            message = f"GPU {rank} holds {counts[:, rank].max()} {what}; the rule (scope {rule.scope}) allows {limit}"
            yield fault("PLN310", message, f"rank {rank}")
        if needed > slots and rounds <= limit:
            yield from _check_even(draft, counts, ids if by_layer else ())
    relaxed = isinstance(rule, ExpertRule) and rounds > rule.slots_per_gpu
    if rounds <= limit and (rounds, relaxed) != (placement.rounds, placement.relaxed):
        message = f"the plan says r = {placement.rounds}, relaxed {placement.relaxed}; its GPUs hold {rounds}, relaxed {relaxed}"
        yield fault("PLN310", message, "expert")


def _check_even(draft: Draft, counts: np.ndarray, ids: tuple[int, ...]) -> Iterator[Diagnostic]:
    """In rounds the ranks of a layer's stage, or of every stage, hold the same number of experts within one."""
    par = draft.parallelism
    by_stage = counts.reshape(len(counts), par.dp, par.pp, par.ep)
    for row, held in enumerate(by_stage):
        stages = [par.stage_of_layer(ids[row])] if ids else list(range(par.pp))
        uneven = [s for s in stages if np.ptp(held[:, s]) > 1]
        for stage in uneven[:1]:
            where = f"layer {ids[row]}" if ids else f"stage {stage}"
            message = f"{where}: a GPU holds {held[:, stage].min()} experts, another {held[:, stage].max()}; rounds differ by at most one"
            yield fault("PLN310", message, f"L{ids[row]}.expert" if ids else "expert")


def _absent_experts(draft: Draft) -> np.ndarray:
    """Experts without a whole copy in a replica, int [n, 3]: layer, replica, expert."""
    moe, par = draft.spec.model.moe, draft.parallelism
    assert moe is not None
    layers, experts, ranks = held_experts(draft)
    present = np.zeros((draft.spec.model.layers, par.dp, moe.experts, par.expert_tp), dtype=bool)
    inside = (experts >= 0) & (experts < moe.experts)
    present[layers[inside], ranks[inside] // par.replica_size, experts[inside], ranks[inside] % par.expert_tp] = True
    wanted = np.zeros(draft.spec.model.layers, dtype=bool)
    wanted[list(draft.spec.model.moe_layer_ids)] = True
    return np.argwhere(~present.all(axis=3) & wanted[:, None, None])


def check_coverage(draft: Draft) -> Iterator[Diagnostic]:
    """PLN311: every expert (and every shard of it) of every MoE layer has a copy in every replica, and there are no
    others."""
    moe = draft.spec.model.moe
    if moe is None:
        return
    placed = [np.stack([np.full(len(p.expert), layer), p.expert]) for layer, p in draft.placement.layers.items()]
    layers, experts = np.concatenate([np.stack(held_experts(draft)[:2]), *placed], axis=1)
    for i in np.flatnonzero((experts < 0) | (experts >= moe.experts))[:FEW].tolist():
        message = f"layer {layers[i]} has no expert {experts[i]}: its experts are 0 to {moe.experts - 1}"
        yield fault("PLN311", message, f"L{layers[i]}.expert")
    for layer, replica, expert in _absent_experts(draft)[:FEW].tolist():
        message = f"expert {expert} of layer {layer} has no copy in replica {replica}"
        yield fault("PLN311", message, f"L{layer}.expert", "put it on a GPU of that replica")


def check_placement(draft: Draft) -> Iterator[Diagnostic]:
    """PLN312: in every micro-batch the graph runs every expert where the placement holds it, and nowhere else. Experts
    that are absent altogether, and what runs in their place, are left to PLN311."""
    par, moe = draft.parallelism, draft.spec.model.moe
    if moe is None:
        return
    planned = [np.zeros((3, 0), dtype=np.int64)]
    for layer, part in draft.placement.layers.items():
        firsts = par.stage_ranks(par.stage_of_layer(layer))[:, :1]
        ranks = ((firsts + part.rank).reshape(-1)[:, None] + np.arange(par.expert_tp)).reshape(-1)
        experts = np.repeat(np.tile(part.expert, par.dp), par.expert_tp)
        planned.append(np.stack([np.full(len(ranks), layer), experts, ranks]).astype(np.int64))
    want = np.sort(_keys(*np.concatenate(planned, axis=1)))
    absent = _absent_experts(draft)
    for micro_batch in range(draft.spec.workload.micro_batches):
        found = np.sort(_keys(*held_experts(draft, micro_batch)))
        if np.array_equal(found, want) or (micro_batch and not len(found)):  # a micro-batch left out is PLN314
            continue
        unheld, idle = _unpacked(np.setdiff1d(found, want)), _unpacked(np.setdiff1d(want, found))
        if not micro_batch and len(absent):
            gone = {tuple(row) for row in absent.tolist()}
            instead = {
                (layer, rank) for layer, expert, rank in idle if (layer, rank // par.replica_size, expert) in gone
            }
            unheld = [row for row in unheld if (row[0], row[2]) not in instead]
            idle = [row for row in idle if (row[0], row[2]) not in instead]
        for rows, text in (
            (unheld, "runs on a GPU that does not hold it"),
            (idle, "is held by a GPU that does not run it"),
        ):
            for layer, expert, rank in rows[:FEW]:
                yield fault("PLN312", f"expert {expert} of layer {layer} {text}: GPU {rank}", f"L{layer}.expert")
        if np.array_equal(np.unique(found), np.unique(want)):
            yield fault("PLN312", "an expert of the placement runs more or less often than it is held")


def _keys(layers: np.ndarray, experts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(layer, expert, rank) as one number: at most 10,000 layers, 2^24 experts and 2^20 ranks, so that it fits 63 bits."""
    return np.asarray((layers << 44) + ((experts & (2**24 - 1)) << 20) + ranks)


def _unpacked(keys: np.ndarray) -> list[tuple[int, int, int]]:
    return [(key >> 44, (key >> 20) & (2**24 - 1), key & (2**20 - 1)) for key in keys.tolist()]


def check_conservation(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN313: the sources of every dispatch send tokens × top_k, every copy of an expert gets its share of them, and
    the same number of outputs comes back to combine."""
    moe, graph, par = draft.spec.model.moe, draft.blocks, draft.parallelism
    if moe is None:
        return
    sources = par.attention_dp if par.leaders_gate else par.ep
    total = sources * step_tokens(draft.spec, par).source * moe.top_k
    moved = {
        i: np.zeros(len(b), dtype=np.int64) for i, b in enumerate(graph.blocks) if b.kind in ("dispatch", "combine")
    }
    for number, edge in enumerate(graph.edges):
        if edge.target in moved:
            source, target = expanded.pairs(number)
            rows = edge_rows(graph, edge, source, target)
            weights = np.full(len(source), edge.tensor.shape[0] * moe.top_k) if rows is None else rows
            np.add.at(moved[edge.target], target, weights)
    for index, found in moved.items():
        for op in np.flatnonzero(found != total)[:FEW].tolist():
            what = "choices are sent" if graph.blocks[index].kind == "dispatch" else "outputs come back"
            message = f"{graph.op_id(index, op)}: {found[op]} {what}; the tokens of the group make {total} choices"
            yield fault("PLN313", message, graph.blocks[index].name)
    yield from _check_shares(draft)


def _check_shares(draft: Draft) -> Iterator[Diagnostic]:
    """Every expert op gets the tokens that routing gives to its copy."""
    moe, graph, par = draft.spec.model.moe, draft.blocks, draft.parallelism
    assert moe is not None
    shares: dict[int, np.ndarray] = {}
    for index, block in enumerate(graph.blocks):
        if block.kind != "expert" or block.layer is None or block.rows is None or block.experts is None:
            continue
        part = draft.placement.layers[block.layer]
        if id(part) not in shares:
            table = np.zeros((moe.experts, par.ep), dtype=np.int64)
            table[part.expert, part.rank] = copy_tokens(draft.spec, par, draft.placement, block.layer)
            shares[id(part)] = np.repeat(table[:, :: par.expert_tp], par.expert_tp, axis=1)
        want = shares[id(part)][block.experts, block.ranks[:, 0] % par.ep]
        for op in np.flatnonzero(block.rows != want)[:FEW].tolist():
            message = f"{graph.op_id(index, op)} gets {int(block.rows[op])} tokens, routing sends {int(want[op])}"
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
    for name in sorted(table.items.keys() - fresh.items.keys()):
        yield Diagnostic("PLN315", f"the table has an item `{name[:40]}`, which no rank holds", f"memory.{name[:40]}")
    for name, given, values in (
        ("capacity", table.capacity, fresh.capacity),
        ("reserve", table.reserve, fresh.reserve),
    ):
        if not np.array_equal(given, values):
            yield Diagnostic("PLN315", f"the table's {name} is not that of the cluster's GPUs", f"memory.{name}")
    for rank in np.flatnonzero(fresh.headroom < 0)[:FEW].tolist():
        message = (
            f"rank {rank} needs {format_bytes(int(fresh.used[rank]))} but has {format_bytes(int(fresh.capacity[rank]))}"
        )
        yield Diagnostic("PLN201", message, "memory")
