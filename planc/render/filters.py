"""Which part of a plan a figure shows: by layer, node and replica."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planc.graph.types import range_text
from planc.verify import VerifiedPlan


class Filter(NamedTuple):
    """Layers, nodes and replicas to keep; None keeps all of them.

    A rank is kept if its node and its replica are, an op if its layer and one of its ranks are, an edge if both its
    ends are. Ops outside the layers (input, embed, lm_head, …) go as soon as layers are chosen.
    """

    layers: frozenset[int] | None = None
    nodes: frozenset[int] | None = None
    replicas: frozenset[int] | None = None

    def keeps_layer(self, layer: int | None) -> bool:
        """Whether ops of ``layer`` (None: outside the layers) are kept."""
        return self.layers is None or layer in self.layers

    def ranks(self, plan: VerifiedPlan) -> np.ndarray:
        """Whether each rank is kept, bool [world_size]."""
        world = plan.parallelism.world_size
        kept = np.ones(world, dtype=bool)
        if self.nodes is not None:
            kept &= np.isin(plan.spec.cluster.node_of_rank[:world], sorted(self.nodes))
        if self.replicas is not None:
            kept &= np.isin(np.arange(world) // plan.parallelism.replica_size, sorted(self.replicas))
        return kept

    def ops(self, plan: VerifiedPlan) -> np.ndarray:
        """Whether each op is kept, bool [ops], numbered as in ``plan.expanded``."""
        ranks = self.ranks(plan)
        parts = [
            ranks[block.ranks].any(axis=1) if self.keeps_layer(block.layer) else np.zeros(len(block), dtype=bool)
            for block in plan.blocks.blocks
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def outside(self, plan: VerifiedPlan) -> list[str]:
        """What is asked for and not in the plan, in words; empty for a filter that fits the plan."""
        par = plan.parallelism
        nodes = int(plan.spec.cluster.node_of_rank[par.world_size - 1]) + 1
        limits = (
            ("layer", self.layers, plan.spec.model.layers),
            ("node", self.nodes, nodes),
            ("replica", self.replicas, par.dp),
        )
        found = []
        for what, asked, count in limits:
            extra = sorted(n for n in asked or () if not 0 <= n < count)
            if extra:
                shown = ", ".join(map(str, extra))
                found.append(f"no {what} {shown}: the plan has {what}s {range_text(list(range(count)))}")
        return found

    def text(self) -> str:
        """What is kept, in words: ``layers 3-5 · node 0``; empty where everything is."""
        parts = []
        for what, asked in (("layer", self.layers), ("node", self.nodes), ("replica", self.replicas)):
            if asked is not None:
                plural = "" if len(asked) == 1 else "s"
                parts.append(f"{what}{plural} {range_text(sorted(asked))}")
        return " · ".join(parts)
