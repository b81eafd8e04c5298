"""The proof holds for every kind of plan: examples, and small plans that between them have everything a spec can ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_specs import LINKS, MOE, ROOT, Compiled, small_spec

import planc
from planc.prove import Proof, prove

EXAMPLES = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml") if "10240" not in path.stem)

RMS = {"norm": "rms"}
DENSE = {"layers": 3, "first_k_dense": 1, "dense_mlp": {"intermediate": 64, "gated": False}}
ALL_DENSE = {"layers": 3, "moe": None, "dense_mlp": {"intermediate": 64, "gated": True}}
MLA = {
    "attention": {
        "kind": "mla",
        "heads": 8,
        "head_dim": 0,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
}
QUERY_RANK = {"attention": MLA["attention"] | {"q_lora_rank": 12, "bias": True, "out_bias": True}}
ALL_BIASES = {"attention": {"heads": 8, "head_dim": 8, "bias": True, "out_bias": True, "qk_norm": True}}
SHARED = {"moe": MOE | {"shared_experts": 2, "gated": True}}
SHARED_GATE = {"moe": MOE | {"shared_experts": 1, "shared_gate": True}}
GROUPS = {"groups": 4, "top_groups": 2, "gate_bias": True}
TIED = {"vocab": 101, "tied_embeddings": True, "norm": "rms"}
UNEVEN = {
    "name": "lab",
    "links": LINKS,
    "groups": [{"name": "a", "nodes": 2, "gpus_per_node": 8}, {"name": "b", "nodes": 4, "gpus_per_node": 4}],
}


def gqa(heads: int, kv_heads: int) -> dict[str, Any]:
    return {"attention": {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": 8}}


def prefill(**changes: int) -> dict[str, Any]:
    return {"phase": "prefill", "batch": 32, "isl": 16} | changes


#: parts for `small_spec`
PLANS: dict[str, dict[str, Any]] = {
    # attention
    "MHA": {"parallelism": {"ep": 8, "tp": 4}},
    "GQA, fewer KV heads than tp": {"model": gqa(8, 2), "parallelism": {"ep": 8, "tp": 4}},
    "GQA, one KV head": {"model": gqa(8, 1), "parallelism": {"ep": 8, "tp": 4}},
    "GQA, as many KV heads as tp": {"model": gqa(16, 4), "parallelism": {"ep": 8, "tp": 4}},
    "GQA, more KV heads than tp": {"model": gqa(16, 8), "parallelism": {"ep": 8, "tp": 2}},
    "MLA without a query rank": {"model": MLA, "parallelism": {"ep": 8, "tp": 2}},
    "MLA with a query rank, biases and norms": {"model": QUERY_RANK | RMS, "parallelism": {"ep": 8, "tp": 4}},
    "biases of q, k, v and o, qk norm": {"model": ALL_BIASES, "parallelism": {"ep": 8, "tp": 4}},
    "biases and qk norm, GQA": {
        "model": {"attention": gqa(8, 2)["attention"] | {"bias": True, "out_bias": True, "qk_norm": True}} | RMS,
        "parallelism": {"ep": 8, "tp": 4, "gating": "sharded", "tp_comm": "reduce_scatter"},
    },
    # layers, gates, experts
    "dense layers before MoE layers": {"model": DENSE | RMS, "parallelism": {"ep": 8, "tp": 2}},
    "every second layer": {"model": DENSE | {"layers": 4, "moe_stride": 2, "first_k_dense": 0}},
    "no MoE layer": {"model": ALL_DENSE, "parallelism": {"ep": 2, "tp": 2, "dp": 2, "pp": 2}},
    "no MoE layer, a vocabulary": {"model": ALL_DENSE | TIED, "parallelism": {"ep": 4, "tp": 4, "dp": 2}},
    "top-1": {"model": {"moe": MOE | {"top_k": 1, "gated": True}}},
    "top-8 of 8": {"model": {"moe": MOE | {"top_k": 8}}},
    "top-8 of 32": {"model": {"moe": MOE | {"top_k": 8, "experts": 32}}, "parallelism": {"ep": 8}},
    "sigmoid gate, groups and bias": {"model": {"moe": MOE | GROUPS | {"gate": "sigmoid"}} | RMS},
    "softmax gate, groups and bias": {"model": {"moe": MOE | GROUPS}},
    "biases of gated experts over shards": {
        "model": {"moe": MOE | {"expert_bias": True, "gated": True}},
        "parallelism": {"ep": 8, "tp": 2, "expert_tp": 2},
    },
    "biases of experts": {"model": {"moe": MOE | {"expert_bias": True}}},
    "shared experts, leader gating": {
        "model": SHARED,
        "parallelism": {"ep": 8, "tp": 4, "gating": "leader"},
    },
    "shared experts, sharded gating": {"model": SHARED, "parallelism": {"ep": 8, "tp": 4, "gating": "sharded"}},
    "gated shared experts, leader gating": {
        "model": SHARED_GATE | RMS,
        "parallelism": {"ep": 8, "tp": 4, "gating": "leader"},
    },
    "gated shared experts, sharded gating": {
        "model": SHARED_GATE,
        "parallelism": {"ep": 8, "tp": 2, "gating": "sharded"},
    },
    # degrees
    "attention DP alone": {"parallelism": {"ep": 8, "tp": 1}},
    "replicas": {"parallelism": {"dp": 2, "ep": 4, "tp": 2}},
    "replicas of one GPU": {"parallelism": {"dp": 8, "ep": 1, "tp": 1}, "model": TIED},
    "stages of one GPU": {"parallelism": {"dp": 2, "pp": 4, "ep": 1, "tp": 1}, "model": DENSE | {"layers": 4} | TIED},
    "even stages": {"model": {"layers": 4} | TIED, "parallelism": {"pp": 2, "ep": 4, "tp": 2}},
    "uneven stages": {
        "model": {"layers": 5} | TIED,
        "parallelism": {"pp": 4, "ep": 2, "tp": 1, "stages": [2, 1, 1, 1]},
    },
    "expert TP, leader gating": {
        "model": SHARED,
        "parallelism": {"ep": 8, "tp": 2, "expert_tp": 4, "gating": "leader"},
    },
    "expert TP, sharded gating": {"parallelism": {"ep": 8, "tp": 4, "expert_tp": 2, "gating": "sharded"}},
    "reduce-scatter": {
        "model": SHARED_GATE | RMS,
        "parallelism": {"ep": 8, "tp": 4, "gating": "sharded", "tp_comm": "reduce_scatter"},
    },
    "reduce-scatter, turns, micro-batches": {
        "parallelism": {"ep": 4, "dp": 2, "tp": 2, "gating": "sharded", "tp_comm": "reduce_scatter"},
        "workload": {"micro_batches": 3},
    },
    # places
    "several experts a GPU": {"model": {"moe": MOE | {"experts": 20}}, "parallelism": {"ep": 8, "tp": 1}},
    "replicated experts": {
        "model": {"moe": MOE | {"experts": 3}},
        "parallelism": {"ep": 8, "tp": 1},
        "expert_rule": {"spares": "replicate"},
    },
    "replicated experts over shards": {
        "model": {"moe": MOE | {"experts": 3}},
        "parallelism": {"ep": 8, "tp": 2, "expert_tp": 2},
        "expert_rule": {"spares": "replicate"},
    },
    "idle spares": {"model": {"moe": MOE | {"experts": 5}}, "parallelism": {"ep": 8, "tp": 2}},
    "scope model": {
        "model": {"layers": 2, "moe": MOE | {"experts": 4}},
        "parallelism": {"ep": 8, "tp": 1},
        "expert_rule": {"scope": "model"},
    },
    "round robin": {"model": {"moe": MOE | {"experts": 16}}, "placement": {"policy": "round_robin"}},
    "no expert rule": {"model": {"moe": MOE | {"experts": 16}}, "expert_rule": "none", "parallelism": {"ep": 8}},
    "unequal nodes": {"cluster": UNEVEN, "model": {"moe": MOE | {"experts": 32}}, "parallelism": {"ep": 32, "tp": 4}},
    "known traffic": {
        "model": {"layers": 4, "moe": MOE | {"experts": 16}},
        "parallelism": {"ep": 8, "tp": 2},
        "traffic": {"popularity": "zipf", "exponent": 0.7, "topics": 3, "tokens": 400},
        "expert_rule": {"scope": "layer", "spares": "replicate"},
    },
    # ends and steps
    "a vocabulary that tp does not divide": {"model": {"vocab": 101} | RMS, "parallelism": {"ep": 8, "tp": 4}},
    "a vocabulary that tp divides": {"model": {"vocab": 96}, "parallelism": {"ep": 8, "tp": 4}},
    "tied embeddings": {"model": TIED, "parallelism": {"ep": 8, "tp": 2}},
    "micro-batches": {"parallelism": {"ep": 8, "tp": 2}, "workload": {"micro_batches": 3}, "model": TIED},
    "a batch that does not divide": {"workload": {"batch": 37, "micro_batches": 2}, "parallelism": {"ep": 8, "tp": 4}},
    "narrow dtypes": {"model": {"dtypes": {"weights": "fp8", "dispatch": "fp8", "combine": "bf16"}, "vocab": 96}},
    # prefill
    "whole prompts": {"workload": prefill(), "model": TIED, "parallelism": {"ep": 8, "tp": 2}},
    "chunks of a prompt": {"workload": prefill(prefill_chunk=8), "model": MLA | RMS, "parallelism": {"ep": 8, "tp": 2}},
    "chunks of several prompts": {"workload": prefill(isl=4, prefill_chunk=16), "model": gqa(8, 2) | TIED},
    "chunks with a prompt cut short": {
        "workload": prefill(isl=6, prefill_chunk=16),
        "model": {"vocab": 96},
        "parallelism": {"ep": 8, "tp": 4, "gating": "sharded"},
    },
    "prompts over stages and micro-batches": {
        "workload": prefill(micro_batches=2),
        "model": DENSE | {"vocab": 96},
        "parallelism": {"pp": 2, "ep": 4, "tp": 2},
    },
}


def holds(proof: Proof) -> None:
    assert proof.faults == []
    assert proof.max_relative_error <= 1e-9
    assert proof.bytes_moved == proof.bytes_planned and proof.bytes_equal
    assert proof.memory_equal and proof.holds
    assert proof.ops > 0 and proof.errors


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, example: Compiled) -> None:
    plan = example(name)
    proof = prove(plan)
    holds(proof)
    assert proof.ranks == plan.parallelism.world_size
    assert set(proof.layers.values()) <= set(range(plan.spec.model.layers))


@pytest.mark.parametrize("name", PLANS)
def test_small_plans(name: str) -> None:
    """All layers of each, on more tokens than the least."""
    plan = planc.compile(small_spec(**PLANS[name]))
    proof = prove(plan, layers=99, tokens=3, steps=3)
    holds(proof)
    assert proof.layers == {n: n for n in range(plan.spec.model.layers)}
    moe = plan.spec.model.moe
    assert ("aggregate" in proof.errors) == (moe is not None) and "residual_add" in proof.errors
    assert ("sample" in proof.errors) == bool(plan.spec.model.vocab)


def test_what_is_asked_for_is_in_the_plans() -> None:
    """The names above keep their word."""
    plans = {name: planc.compile(small_spec(**PLANS[name])) for name in PLANS}
    kinds = {block.kind for plan in plans.values() for block in plan.blocks.blocks}
    assert {"reduce_scatter", "broadcast", "all_gather", "pp_send", "shared_up", "dense_up"} <= kinds
    assert plans["several experts a GPU"].placement.rounds == 3
    assert (plans["replicated experts"].placement.layers[0].copies > 1).any()
    assert len(plans["idle spares"].placement.layers[0].rank) == 5
    assert len({p.rank.tobytes() + p.expert.tobytes() for p in plans["known traffic"].placement.layers.values()}) > 1
    assert plans["known traffic"].certificate is not None
    assert plans["uneven stages"].parallelism.stages == ((0, 2), (2, 3), (3, 4), (4, 5))
    assert [plan.parallelism.expert_tp for name, plan in plans.items() if name.startswith("expert TP")] == [4, 2]
    assert plans["replicas of one GPU"].parallelism.dp == 8


def test_permuted_experts_of_every_layer(example: Compiled) -> None:
    """Layers whose experts lie elsewhere are not alike: every one is run."""
    traffic = "traffic={popularity: zipf, exponent: 0.7, topics: 4, tokens: 600}"
    plan = example("moe-61l-ep64-dp2", traffic, "model={base: moe-61l, layers: 8}")
    places = {part.rank.tobytes() for part in plan.placement.layers.values()}
    proof = prove(plan)
    holds(proof)
    assert len(proof.layers) >= len(places) > 1


def test_seeds_and_sizes_change_numbers_not_the_verdict() -> None:
    plan = planc.compile(small_spec(**PLANS["expert TP, leader gating"]))
    proofs = [prove(plan, **how) for how in ({"seed": 1}, {"seed": 2}, {"scale": 3}, {"tokens": 7}, {"steps": 5})]
    for proof in proofs:
        holds(proof)
    assert proofs[0].errors != proofs[1].errors
    assert (
        proofs[0].bytes_moved["dispatch"] < proofs[2].bytes_moved["dispatch"] < proofs[2].bytes_moved["all_reduce"] * 99
    )
    assert prove(plan, seed=1).errors == proofs[0].errors


def test_chunks_of_a_prompt_are_steps() -> None:
    """The second chunk attends to the KV cache that the first one wrote."""
    proof = prove(planc.compile(small_spec(**PLANS["chunks of a prompt"])), steps=9)
    holds(proof)
    assert proof.steps == 2
    assert prove(planc.compile(small_spec(**PLANS["whole prompts"])), steps=9).steps == 1


def test_a_deep_model_without_norms_keeps_its_size() -> None:
    """All 61 layers: rounding errors do not grow with what a layer adds."""
    proof = prove(planc.compile(small_spec(model={"layers": 61}, parallelism={"ep": 8, "tp": 4})), layers=61)
    holds(proof)
    assert len(proof.layers) == 61 and proof.max_relative_error < 1e-11


def test_nothing_needs_a_draft_to_be_sound() -> None:
    """A draft that cannot even be made small gives a fault, not an exception."""
    from dataclasses import replace

    plan = planc.compile(small_spec())
    draft = planc.verify.Draft(
        plan.spec, replace(plan.parallelism, stages=((0, 1),)), {}, plan.placement, plan.memory, plan.blocks
    )
    proof = prove(draft)
    assert not proof.holds and proof.faults[0][0] == "plan"
    assert np.isfinite(proof.seconds)
