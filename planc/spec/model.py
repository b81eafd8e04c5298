"""The model: layers, attention, MLPs, experts, vocabulary, dtypes, and the parameter counts that follow."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from planc.spec.fields import DTYPE_BYTES, Count, Dtype, Name, Strict, parse_ranges


class Attention(Strict):
    """Attention of one layer. `mha` has one KV head a head, `gqa` fewer, `mla` a low-rank KV latent.

    For MLA, ``head_dim`` is not given: a query head is ``qk_nope_head_dim + qk_rope_head_dim`` wide and a value
    head ``v_head_dim``; ``q_lora_rank`` 0 means the query is projected directly.
    """

    kind: Literal["mha", "gqa", "mla"] = "mha"
    heads: Count
    head_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    kv_heads: Annotated[int, Field(ge=0, le=10**6)] = 0
    q_lora_rank: Annotated[int, Field(ge=0, le=10**6)] = 0
    kv_lora_rank: Annotated[int, Field(ge=0, le=10**6)] = 0
    qk_nope_head_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    qk_rope_head_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    v_head_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    bias: bool = Field(default=False, description="bias on the q, k and v projections")
    out_bias: bool = Field(default=False, description="bias on the output projection")
    qk_norm: bool = Field(default=False, description="RMSNorm weights on q and k heads")

    @property
    def kv_head_count(self) -> int:
        """KV heads of the layer (MHA: as many as heads; MLA: the latent counts as one)."""
        if self.kind == "mla":
            return 1
        return self.heads if self.kind == "mha" else self.kv_heads

    @property
    def q_head_dim(self) -> int:
        """Width of a query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @property
    def out_head_dim(self) -> int:
        """Width of a head's output."""
        return self.v_head_dim if self.kind == "mla" else self.head_dim

    @property
    def kv_width(self) -> int:
        """Values cached per token and layer over all KV heads: 2 · kv_heads · head_dim, or MLA's latent."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_head_count * self.head_dim


class Moe(Strict):
    """The MoE layers: routed experts, the gate, and shared (always-on) experts."""

    experts: Annotated[int, Field(ge=1, le=65536)]
    top_k: Annotated[int, Field(ge=1, le=65536)]
    intermediate: Count
    gated: bool = Field(default=True, description="three matrices (SwiGLU) instead of two (GELU)")
    shared_experts: Annotated[int, Field(ge=0, le=1024)] = 0
    shared_intermediate: Annotated[int, Field(ge=0, le=10**7)] = Field(
        default=0, description="total width of the shared experts; 0: shared_experts × intermediate"
    )
    shared_gate: bool = Field(default=False, description="a learned scalar gate on the shared experts' output")
    groups: Annotated[int, Field(ge=1, le=65536)] = 1
    top_groups: Annotated[int, Field(ge=1, le=65536)] = 1
    gate: Literal["softmax", "sigmoid"] = "softmax"
    gate_bias: bool = Field(default=False, description="one bias per expert in the gate")
    expert_bias: bool = Field(default=False, description="biases on the experts' matrices")

    @property
    def shared_width(self) -> int:
        """Intermediate width of the shared experts together; 0 without any."""
        return self.shared_intermediate or self.shared_experts * self.intermediate


class DenseMlp(Strict):
    """The MLP of a dense layer."""

    intermediate: Count
    gated: bool = True


class Dtypes(Strict):
    """Element types. `expert_weights` defaults to `weights`; `dispatch` and `combine` to `activations`."""

    weights: Dtype = "bf16"
    expert_weights: Dtype | None = None
    kv_cache: Dtype = "bf16"
    activations: Dtype = "bf16"
    dispatch: Dtype | None = None
    combine: Dtype | None = None


def _read_layers(value: object) -> tuple[int, ...]:
    if isinstance(value, str):
        try:
            return tuple(parse_ranges(value, limit=100_000))
        except ValueError as error:
            raise PydanticCustomError("wrong_type", "{reason}", {"reason": str(error)}) from None
    if isinstance(value, list) and all(type(v) is int and v >= 0 for v in value):
        return tuple(value)
    raise PydanticCustomError("wrong_type", "expected layer numbers: a list, or a text such as `3-60`")


LayerList = Annotated[
    tuple[int, ...],
    BeforeValidator(_read_layers),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}),
]


class Model(Strict):
    """A transformer. Layer i is MoE if `moe_layers` lists it; without that list, if i ≥ `first_k_dense` and
    (i + 1) is a multiple of `moe_stride`. Without `moe` every layer is dense."""

    name: Name
    source: Annotated[str, Field(max_length=500)] = ""
    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden: Count
    attention: Attention
    dense_mlp: DenseMlp | None = None
    moe: Moe | None = None
    first_k_dense: Annotated[int, Field(ge=0, le=10_000)] = 0
    moe_stride: Annotated[int, Field(ge=1, le=10_000)] = 1
    moe_layers: LayerList | None = None
    vocab: Annotated[int, Field(ge=0, le=10**8)] = Field(default=0, description="0: no embedding and no head")
    tied_embeddings: bool = False
    norm: Literal["none", "rms"] = "none"
    dtypes: Dtypes = Dtypes()

    @cached_property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """The MoE layers, ascending."""
        if self.moe is None:
            return ()
        if self.moe_layers is not None:
            return tuple(sorted(set(self.moe_layers)))
        return tuple(i for i in range(self.first_k_dense, self.layers) if (i + 1) % self.moe_stride == 0)

    @cached_property
    def dense_layer_ids(self) -> tuple[int, ...]:
        """The dense layers, ascending."""
        moe = set(self.moe_layer_ids)
        return tuple(i for i in range(self.layers) if i not in moe)

    def bytes_of(
        self, role: Literal["weights", "expert_weights", "kv_cache", "activations", "dispatch", "combine"]
    ) -> int:
        """Bytes of one element in the given role."""
        return DTYPE_BYTES[self.dtype_of(role)]

    def dtype_of(self, role: str) -> str:
        """The dtype in the given role, defaults resolved."""
        fallback = {"expert_weights": "weights", "dispatch": "activations", "combine": "activations"}
        value = getattr(self.dtypes, role) or getattr(self.dtypes, fallback[role])
        return str(value)


def mlp_parameters(hidden: int, intermediate: int, gated: bool) -> int:
    """Parameters of one MLP: two matrices hidden × intermediate, three when gated."""
    return (3 if gated else 2) * hidden * intermediate


def attention_parameters(model: Model, tp: int = 1) -> tuple[int, int]:
    """Parameters of one layer's attention as (sharded over heads: per rank, replicated: per rank) at degree ``tp``.

    MHA and GQA: q and o are hidden × heads·head_dim, k and v hidden × kv_heads·head_dim; a KV head is replicated
    when tp exceeds the KV heads. MLA (DeepSeek-V2, arXiv 2405.04434): the down-projections are replicated, the
    up-projections and o sharded over heads. Biases and q/k norm weights are included where the model has them.
    """
    a, h = model.attention, model.hidden
    heads = a.heads // tp
    if a.kind == "mla":
        q_in = a.q_lora_rank or h
        sharded = heads * (q_in * a.q_head_dim + a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim))
        sharded += heads * a.v_head_dim * h
        replicated = h * a.q_lora_rank + h * (a.kv_lora_rank + a.qk_rope_head_dim)
        if model.norm == "rms":
            replicated += a.q_lora_rank + a.kv_lora_rank
        if a.bias:
            replicated += a.q_lora_rank + a.kv_lora_rank + a.qk_rope_head_dim
        return sharded, replicated + (h if a.out_bias else 0)
    kv_heads = max(1, a.kv_head_count // tp)
    sharded = 2 * h * heads * a.head_dim + 2 * h * kv_heads * a.head_dim
    if a.bias:
        sharded += (heads + 2 * kv_heads) * a.head_dim
    replicated = (h if a.out_bias else 0) + (2 * a.head_dim if a.qk_norm else 0)
    return sharded, replicated


def expert_parameters(model: Model, split: int = 1) -> int:
    """Parameters of one routed expert, biases included; 0 for a dense model. ``split``: of one of so many shards, each of
    which keeps the whole bias of the output (the first adds it)."""
    if model.moe is None:
        return 0
    moe = model.moe
    bias = (2 if moe.gated else 1) * moe.intermediate if moe.expert_bias else 0
    whole = model.hidden if moe.expert_bias else 0
    return (mlp_parameters(model.hidden, moe.intermediate, moe.gated) + bias) // split + whole


def gate_parameters(model: Model) -> int:
    """Parameters of one layer's gate: hidden × experts, its bias, and the shared experts' scalar gate."""
    if model.moe is None:
        return 0
    moe = model.moe
    return model.hidden * moe.experts + (moe.experts if moe.gate_bias else 0) + (model.hidden if moe.shared_gate else 0)


def shared_parameters(model: Model) -> int:
    """Parameters of one layer's shared experts."""
    return mlp_parameters(model.hidden, model.moe.shared_width, model.moe.gated) if model.moe else 0


def dense_mlp_parameters(model: Model) -> int:
    """Parameters of one dense layer's MLP."""
    return mlp_parameters(model.hidden, model.dense_mlp.intermediate, model.dense_mlp.gated) if model.dense_mlp else 0


def norm_parameters(model: Model) -> int:
    """RMSNorm weights of one layer: before attention and before the MLP."""
    return 2 * model.hidden if model.norm == "rms" else 0


def parameter_counts(model: Model) -> dict[str, int]:
    """Parameters by part, with ``total`` and ``active`` (total less the experts that a token does not choose)."""
    moe_layers, dense_layers = len(model.moe_layer_ids), len(model.dense_layer_ids)
    embedding = model.vocab * model.hidden
    counts = {
        "attention": model.layers * sum(attention_parameters(model)),
        "dense_mlp": dense_layers * dense_mlp_parameters(model),
        "experts": moe_layers * (model.moe.experts if model.moe else 0) * expert_parameters(model),
        "shared_experts": moe_layers * shared_parameters(model),
        "gates": moe_layers * gate_parameters(model),
        "norms": model.layers * norm_parameters(model) + (model.hidden if model.norm == "rms" else 0),
        "embedding": embedding,
        "head": 0 if model.tied_embeddings else embedding,
    }
    total = sum(counts.values())
    top_k = model.moe.top_k if model.moe else 0
    inactive = moe_layers * ((model.moe.experts if model.moe else 0) - top_k) * expert_parameters(model)
    return counts | {"total": total, "active": total - inactive}
