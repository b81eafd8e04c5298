"""What the detailed figure is drawn from: the copies of one layer's experts, with place, turn, tokens and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from planc.graph import OpBlock
from planc.placement import copy_tokens
from planc.render.text import numbers_text
from planc.verify import VerifiedPlan

COLUMNS = 8  #: experts in a row


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of an expert: world ranks, node, turn, tokens, bytes in and out."""

    id: str
    name: str
    expert: int
    ranks: tuple[int, ...]
    node: int
    slot: int
    tokens: int
    into: int
    out: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What the figure draws."""

    plan: VerifiedPlan
    layer: int
    replica: int
    prefix: str
    copies: list[Copy]

    def block(self, name: str) -> OpBlock:
        """A block of the layer by the end of its name."""
        return self.plan.blocks.blocks[self.plan.blocks.by_name[self.prefix + name]]

    def ops(self, block: OpBlock) -> list[int]:
        """Numbers of the block's ops that run in the replica."""
        size = self.plan.parallelism.replica_size
        return np.flatnonzero(block.ranks[:, 0] // size == self.replica).tolist()

    def op_id(self, block: OpBlock, op: int) -> str:
        """The op's id in the graph."""
        return self.plan.blocks.op_id(self.plan.blocks.by_name[block.name], op)


def collect(plan: VerifiedPlan, layer: int, replica: int) -> Layer:
    """The copies of a layer in a replica, by node, turn and rank."""
    par, part = plan.parallelism, plan.placement.layers[layer]
    prefix = f"m0.L{layer}." if plan.spec.workload.micro_batches > 1 else f"L{layer}."
    first = int(par.stage_ranks(par.stage_of_layer(layer))[replica, 0])
    tokens = copy_tokens(plan.spec, par, plan.placement, layer)
    rows = plan.blocks.blocks[plan.blocks.by_name[f"{prefix}dispatch"]].writes["tokens"].row_bytes
    back = plan.blocks.blocks[plan.blocks.by_name[f"{prefix}combine"]].reads["y"].row_bytes
    copies, turn = [], [0] * len(part.copies)
    for i, (expert, rank, slot) in enumerate(
        zip(part.expert.tolist(), part.rank.tolist(), part.slot.tolist(), strict=True)
    ):
        ranks = tuple(range(first + rank, first + rank + par.expert_tp))
        turn[expert] += 1
        name = f"E{expert}" + (f" {turn[expert]}/{part.copies[expert]}" if part.copies[expert] > 1 else "")
        block = "expert" if part.rounds == 1 else f"expert.s{slot}"
        where = numbers_text(ranks).replace("–", "-")
        count = int(tokens[i])
        node_of = int(plan.spec.cluster.node_of_rank[ranks[0]])
        copies.append(
            Copy(f"{prefix}{block}.r{where}", name, expert, ranks, node_of, slot, count, count * rows, count * back)
        )
    copies.sort(key=lambda c: (c.node, c.slot, c.ranks))
    return Layer(plan, layer, replica, prefix, copies)


def packed(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Rows: one node and turn each; nodes with few experts share a row."""
    rows: list[list[Copy]] = []
    for _, group in groupby(copies, key=lambda c: (c.node, c.slot)):
        members = list(group)
        chunks = [members[i : i + COLUMNS] for i in range(0, len(members), COLUMNS)]
        same_turn = rows and rows[-1][0].slot == members[0].slot
        if same_turn and len(members) <= COLUMNS // 2 and len(rows[-1]) + len(members) <= COLUMNS:
            rows[-1] += members
        else:
            rows += chunks
    return rows
