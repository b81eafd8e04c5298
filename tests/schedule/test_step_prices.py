"""Prices of the ops of a step, on paper: rounds, expert TP, context, latencies and mixed GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_specs import GPU, ROOT, small_spec

import planc
from planc.cost.book import PriceBook
from planc.cost.exchange import Exchanges
from planc.cost.step import StepPrices, sms_of_exchanges
from planc.schedule import Timeline, estimate, known_traffic, timeline

BANDWIDTH = 0.5e12  # of a GPU of 1 TB/s at 50 %
EXACT = {"memory_utilization": 0.5, "mfu": 1.0}


def priced(kind: str, line: Timeline, slot: int = 0) -> np.ndarray:
    blocks = line.plan.blocks.blocks
    return next(p.seconds for b, p in zip(blocks, line.prices.blocks, strict=True) if (b.kind, b.slot) == (kind, slot))


def test_turns_of_a_rank_add_up_to_its_grouped_gemm() -> None:
    """Two experts a rank, one after the other: 64 sequences in 2 replicas of 4 ranks, top-2, are 8 rows an expert."""
    line = timeline(planc.compile(small_spec(parallelism={"dp": 2, "ep": 4}, gpu=EXACT)))
    weights, rows = 2 * 2 * 64 * 32, 2 * 2 * 8 * 64
    for slot in (0, 1):
        assert priced("expert", line, slot) == pytest.approx(np.full(8, (weights + rows) / BANDWIDTH))


def test_both_shards_of_an_expert_get_its_rows() -> None:
    moe = {"experts": 4, "top_k": 2, "intermediate": 256}
    plan = planc.compile(small_spec(parallelism={"dp": 1, "ep": 8, "expert_tp": 2}, model={"moe": moe}))
    exchange = Exchanges(plan, "low_latency").of(0)
    assert exchange.rows.sum() == pytest.approx(64 * 2)
    assert exchange.pairs.sum() == pytest.approx(64 * 2 * 2)


def test_half_of_the_output_is_in_the_cache() -> None:
    """8 sequences a GPU, 8 heads of 8: K and V of 16 + 4 ÷ 2 tokens, queries and outputs."""
    line = timeline(planc.compile(small_spec(gpu=EXACT)))
    size = 2 * 2 * 8 * 64 * 18 + 2 * 2 * 8 * 64
    assert priced("attn_core", line) == pytest.approx(np.full(8, size / BANDWIDTH))


def test_a_way_over_leaf_and_spine_takes_their_latency() -> None:
    links = {
        "nvlink": {"bandwidth": "400 GB/s"},
        "nic": {"bandwidth": "50 GB/s", "utilization": 1.0, "latency": "5 us"},
        "leaf": {"nodes": 2, "latency": "2 us"},
        "spine": {"latency": "1 us"},
    }
    found = {}
    for nodes in (2, 4):  # two stages on two nodes of one leaf, or on two leaves
        cluster = {"links": links, "groups": [{"nodes": nodes, "gpus_per_node": 4}]}
        plan = planc.compile(small_spec(cluster=cluster, parallelism={"dp": 1, "pp": 2}))
        line = timeline(plan)
        size = next(b for b in plan.blocks.blocks if b.kind == "pp_send").writes["x"].row_bytes
        found[nodes] = priced("pp_send", line)[0] - size / 50e9
    assert found[2] == pytest.approx(7e-6) and found[4] == pytest.approx(8e-6)


def test_a_collective_of_mixed_gpus_is_priced_for_the_slowest() -> None:
    """Of a fitted GPU and one without a fit the one without decides: nothing is known of how it sends."""
    groups = [{"nodes": 1, "gpus_per_node": 4, "gpu": "h100-sxm"}, {"nodes": 1, "gpus_per_node": 4, "gpu": GPU}]
    plan = planc.compile(small_spec(cluster={"groups": groups}, parallelism={"dp": 1, "ep": 8}))
    words = {b.kind: p.provenance for b, p in zip(plan.blocks.blocks, timeline(plan).prices.blocks, strict=True)}
    assert words["dispatch"] == ("spec",)


def test_recorded_loads_weigh_the_experts(tmp_path: Path) -> None:
    """Of loads without tokens every source sends its share: top-k choices a token, in proportion."""
    loads = [4, 2, 1, 1, 0, 0, 0, 0]
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": [loads, loads]}))
    spec = small_spec(traffic={"file": str(tmp_path / "loads.json")}, placement={"policy": "linear"})
    plan = planc.compile(spec)
    exchange = Exchanges(plan, "low_latency", known_traffic(plan, files=True)).of(0)
    part = plan.placement.layers[0]
    by_expert = np.bincount(part.expert, weights=exchange.rows)
    assert by_expert == pytest.approx(128 * np.array(loads) / 8)


def test_ttft_and_its_bounds_are_those_of_all_chunks() -> None:
    found = estimate(planc.compile(small_spec(workload={"isl": 512, "prefill_chunk": 100})))
    assert found.prefill is not None and found.ttft is not None
    assert found.floors["ttft_s"] == pytest.approx(6 * found.prefill.floor)
    assert found.intervals["ttft_s"] == pytest.approx([6 * bound for bound in found.prefill.interval])


def test_deviations_of_families_are_independent() -> None:
    """Those of one family add up along the critical path, those of several as squares do."""
    line = timeline(planc.compile(small_spec(workload={"batch": 4096})))
    more: dict[str, float] = {}
    for stretch in line.critical_path:
        price = line.prices.blocks[stretch.block]
        more[price.family] = more.get(price.family, 0.0) + float(price.high[stretch.op] - price.seconds[stretch.op])
    assert len([v for v in more.values() if v]) > 3
    assert line.interval[1] - line.step == pytest.approx(float(np.sqrt(sum(v * v for v in more.values()))))


TRAFFIC = {"traffic": {"popularity": "uniform", "tokens": 500}, "placement": {"policy": "linear"}}


def test_known_tokens_go_to_the_copy_of_their_source() -> None:
    """Two copies of every expert: the first four sources send to one, the others to the other. The busiest of 8
    sources has more than an eighth of the 500 tokens, which stand for 64."""
    plan = planc.compile(small_spec(expert_rule={"slots_per_gpu": 2, "spares": "replicate"}, **TRAFFIC))
    traffic = known_traffic(plan, files=False)
    assert traffic is not None and traffic.tokens is not None
    exchange = Exchanges(plan, "low_latency", traffic).of(0)
    part = plan.placement.layers[0]
    for expert in range(8):
        first, second = np.flatnonzero(part.expert == expert).tolist()
        assert exchange.rows[first] > 0 and exchange.rows[second] > 0
    assert exchange.pairs.sum() == pytest.approx(128)
    assert exchange.sent == pytest.approx(np.bincount(traffic.tokens.on_sources(8)).max() * 64 / 500)
    assert exchange.sent > 8


def test_known_tokens_cross_once_per_node_in_normal_mode() -> None:
    plan = planc.compile(small_spec(model={"moe": {"experts": 8, "top_k": 4, "intermediate": 32}}, **TRAFFIC))
    traffic = known_traffic(plan, files=False)
    direct, shared = (Exchanges(plan, mode, traffic).of(0) for mode in ("low_latency", "normal"))  # type: ignore[arg-type]
    nic = Exchanges(plan, "normal").topology.first["nic_up"]
    assert shared.links[:, nic:].sum() < 0.6 * direct.links[:, nic:].sum()


def test_experts_on_one_gpu_share_a_copy_in_normal_mode() -> None:
    """4 of 16 choices that fall on 4 GPUs of one node evenly reach 4(1 − (3 ÷ 4)^4) of them."""
    plan = planc.compile(
        small_spec(
            cluster={"groups": [{"nodes": 1, "gpus_per_node": 4}]},
            model={"moe": {"experts": 16, "top_k": 4, "intermediate": 32}},
        )
    )
    direct, shared = (Exchanges(plan, mode).of(0).links for mode in ("low_latency", "normal"))  # type: ignore[arg-type]
    assert shared == pytest.approx(direct * (1 - 0.75**4), rel=1e-5)


def test_a_prompt_takes_its_share_of_the_prefill_steps() -> None:
    """8 TP groups prefill 8 chunks of 100 tokens at once, so that 512 tokens take 512 ÷ 800 of a step."""
    parts = {"workload": {"isl": 512, "prefill_chunk": 100}, "execution": {"serving": "together"}}
    found = estimate(planc.compile(small_spec(**parts)))
    assert found.prefill is not None and found.prompt_share == pytest.approx(512 / 800 * found.prefill.period)


@pytest.mark.parametrize(("isl", "steps"), [(300, 1), (16384, 1), (20_000, 2)])
def test_a_prefill_step_takes_at_most_16384_tokens(isl: int, steps: int) -> None:
    found = estimate(planc.compile(small_spec(workload={"isl": isl}, gpu={"memory": "20 GB"})))
    assert found.prefill_steps == steps


def test_normal_mode_takes_sms_from_overlapped_computation() -> None:
    """20 of 132: what is bound by compute takes 132 ÷ 112 as long, what is bound by memory as long as before."""
    sets = ["workload.phase=prefill", "workload.micro_batches=2", "workload.prefill_chunk=16384"]
    spec = planc.load_spec(ROOT / "specs" / "mixtral-8x7b.yaml", sets)
    plan = planc.compile(spec)
    quiet = planc.compile(
        planc.load_spec(ROOT / "specs" / "mixtral-8x7b.yaml", [*sets, "execution.all_to_all=low_latency"])
    )
    ours, all_sms = (StepPrices(p, PriceBook(), None) for p in (plan, quiet))
    for block, price, other in zip(plan.blocks.blocks, ours.blocks, all_sms.blocks, strict=True):
        ratio = float(price.seconds.max() / other.seconds.max()) if other.seconds.max() else 1.0
        if block.kind in ("attn_qkv", "attn_core", "expert"):
            assert 1.1 < ratio < 1.25 and price.provenance[0] in ("derived", "extrapolated")
        if block.kind in ("residual_add", "aggregate"):
            assert ratio == pytest.approx(1.0)
    assert ours.blocks[0].floor.sum() == all_sms.blocks[0].floor.sum()  # floors know all SMs
    assert sms_of_exchanges(planc.load_spec("mixtral-8x7b", sets[:1])) == 0  # nothing runs beside it
