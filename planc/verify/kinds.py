"""What each kind of op reads and writes: its ports, and how its sizes follow from the model and its shard degree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from planc.graph import ROWS, OpBlock
from planc.spec import Model


class Signature(NamedTuple):
    """Ports of a kind; ``optional`` reads may be absent."""

    reads: frozenset[str]
    writes: frozenset[str]
    optional: frozenset[str] = frozenset()


def _ports(reads: str, writes: str, optional: str = "") -> Signature:
    return Signature(frozenset(reads.split()), frozenset(writes.split()), frozenset(optional.split()))


SIGNATURES: dict[str, Signature] = {
    "input": _ports("", "batch"),
    "input_split": _ports("batch", "x"),
    "embed": _ports("ids", "x"),
    "attn_qkv": _ports("x", "qkv"),
    "attn_core": _ports("qkv", "o"),
    "attn_out": _ports("o", "y"),
    "residual_add": _ports("y x", "h"),
    "dense_up": _ports("h", "u"),
    "dense_down": _ports("u", "y"),
    "gate": _ports("h", "tokens weights"),
    "dispatch": _ports("tokens", "tokens"),
    "expert": _ports("tokens", "y done", "after"),
    "combine": _ports("y", "parts"),
    "aggregate": _ports("parts weights h", "x", "shared"),
    "shared_up": _ports("h", "u"),
    "shared_down": _ports("u", "y"),
    "all_reduce": _ports("y", "y"),
    "reduce_scatter": _ports("y", "y"),
    "all_gather": _ports("x", "x"),
    "broadcast": _ports("x", "x"),
    "pp_send": _ports("x", "x"),
    "pp_recv": _ports("x", "x"),
    "lm_head": _ports("x", "logits"),
    "sample": _ports("logits", "ids"),
    "output_collect": _ports("stream", ""),
}

#: (what, found, expected)
Relation = tuple[str, object, object]


def relations(block: OpBlock, model: Model) -> Iterator[Relation]:
    """The size rules of the block's kind: pairs that must be equal. Ports must be present (see `SIGNATURES`)."""
    rule = _RELATIONS.get(block.kind)
    if rule is not None:
        yield from rule(block, model)


def _read(block: OpBlock, port: str) -> tuple[int, ...]:
    return block.reads[port].shape


def _wrote(block: OpBlock, port: str) -> tuple[int, ...]:
    return block.writes[port].shape


def _qkv(block: OpBlock, model: Model) -> Iterator[Relation]:
    a, tp = model.attention, block.split
    yield "width read", _read(block, "x")[1:], (model.hidden,)
    if a.kind == "mla":
        inner: tuple[int, ...] = (a.heads // tp * a.q_head_dim + a.kv_width,)
    else:
        inner = (a.heads // tp + 2 * max(1, a.kv_head_count // tp), a.head_dim)
    yield "q, k and v written", _wrote(block, "qkv"), (_read(block, "x")[0], *inner)
    yield "heads times shards", a.heads // tp * tp, a.heads


def _core(block: OpBlock, model: Model) -> Iterator[Relation]:
    a = model.attention
    want = (_read(block, "qkv")[0], a.heads // block.split, a.out_head_dim)
    yield "heads written", _wrote(block, "o"), want


def _out(block: OpBlock, model: Model) -> Iterator[Relation]:
    t, heads, width = _read(block, "o")
    yield "head shards read", (heads * block.split, width), (model.attention.heads, model.attention.out_head_dim)
    yield "hidden written", _wrote(block, "y"), (t, model.hidden)


def _up(block: OpBlock, model: Model) -> Iterator[Relation]:
    width = (model.dense_mlp.intermediate if model.dense_mlp else 0) if block.kind == "dense_up" else 0
    if block.kind == "shared_up":
        width = model.moe.shared_width if model.moe else 0
    yield "width read", _read(block, "h")[1:], (model.hidden,)
    yield "width shards written", _wrote(block, "u"), (_read(block, "h")[0], width // block.split)


def _down(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "hidden written", _wrote(block, "y"), (_read(block, "u")[0], model.hidden)


def _add(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "sum read", _read(block, "y"), _read(block, "x")
    yield "sum written", _wrote(block, "h"), _read(block, "x")
    yield "width", _read(block, "x")[1:], (model.hidden,)


def _gate(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "tokens passed on", _wrote(block, "tokens"), _read(block, "h")
    top_k = model.moe.top_k if model.moe else 0
    yield "choices written", _wrote(block, "weights"), (_read(block, "h")[0], top_k)


def _dispatch(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "tokens written", _wrote(block, "tokens"), (ROWS, *_read(block, "tokens")[1:])


def _expert(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "tokens written", _wrote(block, "y"), _read(block, "tokens")
    yield "order written", _wrote(block, "done"), (0,)
    yield "tokens read", _read(block, "tokens"), (ROWS, model.hidden)


def _combine(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "outputs read", _read(block, "y"), (ROWS, *_wrote(block, "parts")[1:])


def _aggregate(block: OpBlock, model: Model) -> Iterator[Relation]:
    t, k = _read(block, "weights")
    yield "partial outputs read", _read(block, "parts"), (t * k, model.hidden)
    yield "tokens written", _wrote(block, "x"), (t, model.hidden)
    yield "residual read", _read(block, "h"), (t, model.hidden)
    if "shared" in block.reads:
        yield "shared output read", _read(block, "shared"), (t, model.hidden)


def _same(block: OpBlock, model: Model) -> Iterator[Relation]:
    port_in, port_out = next(iter(block.reads)), next(iter(block.writes))
    yield "shape written", _wrote(block, port_out), _read(block, port_in)


def _scatter(block: OpBlock, model: Model) -> Iterator[Relation]:
    t, width = _read(block, "y")
    yield "shard written", _wrote(block, "y"), (t // block.ranks.shape[1], width)
    yield "shards together", t // block.ranks.shape[1] * block.ranks.shape[1], t


def _gather(block: OpBlock, model: Model) -> Iterator[Relation]:
    axis = -1 if "vocab" in block.reads["x"].layout else 0
    want = list(_read(block, "x"))
    want[axis] *= block.ranks.shape[1]
    yield "whole written", _wrote(block, "x"), tuple(want)


def _head(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "width read", _read(block, "x")[1:], (model.hidden,)
    yield "vocabulary shard", _wrote(block, "logits")[1], -(-model.vocab // block.split)


def _split(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "width written", _wrote(block, "x")[1:], _read(block, "batch")[1:]


def _sample(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "ids written", _wrote(block, "ids"), _read(block, "logits")[:1]


def _embed(block: OpBlock, model: Model) -> Iterator[Relation]:
    yield "hidden written", _wrote(block, "x"), (*_read(block, "ids"), model.hidden)


_RELATIONS: dict[str, Callable[[OpBlock, Model], Iterator[Relation]]] = {
    "input_split": _split,
    "embed": _embed,
    "attn_qkv": _qkv,
    "attn_core": _core,
    "attn_out": _out,
    "residual_add": _add,
    "dense_up": _up,
    "dense_down": _down,
    "shared_up": _up,
    "shared_down": _down,
    "gate": _gate,
    "dispatch": _dispatch,
    "expert": _expert,
    "combine": _combine,
    "aggregate": _aggregate,
    "all_reduce": _same,
    "broadcast": _same,
    "pp_send": _same,
    "pp_recv": _same,
    "reduce_scatter": _scatter,
    "all_gather": _gather,
    "lm_head": _head,
    "sample": _sample,
}
