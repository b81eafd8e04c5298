"""Which parts of a plan are the same, proven block by block, so that a figure may draw one of them and write ×N.

Nothing is folded because it ought to be alike. Layers are compared on every array and tensor of their blocks and of
the edges between them; lanes (replicas, nodes, TP groups: aligned runs of ranks) on every op that runs inside them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from planc.graph import EdgeBlock, OpBlock, PlanGraph
from planc.verify import VerifiedPlan


def fold_layers(plan: VerifiedPlan) -> list[tuple[int, int, int]]:
    """Runs of layers of micro-batch 0 that are alike as (first, last, count), in layer order.

    Layers of a run have equal blocks and inner edges, and every hand-over from one to the next is the same; only which
    expert sits on which of the same ranks may differ (`placed_alike` tells). A run ends with its pipeline stage, because
    the next stage runs on other ranks.
    """
    graph = plan.blocks
    blocks = _blocks_of_layers(graph)
    inner, entries = _edges_of_layers(graph, blocks)
    runs: list[list[int]] = []
    for layer in range(plan.spec.model.layers):
        before = layer - 1
        if runs and inner[before] == inner[layer] and _alike_but_for_places(plan, blocks[before], blocks[layer]):
            from_before = {origin for _, origin, *_ in entries[layer]} == {before}
            if from_before and (len(runs[-1]) == 1 or _moved(entries[before]) == _moved(entries[layer])):
                runs[-1].append(layer)
                continue
        runs.append([layer])
    return [(run[0], run[-1], len(run)) for run in runs]


def placed_alike(plan: VerifiedPlan, first: int, last: int) -> bool:
    """Whether the layers of a run are equal in every block of micro-batch 0: in which expert is on which rank, too."""
    blocks = _blocks_of_layers(plan.blocks)
    return all(_same_blocks(plan.blocks, blocks[first], blocks[i]) for i in range(first + 1, last + 1))


def _blocks_of_layers(graph: PlanGraph) -> dict[int, list[int]]:
    """Layer -> its blocks in micro-batch 0."""
    found: dict[int, list[int]] = {}
    for i, block in enumerate(graph.blocks):
        if block.layer is not None and block.micro_batch == 0:
            found.setdefault(block.layer, []).append(i)
    return found


_Entry = tuple[int, int | None, int, tuple[object, ...]]


def _edges_of_layers(
    graph: PlanGraph, blocks: dict[int, list[int]]
) -> tuple[dict[int, list[tuple[object, ...]]], dict[int, list[_Entry]]]:
    """Per layer, with blocks counted from the layer's first: edges inside it, and edges that enter it as
    (target, layer of the source, source, what)."""
    place = {b: (layer, n) for layer, members in blocks.items() for n, b in enumerate(members)}
    inner: dict[int, list[tuple[object, ...]]] = {layer: [] for layer in blocks}
    entries: dict[int, list[_Entry]] = {layer: [] for layer in blocks}
    for edge in graph.edges:
        if edge.target not in place:
            continue
        layer, target = place[edge.target]
        origin, source = place.get(edge.source, (None, edge.source))
        if origin == layer:
            inner[layer].append((source, target, *_carried(edge)))
        else:
            entries[layer].append((target, origin, source, _carried(edge)))
    return inner, entries


def _carried(edge: EdgeBlock) -> tuple[object, ...]:
    pairs = None if edge.pairs is None else edge.pairs.tobytes()
    return edge.out, edge.into, edge.tensor, edge.pattern, edge.comm, pairs


def _moved(entries: list[_Entry]) -> list[tuple[object, ...]]:
    return [(target, source, what) for target, _, source, what in entries]


def _same_blocks(graph: PlanGraph, a: list[int], b: list[int]) -> bool:
    """Equal block by block, every array included."""
    return len(a) == len(b) and all(_same_block(graph.blocks[i], graph.blocks[j]) for i, j in zip(a, b, strict=True))


def _alike_but_for_places(plan: VerifiedPlan, a: list[int], b: list[int]) -> bool:
    """Whether two layers are equal, or differ only in which of the same copies is on which of the same ranks and turns."""
    if len(a) != len(b):
        return False
    first, second = ([plan.blocks.blocks[i] for i in members] for members in (a, b))
    unequal = [(x, y) for x, y in zip(first, second, strict=True) if not _same_block(x, y)]
    if not all(_same_block(x, replace(y, rows=x.rows, experts=x.experts)) for x, y in unequal):
        return False
    copies = _copies(plan, first) if unequal else None
    return not unequal or (copies is not None and _same_array(copies, _copies(plan, second)))


def _copies(plan: VerifiedPlan, layer: list[OpBlock]) -> np.ndarray | None:
    """Copies of a layer's experts wherever they are: (replica, expert, tokens), sorted, int64 [copies, 3].

    None where the blocks do not say it: a block with rows that is not of experts, shards of one copy that disagree, or
    a sum of shards over other ranks, or of other rows, than the shards have.
    """
    found: dict[int, np.ndarray] = {}
    for block in layer:
        if block.rows is None and block.experts is None:
            continue
        if block.kind == "expert" and block.rows is not None and block.experts is not None:
            facts = np.stack([block.ranks[:, 0], block.experts, block.rows], axis=1).astype(np.int64)
            if len(facts) % block.split:
                return None
            shards = facts.reshape(-1, block.split, 3)
            if (shards[:, :, 1:] != shards[:, :1, 1:]).any():
                return None
            found[block.slot] = shards
        elif block.kind == "all_reduce" and block.slot in found:
            shards = found[block.slot]
            if not _same_array(block.ranks, shards[:, :, 0]) or not _same_array(block.rows, shards[:, 0, 2]):
                return None
        else:
            return None
    if not found:
        return None
    copies = np.concatenate([shards[:, 0] for shards in found.values()])
    copies[:, 0] //= plan.parallelism.replica_size
    return np.asarray(copies[np.lexsort(copies.T[::-1])])


def _same_block(a: OpBlock, b: OpBlock) -> bool:
    """Equal in everything but the layer and micro-batch, which are part of the name."""
    scalars = a.kind == b.kind and a.slot == b.slot and a.split == b.split and _stem(a) == _stem(b)
    tensors = dict(a.reads) == dict(b.reads) and dict(a.writes) == dict(b.writes)
    return (
        scalars
        and tensors
        and all(_same_array(x, y) for x, y in ((a.ranks, b.ranks), (a.rows, b.rows), (a.experts, b.experts)))
    )


def _stem(block: OpBlock) -> str:
    """The block's name without its micro-batch and layer: ``m0.L3.expert.s1`` -> ``expert.s1``."""
    name = block.name.removeprefix(f"m{block.micro_batch}.")
    return name if block.layer is None else name.removeprefix(f"L{block.layer}.")


def _same_array(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or np.array_equal(a, b)


def micro_batches_alike(plan: VerifiedPlan) -> bool:
    """Whether every micro-batch has the blocks, and the edges between them, of the first."""
    graph, count = plan.blocks, plan.spec.workload.micro_batches
    groups: list[list[int]] = [[] for _ in range(count)]
    for i, block in enumerate(graph.blocks):
        if block.name.startswith(f"m{block.micro_batch}."):
            groups[block.micro_batch].append(i)
    inner: list[list[tuple[object, ...]]] = [[] for _ in range(count)]
    place = {b: (mb, n) for mb, members in enumerate(groups) for n, b in enumerate(members)}
    for edge in graph.edges:
        source, target = place.get(edge.source), place.get(edge.target)
        if source is not None and target is not None:
            inner[target[0]].append((source[0] - target[0], source[1], target[1], *_carried(edge)))
    return all(_same_blocks(graph, groups[0], g) and inner[0] == e for g, e in zip(groups, inner, strict=True))


def fold_replicas(plan: VerifiedPlan) -> list[tuple[int, int, int]]:
    """Runs of identical replicas as (first, last, count): the same ops, experts and rows with their ranks shifted by
    the replica size, on like GPUs that fall into nodes and NVLink domains alike."""
    size = plan.parallelism.replica_size
    classes = lane_classes(plan, size, experts=True)
    runs: list[list[int]] = []
    for replica, kind in enumerate(classes.tolist()):
        if runs and classes[runs[-1][0]] == kind:
            runs[-1].append(replica)
        else:
            runs.append([replica])
    return [(run[0], run[-1], len(run)) for run in runs]


def lane_classes(plan: VerifiedPlan, width: int, *, experts: bool = False) -> np.ndarray:
    """Class of every aligned run of ``width`` ranks, int64 [world / width]; equal classes are proven alike.

    Alike: the same ops on the same places of the run with the same row counts (and, with ``experts``, the same
    expert ids), in collectives that lie inside the run or span whole runs, on like GPUs with like node borders.
    The edge patterns do not look at absolute ranks, so like ops have like edges; the ends of the step (`input`,
    `output_collect`) stand outside. Edges listed pair by pair give no such promise, and every lane is then its own.
    """
    lanes = plan.blocks.world_size // width
    if any(edge.pairs is not None for edge in plan.blocks.edges):
        return np.arange(lanes)
    classes = _topology_classes(plan, width)
    seen: set[tuple[Any, ...]] = set()
    for block in plan.blocks.blocks:
        if block.kind in ("input", "output_collect"):
            continue
        ids = block.experts if experts else None
        arrays = (block.ranks, block.rows, ids)
        key = (block.collective, *(id(a) for a in arrays))
        if key not in seen:
            seen.add(key)
            classes = _refined(classes, _lane_rows(block, ids, width, lanes))
    return classes


def _topology_classes(plan: VerifiedPlan, width: int) -> np.ndarray:
    cluster, world = plan.spec.cluster, plan.blocks.world_size
    classes = np.zeros(world // width, dtype=np.int64)
    for numbers in (cluster.node_of_rank, cluster.domain_of_rank):
        rows = numbers[:world].reshape(-1, width)
        classes = _refined(classes, rows - rows[:, :1])
    return _refined(classes, cluster.group_of_rank[:world].reshape(-1, width))


def _lane_rows(block: OpBlock, experts: np.ndarray | None, width: int, lanes: int) -> np.ndarray:
    """What a lane does in one block, a row per lane: place in the lane -> group size, rows, expert; -1 is nothing."""
    group = block.ranks.shape[1]
    table = np.full((lanes, width, 3), -1, dtype=np.int64)
    lane, place = np.divmod(block.ranks, width)
    inside = group <= width and bool((lane == lane[:, :1]).all())
    table[lane, place, 0] = (block.ranks - block.ranks[:, :1]) if inside else width
    if block.rows is not None:
        table[lane, place, 1] = block.rows[:, None]
    if experts is not None:
        table[lane, place, 2] = experts[:, None]
    return table.reshape(lanes, -1)


def _refined(classes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Split classes further, so that lanes stay together only where their ``rows`` are equal."""
    number: dict[tuple[int, bytes], int] = {}
    keys = zip(classes.tolist(), np.ascontiguousarray(rows), strict=True)
    return np.array([number.setdefault((c, row.tobytes()), len(number)) for c, row in keys], dtype=np.int64)
