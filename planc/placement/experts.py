"""Which rank holds which expert: the expert rule, rounds, spare slots, and the placement value."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planc.placement.mesh import Parallelism
from planc.placement.policy import POLICIES, linear
from planc.spec import ExpertRule, Spec


@dataclass(frozen=True, eq=False)
class LayerPlacement:
    """Copies of one layer's experts inside an EP group, ordered by (expert, rank); the same in every replica.

    ``expert``, ``rank`` and ``slot`` are int32 [copies]: the expert's id, the first of its ``expert_tp`` ranks
    counted from the EP group's first rank, and its turn among the experts of that layer on that rank.
    """

    expert: np.ndarray
    rank: np.ndarray
    slot: np.ndarray

    @cached_property
    def rounds(self) -> int:
        """r: the most experts of this layer on one rank."""
        return int(self.slot.max()) + 1

    @cached_property
    def copies(self) -> np.ndarray:
        """Copies of each expert, int [E]."""
        return np.bincount(self.expert)


def layer_placement(expert: np.ndarray, rank: np.ndarray) -> LayerPlacement:
    """Sort copies by (expert, rank) and number the turns of each rank by expert id."""
    order = np.lexsort((rank, expert))
    expert, rank = expert[order].astype(np.int32), rank[order].astype(np.int32)
    by_rank = np.argsort(rank, kind="stable")
    sorted_ranks = rank[by_rank]
    slot = np.empty(len(rank), dtype=np.int32)
    slot[by_rank] = np.arange(len(rank)) - np.searchsorted(sorted_ranks, sorted_ranks)
    return LayerPlacement(expert, rank, slot)


@dataclass(frozen=True, eq=False)
class Placement:
    """Who holds what. Layers with equal placements share one `LayerPlacement` object."""

    par: Parallelism
    layers: dict[int, LayerPlacement]  #: MoE layer -> its copies
    rounds: int  #: r, experts of one layer (scope layer) or in all (scope model) that a rank holds at most
    relaxed: bool  #: whether r exceeds the rule's slots_per_gpu

    def ranks_of_expert(self, layer: int, expert: int) -> list[list[int]]:
        """World ranks of every copy of an expert, a list per copy of its ``expert_tp`` ranks, replica by replica."""
        part = self.layers[layer]
        locals_ = part.rank[part.expert == expert].tolist()
        stage = self.par.stage_ranks(self.par.stage_of_layer(layer))
        width = self.par.expert_tp
        return [[int(first[0]) + r + i for i in range(width)] for first in stage for r in locals_]

    def experts_of_rank(self, rank: int) -> dict[int, list[int]]:
        """Layer -> experts (or expert shards) that the world rank holds."""
        stage, local = divmod(rank % self.par.replica_size, self.par.ep)
        holder = local // self.par.expert_tp * self.par.expert_tp
        first, end = self.par.stages[stage]
        found = {i: part.expert[part.rank == holder].tolist() for i, part in self.layers.items() if first <= i < end}
        return {layer: experts for layer, experts in found.items() if experts}

    def expert_counts(self) -> np.ndarray:
        """Experts (or expert shards) on each rank of one replica, summed over layers, int64 [pp · ep]."""
        counts = np.zeros((self.par.pp, self.par.ep), dtype=np.int64)
        for layer, part in self.layers.items():
            holders = np.bincount(part.rank // self.par.expert_tp, minlength=self.par.holders)
            counts[self.par.stage_of_layer(layer)] += np.repeat(holders, self.par.expert_tp)
        return counts.reshape(-1)


def place_experts(spec: Spec, par: Parallelism) -> Placement:
    """Assign every expert of every MoE layer under the spec's expert rule and policy."""
    moe = spec.model.moe
    rule = spec.expert_rule
    layers: dict[int, LayerPlacement] = {}
    if moe is None:
        return Placement(par, {}, 0, False)
    nodes = spec.cluster.node_of_rank[: par.ep : par.expert_tp]
    policy = POLICIES.get(
        spec.policy, linear
    )  # where traffic or a map decides, linear stands in: it holds as many copies
    worst = 0
    if isinstance(rule, ExpertRule) and rule.scope == "model":
        for first, end in par.stages:
            ids = [i for i in spec.model.moe_layer_ids if first <= i < end]
            holders = policy(len(ids) * moe.experts, nodes)
            slots = max(rule.slots_per_gpu, int(np.bincount(holders).max(initial=0)))
            items = np.arange(len(holders))  # the experts of one layer after those of another
            if spec.replicates:
                items, holders = fill_spares(holders, par.holders, slots, np.ones(len(holders)))
            worst = max(worst, int(np.bincount(holders).max(initial=0)))
            for n, layer in enumerate(ids):
                mine = items // moe.experts == n
                layers[layer] = layer_placement(items[mine] % moe.experts, holders[mine] * par.expert_tp)
    else:
        holder = policy(moe.experts, nodes)
        expert = np.arange(moe.experts)
        if isinstance(rule, ExpertRule) and spec.replicates:
            slots = max(rule.slots_per_gpu, int(np.bincount(holder).max()))
            expert, holder = fill_spares(holder, par.holders, slots, np.ones(moe.experts))
        shared = layer_placement(expert, holder * par.expert_tp)
        worst = shared.rounds
        layers = dict.fromkeys(spec.model.moe_layer_ids, shared)
    relaxed = isinstance(rule, ExpertRule) and worst > rule.slots_per_gpu
    return Placement(par, layers, worst, relaxed)


def placement_of(spec: Spec, par: Parallelism, tables: np.ndarray) -> Placement:
    """The placement of slot tables int32 [MoE layers, holders, slots], -1 where a slot is empty; layers with equal tables
    share one object."""
    shared: dict[bytes, LayerPlacement] = {}
    layers: dict[int, LayerPlacement] = {}
    for layer, table in zip(spec.model.moe_layer_ids, tables, strict=True):
        key = table.tobytes()
        if key not in shared:
            holder, slot = np.nonzero(table >= 0)
            shared[key] = layer_placement(table[holder, slot], holder * par.expert_tp)
        layers[layer] = shared[key]
    rule = spec.expert_rule
    if isinstance(rule, ExpertRule) and rule.scope == "model":
        inside = [np.array([a <= i < b for i in spec.model.moe_layer_ids]) for a, b in par.stages]
        rounds = max(int((tables[part] >= 0).sum(axis=(0, 2)).max(initial=0)) for part in inside)
    else:
        rounds = max(part.rounds for part in layers.values())
    return Placement(par, layers, rounds, isinstance(rule, ExpertRule) and rounds > rule.slots_per_gpu)


def fill_spares(holder: np.ndarray, holders: int, slots: int, load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill every free slot with a further copy of the expert whose copies are the most loaded.

    ``holder``: int [E], the holder of each expert's first copy; ``load``: [E]. A holder never gets two copies of
    one expert; a slot for which no expert is left stays empty. Returns (expert, holder) of all copies.
    """
    where = [[h] for h in holder.tolist()]  # the first copy of an expert stays where it is
    free = slots - np.bincount(holder, minlength=holders)
    queue = [(-float(load[e]), e) for e in range(len(where))]
    heapq.heapify(queue)
    while queue and free.any():
        _, e = heapq.heappop(queue)
        open_ = free.copy()
        open_[where[e]] = 0
        filled = h = int(np.argmax(open_))
        if not open_[h]:
            filled = int(np.argmax(free))
            h = _make_room(where, e, filled)
        if h < 0:
            continue  # no further copy of this expert can be placed
        free[filled] -= 1
        where[e].append(h)
        heapq.heappush(queue, (-float(load[e]) / len(where[e]), e))
    experts = [*range(len(where)), *(e for e, places in enumerate(where) for _ in places[1:])]
    ranks = [*(places[0] for places in where), *(h for places in where for h in places[1:])]
    return np.array(experts, dtype=np.int32), np.array(ranks, dtype=np.int32)


def _make_room(where: list[list[int]], expert: int, free: int) -> int:
    """Move a spare copy of another expert to the holder ``free``, which has ``expert`` already, and return the holder
    that it leaves to ``expert``; -1 when no copy can move."""
    for places in where:
        for n, h in enumerate(places[1:], 1):
            if h not in where[expert] and free not in places:
                places[n] = free
                return h
    return -1


def check_rule(spec: Spec, par: Parallelism) -> tuple[int, int]:
    """(experts that need a slot, slots there are) of the fullest stage under the rule's scope."""
    moe, rule = spec.model.moe, spec.expert_rule
    if moe is None or not isinstance(rule, ExpertRule):
        return 0, 0
    needed = moe.experts
    if rule.scope == "model":
        inside = (sum(first <= i < end for i in spec.model.moe_layer_ids) for first, end in par.stages)
        needed *= max(inside)
    return needed, par.holders * rule.slots_per_gpu
