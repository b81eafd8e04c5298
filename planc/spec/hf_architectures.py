"""The architectures that import-hf knows: one function each from config fields to a planc model tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from planc.spec.fields import DTYPE_BYTES
from planc.spec.hf_config import ConfigReader, shown

Tree = dict[str, Any]
_MAX_LAYERS, _MAX_EXPERTS = 10_000, 65_536


def _some(**values: Any) -> Tree:
    """The values that differ from the schema's defaults of none, false and zero."""
    return {key: value for key, value in values.items() if value is not None and value is not False and value != 0}


def _mla(r: ConfigReader) -> Tree:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). A null ``q_lora_rank`` projects q directly."""
    bias = r.flag("attention_bias", "attention.bias", default=False)
    direct = "q_lora_rank" in r.config and r.config["q_lora_rank"] is None
    return _some(
        kind="mla",
        heads=r.integer("num_attention_heads", "attention.heads", high=10**6),
        q_lora_rank=0 if direct else r.integer("q_lora_rank", "attention.q_lora_rank", low=0, high=10**6),
        kv_lora_rank=r.integer("kv_lora_rank", "attention.kv_lora_rank", high=10**6),
        qk_nope_head_dim=r.integer("qk_nope_head_dim", "attention.qk_nope_head_dim", high=65536),
        qk_rope_head_dim=r.integer("qk_rope_head_dim", "attention.qk_rope_head_dim", high=65536),
        v_head_dim=r.integer("v_head_dim", "attention.v_head_dim", high=65536),
        bias=bias,
        out_bias=bias,
    )


def _gqa(
    r: ConfigReader, *, bias: bool, out_bias: bool, qk_norm: bool = False, all_kv: bool = False, derive: bool = True
) -> Tree:
    """MHA or GQA. ``all_kv``: absent KV heads mean as many as heads. ``derive``: absent head_dim is hidden / heads."""
    heads = r.integer("num_attention_heads", "attention.heads", high=10**6)
    default = heads if all_kv else None
    kv_heads = r.integer("num_key_value_heads", "attention.kv_heads", high=10**6, default=default)
    head_dim = _derived_head_dim(r, heads) if derive and r.config.get("head_dim") is None else None
    if head_dim is None:
        head_dim = r.integer("head_dim", "attention.head_dim", high=65536)
    kind = {"kind": "mha"} if kv_heads == heads else {"kind": "gqa"}
    kv = kv_heads if kv_heads != heads else None
    rest = _some(heads=heads, kv_heads=kv, head_dim=head_dim, bias=bias, out_bias=out_bias, qk_norm=qk_norm)
    return kind | rest


def _derived_head_dim(r: ConfigReader, heads: int) -> int | None:
    """hidden / heads, as the config classes have it where head_dim is absent; None when that is not whole."""
    hidden = r.config.get("hidden_size")
    if type(hidden) is not int or hidden < 1:
        return 1  # a fault of its own
    if hidden % heads:
        return None
    message = f"`head_dim` is not in the config: hidden_size / num_attention_heads = {shown(hidden // heads)} is used"
    r.note(message, "attention.head_dim", "num_attention_heads")
    return hidden // heads


def _biased(r: ConfigReader) -> dict[str, bool]:
    """``attention_bias`` as the classes use it that put it on all four projections."""
    bias = r.flag("attention_bias", "attention.bias", default=False)
    return {"bias": bias, "out_bias": bias}


def _moe(r: ConfigReader, experts: str, intermediate: str, **more: Any) -> Tree:
    """The MoE block; ``experts`` and ``intermediate`` are the architecture's names for these keys."""
    sizes = {
        "experts": r.integer(experts, "moe.experts", high=_MAX_EXPERTS),
        "top_k": r.integer("num_experts_per_tok", "moe.top_k", high=_MAX_EXPERTS),
        "intermediate": r.integer(intermediate, "moe.intermediate"),
    }
    return sizes | _some(**more)


def _groups(r: ConfigReader, default_groups: int, default_top: int) -> Tree:
    """Group-limited routing: keys only where there is more than one group."""
    groups = r.integer("n_group", "moe.groups", high=_MAX_EXPERTS, default=default_groups)
    top = r.integer("topk_group", "moe.top_groups", high=_MAX_EXPERTS, default=default_top)
    return {"groups": groups, "top_groups": top} if groups > 1 else {}


def _layout(layers: int, moe_layers: Iterable[int]) -> Tree:
    """The shortest planc keys that mean exactly these MoE layers."""
    wanted = sorted(set(moe_layers))
    first = wanted[0] if wanted else layers
    if wanted == list(range(first, layers)):
        return _some(first_k_dense=first)
    if wanted == list(range(first, layers, first + 1)):
        return {"moe_stride": first + 1}
    return {"moe_layers": _ranges(wanted)}


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 7]`` -> ``"0-2,7"``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _model(r: ConfigReader, attention: Tree, moe: Tree | None, moe_layers: list[int], dense: str, layers: int) -> Tree:
    """The whole tree. The dense width is read only where there are dense layers."""
    tree: Tree = {"layers": layers, "hidden": r.integer("hidden_size", "hidden"), "attention": attention}
    if len(set(moe_layers)) < layers:
        tree["dense_mlp"] = {"intermediate": r.integer(dense, "dense_mlp.intermediate")}
    if moe is not None:
        if not moe_layers:
            r.fault("by these keys no layer is an MoE layer", "moe_layers", "num_hidden_layers")
        tree |= {"moe": moe} | _layout(layers, moe_layers)
    tree["vocab"] = r.integer("vocab_size", "vocab", high=10**8)
    tree |= _some(tied_embeddings=r.flag("tie_word_embeddings", "tied_embeddings", default=False))
    tree |= {"norm": "rms", "dtypes": _dtypes(r)}
    _left_out(r)
    return tree


def _layer_count(r: ConfigReader) -> int:
    """The layers; with a fault, as many as there may be, so that the fault makes no others."""
    before = len(r.faults)
    layers = r.integer("num_hidden_layers", "layers", high=_MAX_LAYERS)
    return layers if len(r.faults) == before else _MAX_LAYERS


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float8_e4m3fn": "fp8"}


def _dtypes(r: ConfigReader) -> Tree:
    """Element types: ``dtype`` (or ``torch_dtype``), and FP8 where the checkpoint's weights are quantized to it."""
    key = "dtype" if r.config.get("dtype") is not None else "torch_dtype"
    stated = r.config.get(key)
    base = _DTYPES.get(stated.removeprefix("torch.")) if isinstance(stated, str) else None
    if base is None and stated is not None and not isinstance(stated, str):
        r.fault(f"`{key}` is {shown(stated)}, not the name of a dtype", "dtypes.weights", key)
    elif base is None:
        what = f"`{key}` is {shown(stated)}, which planc does not plan" if stated else f"`{key}` is not in the config"
        r.note(f"{what}: planned as bf16", "dtypes.weights", key)
    base = base or "bf16"
    other = base if base == "fp16" else None
    weights = _quantized(r, base)
    return {"weights": weights} | _some(kv_cache=other, activations=other)


def _quantized(r: ConfigReader, base: str) -> str:
    """The weights' dtype after ``quantization_config``."""
    key = "quantization_config"
    quantization = r.config.get(key)
    if quantization is None:
        return base
    if not isinstance(quantization, dict):
        r.fault(f"`{key}` is {shown(quantization)}, not an object", "dtypes.weights", key)
        return base
    method, algorithm = quantization.get("quant_method"), quantization.get("quant_algo")
    if method in ("fp8", "fbgemm_fp8") or (method == "modelopt" and algorithm == "FP8"):
        message = "the checkpoint is FP8: every weight is planned as fp8, also one kept wider, and scales are left out"
        r.note(message, "dtypes.weights", key)
        return "fp8"
    cost = f"planned as {base}, {DTYPE_BYTES[base]} B a weight"
    r.note(f"the checkpoint is quantized as {shown(method)}, which planc does not plan: {cost}", "dtypes.weights", key)
    return base


def _left_out(r: ConfigReader) -> None:
    """Notes on parts of the checkpoint that a planc model does not hold."""
    extra = r.config.get("num_nextn_predict_layers")
    if type(extra) is int and extra > 0:
        message = f"{shown(extra)} multi-token-prediction layers are left out of the plan"
        r.note(message, "layers", "num_nextn_predict_layers")
    for key in ("sliding_window", "attention_chunk_size"):
        width = r.config.get(key)
        if type(width) is int and r.config.get("use_sliding_window") is not False:
            message = f"`{key}` {shown(width)}: every layer is planned with full attention, an upper bound"
            r.note(message, "attention", key)
    if r.config.get("mlp_bias") is True:
        r.note("`mlp_bias`: the MLP's biases are left out of the plan", "dense_mlp", "mlp_bias")


# --- architectures -----------------------------------------------------------------------------------------------


def _deepseek(r: ConfigReader, *, first: int, shared: int, groups: tuple[int, int], more: Tree) -> Tree:
    """Layer i is MoE when i ≥ first_k_dense_replace and i is a multiple of moe_layer_freq. Numbers are defaults."""
    layers = _layer_count(r)
    first = r.integer("first_k_dense_replace", "first_k_dense", low=0, high=_MAX_LAYERS, default=first)
    freq = r.integer("moe_layer_freq", "moe_stride", high=_MAX_LAYERS, default=1)
    shared = r.integer("n_shared_experts", "moe.shared_experts", low=0, high=1024, default=shared)
    moe = _moe(r, "n_routed_experts", "moe_intermediate_size", shared_experts=shared)
    moe |= _groups(r, *groups) | more
    moe_layers = [i for i in range(first, layers) if i % freq == 0]
    return _model(r, _mla(r), moe, moe_layers, "intermediate_size", layers)


def _deepseek_v2(r: ConfigReader) -> Tree:
    return _deepseek(r, first=0, shared=2, groups=(1, 1), more={})


def _deepseek_v3(r: ConfigReader) -> Tree:
    """V3, R1 and Kimi-K2: sigmoid scores, and with `noaux_tc` a correction bias for each expert."""
    gate = r.word("scoring_func", "moe.gate", ("sigmoid", "softmax"), default="sigmoid")
    methods = ("noaux_tc", "greedy", "group_limited_greedy")
    corrected = r.word("topk_method", "moe.gate_bias", methods, default="noaux_tc") == "noaux_tc"
    more = {"gate": gate} if gate != "softmax" else {}
    more |= _some(gate_bias=corrected)
    return _deepseek(r, first=3, shared=1, groups=(8, 4), more=more)


def _mixtral(r: ConfigReader) -> Tree:
    layers = _layer_count(r)
    moe = _moe(r, "num_local_experts", "intermediate_size")
    return _model(r, _gqa(r, bias=False, out_bias=False), moe, list(range(layers)), "intermediate_size", layers)


def _sparse_layers(r: ConfigReader, layers: int) -> list[int]:
    """Qwen: layer i is MoE unless listed in mlp_only_layers, when i + 1 is a multiple of decoder_sparse_step."""
    step = r.integer("decoder_sparse_step", "moe_stride", high=_MAX_LAYERS, default=1)
    dense = set(r.layer_list("mlp_only_layers", "moe_layers", layers))
    return [i for i in range(layers) if i not in dense and (i + 1) % step == 0]


def _qwen2_moe(r: ConfigReader) -> Tree:
    layers = _layer_count(r)
    width = r.integer("shared_expert_intermediate_size", "moe.shared_intermediate", low=0)
    shared: Tree = {"shared_experts": 1, "shared_intermediate": width, "shared_gate": True} if width else {}
    moe = _moe(r, "num_experts", "moe_intermediate_size", **shared)
    attention = _gqa(r, bias=r.flag("qkv_bias", "attention.bias", default=True), out_bias=False)
    return _model(r, attention, moe, _sparse_layers(r, layers), "intermediate_size", layers)


def _qwen3_moe(r: ConfigReader) -> Tree:
    layers = _layer_count(r)
    moe = _moe(r, "num_experts", "moe_intermediate_size")
    attention = _gqa(r, **_biased(r), qk_norm=True)
    return _model(r, attention, moe, _sparse_layers(r, layers), "intermediate_size", layers)


def _gpt_oss(r: ConfigReader) -> Tree:
    """Biases everywhere: projections, gate and experts. The learned attention sinks, one a head, are left out."""
    layers = _layer_count(r)
    moe = _moe(r, "num_local_experts", "intermediate_size", gate_bias=True, expert_bias=True)
    bias = r.flag("attention_bias", "attention.bias", default=True)
    r.note("the attention sinks, one learned value a head, are left out of the plan", "attention")
    attention = _gqa(r, bias=bias, out_bias=bias, derive=False)
    return _model(r, attention, moe, list(range(layers)), "intermediate_size", layers)


def _glm4_moe(r: ConfigReader) -> Tree:
    """Sigmoid scores with a correction bias, as DeepSeek-V3, over GQA."""
    layers = _layer_count(r)
    first = r.integer("first_k_dense_replace", "first_k_dense", low=0, high=_MAX_LAYERS, default=1)
    shared = r.integer("n_shared_experts", "moe.shared_experts", low=0, high=1024, default=1)
    moe = _moe(r, "n_routed_experts", "moe_intermediate_size", shared_experts=shared)
    moe |= _groups(r, 1, 1) | {"gate": "sigmoid", "gate_bias": True}
    bias = r.flag("attention_bias", "attention.bias", default=False)
    qk_norm = r.flag("use_qk_norm", "attention.qk_norm", default=False)
    attention = _gqa(r, bias=bias, out_bias=False, qk_norm=qk_norm, derive=False)
    return _model(r, attention, moe, list(range(first, layers)), "intermediate_size", layers)


def _olmoe(r: ConfigReader) -> Tree:
    """q and k are normed over their whole width, which planc counts as one head's width."""
    layers = _layer_count(r)
    moe = _moe(r, "num_experts", "intermediate_size")
    r.note("the norms of q and k span all heads; planc counts one head's width of them", "attention.qk_norm")
    attention = _gqa(r, **_biased(r), qk_norm=True, all_kv=True)
    return _model(r, attention, moe, list(range(layers)), "intermediate_size", layers)


def _llama(r: ConfigReader) -> Tree:
    layers = _layer_count(r)
    return _model(r, _gqa(r, **_biased(r), all_kv=True), None, [], "intermediate_size", layers)


def _llama4(r: ConfigReader) -> Tree:
    """The text model inside ``text_config``; its q/k norm has no weights. Every MoE layer has one shared expert."""
    text = r.config.get("text_config")
    if not isinstance(text, dict):
        r.fault(f"`text_config` is {shown(text)}, not an object", "layers", "text_config")
        return {}
    if r.config.get("vision_config") is not None:
        r.note("the vision tower is left out of the plan", "name", "vision_config")
    outer = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
    place = re.search(r'"text_config"\s*:', r.text)
    config = {key: r.config[key] for key in outer if key in r.config} | text
    r = replace(r, config=config, start=place.end() if place else 0, owner="Llama4TextConfig")
    layers = _layer_count(r)
    if r.config.get("moe_layers") is not None:
        moe_layers = r.layer_list("moe_layers", "moe_layers", layers)
    else:
        step = r.integer("interleave_moe_layer_step", "moe_stride", high=_MAX_LAYERS)
        moe_layers = list(range(step - 1, layers, step))
    moe = _moe(r, "num_local_experts", "intermediate_size", shared_experts=1) | {"gate": "sigmoid"}
    return _model(r, _gqa(r, **_biased(r)), moe, moe_layers, "intermediate_size_mlp", layers)


#: name in ``architectures`` -> the function that reads its fields
ARCHITECTURES: dict[str, Callable[[ConfigReader], Tree]] = {
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Glm4MoeForCausalLM": _glm4_moe,
    "GptOssForCausalLM": _gpt_oss,
    "Llama4ForConditionalGeneration": _llama4,
    "LlamaForCausalLM": _llama,
    "MixtralForCausalLM": _mixtral,
    "OlmoeForCausalLM": _olmoe,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
#: ``model_type`` -> architecture, for a config without ``architectures``
MODEL_TYPES: dict[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

#: planc key -> names that configs commonly give it; what an unknown architecture is searched for
