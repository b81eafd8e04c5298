"""What each rank holds of the small model: slices of the whole weights, by placement and degrees alone, and its KV cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from planc.placement.memory import padded_width, unquantized_bytes
from planc.prove.model import Array, Weights
from planc.spec import Model
from planc.verify import Draft


@dataclass
class Held:
    """One rank's weights, by item of the memory table and then by name, and its KV cache: (micro-batch, layer) -> (first,
    second, length) with room for the whole context. ``parts``: the same weights by item and prefix, for looking up."""

    weights: dict[str, dict[str, Array]] = field(default_factory=dict)
    parts: dict[tuple[str, str], dict[str, Array]] = field(default_factory=dict)
    cache: dict[tuple[int, int], list[Array]] = field(default_factory=dict)

    def put(self, item: str, prefix: str, arrays: dict[str, Array]) -> None:
        """Keep arrays under ``prefix``."""
        part = self.weights.setdefault(item, {})
        part.update({f"{prefix}{name}": array for name, array in arrays.items()})
        self.parts[item, prefix] = arrays

    def get(self, item: str, prefix: str) -> dict[str, Array]:
        """Arrays that were put under ``prefix``; empty where the rank holds none."""
        return self.parts.get((item, prefix), {})

    def head(self, model: Model, shard: int, tp: int) -> Array:
        """This rank's columns of the head, padded to whole shards; of the embedding where that is the head and held here."""
        own = self.get("head", "").get("w")
        if own is not None:
            return own
        if not model.tied_embeddings:
            raise LookupError("no head is held here")
        return head_shard(self.get("embedding", "")["table"].T, shard, tp)


def holdings(draft: Draft, weights: Weights, ranks: Collection[int] | None = None) -> list[Held]:
    """What every rank holds, in the order of ranks; with ``ranks`` the others hold nothing."""
    par, model = draft.parallelism, draft.spec.model
    held = [Held() for _ in range(par.world_size)]
    for rank, one in enumerate(held):
        if ranks is not None and rank not in ranks:
            continue
        stage, local = divmod(rank % par.replica_size, par.ep)
        shard = local % par.tp
        first, end = par.stages[stage]
        gates = not par.leaders_gate or shard == 0
        for layer in range(first, end):
            at = f"L{layer}."
            one.put("attention", at, attention_shard(weights, layer, shard, par.tp))
            if model.norm == "rms":
                for name in ("attn", "mlp"):
                    norm = weights.norm(f"L{layer}.{name}")
                    assert norm is not None
                    one.put("norms", f"{at}{name}", {"": norm})
            if layer in draft.placement.layers:
                moe = model.moe
                assert moe is not None
                if gates:
                    one.put("gates", at, weights.router(layer))
                if moe.shared_width:
                    split = par.tp if par.leaders_gate else 1
                    one.put("shared_experts", at, mlp_shard(weights.shared(layer), shard if split > 1 else 0, split))
            else:
                one.put("dense_mlp", at, mlp_shard(weights.dense(layer), shard, par.tp))
        for layer, experts in draft.placement.experts_of_rank(rank).items():
            for expert in experts:
                part = mlp_shard(weights.expert(layer, expert), local % par.expert_tp, par.expert_tp)
                one.put("experts", f"L{layer}.E{expert}.", part)
        if model.vocab and stage == 0:
            one.put("embedding", "", {"table": weights.embedding()})
        if stage == par.pp - 1:
            final = weights.norm("final")
            if final is not None:
                one.put("norms", "final", {"": final})
            if model.vocab and not (model.tied_embeddings and par.pp == 1):
                one.put("head", "", {"w": head_shard(weights.head(), shard, par.tp)})
    return held


def head_shard(whole: Array, shard: int, tp: int) -> Array:
    """A rank's columns of the head [h, vocab], zeros where tp does not divide the vocabulary."""
    width = padded_width(whole.shape[1], tp)
    padded = np.zeros((len(whole), width * tp))
    padded[:, : whole.shape[1]] = whole
    return padded[:, shard * width : (shard + 1) * width]


def _part(array: Array, shard: int, split: int, axis: int) -> Array:
    size = array.shape[axis] // split
    return np.take(array, range(shard * size, (shard + 1) * size), axis=axis)


def attention_shard(weights: Weights, layer: int, shard: int, tp: int) -> dict[str, Array]:
    """A rank's heads; a KV head is repeated where there are more ranks than KV heads. Biases of the output are the first
    rank's to add."""
    model = weights.model
    whole = weights.attention(layer)
    out: dict[str, Array] = {}
    for name, array in whole.items():
        if name in ("q", "q_bias", "q_up", "k_up", "v_up", "o"):
            out[name] = _part(array, shard, tp, 0)
        elif name in ("k", "v", "k_bias", "v_bias"):
            heads = model.attention.kv_head_count
            if heads >= tp:
                out[name] = _part(array, shard, tp, 0)
            else:
                out[name] = array[shard * heads // tp : shard * heads // tp + 1]
        else:
            out[name] = array
    return out


def mlp_shard(whole: dict[str, Array], shard: int, split: int) -> dict[str, Array]:
    """Columns of the up matrices, rows of the down matrix; the bias of the output is the first shard's to add."""
    if split == 1:
        return whole
    axes = {"up": 1, "gate": 1, "down": 0, "up_bias": 0, "gate_bias": 0}
    return {name: _part(array, shard, split, axes[name]) if name in axes else array for name, array in whole.items()}


def held_bytes(draft: Draft, held: list[Held]) -> dict[str, np.ndarray]:
    """Bytes of every item on every rank, counted in the arrays that are there at the dtypes of the spec; int64 [world]."""
    model = draft.spec.model
    small = unquantized_bytes(model)
    width = {"attention": model.bytes_of("weights"), "dense_mlp": model.bytes_of("weights")}
    width |= {"shared_experts": model.bytes_of("weights"), "experts": model.bytes_of("expert_weights")}
    width |= dict.fromkeys(("gates", "norms", "embedding", "head"), small)
    out = {
        item: np.array([sum(a.size for a in one.weights.get(item, {}).values()) * size for one in held])
        for item, size in width.items()
    }
    kv = model.bytes_of("kv_cache")
    out["kv_cache"] = np.array([sum(a.size for pair in one.cache.values() for a in pair) * kv for one in held])
    return out
