"""Tensors along the edges: shapes, dtypes, layouts, partial sums, and the size rules of every kind of op."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import Expanded, OpBlock, PlanGraph, TensorType, shape_text
from planc.placement import Parallelism, step_tokens
from planc.spec import Model
from planc.verify.kinds import relations
from planc.verify.plan import Draft
from planc.verify.structure import FEW, fault

_REDUCERS = ("all_reduce", "reduce_scatter")


def check_edges(draft: Draft) -> Iterator[Diagnostic]:
    """PLN304, PLN305, PLN306: an edge carries what its source writes and its target reads.

    One conversion is free: a replicated tensor may be read as this rank's shard of its tokens.
    """
    graph, tp = draft.blocks, draft.parallelism.tp
    for edge in graph.edges:
        source, target = graph.blocks[edge.source], graph.blocks[edge.target]
        ends = f"{source.name} -> {target.name}"
        wrote, read = source.writes[edge.out], target.reads[edge.into]
        sliced = _is_slice(wrote, edge.tensor, tp)
        for who, tensor in (("writes", edge.tensor if sliced else wrote), ("reads", read)):
            if tensor.shape != edge.tensor.shape:
                message = f"{ends}: the edge carries {shape_text(edge.tensor.shape)}, its end {who} {shape_text(tensor.shape)}"
                yield fault("PLN304", message, source.name)
            if tensor.dtype != edge.tensor.dtype:
                message = f"{ends}: the edge carries {edge.tensor.dtype}, its end {who} {tensor.dtype}"
                yield fault("PLN305", message, source.name)
            if tensor.layout != edge.tensor.layout:
                message = f"{ends}: the edge carries layout {edge.tensor.layout}, its end {who} {tensor.layout}"
                yield fault("PLN306", message, source.name)


def _is_slice(wrote: TensorType, carried: TensorType, tp: int) -> bool:
    if wrote.layout != "R" or carried.layout != "S(tokens)" or tp == 1:
        return False
    return wrote.dtype == carried.dtype and wrote.shape == (carried.shape[0] * tp, *carried.shape[1:])


def check_rows(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN304: where both ends of an edge have row counts of their own, they are the same."""
    graph = draft.blocks
    for number, edge in enumerate(graph.edges):
        a, b = graph.blocks[edge.source].rows, graph.blocks[edge.target].rows
        if a is None or b is None or edge.tensor.shape == (0,):
            continue
        source, target = expanded.pairs(number)
        for op in np.flatnonzero(a[source] != b[target])[:FEW].tolist():
            left, right = int(source[op]), int(target[op])
            message = f"{graph.op_id(edge.source, left)} writes {int(a[left])} rows, {graph.op_id(edge.target, right)} reads {int(b[right])}"
            yield fault("PLN304", message, graph.blocks[edge.source].name)


def check_sizes(draft: Draft) -> Iterator[Diagnostic]:
    """PLN304: the sizes of an op follow from its kind, the model and its shard degree."""
    seen: set[tuple[object, ...]] = set()
    for block in draft.blocks.blocks:
        key = (block.kind, block.split, block.ranks.shape[1], tuple(block.reads.items()), tuple(block.writes.items()))
        if key in seen:
            continue  # the rules depend on nothing else
        seen.add(key)
        try:
            for what, found, expected in relations(block, draft.spec.model):
                if found != expected:
                    message = f"{block.name}: {what} is {_shown(found)}, but a {block.kind} op needs {_shown(expected)}"
                    yield fault("PLN304", message, block.name)
        except (ValueError, IndexError):
            yield fault(
                "PLN304", f"{block.name}: a tensor has the wrong number of dimensions for a {block.kind} op", block.name
            )


def check_anchors(draft: Draft) -> Iterator[Diagnostic]:
    """What the size rules and the edges leave open, fixed by the spec and the mesh: PLN304 for token counts and shard
    degrees, PLN305 for dtypes, PLN306 for layouts."""
    spec, par = draft.spec, draft.parallelism
    tokens = step_tokens(spec, par)
    rows = {
        "input": tokens.group * par.attention_dp * spec.workload.micro_batches,
        "input_split": tokens.group,
        "lm_head": tokens.logits,
        "gate": tokens.source,
    }
    for block in draft.blocks.blocks:
        split = _shard_degree(block, par)
        if block.split != split:
            yield fault(
                "PLN304",
                f"{block.name} is split {block.split} ways; a {block.kind} op here is split {split} ways",
                block.name,
            )
        for port, tensor in block.writes.items():
            if block.kind in rows and tensor.shape[:1] != (rows[block.kind],):
                message = (
                    f"{block.name} writes {shape_text(tensor.shape)} of {port}, but there are {rows[block.kind]} tokens"
                )
                yield fault("PLN304", message, block.name)
            dtype = _dtype(block, port, spec.model)
            if tensor.dtype != dtype:
                yield fault(
                    "PLN305", f"{block.name} writes {port} in {tensor.dtype}; the model says {dtype}", block.name
                )
            layout = _layout(block, port, par)
            if block.kind == "residual_add":  # all tokens of the group, or the shard that this rank routes
                layout = layout if tensor.shape[:1] == (tokens.source,) else ("R",)
            if tensor.layout not in layout:
                yield fault(
                    "PLN306", f"{block.name} writes {port} as {tensor.layout}, not {' or '.join(layout)}", block.name
                )


def _shard_degree(block: OpBlock, par: Parallelism) -> int:
    if block.kind == "expert" or (block.kind == "all_reduce" and block.rows is not None):
        return par.expert_tp
    if block.kind in ("shared_up", "shared_down"):
        return par.tp if par.leaders_gate else 1
    sharded = ("attn_qkv", "attn_core", "attn_out", "dense_up", "dense_down", "lm_head")
    return (
        par.tp
        if block.kind in sharded or block.kind in ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
        else 1
    )


def _dtype(block: OpBlock, port: str, model: Model) -> str:
    if (block.kind, port) == ("gate", "weights"):
        return "fp32"
    if port in ("ids", "done") or (block.kind in ("input", "input_split") and model.vocab):
        return "int32"
    if block.kind == "dispatch":
        return model.dtype_of("dispatch")
    routed = block.kind in ("expert", "combine") or (block.kind == "all_reduce" and block.rows is not None)
    return model.dtype_of("combine" if routed else "activations")


def _layout(block: OpBlock, port: str, par: Parallelism) -> tuple[str, ...]:
    """The layouts that the port may have; whether a partial sum is one is left to `check_partial_sums`."""
    source = "R" if par.leaders_gate or par.tp == 1 else "S(tokens)"  # how the tokens lie that a rank routes
    match block.kind, port:
        case "input", _:
            return ("S(batch)",)
        case (("attn_qkv" | "attn_core"), _):
            return ("S(heads)" if par.tp > 1 else "R",)
        case (("attn_out" | "dense_down"), _):
            return "P", "R"
        case "shared_down", _:
            return "P", source
        case "lm_head", _:
            return ("S(vocab)" if par.tp > 1 else "R",)
        case "dense_up", _:
            return ("S(width)" if par.tp > 1 else "R",)
        case "shared_up", _:
            return ("S(width)" if par.leaders_gate else source,)
        case (("residual_add" | "gate" | "combine" | "aggregate"), _):
            return (source,)
        case "reduce_scatter", _:
            return ("S(tokens)",)
        case "expert", "y":
            return "P", "S(experts)"
    if block.kind == "dispatch" or (block.kind == "all_reduce" and block.rows is not None):
        return ("S(experts)",)
    return ("R",)


def _shown(value: object) -> str:
    return shape_text(value) if isinstance(value, tuple) else str(value)


def check_partial_sums(draft: Draft) -> Iterator[Diagnostic]:
    """PLN307: a partial sum goes to exactly one reduction and to nothing else, and only reductions read one.
    PLN306: what a gather reads is a shard."""
    graph = draft.blocks
    readers: dict[tuple[int, str], list[OpBlock]] = {}
    for source, out, target in dict.fromkeys((e.source, e.out, e.target) for e in graph.edges):
        readers.setdefault((source, out), []).append(graph.blocks[target])
    for index, block in enumerate(graph.blocks):
        yield from _check_partial_writes(graph, index, readers)
        for port, tensor in block.reads.items():
            if block.kind in _REDUCERS and tensor.layout != "P":
                yield fault(
                    "PLN307", f"{block.name} reduces {port}, which is {tensor.layout}, not a partial sum", block.name
                )
            if block.kind not in _REDUCERS and tensor.layout == "P":
                yield fault("PLN307", f"{block.name} reads {port} while it is still a partial sum", block.name)
            if block.kind == "all_gather" and not tensor.layout.startswith("S("):
                yield fault("PLN306", f"{block.name} gathers {port}, which is {tensor.layout}, not a shard", block.name)


def _check_partial_writes(
    graph: PlanGraph, index: int, readers: dict[tuple[int, str], list[OpBlock]]
) -> Iterator[Diagnostic]:
    block = graph.blocks[index]
    for port, tensor in block.writes.items():
        if tensor.layout != "P":
            if block.split > 1 and block.kind in ("attn_out", "dense_down", "shared_down", "expert") and port == "y":
                message = f"{block.name} sums over 1/{block.split} of its inputs, so it writes a partial sum, not {tensor.layout}"
                yield fault("PLN307", message, block.name)
            continue
        found = readers.get((index, port), [])
        if block.collective:
            yield fault("PLN307", f"{block.name} is a {block.kind} and cannot write a partial sum", block.name)
        elif found and (len(found) > 1 or found[0].kind not in _REDUCERS):  # one that nothing reads is not connected
            names = ", ".join(b.name for b in found)
            yield fault(
                "PLN307",
                f"{block.name} writes a partial sum; it must go to one reduction, but goes to {names}",
                block.name,
            )
