"""Structure of the graph: names, ranks, ports, cycles, connectivity."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import KINDS, ROWS, EdgeBlock, Expanded, OpBlock, PlanGraph
from planc.verify.kinds import SIGNATURES
from planc.verify.plan import Draft

OUTSIDE_LAYERS = frozenset(
    {"input", "input_split", "embed", "pp_send", "pp_recv", "lm_head", "sample", "output_collect"}
)
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
        yield from _check_numbers(block)
        yield from _check_place(draft, block)
    for edge in graph.edges:
        if not (0 <= edge.source < len(graph.blocks) and 0 <= edge.target < len(graph.blocks)):
            yield fault("PLN314", f"an edge joins the blocks {edge.source} and {edge.target} of {len(graph.blocks)}")
            continue
        source, target = graph.blocks[edge.source], graph.blocks[edge.target]
        if not _pattern_is_sound(edge, len(source), len(target)):
            yield fault(
                "PLN314", f"{source.name} -> {target.name}: no pattern of edges is `{edge.pattern[:40]}`", source.name
            )
        for port, ports, block in ((edge.out, source.writes, source), (edge.into, target.reads, target)):
            if port not in ports:
                yield fault("PLN314", f"an edge names the port {port}, which {block.name} does not have", block.name)


def _check_numbers(block: OpBlock) -> Iterator[Diagnostic]:
    """Experts have experts and turns, they and the sums of their shards have row counts, and no other op has any."""
    open_rows = any(ROWS in t.shape for t in (*block.reads.values(), *block.writes.values()))
    routed = block.kind == "expert" or (block.kind == "all_reduce" and open_rows)
    for what, given, wanted in (
        ("experts", block.experts is not None, block.kind == "expert"),
        ("row counts", block.rows is not None, routed),
        ("a turn", block.slot != 0, block.slot != 0 and routed),
    ):
        if given != wanted:
            yield fault("PLN314", f"{block.name}: a {block.kind} op {'lacks' if wanted else 'has'} {what}", block.name)
    if block.split < 1:
        yield fault("PLN314", f"{block.name} is split {block.split} ways", block.name)


def _check_place(draft: Draft, block: OpBlock) -> Iterator[Diagnostic]:
    """A block is in a layer of the model exactly when its kind is, and in a micro-batch of the step."""
    free = block.kind == "all_gather"  # of logits, or of a layer's tokens
    if (block.layer is None) != (block.kind in OUTSIDE_LAYERS) and not (free and block.layer is None):
        yield fault(
            "PLN314",
            f"{block.name}: a {block.kind} op is {'in' if block.layer is None else 'outside'} the layers",
            block.name,
        )
    elif block.layer is not None and not 0 <= block.layer < draft.spec.model.layers:
        yield fault("PLN314", f"{block.name} is in layer {block.layer}, which the model does not have", block.name)
    last = 0 if block.kind in ("input", "input_split", "output_collect") else draft.spec.workload.micro_batches - 1
    if not 0 <= block.micro_batch <= last:
        yield fault("PLN314", f"{block.name} is in micro-batch {block.micro_batch}, which it cannot be", block.name)


def _pattern_is_sound(edge: EdgeBlock, sources: int, targets: int) -> bool:
    if edge.pairs is not None:
        inside = (edge.pairs >= 0) & (edge.pairs < np.array([sources, targets]))
        return edge.pattern == "pairs" and bool(inside.all())
    return re.fullmatch(r"rank|group:[1-9]\d{0,6}|shift:-?\d{1,7}", edge.pattern) is not None


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
    PLN317: no edge twice; while there is one, edges are not counted."""
    graph = draft.blocks
    twice = list(_duplicate_edges(graph, expanded))
    if twice:
        yield from twice
        return
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
        yield fault(
            "PLN302",
            f"{len(cycle)} ops wait for each other: {' -> '.join(cycle[:6])} -> …",
            cycle[0].rpartition(".r")[0],
        )
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
            yield fault(
                "PLN303", f"a step has one input and one output_collect; this one has {', '.join(kinds) or 'neither'}"
            )
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
