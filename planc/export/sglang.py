"""SGLang: the expert map for `--init-expert-location`, and a launch script."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from planc.cost.step import exchange_mode
from planc.diagnostics import Diagnostic
from planc.export.nodes import instances, node_faults, of_amd
from planc.export.slots import redundant, slot_faults, slot_tables
from planc.export.step import gating_notes, group_tokens, low_latency_faults
from planc.export.target import Job, Target, refusal, text_of
from planc.placement.expert_map import map_json
from planc.verify import VerifiedPlan

MAP = "expert_location.json"
_KNOWN = "get_model_config_for_expert_location"
_DEEPEP_TOKENS, _MORI_TOKENS = 128, 4096  #: of a rank that low-latency dispatch has room for by default


def faults(job: Job) -> Iterator[Diagnostic]:
    """What SGLang cannot be told."""
    plan, par = job.plan, job.plan.parallelism
    on_nodes = list(node_faults(plan, TARGET.title))
    yield from (*slot_faults(plan, TARGET.title), *on_nodes)
    sizes = [] if on_nodes else [len(one.nodes) for one in instances(plan)]
    nodes = next((nodes for nodes in sizes if nodes % par.pp and par.pp % nodes), 0)
    if nodes:
        message = f"a node has whole stages, or a stage whole nodes, and here {nodes} nodes have {par.pp} stages"
        yield refusal(
            TARGET.title,
            message,
            f"set parallelism.pp: 1 and ep: {par.ep * par.pp}, or stages that fill nodes",
            "parallelism.pp",
        )

    if not of_amd(plan):
        yield from low_latency_faults(plan, TARGET.title, _rank_tokens(plan))


def _rank_tokens(plan: VerifiedPlan) -> int:
    """Tokens of a step on one GPU; those of a TP group are shared out."""
    return -(-group_tokens(plan) // plan.parallelism.tp)


def notes(job: Job) -> Iterator[str]:
    """What SGLang does in its own way."""
    plan, par, work, model = job.plan, job.plan.parallelism, job.plan.spec.workload, job.plan.spec.model
    if model.attention.kind != "mla":
        yield f"it takes maps for models that define {_KNOWN}, as Qwen's, and drops them without a word for others, as Mixtral"
    yield from gating_notes(plan)
    if 1 < par.tp < par.ep and model.dense_layer_ids:
        yield f"dense layers are whole on every GPU, as it splits them over all {par.ep} or none; the plan over {par.tp}"
    if _before_hopper(plan):
        yield "DeepGEMM, which it runs experts with behind DeepEP, needs GPUs of Hopper or later"
    if redundant(plan):
        yield "of an expert's copies a GPU uses its own first, then one on its node"
    if model.dtype_of("dispatch") != "fp8" and model.dtype_of("expert_weights") == "fp8":
        yield f"it chooses the dtype of dispatched tokens itself; the plan has {model.dtype_of('dispatch')}"
    if work.micro_batches > 1 and not _overlaps(plan):
        why = "it overlaps two" if par.pp == 1 else "pipeline stages take batches of their own"
        yield f"the {work.micro_batches} micro-batches of the plan are not asked for: {why}"


def variables(plan: VerifiedPlan) -> dict[str, str]:
    """Environment of every process: layers of the stages, which it would share out in its own way, and room in DeepEP's
    buffers for the tokens of a decode step."""
    par, found = plan.parallelism, {}
    if par.pp > 1:
        found["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, par.stage_sizes))
    tokens = _rank_tokens(plan)
    if of_amd(plan):
        if tokens > _MORI_TOKENS:
            found["SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(tokens)
    elif exchange_mode(plan.spec) == "low_latency" and tokens > _DEEPEP_TOKENS:
        found["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] = str(tokens)
    return found


def _overlaps(plan: VerifiedPlan) -> bool:
    """Whether the engine's overlap of two batches is the plan's."""
    return plan.spec.workload.micro_batches == 2 and plan.parallelism.pp == 1


def arguments(plan: VerifiedPlan) -> list[tuple[str, str]]:
    """(flag, value) of one instance, "" for a switch; without what differs from node to node."""
    par = plan.parallelism
    found = [("--tp-size", str(par.ep))]
    if par.pp > 1:
        found.append(("--pp-size", str(par.pp)))
    if par.attention_dp > 1:
        found.append(("--attn-dp-size", str(par.attention_dp)))
    found.append(("--ep-size", str(par.ep)))
    if par.attention_dp > 1 and plan.spec.model.dense_layer_ids:
        found.append(("--moe-dense-tp-size", "1"))  # over all GPUs, layers would be cut smaller than quantised blocks
    if of_amd(plan):
        found.append(("--moe-a2a-backend", "mori"))
    else:
        found += [("--moe-a2a-backend", "deepep"), ("--deepep-mode", plan.spec.execution.all_to_all)]
        if _deep_gemm(plan):
            found.append(("--moe-runner-backend", "deep_gemm"))  # the only one with DeepEP for such weights
    if plan.spec.model.dtype_of("kv_cache") == "fp8":
        found.append(("--kv-cache-dtype", "fp8_e4m3"))
    tokens = str(group_tokens(plan) * par.attention_dp)  # which it divides over the TP groups
    found.append(
        ("--chunked-prefill-size" if plan.spec.workload.phase == "prefill" else "--max-running-requests", tokens)
    )
    if redundant(plan):
        found.append(("--ep-num-redundant-experts", str(redundant(plan))))
    found.append(("--ep-dispatch-algorithm", "static"))  # without one, tokens would go where experts are not
    if _overlaps(plan):
        found.append(("--enable-two-batch-overlap", ""))
    found.append(("--init-expert-location", MAP))
    return found


def _deep_gemm(plan: VerifiedPlan) -> bool:
    """Whether expert weights need DeepGEMM, the only kernels with DeepEP for those that are not fp8, on GPUs that have it."""
    return plan.spec.model.dtype_of("expert_weights") != "fp8" and not _before_hopper(plan)


def _before_hopper(plan: VerifiedPlan) -> bool:
    return any(re.match(r"(a|l|v|t)\d", group.gpu.name, re.IGNORECASE) for group in plan.spec.cluster.groups)


def expert_map(plan: VerifiedPlan) -> bytes:
    """The map that `--init-expert-location` reads."""
    tables, layers = slot_tables(plan), plan.spec.model.moe_layer_ids
    stacked = np.stack([tables[layer] for layer in layers])
    return map_json(stacked, moe_layers=layers, layers=plan.spec.model.layers).encode()


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """The map and the script."""
    plan = job.plan
    yield MAP, expert_map(plan)
    yield (
        "launch.sh",
        text_of(
            "sglang.sh.j2",
            name=plan.spec.name,
            target=TARGET,
            model=job.model,
            map=MAP,
            instances=instances(plan),
            arguments=arguments(plan),
            variables=variables(plan),
            notes=list(notes(job)),
        ),
    )


TARGET = Target(
    title="SGLang",
    version="0.5.23",
    says="any placement with as many experts of every MoE layer on each EP rank, copies included",
    lacks="empty slots, layers on different GPUs of one EP group, experts shared by several GPUs",
    faults=faults,
    notes=notes,
    files=files,
)
