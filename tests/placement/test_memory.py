"""Bytes on every rank, computed again in plain Python from the definitions: item by item, rank by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from small_specs import MOE, ROOT, Small, small_spec

import planc
from planc.placement import ITEMS, memory_table
from planc.placement.memory import largest_that_fits

BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}
MLA = {
    "kind": "mla",
    "heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
GQA = {"kind": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 8, "bias": True, "qk_norm": True}
MIXED = {"layers": 4, "first_k_dense": 1, "dense_mlp": {"intermediate": 48}, "norm": "rms", "vocab": 203}
FP8 = {"weights": "fp8", "expert_weights": "fp8", "dispatch": "fp8"}

SPECS: dict[str, Callable[[], planc.Spec]] = {
    "mha": lambda: small_spec(parallelism={"ep": 8, "tp": 2, "gating": "leader"}),
    "gqa with fewer KV heads than tp": lambda: small_spec(
        model=MIXED | {"attention": GQA}, parallelism={"ep": 8, "tp": 4}
    ),
    "gqa": lambda: small_spec(model={"attention": GQA}, parallelism={"dp": 2, "ep": 4, "tp": 2, "gating": "leader"}),
    "mla": lambda: small_spec(model=MIXED | {"attention": MLA, "dtypes": FP8}, parallelism={"ep": 8, "tp": 2}),
    "tied, one stage": lambda: small_spec(
        model=MIXED | {"tied_embeddings": True}, parallelism={"pp": 1, "ep": 8, "tp": 4}
    ),
    "tied, two stages": lambda: small_spec(
        model=MIXED | {"tied_embeddings": True}, parallelism={"pp": 2, "ep": 4, "tp": 4}
    ),
    "shared experts, leader": lambda: small_spec(
        model=MIXED | {"moe": MOE | {"shared_experts": 2, "shared_gate": True, "gate_bias": True, "gated": True}},
        parallelism={"ep": 8, "tp": 2, "gating": "leader"},
        workload={"micro_batches": 2},
    ),
    "shared experts, sharded": lambda: small_spec(
        model={"moe": MOE | {"shared_experts": 1, "expert_bias": True}}, parallelism={"ep": 8, "tp": 4}
    ),
    "turns": lambda: small_spec(
        model={"moe": MOE | {"experts": 13, "top_k": 3}}, parallelism={"dp": 2, "ep": 4, "tp": 1}
    ),
    "expert shards": lambda: small_spec(parallelism={"ep": 8, "tp": 2, "expert_tp": 4}),
    "spares": lambda: small_spec(
        model={"moe": MOE | {"experts": 5}}, parallelism={"ep": 8, "tp": 1}, expert_rule={"spares": "replicate"}
    ),
    "scope model": lambda: small_spec(
        model={"moe": MOE | {"experts": 3}}, parallelism={"ep": 8, "tp": 1}, expert_rule={"scope": "model"}
    ),
    "prefill": lambda: small_spec(
        model=MIXED,
        workload={"phase": "prefill", "prefill_chunk": 24, "micro_batches": 2},
        parallelism={"ep": 8, "tp": 2},
    ),
    "unequal nodes": lambda: small_spec(
        cluster={
            "groups": [
                {
                    "nodes": 2,
                    "gpus_per_node": 8,
                    "gpu": {
                        "name": "large",
                        "peak": {"bf16": "1 TFLOPS"},
                        "memory": "3 GB",
                        "memory_bandwidth": "1 TB/s",
                        "reserve": 0.2,
                    },
                },
                {"nodes": 4, "gpus_per_node": 4},
            ]
        },
        parallelism={"ep": 32, "tp": 4},
        model={"moe": MOE | {"experts": 24}},
    ),
    "reference": lambda: planc.load_spec(ROOT / "specs/moe-61l-ep64-dp2.yaml"),
}


def attention_bytes(model: Any, tp: int) -> int:
    """One layer's attention on one rank of a TP group."""
    a, h = model.attention, model.hidden
    heads = a.heads // tp
    if a.kind == "mla":
        rope, nope = a.qk_rope_head_dim, a.qk_nope_head_dim
        down = (
            h * a.q_lora_rank
            + h * (a.kv_lora_rank + rope)
            + (a.q_lora_rank + a.kv_lora_rank if model.norm == "rms" else 0)
        )
        up = heads * (a.q_lora_rank * (nope + rope) + a.kv_lora_rank * (nope + a.v_head_dim))
        return (down + up + heads * a.v_head_dim * h) * BYTES[model.dtypes.weights]
    kv_heads = a.heads if a.kind == "mha" else a.kv_heads
    mine = max(1, kv_heads // tp)
    weights = h * heads * a.head_dim * 2 + h * mine * a.head_dim * 2
    weights += (heads + 2 * mine) * a.head_dim if a.bias else 0
    weights += 2 * a.head_dim if a.qk_norm else 0
    return weights * BYTES[model.dtypes.weights]


def kv_token_bytes(model: Any, tp: int) -> int:
    """KV cache of one token and layer on one rank."""
    a = model.attention
    if a.kind == "mla":
        return (a.kv_lora_rank + a.qk_rope_head_dim) * BYTES[model.dtypes.kv_cache]
    kv_heads = a.heads if a.kind == "mha" else a.kv_heads
    return 2 * max(1, kv_heads // tp) * a.head_dim * BYTES[model.dtypes.kv_cache]


def group_tokens(plan: planc.VerifiedPlan) -> tuple[int, int, int]:
    """(tokens of a TP group, tokens of a rank that gates, sequences of a TP group)."""
    work, par = plan.spec.workload, plan.parallelism
    groups = par.dp * par.ep // par.tp
    sequences = (work.batch + groups - 1) // groups
    wanted = sequences if work.phase == "decode" else work.prefill_chunk or work.isl
    t = (wanted + work.micro_batches - 1) // work.micro_batches
    leader = par.gating == "leader" and par.tp > 1
    if not leader:
        while t % par.tp:
            t += 1
    return t, t if leader else t // par.tp, sequences


def expert_loads(plan: planc.VerifiedPlan, layer: int) -> list[tuple[int, int, int]]:
    """(expert, rank in the EP group, tokens) of every copy: choice n of the group goes to expert n mod E, in turn to its copies."""
    par, moe, part = plan.parallelism, plan.spec.model.moe, plan.placement.layers[layer]
    assert moe is not None
    _, source, _ = group_tokens(plan)
    sources = par.ep // par.tp if par.gating == "leader" else par.ep
    copies = sorted(zip(part.expert.tolist(), part.rank.tolist(), strict=True))
    of_expert: dict[int, list[int]] = {}
    for number, (expert, _) in enumerate(copies):
        of_expert.setdefault(expert, []).append(number)
    loads, turn = [0] * len(copies), [0] * moe.experts
    for choice in range(sources * source * moe.top_k):
        expert = choice % moe.experts
        mine = of_expert[expert]
        loads[mine[turn[expert] % len(mine)]] += 1
        turn[expert] += 1
    return [(e, r, n) for (e, r), n in zip(copies, loads, strict=True)]


def hand_memory(plan: planc.VerifiedPlan, rank: int) -> dict[str, int]:
    """Item -> bytes of one rank."""
    spec, par, model = plan.spec, plan.parallelism, plan.spec.model
    stage, local = rank % (par.pp * par.ep) // par.ep, rank % par.ep
    first, end = par.stages[stage]
    layers, moe_layers = range(first, end), [i for i in model.moe_layer_ids if first <= i < end]
    dense_layers = [i for i in layers if i not in moe_layers]
    weight, act = BYTES[model.dtypes.weights], BYTES[model.dtypes.activations]
    small = act if model.dtypes.weights == "fp8" else weight  # gates, norms and embeddings are not quantized
    leader = par.gating == "leader" and par.tp > 1
    gates = not leader or local % par.tp == 0
    t, source, sequences = group_tokens(plan)
    h, moe, a = model.hidden, model.moe, model.attention
    found = dict.fromkeys(ITEMS, 0)
    found["attention"] = len(layers) * attention_bytes(model, par.tp)
    found["kv_cache"] = (
        len(layers) * sequences * (spec.workload.isl + spec.workload.osl) * kv_token_bytes(model, par.tp)
    )
    if model.norm == "rms":
        found["norms"] = (2 * len(layers) * h + (h if stage == par.pp - 1 else 0)) * small
    shard = (model.vocab + par.tp - 1) // par.tp
    found["embedding"] = model.vocab * h * small if stage == 0 else 0
    found["head"] = shard * h * small if stage == par.pp - 1 and not (model.tied_embeddings and par.pp == 1) else 0
    dims = (a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim) if a.kind == "mla" else (a.head_dim, a.head_dim)
    heads = a.heads // par.tp
    new = kv_token_bytes(model, par.tp) // BYTES[model.dtypes.kv_cache]
    alive = [t * (h + heads * dims[0] + new), t * (heads * sum(dims) + new), t * (heads * dims[1] + h)]
    if model.dense_mlp is not None and model.dense_layer_ids:
        matrices = 3 if model.dense_mlp.gated else 2
        found["dense_mlp"] = len(dense_layers) * matrices * h * model.dense_mlp.intermediate // par.tp * weight
        if dense_layers:
            alive.append(t * ((matrices - 1) * model.dense_mlp.intermediate // par.tp + h))
    if model.vocab and stage == par.pp - 1:
        work = spec.workload
        n = t if work.phase == "decode" else max(1, t * work.micro_batches // work.isl)
        alive.append(n * (h + shard))
        if par.tp > 1:
            alive.append(n * shard * (par.tp + 1))  # this rank's shard of the logits, and all of them
    if moe is not None:
        matrices = 3 if moe.gated else 2
        width = moe.intermediate // par.expert_tp
        whole = matrices * h * moe.intermediate + ((matrices - 1) * moe.intermediate + h if moe.expert_bias else 0)
        expert = whole * BYTES[model.dtypes.expert_weights or model.dtypes.weights] // par.expert_tp
        holder = local // par.expert_tp * par.expert_tp
        found["experts"] = expert * sum(len(plan.placement.experts_of_rank(rank).get(i, ())) for i in moe_layers)
        shared = moe.shared_intermediate or moe.shared_experts * moe.intermediate
        found["shared_experts"] = len(moe_layers) * matrices * h * shared // (par.tp if leader else 1) * weight
        gate = h * moe.experts + (moe.experts if moe.gate_bias else 0) + (h if moe.shared_gate else 0)
        found["gates"] = len(moe_layers) * gate * small if gates else 0
        if gates and moe_layers:
            alive.append(source * (h + moe.experts))
        if shared and moe_layers:
            alive.append((t if leader else source) * ((matrices - 1) * shared // (par.tp if leader else 1) + h))
        mine = [[n for _, r, n in expert_loads(plan, i) if r == holder] for i in moe_layers]
        alive.append(max((n for loads in mine for n in loads), default=0) * (matrices - 1) * width)
        received = max(map(sum, mine), default=0)
        dispatch, combine = (
            BYTES[d or model.dtypes.activations] for d in (model.dtypes.dispatch, model.dtypes.combine)
        )
        returned = source * moe.top_k * h * combine if gates and moe_layers else 0
        found["dispatch_buffers"] = (received * h * (dispatch + combine) + returned) * spec.workload.micro_batches
    found["activations"] = (max(alive) + 2 * t * h) * act * spec.workload.micro_batches
    return found


@pytest.mark.parametrize("name", SPECS)
def test_every_item_of_every_rank(name: str) -> None:
    plan = planc.compile(SPECS[name]())
    step = 1 if plan.parallelism.world_size <= 32 else 13
    for rank in range(0, plan.parallelism.world_size, step):
        found = plan.memory.of_rank(rank)
        reserve = found.pop("reserve")
        assert found == hand_memory(plan, rank), rank
        assert plan.memory.used[rank] == sum(found.values()) + reserve


def test_capacity_and_reserve_of_unequal_nodes() -> None:
    plan = planc.compile(SPECS["unequal nodes"]())
    assert plan.memory.capacity.tolist() == [3_000_000_000] * 16 + [1_000_000_000] * 16
    assert plan.memory.reserve.tolist() == [600_000_000] * 16 + [100_000_000] * 16
    assert plan.parallelism.tp == 4


@pytest.mark.parametrize(
    "name", ["mha", "mla", "turns", "tied, two stages", "prefill", "shared experts, leader", "unequal nodes"]
)
@pytest.mark.parametrize("key", ["batch", "isl"])
def test_the_limits_fit_and_one_more_does_not(name: str, key: str) -> None:
    plan = planc.compile(SPECS[name]())
    args = plan.parallelism, plan.placement

    def fits(value: int) -> bool:
        work = plan.spec.workload.model_copy(update={key: value})
        return memory_table(plan.spec.model_copy(update={"workload": work}), *args).fits

    limit = plan.limits[key]
    assert limit >= getattr(plan.spec.workload, key)
    assert fits(limit)
    assert not fits(limit + 1)


def test_a_limit_where_shorter_prompts_need_more(small: Small) -> None:
    """Prompts of one token make a prefill chunk need logits of every token, which do not fit; longer prompts do."""
    spec = small(
        model={"vocab": 300_000},
        workload={"phase": "prefill", "batch": 8, "isl": 1000, "prefill_chunk": 1000},
        parallelism={"ep": 8, "tp": 1},
    )
    plan = planc.compile(spec)
    assert largest_that_fits(plan.spec, plan.parallelism, plan.placement, "isl") >= 1000


def test_every_shard_of_an_expert_keeps_the_bias_of_the_output() -> None:
    """8 experts on 2 holders of 4 ranks: 4 experts of 2 layers, a quarter of their matrices and up bias, the whole down bias."""
    plan = planc.compile(
        small_spec(model={"moe": MOE | {"expert_bias": True}}, parallelism={"ep": 8, "tp": 1, "expert_tp": 4})
    )
    assert set(plan.memory.items["experts"].tolist()) == {2 * 4 * ((2 * 64 * 32 + 32) // 4 + 64) * 2}
