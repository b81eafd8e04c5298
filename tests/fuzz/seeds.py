"""Small specs of every kind, from which both fuzzers start."""

from __future__ import annotations

from typing import Any

from small_specs import GPU, LINKS, MOE, small_spec

import planc
from planc.prove.recorded import proved

ONE_NODE = {"groups": [{"nodes": 1, "gpus_per_node": 2}]}
ATTENTION = {"heads": 8, "head_dim": 8}
MLA = {"kind": "mla", "heads": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
TRAFFIC = {"popularity": "zipf", "tokens": 64, "topics": 2}
POD = {"leaf": {"nodes": 1, "oversubscription": 2.0, "latency": "1 us"}, "spine": {"latency": "2 us"}}
CLAIM = {"name": "said", "tps": 100.0, "gpus": 8, "latency_split": {"attention": 0.4, "experts": 0.6}}
ROUNDS = {"on_overflow": "rounds"}
PARTS: tuple[dict[str, Any], ...] = (
    {"cluster": ONE_NODE, "model": {"layers": 1, "moe": MOE | {"experts": 2}}},
    {"cluster": ONE_NODE, "parallelism": {"ep": 2, "tp": 2, "expert_tp": 2}, "expert_rule": "none"},
    {"parallelism": {"dp": 2, "pp": 2, "stages": [1, 1]}, "expert_rule": ROUNDS, "claims": [CLAIM]},
    {"model": {"moe": MOE | {"shared_experts": 1}, "vocab": 100}, "parallelism": {"tp": 2, "gating": "leader"}},
    {
        "model": {"attention": MLA, "moe": None, "dense_mlp": {"intermediate": 32}},
        "parallelism": {"tp": 2, "ep": "auto"},
    },
    {
        "model": {
            "attention": ATTENTION | {"kind": "gqa", "kv_heads": 2},
            "first_k_dense": 1,
            "dense_mlp": {"intermediate": 32},
        }
    },
    {"cluster": ONE_NODE, "traffic": TRAFFIC, "expert_rule": ROUNDS, "scenarios": {"flat": {"tokens": 64}}},
    {"traffic": TRAFFIC, "model": {"layers": 1, "moe": MOE | {"experts": 4}}, "cluster": {"links": LINKS | POD}},
    {"workload": {"phase": "prefill", "prefill_chunk": 8}, "parallelism": {"tp": 2, "tp_comm": "reduce_scatter"}},
    {"workload": {"micro_batches": 2}, "parallelism": {"dp": 2}, "expert_rule": ROUNDS},
    {
        "cluster": {
            "groups": [{"name": "a", "nodes": 1, "gpus_per_node": 4}, {"name": "b", "nodes": 2, "gpus_per_node": 2}]
        }
    },
    {"gpu": GPU | {"memory": "10 MB"}, "parallelism": {}},
)


def specs() -> list[planc.Spec]:
    return [small_spec(**parts) for parts in PARTS]


def plans() -> list[planc.VerifiedPlan]:
    """Plans of the specs; the first one carries its proof."""
    first, *others = [planc.compile(spec) for spec in specs()]
    return [proved(first), *others]
