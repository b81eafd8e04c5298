"""Cross-checks of a spec that need no degrees: sizes of one key that contradict another's (1xx codes)."""

from __future__ import annotations

from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.spec.cluster import Peak
from planc.spec.deployment import Spec
from planc.spec.model import parameter_counts

#: the most parameters, KV cache bytes and bytes moved in a step that are planned: sums stay inside 64-bit integers
_MOST_PARAMETERS = 10**15
_MOST_BYTES = 10**18


def check_spec(spec: Spec) -> list[Diagnostic]:
    """Every contradiction inside the spec; an empty list when there is none."""
    return [*_layers(spec), *_attention(spec), *_experts(spec), *_cluster(spec), *_options(spec), *_sizes(spec)]


def _layers(spec: Spec) -> Iterator[Diagnostic]:
    model = spec.model
    if model.moe_layers is not None and model.moe is None:
        yield spec.fault("PLN102", "`moe_layers` lists MoE layers, but the model has no `moe`", "model.moe_layers")
    elif model.moe_layers is not None:
        if model.first_k_dense or model.moe_stride != 1:
            message = "`moe_layers` lists the MoE layers, so `first_k_dense` and `moe_stride` must be left out"
            yield spec.fault("PLN102", message, "model.moe_layers")
        beyond = [i for i in model.moe_layers if i >= model.layers]
        if beyond:
            message = f"layer {beyond[0]} is listed as MoE, but the layers are 0 to {model.layers - 1}"
            yield spec.fault("PLN102", message, "model.moe_layers")
        if not model.moe_layers:
            yield spec.fault(
                "PLN102", "`moe_layers` lists no layer", "model.moe_layers", "name a layer, or remove `moe`"
            )
    elif model.moe is not None and model.first_k_dense > model.layers:
        message = f"first_k_dense is {model.first_k_dense}, but the model has {model.layers} layers"
        yield spec.fault("PLN102", message, "model.first_k_dense")
    elif model.moe is not None and not model.moe_layer_ids:
        message = "the model has experts but no MoE layer"
        yield spec.fault("PLN102", message, "model.moe", "lower first_k_dense or moe_stride, or remove `moe`")
    if model.dense_layer_ids and model.dense_mlp is None:
        n = len(model.dense_layer_ids)
        message = f"{n} of {model.layers} layers are dense, but `dense_mlp` is missing"
        yield spec.fault("PLN102", message, "model", "add `dense_mlp: {intermediate: …}`")


def _attention(spec: Spec) -> Iterator[Diagnostic]:
    a = spec.model.attention
    mla_keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if a.kind == "mla":
        absent = [key for key in mla_keys if not getattr(a, key)]
        if absent:
            message = f"MLA needs {', '.join(absent)}"
            yield spec.fault("PLN103", message, "model.attention", f"add `{absent[0]}:`")
        if a.head_dim or a.kv_heads:
            message = "MLA takes its head sizes from qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
            yield spec.fault("PLN103", message, "model.attention", "remove head_dim and kv_heads")
        return
    if not a.head_dim:
        yield spec.fault("PLN103", "head_dim is missing", "model.attention", "add `head_dim:`")
    given = [key for key in ("q_lora_rank", *mla_keys) if getattr(a, key)]
    if given:
        message = f"`{given[0]}` belongs to MLA, but the attention is {a.kind}"
        yield spec.fault("PLN103", message, f"model.attention.{given[0]}", "set `kind: mla`, or remove it")
    if a.kind == "mha" and a.kv_heads not in (0, a.heads):
        message = f"MHA has as many KV heads as heads, {a.heads}, not {a.kv_heads}"
        yield spec.fault("PLN103", message, "model.attention.kv_heads", "set `kind: gqa`")
    if a.kind == "gqa" and (a.kv_heads == 0 or a.heads % a.kv_heads):
        message = f"kv_heads {a.kv_heads} does not divide heads {a.heads}"
        yield spec.fault("PLN103", message, "model.attention.kv_heads")


def _experts(spec: Spec) -> Iterator[Diagnostic]:
    moe = spec.model.moe
    if moe is None:
        return
    if moe.top_k > moe.experts:
        message = f"top_k {moe.top_k} exceeds the {moe.experts} experts of a layer"
        yield spec.fault("PLN101", message, "model.moe.top_k", f"top_k is at most {moe.experts}")
    if moe.experts % moe.groups or moe.top_groups > moe.groups:
        message = f"{moe.experts} experts in {moe.groups} groups with top_groups {moe.top_groups}"
        yield spec.fault("PLN109", message, "model.moe.groups", "groups divides experts; top_groups is at most groups")
    elif moe.groups > 1 and moe.top_groups * (moe.experts // moe.groups) < moe.top_k:
        message = f"{moe.top_groups} groups of {moe.experts // moe.groups} experts cannot give top_k {moe.top_k}"
        yield spec.fault("PLN109", message, "model.moe.top_groups")
    if moe.shared_intermediate and not moe.shared_experts:
        yield spec.fault("PLN111", "shared_intermediate without shared_experts", "model.moe.shared_intermediate")


def _cluster(spec: Spec) -> Iterator[Diagnostic]:
    dtypes = {spec.model.dtype_of("weights"), spec.model.dtype_of("expert_weights")}
    for i, group in enumerate(spec.cluster.groups):
        path = f"cluster.groups.{i}"
        for dtype in sorted(dtypes):
            if getattr(group.gpu.peak, dtype) is None:
                message = f"{group.gpu.name} gives no {dtype} peak, but the model's weights are {dtype}"
                yield spec.fault("PLN110", message, f"{path}.gpu.peak", _dtype_hint(spec, group.gpu.peak))
        size, domain = group.nodes * group.gpus_per_node, group.nvlink_domain
        if domain and (size % domain or (domain % group.gpus_per_node and group.gpus_per_node % domain)):
            message = f"nvlink_domain {domain} does not divide the group's {size} GPUs along its nodes"
            yield spec.fault("PLN105", message, f"{path}.nvlink_domain")
    if spec.cluster.gpus > 1_000_000:
        yield spec.fault("PLN014", f"{spec.cluster.gpus:,} GPUs; planc plans up to 1,000,000", "cluster.groups")


def _dtype_hint(spec: Spec, peak: Peak) -> str:
    have = [name for name in ("bf16", "fp16", "fp8") if getattr(peak, name) is not None]
    if not have:
        return "give a peak"
    return (
        f"plan the model in {' or '.join(have)}: `model: {{base: {spec.model.name}, dtypes: {{weights: {have[0]}}}}}`"
    )


def _options(spec: Spec) -> Iterator[Diagnostic]:
    asked = spec.parallelism
    if asked.tp_comm == "reduce_scatter" and asked.gating == "leader":
        message = (
            "tp_comm: reduce_scatter leaves each rank its own tokens, so every rank gates: gating: leader contradicts"
        )
        yield spec.fault("PLN111", message, "parallelism.tp_comm", "set `gating: sharded` or `tp_comm: all_reduce`")
    if asked.stages is not None:
        if asked.pp not in ("auto", len(asked.stages)):
            message = f"pp is {asked.pp}, but `stages` lists {len(asked.stages)} stages"
            yield spec.fault("PLN108", message, "parallelism.stages")
        if sum(asked.stages) != spec.model.layers:
            message = f"the stages hold {sum(asked.stages)} layers together; the model has {spec.model.layers}"
            yield spec.fault("PLN108", message, "parallelism.stages")
    place = spec.placement
    if place.map and spec.policy != "given":
        message = f"placement.map is what the policy `given` reads, and the policy is `{place.policy}`"
        yield spec.fault("PLN111", message, "placement.map", "set placement.policy: given, or remove the map")
    elif spec.policy == "given" and not place.map:
        yield spec.fault("PLN011", "the policy `given` takes an expert map", "placement", "add `map: FILE`")
    elif place.map and spec.model.moe is None:
        yield spec.fault("PLN111", "the model has no experts for a map to place", "placement.map", "remove the map")
    for path, traffic in [("traffic", spec.traffic), *((f"scenarios.{k}", v) for k, v in spec.scenarios.items())]:
        if traffic is None:
            continue
        given = {key for key, field in type(traffic).model_fields.items() if getattr(traffic, key) != field.default}
        beside = sorted(given - {"file"})
        if traffic.file and beside:
            message = f"a recorded file and `{beside[0]}` of a generator are two kinds of traffic: give one"
            yield spec.fault("PLN111", message, f"{path}.{beside[0]}")
    if spec.scenarios and spec.traffic is None:
        yield spec.fault(
            "PLN111", "scenarios stand beside a `traffic`, and there is none", "scenarios", "add `traffic:`"
        )
    split = [(i, sum(c.latency_split.values())) for i, c in enumerate(spec.claims) if c.latency_split]
    for i, total in split:
        if abs(total - 1) > 0.005:
            message = f"the shares of a latency split add to {total:.0%}"
            yield spec.fault("PLN014", message, f"claims.{i}.latency_split", "they add to 100 %")


def _sizes(spec: Spec) -> Iterator[Diagnostic]:
    model, work, a, moe = spec.model, spec.workload, spec.model.attention, spec.model.moe
    parameters = parameter_counts(model)["total"]
    if parameters > _MOST_PARAMETERS:
        message = f"{parameters:.2g} parameters; planc plans models of up to {_MOST_PARAMETERS:.0e}"
        yield spec.fault("PLN014", message, "model")
    cache = work.batch * work.context * model.layers * a.kv_width * model.bytes_of("kv_cache")
    if cache > _MOST_BYTES:
        message = f"a KV cache of {cache:.2g} B for {work.batch:,} × {work.context:,} tokens; planc plans up to {_MOST_BYTES:.0e} B"
        yield spec.fault("PLN014", message, "workload.batch")
    widths = [a.heads * (a.q_head_dim + a.out_head_dim) + a.kv_width, 2 * model.vocab]
    widths += [2 * model.dense_mlp.intermediate] if model.dense_mlp else []
    widths += [2 * moe.shared_width, 2 * moe.top_k * moe.intermediate, 2 * moe.top_k * model.hidden] if moe else []
    tokens = work.batch if work.phase == "decode" else (work.prefill_chunk or work.isl) * spec.cluster.gpus
    step = (tokens + 64 * spec.cluster.gpus) * model.layers * 2 * (max(widths) + 2 * model.hidden)
    if step > _MOST_BYTES:
        message = (
            f"a step of {tokens:,} tokens handles {step:.2g} B of activations; planc plans up to {_MOST_BYTES:.0e} B"
        )
        yield spec.fault("PLN014", message, "workload.batch" if work.phase == "decode" else "workload.isl")
