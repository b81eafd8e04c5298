"""The model whole, on one imaginary machine, in float64: plain, readable, and knowing nothing of plans.

Weights are drawn with a seed, layer by layer; the plan's ranks get slices of the same arrays. What specs leave open is fixed
here for both sides: RMSNorm (where the model has norms) before attention, MLP and head, rotary positions of base 10,000 on
the whole head (MHA, GQA) or its rope part (MLA), SiLU in gated MLPs and GELU (tanh) in others, DeepSeek-V3's gate where it
is a sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from planc.spec import Model

EPSILON = 1e-6
Array = np.ndarray


def drawn(seed: int, name: str, *shape: int) -> Array:
    """Weights of a name: normal, scaled so that products keep their size; the same in every run and on every rank."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    fan = shape[-2] if len(shape) > 1 else 1
    return np.asarray(rng.normal(0.0, 1.0, shape) / np.sqrt(fan))


@dataclass(frozen=True)
class Weights:
    """Weights of a model, made when asked for and kept."""

    model: Model
    seed: int
    _made: dict[str, Array] = field(default_factory=dict)

    def get(self, name: str, *shape: int) -> Array:
        """The array ``name``."""
        if name not in self._made:
            made = drawn(self.seed, name, *shape)
            self._made[name] = 1.0 + 0.1 * made if name.endswith("norm") else made
        return self._made[name]

    @property
    def small(self) -> float:
        """By which what a layer adds is scaled, so that the residual stream of a deep model without norms keeps its size (and
        errors of rounding theirs)."""
        return float(1.0 / np.sqrt(2.0 * self.model.layers))

    # --- attention ----------------------------------------------------------------------------------------------

    def attention(self, layer: int) -> dict[str, Array]:
        """Projections of a layer. MHA and GQA: q [h, heads, d], k and v [h, kv_heads, d], o [heads, d, h]. MLA: q_down,
        q_up, kv_down [h, latent + rope], k_up and v_up by head, o."""
        a, h, at = self.model.attention, self.model.hidden, f"L{layer}.attn"
        out = {"o": self.get(f"{at}.o", a.heads, a.out_head_dim, h) / np.sqrt(a.heads) * self.small}
        if a.out_bias:
            out["o_bias"] = self.get(f"{at}.o_bias", h) * self.small
        if a.kind == "mla":
            rank = a.q_lora_rank or h
            if a.q_lora_rank:
                out["q_down"] = self.get(f"{at}.q_down", h, a.q_lora_rank)
                if self.model.norm == "rms":
                    out["q_norm"] = self.get(f"{at}.q_norm", a.q_lora_rank)
            out["q_up"] = self.get(f"{at}.q_up", a.heads, rank, a.q_head_dim)
            out["kv_down"] = self.get(f"{at}.kv_down", h, a.kv_width)
            if self.model.norm == "rms":
                out["kv_norm"] = self.get(f"{at}.kv_norm", a.kv_lora_rank)
            out["k_up"] = self.get(f"{at}.k_up", a.heads, a.kv_lora_rank, a.qk_nope_head_dim)
            out["v_up"] = self.get(f"{at}.v_up", a.heads, a.kv_lora_rank, a.v_head_dim)
            if a.bias:
                if a.q_lora_rank:
                    out["q_down_bias"] = self.get(f"{at}.q_down_bias", a.q_lora_rank)
                out["kv_down_bias"] = self.get(f"{at}.kv_down_bias", a.kv_width)
            return out
        for part, heads in (("q", a.heads), ("k", a.kv_head_count), ("v", a.kv_head_count)):
            out[part] = self.get(f"{at}.{part}", heads, h, a.head_dim)
            if a.bias:
                out[f"{part}_bias"] = self.get(f"{at}.{part}_bias", heads, a.head_dim)
        if a.qk_norm:
            out["q_norm"] = self.get(f"{at}.q_norm", a.head_dim)
            out["k_norm"] = self.get(f"{at}.k_norm", a.head_dim)
        return out

    # --- MLPs ---------------------------------------------------------------------------------------------------

    def mlp(self, name: str, width: int, gated: bool, bias: bool = False) -> dict[str, Array]:
        """``up`` [h, width] (and ``gate``), ``down`` [width, h], biases where asked."""
        h = self.model.hidden
        out = {"up": self.get(f"{name}.up", h, width), "down": self.get(f"{name}.down", width, h) * self.small}
        if gated:
            out["gate"] = self.get(f"{name}.gate", h, width)
        if bias:
            out["up_bias"] = self.get(f"{name}.up_bias", width)
            out["down_bias"] = self.get(f"{name}.down_bias", h) * self.small
            if gated:
                out["gate_bias"] = self.get(f"{name}.gate_bias", width)
        return out

    def dense(self, layer: int) -> dict[str, Array]:
        """The MLP of a dense layer."""
        mlp = self.model.dense_mlp
        assert mlp is not None
        return self.mlp(f"L{layer}.dense", mlp.intermediate, mlp.gated)

    def shared(self, layer: int) -> dict[str, Array]:
        """The shared experts as one MLP."""
        moe = self.model.moe
        assert moe is not None
        return self.mlp(f"L{layer}.shared", moe.shared_width, moe.gated)

    def expert(self, layer: int, expert: int) -> dict[str, Array]:
        """One routed expert."""
        moe = self.model.moe
        assert moe is not None
        return self.mlp(f"L{layer}.E{expert}", moe.intermediate, moe.gated, moe.expert_bias)

    def router(self, layer: int) -> dict[str, Array]:
        """``w`` [h, E]; ``bias`` [E]; ``shared`` [h] where the shared experts are gated."""
        moe, h = self.model.moe, self.model.hidden
        assert moe is not None
        out = {"w": self.get(f"L{layer}.router", h, moe.experts)}
        if moe.gate_bias:
            out["bias"] = 0.1 * self.get(f"L{layer}.router.bias", moe.experts)
        if moe.shared_gate:
            out["shared"] = self.get(f"L{layer}.router.shared", h, 1)[:, 0]
        return out

    def norm(self, name: str) -> Array | None:
        """An RMSNorm's weights, where the model has norms."""
        return self.get(f"{name}.norm", self.model.hidden) if self.model.norm == "rms" else None

    def embedding(self) -> Array:
        """[vocab, h]."""
        return self.get("embedding", self.model.vocab, self.model.hidden)

    def head(self) -> Array:
        """[h, vocab]."""
        if self.model.tied_embeddings:
            return self.embedding().T
        return self.get("head", self.model.hidden, self.model.vocab)


# --- the arithmetic that both sides share: one token, one head, one expert at a time ---------------------------------


def rms(x: Array, weights: Array | None) -> Array:
    """RMSNorm over the last axis; nothing where there are no weights."""
    if weights is None:
        return x
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * weights)


def rotate(x: Array, position: Array) -> Array:
    """Rotary positions on the last axis (its even part). ``x``: [tokens, …, d]; ``position``: [tokens]."""
    half = x.shape[-1] // 2
    if not half:
        return x
    angle = position[:, None] * 10_000.0 ** (-np.arange(half) / half)
    angle = angle.reshape(len(x), *([1] * (x.ndim - 2)), half)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle), rest], axis=-1)


def attend(q: Array, k: Array, v: Array, first: int) -> Array:
    """Causal attention of one sequence. ``q``: [n, heads, d], tokens at positions ``first`` …; ``k``: [s, heads, d], ``v``:
    [s, heads, dv], positions 0 …; [n, heads, dv]."""
    scores = np.einsum("nhd,shd->hns", q, k) / np.sqrt(q.shape[-1])
    seen = np.arange(len(k))[None, :] <= first + np.arange(len(q))[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("hns,shd->nhd", weights, v))


def activated(up: Array, gate: Array | None) -> Array:
    """SiLU(gate) · up, or GELU(up)."""
    if gate is not None:
        return np.asarray(gate / (1.0 + np.exp(-gate)) * up)
    return np.asarray(0.5 * up * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (up + 0.044715 * up**3))))


def inner(x: Array, w: dict[str, Array]) -> Array:
    """The activated inner values of an MLP, or of a shard of it."""
    up = x @ w["up"] + w.get("up_bias", 0.0)
    return activated(up, x @ w["gate"] + w.get("gate_bias", 0.0) if "gate" in w else None)


def mlp(x: Array, w: dict[str, Array]) -> Array:
    """A whole MLP."""
    return np.asarray(inner(x, w) @ w["down"] + w.get("down_bias", 0.0))


def route(model: Model, x: Array, w: dict[str, Array], forced: Array | None = None) -> tuple[Array, Array]:
    """(experts [t, k], weights [t, k]) of tokens ``x`` [t, h]: softmax or sigmoid scores; with groups only experts of the
    best groups (by their two best scores); a sigmoid gate's bias counts for the choice alone, and its weights are made to
    sum to one (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). ``forced``: choices given instead."""
    moe = model.moe
    assert moe is not None
    logits = x @ w["w"] + (w.get("bias", 0.0) if moe.gate == "softmax" else 0.0)
    if moe.gate == "softmax":
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
    else:
        scores = 1.0 / (1.0 + np.exp(-logits))
    wanted = scores + (w.get("bias", 0.0) if moe.gate == "sigmoid" else 0.0)
    if moe.groups > 1:
        groups = wanted.reshape(len(x), moe.groups, -1)
        best = np.sort(groups, axis=-1)[..., -min(2, groups.shape[-1]) :].sum(axis=-1)
        allowed = np.zeros_like(best, dtype=bool)
        np.put_along_axis(allowed, np.argsort(-best, axis=-1, kind="stable")[:, : moe.top_groups], True, axis=-1)
        wanted = np.where(np.repeat(allowed, groups.shape[-1], axis=-1), wanted, -np.inf)
    chosen = np.argsort(-wanted, axis=-1, kind="stable")[:, : moe.top_k] if forced is None else forced
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if moe.gate == "sigmoid":
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return chosen, weights


# --- the model whole -------------------------------------------------------------------------------------------------


@dataclass
class Sequence:
    """One sequence: keys and values of every layer so far (MLA: latents)."""

    cache: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    length: int = 0


def projected(model: Model, x: Array, w: dict[str, Array], position: Array) -> tuple[Array, Array, Array]:
    """q [t, heads, d], and what is cached: k and v [t, kv_heads, d] (MLA: latent [t, rank], rope key [t, rope])."""
    a = model.attention
    if a.kind == "mla":
        down = x
        if a.q_lora_rank:
            down = rms(x @ w["q_down"] + w.get("q_down_bias", 0.0), w.get("q_norm"))
        q = np.einsum("tr,hrd->thd", down, w["q_up"])
        q = np.concatenate([q[..., : a.qk_nope_head_dim], rotate(q[..., a.qk_nope_head_dim :], position)], axis=-1)
        both = x @ w["kv_down"] + w.get("kv_down_bias", 0.0)
        latent = rms(both[:, : a.kv_lora_rank], w.get("kv_norm"))
        return q, latent, rotate(both[:, a.kv_lora_rank :], position)
    q, k, v = (np.einsum("td,hde->the", x, w[p]) + w.get(f"{p}_bias", 0.0) for p in ("q", "k", "v"))
    if a.qk_norm:
        q, k = rms(q, w["q_norm"]), rms(k, w["k_norm"])
    return rotate(q, position), rotate(k, position), v


def expanded(model: Model, first: Array, second: Array, w: dict[str, Array], heads: int) -> tuple[Array, Array]:
    """Keys and values of every query head [s, heads, d] from what is cached."""
    a = model.attention
    if a.kind == "mla":
        k = np.einsum("sr,hrd->shd", first, w["k_up"])
        rope = np.broadcast_to(second[:, None, :], (len(second), heads, second.shape[1]))
        return np.concatenate([k, rope], axis=-1), np.einsum("sr,hrd->shd", first, w["v_up"])
    repeat = heads // first.shape[1]
    return np.repeat(first, repeat, axis=1), np.repeat(second, repeat, axis=1)


class Whole:
    """The model on one machine. ``forced``: layer -> choices [tokens, k] of the next step, or None to route by scores."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.model = weights, weights.model
        self.forced: dict[int, Array] | None = None
        self.seen: dict[str, Array] = {}  #: names of parts of the last step -> values, for comparing

    def step(self, x: Array, sequences: list[tuple[Sequence, slice]]) -> Array:
        """All layers on the tokens ``x`` (ids, or hidden states [tokens, h]); ``sequences``: whose tokens are where. Returns
        hidden states [tokens, h] of the last layer."""
        self.seen = {}
        if self.model.vocab:
            x = self.weights.embedding()[x]
        for layer in range(self.model.layers):
            x = self._layer(layer, x, sequences)
        for sequence, part in sequences:
            sequence.length += part.stop - part.start
        return x

    def _layer(self, layer: int, x: Array, sequences: list[tuple[Sequence, slice]]) -> Array:
        model, weights = self.model, self.weights
        w = weights.attention(layer)
        y = rms(x, weights.norm(f"L{layer}.attn"))
        o = np.empty((len(x), model.attention.heads, model.attention.out_head_dim))
        for sequence, part in sequences:
            position = sequence.length + np.arange(part.stop - part.start)
            q, first, second = projected(model, y[part], w, position)
            if layer in sequence.cache:
                before = sequence.cache[layer]
                first, second = np.concatenate([before[0], first]), np.concatenate([before[1], second])
            sequence.cache[layer] = first, second
            k, v = expanded(model, first, second, w, model.attention.heads)
            o[part] = attend(q, k, v, sequence.length)
        h = x + np.einsum("thd,hde->te", o, w["o"]) + w.get("o_bias", 0.0)
        self.seen[f"L{layer}.attn_add"] = h
        y = rms(h, weights.norm(f"L{layer}.mlp"))
        if layer not in model.moe_layer_ids:
            out = h + mlp(y, weights.dense(layer))
            self.seen[f"L{layer}.dense_add"] = out
            return np.asarray(out)
        moe = model.moe
        assert moe is not None
        router = weights.router(layer)
        chosen, share = route(model, y, router, None if self.forced is None else self.forced[layer])
        out = h.copy()
        for expert in range(moe.experts):
            token, place = np.nonzero(chosen == expert)
            if len(token):
                out[token] += share[token, place][:, None] * mlp(y[token], weights.expert(layer, expert))
        if moe.shared_width:
            shared = mlp(y, weights.shared(layer))
            if moe.shared_gate:
                shared = shared / (1.0 + np.exp(-(y @ router["shared"])))[:, None]
            out = out + shared
        self.seen[f"L{layer}.aggregate"] = out
        return np.asarray(out)

    def logits(self, x: Array) -> Array:
        """[tokens, vocab] of hidden states [tokens, h]."""
        return np.asarray(rms(x, self.weights.norm("final")) @ self.weights.head())
