"""Certificates with made-up numbers, for the figures that are drawn from them: plausible, and the same for the same case."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from planc.placement import LayerPlacement, Parallelism, Placement, layer_placement
from planc.planner import Certificate
from planc.planner.certificate import (
    Bounds,
    Gaps,
    HeldOut,
    KindRecord,
    LayerRecord,
    LinkRecord,
    Objectives,
    TrafficRecord,
)
from planc.units import encode_numbers


class Made(NamedTuple):
    """What the figures are drawn from. ``node_of_rank``: int64 [world]."""

    certificate: Certificate
    placement: Placement
    node_of_rank: np.ndarray


class Case(NamedTuple):
    """A cluster, a model and how experts lie on it; ``per_node``: GPUs of a node."""

    nodes: int
    per_node: int
    layers: int
    experts: int
    slots: int = 1
    scope: str = "layer"
    pp: int = 1
    expert_tp: int = 1
    links: bool = True


CASES = {
    "8 nodes": Case(8, 8, 58, 64),
    "32 nodes": Case(32, 8, 58, 256),
    "scope model": Case(8, 8, 4, 16, scope="model"),
    "two slots": Case(16, 8, 58, 256, slots=2),
    "128 nodes": Case(128, 8, 3, 1024),
    "2 nodes": Case(2, 8, 58, 16),
    "1,280 nodes": Case(1280, 8, 58, 256),
    "two stages": Case(8, 8, 10, 32, pp=2),
    "shards": Case(4, 8, 6, 16, expert_tp=2),
    "copies": Case(8, 8, 6, 40),
    "narrow": Case(45, 4, 6, 180),
    "one node": Case(1, 8, 2, 8),
    "loads only": Case(8, 8, 58, 64, links=False),
    "wide nodes": Case(4, 72, 12, 288),
    "middling": Case(60, 8, 92, 128, slots=2),
    "most columns": Case(146, 8, 92, 160),
}


def made(case: Case, seed: int = 0) -> Made:
    """A certificate and the placement it is about. Every layer has its own map; spare places hold copies."""
    random = np.random.default_rng(seed)
    world = case.nodes * case.per_node
    node_of_rank = np.repeat(np.arange(case.nodes), case.per_node)
    ep = world // case.pp
    first = 0 if case.scope == "model" else 3
    share = case.layers // case.pp
    ends = [0, *(first + share * (stage + 1) for stage in range(case.pp))]
    par = Parallelism(1, case.pp, ep, 1, case.expert_tp, tuple(pairwise(ends)), "sharded", "all_reduce")
    layers: dict[int, LayerPlacement] = {}
    records = []
    order = random.permutation(par.holders)
    for number in range(case.layers):
        layer = first + number
        if case.scope == "model":
            holders = order[number * case.experts : (number + 1) * case.experts]
            part = layer_placement(np.arange(case.experts), holders)
        else:
            part = _filled(random, case, par.holders)
        layers[layer] = layer_placement(part.expert, part.rank * case.expert_tp)
        start = ep * par.stage_of_layer(layer)
        records.append(_layer(random, case, layer, layers[layer], node_of_rank[start:]))
    rounds = max(part.rounds for part in layers.values())
    return Made(_certificate(random, case, records), Placement(par, layers, rounds, False), node_of_rank)


def _filled(random: np.random.Generator, case: Case, holders: int) -> LayerPlacement:
    """Every slot of every holder with an expert, each expert somewhere; no holder has two copies of one."""
    places = np.tile(np.arange(holders), case.slots)
    expert = np.arange(len(places)) % case.experts
    shift = random.integers(0, case.experts)
    pairs = np.unique(np.stack([random.permutation(case.experts)[(expert + shift) % case.experts], places], 1), axis=0)
    return layer_placement(pairs[:, 0], pairs[:, 1])


def _layer(
    random: np.random.Generator, case: Case, layer: int, part: LayerPlacement, node_of_rank: np.ndarray
) -> LayerRecord:
    loads = random.permutation(np.rint(random.lognormal(0, 1, case.experts) * 500)).astype(np.int64)
    arriving = np.bincount(node_of_rank[part.rank], weights=(loads / part.copies)[part.expert], minlength=case.nodes)
    bound = 40e-6 * random.uniform(0.9, 1.0)
    seconds = bound * random.uniform(1.0, 1.15)
    return LayerRecord(
        layer=layer,
        chosen="planc",
        seconds=seconds * case.links,
        identity_seconds=seconds * random.uniform(0.95, 1.7) * case.links,
        bound_seconds=bound * case.links,
        busiest=f"nic_down node {case.nodes - 1} rail 3" if case.links else "",
        imbalance=float(random.uniform(2, 3)),
        imbalance_bound=2.0,
        loads=encode_numbers(loads.tolist()),
        node_tokens=encode_numbers(np.rint(arriving).astype(int).tolist()),
    )


def _kinds(random: np.random.Generator, case: Case) -> list[KindRecord]:
    world = case.nodes * case.per_node
    counts = {"nvlink": world, "nic": world if case.nodes > 1 else 0, "spine": 8 if case.nodes > 8 else 0}
    kinds = []
    for kind, usual in (("nvlink", 1.3e-6), ("nic", 20e-6), ("spine", 24e-6)):
        for way in ("up", "down"):
            seconds = usual * random.uniform(0.9, 1.1)
            facts = {"busiest_seconds": seconds, "mean_seconds": 0.7 * seconds}
            plain = seconds * random.uniform(0.9, 1.5)
            if counts[kind]:
                kinds.append(KindRecord(kind=f"{kind}_{way}", links=counts[kind], identity_seconds=plain, **facts))
    return kinds


def _certificate(random: np.random.Generator, case: Case, records: list[LayerRecord]) -> Certificate:
    seconds = sum(r.seconds for r in records)
    links = LinkRecord(seconds=seconds, worst_layer_seconds=seconds, most_tokens=1.0, most_bytes=1.0)
    objectives = Objectives(
        dedup=links, direct=links, imbalance=2.5, worst_layer_imbalance=3.0, memory_spread=0, bytes_to_move=None,
        worst_case_seconds=None,
    )  # fmt: skip
    bounds = Bounds(
        dedup_seconds=1.0, direct_seconds=1.0, imbalance=2.0, memory_spread=0, bytes_to_move=None,
        worst_case_seconds=None, why="the nodes",
    )  # fmt: skip
    return Certificate(
        policy="topology",
        objective="link",
        transfer="dedup",
        tokens=4096.0,
        slots=case.slots,
        copies=case.nodes * case.per_node * case.slots,
        expert_bytes=1_000_000,
        seed=0,
        interrupted=False,
        traffic=TrafficRecord(name="made", origin="made up", sha256="", tokens=4096, held_out=1024),
        scenarios=[],
        objectives=objectives,
        bounds=bounds,
        gaps=Gaps(dedup_seconds=0.1, direct_seconds=0.1, imbalance=0.1, worst_case_seconds=None),
        held_out=HeldOut(tokens=1024, link_seconds={}, imbalance={}, chosen={}),
        nodes=encode_numbers(list(range(case.nodes))),
        layers=records,
        kinds=_kinds(random, case) if case.links else [],
        spares=[],
    )
