"""Running a plan's graph op by op, with nothing but the graph and what each rank holds.

The executor knows what a kind of op means. Which ops there are, on which ranks, what reads what, who takes part in a
collective and which expert an op runs all come from the graph; weights and KV cache from the rank that the op is on. Data
crosses ranks only inside collectives and over edges between ranks, and every crossing is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planc.graph import ROWS, Expanded, OpBlock, PlanGraph, TensorType, expand
from planc.placement import step_tokens
from planc.prove.holdings import Held
from planc.prove.model import Array, attend, expanded, inner, projected, rms, route
from planc.spec.fields import DTYPE_BYTES
from planc.units import split_evenly
from planc.verify import Draft


class Broken(Exception):
    """The graph cannot be run, or computes what its op cannot mean: which op, and why."""

    def __init__(self, op: str, why: str) -> None:
        super().__init__(f"{op}: {why}")
        self.op, self.why = op, why


#: what Python raises where a plan that was not verified asks for what cannot be
WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError)


@dataclass
class Routed:
    """Tokens on their way out: what a gate hands to dispatch."""

    tokens: Array
    chosen: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens."""
        return self.tokens.shape


@dataclass
class Rows:
    """Rows of one expert with where each is from: (member of the EP group, token, choice)."""

    values: Array
    origin: list[tuple[int, int, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows."""
        return self.values.shape


@dataclass
class Moved:
    """Bytes from rank to rank, by block of a collective or by class of an edge."""

    collectives: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    edges: dict[str, int] = field(default_factory=dict)


Value = Any
Members = list[list[Value]]  #: of every member of an op, what it reads on one port
Reads = dict[str, Members]
Out = dict[str, Value]


class Machine:
    """All ranks of a small plan. ``planned``: tokens go where the plan counts them, else where their gates choose.

    ``places``: of every op of a block (by its rank array, which blocks share) rank -> member; ``copies``: of every dispatch op
    where its experts are.
    """

    def __init__(self, draft: Draft, graph: PlanGraph, held: list[Held], *, planned: bool) -> None:
        self.draft, self.graph, self.held, self.planned = draft, graph, held, planned
        self.par, self.model = draft.parallelism, draft.spec.model
        self.expanded: Expanded = expand(graph)
        self.order = program_order(graph)
        self.into: list[list[int]] = [[] for _ in graph.blocks]
        for number, edge in enumerate(graph.edges):
            self.into[edge.target].append(number)
        self.sources = [_sources(self.expanded, number) for number in range(len(graph.edges))]
        self.places = {
            id(b.ranks): [{r: n for n, r in enumerate(row)} for row in b.ranks.tolist()] for b in graph.blocks
        }
        self.copies = dispatch_copies(graph)
        self.length = draft.spec.workload.isl if draft.spec.workload.phase == "decode" else 0
        self.moved = Moved()
        self.received = np.zeros(graph.world_size, dtype=np.int64)  #: most rows that a dispatch brought a rank
        self.returned = np.zeros(graph.world_size, dtype=np.int64)  #: most values that a combine brought back
        self.ops = 0
        self.tokens = 0
        self.outputs: dict[int, list[dict[str, Value]]] = {}
        self.check: Callable[[OpBlock, int, Array], None] = lambda block, op, value: None

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self, batch: list[Array]) -> list[Value]:
        """Run every op once. ``batch``: the input of every replica. Returns what output_collect read."""
        self.outputs, self.moved, self.batch = {}, Moved(), batch
        stream: list[Value] = []
        for number in self.order:
            block = self.graph.blocks[number]
            made = []
            for op in range(len(block)):
                reads = {port: self._gather(number, op, port) for port in block.reads}
                out = self._run(number, op, reads)
                for port, tensor in block.writes.items():
                    self._shape(block, op, port, tensor, out.get(port))
                if block.kind == "output_collect":
                    stream = reads["stream"][0]
                made.append(out)
                self.ops += 1
            self.outputs[number] = made
        self.length += 1 if self.draft.spec.workload.phase == "decode" else step_tokens(self.draft.spec, self.par).group
        return stream

    def _run(self, number: int, op: int, reads: Reads) -> Out:
        """One op. What arrives may be anything, as the plan may be wrong: an op that cannot compute with it says so."""
        try:
            return KINDS[self.graph.blocks[number].kind](self, number, op, reads)
        except WRONG as error:
            why = f"cannot compute with what arrives ({type(error).__name__}: {error})"
            raise Broken(self.name(number, op), why) from error

    def name(self, number: int, op: int) -> str:
        """Text id of an op."""
        return self.graph.op_id(number, op)

    def _gather(self, number: int, op: int, port: str) -> Members:
        """What an op reads on a port, for every member."""
        block = self.graph.blocks[number]
        found: Members = [[] for _ in range(block.ranks.shape[1])]
        place = self.places[id(block.ranks)][op]
        for edge in self.into[number]:
            if self.graph.edges[edge].into != port:
                continue
            for source in self.sources[edge].get(op, ()):
                self._carry(edge, source, number, op, place, found)
        if not any(found):
            raise Broken(self.name(number, op), f"nothing arrives on its port `{port}`")
        most = max(map(len, found))
        if most > 1 and block.kind not in _SEVERAL:
            raise Broken(self.name(number, op), f"{most} values arrive on its port `{port}`, which takes one")
        return found

    def _carry(self, number: int, source: int, target: int, op: int, place: dict[int, int], found: Members) -> None:
        """One edge: from the ranks of its source op to those of its target op."""
        edge = self.graph.edges[number]
        origin, block = self.graph.blocks[edge.source], self.graph.blocks[target]
        if edge.source not in self.outputs:
            raise Broken(self.name(target, op), f"reads {self.name(edge.source, source)}, which runs later")
        values = self.outputs[edge.source][source]
        if edge.out not in values:
            raise Broken(self.name(edge.source, source), f"writes nothing on `{edge.out}`")
        per_member = values[edge.out] if origin.collective else [values[edge.out]]
        kind = edge.pattern.partition(":")[0]
        shared = self.places[id(origin.ranks)][source].keys()
        for n, rank in enumerate(origin.ranks[source].tolist()):
            value = per_member[n]
            if value is None or (n and kind == "group" and not block.collective):
                continue  # of a replicated value one copy is read
            if kind == "rank" or (kind == "pairs" and (rank in place or not shared.isdisjoint(place))):
                if rank in place:
                    found[place[rank]].append(self._part(edge.tensor, value, rank, block, origin))
                continue
            if n and kind == "pairs" and not block.collective:
                continue
            to = [rank + int(edge.pattern.partition(":")[2])] if kind == "shift" else block.ranks[op].tolist()
            for there in to:
                if there in place:
                    found[place[there]].append(value)
                    if origin.kind != "input" and rank != there:
                        self.moved.edges[edge.comm] = self.moved.edges.get(edge.comm, 0) + value_bytes(
                            value, edge.tensor.dtype
                        )

    def _part(self, tensor: TensorType, value: Value, rank: int, block: OpBlock, origin: OpBlock) -> Value:
        """A rank's own part of a value: of the input its micro-batch, of a whole residual stream its shard of tokens."""
        if not isinstance(value, np.ndarray) or not tensor.shape or tensor.shape[0] == ROWS:
            return value
        if origin.kind == "input_split":
            size = step_tokens(self.draft.spec, self.par).group
            value = value[block.micro_batch * size : (block.micro_batch + 1) * size]
        rows = tensor.shape[0]
        if rows != len(value) and "tokens" in tensor.layout and rows * self.par.tp == len(value):
            return value[rank % self.par.tp * rows : (rank % self.par.tp + 1) * rows]
        return value

    def _shape(self, block: OpBlock, op: int, port: str, tensor: TensorType, made: Value) -> None:
        """What an op wrote must have the shape that the graph says."""
        for value in made if block.collective and isinstance(made, list) else [made]:
            if not isinstance(value, (np.ndarray, Rows, Routed)):
                continue
            want = tuple(len(value.shape) and value.shape[0] if n == ROWS else n for n in tensor.shape)
            if block.kind == "input_split":
                want = (value.shape[0], *want[1:])
            if value.shape != want:
                where = f"{block.name}.r{int(block.ranks[op, 0])}"
                raise Broken(where, f"wrote {value.shape} on `{port}`, where the graph says {tensor.text()}")

    def send(self, number: int, op: int, source: int, target: int, value: Value, dtype: str) -> None:
        """Count data of a collective from one member to another."""
        key = number, op
        if key not in self.moved.collectives:
            group = self.graph.blocks[number].ranks.shape[1]
            self.moved.collectives[key] = np.zeros((group, group), dtype=np.int64)
        if source != target or self.graph.blocks[number].kind in ("dispatch", "combine"):
            self.moved.collectives[key][source, target] += value_bytes(value, dtype)

    def one(self, reads: dict[str, Members], port: str) -> Value:
        """What a local op reads on a port, once."""
        return reads[port][0][0]


def value_bytes(value: Value, dtype: str) -> int:
    """Bytes of a value at a dtype of the spec."""
    array = (
        value.values if isinstance(value, Rows) else value.tokens if isinstance(value, Routed) else np.asarray(value)
    )
    return int(array.size) * DTYPE_BYTES[dtype]


def program_order(graph: PlanGraph) -> list[int]:
    """Blocks in an order in which everything is written before it is read."""
    waiting = [0] * len(graph.blocks)
    after: list[list[int]] = [[] for _ in graph.blocks]
    for edge in graph.edges:
        waiting[edge.target] += 1
        after[edge.source].append(edge.target)
    ready = deque(n for n, count in enumerate(waiting) if not count)
    order: list[int] = []
    while ready:
        number = ready.popleft()
        order.append(number)
        for target in after[number]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if len(order) < len(graph.blocks):
        stuck = next(n for n, count in enumerate(waiting) if count)
        raise Broken(graph.blocks[stuck].name, "waits for itself: the graph has a cycle")
    return order


def _sources(whole: Expanded, number: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for source, target in zip(*(part.tolist() for part in whole.pairs(number)), strict=True):
        found.setdefault(target, []).append(source)
    return found


# --- the kinds -------------------------------------------------------------------------------------------------------


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
        return {"qkv": np.concatenate([q.reshape(len(x), -1), first, second], axis=1)}
    return {"qkv": np.concatenate([q, first, second], axis=1)}


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
    return {"o": out}


def _attn_out(m: Machine, number: int, op: int, reads: Reads) -> Out:
    block = m.graph.blocks[number]
    w = _need(m, number, op, "attention", f"L{block.layer}.")
    y = np.einsum("thd,hde->te", m.one(reads, "o"), w["o"])
    return {"y": y + w["o_bias"] if "o_bias" in w and _rank(m, number, op) % block.split == 0 else y}


def _residual_add(m: Machine, number: int, op: int, reads: Reads) -> Out:
    h = m.one(reads, "y") + m.one(reads, "x")
    m.check(m.graph.blocks[number], op, h)
    return {"h": h}


def _up(item: str) -> Callable[[Machine, int, int, Reads], Out]:
    def run(m: Machine, number: int, op: int, reads: Reads) -> Out:
        x = _norm(m, number, op, m.one(reads, "h"), "mlp")
        return {"u": inner(x, _need(m, number, op, item, f"L{m.graph.blocks[number].layer}."))}

    return run


def _down(item: str) -> Callable[[Machine, int, int, Reads], Out]:
    def run(m: Machine, number: int, op: int, reads: Reads) -> Out:
        w = _need(m, number, op, item, f"L{m.graph.blocks[number].layer}.")
        return {"y": m.one(reads, "u") @ w["down"]}

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
        m.received[rank] = max(m.received[rank], sum(len(some.origin) for some in arrived.values()))
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
    y = inner(rows.values, w) @ w["down"]
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
        rank = int(block.ranks[op, source])
        m.returned[rank] = max(m.returned[rank], part.size)
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
    return {"x": [np.concatenate(values, axis=-1 if "vocab" in block.reads["x"].layout else 0)] * len(values)}


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
    return {"logits": x @ m.held[_rank(m, number, op)].head(m.model, _rank(m, number, op) % m.par.tp, m.par.tp)}


def _sample(m: Machine, number: int, op: int, reads: Reads) -> Out:
    logits = m.one(reads, "logits")[:, : m.model.vocab]
    m.check(m.graph.blocks[number], op, logits)
    return {"ids": logits.argmax(axis=1)}


def _output_collect(m: Machine, number: int, op: int, reads: Reads) -> Out:
    return {}


#: kinds whose ports take several values on a rank: results of several experts, of several micro-batches
_SEVERAL = frozenset({"input_split", "combine", "output_collect"})

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
