"""Traces say what the timeline says: every op once, streams without overlap, busy times, messages, the critical path."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_specs import Compiled, Small

import planc
from planc import pipeline
from planc.diagnostics import PlancError
from planc.schedule import Timeline, timeline
from planc.schedule import trace as written
from planc.schedule.order import takes_time
from planc.schedule.trace import chrome, kineto, packed

Event = dict[str, Any]
MODEL = {"layers": 3, "hidden": 1024, "vocab": 32000, "moe": {"experts": 16, "top_k": 2, "intermediate": 512}}
NODES = {"groups": [{"nodes": 2, "gpus_per_node": 8}]}


def _streams(small: Small) -> planc.VerifiedPlan:
    """Several streams of each kind, experts that start on a part, tensor and expert parallelism, some ranks apart."""
    return planc.compile(
        small(
            gpu={"memory": "20 GB"},
            cluster=NODES,
            model=MODEL,
            parallelism={"dp": 1, "ep": 16, "tp": 2, "expert_tp": 2},
            workload={"batch": 2048, "isl": 512, "micro_batches": 3},
            execution={"compute_streams": 2, "communication_streams": 2, "expert_chunks": 2},
        )
    )


NAMES = ("pipeline", "two micro-batches", "many streams")


@pytest.fixture(scope="module")
def step(example: Compiled, small: Small) -> Callable[[str], Timeline]:
    """The simulated step of one of three plans, made once."""
    made: dict[str, Timeline] = {}

    def get(name: str) -> Timeline:
        if name not in made:
            if name == "many streams":
                plan = _streams(small)
            elif name == "pipeline":
                plan = example("moe-4l-16gpu-baseline")
            else:
                plan = example("moe-4l-64gpu", "workload.micro_batches=2")
            made[name] = timeline(plan)
        return made[name]

    return get


def _of(trace: dict[str, Any], cat: str) -> list[Event]:
    return [event for event in trace["traceEvents"] if event.get("cat") == cat]


def _by_stream(kernels: list[Event]) -> dict[int, list[Event]]:
    streams = defaultdict(list)
    for kernel in kernels:
        streams[kernel["tid"]].append(kernel)
    return streams


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_busy_as_long_as_in_the_timeline_and_events_do_not_overlap(
    name: str, step: Callable[[str], Timeline]
) -> None:
    simulated = step(name)
    execution, busy = simulated.plan.spec.execution, simulated.stream_busy()
    for rank in range(simulated.plan.blocks.world_size):
        streams = _by_stream(_of(kineto(simulated, rank), "kernel"))
        for kind, first, lanes in (
            ("compute", 7, execution.compute_streams),
            ("communication", 7 + execution.compute_streams, execution.communication_streams),
        ):
            for lane in range(lanes):
                kernels = streams.pop(first + lane, [])
                total = sum(kernel["dur"] for kernel in kernels)
                assert total == pytest.approx(busy[rank, kind, lane] * 1e6, rel=1e-6)
                for one, other in pairwise(kernels):
                    assert one["ts"] + one["dur"] <= other["ts"]  # exactly, as any reader adds them
                for kernel in kernels:
                    assert kernel["dur"] >= 0 and kernel["name"].startswith("nccl") == (kind == "communication")
                    assert (kernel["args"]["stream"], kernel["args"]["device"]) == (first + lane, kernel["pid"])
        assert not streams


@pytest.mark.parametrize("name", NAMES)
def test_every_op_of_the_rank_is_there_once_at_its_time(name: str, step: Callable[[str], Timeline]) -> None:
    simulated = step(name)
    graph = simulated.plan.blocks
    for rank in {0, 3, graph.world_size - 1}:
        want = {}
        for number, block in enumerate(graph.blocks):
            for op in np.flatnonzero((block.ranks == rank).any(axis=1)).tolist():
                times = simulated.run.start[number][op] * 1e6, simulated.run.end[number][op] * 1e6
                want[graph.op_id(number, op)] = (takes_time(block), *times)
        trace = kineto(simulated, rank)
        found = _of(trace, "kernel") + _of(trace, "planc")
        assert Counter(event["args"]["op"] for event in found) == Counter(dict.fromkeys(want, 1))
        for event in found:
            takes, start, end = want[event["args"]["op"]]
            assert (event["ph"] == "X") == takes
            assert event["ts"] == pytest.approx(start, abs=1e-6)
            assert event["ts"] + event.get("dur", 0.0) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_launched_in_the_step_by_one_launch_each(name: str, step: Callable[[str], Timeline]) -> None:
    trace = kineto(step(name), 1)
    kernels, launches = _of(trace, "kernel"), _of(trace, "cuda_runtime")
    numbers = [kernel["args"]["correlation"] for kernel in kernels]
    assert len(set(numbers)) == len(numbers)
    assert sorted(numbers) == sorted(launch["args"]["correlation"] for launch in launches)
    [profiled] = _of(trace, "user_annotation")
    assert profiled["name"] == "ProfilerStep#0"
    assert (profiled["ts"], profiled["dur"]) == (0.0, pytest.approx(step(name).step * 1e6, abs=1e-6))
    assert max(k["ts"] + k["dur"] for k in kernels) <= profiled["dur"]
    assert {launch["pid"] for launch in launches}.isdisjoint(k["pid"] for k in kernels)
    assert trace["traceEvents"][0]["ph"] == "M"  # HTA takes a link to event 0 for none


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_strict_json_and_the_same_plan_gives_the_same_bytes(
    name: str, step: Callable[[str], Timeline]
) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    simulated = step(name)
    again = timeline(simulated.plan)
    for make in (lambda of: kineto(of, 2), lambda of: chrome(of, [0, 2])):
        data = packed(make(simulated))
        assert json.loads(gzip.decompress(data), parse_constant=refuse) == make(simulated)
        assert packed(make(again)) == data
    assert b'"rank": 2' in gzip.decompress(packed(kineto(simulated, 2)))  # how HTA finds the rank, space and all


def test_the_head_says_which_gpu_it_is(step: Callable[[str], Timeline]) -> None:
    trace = kineto(step("pipeline"), 9)
    assert trace["distributedInfo"] == {"backend": "nccl", "rank": 9, "world_size": 16}
    [device] = trace["deviceProperties"]
    group = step("pipeline").plan.spec.cluster.groups[0]
    assert device == {"id": 1, "name": group.gpu.name, "totalGlobalMem": group.gpu.memory}
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names["thread_name", 1, 7] == {"name": "stream 7: compute"}
    assert names["thread_name", 1, 8] == {"name": "stream 8: communication"}
    for rank in (-1, 16):
        with pytest.raises(IndexError, match="there are 0 to 15"):
            kineto(step("pipeline"), rank)


@pytest.mark.parametrize("name", NAMES)
def test_messages_arrive_as_they_were_sent(name: str, step: Callable[[str], Timeline]) -> None:
    simulated = step(name)
    spec, world = simulated.plan.spec, simulated.plan.blocks.world_size
    assert spec.model.moe is not None
    members: dict[str, list[Event]] = defaultdict(list)
    for rank in range(world):
        for kernel in _of(kineto(simulated, rank), "kernel"):
            if "Collective name" in kernel["args"]:
                members[kernel["args"]["op"]].append(kernel["args"])
    sums: dict[str, list[int]] = defaultdict(list)
    for parts in members.values():
        sent, got = (sum(part[f"{way} msg nelems"] for part in parts) for way in ("In", "Out"))
        ranks = json.loads(parts[0]["Process Group Ranks"])
        assert parts[0]["Group size"] == len(ranks)
        kind = parts[0]["Collective name"]
        assert len(parts) == (1 if kind == "send" else len(ranks))
        if kind == "all_to_allv":
            assert sent == got
            sums[parts[0]["class"]].append(sent)
        elif kind == "_allgather_base":
            assert parts[0]["Out msg nelems"] == len(ranks) * parts[0]["In msg nelems"]
        elif kind == "_reduce_scatter_base":
            assert sum(part["Out msg nelems"] for part in parts) == parts[0]["In msg nelems"]
        elif kind in ("allreduce", "broadcast", "send"):
            assert all(part["In msg nelems"] == part["Out msg nelems"] > 0 for part in parts)
    width = simulated.plan.parallelism.expert_tp
    assert sums["dispatch"] == [width * back for back in sums["combine"]]


def test_times_rounded_apart_do_not_overlap() -> None:
    half = 0.5 * 2.0**-20 * 1e-6  # between two ticks: rounds to the even one, and what is a bit later to the other
    end = np.array([half * 1.0000001, 5e-6])
    start = np.array([0.0, half * 0.9999999])
    begin, finish = written._in_turn(start, end)
    assert finish[0] <= begin[1] and (finish >= begin).all()


@pytest.mark.parametrize("name", NAMES)
def test_chrome_shows_the_critical_path(name: str, step: Callable[[str], Timeline]) -> None:
    simulated = step(name)
    world = simulated.plan.blocks.world_size
    trace = chrome(simulated, range(world))
    kernels = _of(trace, "kernel")
    assert len(kernels) == len(simulated.intervals[0])
    assert {kernel["pid"] for kernel in kernels} == set(range(world))
    on_path = [e for e in _of(trace, "critical path") if e["ph"] == "X"]
    blocks = simulated.plan.blocks
    want = [blocks.op_id(s.block, s.op) for s in simulated.critical_path if takes_time(blocks.blocks[s.block])]
    assert [e["name"] for e in on_path] == want
    assert {e["args"]["op"] for e in kernels if "critical" in e["args"]} == set(want)
    for one, other in pairwise(on_path):
        assert one["ts"] + one["dur"] <= other["ts"]
    assert sum(e["dur"] for e in on_path) == pytest.approx(simulated.step * 1e6, rel=1e-6)
    flows = [e for e in _of(trace, "critical path") if e["ph"] != "X"]
    assert flows and Counter(e["id"] for e in flows) == Counter(dict.fromkeys(range(1, len(flows) // 2 + 1), 2))
    starts = {(e["pid"], e["tid"], e["ts"]) for e in kernels if "critical" in e["args"]}
    assert all((e["pid"], e["tid"], e["ts"]) in starts for e in flows)
    for source, target in zip(flows[::2], flows[1::2], strict=True):
        assert (source["ph"], target["ph"]) == ("s", "f") and source["ts"] <= target["ts"]
        assert (source["pid"], source["tid"]) != (target["pid"], target["tid"])


def test_chrome_refuses_more_than_a_browser_opens(
    step: Callable[[str], Timeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = chrome(step("pipeline"), [0])
    monkeypatch.setattr(written, "MAX_KERNELS", len(_of(few, "kernel")))
    assert chrome(step("pipeline"), [0]) == few
    with pytest.raises(PlancError) as caught:
        chrome(step("pipeline"), [0, 1])
    assert [d.code for d in caught.value.diagnostics] == ["PLN208"]


def test_write_traces_replaces_those_of_an_earlier_run(step: Callable[[str], Timeline], tmp_path: Path) -> None:
    other = tmp_path / "rank-notes.json.gz"
    other.write_bytes(b"mine")
    first = pipeline.write_traces(step("pipeline"), tmp_path, [3, 1, 2])
    assert [path.name for path in first] == [f"rank-{rank}.json.gz" for rank in (1, 2, 3)]
    assert first[0].read_bytes() == packed(kineto(step("pipeline"), 1))
    assert [p.name for p in pipeline.write_traces(step("pipeline"), tmp_path, together=True)] == ["step.json.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-notes.json.gz", "step.json.gz"]
    pipeline.write_traces(step("pipeline"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 17 and other.read_bytes() == b"mine"
