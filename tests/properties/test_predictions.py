"""Any plan is predicted, and the prediction keeps the rules that hold for every step.

A few dozen specs in a usual run; PLANC_EXAMPLES=2000 draws so many for each test, others every time (`make nightly`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_specs import predicted_specs, with_recording
from small_specs import small_spec

import planc
from planc.placement import step_tokens
from planc.routing import Traffic
from planc.schedule import Estimate, Slow, Sweep, Timeline, estimate, known_traffic, timeline
from planc.schedule.sweep import largest_batches
from planc.schedule.workload import changed
from planc.verify import load_plan, plan_json

ASKED = int(os.environ.get("PLANC_EXAMPLES", "0"))
RUN = settings(max_examples=ASKED or 20, deadline=None, derandomize=not ASKED, suppress_health_check=list(HealthCheck))
CALM = settings(RUN, max_examples=ASKED or 10)
FEW = settings(RUN, max_examples=max(3, ASKED // 10))  # every batch of a plan takes a while
NEAR = 1e-9
Folder = Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Where traffic is recorded."""
    return tmp_path_factory.mktemp("recorded")


def planned(parts: dict[str, Any], folder: Folder) -> tuple[planc.VerifiedPlan, Traffic | None]:
    """The plan and its traffic; a spec that is refused is not looked at."""
    try:
        plan = planc.compile(small_spec(**with_recording(parts, folder)))
    except planc.PlancError:
        assume(False)
        raise
    return plan, known_traffic(plan, files=True)


@RUN
@given(parts=predicted_specs())
def test_a_plan_is_predicted_by_the_rules(folder: Folder, parts: dict[str, Any]) -> None:
    plan, traffic = planned(parts, folder)
    found = estimate(plan, traffic=traffic)
    for line in (found.decode, found.prefill):
        if line is not None:
            prices_are_in_order(line)
            bounds_hold_the_step(line)
            every_stream_is_busy_or_idle(line)
            the_critical_path_is_the_step(line)
            rows_are_tokens_times_top_k(line)
            bytes_on_links_are_those_of_transfers(line)
            layers_filled_in_are_as_simulated(line, traffic)
    what_follows_is_finite_and_in_order(found)


def prices_are_in_order(line: Timeline) -> None:
    for block, price in zip(line.plan.blocks.blocks, line.prices.blocks, strict=True):
        times = [price.floor, price.low, price.seconds, price.high]
        assert all(np.isfinite(t).all() and (t >= 0).all() for t in (*times, price.fixed)), block.name
        for less, more in itertools.pairwise(times):
            assert (less <= more * (1 + NEAR)).all(), (block.name, times)
        assert (price.fixed <= price.seconds * (1 + NEAR)).all(), block.name


def bounds_hold_the_step(line: Timeline) -> None:
    low, high = line.interval
    assert 0 < line.floor <= line.step * (1 + NEAR)
    assert line.floor <= low * (1 + NEAR) and low <= line.step * (1 + NEAR) and line.step <= high * (1 + NEAR)
    assert 0 < line.period_floor <= line.period * (1 + NEAR) and line.period <= line.step * (1 + NEAR)
    assert math.isfinite(high)


def every_stream_is_busy_or_idle(line: Timeline) -> None:
    usage, step = line.usage, line.step
    assert usage.compute + usage.exposed + usage.idle == pytest.approx(step, rel=NEAR)
    assert usage.exposed + usage.overlapped == pytest.approx(usage.communication, rel=NEAR, abs=NEAR * step)
    assert (usage.fixed <= usage.compute * (1 + NEAR)).all()
    assert max(line.stream_busy().values()) <= step * (1 + NEAR)
    rank, far, lane, _, start, end = line.intervals
    same = (rank[1:] == rank[:-1]) & (far[1:] == far[:-1]) & (lane[1:] == lane[:-1])
    assert (start[1:] - end[:-1])[same].min(initial=0.0) >= -NEAR * step  # ops on one stream do not overlap
    assert sum(line.split.values()) == pytest.approx(1, rel=NEAR)
    assert all(-NEAR <= share <= 1 + NEAR for share in (*line.split.values(), line.overlap_efficiency))
    assert sum(line.provenance.values()) == pytest.approx(1)


def the_critical_path_is_the_step(line: Timeline) -> None:
    path, near, blocks = line.critical_path, NEAR * 10 * line.step, line.plan.blocks.blocks
    assert path[0].cause == "start" and path[0].start <= near
    assert path[-1].end == pytest.approx(line.step, rel=NEAR)
    chunks = line.plan.spec.execution.expert_chunks
    for before, after in itertools.pairwise(path):
        if chunks > 1 and blocks[after.block].kind == "expert":  # may start on a part of its tokens
            assert after.start <= before.end + near
        else:
            assert after.start == pytest.approx(before.end, abs=near)
    assert sum(line.path_by_class.values()) == pytest.approx(line.step, rel=1e-8)


def rows_are_tokens_times_top_k(line: Timeline) -> None:
    plan, moe = line.plan, line.plan.spec.model.moe
    if moe is None:
        return
    exchanges, par = line.prices.exchanges, plan.parallelism
    tokens = step_tokens(plan.spec, par).source * len(exchanges.gating)
    for layer in plan.spec.model.moe_layer_ids:
        exchange = exchanges.of(layer)
        assert exchange.rows.sum() == pytest.approx(tokens * moe.top_k)
        assert exchange.pairs.sum() == pytest.approx(tokens * moe.top_k * par.expert_tp)


def bytes_on_links_are_those_of_transfers(line: Timeline) -> None:
    """Every byte that leaves a node by a NIC enters another by one; dispatch sends what the exchange says, combine as much
    back."""
    total, kinds = np.zeros(len(line.prices.rate)), line.prices.topology.kind_of_link
    for block, price in zip(line.plan.blocks.blocks, line.prices.blocks, strict=True):
        if not len(price.links):
            continue
        assert (price.bytes > 0).all() and (price.op < len(block)).all()
        here = np.bincount(price.links, weights=price.bytes, minlength=len(total))
        total += here
        assert here[kinds == 2].sum() == pytest.approx(here[kinds == 3].sum(), rel=1e-6), block.name
        if block.kind == "dispatch" and block.layer is not None:
            width = here.sum() / line.prices.exchanges.of(block.layer).links.sum()
            assert here == pytest.approx(line.prices.exchanges.of(block.layer).links.sum(axis=0) * width, rel=1e-6)
    assert line.link_bytes == pytest.approx(total)


def layers_filled_in_are_as_simulated(line: Timeline, traffic: Traffic | None) -> None:
    whole = timeline(line.plan, traffic=traffic, whole=True, wiring=line.wiring, order=line.order)
    assert whole.step == pytest.approx(line.step, rel=NEAR)
    assert whole.period == pytest.approx(line.period, rel=NEAR)
    assert whole.start == pytest.approx(line.start, rel=NEAR, abs=NEAR * line.step)
    assert whole.end == pytest.approx(line.end, rel=NEAR, abs=NEAR * line.step)


def what_follows_is_finite_and_in_order(found: Estimate) -> None:
    work = found.plan.spec.workload
    values = {"tpot_s": found.tpot, "ttft_s": found.ttft, "tps": found.tps, "tps_per_gpu": found.tps_per_gpu}
    for key, value in values.items():
        assert (value is None) == (key not in found.intervals)
        if value is not None:
            low, high = found.intervals[key]
            assert 0 < low <= value * (1 + NEAR) and value <= high * (1 + NEAR) and math.isfinite(high), key
            assert found.floors.get(key, 0.0) <= value * (1 + NEAR), key
            assert key in {"tps", "tps_per_gpu"} or found.floors[key] <= low * (1 + NEAR), key
    assert (found.tpot is None) == ("tpot_s" in found.missing) and (found.ttft is None) == ("ttft_s" in found.missing)
    if found.tps is not None and found.tpot is not None:
        assert found.tps * found.tpot == pytest.approx(work.batch, rel=NEAR)  # Little's law
    assert found.prefill_share >= 0
    assert found.concurrency >= work.batch


@CALM
@given(parts=predicted_specs())
def test_a_written_plan_is_predicted_alike(folder: Folder, parts: dict[str, Any]) -> None:
    plan, traffic = planned(parts, folder)
    file = folder / "plan.json"
    file.write_text(plan_json(plan), encoding="utf-8")
    loaded = load_plan(file)
    one = estimate(plan, traffic=traffic)
    other = estimate(loaded, traffic=known_traffic(loaded, files=True))
    assert (one.tpot, one.ttft, one.tps, one.floors) == (other.tpot, other.ttft, other.tps, other.floors)
    assert (one.intervals, one.missing, one.concurrency) == (other.intervals, other.missing, other.concurrency)
    assert (one.own.start == other.own.start).all() and (one.own.end == other.own.end).all()


@FEW
@given(
    parts=predicted_specs(),
    batch=st.integers(1, 60),
    tpot=st.sampled_from([None, 0.9, 1.0, 2.0]),
    ttft=st.sampled_from([None, 0.9, 1.5]),
)
def test_the_best_batch_is_that_of_every_batch(
    folder: Folder, parts: dict[str, Any], batch: int, tpot: float | None, ttft: float | None
) -> None:
    """On memory that holds few more than ``batch`` sequences; ``tpot`` and ``ttft``: bounds as parts of the plan's own."""
    # known gap: where prompts take turns TPOT grows within the batches of one step, of which only the largest is looked at
    assume(tpot is None or parts["execution"].get("serving") != "together")
    work = parts["workload"]
    work |= {"batch": batch, "isl": min(work["isl"], 2000), "prefill_chunk": work["prefill_chunk"] or 16}
    sized(parts, "100 TB")
    memory = planned(parts, folder)[0].memory
    sized(parts, f"{1.0001 * float((memory.used - memory.reserve).max()) / 0.9 + 1000:.0f} B")
    plan, traffic = planned(parts, folder)
    assume(len(plan.blocks.blocks) <= 100)  # time for every batch
    sweep = Sweep(plan, traffic)
    own = sweep.at()
    bounds = None if tpot is None else tpot * own.tpot, None if ttft is None or own.ttft is None else ttft * own.ttft
    best = sweep.best_batch(*bounds)
    limit = best.limit
    assume(limit <= 64)
    assert plan.spec.workload.phase == "prefill" or limit == plan.limits["batch"]
    every = [sweep.at(batch=batch) for batch in range(1, limit + 1)]
    kept = [point for point in every if point.within(*bounds)]
    assert (best.point is None) == (not kept)
    spec = changed(plan.spec, phase="decode")
    assert best.simulated + best.pruned == best.steps == len(largest_batches(spec, plan.parallelism, limit))
    if kept:
        assert best.point is not None
        assert best.point.tps == pytest.approx(max(point.tps for point in kept), rel=NEAR)


def sized(parts: dict[str, Any], memory: str) -> None:
    """Every GPU with so much memory."""
    for group in parts["cluster"]["groups"]:
        group["gpu"] |= {"memory": memory, "reserve": 0.1}


def faster(parts: dict[str, Any]) -> dict[str, Any]:
    """All bandwidths and peaks doubled."""

    def double(text: str) -> str:
        number, unit = text.split()
        return f"{2 * float(number)} {unit}"

    parts = json.loads(json.dumps(parts))
    for group in parts["cluster"]["groups"]:
        gpu = group["gpu"]
        gpu["peak"] = {key: double(value) for key, value in gpu["peak"].items()}
        gpu["memory_bandwidth"] = double(gpu["memory_bandwidth"])
    for link in ("nvlink", "nic"):
        parts["cluster"]["links"][link]["bandwidth"] = double(parts["cluster"]["links"][link]["bandwidth"])
    return parts


@CALM
@given(parts=predicted_specs())
def test_faster_machines_are_not_slower(folder: Folder, parts: dict[str, Any]) -> None:
    assume(all("base" not in group["gpu"] for group in parts["cluster"]["groups"]))  # a fit knows its own GPU
    parts["parallelism"] = {k: 1 if v == "auto" and k == "pp" else v for k, v in parts["parallelism"].items()}
    plan, traffic = planned(parts, folder)
    quick, _ = planned(faster(parts), folder)
    assume(quick.parallelism == plan.parallelism)
    before = timeline(plan, traffic=traffic)
    assert timeline(quick, traffic=traffic, order=before.order).step <= before.step * (1 + NEAR)


@CALM
@given(parts=predicted_specs(), factor=st.sampled_from([1.0, 1.01, 3.0, 1000.0]), data=st.data())
def test_what_is_slow_never_shortens_the_step(
    folder: Folder, parts: dict[str, Any], factor: float, data: st.DataObject
) -> None:
    plan, traffic = planned(parts, folder)
    line = timeline(plan, traffic=traffic)
    gpus = data.draw(st.sets(st.integers(0, plan.blocks.world_size - 1), max_size=3))
    links = data.draw(st.sets(st.integers(0, len(line.prices.rate) - 1), max_size=3))
    slow = Slow(dict.fromkeys(gpus, factor), dict.fromkeys(links, factor))
    found = timeline(plan, traffic=traffic, slow=slow)
    assert found.step >= line.step * (1 - NEAR)
    assert (found.end >= line.end * (1 - NEAR)).all()
    if factor == 1.0:
        assert found.step == pytest.approx(line.step, rel=NEAR)
    every_stream_is_busy_or_idle(found)
    the_critical_path_is_the_step(found)
    timeline(plan, traffic=traffic, slow=slow, by_speed=True)


@CALM
@given(parts=predicted_specs(), gpu=st.integers(0, 63))
def test_it_does_not_matter_which_replica_is_slow(folder: Folder, parts: dict[str, Any], gpu: int) -> None:
    """Whole replicas on whole nodes of one kind, without leaves: a slow GPU costs as much in one as in another."""
    del parts["cluster"]["groups"][1:]
    parts["cluster"]["links"].pop("leaf", None)
    parts["parallelism"] |= {"dp": 2, "ep": "auto", "pp": "auto", "tp": "auto"}
    plan, traffic = planned(parts, folder)
    par, [group] = plan.parallelism, plan.spec.cluster.groups
    assume(par.dp == 2 and par.replica_size % max(group.gpus_per_node, group.nvlink_domain) == 0)
    gpu %= par.replica_size
    steps = [timeline(plan, traffic=traffic, slow=Slow({gpu + r * par.replica_size: 2.0})).step for r in range(2)]
    assert steps[0] == pytest.approx(steps[1], rel=NEAR)
