"""Predictions: against compiling anew, against brute force, and rules on paper."""

from __future__ import annotations

import numpy as np
import pytest
from small_specs import ROOT, small_spec

import planc
from planc.cost.exchange import Exchanges
from planc.schedule import Slow, Sweep, estimate, known_traffic, timeline
from planc.schedule.sweep import largest_batches

MIXTRAL = ROOT / "specs" / "mixtral-8x7b.yaml"
SKEWED = {"popularity": "zipf", "exponent": 1.0, "tokens": 2000}


def compiled(name: str = "mixtral-8x7b", *sets: str) -> planc.VerifiedPlan:
    return planc.compile(planc.load_spec(ROOT / "specs" / f"{name}.yaml", list(sets)))


@pytest.mark.parametrize("batch", [8, 100, 512])
def test_a_sweep_says_what_compiling_anew_says(batch: int) -> None:
    point = Sweep(compiled()).at(batch=batch)
    found = estimate(compiled("mixtral-8x7b", f"workload.batch={batch}"))
    assert point.tpot == pytest.approx(found.tpot, rel=1e-12)
    assert point.tps == pytest.approx(found.tps, rel=1e-12)
    assert point.ttft == pytest.approx(found.ttft, rel=1e-12)
    assert (point.low, point.high) == pytest.approx(found.intervals["tpot_s"], rel=1e-12)


@pytest.mark.parametrize("tpot", [None, 20e-6, 10e-6, 5e-6])
def test_the_best_batch_is_that_of_every_batch(tpot: float | None) -> None:
    plan = planc.compile(small_spec(model={"hidden": 512}, workload={"isl": 2048}, gpu={"memory": "40 MB"}))
    sweep = Sweep(plan)
    best = sweep.best_batch(tpot, None)
    every = [sweep.at(batch=batch) for batch in range(1, best.limit + 1)]
    kept = [point for point in every if tpot is None or point.tpot <= tpot]
    most = max(kept, key=lambda p: (p.tps, -p.batch))
    assert best.point is not None
    assert (best.point.batch, best.point.tps) == (most.batch, pytest.approx(most.tps, rel=1e-12))
    assert best.simulated + best.pruned == best.steps == len(largest_batches(plan.spec, plan.parallelism, best.limit))
    assert best.limit == plan.limits["batch"] > 8
    assert tpot is None or len(kept) < len(every)


def test_bounds_that_no_batch_keeps_name_the_nearest() -> None:
    best = Sweep(compiled()).best_batch(4e-3, None)
    assert best.point is None and best.nearest is not None
    assert best.nearest.tpot > 4e-3 and best.simulated < best.steps


def test_ttft_bounds_count() -> None:
    sweep = Sweep(planc.compile(small_spec(workload={"isl": 2048}, gpu={"memory": "40 MB"})))
    assert sweep.best_batch(None, 1e-9).point is None
    assert sweep.best_batch(None, 10.0).point is not None


def test_floors_grow_with_the_batch_and_stay_below() -> None:
    """What the search for the best batch relies on."""
    for name in ("mixtral-8x7b", "moe-4l-64gpu", "deepseek-v3-128gpu"):
        sweep = Sweep(compiled(name))
        points = [sweep.at(batch=batch) for batch in (128, 256, 512, 768, 1024, 1536)]
        assert (np.diff([p.floor for p in points]) >= 0).all()
        assert all(p.floor <= p.low <= p.tpot <= p.high for p in points)


def test_prompts_of_others_take_their_turns() -> None:
    """64 sequences of 16 + 4 tokens on 8 GPUs. A prefill step serves 8 prompts, so that a prompt takes an eighth of it. In the
    W seconds of one's 4 tokens each of the 63 others brings W ÷ (W + TTFT) prompts."""
    apart = estimate(planc.compile(small_spec()))
    together = estimate(planc.compile(small_spec(execution={"serving": "together"})))
    assert apart.tpot is not None and together.tpot is not None and together.prefill is not None
    assert together.ttft is not None
    whole, prompt = 4 * together.tpot, together.prefill.period / 8
    assert whole == pytest.approx(4 * apart.tpot + 63 * prompt * whole / (whole + together.ttft))
    assert together.prefill_share == pytest.approx(together.tpot - apart.tpot) and apart.prefill_share == 0


def test_speculative_tokens_and_overhead() -> None:
    plain = estimate(planc.compile(small_spec()))
    made = estimate(planc.compile(small_spec(execution={"tokens_per_step": 2.0, "step_overhead": "1 ms"})))
    assert plain.tpot is not None and made.tpot is not None and made.tps is not None
    assert made.tpot == pytest.approx((plain.tpot + 1e-3) / 2)
    assert made.tps == pytest.approx(64 / made.tpot)


def test_long_prompts_are_prefilled_in_chunks() -> None:
    whole = estimate(planc.compile(small_spec(workload={"isl": 512})))
    parts = estimate(planc.compile(small_spec(workload={"isl": 512, "prefill_chunk": 100})))
    assert whole.prefill_steps == 1 and parts.prefill_steps == 6
    assert parts.ttft == pytest.approx(6 * parts.prefill.step if parts.prefill else None)


def test_a_prefill_plan_knows_its_decode_step() -> None:
    decode = estimate(planc.compile(small_spec()))
    prefill = estimate(planc.compile(small_spec(workload={"phase": "prefill"})))
    assert prefill.own is prefill.prefill and decode.own is decode.decode
    assert prefill.tpot == pytest.approx(decode.tpot)
    assert prefill.ttft == pytest.approx(decode.ttft)


def test_skewed_traffic_costs_time() -> None:
    """The fullest copy sets the pace, and the busiest link; tokens are as many."""
    even = planc.compile(small_spec(workload={"batch": 40_000}))
    plan = planc.compile(small_spec(workload={"batch": 40_000}, traffic=SKEWED, placement={"policy": "linear"}))
    traffic = known_traffic(plan, files=False)
    assert traffic is not None and traffic.tokens is not None
    exchange = Exchanges(plan, "low_latency", traffic).of(0)
    assert exchange.rows.sum() == pytest.approx(40_000 * 2)
    loads = traffic.tokens.loads()[0]
    assert exchange.rows == pytest.approx(loads / loads.sum() * 80_000)
    slow, quick = timeline(plan, traffic=traffic), timeline(even)
    assert slow.path_by_class["experts"] > 1.5 * quick.path_by_class["experts"]
    assert slow.path_by_class["dispatch"] > quick.path_by_class["dispatch"]
    assert slow.usage.idle.max() > quick.usage.idle.max()


def test_a_token_crosses_once_per_node_in_normal_mode() -> None:
    direct = compiled("deepseek-v3-128gpu", "execution.all_to_all=low_latency")
    shared = compiled("deepseek-v3-128gpu", "execution.all_to_all=normal")
    nodes, k = 16 * 4 // 8, 8  # a token keeps to 4 of 8 groups of experts, which are on half of the 16 nodes
    once = nodes * (1 - (1 - 1 / nodes) ** k) / k
    rows = [Exchanges(plan, mode).of(3) for plan, mode in ((direct, "low_latency"), (shared, "normal"))]  # type: ignore[arg-type]
    first = Exchanges(direct, "low_latency").topology.first["nic_up"]
    assert rows[1].links[0, first:].max() == pytest.approx(once * rows[0].links[0, first:].max(), rel=1e-5)


def test_a_gpu_unlike_its_preset_has_no_fit() -> None:
    plan = compiled()
    assert "fitted" in timeline(plan).provenance
    changed = compiled("mixtral-8x7b", "cluster.gpu={base: h100-sxm, memory_bandwidth: 2 TB/s}")
    assert set(timeline(changed).provenance) <= {"spec", "derived"}


def test_copies_take_over_from_a_slow_gpu() -> None:
    """12 experts' worth of slots for 8 experts: those on a GPU at a third of its speed keep a quarter beside one other copy."""
    parts = {"expert_rule": {"slots_per_gpu": 2, "spares": "replicate"}, "workload": {"batch": 40_000}}
    plan = planc.compile(small_spec(**parts))
    part = plan.placement.layers[0]
    assert (part.copies == 2).all()
    slow = Slow(gpus={3: 3.0})
    speed = np.array([1, 1, 1, 1 / 3, 1, 1, 1, 1])
    even, moved = Exchanges(plan, "low_latency").of(0), Exchanges(plan, "low_latency", speed=speed).of(0)
    assert moved.rows.sum() == pytest.approx(even.rows.sum())
    assert moved.rows[part.rank == 3] == pytest.approx(even.rows[part.rank == 3] / 2)  # a quarter instead of a half
    steps = [timeline(plan, slow=s, by_speed=b).step for s, b in ((None, False), (slow, False), (slow, True))]
    assert steps[0] < steps[2] < steps[1]


def test_copies_near_the_tokens_serve_them() -> None:
    """With two copies of every expert, each serves the half of the sources that is nearer in rank order."""
    plan = planc.compile(small_spec(expert_rule={"slots_per_gpu": 2, "spares": "replicate"}))
    part, pairs = plan.placement.layers[0], Exchanges(plan, "low_latency").of(0).pairs
    first = np.array([part.rank[part.expert == e].min() for e in range(8)])
    for expert in range(8):
        ranks = sorted(part.rank[part.expert == expert].tolist())
        assert first[expert] == ranks[0] < ranks[1]
    assert pairs.sum(axis=1) == pytest.approx(np.full(8, 16))  # 8 tokens × top-2 of every rank
    rows = Exchanges(plan, "low_latency").of(0).rows
    assert rows == pytest.approx(np.full(16, 8))  # 128 choices over 16 copies


@pytest.mark.parametrize("name", ["deepseek-v3-128gpu", "moe-61l-ep64-dp2", "moe-4l-64gpu"])
def test_steps_do_not_get_quicker_as_batches_grow(name: str) -> None:
    """What prunes the search for the best batch where no library changes its kernels."""
    plan = compiled(name)
    sweep = Sweep(plan)
    batches = largest_batches(plan.spec, plan.parallelism, plan.limits["batch"])
    tpots = [sweep.at(batch=batch).tpot for batch in batches[:: max(1, len(batches) // 12)]]
    assert (np.diff(tpots) >= -1e-12).all()


def test_links_unlike_the_measured_move_price_and_interval() -> None:
    """At a quarter of the bandwidth an all-reduce takes its fixed part and four times the rest; its interval goes along."""
    tp, slower = (
        "parallelism={dp: 1, ep: 8, tp: 8}",
        "cluster={base: h100-sxm-1x8, links: {nvlink: {bandwidth: 112.5 GB/s}}}",
    )
    found = []
    for plan in (compiled("mixtral-8x7b", tp), compiled("mixtral-8x7b", tp, slower)):
        number = next(n for n, b in enumerate(plan.blocks.blocks) if b.kind == "all_reduce")
        found.append(timeline(plan).prices.blocks[number])
    preset, slow = found
    assert slow.provenance == ("derived",)
    assert slow.seconds[0] == pytest.approx(preset.fixed[0] + 4 * (preset.seconds[0] - preset.fixed[0]))
    assert slow.high[0] / slow.seconds[0] == pytest.approx(preset.high[0] / preset.seconds[0])
    low = preset.low[0] / preset.seconds[0] * slow.seconds[0]
    assert slow.low[0] == pytest.approx(max(low, slow.floor[0]))


@pytest.mark.parametrize(("tpot", "isl", "osl"), [(None, 1024, 4), (20e-6, 2048, 4), (None, 2048, 64)])
def test_where_prompts_take_turns_the_best_batch_is_that_of_every_batch(tpot: float | None, isl: int, osl: int) -> None:
    """More sequences bring more prompts: of batches with one step the largest need not be best, and where no prefill step
    fits any more nobody is served."""
    parts = {"model": {"hidden": 512}, "gpu": {"memory": "40 MB"}, "execution": {"serving": "together"}}
    sweep = Sweep(planc.compile(small_spec(workload={"isl": isl, "osl": osl}, **parts)))
    best = sweep.best_batch(tpot, None)
    every = [sweep.at(batch=batch) for batch in range(1, best.limit + 1)]
    kept = [point for point in every if point.fits and (tpot is None or point.tpot <= tpot)]
    most = max(kept, key=lambda p: (p.tps, -p.batch))
    assert best.point is not None and best.point.ttft is not None
    assert (best.point.batch, best.point.tps) == (most.batch, pytest.approx(most.tps, rel=1e-12))
    assert most.batch not in largest_batches(sweep.plan.spec, sweep.plan.parallelism, best.limit) or isl == 2048
    if isl == 2048:
        assert any(point.ttft is None and not point.fits for point in every)
