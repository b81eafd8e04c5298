"""vLLM: a launch script, and what makes its fixed expert layout the plan's: a permutation of experts, or a map for a patch.

vLLM has no option for a map. Slot p holds expert p % E, so the placement is a matter of which expert has which number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planc.cost.step import exchange_mode
from planc.diagnostics import Diagnostic
from planc.export.nodes import Instance, instances, node_faults, of_amd
from planc.export.permutation import Permutation, Seats, permutation_json, relabelled
from planc.export.slots import one_stage, redundant, slot_faults, slot_tables
from planc.export.step import gating_notes, group_tokens, low_latency_faults
from planc.export.target import Job, Target, refusal, text_of
from planc.verify import VerifiedPlan

RECIPE, MAP = "permutation.json", "expert_map.json"
_FAST_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  #: hidden sizes of DeepEP's low-latency kernels
_MOST_COPIES = 1023
_QP_DEPTH = 1024  #: NVSHMEM's default, of which DeepEP needs twice the tokens and two more
_NEVER = 10**12  #: steps after which the balancer would move experts: it starts at three quarters of them


@dataclass(frozen=True)
class Seating:
    """vLLM's ranks on an instance's nodes. ``order``: position of every node of the plan in vLLM's order; ``devices``: GPUs
    that vLLM takes in turn on each of them."""

    instance: Instance
    order: tuple[int, ...]
    devices: tuple[int, ...]


def seating(plan: VerifiedPlan, instance: Instance) -> Seating | None:
    """Where vLLM's ranks are so that every one of them is a rank of the plan; None where they cannot be.

    vLLM counts DP rank, stage, TP rank, and an engine, a DP rank with all of its stages, has GPUs of one node or nodes of
    its own; the plan counts stage, TP group, rank of it.
    """
    par, cluster = plan.parallelism, plan.spec.cluster
    ranks = np.arange(par.replica_size).reshape(par.pp, par.attention_dp, par.tp).swapaxes(0, 1).reshape(-1)
    ranks += instance.number * par.replica_size
    node = cluster.node_of_rank[ranks].reshape(-1, instance.gpus)
    local = cluster.local_of_rank[ranks].reshape(-1, instance.gpus)
    engine = par.pp * par.tp
    if (node != node[:, :1]).any() or (local != local[0]).any() or (instance.gpus % engine and engine % instance.gpus):
        return None
    order = tuple(node[:, 0].tolist().index(number) for number in instance.nodes)
    return Seating(instance, order, tuple(local[0].tolist()))


def permutations(plan: VerifiedPlan) -> dict[int, tuple[int, ...] | None]:
    """MoE layer -> old expert of every index that vLLM's layout makes the plan's placement with, None where nothing does."""
    moe = plan.spec.model.moe
    assert moe is not None
    groups = moe.groups if _limited(plan) else 1
    found: dict[int, tuple[int, ...] | None] = {}
    known: dict[bytes, tuple[int, ...] | None] = {}
    for layer, table in slot_tables(plan).items():
        if table.tobytes() not in known:
            ranks = np.arange(table.size) // table.shape[1]
            here = _seats(np.arange(table.size) % moe.experts, ranks, moe.experts)
            there = _seats(table.reshape(-1), ranks, moe.experts)
            known[table.tobytes()] = relabelled(here, there, groups)
        found[layer] = known[table.tobytes()]
    return found


def _seats(experts: np.ndarray, ranks: np.ndarray, count: int) -> list[Seats]:
    found: list[list[int]] = [[] for _ in range(count)]
    for expert, rank in zip(experts.tolist(), ranks.tolist(), strict=True):
        found[expert].append(rank)
    return [tuple(ranks) for ranks in found]


def faults(job: Job) -> Iterator[Diagnostic]:
    """What vLLM cannot be told."""
    plan, par, title = job.plan, job.plan.parallelism, TARGET.title
    found = [*slot_faults(plan, title), *node_faults(plan, title)]
    if found:
        yield from found
        return
    if any(seating(plan, one) is None for one in instances(plan)):
        message = (
            f"an engine, the {par.pp * par.tp} GPUs of a TP group's {par.pp} stages, has GPUs of one node or whole nodes, "
            f"and the plan has stages of {par.ep} GPUs"
        )
        yield refusal(title, message, one_stage(plan), "parallelism.pp")
    if par.attention_dp > 1 and not of_amd(plan):
        yield from low_latency_faults(plan, title, group_tokens(plan))
    hidden = plan.spec.model.hidden
    if par.attention_dp > 1 and _backend(plan) == "deepep_low_latency" and hidden > _FAST_HIDDEN[-1]:
        message = f"its low-latency dispatch takes hidden sizes up to {_FAST_HIDDEN[-1]}, and the model has {hidden}"
        yield refusal(title, message, "set execution.all_to_all: normal", "execution.all_to_all")
    yield from _placement_faults(job)


def _placement_faults(job: Job) -> Iterator[Diagnostic]:
    plan, par, moe, title = job.plan, job.plan.parallelism, job.plan.spec.model.moe, TARGET.title
    assert moe is not None
    found, copies, how = permutations(plan), redundant(plan) > 0, job.options.get("vllm.map", "permutation")
    moved = next((layer for layer, old in found.items() if not _plain(old)), None)
    stuck = next((layer for layer, old in found.items() if old is None), None)
    if par.pp > 1 and (copies or (how == "pr-49572" and moved is not None)):
        message = "its balancer, which holds further copies and other maps, expects every MoE layer on each rank, not a stage's"
        yield refusal(title, message, one_stage(plan), "parallelism.pp")
    if redundant(plan) > _MOST_COPIES:
        message = (
            f"its balancer holds {_MOST_COPIES} further copies of a layer at most, and the plan has {redundant(plan)}"
        )
        slots = (moe.experts + _MOST_COPIES) // par.holders
        change = (
            f"set expert_rule.slots_per_gpu: {slots}"
            if slots
            else f"set parallelism.ep to {moe.experts + _MOST_COPIES} at most"
        )
        yield refusal(title, message, change, "expert_rule.slots_per_gpu" if slots else "parallelism.ep")
    if how == "none" and moved is not None:
        message = f"slot p holds expert p % {moe.experts}, and layer {moved} of the plan has others there"
        way = "pr-49572" if stuck is not None else "permutation"
        change = (
            "" if plan.spec.policy == "linear" else "set placement.policy: linear, or "
        ) + f"export with --option vllm.map={way}"
        yield refusal(title, message, change, "placement.policy")
    elif how == "permutation" and stuck is not None:
        why = [f"slots from {moe.experts} on hold the first experts once more"] if copies else []
        why += ["new groups are whole old ones, or the gate would choose other experts"] if _limited(plan) else []
        message = f"no numbering of the experts of layer {stuck} is the plan: {'; '.join(why)}"
        rest = ", or export with --option vllm.map=pr-49572 for a vLLM that has this change"
        if not copies or (moe.experts <= par.holders and plan.placement.rounds == 1):
            yield refusal(title, message, "set placement.policy: linear" + rest, "placement.policy")
        elif moe.experts % par.holders == 0:
            change = f"set expert_rule.slots_per_gpu: {moe.experts // par.holders}"
            change += " and placement.policy: linear" if _limited(plan) and plan.spec.policy != "linear" else ""
            yield refusal(title, message, change + rest, "expert_rule.slots_per_gpu")
        else:
            most = max(n for n in range(1, par.ep) if moe.experts % n == 0)
            change = (
                f"set parallelism.ep to a divisor of the {moe.experts} experts, such as {most}"
                if most > 1
                else "export sglang"
            )
            yield refusal(title, message, change + rest, "parallelism.ep")


def _plain(old: tuple[int, ...] | None) -> bool:
    return old is not None and old == tuple(range(len(old)))


def _limited(plan: VerifiedPlan) -> bool:
    """Whether the gate chooses groups before experts."""
    moe = plan.spec.model.moe
    return moe is not None and moe.top_groups < moe.groups


def _splits(plan: VerifiedPlan) -> bool:
    """Whether the engine overlaps the plan's micro-batches."""
    par = plan.parallelism
    return plan.spec.workload.micro_batches > 1 and par.attention_dp > 1 and par.pp == 1 and not of_amd(plan)


def _backend(plan: VerifiedPlan) -> str:
    maker = "mori" if of_amd(plan) else "deepep"
    return f"{maker}_{'low_latency' if _quick(plan) else 'high_throughput'}"


def _quick(plan: VerifiedPlan) -> bool:
    return exchange_mode(plan.spec) == "low_latency"


def _extra_file(job: Job) -> str:
    """The file that makes vLLM's layout the plan's, "" where it is."""
    if all(_plain(old) for old in permutations(job.plan).values()):
        return ""
    return MAP if job.options.get("vllm.map") == "pr-49572" else RECIPE


def notes(job: Job) -> Iterator[str]:
    """What vLLM does in its own way."""
    plan, par, work = job.plan, job.plan.parallelism, job.plan.spec.workload
    extra = _extra_file(job)
    if extra == RECIPE:
        yield (
            f"serve the checkpoint relabelled for the plan: planc export --apply-permutation {RECIPE} --checkpoint OLD -o NEW"
        )
    if extra == MAP:
        yield f"{MAP} is read by a vLLM with the open pull request 49572 only"
    if par.attention_dp == 1:
        yield "without data parallelism every GPU routes all tokens, and an all-reduce takes the place of dispatch and combine"
    else:
        yield from gating_notes(plan)
    if redundant(plan) > 0:
        yield "of an expert's copies a token takes one by its place in the batch"
    if par.attention_dp > 1 and _backend(plan) == "deepep_low_latency" and plan.spec.model.hidden not in _FAST_HIDDEN:
        wide = next((size for size in _FAST_HIDDEN if size >= plan.spec.model.hidden), 0)
        yield f"its low-latency dispatch widens the hidden size {plan.spec.model.hidden} to {wide}"
    if work.micro_batches > 1 and not _splits(plan):
        why = "pipeline stages take whole batches in turn" if par.pp > 1 else "micro-batches need data parallelism"
        why = "it overlaps them on DeepEP only" if of_amd(plan) else why
        yield f"the {work.micro_batches} micro-batches of the plan are not asked for: {why}"


def variables(plan: VerifiedPlan) -> dict[str, str]:
    """Environment of every process: layers of the stages, which it would share out in its own way, and what DeepEP needs for
    the tokens of a decode step."""
    par, found = plan.parallelism, {}
    if par.pp > 1:
        found["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, par.stage_sizes))
    tokens = group_tokens(plan)
    if par.attention_dp > 1 and _backend(plan) == "deepep_low_latency" and 2 * (tokens + 1) > _QP_DEPTH:
        found["NVSHMEM_QP_DEPTH"] = str(2 * (tokens + 1))
    return found


def arguments(job: Job) -> list[tuple[str, str]]:
    """(flag, value) of one instance, "" for a switch; without what differs from node to node."""
    plan, par, parts = job.plan, job.plan.parallelism, job.plan.spec.workload.micro_batches
    found = [("--tensor-parallel-size", str(par.tp))]
    if par.pp > 1:
        found.append(("--pipeline-parallel-size", str(par.pp)))
    found += [("--enable-expert-parallel", ""), ("--expert-placement-strategy", "linear")]
    if par.attention_dp > 1:
        found += [("--data-parallel-size", str(par.attention_dp)), ("--all2all-backend", _backend(plan))]
    if plan.spec.model.dtype_of("kv_cache") == "fp8":
        found.append(("--kv-cache-dtype", "fp8"))
    tokens, prefill = str(group_tokens(plan)), plan.spec.workload.phase == "prefill"
    if not prefill:
        found.append(("--max-num-seqs", tokens))  # of an engine, a TP group
    if prefill or (par.attention_dp > 1 and _quick(plan)):
        found.append(("--max-num-batched-tokens", tokens))  # for which low-latency buffers have room
    if _splits(plan):
        found.append(("--enable-dbo", "") if parts == 2 else ("--ubatch-size", str(parts)))
        found += [(f"--dbo-{phase}-token-threshold", str(parts)) for phase in ("decode", "prefill")]
    if redundant(plan) > 0 or _extra_file(job) == MAP:
        config: dict[str, int | str] = {"num_redundant_experts": redundant(plan), "step_interval": _NEVER}
        if _extra_file(job) == MAP:
            config["initial_expert_map_path"] = MAP
        found += [("--enable-eplb", ""), ("--eplb-config", f"'{json.dumps(config)}'")]
    return found


def recipe(job: Job) -> Iterator[tuple[str, bytes]]:
    """The permutation of a checkpoint's experts, where vLLM's layout needs one to be the plan's."""
    plan, moe = job.plan, job.plan.spec.model.moe
    if _extra_file(job) == RECIPE and moe is not None:
        old = {layer: row for layer, row in sorted(permutations(plan).items()) if row is not None}
        groups = moe.groups if _limited(plan) else 1
        yield RECIPE, permutation_json(Permutation(moe.experts, plan.spec.model.layers, groups, old)).encode()


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The script, and the permutation or the map where vLLM's layout is not the plan's."""
    plan, par, moe = job.plan, job.plan.parallelism, job.plan.spec.model.moe
    assert moe is not None
    extra = _extra_file(job)
    if extra == MAP:
        rows = [json.dumps(table.reshape(-1).tolist()) for _, table in sorted(slot_tables(plan).items())]
        yield MAP, ("[\n" + ",\n".join(rows) + "\n]\n").encode()
    yield from recipe(job)
    seats = [one for one in (seating(plan, instance) for instance in instances(plan)) if one is not None]
    yield (
        "launch.sh",
        text_of(
            "vllm.sh.j2",
            name=plan.spec.name,
            target=TARGET,
            model=job.model,
            seats=seats,
            in_order=all(list(one.order) == sorted(one.order) for one in seats),
            data_parallel=par.attention_dp > 1,
            engine=par.pp * par.tp,
            variables=variables(plan),
            arguments=arguments(job),
            map=extra if extra == MAP else "",
            notes=list(notes(job)),
        ),
    )


TARGET = Target(
    title="vLLM",
    version="0.33.0",
    says="any placement with as many experts of every MoE layer on each EP rank, for a checkpoint whose experts are "
    "relabelled; further copies of experts 0, 1, 2, … of that numbering",
    lacks="a map, empty slots, layers on different GPUs of one EP group, experts shared by several GPUs, other copies, "
    "copies with pipeline stages",
    faults=faults,
    notes=notes,
    files=files,
    options={"map": ("permutation", "none", "pr-49572")},
)
