"""What collectives move: a rank-by-rank byte matrix for each, and the volume that crosses each link class."""

from __future__ import annotations

import numpy as np

from planc.graph.types import ROWS, OpBlock, PlanGraph
from planc.placement import Parallelism, Placement, step_tokens
from planc.routing import balanced_counts, share_counts
from planc.spec import LINK_CLASSES, Cluster, Spec
from planc.spec.fields import DTYPE_BYTES
from planc.units import split_evenly


def copy_matrix(spec: Spec, par: Parallelism, placement: Placement, layer: int) -> np.ndarray:
    """Tokens that each rank of an EP group sends to each copy of the layer's experts, int64 [ep, copies] in
    `LayerPlacement` order."""
    moe = spec.model.moe
    assert moe is not None
    tokens = np.full(par.ep, step_tokens(spec, par).source)
    if par.leaders_gate:
        tokens[np.arange(par.ep) % par.tp != 0] = 0
    counts = balanced_counts(tokens, moe.top_k, moe.experts)
    part = placement.layers[layer]
    matrix = counts[:, part.expert]
    for expert in np.flatnonzero(part.copies > 1).tolist():
        chosen = np.flatnonzero(part.expert == expert)
        matrix[:, chosen] = share_counts(counts[:, expert], len(chosen))
    return matrix


def token_matrix(spec: Spec, par: Parallelism, placement: Placement, layer: int) -> np.ndarray:
    """Tokens that each rank of an EP group sends to each rank in the layer's dispatch, int64 [ep, ep].

    Every shard of an expert split by expert TP receives all of the expert's tokens.
    """
    matrix = np.zeros((par.ep, par.ep), dtype=np.int64)
    np.add.at(matrix.T, placement.layers[layer].rank, copy_matrix(spec, par, placement, layer).T)
    width = par.expert_tp
    return np.repeat(matrix[:, ::width], width, axis=1) if width > 1 else matrix


def byte_matrix(spec: Spec, par: Parallelism, placement: Placement, block: OpBlock, op: int = 0) -> np.ndarray:
    """Bytes that each rank of a collective's group sends to each other rank, int64 [group, group].

    Dispatch and combine follow the tokens of `token_matrix`; with expert TP only the first shard of an expert sends
    its sum back. The others are taken as direct exchanges: reduce-scatter sends every rank its chunk, all-gather
    sends one's own chunk to everybody, all-reduce is both, broadcast and input_split send from the first rank.
    """
    group = block.ranks.shape[1]
    if block.kind in ("dispatch", "combine"):
        assert block.layer is not None
        tokens = token_matrix(spec, par, placement, block.layer)
        tensor = block.writes["tokens"] if block.kind == "dispatch" else block.reads["y"]
        if block.kind == "combine":
            tokens = tokens.T.copy()
            tokens[np.arange(par.ep) % par.expert_tp != 0] = 0
        return tokens * tensor.row_bytes
    matrix = np.zeros((group, group), dtype=np.int64)
    if block.kind in ("broadcast", "input_split"):
        times = spec.workload.micro_batches if block.kind == "input_split" else 1  # one scatter for all micro-batches
        matrix[0] = block.writes["x"].row_bytes * times
    else:
        read = next(iter(block.reads.values()))
        rows = block.row_count(op)
        size = DTYPE_BYTES[read.dtype]
        elements = read.row_bytes // size * (rows if ROWS in read.shape and rows is not None else 1)
        if block.kind == "all_gather":
            matrix += elements * size  # what a rank reads is its own chunk
        else:
            chunks = np.array(split_evenly(elements, group), dtype=np.int64) * size
            matrix += chunks[None, :]
            if block.kind == "all_reduce":
                matrix += chunks[:, None]
    np.fill_diagonal(matrix, 0)
    return matrix


def link_classes(cluster: Cluster, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Index into `LINK_CLASSES` of the farthest class that data from ``source`` to ``target`` ranks crosses."""
    domain, leaf = cluster.domain_of_rank, cluster.leaf_of_rank
    result = np.where(domain[source] == domain[target], 1, np.where(leaf[source] == leaf[target], 2, 3))
    return np.where(source == target, 0, result)


def volumes(spec: Spec, par: Parallelism, placement: Placement, graph: PlanGraph) -> dict[str, dict[str, int]]:
    """Bytes of one step by communication class (tp, dispatch, combine, pp, dp) and link class, over all ranks."""
    total: dict[str, np.ndarray] = {}
    seen: dict[tuple[object, ...], np.ndarray] = {}
    for block in graph.blocks:
        if not block.collective:
            continue
        comm = {"dispatch": "dispatch", "combine": "combine", "input_split": "dp"}.get(block.kind, "tp")
        tensor = next(iter(block.writes.values())), next(iter(block.reads.values()))
        places = (
            id(placement.layers.get(block.layer)) if block.layer is not None and comm in ("dispatch", "combine") else 0
        )
        rows = block.rows.tobytes() if block.rows is not None else b""
        key = (block.kind, places, block.ranks.shape, int(block.ranks[0, 0]), tensor, rows)
        if key not in seen:
            seen[key] = _collective_volume(spec, par, placement, block)
        total[comm] = total.get(comm, np.zeros(len(LINK_CLASSES), dtype=np.int64)) + seen[key]
    for comm, part in _edge_volumes(spec, graph):
        total[comm] = total.get(comm, np.zeros(len(LINK_CLASSES), dtype=np.int64)) + part
    return {comm: dict(zip(LINK_CLASSES, total[comm].tolist(), strict=True)) for comm in sorted(total)}


def _collective_volume(spec: Spec, par: Parallelism, placement: Placement, block: OpBlock) -> np.ndarray:
    """Bytes per link class of all ops of a block."""
    found = np.zeros(len(LINK_CLASSES), dtype=np.int64)
    matrix = byte_matrix(spec, par, placement, block)
    for op, ranks in enumerate(block.ranks):
        if op and block.rows is not None:
            matrix = byte_matrix(spec, par, placement, block, op)
        classes = link_classes(spec.cluster, ranks[:, None], ranks[None, :])
        for number in range(len(LINK_CLASSES)):
            found[number] += int(matrix[classes == number].sum())
    return found


def _edge_volumes(spec: Spec, graph: PlanGraph) -> list[tuple[str, np.ndarray]]:
    """Point-to-point communication: edges between local ops, into input_split, and into output_collect."""
    from planc.graph.expand import expand, tensor_bytes

    chosen = [
        i for i, e in enumerate(graph.edges) if e.comm in ("pp", "dp") and graph.blocks[e.source].kind != "input_split"
    ]
    part = PlanGraph(graph.blocks, tuple(graph.edges[i] for i in chosen), graph.world_size)
    expanded = expand(part)
    result: list[tuple[str, np.ndarray]] = []
    for number, edge in enumerate(part.edges):
        source, target = expanded.pairs(number)
        ranks = graph.blocks[edge.source].ranks[source, 0], graph.blocks[edge.target].ranks[target, 0]
        size = tensor_bytes(part, number, source, target)
        sums = np.bincount(link_classes(spec.cluster, *ranks), weights=size, minlength=len(LINK_CLASSES))
        result.append((edge.comm, sums.astype(np.int64)))
    return result
