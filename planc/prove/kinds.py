"""What each kind of op computes, of what it reads and what its rank holds.

Every function takes the machine, the number of the op's block, the op in it and what it reads by port, and returns what it
writes by port: of a local op a value, of a collective a list with one for every member.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from planc.graph import PlanGraph
from planc.placement import step_tokens
from planc.prove.model import Array, attend, expanded, inner, projected, rms, route
from planc.prove.values import Broken, Members, Out, Reads, Routed, Rows, Value
from planc.units import split_evenly

if TYPE_CHECKING:  # the machine runs the kinds
    from planc.prove.execute import Machine


def _input(m: Machine, number: int, op: int, reads: Reads) -> Out:
    return {"batch": m.batch}


def _input_split(m: Machine, number: int, op: int, reads: Reads) -> Out:
    """A replica's part of the batch over its TP groups."""
    block = m.graph.blocks[number]
    (batch,) = {id(v): v for member in reads["batch"] for v in member}.values()
    part = batch[op]
    groups = block.ranks.shape[1] // m.par.tp
    size = len(part) // groups
    out = []
    for n in range(block.ranks.shape[1]):
        mine = part[n // m.par.tp * size : (n // m.par.tp + 1) * size]
        m.send(number, op, 0, n, mine, block.writes["x"].dtype)
        out.append(mine)
    return {"x": out}


def _rank(m: Machine, number: int, op: int) -> int:
    return int(m.graph.blocks[number].ranks[op, 0])


def _need(m: Machine, number: int, op: int, item: str, prefix: str) -> dict[str, Array]:
    held = m.held[_rank(m, number, op)].get(item, prefix)
    if not held:
        raise Broken(m.name(number, op), f"rank {_rank(m, number, op)} holds nothing of `{prefix or item}`")
    return held


def _norm(m: Machine, number: int, op: int, x: Array, which: str) -> Array:
    if m.model.norm == "none":
        return x
    layer = m.graph.blocks[number].layer
    prefix = f"L{layer}.{which}" if layer is not None else "final"
    return rms(x, _need(m, number, op, "norms", prefix)[""])


def _embed(m: Machine, number: int, op: int, reads: Reads) -> Out:
    return {"x": _need(m, number, op, "embedding", "")["table"][m.one(reads, "ids")]}


def _attn_qkv(m: Machine, number: int, op: int, reads: Reads) -> Out:
    """q beside what is cached, unrotated parts and all, in the shape that the graph says."""
    block, a = m.graph.blocks[number], m.model.attention
    x = _norm(m, number, op, m.one(reads, "x"), "attn")
    w = _need(m, number, op, "attention", f"L{block.layer}.")
    q, first, second = projected(m.model, x, w, m_positions(m, len(x)))
    if a.kind == "mla":
        q = q.reshape(len(x), -1)
    qkv = np.concatenate([q, first, second], axis=1)
    rank = _rank(m, number, op)
    m.stream[rank] = max(m.stream[rank], x.size)
    m.keeps(number, op, x.size + qkv.size)
    return {"qkv": qkv}


def m_positions(m: Machine, tokens: int) -> Array:
    """Positions of a micro-batch's tokens: the next one of every sequence, or those of prompts side by side."""
    return m.length + np.arange(tokens) % sequence_tokens(m, tokens)


def sequence_tokens(m: Machine, tokens: int) -> int:
    """Tokens that a sequence has in a micro-batch of so many: one, or a prompt (as much of it as there is)."""
    work = m.draft.spec.workload
    return 1 if work.phase == "decode" else min(work.isl, tokens)


def _attn_core(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block, a = m.graph.blocks[number], m.model.attention
    assert block.layer is not None
    qkv = m.one(reads, "qkv")
    t, heads = len(qkv), a.heads // block.split
    held = m.held[_rank(m, number, op)]
    w = _need(m, number, op, "attention", f"L{block.layer}.")
    if a.kind == "mla":
        q = qkv[:, : heads * a.q_head_dim].reshape(t, heads, a.q_head_dim)
        rest = qkv[:, heads * a.q_head_dim :]
        first, second = rest[:, : a.kv_lora_rank], rest[:, a.kv_lora_rank :]
    else:
        kv = (qkv.shape[1] - heads) // 2
        q, first, second = qkv[:, :heads], qkv[:, heads : heads + kv], qkv[:, heads + kv :]
    out = np.empty((t, heads, a.out_head_dim))
    cache, width = held.cache[block.micro_batch, block.layer], sequence_tokens(m, t)
    for sequence, start in enumerate(range(0, t, width)):
        part = slice(start, min(t, start + width))
        end = m.length + part.stop - start
        cache[0][sequence, m.length : end], cache[1][sequence, m.length : end] = first[part], second[part]
        k, v = expanded(m.model, cache[0][sequence, :end], cache[1][sequence, :end], w, heads)
        out[part] = attend(q[part], k, v, m.length)
    m.keeps(number, op, qkv.size + out.size)
    return {"o": out}


def _attn_out(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    w = _need(m, number, op, "attention", f"L{block.layer}.")
    o = m.one(reads, "o")
    y = np.einsum("thd,hde->te", o, w["o"])
    m.keeps(number, op, o.size + y.size)
    return {"y": y + w["o_bias"] if "o_bias" in w and _rank(m, number, op) % block.split == 0 else y}


def _residual_add(m: Machine, number: int, op: int, reads: Reads) -> Out:
    h = m.one(reads, "y") + m.one(reads, "x")
    m.check(m.graph.blocks[number], op, h)
    return {"h": h}


def _up(item: str) -> Callable[[Machine, int, int, Reads], Out]:
    def run(m: Machine, number: int, op: int, reads: Reads) -> Out:
        x = _norm(m, number, op, m.one(reads, "h"), "mlp")
        w = _need(m, number, op, item, f"L{m.graph.blocks[number].layer}.")
        u = inner(x, w)
        m.keeps(number, op, x.size + _products(u, w))
        return {"u": u}

    return run


def _products(u: Array, w: dict[str, Array]) -> int:
    """Values of the products that the activated ``u`` is made of: up's, and gate's where there is one."""
    return u.size * (2 if "gate" in w else 1)


def _down(item: str) -> Callable[[Machine, int, int, Reads], Out]:
    def run(m: Machine, number: int, op: int, reads: Reads) -> Out:
        w = _need(m, number, op, item, f"L{m.graph.blocks[number].layer}.")
        u = m.one(reads, "u")
        y = u @ w["down"]
        m.keeps(number, op, u.size + y.size)
        return {"y": y}

    return run


def _gate(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    x = _norm(m, number, op, m.one(reads, "h"), "mlp")
    w = _need(m, number, op, "gates", f"L{block.layer}.")
    forced = None
    if m.planned:
        local = _rank(m, number, op) % m.par.ep
        source = local // m.par.tp if m.par.leaders_gate else local
        forced = planned_choices(m, source * len(x) + np.arange(len(x)))
    chosen, share = route(m.model, x, w, forced)
    m.keeps(number, op, x.size + len(x) * w["w"].shape[1])
    return {"tokens": Routed(x, chosen), "weights": share}


def planned_choices(m: Machine, token: Array) -> Array:
    """Experts of the tokens with these numbers in their EP group and micro-batch, as even routing counts them: choice j
    falls on expert j mod E. int [tokens, k]."""
    moe = m.model.moe
    assert moe is not None
    return np.asarray((token[:, None] * moe.top_k + np.arange(moe.top_k)) % moe.experts)


def _dispatch(m: Machine, number: int, op: int, reads: Reads) -> Out:
    """Every choice of every token to a copy of its expert: copies take equal parts of an expert's tokens, in the order of
    sources."""
    block = m.graph.blocks[number]
    copies = m.copies.get((number, op), {})
    wanted: dict[int, list[tuple[int, int, int]]] = {}
    tokens: dict[int, Array] = {}
    for member, values in enumerate(reads["tokens"]):
        for routed in values:
            tokens[member] = routed.tokens
            m.tokens += len(routed.tokens)
            for token, choices in enumerate(routed.chosen.tolist()):
                for place, expert in enumerate(choices):
                    wanted.setdefault(expert, []).append((member, token, place))
    out: list[dict[int, Rows]] = [{} for _ in range(block.ranks.shape[1])]
    dtype = block.writes["tokens"].dtype
    for expert, holders in copies.items():
        asked = wanted.pop(expert, [])
        cut = 0
        for holder, size in zip(holders, split_evenly(len(asked), len(holders)), strict=True):
            origin = asked[cut : cut + size]
            cut += size
            rows = np.array([tokens[a][b] for a, b, _ in origin]).reshape(len(origin), m.model.hidden)
            for member in holder:
                if expert in out[member]:
                    raise Broken(m.name(number, op), f"expert {expert} is twice on rank {block.ranks[op, member]}")
                out[member][expert] = Rows(rows, origin)
                for a, b, _ in origin:
                    m.send(number, op, a, member, tokens[a][b], dtype)
    for rank, arrived in zip(block.ranks[op].tolist(), out, strict=True):
        m.arrives(rank, arrived)
    if wanted:
        expert = next(iter(wanted))
        raise Broken(m.name(number, op), f"no op runs expert {expert}, which {len(wanted[expert])} tokens chose")
    return {"tokens": out}


def dispatch_copies(graph: PlanGraph) -> dict[tuple[int, int], dict[int, list[list[int]]]]:
    """Of every dispatch op: expert -> its copies in the EP group, each the members that hold its shards, from the expert
    ops that read this dispatch."""
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    width: dict[int, int] = {}
    for edge in graph.edges:
        dispatch, target = graph.blocks[edge.source], graph.blocks[edge.target]
        if dispatch.kind != "dispatch" or target.kind != "expert" or target.experts is None:
            continue
        width[edge.source] = target.split
        where = {rank: (op, n) for op, row in enumerate(dispatch.ranks.tolist()) for n, rank in enumerate(row)}
        for rank, expert in zip(target.ranks[:, 0].tolist(), target.experts.tolist(), strict=True):
            if rank in where:
                op, member = where[rank]
                found.setdefault((edge.source, op), {}).setdefault(expert, []).append(member)
    out: dict[tuple[int, int], dict[int, list[list[int]]]] = {}
    for key, experts in found.items():
        size = width[key[0]]
        out[key] = {
            expert: [sorted(members)[i : i + size] for i in range(0, len(members), size)]
            for expert, members in experts.items()
        }
    return out


def _expert(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    assert block.experts is not None
    expert = int(block.experts[op])
    arrived = m.one(reads, "tokens")
    if expert not in arrived:
        raise Broken(m.name(number, op), f"no rows for expert {expert} come to rank {_rank(m, number, op)}")
    rows = arrived[expert]
    if m.planned and block.rows is not None and len(rows.origin) != block.rows[op]:
        raise Broken(m.name(number, op), f"gets {len(rows.origin)} rows, where the plan says {int(block.rows[op])}")
    w = _need(m, number, op, "experts", f"L{block.layer}.E{expert}.")
    u = inner(rows.values, w)
    m.keeps(number, op, _products(u, w))  # its rows are in the dispatch buffers
    y = u @ w["down"]
    if "down_bias" in w and _rank(m, number, op) % block.split == 0:
        y = y + w["down_bias"]
    return {"y": Rows(y, rows.origin), "done": np.zeros(0)}


def _combine(m: Machine, number: int, op: int, reads: Reads) -> Out:
    """Every row back to its token; of the shards of an expert the first sends the sum."""
    block = m.graph.blocks[number]
    k = m.model.moe.top_k if m.model.moe else 1
    dtype = block.reads["y"].dtype
    tokens = step_tokens(m.draft.spec, m.par).source
    parts: dict[int, Array] = {}
    times: dict[int, np.ndarray] = {}
    for member, values in enumerate(reads["y"]):
        if member % m.par.expert_tp:
            continue
        for rows in values:
            for value, (source, token, place) in zip(rows.values, rows.origin, strict=True):
                at = parts.setdefault(source, np.zeros((tokens * k, m.model.hidden)))
                times.setdefault(source, np.zeros(tokens * k, dtype=int))[token * k + place] += 1
                at[token * k + place] = value
                m.send(number, op, member, source, value, dtype)
    for source, count in times.items():
        if (count != 1).any():
            token = int(np.flatnonzero(count != 1)[0]) // k
            raise Broken(
                m.name(number, op),
                f"token {token} of rank {block.ranks[op, source]} comes back {count.min()} to {count.max()} times a choice",
            )
    for source, part in parts.items():
        m.comes_back(int(block.ranks[op, source]), part)
    return {"parts": [parts.get(n) for n in range(block.ranks.shape[1])]}


def _aggregate(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    h, share = m.one(reads, "h"), m.one(reads, "weights")
    parts = m.one(reads, "parts").reshape(len(h), share.shape[1], -1)
    out = h + (parts * share[:, :, None]).sum(axis=1)
    if "shared" in reads:
        shared = m.one(reads, "shared")
        if m.model.moe is not None and m.model.moe.shared_gate:
            w = _need(m, number, op, "gates", f"L{block.layer}.")["shared"]
            shared = shared / (1.0 + np.exp(-(_norm(m, number, op, h, "mlp") @ w)))[:, None]
        out = out + shared
    m.check(block, op, out)
    return {"x": out}


def _values(reads: Members) -> list[Value]:
    return [member[0] for member in reads if member]


def _all_reduce(m: Machine, number: int, op: int, reads: Reads) -> Out:
    """Every rank sums one part and hands it to all."""
    block = m.graph.blocks[number]
    values = _values(reads["y"])
    if len(values) != block.ranks.shape[1]:
        raise Broken(m.name(number, op), f"{len(values)} of {block.ranks.shape[1]} members bring a partial sum")
    arrays = [v.values if isinstance(v, Rows) else v for v in values]
    dtype = block.reads["y"].dtype
    if len({a.shape for a in arrays}) > 1:
        raise Broken(m.name(number, op), "members bring sums of different shapes")
    total = np.sum(arrays, axis=0)
    cuts = np.cumsum([0, *split_evenly(total.size, len(values))])
    for source in range(len(values)):
        for target in range(len(values)):
            m.send(number, op, source, target, arrays[source].reshape(-1)[cuts[target] : cuts[target + 1]], dtype)
            m.send(number, op, source, target, total.reshape(-1)[cuts[source] : cuts[source + 1]], dtype)
    made = Rows(total, values[0].origin) if isinstance(values[0], Rows) else total
    return {"y": [made] * len(values)}


def _reduce_scatter(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    values, dtype = _values(reads["y"]), block.reads["y"].dtype
    if len(values) != block.ranks.shape[1]:
        raise Broken(m.name(number, op), f"{len(values)} of {block.ranks.shape[1]} members bring a partial sum")
    rows = len(values[0]) // len(values)
    out = []
    for target in range(len(values)):
        part = slice(target * rows, (target + 1) * rows)
        for source, value in enumerate(values):
            m.send(number, op, source, target, value[part], dtype)
        out.append(np.sum([value[part] for value in values], axis=0))
    return {"y": out}


def _all_gather(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    values, dtype = _values(reads["x"]), block.reads["x"].dtype
    if len(values) != block.ranks.shape[1]:
        raise Broken(m.name(number, op), f"{len(values)} of {block.ranks.shape[1]} members bring a part")
    for source, value in enumerate(values):
        for target in range(len(values)):
            m.send(number, op, source, target, value, dtype)
    whole = gathered(m, number, op, values)
    return {"x": [whole] * len(values)}


def gathered(m: Machine, number: int, op: int, values: list[Array]) -> Array:
    """Parts of all members beside each other: tokens, or logits, of which a member keeps its own part too."""
    if "vocab" not in m.graph.blocks[number].reads["x"].layout:
        return np.concatenate(values)
    whole = np.concatenate(values, axis=-1)
    for member, value in enumerate(values):
        m.keeps(number, op, value.size + whole.size, member)
    return whole


def _broadcast(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    first = reads["x"][0]
    if not first:
        raise Broken(m.name(number, op), "its first member has nothing to send")
    for target in range(1, block.ranks.shape[1]):
        m.send(number, op, 0, target, first[0], block.reads["x"].dtype)
    return {"x": [first[0]] * block.ranks.shape[1]}


def _pass(m: Machine, number: int, op: int, reads: Reads) -> Out:
    return {"x": m.one(reads, "x")}


def last_tokens(m: Machine, x: Array) -> Array:
    """The tokens of a TP group that need logits: all of a decode step, of a prefill step the last of every prompt."""
    work = m.draft.spec.workload
    if work.phase == "decode":
        return x
    return np.asarray(x[np.minimum(np.arange(1, max(1, len(x) // work.isl) + 1) * work.isl, len(x)) - 1])


def _lm_head(m: Machine, number: int, op: int, reads: Reads) -> Out:
    x = _norm(m, number, op, last_tokens(m, m.one(reads, "x")), "")
    logits = x @ m.held[_rank(m, number, op)].head(m.model, _rank(m, number, op) % m.par.tp, m.par.tp)
    m.keeps(number, op, x.size + logits.size)
    return {"logits": logits}


def _sample(m: Machine, number: int, op: int, reads: Reads) -> Out:
    logits = m.one(reads, "logits")[:, : m.model.vocab]
    m.check(m.graph.blocks[number], op, logits)
    return {"ids": logits.argmax(axis=1)}


def _output_collect(m: Machine, number: int, op: int, reads: Reads) -> Out:
    return {}


#: kinds whose ports take several values on a rank: results of several experts, of several micro-batches
SEVERAL = frozenset({"input_split", "combine", "output_collect"})

KINDS: dict[str, Callable[[Machine, int, int, Reads], Out]] = {
    "input": _input,
    "input_split": _input_split,
    "embed": _embed,
    "attn_qkv": _attn_qkv,
    "attn_core": _attn_core,
    "attn_out": _attn_out,
    "residual_add": _residual_add,
    "dense_up": _up("dense_mlp"),
    "dense_down": _down("dense_mlp"),
    "shared_up": _up("shared_experts"),
    "shared_down": _down("shared_experts"),
    "gate": _gate,
    "dispatch": _dispatch,
    "expert": _expert,
    "combine": _combine,
    "aggregate": _aggregate,
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "pp_send": _pass,
    "pp_recv": _pass,
    "lm_head": _lm_head,
    "sample": _sample,
    "output_collect": _output_collect,
}
