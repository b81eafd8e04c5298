"""What dispatch and combine carry in each layer: tokens on every link, at every rank and at every expert copy.

Routing is even unless the spec gives traffic: copies have the graph's rows, drawn evenly from all sources (the graph's
byte matrices count whole tokens and cannot be as even). With traffic, rows, ranks and links follow from its tokens; where
only loads are known, from loads, drawn evenly from all sources. Every replica is taken on its own links. Numbers are tokens of one micro-batch; combine is the transpose of dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from planc.cost.counts import expected_targets
from planc.graph.types import content
from planc.placement import copy_tokens, step_tokens
from planc.placement.experts import LayerPlacement, place_experts
from planc.routing import share_counts
from planc.topology import Topology, pair_loads, token_loads, topology

if TYPE_CHECKING:
    from planc.cost.step import Step
    from planc.placement import Placement
    from planc.routing import Traffic

Mode = Literal["low_latency", "normal"]


@dataclass(frozen=True, eq=False)
class Exchange:
    """One layer's dispatch. ``rows``: float [copies], tokens at each copy; ``pairs``: float [ep, ep], copies that each
    rank sends to each; ``links``: float [dp, links], copies over each link, in every replica; ``answered``: those of them
    that combine brings back, of an expert split by expert TP only the first shard's; ``sent``: tokens that the busiest source
    sends, each counted once."""

    rows: np.ndarray
    pairs: np.ndarray
    links: np.ndarray
    answered: np.ndarray
    sent: float


class Exchanges:
    """Exchanges of a plan's layers; layers with one placement share theirs where routing is even.

    ``mode`` low_latency sends a copy per expert, normal one per node. ``traffic``: where tokens go, None for evenly.
    ``speed``: float [ep], how fast each rank of an EP group is; copies of one expert then share its tokens in proportion,
    wherever tokens come from. Without it, each serves its part of the sources, as engines' static tables do.
    """

    def __init__(self, plan: Step, mode: Mode, traffic: Traffic | None = None, speed: np.ndarray | None = None) -> None:
        self.plan, self.mode, self.traffic, self.speed = plan, mode, traffic, speed
        self._found: dict[object, Exchange] = {}
        self._places: dict[int, bytes] = {}

    @cached_property
    def topology(self) -> Topology:
        """Links of the cluster."""
        return topology(self.plan.spec.cluster)

    def place(self, layer: int) -> bytes:
        """A key of the layer's placement: the same for layers whose experts are on the same ranks."""
        part = self.plan.placement.layers[layer]
        if id(part) not in self._places:
            self._places[id(part)] = content(part.expert, part.rank, part.slot)
        return self._places[id(part)]

    def of(self, layer: int) -> Exchange:
        """The exchange of one MoE layer."""
        stage = self.plan.parallelism.stage_of_layer(layer)
        key: object = (self.place(layer), stage) if self.traffic is None else layer
        if key not in self._found:
            self._found[key] = self._even(layer, stage) if self.traffic is None else self._known(layer, stage)
        return self._found[key]

    def _even(self, layer: int, stage: int) -> Exchange:
        plan, par = self.plan, self.plan.parallelism
        rows = copy_tokens(plan.spec, par, plan.placement, layer)
        load = np.bincount(plan.placement.layers[layer].expert, weights=rows)
        counts = np.zeros((par.ep, len(load)))
        counts[self.gating] = load / len(self.gating)
        return self._from_copies(layer, stage, self._served(layer, counts), float(step_tokens(plan.spec, par).source))

    @property
    def gating(self) -> np.ndarray:
        """Ranks of an EP group that send tokens."""
        par = self.plan.parallelism
        return np.arange(0, par.ep, par.tp if par.leaders_gate else 1)

    def _served(self, layer: int, counts: np.ndarray) -> np.ndarray:
        """Tokens from each rank to each copy, float [ep, copies], of ``counts``: float [ep, E] to each expert."""
        part = self.plan.placement.layers[layer]
        if self.speed is None:
            return _dealt(part, counts, self.gating)
        speed = self.speed[part.rank]
        return np.asarray(counts[:, part.expert] * (speed / np.bincount(part.expert, weights=speed)[part.expert]))

    def _from_copies(self, layer: int, stage: int, copies: np.ndarray, sent: float) -> Exchange:
        """From ``copies``: float [ep, copies], tokens from each rank to each copy."""
        par = self.plan.parallelism
        pairs = self._on_ranks(copies, layer)

        def over(pairs: np.ndarray) -> np.ndarray:
            links = np.stack([self._pair_links(ranks, pairs) for ranks in par.stage_ranks(stage).astype(np.int64)])
            return links * self._shared_by_a_node(links.shape[1]) if self.mode == "normal" else links

        links = over(pairs)
        answered = over(first_shards(pairs, par.expert_tp)) if par.expert_tp > 1 else links
        return Exchange(copies.sum(axis=0), pairs, links, answered, sent)

    def _on_ranks(self, copies: np.ndarray, layer: int) -> np.ndarray:
        """[ep, copies] → [ep, ep]; every shard of an expert split by expert TP gets all of its tokens."""
        par, part = self.plan.parallelism, self.plan.placement.layers[layer]
        pairs = np.zeros((par.ep, par.ep))
        np.add.at(pairs.T, part.rank, copies.T)
        return np.repeat(pairs[:, :: par.expert_tp], par.expert_tp, axis=1) if par.expert_tp > 1 else pairs

    def _pair_links(self, ranks: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        scale = 1 << 20  # links count whole tokens; a fraction of one must not vanish
        source, target = np.nonzero(pairs)
        whole = np.rint(pairs[source, target] * scale).astype(np.int64)
        return pair_loads(self.topology, ranks[source], ranks[target], whole).tokens / scale

    def _shared_by_a_node(self, links: int) -> np.ndarray:
        """Copies of a token that are left when experts on one node share one across nodes, and experts on one GPU share
        one inside (evenly drawn choices): a factor for every link, float [links]. A gate that keeps to a token's best groups
        keeps to their share of the nodes, where experts are placed in order."""
        moe, par, cluster = self.plan.spec.model.moe, self.plan.parallelism, self.plan.spec.cluster
        assert moe is not None
        nodes = max(1.0, len(np.unique(cluster.node_of_rank[: par.ep])))
        reached = nodes * moe.top_groups / moe.groups if self._in_order else nodes
        factor = np.full(links, float(expected_targets(max(1.0, reached), moe.top_k)) / moe.top_k)
        factor[: self.topology.first["nic_up"]] = self.shared_on_a_gpu(nodes)
        return factor

    @cached_property
    def _in_order(self) -> bool:
        """Whether experts are where the policy `linear` places them, by which policy ever."""
        spec, placed = self.plan.spec, self.plan.placement.layers
        if spec.policy != "given":
            return spec.policy == "linear"
        linear = spec.placement.model_copy(update={"policy": "linear"})
        there = place_experts(spec.model_copy(update={"placement": linear}), self.plan.parallelism).layers
        return all(
            np.array_equal(part.expert, there[layer].expert) and np.array_equal(part.rank, there[layer].rank)
            for layer, part in placed.items()
        )

    def shared_on_a_gpu(self, nodes: float) -> float:
        """Share of the copies inside a node that are left when experts of a token on one GPU share one."""
        moe, par = self.plan.spec.model.moe, self.plan.parallelism
        assert moe is not None
        gpus, choices = max(1.0, par.ep / nodes), moe.top_k / nodes
        return min(1.0, float(expected_targets(gpus, choices)) / choices)

    def _known(self, layer: int, stage: int) -> Exchange:
        plan, par, traffic = self.plan, self.plan.parallelism, self.traffic
        moe = plan.spec.model.moe
        assert moe is not None and traffic is not None
        row = plan.spec.model.moe_layer_ids.index(layer)
        gating = self.gating
        tokens = step_tokens(plan.spec, par).source
        if traffic.tokens is None:
            load = traffic.loads[:, row].sum(axis=0)
            counts = np.zeros((par.ep, moe.experts))
            counts[gating] = tokens * moe.top_k * load / load.sum()
            return self._from_copies(layer, stage, self._served(layer, counts), float(tokens))
        topk = traffic.tokens.topk[:, row].astype(np.int64)
        source = traffic.tokens.on_sources(len(gating))
        scale = tokens * len(gating) / len(topk)
        if self.speed is not None:
            counts = np.zeros((par.ep, moe.experts))
            np.add.at(counts, (gating[source][:, None], topk), scale)
            return self._from_copies(layer, stage, self._served(layer, counts), float(tokens))
        chosen = _copy_of(plan.placement, layer, topk, source, len(gating))
        copies = np.zeros((par.ep, len(plan.placement.layers[layer].rank)))
        np.add.at(copies, (gating[source][:, None], chosen), scale)
        pairs = self._on_ranks(copies, layer)
        target = plan.placement.layers[layer].rank[chosen].astype(np.int64)
        way: Literal["direct", "dedup"] = "direct" if self.mode == "low_latency" else "dedup"

        def over(target: np.ndarray) -> np.ndarray:
            return np.stack(
                [
                    token_loads(self.topology, ranks[gating[source]], ranks[target], way).tokens * scale
                    for ranks in par.stage_ranks(stage).astype(np.int64)
                ]
            )

        links = over((target[:, :, None] + np.arange(par.expert_tp)).reshape(len(target), -1))
        answered = over(target) if par.expert_tp > 1 else links
        most = np.bincount(source, minlength=len(gating)).max() * scale
        return Exchange(copies.sum(axis=0), pairs, links, answered, float(most))


def first_shards(pairs: np.ndarray, expert_tp: int) -> np.ndarray:
    """The copies that go to the first shard of each expert, float [ep, ep]: its rank adds up and answers for all."""
    return np.asarray(pairs * (np.arange(len(pairs)) % expert_tp == 0))


def _copy_of(placement: Placement, layer: int, topk: np.ndarray, source: np.ndarray, sources: int) -> np.ndarray:
    """The copy that serves each choice: of an expert's c copies, in rank order, the ⌊s·c ÷ sources⌋-th serves source s."""
    part = placement.layers[layer]
    first = np.searchsorted(part.expert, np.arange(len(part.copies)))
    return np.asarray(first[topk] + source[:, None] * part.copies[topk] // sources)


def _dealt(part: LayerPlacement, counts: np.ndarray, gating: np.ndarray) -> np.ndarray:
    """Tokens from each rank to each copy: copies of an expert share the sources in rank order. ``counts``: float [ep, E]."""
    copies = counts[:, part.expert]
    for expert in np.flatnonzero(part.copies > 1).tolist():
        chosen = np.flatnonzero(part.expert == expert)
        even = share_counts(np.full(len(gating), len(chosen)), len(chosen)) / len(chosen)
        copies[np.ix_(gating, chosen)] = counts[gating, expert][:, None] * even
    return copies
