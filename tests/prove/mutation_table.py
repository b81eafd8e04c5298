"""What catches which mistake: the verifier, the proof by execution, or both. As a script it writes docs/prove-mutations.md.

Mistakes are single-place changes of good plans: those of the verifier's own tests, further ones here, and wrong inputs of the
execution (weights, caches, what an op computes), which no check of a graph can see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from breaking import (
    block,
    changed_at,
    edge,
    experts_of,
    good,
    swapped,
    targets_swapped,
    with_block,
    with_edge,
    with_edges,
    with_pairs,
    with_reads,
    without_edge,
)
from small_specs import ROOT
from test_mutations import MUTATIONS

from planc.placement import memory_table
from planc.prove import holdings, kinds, model, prove
from planc.verify import Draft
from planc.verify.verify import faults

PAGE = ROOT / "docs" / "prove-mutations.md"
HEAD = """\
# What catches which mistake

Every row is a good plan with one mistake in one place. *Verifier*: the codes that `planc verify` refuses it with. *Proof*: the first
fault that `planc.prove.prove` finds by running the plan on small numbers beside the model whole; — where the numbers come out right.

The verifier sees what the numbers cannot show: declared types, memory, the expert rule, marks, counts, names. The proof sees what no
check of a graph can: what ops compute and what ranks hold. Mistakes in the wiring are seen by both, each by its own means.

Made by `make mutations`; a test compares it with what is found now.

"""


class Change(NamedTuple):
    """A mistake in a plan."""

    what: str
    plan: str
    change: Callable[[Draft], Draft]


class Wrong(NamedTuple):
    """A mistake in what the execution is given: a name of `planc.prove` that stands for something else."""

    what: str
    plan: str
    name: str
    wrong: Any


class Row(NamedTuple):
    """What was found."""

    what: str
    plan: str
    codes: tuple[str, ...]
    fault: str


def without_op(draft: Draft, name: str, op: int) -> Draft:
    """One op of a block of experts missing."""
    b = block(draft, name)
    assert b.rows is not None
    kept = np.arange(len(b)) != op
    return with_block(draft, name, ranks=b.ranks[kept], rows=b.rows[kept], experts=experts_of(draft, name)[kept])


def exchanged(draft: Draft, name: str, before: str, after: str, i: int, j: int) -> Draft:
    """Two ops of a block do each other's work: what comes to one comes to the other, and what they write goes back."""
    swap = {i: j, j: i}

    def change(column: int) -> Callable[[np.ndarray], np.ndarray]:
        def run(pairs: np.ndarray) -> np.ndarray:
            pairs = pairs.copy()
            pairs[:, column] = [swap.get(op, op) for op in pairs[:, column].tolist()]
            return pairs

        return run

    return with_pairs(with_pairs(draft, before, name, change(1)), name, after, change(0))


def ungathered(draft: Draft) -> Draft:
    """A layer reads a rank's own shard of tokens where it should read the gathered ones."""
    tensor = block(draft, "L0.aggregate").writes["x"]
    draft = with_edge(draft, "L0.moe_all_gather", "L1.attn_qkv", source="L0.aggregate", comm="")
    return with_reads(with_edge(draft, "L0.aggregate", "L1.attn_qkv", tensor=tensor), "L1.attn_qkv", x=tensor)


def reduced_again(draft: Draft) -> Draft:
    """A sum is summed once more on its way to the residual."""
    again = replace(block(draft, "L0.attn_all_reduce"), name="L0.again")
    blocks = (*draft.blocks.blocks, again)
    draft = replace(draft, blocks=replace(draft.blocks, blocks=blocks))
    feed = replace(
        edge(draft, "L0.attn_out", "L0.attn_all_reduce"),
        source=draft.blocks.by_name["L0.attn_all_reduce"],
        target=len(blocks) - 1,
    )
    return with_edge(with_edges(draft, feed), "L0.attn_all_reduce", "L0.attn_add", source="L0.again")


# fmt: off
CHANGES = [
    Change("an expert's op missing", "leader", lambda d: without_op(d, "L0.expert", 3)),
    Change("an expert's op missing in a turn", "turns", lambda d: without_op(d, "m1.L1.expert.s1", 0)),
    Change("an expert's op of the second replica missing", "turns", lambda d: without_op(d, "m0.L0.expert.s0", 7)),
    Change("a shard's op missing", "shards", lambda d: without_op(d, "L0.expert.s0", 1)),
    Change("two copies exchanged with their experts", "spares",
           lambda d: with_block(d, "L0.expert", experts=swapped(experts_of(d, "L0.expert"), 0, 7))),
    Change("an expert runs on its neighbour's GPU", "idle",
           lambda d: with_block(d, "L0.expert", ranks=changed_at(block(d, "L0.expert").ranks, 5, 6))),
    Change("a sum summed again", "leader", reduced_again),
    Change("one shard read where the gathered tokens should be", "scatter", ungathered),
    Change("a broadcast from another rank", "leader",
           lambda d: with_block(d, "L0.moe_broadcast", ranks=np.ascontiguousarray(block(d, "L0.moe_broadcast").ranks[:, ::-1]))),
    Change("a gather in another order", "sharded",
           lambda d: with_block(d, "L1.moe_all_gather", ranks=np.ascontiguousarray(block(d, "L1.moe_all_gather").ranks[:, ::-1]))),
    Change("a reduce-scatter whose parts go to other ranks", "scatter",
           lambda d: with_block(d, "L0.attn_reduce_scatter",
                                ranks=np.ascontiguousarray(block(d, "L0.attn_reduce_scatter").ranks[:, ::-1]))),
    Change("a logits gather in another order", "sharded",
           lambda d: with_block(d, "logits_all_gather", ranks=np.ascontiguousarray(block(d, "logits_all_gather").ranks[:, ::-1]))),
    Change("a combine fed by another turn's experts twice", "turns",
           lambda d: with_edge(d, "m0.L0.expert.s0", "m0.L0.combine", source="m0.L0.expert.s1")),
    Change("a combine fed by another layer's experts", "turns",
           lambda d: with_edge(d, "m0.L1.expert.s0", "m0.L1.combine", source="m0.L0.expert.s0")),
    Change("a combine fed by another micro-batch's experts", "turns",
           lambda d: with_edge(d, "m1.L0.expert.s0", "m1.L0.combine", source="m0.L0.expert.s0")),
    Change("what comes back from another layer's experts", "leader",
           lambda d: with_edge(d, "L1.combine", "L1.aggregate", source="L0.combine")),
    Change("shared experts of another layer", "shards",
           lambda d: with_edge(d, "L1.shared_all_reduce", "L1.aggregate", source="L0.shared_all_reduce")),
    Change("shared experts added before their sum", "shards",
           lambda d: with_edge(d, "L1.shared_all_reduce", "L1.aggregate", source="L1.shared_down")),
    Change("an attention that is not added", "leader",
           lambda d: with_edge(d, "L0.attn_add", "L0.gate", source="input_split", out="x")),
    Change("an MLP that reads what attention read", "sharded",
           lambda d: with_edge(d, "L0.attn_add", "L0.dense_up", source="embed", out="x")),
    Change("attention on the cache of another TP group", "leader",
           lambda d: exchanged(d, "L1.attn_core", "L1.attn_qkv", "L1.attn_out", 0, 8)),
    Change("attention on the cache of another rank of its group", "leader",
           lambda d: exchanged(d, "L1.attn_core", "L1.attn_qkv", "L1.attn_out", 0, 1)),
    Change("attention on the cache of another micro-batch", "turns",
           lambda d: with_edge(d, "m1.L0.attn_qkv", "m1.L0.attn_core", source="m0.L0.attn_qkv")),
    Change("an output projection by another rank", "leader",
           lambda d: exchanged(d, "L1.attn_out", "L1.attn_core", "L1.attn_all_reduce", 2, 3)),
    Change("dense shards exchanged half-way", "dense",
           lambda d: with_pairs(d, "L0.dense_up", "L0.dense_down", lambda p: np.stack([p[:, 0], p[:, 1] ^ 1], axis=1))),
    Change("shards of two experts summed", "shards",
           lambda d: with_pairs(d, "L0.expert.s0", "L0.expert.s0_all_reduce", targets_swapped)),
    Change("a sum of shards that comes back from the second alone", "shards",
           lambda d: with_edge(d, "L0.expert.s0_all_reduce", "L0.combine", source="L0.expert.s0")),
    Change("the output of one group alone", "leader",
           lambda d: with_pairs(d, "L3.moe_broadcast", "output_collect", lambda p: p[:1])),
    Change("the output of a layer before the last", "leader",
           lambda d: with_edge(d, "L3.moe_broadcast", "output_collect", source="L2.moe_broadcast")),
    Change("samples of one replica alone", "sharded",
           lambda d: without_edge(d, "sample", "output_collect", "stream") if len(_between(d, "sample", "output_collect")) == 1
           else _without_last(d, "sample", "output_collect")),
    Change("logits of one shard sampled", "sharded",
           lambda d: with_edge(d, "logits_all_gather", "sample", source="lm_head", out="logits")),
    Change("a hand-over that skips a stage's attention", "stages",
           lambda d: with_edge(d, "S1.pp_recv", "L2.attn_qkv", source="S0.pp_send")),
    Change("a hand-over to the ranks of one TP group", "dense",
           lambda d: with_pairs(d, "S0.pp_send", "S1.pp_recv", lambda p: np.stack([p[:, 0], p[:, 1] // 2 * 2], axis=1))),
    Change("micro-batches exchanged at the input", "turns",
           lambda d: with_block(with_block(d, "m0.L0.attn_qkv", micro_batch=1), "m1.L0.attn_qkv", micro_batch=0)),
    Change("all order edges of rounds dropped", "turns",
           lambda d: replace(d, blocks=replace(d.blocks, edges=tuple(e for e in d.blocks.edges if e.into != "after")))),
]


def _wrong_share(*args: Any) -> Any:
    chosen, share = model.route(*args)
    return chosen, share[:, ::-1]


def _equal_share(*args: Any) -> Any:
    chosen, share = model.route(*args)
    return chosen, np.full_like(share, share.mean())


def _second_best(m: Any, x: Any, w: Any, forced: Any = None) -> Any:
    return model.route(m, x, w | {"w": -w["w"]}, forced)


def _other_shard(weights: Any, layer: int, shard: int, tp: int) -> Any:
    return holdings_attention(weights, layer, shard ^ 1 if tp > 1 else shard, tp)


def _other_kv_head(weights: Any, layer: int, shard: int, tp: int) -> Any:
    own, other = (holdings_attention(weights, layer, n, tp) for n in (shard, shard ^ 1 if tp > 1 else shard))
    return own | {"k": other["k"]}


def _next_layer(weights: Any, layer: int, shard: int, tp: int) -> Any:
    return holdings_attention(weights, 1 - layer if layer < 2 else layer, shard, tp)


def _mixed_mlp(whole: Any, shard: int, split: int) -> Any:
    return holdings_mlp(whole, shard, split) | ({"down": holdings_mlp(whole, shard ^ 1, split)["down"]} if split > 1 else {})


def _first_shard(whole: Any, shard: int, split: int) -> Any:
    return holdings_mlp(whole, 0, split)


def _first_columns(whole: Any, shard: int, tp: int) -> Any:
    return holdings_head(whole, 0, tp)


def _one_position_on(m: Any, tokens: int) -> Any:
    return positions(m, tokens) + 1


def _unscaled(q: Any, k: Any, v: Any, first: int) -> Any:
    return model.attend(q * 2, k, v, first)


def _older_only(q: Any, k: Any, v: Any, first: int) -> Any:
    return model.attend(q, k, v, first - 1)


def _other_order(m: Any, number: int, op: int, reads: Any) -> Any:
    return {"batch": [batch[::-1] for batch in m.batch]}


def _forgetful(m: Any, number: int, op: int, reads: Any) -> Any:
    b = m.graph.blocks[number]
    m.held[int(b.ranks[op, 0])].cache[b.micro_batch, b.layer][0][:, 0] = 0.0
    return attn_core(m, number, op, reads)


def _a_millionth(m: Any, number: int, op: int, reads: Any) -> Any:
    y = attn_out(m, number, op, reads)["y"]
    return {"y": y + 1e-6}


def _half_back(m: Any, number: int, op: int, reads: Any) -> Any:
    parts = combine(m, number, op, reads)["parts"]
    return {"parts": [None if p is None else p[::-1] for p in parts]}


def _short(item: str) -> Any:
    def run(*of: Any) -> Any:
        table = memory_table(*of)
        table.items[item][-1] -= 1
        return table

    return run


def _dispatch_next(m: Any, number: int, op: int, reads: Any) -> Any:
    for values in reads["tokens"]:
        for routed in values:
            routed.tokens = np.roll(routed.tokens, 1, axis=0)
    return dispatch(m, number, op, reads)


holdings_attention, holdings_mlp, holdings_head = holdings.attention_shard, holdings.mlp_shard, holdings.head_shard
positions, attn_core, attn_out = kinds.m_positions, kinds._attn_core, kinds._attn_out
combine, dispatch = kinds._combine, kinds._dispatch

WRONGS = [
    Wrong("weights of choices exchanged", "leader", "kinds.route", _wrong_share),
    Wrong("weights of choices all alike", "idle", "kinds.route", _equal_share),
    Wrong("a gate that chooses the worst", "idle", "kinds.route", _second_best),
    Wrong("rows that come back in another order", "turns", "kinds.KIND combine", _half_back),
    Wrong("tokens sent in place of others", "sharded", "kinds.KIND dispatch", _dispatch_next),
    Wrong("attention heads of the neighbour held", "sharded", "holdings.attention_shard", _other_shard),
    Wrong("keys of the neighbour's heads held", "dense", "holdings.attention_shard", _other_kv_head),
    Wrong("attention of another layer held", "leader", "holdings.attention_shard", _next_layer),
    Wrong("half of an MLP's shard is the neighbour's", "dense", "holdings.mlp_shard", _mixed_mlp),
    Wrong("every shard of an expert is the first", "shards", "holdings.mlp_shard", _first_shard),
    Wrong("every shard of the head is the first", "sharded", "holdings.head_shard", _first_columns),
    Wrong("positions one too far", "leader", "kinds.m_positions", _one_position_on),
    Wrong("scores twice as large", "stages", "kinds.attend", _unscaled),
    Wrong("a token that does not attend to itself", "stages", "kinds.attend", _older_only),
    Wrong("a millionth added to every product", "scatter", "kinds.KIND attn_out", _a_millionth),
    Wrong("no norm before attention", "sharded", "kinds.rms", lambda x, w: x),
    Wrong("tokens of the batch in another order", "stages", "kinds.KIND input", _other_order),
    Wrong("the oldest token missing from the KV cache", "sharded", "kinds.KIND attn_core", _forgetful),
    Wrong("a memory table short of activations", "stages", "shrink.memory_table", _short("activations")),
    Wrong("a gate's product of an MLP not counted", "dense", "kinds._products", lambda u, w: u.size),
    Wrong("a memory table short of dispatch buffers", "turns", "shrink.memory_table", _short("dispatch_buffers")),
]
# fmt: on


def _between(draft: Draft, source: str, target: str) -> list[int]:
    ends = draft.blocks.by_name[source], draft.blocks.by_name[target]
    return [n for n, e in enumerate(draft.blocks.edges) if (e.source, e.target) == ends]


def _without_last(draft: Draft, source: str, target: str) -> Draft:
    gone = _between(draft, source, target)[-1]
    return replace(
        draft, blocks=replace(draft.blocks, edges=tuple(e for n, e in enumerate(draft.blocks.edges) if n != gone))
    )


def _patched(name: str, wrong: Any) -> AbstractContextManager[Any]:
    module, _, rest = name.partition(".")
    if rest.startswith("KIND "):
        return patch.dict(kinds.KINDS, {rest.removeprefix("KIND "): wrong})
    return patch(f"planc.prove.{module}.{rest}", wrong)


def first_fault(draft: Draft, around: AbstractContextManager[Any] | None = None) -> str:
    """The first fault that the proof finds, without numbers that a library or a machine may round or word otherwise."""
    with around or nullcontext():
        found = prove(draft, layers=99)
    if found.holds:
        return ""
    if not found.faults:
        return "bytes moved are not those of the plan"
    op, why = found.faults[0]
    why = re.sub(r" by \S+ \(relative\)| \(\w+(Error|Iteration|Exception)\b.*\)", "", why)
    return f"{op} {why}"


def codes(draft: Draft) -> tuple[str, ...]:
    """What the verifier refuses a draft with."""
    return tuple(sorted({fault.code for fault in faults(draft)[0]}))


def rows() -> Iterator[Row]:
    """Every mistake with what catches it."""
    for change in (*(Change(m.what, m.plan, m.change) for m in MUTATIONS), *CHANGES):
        draft = change.change(good(change.plan))
        yield Row(change.what, change.plan, codes(draft), first_fault(draft))
    for wrong in WRONGS:
        yield Row(wrong.what, wrong.plan, (), first_fault(good(wrong.plan), _patched(wrong.name, wrong.wrong)))


def page(found: list[Row]) -> str:
    """The rows as a document."""
    both = sum(bool(row.codes and row.fault) for row in found)
    verifier = sum(bool(row.codes and not row.fault) for row in found)
    lines = [f"{len(found)} mistakes: {both} caught by both, {verifier} by the verifier alone, "]
    lines[0] += f"{len(found) - both - verifier} by the proof alone.\n"
    parts = {
        "In the plan": [row for row in found if row.what not in {w.what for w in WRONGS}],
        "In weights, caches and what ops compute": [row for row in found if row.what in {w.what for w in WRONGS}],
    }
    for title, part in parts.items():
        lines += [f"## {title}\n", "| mistake | plan | verifier | proof |", "|---|---|---|---|"]
        for row in part:
            text = row.fault.replace("|", "\\|")
            lines.append(f"| {row.what} | {row.plan} | {', '.join(row.codes) or '—'} | {text or '—'} |")
        lines.append("")
    return HEAD + "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(list(rows())), encoding="utf-8")
