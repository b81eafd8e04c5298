"""Small good plans that between them have every kind of op, and ways to break one in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from small_specs import MOE, ROOT, small_spec

import planc
from planc.graph import EdgeBlock, OpBlock, PlanGraph, TensorType, build_graph, expand
from planc.placement import LayerPlacement, Placement, memory_table
from planc.verify import Draft

DENSE_MOE = {"layers": 2, "first_k_dense": 1, "dense_mlp": {"intermediate": 64}, "vocab": 101, "norm": "rms"}
SHARED = {"moe": MOE | {"shared_experts": 1}}

SPECS: dict[str, Callable[[], planc.Spec]] = {
    "leader": lambda: planc.load_spec(ROOT / "specs/moe-4l-64gpu.yaml", ["workload.batch=64"]),
    "stages": lambda: planc.load_spec(ROOT / "specs/moe-4l-16gpu-baseline.yaml", ["workload.batch=64"]),
    "sharded": lambda: small_spec(model=DENSE_MOE | SHARED, parallelism={"dp": 2, "ep": 4, "tp": 2}),
    "scatter": lambda: small_spec(parallelism={"ep": 8, "tp": 4, "tp_comm": "reduce_scatter"}),
    "turns": lambda: small_spec(parallelism={"dp": 2, "ep": 4, "tp": 1}, workload={"micro_batches": 2}),
    "shards": lambda: small_spec(parallelism={"ep": 8, "tp": 2, "expert_tp": 2, "gating": "leader"}, model=SHARED),
    "spares": lambda: small_spec(
        model={"moe": MOE | {"experts": 6}}, parallelism={"ep": 8, "tp": 1}, expert_rule={"spares": "replicate"}
    ),
    "idle": lambda: small_spec(model={"moe": MOE | {"experts": 6}}, parallelism={"ep": 8, "tp": 1}),
    "dense": lambda: small_spec(
        model={"moe": None, "dense_mlp": {"intermediate": 64}, "layers": 3},
        parallelism={"dp": 2, "pp": 2, "ep": 2, "tp": 2},
    ),
}


@cache
def good(name: str) -> Draft:
    """The parts of a verified plan."""
    plan = planc.compile(SPECS[name]())
    return Draft(plan.spec, plan.parallelism, plan.reasons, plan.placement, plan.memory, plan.blocks, plan.notes)


# --- ways to break a plan -------------------------------------------------------------------------------------------


def block(draft: Draft, name: str) -> OpBlock:
    """A block by name."""
    return draft.blocks.blocks[draft.blocks.by_name[name]]


def with_block(draft: Draft, name: str, /, **changes: Any) -> Draft:
    """One block changed."""
    blocks = [replace(b, **changes) if b.name == name else b for b in draft.blocks.blocks]
    return replace(draft, blocks=replace(draft.blocks, blocks=tuple(blocks)))


def with_blocks(draft: Draft, *more: OpBlock) -> Draft:
    """Further blocks."""
    return replace(draft, blocks=replace(draft.blocks, blocks=(*draft.blocks.blocks, *more)))


def with_edges(draft: Draft, *more: EdgeBlock) -> Draft:
    """Further edges."""
    return replace(draft, blocks=replace(draft.blocks, edges=(*draft.blocks.edges, *more)))


def edge_number(draft: Draft, source: str, target: str, into: str = "") -> int:
    """The only edge block between two blocks (to a port, where several)."""
    ends = draft.blocks.by_name[source], draft.blocks.by_name[target]
    found = [i for i, e in enumerate(draft.blocks.edges) if (e.source, e.target) == ends and into in ("", e.into)]
    assert len(found) == 1, (source, target, found)
    return found[0]


def edge(draft: Draft, source: str, target: str, into: str = "") -> EdgeBlock:
    """The edge block between two blocks."""
    return draft.blocks.edges[edge_number(draft, source, target, into)]


def with_edge(draft: Draft, source: str, target: str, port: str = "", /, **changes: Any) -> Draft:
    """One edge block changed; a text for ``source`` or ``target`` names a block."""
    number = edge_number(draft, source, target, port)
    changes = {k: draft.blocks.by_name[v] if k in ("source", "target") else v for k, v in changes.items()}
    edges = [replace(e, **changes) if i == number else e for i, e in enumerate(draft.blocks.edges)]
    return replace(draft, blocks=replace(draft.blocks, edges=tuple(edges)))


def without_edge(draft: Draft, source: str, target: str, into: str = "") -> Draft:
    """One edge block removed."""
    number = edge_number(draft, source, target, into)
    edges = tuple(e for i, e in enumerate(draft.blocks.edges) if i != number)
    return replace(draft, blocks=replace(draft.blocks, edges=edges))


def with_pairs(
    draft: Draft, source: str, target: str, change: Callable[[np.ndarray], np.ndarray], into: str = ""
) -> Draft:
    """The edges of an edge block listed one by one, and the list changed."""
    number = edge_number(draft, source, target, into)
    pairs = np.stack(expand(draft.blocks).pairs(number), axis=1)
    return with_edge(draft, source, target, into, pattern="pairs", pairs=change(pairs))


def without_blocks(
    draft: Draft, gone: Callable[[OpBlock], bool], bridge: dict[tuple[str, str], str] | None = None
) -> Draft:
    """Blocks removed with their edges; ``bridge``: (target, port) -> the block that it reads from instead."""
    old = draft.blocks
    keep = [i for i, b in enumerate(old.blocks) if not gone(b)]
    new = {i: n for n, i in enumerate(keep)}
    edges = []
    for e in old.edges:
        other = (bridge or {}).get((old.blocks[e.target].name, e.into))
        source = old.by_name[other] if other else e.source
        if source in new and e.target in new:
            edges.append(replace(e, source=new[source], target=new[e.target]))
    return replace(draft, blocks=PlanGraph(tuple(old.blocks[i] for i in keep), tuple(edges), old.world_size))


def with_tensor(draft: Draft, name: str, port: str, *, everywhere: bool = True, **changes: Any) -> Draft:
    """What a block writes changed, and with it the edges and reads that carry it (or the written type alone)."""
    index = draft.blocks.by_name[name]
    wrote = block(draft, name).writes[port]
    blocks = list(draft.blocks.blocks)
    edges = list(draft.blocks.edges)
    blocks[index] = replace(blocks[index], writes={**blocks[index].writes, port: replace(wrote, **changes)})
    for number, e in enumerate(edges):
        if everywhere and (e.source, e.out) == (index, port):
            target = blocks[e.target]
            blocks[e.target] = replace(target, reads={**target.reads, e.into: replace(e.tensor, **changes)})
            edges[number] = replace(e, tensor=replace(e.tensor, **changes))
    return replace(draft, blocks=PlanGraph(tuple(blocks), tuple(edges), draft.blocks.world_size))


def with_reads(draft: Draft, name: str, **tensors: TensorType | None) -> Draft:
    """Read ports of a block added, changed, or removed (None)."""
    reads = {p: t for p, t in {**block(draft, name).reads, **tensors}.items() if t is not None}
    return with_block(draft, name, reads=reads)


def replaced(draft: Draft, placement: Placement) -> Draft:
    """The same deployment with other expert places, everything that follows from them made anew."""
    return replace(
        draft,
        placement=placement,
        memory=memory_table(draft.spec, draft.parallelism, placement),
        blocks=build_graph(draft.spec, draft.parallelism, placement),
    )


def copies_changed(draft: Draft, change: Callable[[LayerPlacement], LayerPlacement], layer: int | None = None) -> Draft:
    """Another placement of every layer, or of one."""
    layers = {n: change(part) if layer in (None, n) else part for n, part in draft.placement.layers.items()}
    return replaced(draft, replace(draft.placement, layers=layers))


def table_changed(draft: Draft, item: str, by: int, rank: int = 0) -> Draft:
    """The memory table with one number changed."""
    values = draft.memory.items[item].copy()
    values[rank] += by
    return replace(draft, memory=replace(draft.memory, items=draft.memory.items | {item: values}))


def swapped(array: np.ndarray, i: int, j: int) -> np.ndarray:
    """Two entries exchanged."""
    result = array.copy()
    result[[i, j]] = array[[j, i]]
    return result


def targets_swapped(pairs: np.ndarray) -> np.ndarray:
    """The targets of the first and the last edge exchanged."""
    result = pairs.copy()
    result[[0, -1], 1] = pairs[[-1, 0], 1]
    return result


def changed_at(array: np.ndarray, index: int, value: int) -> np.ndarray:
    """One entry replaced."""
    result = array.copy()
    result[index] = value
    return result


def shifted_experts(draft: Draft, name: str, op: int, expert: int) -> Draft:
    """One op of an expert block runs another expert."""
    experts = block(draft, name).experts
    assert experts is not None
    return with_block(draft, name, experts=changed_at(experts, op, expert))


def rows_moved(draft: Draft, name: str, *others: str) -> Draft:
    """Five tokens move from a block's second op to its first (in several blocks)."""
    for each in (name, *others):
        rows = block(draft, each).rows
        assert rows is not None
        rows = changed_at(changed_at(rows, 0, int(rows[0]) + 5), 1, int(rows[1]) - 5)
        draft = with_block(draft, each, rows=rows)
    return draft


def parallel(draft: Draft, **changes: Any) -> Draft:
    """Other degrees in the plan than in its spec."""
    return replace(draft, parallelism=replace(draft.parallelism, **changes))


def dead_gate(draft: Draft) -> Draft:
    """A second gate whose choices nobody reads."""
    gate = block(draft, "L0.gate")
    draft = with_blocks(draft, replace(gate, name="L0.gate2"))
    source = draft.blocks.by_name["L0.attn_add"]
    feed = replace(edge(draft, "L0.attn_add", "L0.gate"), source=source, target=len(draft.blocks.blocks) - 1)
    return with_edges(draft, feed)


def second_reduction(draft: Draft) -> Draft:
    """A partial sum that is reduced twice."""
    draft = with_blocks(draft, replace(block(draft, "L0.attn_all_reduce"), name="L0.again"))
    return with_edges(
        draft, replace(edge(draft, "L0.attn_out", "L0.attn_all_reduce"), target=len(draft.blocks.blocks) - 1)
    )


def unreduced(draft: Draft) -> Draft:
    """A layer's sum read before its reduction."""
    draft = with_edge(draft, "L0.attn_all_reduce", "L0.attn_add", source="L0.attn_out", comm="")
    partial = block(draft, "L0.attn_out").writes["y"]
    return with_reads(with_edge(draft, "L0.attn_out", "L0.attn_add", tensor=partial), "L0.attn_add", y=partial)


def fewer_tokens(draft: Draft) -> Draft:
    """Every tensor of a dense plan with a quarter of the tokens."""
    t = block(draft, "input_split").writes["x"].shape[0]

    def cut(tensor: TensorType) -> TensorType:
        return replace(tensor, shape=(t // 4, *tensor.shape[1:])) if tensor.shape[0] == t else tensor

    blocks = tuple(
        replace(b, reads={p: cut(x) for p, x in b.reads.items()}, writes={p: cut(x) for p, x in b.writes.items()})
        for b in draft.blocks.blocks
    )
    edges = tuple(replace(e, tensor=cut(e.tensor)) for e in draft.blocks.edges)
    return replace(draft, blocks=replace(draft.blocks, blocks=blocks, edges=edges))


def unsplit_attention(draft: Draft) -> Draft:
    """Every rank of a TP group computes all heads, and their sum is then as many times too large."""
    draft = with_block(
        with_block(with_block(draft, "L0.attn_qkv", split=1), "L0.attn_core", split=1), "L0.attn_out", split=1
    )
    t = block(draft, "L0.attn_qkv").reads["x"].shape[0]
    a = draft.spec.model.attention
    draft = with_tensor(draft, "L0.attn_qkv", "qkv", shape=(t, 3 * a.heads, a.head_dim))
    return with_tensor(draft, "L0.attn_core", "o", shape=(t, a.heads, a.head_dim))


def rule_of(draft: Draft, **changes: Any) -> Draft:
    """The same plan under another expert rule."""
    rule = draft.spec.expert_rule
    assert not isinstance(rule, str)
    return replace(draft, spec=draft.spec.model_copy(update={"expert_rule": rule.model_copy(update=changes)}))


def smaller_gpus(draft: Draft) -> Draft:
    """GPUs with one byte less than the fullest rank needs."""
    group = draft.spec.cluster.groups[0]
    need = int((draft.memory.used - draft.memory.reserve).max())
    gpu = group.gpu.model_copy(update={"memory": int(need / (1 - group.gpu.reserve)) - 2})
    cluster = draft.spec.cluster
    cluster = type(cluster)(name=cluster.name, links=cluster.links, groups=(group.model_copy(update={"gpu": gpu}),))
    spec = draft.spec.model_copy(update={"cluster": cluster})
    return replace(draft, spec=spec, memory=memory_table(spec, draft.parallelism, draft.placement))


def longer_prompts(draft: Draft) -> Draft:
    """Prompts whose KV cache no longer fits."""
    work = draft.spec.workload.model_copy(update={"isl": 10_000_000})
    spec = draft.spec.model_copy(update={"workload": work})
    return replace(draft, spec=spec, memory=memory_table(spec, draft.parallelism, draft.placement))


def skipped_layer(draft: Draft, into: str, over: str) -> Draft:
    """Layer 2 reads what layer 1 should have read."""
    for name, port in (("attn_qkv", "x"), ("attn_add", "x")):
        draft = with_edge(draft, f"L1.{over}", f"L2.{name}", port, source=f"L0.{into}")
    return draft


def experts_of(draft: Draft, name: str) -> np.ndarray:
    """The experts of a block's ops."""
    found = block(draft, name).experts
    assert found is not None
    return found


def rows_of(draft: Draft, name: str) -> np.ndarray:
    """The token counts of a block's ops."""
    found = block(draft, name).rows
    assert found is not None
    return found


def copies_changed_unbuilt(draft: Draft, change: Callable[[LayerPlacement], LayerPlacement]) -> Draft:
    """Another placement of layer 0 alone, and a graph that runs it with one token a copy."""
    part = change(draft.placement.layers[0])
    order = np.argsort(part.rank)
    name = "L0.expert"
    rows = np.ones(len(part.rank), dtype=np.int64)
    draft = with_block(draft, name, ranks=part.rank[order][:, None], experts=part.expert[order], rows=rows)
    return replace(draft, placement=replace(draft.placement, layers=draft.placement.layers | {0: part}))


def copy_idle(draft: Draft, name: str) -> Draft:
    """One of two copies of an expert runs its other copy's neighbour instead."""
    experts = experts_of(draft, name)
    return with_block(draft, name, experts=changed_at(experts, 7, int(experts[5])))
