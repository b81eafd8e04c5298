"""Blind spots: small changes of every kind, all over a plan. The verifier must refuse each; which code is not the point.

`test_mutations.py` says what each fault is called. Here edges are redirected to every other op that writes the same type of
tensor, swapped, dropped and marked otherwise, and every number and type of every block is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from breaking import SPECS, good, with_tensor

from planc.graph import OpBlock, PlanGraph, expand
from planc.verify import Draft
from planc.verify.verify import faults

Change = tuple[str, PlanGraph]
STRIDE = 9  #: of the changes of a plan, every ninth is tried: all kinds of change come up on many ops


def edge_changed(graph: PlanGraph, number: int, **changes: Any) -> PlanGraph:
    edges = [replace(e, **changes) if i == number else e for i, e in enumerate(graph.edges)]
    return replace(graph, edges=tuple(edges))


def block_changed(graph: PlanGraph, number: int, **changes: Any) -> PlanGraph:
    blocks = [replace(b, **changes) if i == number else b for i, b in enumerate(graph.blocks)]
    return replace(graph, blocks=tuple(blocks))


def edge_changes(graph: PlanGraph) -> Iterator[Change]:
    """Edges from elsewhere, swapped, dropped, and marked otherwise."""
    expanded = expand(graph)
    for number, edge in enumerate(graph.edges):
        source, target = graph.blocks[edge.source], graph.blocks[edge.target]
        label = f"{source.name}.{edge.out} -> {target.name}.{edge.into}"
        for index, block in enumerate(graph.blocks):
            for port, tensor in block.writes.items():
                alike = tensor == edge.tensor and block.ranks.shape == source.ranks.shape
                if alike and (index, port) != (edge.source, edge.out):
                    yield f"{label} from {block.name}.{port}", edge_changed(graph, number, source=index, out=port)
        pairs = np.stack(expanded.pairs(number), axis=1)
        if len(pairs) > 1:
            yield f"{label} one dropped", edge_changed(graph, number, pattern="pairs", pairs=pairs[1:])
        for other in sorted({1, len(pairs) // 2, len(pairs) - 1} - {0, len(pairs)}):
            swap = pairs.copy()
            swap[[0, other], 1] = pairs[[other, 0], 1]
            if {tuple(p) for p in swap.tolist()} != {tuple(p) for p in pairs.tolist()}:
                yield f"{label} 0 and {other} swapped", edge_changed(graph, number, pattern="pairs", pairs=swap)
        for comm in sorted({"", "tp", "dp", "pp", "dispatch", "combine"} - {edge.comm}):
            yield f"{label} marked {comm!r}", edge_changed(graph, number, comm=comm)


def number_changes(graph: PlanGraph, number: int, block: OpBlock, experts: int) -> Iterator[Change]:
    """Places, turns, shard degrees, kinds, ranks, tokens and experts of a block."""
    for key in ("layer", "micro_batch", "slot", "split"):
        value = getattr(block, key)
        for other in sorted({(value or 0) + 1, None if key == "layer" else 0} - {value}, key=str):
            yield f"{block.name} {key} {other}", block_changed(graph, number, **{key: other})
    for kind in sorted({"gate", "all_reduce", "broadcast", "expert", "dispatch", "attn_core"} - {block.kind}):
        yield f"{block.name} as {kind}", block_changed(graph, number, kind=kind)
    if len(block) > 1:
        yield f"{block.name} ranks in turn", block_changed(graph, number, ranks=np.roll(block.ranks, 1, axis=0))
        rest = {key: None if getattr(block, key) is None else getattr(block, key)[1:] for key in ("rows", "experts")}
        yield f"{block.name} without its first op", block_changed(graph, number, ranks=block.ranks[1:], **rest)
    if block.rows is None:
        yield f"{block.name} with rows", block_changed(graph, number, rows=np.ones(len(block), dtype=np.int64))
    else:
        yield f"{block.name} without rows", block_changed(graph, number, rows=None)
        yield f"{block.name} one row less", block_changed(graph, number, rows=block.rows - (np.arange(len(block)) == 0))
    if block.experts is None:
        yield f"{block.name} with experts", block_changed(graph, number, experts=np.zeros(len(block), dtype=np.int32))
    else:
        others = np.where(np.arange(len(block)) == 0, (block.experts + 1) % experts, block.experts)
        yield f"{block.name} another expert", block_changed(graph, number, experts=others)


def type_changes(draft: Draft, block: OpBlock) -> Iterator[Change]:
    """Other dtypes, layouts and shapes of what a block writes, alone and with all that carries it."""
    for port, tensor in block.writes.items():
        changes: list[dict[str, Any]] = [
            {"dtype": "bf16" if tensor.dtype == "fp32" else "fp32"},
            {"layout": "S(tokens)" if tensor.layout == "R" else "R"},
            {"shape": (*tensor.shape[:-1], tensor.shape[-1] * 2 + 1)},
        ]
        for change in changes:
            for everywhere in (False, True):
                changed = with_tensor(draft, block.name, port, everywhere=everywhere, **change)
                yield f"{block.name}.{port} {change} everywhere: {everywhere}", changed.blocks


def all_changes(draft: Draft) -> Iterator[Change]:
    moe = draft.spec.model.moe
    yield from edge_changes(draft.blocks)
    for number, block in enumerate(draft.blocks.blocks):
        yield from number_changes(draft.blocks, number, block, moe.experts if moe else 1)
        yield from type_changes(draft, block)


@pytest.mark.parametrize("name", SPECS)
def test_no_change_goes_unseen(name: str) -> None:
    draft = good(name)
    tried = list(islice(all_changes(draft), None, None, STRIDE))
    assert len(tried) > 40
    assert [what for what, graph in tried if not faults(replace(draft, blocks=graph))[0]] == []
