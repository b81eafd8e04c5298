"""What the plan document says: plain values computed from the plan, one function per section."""

from __future__ import annotations

from typing import Any

import numpy as np

from planc.cost import Floors, step_floors
from planc.cost.step import kv_length
from planc.graph import range_text
from planc.placement import ITEMS, Placement, copy_tokens
from planc.report.claims import claim_rows
from planc.report.compare import traditional_rows
from planc.report.estimate import busiest_links, class_rows, headline_rows, provenance_rows, target_rows
from planc.report.placement import placement_facts
from planc.report.risks import optimality_rows, risk_rows
from planc.schedule import Estimate
from planc.spec import LINK_CLASSES, ExpertRule, parameter_counts
from planc.verify import LARGE_EP, VerifiedPlan
from planc.verify.codec import encode_numbers


def document_facts(plan: VerifiedPlan, found: Estimate) -> dict[str, Any]:
    """Values for ``deployment_plan.md.j2``. ``found``: the prediction for the plan."""
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
        "claims": claim_rows(found),
        "prediction": prediction_facts(found),
        **(placement_facts(plan) if plan.certificate is not None else {"certificate": None}),
    }


def prediction_facts(found: Estimate) -> dict[str, Any]:
    """Values for ``prediction.md.j2``."""
    line, spec = found.own, found.plan.spec
    rows = headline_rows(found)
    if spec.workload.phase == "decode":
        summary = f"TPOT {rows[0][1]} ({rows[0][2]}), {rows[2][1]} TPS, {rows[3][1]} per GPU"
        floor = f"TPOT {rows[0][3]}, so at most {rows[2][3]} TPS at this batch, whatever the software"
    else:
        summary = f"TTFT {rows[1][1]} ({rows[1][2]})"
        floor = f"TTFT {rows[1][3]}, whatever the software"
    traffic = "Tokens choose experts evenly."
    if spec.traffic is not None:
        traffic = "Rows, ranks and links follow from the spec's traffic."
        if spec.traffic.file:
            traffic = "Tokens choose experts evenly here; `planc estimate` on the spec reads its recorded traffic."
    return {
        "headline": rows,
        "summary": summary,
        "floor": floor,
        "targets": target_rows(found),
        "traffic": traffic,
        "kv_len": f"{kv_length(spec):,.0f}",
        "classes": class_rows(line),
        "step": line.step,
        "split": line.split,
        "hidden": line.overlap_efficiency,
        "links": busiest_links(line),
        "provenance": provenance_rows(line),
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


MAX_ROWS = 8  #: of the placement table
_COUNTS = ("experts", "copies", "rank_count", "idle", "rounds", "tokens")


def placement_rows(plan: VerifiedPlan) -> list[dict[str, str]]:
    """A row per kind of layer placement: layers, experts, copies, GPUs, idle GPUs, experts per GPU, tokens per copy, and
    where the experts are. Layers that differ only in which expert is on which GPU share a row, which says so; where the
    GPUs that are in use differ, too, when there would be more than `MAX_ROWS` rows; the last row then has the rest."""
    by_map: dict[int, list[int]] = {}
    for layer, part in sorted(plan.placement.layers.items()):
        by_map.setdefault(id(part), []).append(layer)
    maps = [_map_facts(plan, layers) for layers in by_map.values()]
    groups = _grouped(maps, (*_COUNTS, "ranks"))
    if len(groups) > MAX_ROWS:
        groups = _grouped(maps, _COUNTS)
    rest = [facts for group in groups[MAX_ROWS - 1 :] for facts in group] if len(groups) > MAX_ROWS else []
    if not rest:
        return [_placement_row(group) for group in groups]
    last = _placement_row(rest) | {"map": f"… {len(rest)} more maps, all in plan.json"}
    return [*(_placement_row(group) for group in groups[: MAX_ROWS - 1]), last]


def _map_facts(plan: VerifiedPlan, layers: list[int]) -> dict[str, Any]:
    """Facts of layers that share one map; every count as (least, most)."""
    part, par = plan.placement.layers[layers[0]], plan.parallelism
    tokens = copy_tokens(plan.spec, par, plan.placement, layers[0])
    first = int(par.stage_ranks(par.stage_of_layer(layers[0]))[0, 0])
    ranks = np.unique(first + part.rank)
    used = len(ranks) * par.expert_tp
    one = {"experts": len(part.copies), "copies": len(part.expert), "rank_count": used, "idle": par.ep - used}
    return {
        **{name: (value, value) for name, value in one.items()},
        "rounds": (part.rounds, part.rounds),
        "tokens": (int(tokens.min()), int(tokens.max())),
        "layers": layers,
        "ranks": tuple(ranks.tolist()),
        "map": _map_text(plan.placement, layers[0], first),
    }


def _grouped(maps: list[dict[str, Any]], same: tuple[str, ...]) -> list[list[dict[str, Any]]]:
    """Maps that are alike in all of ``same`` together, in the order of their first layers."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for facts in maps:
        kinds.setdefault(tuple(facts[name] for name in same), []).append(facts)
    return list(kinds.values())


def _placement_row(maps: list[dict[str, Any]]) -> dict[str, str]:
    """The row of some maps: ``3-60``, ``128``, ``1–32``, and the map of the first."""
    first = maps[0]
    layers = sorted(layer for facts in maps for layer in facts["layers"])
    spans = {name: {min(f[name][0] for f in maps), max(f[name][1] for f in maps)} for name in _COUNTS}
    where = str(first["map"])
    if len(maps) > 1:
        other = "" if all(facts["ranks"] == first["ranks"] for facts in maps) else " on different GPUs"
        where = f"{len(maps)} maps{other}, all in plan.json; layer {first['layers'][0]}: {where}"
    counts = {name: "–".join(str(n) for n in sorted(span)) for name, span in spans.items()}
    return {"layers": range_text(layers).replace(",", ", "), **counts, "map": where}


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
