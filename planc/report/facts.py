"""What the plan document says: plain values computed from the plan, one function per section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.cost import Floors, step_floors
from planc.placement import ITEMS, Placement, copy_tokens
from planc.report.compare import traditional_rows
from planc.report.placement import placement_facts
from planc.report.risks import claim_rows, optimality_rows, risk_rows
from planc.spec import LINK_CLASSES, ExpertRule, parameter_counts
from planc.verify import LARGE_EP, VerifiedPlan
from planc.verify.codec import encode_numbers


def document_facts(plan: VerifiedPlan) -> dict[str, Any]:
    """Values for ``deployment_plan.md.j2``."""
    floors = step_floors(plan)
    return {
        "plan": plan,
        "spec": plan.spec,
        "par": plan.parallelism,
        "rule": rule_text(plan),
        "counts": parameter_counts(plan.spec.model),
        "layers": {
            "dense": encode_numbers(list(plan.spec.model.dense_layer_ids)) or "none",
            "moe": encode_numbers(list(plan.spec.model.moe_layer_ids)) or "none",
        },
        "sources": sorted(plan.spec.sources.items()),
        "placements": placement_rows(plan),
        "memory": memory_rows(plan),
        "fullest": plan.memory.fullest,
        "ops": op_rows(plan),
        "volumes": plan.volumes,
        "link_classes": LINK_CLASSES,
        "floors": floors,
        "floor_rows": floor_rows(floors),
        "prefill_steps": -(-plan.spec.workload.batch * plan.spec.workload.isl // plan.tokens.padded),
        "large_ep_from": LARGE_EP,
        "large_ep": plan.parallelism.ep >= LARGE_EP,
        "optimality": optimality_rows(plan, floors),
        "traditional": traditional_rows(plan),
        "risks": risk_rows(plan, floors),
        "claims": claim_rows(plan, floors),
        **(placement_facts(plan) if plan.certificate is not None else {"certificate": None}),
    }


def rule_text(plan: VerifiedPlan) -> str:
    """The expert rule in one line, its scope always named."""
    rule = plan.spec.expert_rule
    if not isinstance(rule, ExpertRule):
        return "none: experts share GPUs (baseline)"
    what = "" if plan.parallelism.expert_tp == 1 else f" expert shard (1/{plan.parallelism.expert_tp} of an expert)"
    text = f"at most {rule.slots_per_gpu}{what} per GPU, scope {rule.scope}"
    text += {"layer": " (of any one layer)", "model": " (of all layers together)"}[rule.scope]
    return text + (f"; relaxed to r = {plan.placement.rounds}, in rounds" if plan.placement.relaxed else "")


def placement_rows(plan: VerifiedPlan) -> list[dict[str, Any]]:
    """A row per kind of layer placement: layers, experts, ranks of the first replica, copies, tokens per copy. Layers that
    differ only in which expert is on which GPU share a row, which says so."""
    seen: dict[int, list[int]] = {}
    for layer, part in sorted(plan.placement.layers.items()):
        seen.setdefault(id(part), []).append(layer)
    rows = []
    for layers in seen.values():
        part = plan.placement.layers[layers[0]]
        tokens = copy_tokens(plan.spec, plan.parallelism, plan.placement, layers[0])
        first = plan.parallelism.stage_ranks(plan.parallelism.stage_of_layer(layers[0]))[0, 0]
        ranks = np.unique(first + part.rank)
        rows.append(
            {
                "layers": encode_numbers(layers),
                "experts": len(part.copies),
                "copies": len(part.expert),
                "ranks": encode_numbers(ranks.tolist()),
                "rank_count": len(ranks) * plan.parallelism.expert_tp,
                "idle": plan.parallelism.ep - len(ranks) * plan.parallelism.expert_tp,
                "rounds": part.rounds,
                "tokens": f"{tokens.min()}–{tokens.max()}" if tokens.min() != tokens.max() else str(tokens.min()),
                "map": _map_text(plan.placement, layers[0], int(first)),
                "ids": layers,
            }
        )
    return list(_merged(rows))


def _merged(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows alike but for their map as one."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("experts", "copies", "ranks", "rank_count", "idle", "rounds", "tokens"))
        kinds.setdefault(key, []).append(row)
    for members in kinds.values():
        first = members[0]
        if len(members) > 1:
            layers = sorted(layer for row in members for layer in row["ids"])
            text = f"{len(members)} maps, all in plan.json; layer {first['ids'][0]}: {first['map']}"
            first = first | {"layers": encode_numbers(layers), "map": text}
        yield first


def _map_text(placement: Placement, layer: int, first: int) -> str:
    """``E0→GPU 0, E1→GPU 1, …`` in full up to 16 copies, else both ends."""
    part = placement.layers[layer]
    pairs = [f"E{e} on GPU {first + r}" for e, r in zip(part.expert.tolist(), part.rank.tolist(), strict=True)]
    return ", ".join(pairs if len(pairs) <= 16 else [*pairs[:4], "…", *pairs[-2:]])


def memory_rows(plan: VerifiedPlan) -> list[dict[str, Any]]:
    """A row per item: bytes on the fullest rank, on the emptiest, and over all ranks."""
    memory = plan.memory
    low = int(np.argmax(memory.headroom))
    named = {name: memory.items[name] for name in ITEMS} | {"reserve": memory.reserve}
    return [
        {
            "name": name.replace("_", " "),
            "fullest": int(v[memory.fullest]),
            "emptiest": int(v[low]),
            "total": int(v.sum()),
        }
        for name, v in named.items()
        if v.any()
    ]


def op_rows(plan: VerifiedPlan) -> list[dict[str, Any]]:
    """A row per kind of op: how many, on how many ranks each, and what it writes in its first layer."""
    rows: dict[str, dict[str, Any]] = {}
    for block in plan.blocks.blocks:
        row = rows.setdefault(block.kind, {"kind": block.kind, "count": 0, "group": block.ranks.shape[1], "tensor": ""})
        row["count"] += len(block)
        if not row["tensor"]:
            row["tensor"] = next((t.text() for t in (*block.writes.values(), *block.reads.values())), "")
    return list(rows.values())


def floor_rows(floors: Floors) -> list[tuple[str, float, str]]:
    """(what, seconds, how it is derived); what a step does not have is left out."""
    rows = [
        ("one expert read from memory", floors.expert_read, "expert bytes ÷ (memory bandwidth × utilisation)"),
        ("attention weights of one layer", floors.attention_read, "attention bytes of a rank ÷ the same"),
        ("weights on the way of a token", floors.weights_read, "slowest rank of each stage, stages added"),
        ("KV cache of a micro-batch", floors.kv_read, "at the input length, likewise; grows with every output token"),
        (
            "memory reads of the step",
            floors.memory,
            "the larger of: one micro-batch through all stages, the busiest rank's whole work",
        ),
        ("compute", floors.compute, "FLOPs of the busiest rank ÷ (peak × MFU)"),
        (
            "transfers",
            floors.transfer,
            "busiest rank's bytes of every collective ÷ link bandwidth; one copy per token and expert",
        ),
        ("link latencies", floors.latency, "one latency per collective on the way"),
        (
            "the step, if all of these overlapped",
            floors.step,
            "the larger of memory and compute; transfers can be shortened by sending one copy per node",
        ),
    ]
    return [row for row in rows if row[1] > 0]
