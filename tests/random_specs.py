"""Specs drawn at random, for property tests: parts for `small_spec`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from small_specs import GPU, LINKS


@st.composite
def attentions(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.sampled_from([2, 4, 8]))
    kind = draw(st.sampled_from(["mha", "gqa", "mla"]))
    if kind == "mla":
        ranks = {
            "q_lora_rank": draw(st.sampled_from([0, 12])),
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
        }
        return {"kind": kind, "heads": heads, "v_head_dim": 6} | ranks
    more = {"kv_heads": draw(st.sampled_from([1, 2, heads]))} if kind == "gqa" else {}
    return {"kind": kind, "heads": heads, "head_dim": 8, "bias": draw(st.booleans())} | more


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 32))
    model: dict[str, Any] = {
        "layers": layers,
        "hidden": 64,
        "attention": draw(attentions()),
        "dense_mlp": {"intermediate": 64, "gated": draw(st.booleans())},
        "vocab": draw(st.sampled_from([0, 0, 96, 101])),
        "tied_embeddings": draw(st.booleans()),
        "norm": draw(st.sampled_from(["none", "rms"])),
        "moe": {
            "experts": experts,
            "top_k": draw(st.integers(1, min(4, experts))),
            "intermediate": 32,
            "gated": draw(st.booleans()),
            "shared_experts": draw(st.sampled_from([0, 0, 1, 2])),
        },
        "dtypes": draw(st.sampled_from([{}, {"dispatch": "fp8"}, {"weights": "fp8", "combine": "fp8"}])),
    }
    kinds = draw(st.sampled_from(["all", "first dense", "every second", "listed", "dense"]))
    if kinds == "dense":
        model["moe"] = None
    elif kinds == "first dense":
        model["first_k_dense"] = draw(st.integers(0, layers - 1))
    elif kinds == "every second" and layers > 1:
        model["moe_stride"] = 2
    elif kinds == "listed":
        model["moe_layers"] = sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))
    return model


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Parts for `small_spec`; most are plans, some are refused."""
    groups = [{"nodes": draw(st.sampled_from([1, 2, 4])), "gpus_per_node": draw(st.sampled_from([2, 4, 8]))}]
    if draw(st.integers(0, 4)) == 0:
        groups.append({"nodes": draw(st.integers(1, 2)), "gpus_per_node": draw(st.sampled_from([2, 4]))})
    rule: Any = {
        "scope": draw(st.sampled_from(["layer", "layer", "model"])),
        "slots_per_gpu": draw(st.sampled_from([1, 1, 2])),
        "on_overflow": draw(st.sampled_from(["rounds", "rounds", "rounds", "error"])),
        "spares": draw(st.sampled_from(["idle", "replicate"])),
    }
    phase = draw(st.sampled_from(["decode", "decode", "prefill"]))
    model = draw(models())
    return {
        "model": model,
        "gpu": {"memory": draw(st.sampled_from(["1 GB", "1 GB", "1 MB", "100 kB"]))},
        "cluster": {"groups": groups, "links": LINKS | draw(st.sampled_from([{}, {"leaf": {"nodes": 2}}]))},
        "workload": {
            "phase": phase,
            "batch": draw(st.integers(1, 200)),
            "isl": draw(st.integers(1, 40)),
            "osl": draw(st.integers(0, 8)),
            "prefill_chunk": draw(st.sampled_from([0, 7, 16])),
            "micro_batches": draw(st.sampled_from([1, 1, 2, 3])),
        },
        "parallelism": draw(degrees(groups, model["layers"])),
        "expert_rule": draw(st.sampled_from([rule, rule, rule, "none"])),
        "placement": {"policy": draw(st.sampled_from(["linear", "round_robin"]))},
    }


@st.composite
def degrees(draw: st.DrawFn, groups: list[dict[str, int]], layers: int) -> dict[str, Any]:
    """Degrees that mostly suit the cluster; one in eight is drawn without regard to it."""
    gpus = sum(g["nodes"] * g["gpus_per_node"] for g in groups)
    wild = draw(st.integers(0, 7)) == 0

    def one_of(of: int, most: int) -> Any:
        fit = [d for d in (1, 2, 3, 4, 8, 16) if wild or (of % d == 0 and d <= most)]
        return draw(st.sampled_from(["auto", *fit]))

    pp = one_of(gpus, layers)
    left = gpus // (1 if pp == "auto" else pp)
    ep = one_of(left, left) if pp != "auto" or wild else "auto"
    domain = min(g["gpus_per_node"] for g in groups)
    inside = domain if ep == "auto" else int(np.gcd(ep, domain))
    gating = draw(st.sampled_from(["leader", "sharded"]))
    return {
        "dp": "auto" if ep != "auto" else one_of(left, 2),
        "pp": pp,
        "ep": ep,
        "tp": one_of(inside, inside),
        "expert_tp": draw(st.sampled_from(["auto", one_of(inside, 2), one_of(inside, 4)])),
        "gating": gating,
        "tp_comm": draw(st.sampled_from(["all_reduce", "reduce_scatter"])) if gating == "sharded" else "all_reduce",
    }


#: GPUs: with a fit, whose name and rates are the preset's; and without one. Memory is what is changed
FITTED = ("h100-sxm", "h200-sxm", "h800-sxm")


def gpus() -> st.SearchStrategy[Any]:
    plain = GPU | {"peak": GPU["peak"] | {"fp16": "300 TFLOPS"}}
    odd = plain | {"name": "odd", "mfu": 1.0, "memory_utilization": 1.0, "memory_bandwidth": "3 TB/s", "reserve": 0.01}
    fits = st.builds(lambda name, size: {"base": name, "memory": size}, st.sampled_from(FITTED), st.just("80 GB"))
    return st.one_of(st.just(plain), st.just(odd), fits, fits)


@st.composite
def links(draw: st.DrawFn) -> dict[str, Any]:
    """NVLink as fast as a preset's, or slower or faster, with and without latency; rails; leaves that are oversubscribed."""
    nvlink = {"bandwidth": draw(st.sampled_from(["450 GB/s", "200 GB/s", "900 GB/s", "1 GB/s"]))}
    nvlink |= draw(st.sampled_from([{}, {"latency": "2 us"}, {"utilization": 1.0}]))
    nic = {"bandwidth": draw(st.sampled_from(["50 GB/s", "25 GB/s", "400 GB/s"]))}
    nic |= draw(
        st.sampled_from([{}, {"latency": "5 us", "utilization": 1.0}, {"rails": 2}, {"rails": 1}, {"rails": 8}])
    )
    nic |= draw(st.sampled_from([{}, {}, {"routing": "shortest"}]))
    leaf = {"leaf": {"nodes": draw(st.integers(1, 3)), "oversubscription": draw(st.sampled_from([1.0, 4.0, 1000.0]))}}
    spine = draw(st.sampled_from([{}, {"spine": {"latency": "3 us"}}]))
    return {"nvlink": nvlink, "nic": nic} | draw(st.sampled_from([{}, leaf, leaf | spine]))


def executions() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "all_to_all": st.sampled_from(["auto", "low_latency", "normal"]),
            "compute_streams": st.integers(1, 3),
            "communication_streams": st.integers(1, 3),
            "expert_chunks": st.sampled_from([1, 2, 5, 64]),
            "tokens_per_step": st.sampled_from([1.0, 1.7, 64.0]),
            "step_overhead": st.sampled_from(["0 s", "100 us", "3 s"]),
            "serving": st.sampled_from(["apart", "together"]),
        },
    )


def traffics() -> st.SearchStrategy[dict[str, Any]]:
    """A generator, or what is to be recorded (`recorded`): loads of several steps, or tokens with and without sources."""
    generator = st.fixed_dictionaries(
        {
            "popularity": st.sampled_from(["uniform", "zipf", "lognormal", "power_law"]),
            "exponent": st.sampled_from([0.0, 1.0, 3.0, 10.0]),
            "topics": st.sampled_from([0, 0, 3]),
            "tokens": st.sampled_from([2, 64, 500]),
            "seed": st.integers(0, 3),
        }
    )
    kinds = st.sampled_from(["loads", "tokens", "tokens of sources"])
    recorded = st.fixed_dictionaries({"recorded": kinds, "seed": st.integers(0, 3)})
    return st.one_of(generator, recorded)


@st.composite
def predicted_specs(draw: st.DrawFn) -> dict[str, Any]:
    """Parts for `small_spec`, most of them plans, of everything that predictions depend on."""
    parts = draw(specs())
    model, cluster, moe = parts["model"], parts["cluster"], parts["model"]["moe"]
    wide = draw(st.booleans())
    if wide:  # sizes at which kernels take time
        model["hidden"] = 1024
    roles = "weights", "expert_weights", "kv_cache", "activations", "dispatch", "combine"
    dtypes = st.sampled_from(["bf16", "fp16", "fp8"])
    model["dtypes"] = draw(st.fixed_dictionaries({}, optional=dict.fromkeys(roles, dtypes)))
    if moe is not None:
        if draw(st.integers(0, 3)) == 0:
            moe["experts"] = draw(st.sampled_from([8, 16, 24, 64]))
            moe["groups"], moe["top_groups"] = draw(st.sampled_from([(4, 2), (8, 4), (2, 1)]))
            moe["top_k"] = draw(st.integers(1, min(8, moe["top_groups"] * moe["experts"] // moe["groups"])))
        else:
            moe["top_k"] = draw(st.integers(1, min(8, moe["experts"])))
        moe["intermediate"] = draw(st.sampled_from([32, 512])) if wide else 32
        if draw(st.integers(0, 2)) == 0:
            parts["traffic"] = draw(traffics())
            parts["placement"]["policy"] = draw(st.sampled_from(["auto", "linear", "topology"]))
    kinds = [draw(gpus())]
    for group in cluster["groups"]:
        if draw(st.integers(0, 3)) == 0:
            kinds.append(draw(gpus()))
        group["gpu"] = dict(kinds[-1])
        if draw(st.integers(0, 3)) == 0:
            group["nvlink_domain"] = draw(st.sampled_from([1, 2, 4, 8]))
    cluster["links"] = draw(links())
    sizes = draw(st.sampled_from([(1, 1), (200, 40), (5000, 1000), (64, 100_000), (1_000_000, 30), (10**8, 3)]))
    parts["workload"] |= {"batch": draw(st.integers(1, sizes[0])), "isl": draw(st.integers(1, sizes[1]))}
    parts["workload"]["osl"] = draw(st.sampled_from([0, 1, 8, sizes[1]]))
    parts["workload"]["micro_batches"] = draw(st.sampled_from([1, 1, 2, 3, 4]))
    if parts["workload"]["batch"] * parts["workload"]["isl"] > 10**6 or wide:  # memory that holds it
        for group in cluster["groups"]:
            group["gpu"]["memory"] = "100 TB"
    else:
        for group in cluster["groups"]:
            group["gpu"]["memory"] = draw(st.sampled_from(["1 GB", "1 GB", "100 GB", "1 MB"]))
    parts["execution"] = draw(executions())
    del parts["gpu"]
    return parts


def with_recording(parts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The parts with the traffic that is to be recorded in a file in ``folder``."""
    parts = json.loads(json.dumps(parts))
    asked = parts.get("traffic") or {}
    if "recorded" not in asked:
        return parts
    model, moe = parts["model"], parts["model"]["moe"]
    rng = np.random.default_rng(asked["seed"])
    file = folder / "recorded.npz"
    shape = model["layers"], moe["experts"]  # a row for every layer of the model: those of dense layers are left out
    if asked["recorded"] == "loads":
        np.savez(file, logical_count=rng.integers(0, 100, (3, *shape)) + (rng.random((3, *shape)) < 0.5))
    else:
        tokens = 50
        topk = rng.permuted(np.broadcast_to(np.arange(shape[1]), (tokens, *shape)), axis=2)[:, :, : moe["top_k"]]
        sources = {"source_rank": rng.integers(0, 4, tokens)} if asked["recorded"] == "tokens of sources" else {}
        np.savez(file, topk_ids=np.sort(topk, axis=2), **sources)
    return parts | {"traffic": {"file": str(file)}}
