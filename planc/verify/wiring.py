"""Wiring: every op reads from the op that it should, in the right layer, micro-batch, turn and on the right ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import EdgeBlock, Expanded, OpBlock, PlanGraph
from planc.verify.mesh import stage_of
from planc.verify.plan import Draft
from planc.verify.structure import fault

_STREAM = "the residual stream"

#: role.port -> the role (and port, where it has several) that feeds it, in the same layer
_FEEDS: dict[str, str] = {
    "input_split.batch": "input",
    "embed.ids": "input_split",
    "attn_qkv.x": _STREAM,
    "attn_core.qkv": "attn_qkv",
    "attn_out.o": "attn_core",
    "attn_out sum.y": "attn_out",
    "attn_add.y": "attn_out sum",
    "attn_add.x": _STREAM,
    "dense_up.h": "attn_add",
    "dense_down.u": "dense_up",
    "dense_down sum.y": "dense_down",
    "dense_add.y": "dense_down sum",
    "dense_add.x": "attn_add",
    "gate.h": "attn_add",
    "shared_up.h": "attn_add",
    "shared_down.u": "shared_up",
    "shared_down sum.y": "shared_down",
    "dispatch.tokens": "gate.tokens",
    "expert.tokens": "dispatch",
    "expert.after": "expert.done",
    "expert sum.y": "expert.y",
    "combine.y": "expert sum",
    "aggregate.parts": "combine",
    "aggregate.weights": "gate.weights",
    "aggregate.h": "attn_add",
    "aggregate.shared": "shared_down sum",
    "layer output.x": "aggregate",
    "pp_send.x": _STREAM,
    "pp_recv.x": "pp_send",
    "lm_head.x": _STREAM,
    "logits.x": "lm_head",
    "sample.logits": "logits",
}


class _Roles:
    """What a block does in its layer: its kind, except that sums, adds and gathers are told apart by what feeds them."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.graph, self.par = draft, draft.blocks, draft.parallelism
        self._feeder = {(e.target, e.into): e.source for e in reversed(self.graph.edges)}
        self.of = [self._role(i) for i in range(len(self.graph.blocks))]

    def _role(self, index: int) -> str:
        block = self.graph.blocks[index]
        if block.kind in ("all_gather", "broadcast"):
            return "logits" if block.layer is None else "layer output"
        if block.kind not in ("all_reduce", "reduce_scatter", "residual_add"):
            return block.kind
        origin = self._feeder.get((index, "y"))
        if (
            origin is not None
            and block.kind == "residual_add"
            and self.graph.blocks[origin].kind in ("all_reduce", "reduce_scatter")
        ):
            origin = self._feeder.get((origin, "y"))
        kind = "nothing" if origin is None else self.graph.blocks[origin].kind
        if block.kind == "residual_add":
            return {"attn_out": "attn_add", "dense_down": "dense_add"}.get(kind, "residual_add")
        return f"{kind} sum"

    def whole(self, role: str) -> str:
        """The role that holds the sum or gather of ``role``: itself where one rank has all of it."""
        width = {"expert sum": self.par.expert_tp, "shared_down sum": self.par.tp if self.par.leaders_gate else 1}
        if width.get(role, self.par.tp) > 1:
            return role
        alone = {"logits": "lm_head", "layer output": "aggregate", "expert sum": "expert.y"}
        return alone.get(role, role.removesuffix(" sum"))

    def wanted(self, index: int, port: str) -> tuple[str, int | None]:
        """(role, layer) of what must feed a port; for ``pp_recv`` the stage stands in place of the layer."""
        block, role = self.graph.blocks[index], self.of[index]
        if block.kind == "output_collect":
            if self.draft.spec.model.vocab:
                return "sample", None
            return self._layer_output(self.draft.spec.model.layers - 1)
        feed = _FEEDS.get(f"{role}.{port}", "nothing")
        if feed != _STREAM:
            return (self.whole(feed) if feed.endswith(" sum") or feed == "logits" else feed), block.layer
        if block.layer is None:  # pp_send and lm_head read what the last layer of their stage wrote
            return self._layer_output(self.par.stages[stage_of(block, self.par)][1] - 1)
        if block.layer == 0:
            return ("embed" if self.draft.spec.model.vocab else "input_split"), None
        stage = self.par.stage_of_layer(block.layer)
        if block.layer == self.par.stages[stage][0]:
            return "pp_recv", stage
        return self._layer_output(block.layer - 1)

    def _layer_output(self, layer: int) -> tuple[str, int | None]:
        return (self.whole("layer output") if layer in self.draft.spec.model.moe_layer_ids else "dense_add"), layer


def check_sources(draft: Draft) -> Iterator[Diagnostic]:
    """PLN314: an edge comes from the op that its target's kind reads, in the target's layer and micro-batch; the
    residual stream comes from the layer before. PLN310: an expert's turn waits for the turn before."""
    roles, blocks = _Roles(draft), draft.blocks.blocks
    for edge in draft.blocks.edges:
        source, target = blocks[edge.source], blocks[edge.target]
        role, place = roles.wanted(edge.target, edge.into)
        have = roles.of[edge.source] + (f".{edge.out}" if "." in role else "")
        at = stage_of(source, roles.par) if role == "pp_recv" else source.layer
        if (have, at) != (role, place):
            where = "" if place is None else f" of stage {place}" if role == "pp_recv" else f" of layer {place}"
            message = f"{target.name} reads {edge.into} from {source.name}.{edge.out}; it needs {role}{where}"
            yield fault("PLN314", message, target.name)
        elif (
            source.micro_batch != target.micro_batch
            and source.kind != "input_split"
            and target.kind != "output_collect"
        ):
            message = f"{target.name} reads {edge.into} from {source.name}, which belongs to another micro-batch"
            yield fault("PLN314", message, target.name)
        elif (
            source.slot != target.slot - (edge.into == "after")
            and role.startswith("expert.")
            and target.kind != "combine"
        ):
            message = f"{target.name}, of turn {target.slot}, reads {edge.into} of turn {source.slot}"
            yield fault("PLN314", message, target.name)
    yield from _check_presence(draft)


def _check_presence(draft: Draft) -> Iterator[Diagnostic]:
    """What no edge shows because it is absent: micro-batches, shared experts, and the order of an expert's turns."""
    blocks, moe = draft.blocks.blocks, draft.spec.model.moe
    ends = {e.target for e in draft.blocks.edges if blocks[e.target].kind == "output_collect"}
    for end in ends:
        found = {blocks[e.source].micro_batch for e in draft.blocks.edges if e.target == end}
        missing = sorted(set(range(draft.spec.workload.micro_batches)) - found)
        if missing:
            yield fault("PLN314", f"micro-batch {missing[0]} never reaches {blocks[end].name}", blocks[end].name)
    for block in blocks:
        if block.kind == "aggregate" and moe is not None and ("shared" in block.reads) != bool(moe.shared_width):
            word = "lacks" if moe.shared_width else "has"
            yield fault("PLN314", f"{block.name} {word} the output of shared experts", block.name)
        if block.kind == "expert" and block.slot and "after" not in block.reads:
            message = (
                f"{block.name} does not wait for turn {block.slot - 1}, so two experts of a GPU may compute at once"
            )
            yield fault("PLN310", message, block.name)


def comm_class(source: OpBlock, target: OpBlock) -> str:
    """The class of an edge between these blocks if its data moves between ranks."""
    kinds = {source.kind, target.kind}
    if kinds & {"input_split", "output_collect"}:
        return "dp"
    if target.kind == "pp_recv":
        return "pp"
    return "dispatch" if "dispatch" in kinds else "combine" if "combine" in kinds else "tp"


def check_joins(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN314: an edge stays on its rank or joins a rank with a group it is in. Only the ends of the step and the
    hand-over between stages, ep ranks further, join others."""
    graph, par = draft.blocks, draft.parallelism
    for number, edge in enumerate(graph.edges):
        left, right = graph.blocks[edge.source], graph.blocks[edge.target]
        if edge.pattern == "rank" or right.kind in ("input_split", "output_collect"):
            continue  # ops that share a rank, by definition; the ends of the step
        source, target = expanded.pairs(number)
        a, b = left.ranks[source], right.ranks[target]
        apart = (a[:, 0] > b[:, -1]) | (b[:, 0] > a[:, -1])  # groups are runs of ranks: see `check_ranks`
        wrong = np.flatnonzero(b[:, 0] != a[:, 0] + par.ep if right.kind == "pp_recv" else apart)
        if len(wrong):
            text = _edge_text(graph, edge, expanded, number, int(wrong[0]))
            yield fault(
                "PLN314", f"{text} joins ranks that do not belong together ({len(wrong)} such edges)", right.name
            )


def check_communication(draft: Draft, expanded: Expanded) -> Iterator[Diagnostic]:
    """PLN309: an edge is marked as communication, and with its class, exactly when its ends do not run on the same
    ranks."""
    graph = draft.blocks
    for number, edge in enumerate(graph.edges):
        left, right = graph.blocks[edge.source], graph.blocks[edge.target]
        source, target = expanded.pairs(number)
        widths = left.ranks.shape[1], right.ranks.shape[1]
        if widths[0] != widths[1] or edge.pattern == "rank":
            moves = np.full(len(source), widths[0] != widths[1])
        else:
            moves = (left.ranks[source] != right.ranks[target]).any(axis=1)
        wrong = np.flatnonzero(moves != bool(edge.comm))
        want = comm_class(left, right)
        if len(wrong):
            text = _edge_text(graph, edge, expanded, number, int(wrong[0]))
            word = (
                "is not marked as communication but its ranks differ"
                if moves[wrong[0]]
                else "is marked as communication on one rank"
            )
            yield fault("PLN309", f"{text} {word} ({len(wrong)} such edges)", left.name)
        elif edge.comm and edge.comm != want and len(moves):
            text = _edge_text(graph, edge, expanded, number, 0)
            yield fault("PLN309", f"{text} is marked as {edge.comm} communication; it is {want}", left.name)


def _edge_text(graph: PlanGraph, edge: EdgeBlock, expanded: Expanded, number: int, which: int) -> str:
    source, target = expanded.pairs(number)
    return f"{graph.op_id(edge.source, int(source[which]))} -> {graph.op_id(edge.target, int(target[which]))}"
