"""The simulated step: against a second simulation, against itself without short cuts, and on paper."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from queues import event_times
from small_specs import GPU, ROOT, small_spec

import planc
from planc.schedule import Slow, Timeline, known_traffic, timeline
from planc.schedule.order import _order
from planc.schedule.simulate import occupied

VOCAB = {"model": {"vocab": 512, "layers": 6}}
CASES = {
    "one replica": {},
    "two micro-batches": {"workload": {"micro_batches": 2}},
    "two stages": {"parallelism": {"dp": 1, "pp": 2}, "model": {"layers": 4}},
    "two stages, three micro-batches": {
        "parallelism": {"dp": 1, "pp": 2},
        "model": {"layers": 4},
        "workload": {"micro_batches": 3},
    },
    "tp with leaders": {"parallelism": {"dp": 1, "ep": 8, "tp": 4, "gating": "leader"}},
    "tp, sharded gates": {"parallelism": {"dp": 1, "ep": 8, "tp": 4, "tp_comm": "reduce_scatter"}},
    "two replicas with rounds": {"parallelism": {"dp": 2, "ep": 4}},
    "a vocabulary": VOCAB,
    "expert TP": {
        "parallelism": {"dp": 1, "ep": 8, "expert_tp": 2},
        "model": {"moe": {"experts": 4, "top_k": 2, "intermediate": 32}},
    },
}


def line_of(whole: bool = True, slow: Slow | None = None, **parts: object) -> tuple[planc.VerifiedPlan, Timeline]:
    plan = planc.compile(small_spec(**parts))
    return plan, timeline(plan, whole=whole, slow=slow)


@pytest.mark.parametrize("name", CASES)
def test_a_queue_of_events_gives_the_same_times(name: str) -> None:
    plan, line = line_of(**CASES[name])
    start, end = event_times(plan, line)
    assert np.allclose(line.start, start, rtol=1e-12, atol=1e-15)
    assert np.allclose(line.end, end, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("spec", "sets", "skips"),
    [
        ("moe-61l-ep64-dp2", [], True),
        ("deepseek-v3-128gpu", [], True),
        ("deepseek-v3-128gpu", ["workload.micro_batches=2"], True),
        ("moe-61l-ep64-dp2", ["parallelism.dp=1", "parallelism.pp=2"], True),
        ("moe-61l-ep64-dp2", ["parallelism.dp=1", "parallelism.pp=2", "workload.micro_batches=4"], False),
        ("qwen3-235b-a22b", [], True),
        ("moe-4l-64gpu", [], False),
    ],
)
def test_layers_alike_are_filled_in_as_simulation_would(spec: str, sets: list[str], skips: bool) -> None:
    plan = planc.compile(planc.load_spec(ROOT / "specs" / f"{spec}.yaml", sets))
    whole, quick = timeline(plan, whole=True), timeline(plan)
    assert np.allclose(whole.start, quick.start, rtol=1e-9, atol=1e-9 * whole.step)
    assert np.allclose(whole.end, quick.end, rtol=1e-9, atol=1e-9 * whole.step)
    assert quick.period == pytest.approx(whole.period, rel=1e-9)
    assert whole.run.simulated == len(plan.blocks.blocks)
    assert (quick.run.simulated < len(plan.blocks.blocks) / 2) == skips


@pytest.mark.parametrize("name", CASES)
def test_time_is_conserved_on_every_stream(name: str) -> None:
    plan, line = line_of(whole=False, **CASES[name])
    rank, far, lane, _, start, end = line.intervals
    same = (rank[1:] == rank[:-1]) & (far[1:] == far[:-1]) & (lane[1:] == lane[:-1])
    assert (start[1:][same] >= end[:-1][same] - 1e-15).all()  # no stream does two things at a time
    gaps = np.where(same, start[1:] - end[:-1], 0.0)
    for (r, kind, n), busy in line.stream_busy().items():
        own = (rank == r) & (far == (kind == "communication")) & (lane == n)
        idle = line.step
        if own.any():
            inside = own[1:] & own[:-1]
            idle = start[own][0] + gaps[inside].sum() + line.step - end[own][-1]
        assert busy + idle == pytest.approx(line.step, rel=1e-9)
    usage = line.usage
    assert np.allclose(usage.compute + usage.exposed + usage.idle, line.step)
    assert np.allclose(usage.exposed + usage.overlapped, usage.communication)
    assert sum(line.split.values()) == pytest.approx(1.0)
    assert len(usage.idle) == plan.blocks.world_size and usage.idle.min() >= -1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_critical_path_is_the_step(name: str) -> None:
    plan, line = line_of(whole=False, **CASES[name])
    path = line.critical_path
    assert path[0].start == 0.0 and path[-1].end == pytest.approx(line.step)
    for before, now in itertools.pairwise(path):
        assert now.start == pytest.approx(before.end, rel=1e-9) and now.cause in ("data", "stream")
    assert sum(line.path_by_class.values()) == pytest.approx(line.step)
    edges = set(zip(plan.expanded.source.tolist(), plan.expanded.target.tolist(), strict=True))
    numbers = [int(plan.blocks.first_op[s.block]) + s.op for s in path]
    for stretch, pair in zip(path[1:], itertools.pairwise(numbers), strict=True):
        if stretch.cause == "data":
            assert pair in edges
        else:
            a, b = (
                set(plan.blocks.blocks[s.block].ranks[s.op].tolist()) for s in (path[path.index(stretch) - 1], stretch)
            )
            assert a & b
    assert line.floor <= line.interval[0] <= line.step <= line.interval[1]


def crossing(plan: planc.VerifiedPlan, line: Timeline, other: np.ndarray) -> float:
    """Bytes that all collectives move between ranks for which ``other`` [world, world] holds. Dispatch and combine are drawn
    evenly; the rest is the graph's own byte matrix, of which a TP group takes one copy of the input."""
    moved = 0.0
    for number, block in enumerate(plan.blocks.blocks):
        for op, ranks in enumerate(block.ranks if block.collective else []):
            if block.kind in ("dispatch", "combine"):
                assert block.layer is not None
                pairs = line.prices.exchanges.of(block.layer).pairs
                if block.kind == "combine":  # the first shard of an expert answers for all
                    pairs = pairs * (np.arange(len(pairs)) % plan.parallelism.expert_tp == 0)
                matrix = (
                    pairs * block.writes["tokens"].row_bytes
                    if block.kind == "dispatch"
                    else pairs.T * block.reads["y"].row_bytes
                )
            else:
                matrix = plan.byte_matrix(number, op) // (plan.parallelism.tp if block.kind == "input_split" else 1)
            moved += float((matrix * other[ranks][:, ranks]).sum())
    return moved


TOKENS = {"popularity": "zipf", "exponent": 1.0, "tokens": 500}


@pytest.mark.parametrize(
    ("tp", "expert_tp", "traffic"), [(1, 1, None), (2, 1, None), (1, 2, None), (2, 4, None), (1, 2, TOKENS)]
)
def test_bytes_on_links_are_those_of_the_ops(tp: int, expert_tp: int, traffic: dict[str, object] | None) -> None:
    """In one node every byte takes one NVLink up and one down."""
    plan = planc.compile(
        small_spec(
            cluster={"groups": [{"nodes": 1, "gpus_per_node": 8}]},
            parallelism={"dp": 1, "ep": 8, "tp": tp, "expert_tp": expert_tp},
            workload={"batch": 4096},
            model={"moe": {"experts": 8 // expert_tp, "top_k": 2, "intermediate": 32}},
            placement={"policy": "linear"},
            **({"traffic": traffic} if traffic else {}),
        )
    )
    line = timeline(plan, traffic=known_traffic(plan, files=False))
    moved = crossing(plan, line, ~np.eye(8, dtype=bool))
    kinds = line.prices.topology.kind_of_link
    assert line.link_bytes[kinds == 0].sum() == pytest.approx(moved, rel=1e-6)
    assert line.link_bytes[kinds == 1].sum() == pytest.approx(moved, rel=1e-6)
    assert line.link_bytes[kinds > 1].sum() == 0


def test_bytes_between_nodes_take_a_nic_each_way() -> None:
    plan, line = line_of(parallelism={"dp": 1, "ep": 8, "tp": 4, "gating": "leader"}, workload={"batch": 4096})
    node = plan.spec.cluster.node_of_rank
    moved = crossing(plan, line, node[:, None] != node[None, :])
    kinds = line.prices.topology.kind_of_link
    assert line.link_bytes[kinds == 2].sum() == pytest.approx(moved, rel=1e-6)
    assert line.link_bytes[kinds == 3].sum() == pytest.approx(moved, rel=1e-6)


def test_even_routing_sends_as_many_rows_as_the_graph() -> None:
    plan, line = line_of()
    for number, block in enumerate(plan.blocks.blocks):
        if block.kind == "dispatch":
            assert block.layer is not None
            pairs = line.prices.exchanges.of(block.layer).pairs * block.writes["tokens"].row_bytes
            matrix = plan.byte_matrix(number)
            assert pairs.sum(axis=0) == pytest.approx(matrix.sum(axis=0))
            assert pairs.sum(axis=1) == pytest.approx(matrix.sum(axis=1))


SPINE = {
    "nvlink": {"bandwidth": "400 GB/s", "utilization": 1.0},
    "nic": {"bandwidth": "50 GB/s", "utilization": 1.0, "latency": "5 us"},
    "leaf": {"nodes": 2, "oversubscription": 4},
}


def test_transfers_share_a_link() -> None:
    """Two stages on two pods of two nodes with 4 GPUs: GPU i of both nodes of a pod hands over by rail i, whose trunk has
    2 × 50 ÷ 4 = 25 GB/s for the two of them."""
    groups = [{"nodes": 4, "gpus_per_node": 4}]
    plan, line = line_of(
        cluster={"links": SPINE, "groups": groups},
        parallelism={"dp": 1, "pp": 2},
        workload={"batch": 4096},
        model={"hidden": 1024, "attention": {"heads": 8, "head_dim": 128}},
    )
    number = next(n for n, b in enumerate(plan.blocks.blocks) if b.kind == "pp_send")
    size = 4096 / 8 * 1024 * 2
    together = 5e-6 + 2 * size / 25e9
    taken = line.run.end[number] - line.run.start[number]
    assert taken == pytest.approx(np.full(8, together))
    assert line.prices.blocks[number].seconds == pytest.approx(np.full(8, 5e-6 + size / 25e9))
    assert any(s.delayed > 0 for s in line.critical_path)


def test_transfers_of_several_streams_take_turns_on_a_link() -> None:
    """However many streams send, a link is not busy for longer than the step."""
    links = {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "2 GB/s"}}
    _, line = line_of(
        cluster={"links": links},
        workload={"batch": 40_000, "micro_batches": 4},
        execution={"communication_streams": 4},
    )
    busy = np.zeros(len(line.prices.rate))
    for price in line.prices.blocks:
        np.add.at(busy, price.links, occupied(price, line.prices.rate))
    assert 0.8 * line.step < busy.max() <= line.step


def test_a_slow_gpu_slows_the_layers_that_wait_for_it() -> None:
    plan, line = line_of()
    _, slow = line_of(slow=Slow(gpus={3: 2.0}))
    mine = sum(
        float(price.seconds[np.flatnonzero(block.ranks[:, 0] == 3)].sum())
        for block, price in zip(plan.blocks.blocks, line.prices.blocks, strict=True)
        if not block.collective and (block.ranks[:, 0] == 3).any()
    )
    assert slow.step == pytest.approx(line.step + mine)
    assert slow.usage.idle[0] > line.usage.idle[0]


def test_a_slow_link_slows_what_crosses_it() -> None:
    plan, line = line_of(workload={"batch": 4096})
    link = line.prices.topology.names.index("nic_up node 0 rail 1")
    _, slow = line_of(workload={"batch": 4096}, slow=Slow(links={link: 3.0}))
    for number, block in enumerate(plan.blocks.blocks):
        price = line.prices.blocks[number]
        if block.kind == "dispatch":
            before = float((line.run.end[number] - line.run.start[number])[0])
            after = float((slow.run.end[number] - slow.run.start[number])[0])
            assert after - float(price.fixed[0]) == pytest.approx(3 * (before - float(price.fixed[0])), rel=1e-6)


def test_steps_follow_each_other_in_a_pipeline() -> None:
    """With as many micro-batches as stages both stages work all the time: the period is the busier one's work."""
    parts = {"parallelism": {"dp": 1, "pp": 2}, "model": {"vocab": 512, "layers": 4}}
    _, one = line_of(**parts)
    _, two = line_of(**parts, workload={"micro_batches": 2})
    assert one.period == pytest.approx(one.step, rel=0.05)
    assert two.period < two.step  # the second step fills the bubbles that the first left
    assert two.again is not None and two.again[1].makespan == pytest.approx(two.again[0].makespan + two.period)


def test_more_streams_are_never_slower_and_share_the_work() -> None:
    parts = {"workload": {"batch": 4096, "micro_batches": 2}}
    _, one = line_of(**parts)
    _, two = line_of(**parts, execution={"compute_streams": 2, "communication_streams": 2})
    assert two.step <= one.step * (1 + 1e-9)
    lanes = {key for key, busy in two.stream_busy().items() if busy > 0}
    assert {n for _, _, n in lanes} == {0, 1}


def test_experts_start_when_part_of_their_tokens_came() -> None:
    _, whole = line_of(workload={"batch": 4096})
    plan, parts = line_of(workload={"batch": 4096}, execution={"expert_chunks": 4})
    at = {b.name: n for n, b in enumerate(plan.blocks.blocks)}
    dispatch, expert = at["L0.dispatch"], at["L0.expert"]
    start, end = parts.run.start[dispatch][0], parts.run.end[dispatch][0]
    assert parts.run.start[expert] == pytest.approx(np.full(8, start + (end - start) / 4))
    price = parts.prices.blocks[expert].seconds
    assert price.sum() > whole.prices.blocks[expert].seconds.sum()  # weights are read four times
    assert (parts.run.end[expert] >= end + price / 4 - 1e-15).all()


def test_the_floor_knows_that_experts_start_on_a_part_of_their_tokens() -> None:
    """At full rates and without latency the step is its floor: what overlaps in the step overlaps in the floor."""
    full = {"gpu": {"mfu": 1.0, "memory_utilization": 1.0}, "workload": {"batch": 40_000}}
    links = {
        "nvlink": {"bandwidth": "400 GB/s", "utilization": 1.0},
        "nic": {"bandwidth": "50 GB/s", "utilization": 1.0},
    }
    for link in links.values():
        link["latency"] = "0 us"
    for chunks in (1, 4):
        _, line = line_of(cluster={"links": links}, execution={"expert_chunks": chunks}, **full)
        assert line.floor == pytest.approx(line.step) == pytest.approx(line.interval[0])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_period_has_its_own_interval_and_floor(micro_batches: int) -> None:
    """Filling a pipeline takes time that no later step spends, and the batch comes in once."""
    _, line = line_of(
        parallelism={"dp": 1, "pp": 4},
        model={"vocab": 512, "layers": 8},
        workload={"micro_batches": micro_batches, "batch": 4096},
        gpu={"mfu": 0.1, "memory_utilization": 0.1},
    )
    low, high = line.period_interval
    assert 0 < line.period_floor <= low <= line.period <= high
    assert line.period_floor <= line.floor
    assert micro_batches > 1 or line.period_floor < line.floor  # the way in, where one micro-batch is the longest way
    assert high / line.period == pytest.approx(line.interval[1] / line.step)
    assert low == pytest.approx(max(line.period_floor, line.interval[0] * line.period / line.step))


@pytest.mark.parametrize(("batch", "pp", "intermediate", "quickest"), [(4000, 1, 2048, 2), (40_000, 2, 32, 1)])
def test_the_program_order_is_the_quickest_of_those_tried(
    batch: int, pp: int, intermediate: int, quickest: int
) -> None:
    """How many micro-batches are best kept abreast depends on the spec: two of four here, one there."""
    plan = planc.compile(
        small_spec(
            cluster={"links": {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "20 GB/s"}}},
            parallelism={"dp": 1, "pp": pp},
            model={"layers": 4, "moe": {"experts": 8, "top_k": 2, "intermediate": intermediate}},
            workload={"batch": batch, "micro_batches": 4},
        )
    )
    line = timeline(plan)
    tried = {count: _order(plan, line.prices.blocks, count) for count in (1, 2, 4)}
    assert min(tried, key=lambda count: tried[count][0]) == quickest
    assert tried[quickest][0] < 0.99 * max(end for end, _ in tried.values())
    assert line.order == tuple(tried[quickest][1])


def test_the_busiest_stream_bounds_the_step() -> None:
    """Of many micro-batches no one way through the graph is as long as the work of a GPU."""
    _, line = line_of(workload={"batch": 40_000, "micro_batches": 8})
    busy = np.zeros(8)
    for block, price in zip(line.plan.blocks.blocks, line.prices.blocks, strict=True):
        if not block.collective:
            busy[block.ranks[:, 0]] += price.floor
    assert line.floor == pytest.approx(busy.max())


def test_a_price_counts_as_its_least_known_part() -> None:
    """Every block here has ops on a GPU without a fit."""
    groups = [{"nodes": 1, "gpus_per_node": 4, "gpu": "h100-sxm"}, {"nodes": 1, "gpus_per_node": 4, "gpu": GPU}]
    _, line = line_of(cluster={"groups": groups}, parallelism={"dp": 1, "ep": 8})
    assert any(len(price.provenance) > 1 for price in line.prices.blocks)
    assert set(line.provenance) == {"spec"}
