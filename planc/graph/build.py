"""The step's graph from a placement: one block per op kind, layer and micro-batch, in the order data flows.

The norm before a block of a layer is part of every op that reads the residual stream for it (attn_qkv, dense_up,
gate, shared_up), so that no op of a few microseconds clutters the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planc.graph.types import ROWS, Comm, EdgeBlock, OpBlock, PlanGraph, TensorType
from planc.placement import Parallelism, Placement, copy_tokens, step_tokens
from planc.spec import Spec

ORDER = TensorType((0,), "int32")  #: what an order edge carries: nothing, it only says "after"


@dataclass(frozen=True, slots=True)
class _Port:
    """A tensor that some block writes."""

    block: int
    name: str


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that others are copies of: the block ``before`` it, its ``first`` block, its blocks' names without what says which
    layer and micro-batch they are of, the edges into them, and what it writes."""

    before: int
    first: int
    names: list[str]
    edges: list[EdgeBlock]
    out: _Port


def build_graph(spec: Spec, par: Parallelism, placement: Placement) -> PlanGraph:
    """Blocks and edges of one decode or prefill step, micro-batch after micro-batch."""
    builder = _Builder(spec, par, placement)
    split = builder.input()
    ends = [builder.micro_batch(split, mb) for mb in range(spec.workload.micro_batches)]
    builder.output(ends)
    return PlanGraph(tuple(builder.blocks), tuple(builder.edges), par.world_size)


class _Builder:
    """Collects blocks and edges; every method adds the blocks of one part of the step and returns what it writes."""

    def __init__(self, spec: Spec, par: Parallelism, placement: Placement) -> None:
        self.spec, self.par, self.placement, self.model = spec, par, placement, spec.model
        self.tokens = step_tokens(spec, par)
        self.act = spec.model.dtype_of("activations")
        self.blocks: list[OpBlock] = []
        self.edges: list[EdgeBlock] = []
        self.prefix = ""
        self.layer: int | None = None
        self.mb = 0
        #: [dp · ep, 1] ranks, [dp · attention_dp, tp] TP groups, [dp, ep] EP groups of the current stage
        self.each = self.groups = self.ep_groups = self.leaders = np.zeros((0, 1), dtype=np.int32)
        self._stages: dict[int, tuple[np.ndarray, ...]] = {}
        self._rows: dict[tuple[int, int, int], tuple[np.ndarray, ...]] = {}
        self._layers: dict[tuple[object, ...], _Layer] = {}

    # --- plumbing -----------------------------------------------------------------------------------------------

    def stage(self, stage: int) -> None:
        """Make ``stage`` the one that following blocks run on. Its blocks share these arrays, and what follows from them."""
        if stage not in self._stages:
            ep_groups = self.par.stage_ranks(stage)
            groups = ep_groups.reshape(-1, self.par.tp)
            self._stages[stage] = ep_groups, ep_groups.reshape(-1, 1), groups, groups[:, :1]
        self.ep_groups, self.each, self.groups, self.leaders = self._stages[stage]

    @property
    def gating(self) -> np.ndarray:
        return self.leaders if self.par.leaders_gate else self.each

    def hidden(self, tokens: int, layout: str = "R", dtype: str = "") -> TensorType:
        return TensorType((tokens, self.model.hidden), dtype or self.act, layout)

    @property
    def full(self) -> TensorType:
        """The residual stream of a TP group on each of its ranks."""
        return self.hidden(self.tokens.group)

    @property
    def source(self) -> TensorType:
        """The tokens that a gating rank routes: the group's, or its shard of them."""
        return self.hidden(self.tokens.source, "R" if self.par.leaders_gate or self.par.tp == 1 else "S(tokens)")

    def add(
        self,
        name: str,
        kind: str,
        ranks: np.ndarray,
        reads: dict[str, tuple[_Port, TensorType]],
        writes: dict[str, TensorType],
        *,
        comm: Comm = "tp",
        split: int = 1,
        slot: int = 0,
        rows: np.ndarray | None = None,
        experts: np.ndarray | None = None,
        pattern: str = "rank",
    ) -> int:
        """Add a block and the edges of its reads. ``comm`` is the class of those edges that are communication."""
        layer = "" if self.layer is None else f"L{self.layer}."
        types = {port: tensor for port, (_, tensor) in reads.items()}
        block = OpBlock(
            self.prefix + layer + name, kind, ranks, self.layer, self.mb, slot, split, types, writes, rows, experts
        )
        self.blocks.append(block)
        for port, (origin, tensor) in reads.items():
            self.connect(origin, len(self.blocks) - 1, port, tensor, comm, pattern)
        return len(self.blocks) - 1

    def connect(
        self, origin: _Port, target: int, port: str, tensor: TensorType, comm: Comm, pattern: str = "rank"
    ) -> None:
        """Add an edge block; it is communication when one of its ends is a group, or the pattern leaves the rank."""
        widths = self.blocks[origin.block].ranks.shape[1], self.blocks[target].ranks.shape[1]
        moves = pattern != "rank" or widths[0] != widths[1]
        self.edges.append(EdgeBlock(origin.block, origin.name, target, port, tensor, pattern, comm if moves else ""))

    # --- the ends of the step -----------------------------------------------------------------------------------

    def input(self) -> _Port:
        """The request batch on rank 0, and its scatter over each replica's first stage."""
        self.stage(0)
        per_replica = self.tokens.group * self.par.attention_dp * self.spec.workload.micro_batches
        part = TensorType(self._entry(per_replica).shape, self._entry(per_replica).dtype, "S(batch)")
        zero = np.zeros((1, 1), dtype=np.int32)
        root = self.add("input", "input", zero, {}, {"batch": part})
        split = self.add(
            "input_split",
            "input_split",
            self.ep_groups,
            {"batch": (_Port(root, "batch"), part)},
            {"x": self._entry(self.tokens.group)},
            comm="dp",
            pattern=f"group:{self.par.world_size}" if self.par.ep > 1 or self.par.dp > 1 else "rank",
        )
        if self.par.ep == 1 and self.par.dp > 1:  # replica 0's group is rank 0 itself
            self.connect(_Port(root, "batch"), split, "batch", part, "dp")
        return _Port(split, "x")

    def _entry(self, tokens: int) -> TensorType:
        """What enters the model: token ids, or hidden states when the spec gives no vocabulary."""
        return TensorType((tokens,), "int32") if self.model.vocab else self.hidden(tokens)

    def micro_batch(self, split: _Port, mb: int) -> _Port:
        """All layers for one micro-batch; returns what output_collect reads."""
        self.mb = mb
        self.prefix = f"m{mb}." if self.spec.workload.micro_batches > 1 else ""
        self.layer = None
        self.stage(0)
        x = split
        if self.model.vocab:
            reads = {"ids": (split, self._entry(self.tokens.group))}
            x = _Port(self.add("embed", "embed", self.each, reads, {"x": self.full}, comm="dp"), "x")
        for stage, (first, end) in enumerate(self.par.stages):
            if stage:
                x = self._hand_over(x, stage)
            for layer in range(first, end):
                self.layer = layer
                x = self._next_layer(x)
            self.layer = None
        return self._head(x) if self.model.vocab else x

    def _hand_over(self, x: _Port, stage: int) -> _Port:
        reads = {"x": (x, self.full)}
        send = self.add(f"S{stage - 1}.pp_send", "pp_send", self.each, reads, {"x": self.full})
        self.stage(stage)
        reads = {"x": (_Port(send, "x"), self.full)}
        pattern = f"shift:{self.par.ep}"
        recv = self.add(f"S{stage}.pp_recv", "pp_recv", self.each, reads, {"x": self.full}, comm="pp", pattern=pattern)
        return _Port(recv, "x")

    def _head(self, x: _Port) -> _Port:
        tp, n = self.par.tp, self.tokens.logits
        shard = -(-self.model.vocab // tp)
        part = TensorType((n, shard), self.act, "S(vocab)" if tp > 1 else "R")
        port = _Port(
            self.add("lm_head", "lm_head", self.each, {"x": (x, self.full)}, {"logits": part}, split=tp), "logits"
        )
        whole = TensorType((n, shard * tp), self.act)
        if tp > 1:
            gather = self.add(
                "logits_all_gather", "all_gather", self.groups, {"x": (port, part)}, {"x": whole}, split=tp
            )
            port = _Port(gather, "x")
        ids = TensorType((n,), "int32")
        return _Port(self.add("sample", "sample", self.leaders, {"logits": (port, whole)}, {"ids": ids}), "ids")

    def output(self, ends: list[_Port]) -> None:
        """One stream of token ids (or hidden states) on the first rank of the last stage."""
        self.prefix, self.layer, self.mb = "", None, 0
        tensor = self.blocks[ends[0].block].writes[ends[0].name]
        first = np.array([[self.par.stage_ranks(self.par.pp - 1)[0, 0]]], dtype=np.int32)
        total = self.add("output_collect", "output_collect", first, {}, {})
        self.blocks[total] = OpBlock("output_collect", "output_collect", first, reads={"stream": tensor})
        for end in ends:
            ranks = self.blocks[end.block].ranks
            if ranks.shape[1] == 1:
                self.connect(end, total, "stream", tensor, "dp")
            if ranks.shape[1] > 1 or len(ranks) > 1:
                self.connect(end, total, "stream", tensor, "dp", f"group:{self.par.world_size}")

    # --- one layer ----------------------------------------------------------------------------------------------

    def _next_layer(self, x: _Port) -> _Port:
        """The current layer, as a copy of one alike where there is: most of a model's layers are."""
        part, before = self.placement.layers.get(self.layer or 0), self.blocks[x.block].kind
        key = id(self.each), id(part), before, x.name, self.layer == self.model.layers - 1
        if key in self._layers:
            return self._copied(self._layers[key], x)
        blocks, edges = len(self.blocks), len(self.edges)
        out = self._dense(x) if part is None else self._moe(x)
        start = len(f"{self.prefix}L{self.layer}.")
        names = [block.name[start:] for block in self.blocks[blocks:]]
        self._layers[key] = _Layer(x.block, blocks, names, self.edges[edges:], out)
        return out

    def _copied(self, like: _Layer, x: _Port) -> _Port:
        later, prefix = len(self.blocks) - like.first, f"{self.prefix}L{self.layer}."
        for name, b in zip(like.names, self.blocks[like.first : like.first + len(like.names)], strict=True):
            self.blocks.append(
                OpBlock(
                    prefix + name,
                    b.kind,
                    b.ranks,
                    self.layer,
                    self.mb,
                    b.slot,
                    b.split,
                    b.reads,
                    b.writes,
                    b.rows,
                    b.experts,
                )
            )
        for e in like.edges:
            source = x.block if e.source == like.before else e.source + later
            self.edges.append(EdgeBlock(source, e.out, e.target + later, e.into, e.tensor, e.pattern, e.comm))
        return _Port(like.out.block + later, like.out.name)

    def _attention(self, x: _Port, ranks: np.ndarray, scatter: bool) -> _Port:
        """Attention and its residual. ``ranks`` need the sum; ``scatter`` leaves each its shard of the tokens."""
        a, tp, t = self.model.attention, self.par.tp, self.tokens.group
        heads = a.heads // tp
        layout = "S(heads)" if tp > 1 else "R"
        if a.kind == "mla":
            qkv = TensorType((t, heads * a.q_head_dim + a.kv_width), self.act, layout)
        else:
            qkv = TensorType((t, heads + 2 * max(1, a.kv_head_count // tp), a.head_dim), self.act, layout)
        inner = TensorType((t, heads, a.out_head_dim), self.act, layout)
        comm: Comm = "dp" if self.blocks[x.block].kind == "input_split" else "tp"
        first = self.add("attn_qkv", "attn_qkv", self.each, {"x": (x, self.full)}, {"qkv": qkv}, split=tp, comm=comm)
        core = self.add(
            "attn_core", "attn_core", self.each, {"qkv": (_Port(first, "qkv"), qkv)}, {"o": inner}, split=tp
        )
        y = self._projected("attn", "attn_out", "o", _Port(core, "o"), inner, scatter)
        kept = self.source if scatter else self.full
        reads = {"y": (y, kept)}
        add = self.add("attn_add", "residual_add", ranks, reads, {"h": kept})
        self.connect(x, self._declare(add, "x", kept), "x", kept, comm)
        return _Port(add, "h")

    def _declare(self, block: int, port: str, tensor: TensorType) -> int:
        """Add a read to a block already there; returns the block."""
        b = self.blocks[block]
        self.blocks[block] = replace(b, reads={**b.reads, port: tensor})
        return block

    def _projected(
        self, part: str, kind: str, port: str, origin: _Port, inner: TensorType, scatter: bool = False
    ) -> _Port:
        """A row-parallel projection back to hidden, and the reduction of its partial sums over the TP group."""
        tp = self.par.tp
        partial = self.hidden(self.tokens.group, "P" if tp > 1 else "R")
        down = self.add(kind, kind, self.each, {port: (origin, inner)}, {"y": partial}, split=tp)
        if tp == 1:
            return _Port(down, "y")
        what = "reduce_scatter" if scatter else "all_reduce"
        whole = self.source if scatter else self.full
        reads = {"y": (_Port(down, "y"), partial)}
        return _Port(self.add(f"{part}_{what}", what, self.groups, reads, {"y": whole}, split=tp), "y")

    def _dense(self, x: _Port) -> _Port:
        mlp, tp, t = self.model.dense_mlp, self.par.tp, self.tokens.group
        assert mlp is not None
        h = self._attention(x, self.each, scatter=False)
        inner = TensorType((t, mlp.intermediate // tp), self.act, "S(width)" if tp > 1 else "R")
        up = self.add("dense_up", "dense_up", self.each, {"h": (h, self.full)}, {"u": inner}, split=tp)
        y = self._projected("dense", "dense_down", "u", _Port(up, "u"), inner)
        # the last sum of a model without a head is read by output_collect alone, from one rank of each group
        last = self.layer == self.model.layers - 1 and not self.model.vocab
        ranks = self.leaders if last else self.each
        return _Port(
            self.add("dense_add", "residual_add", ranks, {"y": (y, self.full), "x": (h, self.full)}, {"h": self.full}),
            "h",
        )

    def _moe(self, x: _Port) -> _Port:
        moe, par, layer = self.model.moe, self.par, self.layer
        assert moe is not None and layer is not None
        scatter = par.tp_comm == "reduce_scatter" and par.tp > 1
        on_all = par.leaders_gate and moe.shared_width  # a TP-sharded shared expert reads the sum on every rank
        h = self._attention(x, self.each if on_all else self.gating, scatter)
        source, k = self.source, moe.top_k
        choice = TensorType((self.tokens.source, k), "fp32", source.layout)
        gate = self.add("gate", "gate", self.gating, {"h": (h, source)}, {"tokens": source, "weights": choice})
        rows = TensorType((ROWS, self.model.hidden), self.model.dtype_of("dispatch"), "S(experts)")
        reads = {"tokens": (_Port(gate, "tokens"), source)}
        dispatch = self.add("dispatch", "dispatch", self.ep_groups, reads, {"tokens": rows}, comm="dispatch")
        outputs = self._experts(_Port(dispatch, "tokens"), rows)
        back = TensorType((ROWS, self.model.hidden), self.model.dtype_of("combine"), "S(experts)")
        returned = TensorType(
            (self.tokens.source * k, self.model.hidden), self.model.dtype_of("combine"), source.layout
        )
        combine = self.add("combine", "combine", self.ep_groups, {}, {"parts": returned})
        self._declare(combine, "y", back)
        for output in outputs:
            self.connect(output, combine, "y", back, "combine")
        inputs = {"parts": (_Port(combine, "parts"), returned)}
        local = {"weights": (_Port(gate, "weights"), choice), "h": (h, source)}
        if moe.shared_width:
            local["shared"] = self._shared(h)
        total = self.add("aggregate", "aggregate", self.gating, inputs, {"x": source}, comm="combine")
        for port, (origin, tensor) in local.items():
            self.connect(origin, self._declare(total, port, tensor), port, tensor, "tp")
        return self._whole_again(_Port(total, "x"))

    def _whole_again(self, x: _Port) -> _Port:
        """From the gating ranks back to every rank of the TP group."""
        if self.par.tp == 1:
            return x
        kind = "broadcast" if self.par.leaders_gate else "all_gather"
        reads = {"x": (x, self.source)}
        block = self.add(f"moe_{kind}", kind, self.groups, reads, {"x": self.full}, split=self.par.tp)
        return _Port(block, "x")

    def _experts(self, tokens: _Port, rows: TensorType) -> list[_Port]:
        """The expert ops, a block per turn; returns what combine reads."""
        assert self.layer is not None
        part, width = self.placement.layers[self.layer], self.par.expert_tp
        outputs: list[_Port] = []
        previous: _Port | None = None
        back = TensorType(rows.shape, self.model.dtype_of("combine"), "P" if width > 1 else "S(experts)")
        for slot in range(part.rounds):
            shards, counts, experts, groups, group_counts = self._slot(slot)
            name = "expert" if part.rounds == 1 else f"expert.s{slot}"
            block = self.add(
                name,
                "expert",
                shards,
                {"tokens": (tokens, rows)},
                {"y": back, "done": ORDER},
                comm="dispatch",
                split=width,
                slot=slot,
                rows=counts,
                experts=experts,
            )
            if previous is not None:  # at most one expert computes at a time on a rank
                self.connect(previous, self._declare(block, "after", ORDER), "after", ORDER, "")
            previous = _Port(block, "done")
            if width == 1:
                outputs.append(_Port(block, "y"))
                continue
            whole = TensorType(rows.shape, back.dtype, "S(experts)")
            reduced = self.add(
                f"{name}_all_reduce",
                "all_reduce",
                groups,
                {"y": (_Port(block, "y"), back)},
                {"y": whole},
                split=width,
                slot=slot,
                rows=group_counts,
            )
            outputs.append(_Port(reduced, "y"))
        return outputs

    def _slot(self, slot: int) -> tuple[np.ndarray, ...]:
        """One turn's ops over all replicas: shard ranks [n · expert_tp, 1] with rows and experts, and shard groups
        [n, expert_tp] with rows. Layers with one placement on one stage share these arrays."""
        assert self.layer is not None
        part, width = self.placement.layers[self.layer], self.par.expert_tp
        key = (int(self.ep_groups[0, 0]), id(part), slot)
        if key in self._rows:
            return self._rows[key]
        chosen = np.flatnonzero(part.slot == slot)
        chosen = chosen[np.argsort(part.rank[chosen], kind="stable")]
        tokens = copy_tokens(self.spec, self.par, self.placement, self.layer)[chosen]
        firsts = (self.ep_groups[:, :1] + part.rank[chosen]).reshape(-1)
        groups = firsts[:, None] + np.arange(width, dtype=np.int32)
        group_counts = np.tile(tokens, self.par.dp)
        experts = np.tile(part.expert[chosen], self.par.dp)
        made = (groups.reshape(-1, 1), np.repeat(group_counts, width), np.repeat(experts, width), groups, group_counts)
        self._rows[key] = made
        return made

    def _shared(self, h: _Port) -> tuple[_Port, TensorType]:
        """The shared experts on the tokens' own ranks; with leader gating sharded over the TP group."""
        moe = self.model.moe
        assert moe is not None
        tp = self.par.tp if self.par.leaders_gate else 1
        tokens = self.full if self.par.leaders_gate else self.source
        inner = TensorType((tokens.shape[0], moe.shared_width // tp), self.act, "S(width)" if tp > 1 else tokens.layout)
        up = self.add("shared_up", "shared_up", self.each, {"h": (h, tokens)}, {"u": inner}, split=tp)
        out = self.hidden(tokens.shape[0], "P" if tp > 1 else tokens.layout)
        down = self.add("shared_down", "shared_down", self.each, {"u": (_Port(up, "u"), inner)}, {"y": out}, split=tp)
        if tp == 1:
            return _Port(down, "y"), tokens
        reads = {"y": (_Port(down, "y"), out)}
        reduced = self.add("shared_all_reduce", "all_reduce", self.groups, reads, {"y": self.full}, split=tp)
        return _Port(reduced, "y"), self.full
