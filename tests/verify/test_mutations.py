"""The verifier, rule by rule: a good plan is broken in one way, and exactly that code must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from breaking import (
    SPECS,
    block,
    changed_at,
    copies_changed,
    copies_changed_unbuilt,
    copy_idle,
    dead_gate,
    edge,
    experts_of,
    fewer_tokens,
    good,
    longer_prompts,
    parallel,
    replaced,
    rows_moved,
    rows_of,
    rule_of,
    second_reduction,
    shifted_experts,
    skipped_layer,
    smaller_gpus,
    swapped,
    table_changed,
    targets_swapped,
    unreduced,
    unsplit_attention,
    with_block,
    with_blocks,
    with_edge,
    with_edges,
    with_pairs,
    with_reads,
    with_tensor,
    without_blocks,
    without_edge,
)

import planc
from planc.placement import layer_placement
from planc.verify import Draft
from planc.verify.verify import RULES, faults


class Mutation(NamedTuple):
    """What is broken in which plan, and the one code that says so."""

    what: str
    plan: str
    change: Callable[[Draft], Draft]
    code: str


# fmt: off
MUTATIONS = [
    # cycles
    Mutation("blocks wait for each other through an edge of no ops", "leader",
             lambda d: with_edges(d, replace(edge(d, "L0.moe_broadcast", "L1.attn_qkv"), target=d.blocks.by_name["L0.attn_qkv"],
                                             pattern="pairs", pairs=np.zeros((0, 2), dtype=np.int64))), "PLN301"),
    Mutation("a TP group's sum feeds an earlier op of another group", "leader",
             lambda d: with_edges(d, replace(edge(d, "L0.moe_broadcast", "L1.attn_qkv"), source=d.blocks.by_name["L0.attn_add"],
                                             out="h", target=d.blocks.by_name["L0.attn_qkv"], comm="tp", pattern="pairs",
                                             pairs=np.array([[1, 0]]))), "PLN301"),
    Mutation("the last layer feeds the first", "leader",
             lambda d: with_edge(d, "input_split", "L0.attn_qkv", source="L3.moe_broadcast", comm="tp"), "PLN302"),
    Mutation("one op feeds an earlier op of its rank", "sharded",
             lambda d: with_edges(d, replace(edge(d, "embed", "L0.attn_qkv"), source=d.blocks.by_name["L0.dense_add"], out="h",
                                             pattern="pairs", pairs=np.array([[3, 3]]))), "PLN302"),
    Mutation("an op feeds itself", "leader",
             lambda d: with_edges(d, replace(edge(d, "L0.attn_add", "L0.gate"), target=d.blocks.by_name["L0.attn_add"],
                                             into="x", pattern="pairs", pairs=np.array([[0, 0]]))), "PLN302"),
    # connectivity
    Mutation("a gate whose choices nobody reads", "leader", dead_gate, "PLN303"),
    Mutation("a TP group whose result is not collected", "leader",
             lambda d: with_pairs(d, "L3.moe_broadcast", "output_collect", lambda p: p[1:]), "PLN303"),
    Mutation("tokens of one rank that are not collected", "turns",
             lambda d: replace(d, blocks=replace(d.blocks, edges=tuple(
                 replace(e, pattern="pairs", pairs=np.array([[i, 0] for i in range(1, 7)])) if e.pattern == "group:8"
                 and d.blocks.blocks[e.source].name == "m1.L1.aggregate" else e for e in d.blocks.edges))), "PLN303"),
    Mutation("two inputs", "leader", lambda d: with_blocks(d, replace(block(d, "input"), name="input2")), "PLN303"),
    Mutation("two outputs", "leader",
             lambda d: with_edges(with_blocks(d, replace(block(d, "output_collect"), name="end")),
                                  replace(edge(d, "L3.moe_broadcast", "output_collect"), target=len(d.blocks.blocks))), "PLN303"),
    # shapes
    Mutation("an edge of another shape", "leader",
             lambda d: with_edge(d, "L0.attn_core", "L0.attn_out",
                                 tensor=replace(edge(d, "L0.attn_core", "L0.attn_out").tensor, shape=(8, 16, 64))), "PLN304"),
    Mutation("an op writes another shape than its edge carries", "leader",
             lambda d: with_tensor(d, "L0.attn_out", "y", everywhere=False, shape=(8, 7169)), "PLN304"),
    Mutation("fewer heads, consistently", "leader", lambda d: with_tensor(d, "L0.attn_qkv", "qkv", shape=(8, 47, 128)), "PLN304"),
    Mutation("a gate that chooses one expert too many", "leader",
             lambda d: with_tensor(d, "L0.gate", "weights", shape=(8, 3)), "PLN304"),
    Mutation("a wrong number of dimensions", "leader", lambda d: with_tensor(d, "L0.attn_core", "o", shape=(8, 2048)), "PLN304"),
    Mutation("a vocabulary shard too narrow", "sharded", lambda d: with_tensor(d, "lm_head", "logits", shape=(16, 50)), "PLN304"),
    Mutation("a quarter of the tokens in every op", "dense", fewer_tokens, "PLN304"),
    Mutation("another shard degree", "leader", lambda d: with_block(d, "L0.attn_core", split=4), "PLN304"),
    Mutation("every rank computes all heads", "leader", unsplit_attention, "PLN304"),
    Mutation("expert shards and their sum disagree on rows", "shards",
             lambda d: rows_moved(d, "L0.expert.s0_all_reduce"), "PLN304"),
    Mutation("samples for half of the tokens", "sharded", lambda d: with_tensor(d, "sample", "ids", shape=(8,)), "PLN304"),
    Mutation("an expert that reads whole batches, not its rows", "idle",
             lambda d: with_tensor(d, "L0.dispatch", "tokens", shape=(16, 64)), "PLN304"),
    # dtypes
    Mutation("an edge of another dtype", "leader",
             lambda d: with_edge(d, "L0.dispatch", "L0.expert",
                                 tensor=replace(edge(d, "L0.dispatch", "L0.expert").tensor, dtype="fp8")), "PLN305"),
    Mutation("an op writes another dtype", "leader",
             lambda d: with_tensor(d, "L1.attn_add", "h", everywhere=False, dtype="fp32"), "PLN305"),
    Mutation("tokens in a dtype that the model does not have, consistently", "leader",
             lambda d: with_tensor(with_tensor(d, "L0.attn_qkv", "qkv", dtype="bf16"), "L0.attn_core", "o", dtype="bf16"), "PLN305"),
    Mutation("dispatch in fp8 though the model says otherwise", "idle",
             lambda d: with_tensor(d, "L0.dispatch", "tokens", dtype="fp8"), "PLN305"),
    # layouts
    Mutation("an edge of another layout", "leader",
             lambda d: with_edge(d, "L0.attn_qkv", "L0.attn_core",
                                 tensor=replace(edge(d, "L0.attn_qkv", "L0.attn_core").tensor, layout="R")), "PLN306"),
    Mutation("an op reads another layout", "leader",
             lambda d: with_reads(d, "L0.gate", h=replace(block(d, "L0.gate").reads["h"], layout="S(tokens)")), "PLN306"),
    Mutation("a head shard called replicated, consistently", "leader",
             lambda d: with_tensor(d, "L0.attn_qkv", "qkv", layout="R"), "PLN306"),
    Mutation("a sum called a shard of the tokens, consistently", "leader",
             lambda d: with_tensor(d, "L0.attn_all_reduce", "y", layout="S(tokens)"), "PLN306"),
    Mutation("a gather of what is whole", "sharded",
             lambda d: with_tensor(d, "L1.aggregate", "x", layout="R"), "PLN306"),
    # partial sums
    Mutation("a partial sum read before its reduction", "leader", unreduced, "PLN307"),
    Mutation("a partial sum reduced twice", "leader", second_reduction, "PLN307"),
    Mutation("a row-parallel product called whole, consistently", "leader",
             lambda d: with_tensor(d, "L0.attn_out", "y", layout="R"), "PLN307"),
    Mutation("expert shards whose sum is called whole", "shards",
             lambda d: with_tensor(d, "L0.expert.s0", "y", layout="S(experts)"), "PLN307"),
    Mutation("a shard of shared experts called whole", "shards",
             lambda d: with_tensor(d, "L1.shared_down", "y", layout="R"), "PLN307"),
    # GPUs
    Mutation("a rank outside the world", "leader",
             lambda d: with_block(d, "L0.attn_core", ranks=changed_at(block(d, "L0.attn_core").ranks, 63, 64)), "PLN308"),
    Mutation("a negative rank", "leader",
             lambda d: with_block(d, "L0.gate", ranks=changed_at(block(d, "L0.gate").ranks, 0, -1)), "PLN308"),
    Mutation("a block without GPUs", "idle",
             lambda d: with_block(d, "L0.attn_core", ranks=np.zeros((0, 1), dtype=np.int32)), "PLN308"),
    Mutation("a local op on two GPUs", "leader",
             lambda d: with_block(d, "L0.attn_core", ranks=np.arange(64, dtype=np.int32).reshape(32, 2)), "PLN308"),
    Mutation("an op missing on one rank", "leader",
             lambda d: with_block(d, "L1.attn_core", ranks=block(d, "L1.attn_core").ranks[:-1]), "PLN308"),
    Mutation("two ranks swapped", "leader",
             lambda d: with_block(d, "L1.attn_core", ranks=swapped(block(d, "L1.attn_core").ranks, 3, 4)), "PLN308"),
    Mutation("a gate that is not on its group's leader", "leader",
             lambda d: with_block(d, "L0.gate", ranks=block(d, "L0.gate").ranks + np.int32(1)), "PLN308"),
    Mutation("a layer on the other stage's ranks", "stages",
             lambda d: with_block(d, "L0.attn_core", ranks=block(d, "L2.attn_core").ranks), "PLN308"),
    Mutation("a reduction across two TP groups", "leader",
             lambda d: with_block(d, "L0.attn_all_reduce", ranks=np.roll(np.arange(64, dtype=np.int32), 4).reshape(8, 8)), "PLN308"),
    Mutation("a reduction over half TP groups", "leader",
             lambda d: with_block(d, "L0.attn_all_reduce", ranks=np.arange(64, dtype=np.int32).reshape(16, 4)), "PLN308"),
    Mutation("one dispatch for both replicas", "sharded",
             lambda d: with_block(d, "L1.dispatch", ranks=np.arange(8, dtype=np.int32).reshape(1, 8)), "PLN308"),
    Mutation("a sum of shards of two experts", "shards",
             lambda d: with_block(d, "L0.expert.s0_all_reduce", ranks=block(d, "L0.expert.s0_all_reduce").ranks[:, ::-1]), "PLN308"),
    Mutation("a hand-over out of the last stage", "stages",
             lambda d: with_block(d, "S0.pp_send", ranks=block(d, "S1.pp_recv").ranks), "PLN308"),
    Mutation("the result collected on another rank", "stages",
             lambda d: with_block(d, "output_collect", ranks=np.array([[9]], dtype=np.int32)), "PLN308"),
    Mutation("a graph of another world", "leader", lambda d: replace(d, blocks=replace(d.blocks, world_size=128)), "PLN308"),
    # communication marks
    Mutation("a dispatch not marked", "leader", lambda d: with_edge(d, "L0.gate", "L0.dispatch", comm=""), "PLN309"),
    Mutation("a hand-over not marked", "stages", lambda d: with_edge(d, "S0.pp_send", "S1.pp_recv", comm=""), "PLN309"),
    Mutation("a reduction's result not marked", "leader",
             lambda d: with_edge(d, "L0.attn_all_reduce", "L0.attn_add", comm=""), "PLN309"),
    Mutation("an edge inside a rank marked", "leader", lambda d: with_edge(d, "L0.attn_qkv", "L0.attn_core", comm="tp"), "PLN309"),
    Mutation("a combine marked as dispatch", "leader", lambda d: with_edge(d, "L0.expert", "L0.combine", comm="dispatch"), "PLN309"),
    Mutation("a hand-over marked as tp", "stages", lambda d: with_edge(d, "S0.pp_send", "S1.pp_recv", comm="tp"), "PLN309"),
    # the expert rule
    Mutation("two copies of an expert on one GPU", "idle",
             lambda d: rule_of(copies_changed(d, lambda p: layer_placement(np.append(p.expert, 0), np.append(p.rank, p.rank[0]))),
                               spares="replicate"), "PLN310"),
    Mutation("two experts of a layer on one GPU beside an idle one", "idle",
             lambda d: copies_changed(d, lambda p: layer_placement(p.expert, changed_at(p.rank, 1, int(p.rank[0])))), "PLN310"),
    Mutation("an expert of two layers on one GPU, scope model", "leader",
             lambda d: replaced(d, replace(d.placement, layers=d.placement.layers | {1: d.placement.layers[0]})), "PLN310"),
    Mutation("uneven rounds", "turns",
             lambda d: copies_changed(d, lambda p: layer_placement(p.expert, np.array([0, 0, 1, 1, 2, 2, 2, 3]))), "PLN310"),
    Mutation("uneven rounds within the limit", "turns",
             lambda d: rule_of(copies_changed(d, lambda p: layer_placement(p.expert, np.array([0, 0, 0, 1, 1, 1, 2, 2]))),
                               spares="replicate"), "PLN310"),
    Mutation("a second copy though spares stay idle", "idle",
             lambda d: copies_changed(d, lambda p: layer_placement(np.append(p.expert, 0), np.append(p.rank, 7))), "PLN310"),
    Mutation("rounds though overflow is an error", "turns", lambda d: rule_of(d, on_overflow="error"), "PLN310"),
    Mutation("rounds that the plan does not own up to", "turns",
             lambda d: replace(d, placement=replace(d.placement, relaxed=False)), "PLN310"),
    Mutation("another r than the GPUs hold", "idle", lambda d: replace(d, placement=replace(d.placement, rounds=3)), "PLN310"),
    Mutation("two turns of a GPU at the same time", "turns",
             lambda d: with_reads(without_edge(d, "m0.L0.expert.s0", "m0.L0.expert.s1"), "m0.L0.expert.s1", after=None), "PLN310"),
    # coverage
    Mutation("an expert without a copy", "idle",
             lambda d: copies_changed(d, lambda p: layer_placement(p.expert[p.expert != 3], p.rank[p.expert != 3])), "PLN311"),
    Mutation("an expert without a copy in one layer", "turns",
             lambda d: copies_changed(d, lambda p: layer_placement(p.expert[1:], p.rank[1:]), layer=1), "PLN311"),
    Mutation("an expert missing in one replica", "sharded", lambda d: shifted_experts(d, "L1.expert.s0", 5, 4), "PLN311"),
    Mutation("a shard of an expert missing", "shards", lambda d: shifted_experts(d, "L0.expert.s0", 3, 0), "PLN311"),
    Mutation("an expert that the model does not have", "idle",
             lambda d: copies_changed_unbuilt(d, lambda p: layer_placement(np.append(p.expert, 6), np.append(p.rank, 7))), "PLN311"),
    # graph against placement
    Mutation("two experts swapped in the graph", "leader",
             lambda d: with_block(d, "L0.expert", experts=swapped(experts_of(d, "L0.expert"), 0, 15)), "PLN312"),
    Mutation("two experts swapped in the second micro-batch", "turns",
             lambda d: with_block(d, "m1.L0.expert.s0", experts=swapped(experts_of(d, "m1.L0.expert.s0"), 0, 1)), "PLN312"),
    Mutation("an expert on an idle GPU", "leader",
             lambda d: with_block(d, "L0.expert", ranks=changed_at(block(d, "L0.expert").ranks, 15, 40)), "PLN312"),
    Mutation("an expert missing in the second micro-batch", "turns", lambda d: shifted_experts(d, "m1.L1.expert.s0", 5, 4), "PLN312"),
    Mutation("a placement that the graph does not follow", "idle",
             lambda d: replace(d, placement=replace(d.placement, layers=d.placement.layers | {
                 1: layer_placement(d.placement.layers[1].expert, swapped(d.placement.layers[1].rank, 0, 1))})), "PLN312"),
    Mutation("a copy that the graph does not run", "spares",
             lambda d: copy_idle(d, "L0.expert"), "PLN312"),
    # tokens
    Mutation("tokens of one expert counted for another", "leader", lambda d: rows_moved(d, "L0.expert"), "PLN313"),
    Mutation("tokens of one turn counted for the other", "turns",
             lambda d: with_block(with_block(d, "m0.L0.expert.s0", rows=rows_of(d, "m0.L0.expert.s0") + 1),
                                  "m0.L0.expert.s1", rows=rows_of(d, "m0.L0.expert.s1") - 1), "PLN313"),
    Mutation("tokens of shards and their sum moved alike", "shards",
             lambda d: with_block(with_block(d, "L0.expert.s0", rows=rows_of(d, "L0.expert.s0") * 2),
                                  "L0.expert.s0_all_reduce", rows=rows_of(d, "L0.expert.s0_all_reduce") * 2), "PLN313"),
    Mutation("a TP group whose tokens are not sent", "leader",
             lambda d: with_pairs(d, "L0.gate", "L0.dispatch", lambda p: p[:-1]), "PLN313"),
    Mutation("an expert whose outputs do not come back", "leader",
             lambda d: with_pairs(d, "L0.expert", "L0.combine", lambda p: p[1:]), "PLN313"),
    Mutation("a turn whose outputs do not come back", "turns",
             lambda d: without_edge(d, "m0.L0.expert.s0", "m0.L0.combine"), "PLN313"),
    # ports and wiring
    Mutation("an unknown kind", "leader", lambda d: with_block(d, "L0.gate", kind="router"), "PLN314"),
    Mutation("a port too many", "leader",
             lambda d: with_reads(d, "L0.gate", bias=block(d, "L0.gate").reads["h"]), "PLN314"),
    Mutation("a port too few", "leader", lambda d: with_reads(without_edge(d, "L0.attn_add", "L0.aggregate"), "L0.aggregate", h=None), "PLN314"),
    Mutation("an edge to a port that is not there", "leader", lambda d: with_edge(d, "L0.attn_core", "L0.attn_out", into="q"), "PLN314"),
    Mutation("an edge to a block that is not there", "leader",
             lambda d: with_edges(d, replace(d.blocks.edges[0], source=10_000)), "PLN314"),
    Mutation("a pair of an op that is not there", "leader",
             lambda d: with_pairs(d, "L0.attn_core", "L0.attn_out", lambda p: np.append(p, [[64, 0]], axis=0)), "PLN314"),
    Mutation("a pattern that is none", "leader", lambda d: with_edge(d, "L0.attn_core", "L0.attn_out", pattern="all"), "PLN314"),
    Mutation("an edge block missing", "leader", lambda d: without_edge(d, "L0.attn_core", "L0.attn_out"), "PLN314"),
    Mutation("one edge missing", "leader", lambda d: with_pairs(d, "L0.attn_core", "L0.attn_out", lambda p: p[:-1]), "PLN314"),
    Mutation("a reduction without one of its ranks", "leader",
             lambda d: with_pairs(d, "L0.attn_out", "L0.attn_all_reduce", lambda p: p[1:]), "PLN314"),
    Mutation("more experts than ops in a block", "idle",
             lambda d: with_block(d, "L0.expert", experts=np.append(experts_of(d, "L0.expert"), 0)), "PLN314"),
    Mutation("experts without token counts", "idle", lambda d: with_block(d, "L0.expert", rows=None), "PLN314"),
    Mutation("q of two TP groups swapped", "leader",
             lambda d: with_pairs(d, "L0.attn_qkv", "L0.attn_core", targets_swapped), "PLN314"),
    Mutation("q of two ranks swapped and marked as communication", "leader",
             lambda d: with_edge(with_pairs(d, "L0.attn_qkv", "L0.attn_core", lambda p: np.stack([p[:, 0], np.roll(p[:, 1], 1)], axis=1)),
                                 "L0.attn_qkv", "L0.attn_core", comm="tp"), "PLN314"),
    Mutation("partial sums of two TP groups swapped", "leader",
             lambda d: with_pairs(d, "L0.attn_out", "L0.attn_all_reduce", targets_swapped), "PLN314"),
    Mutation("a dispatch fed by gates of the other replica", "sharded",
             lambda d: with_pairs(d, "L1.gate", "L1.dispatch", targets_swapped), "PLN314"),
    Mutation("a combine fed by experts of the other replica", "sharded",
             lambda d: with_pairs(d, "L1.expert.s0", "L1.combine", targets_swapped), "PLN314"),
    Mutation("a combine that returns to the other replica", "sharded",
             lambda d: with_pairs(d, "L1.combine", "L1.aggregate", targets_swapped), "PLN314"),
    Mutation("the residual of another layer", "leader",
             lambda d: with_edge(d, "L2.attn_add", "L2.aggregate", "h", source="L1.attn_add"), "PLN314"),
    Mutation("the residual stream from two layers before", "leader",
             lambda d: with_edge(d, "L1.moe_broadcast", "L2.attn_add", source="L0.moe_broadcast"), "PLN314"),
    Mutation("attention of another layer", "leader",
             lambda d: with_edge(d, "L2.attn_core", "L2.attn_out", source="L1.attn_core"), "PLN314"),
    Mutation("experts fed by another layer's dispatch", "leader",
             lambda d: with_edge(d, "L2.dispatch", "L2.expert", source="L1.dispatch"), "PLN314"),
    Mutation("weights of another layer's gate", "leader",
             lambda d: with_edge(d, "L2.gate", "L2.aggregate", source="L1.gate"), "PLN314"),
    Mutation("a layer skipped", "leader", lambda d: skipped_layer(d, "moe_broadcast", "moe_broadcast"), "PLN314"),
    Mutation("a layer left out", "dense",
             lambda d: without_blocks(d, lambda b: b.layer == 1, {("S0.pp_send", "x"): "L0.dense_add"}), "PLN314"),
    Mutation("a stage that starts from its predecessor's last layer", "stages",
             lambda d: with_edge(d, "S1.pp_recv", "L2.attn_add", source="L1.moe_broadcast"), "PLN314"),
    Mutation("a hand-over of a layer before the last", "stages",
             lambda d: with_edge(d, "L1.moe_broadcast", "S0.pp_send", source="L0.moe_broadcast"), "PLN314"),
    Mutation("a hand-over to the wrong ranks", "dense", lambda d: with_pairs(d, "S0.pp_send", "S1.pp_recv", targets_swapped), "PLN314"),
    Mutation("a hand-over shifted too little", "stages", lambda d: with_edge(d, "S0.pp_send", "S1.pp_recv", pattern="shift:7"), "PLN314"),
    Mutation("another micro-batch's tokens", "turns",
             lambda d: with_edge(d, "m1.L0.gate", "m1.L0.dispatch", source="m0.L0.gate"), "PLN314"),
    Mutation("a micro-batch left out", "turns", lambda d: without_blocks(d, lambda b: b.name.startswith("m1.")), "PLN314"),
    Mutation("a micro-batch that the step does not have", "turns", lambda d: with_block(d, "m1.L0.gate", micro_batch=2), "PLN314"),
    Mutation("a layer that the model does not have", "leader", lambda d: with_block(d, "L3.gate", layer=4), "PLN314"),
    Mutation("an op outside the layers", "leader", lambda d: with_block(d, "L3.gate", layer=None), "PLN314"),
    Mutation("an op of another layer by name", "leader", lambda d: with_block(d, "L2.gate", layer=1), "PLN314"),
    Mutation("shared experts left out", "sharded",
             lambda d: with_reads(without_blocks(d, lambda b: b.kind.startswith("shared")), "L1.aggregate", shared=None), "PLN314"),
    Mutation("a turn that waits for itself in another layer", "turns",
             lambda d: with_edge(d, "m0.L1.expert.s0", "m0.L1.expert.s1", source="m0.L0.expert.s0"), "PLN314"),
    # memory
    Mutation("weights of experts too small", "leader", lambda d: table_changed(d, "experts", -1), "PLN315"),
    Mutation("KV cache of half the sequences", "leader",
             lambda d: replace(d, memory=replace(d.memory, items=d.memory.items | {"kv_cache": d.memory.items["kv_cache"] // 2})), "PLN315"),
    Mutation("buffers of one rank too large", "turns", lambda d: table_changed(d, "dispatch_buffers", 1, rank=7), "PLN315"),
    Mutation("an item left out", "leader",
             lambda d: replace(d, memory=replace(d.memory, items={k: v for k, v in d.memory.items.items() if k != "gates"})), "PLN315"),
    Mutation("an item too many", "leader",
             lambda d: replace(d, memory=replace(d.memory, items=d.memory.items | {"spare": d.memory.items["gates"]})), "PLN315"),
    Mutation("a column too short", "leader",
             lambda d: replace(d, memory=replace(d.memory, items=d.memory.items | {"gates": d.memory.items["gates"][:-1]})), "PLN315"),
    Mutation("more memory than the GPUs have", "leader",
             lambda d: replace(d, memory=replace(d.memory, capacity=d.memory.capacity * 2)), "PLN315"),
    Mutation("no reserve", "leader", lambda d: replace(d, memory=replace(d.memory, reserve=d.memory.reserve * 0)), "PLN315"),
    Mutation("GPUs too small", "leader", smaller_gpus, "PLN201"),
    Mutation("prompts too long", "turns", longer_prompts, "PLN201"),
    # duplicates
    Mutation("an edge block twice", "leader", lambda d: with_edges(d, edge(d, "L0.attn_core", "L0.attn_out")), "PLN317"),
    Mutation("one edge twice", "leader",
             lambda d: with_edges(d, replace(edge(d, "L0.attn_core", "L0.attn_out"), pattern="pairs", pairs=np.array([[5, 5]]))), "PLN317"),
    Mutation("a partial sum's edge twice", "leader", lambda d: with_edges(d, edge(d, "L0.attn_out", "L0.attn_all_reduce")), "PLN317"),
    Mutation("two blocks of one name", "leader", lambda d: with_block(d, "L1.gate", name="L0.gate"), "PLN317"),
    Mutation("a rank twice in a block", "leader",
             lambda d: with_block(d, "L0.attn_core", ranks=changed_at(block(d, "L0.attn_core").ranks, 1, 0)), "PLN317"),
    # degrees
    Mutation("another tp than the spec asks for", "sharded", lambda d: parallel(d, tp=1), "PLN111"),
    Mutation("another way of gating than the spec asks for", "leader", lambda d: parallel(d, gating="sharded"), "PLN111"),
    Mutation("a stage that leaves out a layer", "stages", lambda d: parallel(d, stages=((0, 1), (2, 4))), "PLN108"),
    Mutation("TP groups beyond a node", "idle", lambda d: replace(
        parallel(d, tp=8), spec=d.spec.model_copy(update={"parallelism": d.spec.parallelism.model_copy(update={"tp": 8})})), "PLN105"),
]
# fmt: on


@pytest.mark.parametrize("name", SPECS)
def test_the_plans_to_break_are_good(name: str) -> None:
    assert faults(good(name))[0] == []


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.code}-{m.what}".replace(" ", "-"))
def test_one_fault_gives_exactly_its_code(mutation: Mutation) -> None:
    found = faults(mutation.change(good(mutation.plan)))[0]
    assert {d.code for d in found} == {mutation.code}, [f"{d.code}: {d.message}" for d in found]
    assert all(d.severity == "error" and d.message for d in found)


def test_every_code_of_every_rule_is_tried() -> None:
    promised = {code for rule in RULES for code in rule.codes} - {"PLN318"}  # tried in test_certificate.py
    tried = {m.code for m in MUTATIONS}
    assert promised <= tried
    assert {f"PLN{n}" for n in (201, *range(301, 316), 317)} <= tried
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)


def test_a_refused_plan_is_no_plan() -> None:
    for mutation in MUTATIONS[::20]:
        with pytest.raises(planc.PlancError):
            planc.verify.verify(mutation.change(good(mutation.plan)))
