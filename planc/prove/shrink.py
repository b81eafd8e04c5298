"""The plan on small numbers: hidden size, heads, widths, vocabulary and tokens shrink, everything else stays.

Kept are every rank, group, collective, expert, copy and turn, the kinds of layers, attention and gate, and whether a size is
divided, repeated or padded over ranks. Of layers that are alike (kind, stage and placement of experts) a few are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from planc.graph import EdgeBlock, OpBlock, PlanGraph, TensorType, build_graph
from planc.placement import Parallelism, Placement, memory_table, step_tokens
from planc.spec import Model, Spec
from planc.verify import Draft, VerifiedPlan

#: sizes of the small model, beside what degrees ask for
HEAD, WIDTH, LATENT, VOCAB = 4, 4, 6, 11
LAYERS = 1  #: of layers that are alike, unless asked for more


@dataclass(frozen=True, eq=False)
class Small:
    """The small plan. ``draft``: what a compiler makes of the small spec; ``graph``: the graph to run: the given plan's own
    ops and edges with the draft's sizes; ``layers``: small layer -> layer of the plan."""

    draft: Draft
    graph: PlanGraph
    layers: dict[int, int]


def shrink(
    plan: VerifiedPlan | Draft, *, layers: int = LAYERS, tokens: int = 2, scale: int = 1, steps: int = 3
) -> Small:
    """A plan on small numbers. ``layers``: how many are kept of those alike; ``tokens``: of a gating source, in units of
    what its degrees ask for; ``scale``: multiplies hidden size, heads and widths; ``steps``: for which the KV cache has
    room."""
    kept = sample_layers(plan, layers)
    spec = small_spec(plan.spec, plan.parallelism, kept, tokens, scale, steps)
    par, placement = small_parts(plan, kept)
    draft = Draft(spec, par, {}, placement, memory_table(spec, par, placement), build_graph(spec, par, placement))
    names = dict(enumerate(kept))
    return Small(draft, with_sizes(plan.blocks, draft.blocks, names), names)


def sample_layers(plan: VerifiedPlan | Draft, each: int) -> list[int]:
    """Layers that stand for all: of every kind (dense or MoE, stage, placement) the first ``each``, and of every stage at
    least one."""
    par, kept = plan.parallelism, []
    seen: dict[tuple[int, object, bool], int] = {}
    for layer in range(plan.spec.model.layers):
        part = plan.placement.layers.get(layer)
        place = None if part is None else (part.expert.tobytes(), part.rank.tobytes(), part.slot.tobytes())
        # where no head follows, the last layer is unlike others: what it writes is read by output_collect alone
        ends = layer == plan.spec.model.layers - 1 and not plan.spec.model.vocab
        key = (par.stage_of_layer(layer), place, ends)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= each:
            kept.append(layer)
    return kept


def small_parts(plan: VerifiedPlan | Draft, kept: list[int]) -> tuple[Parallelism, Placement]:
    """Degrees and placement of the kept layers."""
    par = plan.parallelism
    stages = []
    first = 0
    for a, b in par.stages:
        count = sum(a <= layer < b for layer in kept)
        stages.append((first, first + count))
        first += count
    small = replace(par, stages=tuple(stages))
    parts = {new: plan.placement.layers[old] for new, old in enumerate(kept) if old in plan.placement.layers}
    return small, Placement(small, parts, plan.placement.rounds, plan.placement.relaxed)


def small_spec(spec: Spec, par: Parallelism, kept: list[int], tokens: int, scale: int, steps: int = 3) -> Spec:
    """The spec on small numbers."""
    model, a, tp = spec.model, spec.model.attention, par.tp
    changes: dict[str, object] = {}
    if a.kind == "mla":
        heads = tp * max(1, min(2, a.heads // tp))
        attention = {
            "heads": heads,
            "q_lora_rank": 2 * LATENT if a.q_lora_rank else 0,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": HEAD,
            "qk_rope_head_dim": 2,
            "v_head_dim": HEAD - 1,
        }
    else:
        per_group = max(1, min(2, a.heads // a.kv_head_count))
        kv = a.kv_head_count if a.kv_head_count < tp else tp * max(1, min(2, a.kv_head_count // tp))
        heads = kv * max(per_group, tp // gcd(kv, tp))
        attention = {"heads": heads, "head_dim": HEAD * scale}
        if a.kind == "gqa":
            attention["kv_heads"] = kv
        elif a.kind == "mha":
            attention["heads"] = tp * max(1, min(2, a.heads // tp))
    changes["attention"] = a.model_copy(update=attention)
    changes["hidden"] = tp * max(1, -(-12 // tp)) * scale
    moe_layers = [new for new, old in enumerate(kept) if old in set(model.moe_layer_ids)]
    changes |= {"layers": len(kept), "first_k_dense": 0, "moe_stride": 1}
    changes["moe_layers"] = tuple(moe_layers) if model.moe is not None and moe_layers else None
    if model.dense_mlp is not None:
        changes["dense_mlp"] = model.dense_mlp.model_copy(update={"intermediate": tp * WIDTH * scale})
    if model.moe is not None:
        shared = tp * WIDTH * scale if model.moe.shared_width else 0
        sizes = {"intermediate": par.expert_tp * WIDTH * scale, "shared_intermediate": shared}
        changes["moe"] = model.moe.model_copy(update=sizes)
        if not moe_layers:
            changes["moe"] = None
    if model.vocab:
        changes["vocab"] = VOCAB * tp - (1 if model.vocab % tp else 0)
    work = spec.workload
    group = tokens * (1 if par.leaders_gate else tp) * work.micro_batches
    small_work = {"batch": group * par.dp * par.attention_dp, "isl": 5, "osl": max(3, steps), "prefill_chunk": 0}
    if work.phase == "prefill":
        small_work |= _prompts(spec, par, group)
    fields = {
        name: getattr(model, name) for name in Model.model_fields
    } | changes  # made anew: copies keep what was derived
    return spec.model_copy(
        update={"model": Model.model_construct(**fields), "workload": work.model_copy(update=small_work)}
    )


def _prompts(spec: Spec, par: Parallelism, group: int) -> dict[str, int]:
    """Prompts for a prefill step of ``group`` tokens in a TP group: whole ones, several side by side, or a chunk of one, as in
    the plan."""
    work = spec.workload
    had, t = step_tokens(spec, par).group, group // work.micro_batches
    isl, chunk = group, 0
    if work.prefill_chunk and had > work.isl:
        isl, chunk = max(1, t // 2), group
        if had % work.isl and t > 2:
            isl += 1  # the last prompt is cut short
    elif work.prefill_chunk and had < work.isl:
        isl, chunk = 2 * group, group
    prompts = par.dp * par.attention_dp * work.micro_batches * -(-t // isl)
    return {"isl": isl, "prefill_chunk": chunk, "batch": prompts}


def with_sizes(graph: PlanGraph, sizes: PlanGraph, layers: dict[int, int]) -> PlanGraph:
    """The ops and edges of ``graph`` in the kept layers, with tensors and row counts of the blocks of the same names in
    ``sizes``; the residual stream of a kept layer is that of the kept layer before it."""
    back = {old: new for new, old in layers.items()}
    alike = {_likeness(block, block.layer): block for block in sizes.blocks}
    index: dict[int, int] = {}
    blocks: list[OpBlock] = []
    for number, block in enumerate(graph.blocks):
        if block.layer is not None and block.layer not in back:
            continue
        name, layer = block.name, None
        if block.layer is not None:
            layer = back[block.layer]
            name = name.replace(f"L{block.layer}.", f"L{layer}.", 1)
        like = sizes.blocks[sizes.by_name[name]] if name in sizes.by_name else alike.get(_likeness(block, layer))
        index[number] = len(blocks)
        rows = block.rows
        if like is not None and block.rows is not None and like.rows is not None and len(like) == len(block):
            rows = like.rows
        made = replace(
            block,
            name=name,
            layer=layer,
            reads=dict(like.reads) if like is not None and set(like.reads) == set(block.reads) else block.reads,
            writes=dict(like.writes) if like is not None and set(like.writes) == set(block.writes) else block.writes,
            rows=rows,
        )
        blocks.append(made)
    edges = [
        replace(edge, source=index[edge.source], target=index[edge.target])
        for edge in graph.edges
        if edge.source in index and edge.target in index
    ]
    edges += _joins(graph, sizes, index, blocks, back)
    tensors = [replace(e, tensor=_tensor(blocks[e.target], e)) for e in edges]
    return PlanGraph(tuple(blocks), tuple(tensors), graph.world_size)


def _likeness(block: OpBlock, layer: int | None) -> tuple[object, ...]:
    """What blocks have in common whose sizes are the same."""
    return block.kind, layer, block.micro_batch, block.slot, *block.reads, *block.writes


def _tensor(block: OpBlock, edge: EdgeBlock) -> TensorType:
    return block.reads.get(edge.into, edge.tensor)


def _joins(
    graph: PlanGraph, sizes: PlanGraph, index: dict[int, int], blocks: list[OpBlock], back: dict[int, int]
) -> list[EdgeBlock]:
    """Edges over layers that were left out: as the small compiler joins the kept ones, where the plan has an edge of the same
    kind from the layer before into the kept one."""
    names = {block.name: number for number, block in enumerate(blocks)}
    have = {(edge.source, edge.target) for edge in graph.edges if edge.source in index and edge.target in index}
    present = {(index[a], index[b]) for a, b in have}
    entered = {
        (index[edge.target], edge.into) for edge in graph.edges if edge.target in index and edge.source not in index
    }
    found = []
    for edge in sizes.edges:
        source, target = sizes.blocks[edge.source].name, sizes.blocks[edge.target].name
        if source in names and target in names:
            pair = names[source], names[target]
            if pair not in present and (pair[1], edge.into) in entered:
                found.append(replace(edge, source=pair[0], target=pair[1]))
    return found
