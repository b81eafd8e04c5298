"""Structure of the graph: names, ranks, ports, cycles, connectivity, communication marks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import KINDS, Expanded, PlanGraph
from planc.verify.kinds import SIGNATURES
from planc.verify.plan import Draft

FEW = 5  #: faults of one rule that are shown in full; a broken pattern would repeat one fault ten thousand times


def fault(code: str, message: str, block: str = "", hint: str = "", related: tuple[str, ...] = ()) -> Diagnostic:
    """A graph fault at a block."""
    return Diagnostic(code, message, f"graph.{block}" if block else "graph", hint=hint, related=related)


def check_blocks(draft: Draft) -> Iterator[Diagnostic]:
    """PLN308, PLN314, PLN317 on blocks: kinds, ports, ranks, names. Later checks rely on these."""
    graph, world = draft.blocks, draft.parallelism.world_size
    seen: set[str] = set()
    for block in graph.blocks:
        if block.name in seen:
            yield fault("PLN317", f"two blocks are named {block.name}", block.name)
        seen.add(block.name)
        if block.kind not in KINDS:
            yield fault("PLN314", f"{block.name}: `{block.kind}` is not a kind of op", block.name)
            continue
        yield from _check_ranks(block.name, block.ranks, world, block.collective)
        signature = SIGNATURES[block.kind]
        missing = sorted(signature.reads - block.reads.keys()) + sorted(signature.writes - block.writes.keys())
        extra = sorted(block.reads.keys() - signature.reads - signature.optional) + sorted(
            block.writes.keys() - signature.writes
        )
        if missing or extra:
            text = ", ".join([f"lacks {p}" for p in missing] + [f"has {p}" for p in extra])
            yield fault("PLN314", f"{block.name}: a {block.kind} op {text}", block.name)
        for what, array in (("rows", block.rows), ("experts", block.experts)):
            if array is not None and len(array) != len(block):
                message = f"{block.name}: {len(array)} {what} for {len(block)} ops"
                yield fault("PLN314", message, block.name)
        if block.kind == "expert" and block.experts is None:
            yield fault("PLN314", f"{block.name}: an expert op without an expert", block.name)
    for edge in graph.edges:
        source, target = graph.blocks[edge.source], graph.blocks[edge.target]
        for port, ports, block in ((edge.out, source.writes, source), (edge.into, target.reads, target)):
            if port not in ports:
                yield fault("PLN314", f"an edge names the port {port}, which {block.name} does not have", block.name)


def _check_ranks(name: str, ranks: np.ndarray, world: int, collective: bool) -> Iterator[Diagnostic]:
    if ranks.size == 0:
        yield fault("PLN308", f"{name} names no GPU", name)
        return
    outside = ranks[(ranks < 0) | (ranks >= world)]
    if len(outside):
        yield fault("PLN308", f"{name} names GPU {int(outside[0])}; the ranks are 0 to {world - 1}", name)
    if not collective and ranks.shape[1] != 1:
        yield fault("PLN308", f"{name} is a local op but names {ranks.shape[1]} GPUs", name)
    ordered = np.sort(ranks, axis=None)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        yield fault("PLN317", f"{name} names GPU {int(twice[0])} more than once", name)


def check_ports(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN314: every port of a local op is fed by exactly one edge; a collective by every rank that takes part.
    PLN317: no edge twice."""
    graph = draft.blocks
    fed: dict[tuple[int, str], np.ndarray] = {}
    for number, edge in enumerate(graph.edges):
        target = expanded.pairs(number)[1]
        count = np.bincount(target, minlength=len(graph.blocks[edge.target]))
        key = (edge.target, edge.into)
        fed[key] = fed[key] + count if key in fed else count
    for index, block in enumerate(graph.blocks):
        for port in block.reads:
            count = fed.get((index, port), np.zeros(len(block), dtype=np.int64))
            if block.kind in ("dispatch", "combine", "output_collect"):
                wrong = np.flatnonzero(count == 0)
                want = "at least one edge"
            else:
                need = block.ranks.shape[1] if block.kind in ("all_reduce", "reduce_scatter", "all_gather") else 1
                wrong = np.flatnonzero(count != need)
                want = f"{need} edge{'s' if need > 1 else ''}"
            for op in wrong[:FEW].tolist():
                message = f"{graph.op_id(index, op)} reads {port} from {int(count[op])} edges; its kind needs {want}"
                yield fault("PLN314", message, block.name)
    yield from _duplicate_edges(graph, expanded)


def _duplicate_edges(graph: PlanGraph, expanded: Expanded) -> Iterator[Diagnostic]:
    keys = np.sort(expanded.source * graph.op_count + expanded.target)  # sorting beats np.unique by far here
    for key in keys[1:][keys[1:] == keys[:-1]][:FEW].tolist():
        source, target = expanded.ids[key // graph.op_count], expanded.ids[key % graph.op_count]
        yield fault("PLN317", f"the edge {source} -> {target} exists more than once", source.rpartition(".r")[0])


def block_order(graph: PlanGraph) -> list[int] | None:
    """A topological order of the quotient graph of blocks, or None when it has a cycle (Kahn's algorithm).

    A cycle among ops projects to a cycle among blocks, so an order of the blocks proves the ops acyclic.
    """
    after: list[list[int]] = [[] for _ in graph.blocks]
    waiting = [0] * len(graph.blocks)
    for edge in graph.edges:
        after[edge.source].append(edge.target)
        waiting[edge.target] += 1
    ready = [i for i, n in enumerate(waiting) if n == 0]
    order = []
    while ready:
        block = ready.pop()
        order.append(block)
        for target in after[block]:
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    return order if len(order) == len(graph.blocks) else None


def ops_on_cycles(expanded: Expanded) -> np.ndarray:
    """Ops that Kahn's algorithm cannot order on the expanded arrays, level by level; empty for an acyclic graph."""
    count = expanded.graph.op_count
    order = np.argsort(expanded.source, kind="stable")
    targets = expanded.target[order]
    starts = np.searchsorted(expanded.source[order], np.arange(count + 1))
    waiting = np.bincount(expanded.target, minlength=count)
    ready = np.flatnonzero(waiting == 0)
    done = np.zeros(count, dtype=bool)
    while len(ready):
        done[ready] = True
        sizes = starts[ready + 1] - starts[ready]
        ends = np.cumsum(sizes)
        index = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[ready] - (ends - sizes), sizes)
        reached = np.sort(targets[index])
        first = np.flatnonzero(np.concatenate([[True], reached[1:] != reached[:-1]])) if len(reached) else reached
        nodes = reached[first]
        waiting[nodes] -= np.diff(np.concatenate([first, [len(reached)]]))
        ready = nodes[waiting[nodes] == 0]
    return np.flatnonzero(~done)


def check_cycles(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN302 for a cycle of ops; PLN301 when only the blocks form one. The two searches share nothing."""
    ordered = block_order(draft.blocks)
    stuck = ops_on_cycles(expanded)
    if len(stuck):
        cycle = _one_cycle(expanded, stuck)
        yield fault("PLN302", f"{len(cycle)} ops wait for each other: {' -> '.join(cycle[:6])} -> …", cycle[0].rpartition(".r")[0])
    elif ordered is None:
        yield fault("PLN301", "the op blocks wait for each other, though no single op does")


def _one_cycle(expanded: Expanded, stuck: np.ndarray) -> list[str]:
    import networkx as nx

    inside = np.zeros(expanded.graph.op_count, dtype=bool)
    inside[stuck] = True
    keep = inside[expanded.source] & inside[expanded.target]
    pairs = zip(expanded.source[keep].tolist(), expanded.target[keep].tolist(), strict=True)
    return [expanded.ids[source] for source, _ in nx.find_cycle(nx.DiGraph(list(pairs)))]


def check_connected(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN303: every op is reachable from the input op, and reaches output_collect."""
    graph = draft.blocks
    order = block_order(graph)
    ends = [i for i, b in enumerate(graph.blocks) if b.kind in ("input", "output_collect")]
    kinds = sorted(graph.blocks[i].kind for i in ends)
    if kinds != ["input", "output_collect"] or order is None:
        if order is not None:
            yield fault("PLN303", f"a step has one input and one output_collect; this one has {', '.join(kinds) or 'neither'}")
        return
    for forward, word in ((True, "is not reachable from the input"), (False, "does not reach the output")):
        reached = _reached(graph, expanded, order if forward else order[::-1], forward)
        lost = np.flatnonzero(~reached)
        for op in lost[:FEW].tolist():
            name = expanded.ids[op]
            yield fault("PLN303", f"{name} {word} ({len(lost)} such ops)", name.rpartition(".r")[0])


def _reached(graph: PlanGraph, expanded: Expanded, order: list[int], forward: bool) -> np.ndarray:
    """Ops reached by walking the edge blocks in the order of their blocks, bool [ops]."""
    reached = np.zeros(graph.op_count, dtype=bool)
    start = next(i for i, b in enumerate(graph.blocks) if b.kind == ("input" if forward else "output_collect"))
    reached[graph.first_op[start] : graph.first_op[start + 1]] = True
    leaving: list[list[int]] = [[] for _ in graph.blocks]
    for number, edge in enumerate(graph.edges):
        leaving[edge.source if forward else edge.target].append(number)
    ends = (expanded.source, expanded.target) if forward else (expanded.target, expanded.source)
    for block in order:
        for number in leaving[block]:
            part = slice(expanded.first_edge[number], expanded.first_edge[number + 1])
            here, there = ends[0][part], ends[1][part]
            reached[there[reached[here]]] = True
    return reached


def check_communication(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN309: an edge is marked as communication exactly when its ends do not run on the same ranks."""
    graph = draft.blocks
    for number, edge in enumerate(graph.edges):
        source, target = expanded.pairs(number)
        a, b = graph.blocks[edge.source].ranks[source], graph.blocks[edge.target].ranks[target]
        moves = np.ones(len(source), dtype=bool) if a.shape[1] != b.shape[1] else (a != b).any(axis=1)
        wrong = np.flatnonzero(moves != bool(edge.comm))
        if len(wrong):
            op = int(wrong[0])
            ends = f"{graph.op_id(edge.source, int(source[op]))} -> {graph.op_id(edge.target, int(target[op]))}"
            word = "is not marked as communication but its ranks differ" if moves[op] else "is marked as communication on one rank"
            yield fault("PLN309", f"{ends} {word} ({len(wrong)} such edges)", graph.blocks[edge.source].name)
