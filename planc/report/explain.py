"""Answers to `planc explain`: one GPU, one expert, memory, or the plan in a few lines."""

from __future__ import annotations

import re

import numpy as np

from planc.diagnostics import Diagnostic, PlancError
from planc.placement import copy_tokens
from planc.report.facts import memory_rows, rule_text
from planc.units import format_bytes
from planc.verify import VerifiedPlan
from planc.verify.codec import encode_numbers


def _refuse(message: str, hint: str = "") -> PlancError:
    return PlancError([Diagnostic("PLN014", message, hint=hint)])


def explain_plan(plan: VerifiedPlan) -> str:
    """Degrees with their reasons, the rule, memory and limits."""
    par, memory = plan.parallelism, plan.memory
    lines = [
        f"{plan.spec.name}: {plan.spec.model.name} on {plan.spec.cluster.name}, {plan.spec.workload.phase} step",
        f"dp {par.dp} × pp {par.pp} × ep {par.ep} = {par.world_size} GPUs; tp {par.tp}, attention DP {par.attention_dp}",
    ]
    lines += [f"  {key}: {text}" for key, text in sorted(plan.reasons.items())]
    lines.append(f"expert rule: {rule_text(plan)}")
    lines.append(
        f"fullest GPU {memory.fullest}: {format_bytes(memory.used[memory.fullest])} of {format_bytes(memory.capacity[memory.fullest])}"
    )
    lines.append(f"largest batch {plan.limits['batch']:,}, largest isl {plan.limits['isl']:,}")
    lines += [f"{note.severity}[{note.code}]: {note.message}" for note in plan.notes]
    return "\n".join(lines)


def explain_gpu(plan: VerifiedPlan, rank: int) -> str:
    """Where a GPU is in the mesh, what it holds, and the ops it runs. Raises PlancError PLN014 outside the world."""
    par, cluster = plan.parallelism, plan.spec.cluster
    if not 0 <= rank < par.world_size:
        raise _refuse(f"GPU {rank} is outside the plan", f"ranks are 0 to {par.world_size - 1}")
    replica, inside = divmod(rank, par.replica_size)
    stage, local = divmod(inside, par.ep)
    group = rank // par.tp * par.tp
    gpu = cluster.groups[int(cluster.group_of_rank[rank])].gpu
    first, end = par.stages[stage]
    lines = [
        f"GPU {rank}: {gpu.name}, node {cluster.node_of_rank[rank]}, local {cluster.local_of_rank[rank]}",
        f"replica {replica}, stage {stage} (layers {first}-{end - 1}), EP group rank {local}, "
        f"TP group {group}-{group + par.tp - 1} (attention DP {local // par.tp})",
    ]
    held: dict[str, list[int]] = {}
    for layer, experts in plan.placement.experts_of_rank(rank).items():
        held.setdefault(encode_numbers(experts), []).append(layer)
    lines += [f"layers {encode_numbers(layers)}: expert {text}" for text, layers in held.items()] or ["no experts"]
    lines.append("memory:")
    lines += [
        f"  {name.replace('_', ' '):<17}{format_bytes(size):>10}"
        for name, size in plan.memory.of_rank(rank).items()
        if size
    ]
    lines.append(
        f"  {'sum':<17}{format_bytes(int(plan.memory.used[rank])):>10} of {format_bytes(int(plan.memory.capacity[rank]))}"
    )
    kinds: dict[str, int] = {}
    for block in plan.blocks.blocks:
        count = int((block.ranks == rank).any(axis=1).sum())
        if count:
            kinds[block.kind] = kinds.get(block.kind, 0) + count
    lines.append("ops: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return "\n".join(lines)


def explain_expert(plan: VerifiedPlan, text: str) -> str:
    """Where an expert ``LAYER:EXPERT`` has copies, and the tokens and bytes each receives. Raises PlancError PLN014."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    moe = plan.spec.model.moe
    if match is None or moe is None:
        raise _refuse(f"`{text[:40]}` names no expert", "write LAYER:EXPERT, such as 12:5")
    layer, expert = int(match[1]), int(match[2])
    if layer not in plan.placement.layers or expert >= moe.experts:
        layers = encode_numbers(list(plan.spec.model.moe_layer_ids))
        raise _refuse(
            f"there is no expert {expert} in layer {layer}", f"MoE layers are {layers}, experts 0 to {moe.experts - 1}"
        )
    part = plan.placement.layers[layer]
    tokens = copy_tokens(plan.spec, plan.parallelism, plan.placement, layer)[part.expert == expert].tolist()
    slots = part.slot[part.expert == expert].tolist()
    ranks = plan.placement.ranks_of_expert(layer, expert)
    width = plan.spec.model.hidden * plan.spec.model.bytes_of("dispatch")
    lines = [f"expert {expert} of layer {layer}: {len(ranks)} copies, {len(ranks) // plan.parallelism.dp} per replica"]
    for number, group in enumerate(ranks):
        replica, copy = divmod(number, len(tokens))
        gpus = encode_numbers(group)
        node = int(plan.spec.cluster.node_of_rank[group[0]])
        turn = f", turn {slots[copy] + 1} of {part.rounds}" if part.rounds > 1 else ""
        n = tokens[copy]
        lines.append(
            f"  replica {replica}: GPU {gpus}, node {node}{turn}; {n} tokens in, {format_bytes(n * width)} per micro-batch"
        )
    return "\n".join(lines)


def explain_memory(plan: VerifiedPlan) -> str:
    """Memory by item on the fullest and the emptiest GPU, and what still fits."""
    low = int(np.argmax(plan.memory.headroom))
    lines = [f"{'':<17}{'GPU ' + str(plan.memory.fullest):>12}{'GPU ' + str(low):>12}"]
    for row in memory_rows(plan):
        lines.append(f"{row['name']:<17}{format_bytes(row['fullest']):>12}{format_bytes(row['emptiest']):>12}")
    high = plan.memory.fullest
    for name, values in (("sum", plan.memory.used), ("capacity", plan.memory.capacity), ("free", plan.memory.headroom)):
        lines.append(f"{name:<17}{format_bytes(int(values[high])):>12}{format_bytes(int(values[low])):>12}")
    lines.append(
        f"largest batch {plan.limits['batch']:,}, largest isl {plan.limits['isl']:,}, everything else the same"
    )
    return "\n".join(lines)
