"""Pools for prefill and decode: the best prefill plan is that of all, and how nodes are shared."""

from __future__ import annotations

import pytest
from small_specs import ROOT, small_spec

import planc
from planc.search.evaluate import Evaluator
from planc.search.explore import Goal
from planc.search.pools import best_prefill, prompt_tokens, splits
from planc.search.space import Shape, declared, shapes


def shipped(name: str, *sets: str) -> planc.Spec:
    return planc.load_spec(ROOT / "specs" / f"{name}.yaml", list(sets))


@pytest.mark.parametrize("ttft", [None, 0.2])
def test_the_best_prefill_is_that_of_all(ttft: float | None) -> None:
    spec = shipped("mixtral-8x7b")
    own = Evaluator(spec)
    closed = {"pp": (1,), "gating": ("sharded",), "tp": (1, 2), "tp_comm": ("all_reduce",)}
    found = best_prefill(own, Goal(ttft=ttft), closed, 8)
    axes = closed | {"expert_tp": (1,), "split": ("balanced",), "spares": ("idle",)}
    every, _ = shapes(spec, declared(spec, axes | {"micro_batches": (1, 2), "gpus": (8,)}))
    rates = []
    for shape in every:
        for tokens in prompt_tokens(spec).tolist():
            row = own.prefill(shape, tokens * shape.micro_batches).row if tokens % shape.tp == 0 else None
            if row is not None and (ttft is None or row["ttft_s"] <= ttft):
                rates.append(row["prompts_per_s"])
    assert found is not None and found[2].row is not None
    assert found[2].row["prompts_per_s"] == pytest.approx(max(rates), rel=1e-12)


def test_pools_share_whole_nodes() -> None:
    assert splits(small_spec(cluster={"groups": [{"nodes": 4, "gpus_per_node": 8}]})) == [(8, 24), (16, 16), (24, 8)]
    assert splits(shipped("mixtral-8x7b")) == [(4, 4)]
    assert len(splits(shipped("deepseek-v3-128gpu", "cluster=h100-sxm-128x8", "parallelism.ep=auto"))) == 15


def test_prefill_with_and_without_decode_are_kept_apart() -> None:
    """One evaluator for both: beside decode a prefill step has one micro-batch, in a pool those of its shape."""
    spec = shipped("mixtral-8x7b")
    shape, both = Shape(1, 1, 8, 1, micro_batches=2), Evaluator(spec)
    first = both.outcome(shape, 64, ttft=True), both.prefill(shape, 4096)
    assert first == (Evaluator(spec).outcome(shape, 64, ttft=True), Evaluator(spec).prefill(shape, 4096))
