"""Chakra traces: what is written can be read, replays in planc's time, and broken traces are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_specs import small_spec

import planc
import planc.export
from planc.export import chakra_file as wire
from planc.export.astra_sim import flat_network
from planc.export.chakra_read import Traces, read_traces
from planc.schedule import timeline

TP = {"dp": 1, "tp": 2}


def written(folder: Path, plan: planc.VerifiedPlan, **options: str) -> Path:
    planc.export.write(plan, ["chakra"], folder, options={f"chakra.{k}": v for k, v in options.items()})
    return folder / "chakra"


def replay(traces: Traces) -> float:
    """Seconds of the step with planc's durations: nodes wait for what they depend on and for their rank's slot, collectives
    for all members, receivers for the sender."""
    done: list[dict[int, int]] = [{} for _ in traces.ranks]
    slots = [[0, 0] for _ in traces.ranks]
    at = [0] * len(traces.ranks)
    sent: dict[tuple[object, ...], int] = {}
    waits: dict[str, dict[int, tuple[wire.Node, int]]] = {}
    left = sum(map(len, traces.ranks))
    while left:
        before = left
        for rank, nodes in enumerate(traces.ranks):
            while at[rank] < len(nodes):
                node = nodes[at[rank]]
                told, far = node.attributes, int(node.type != wire.COMP)
                ready = max((done[rank][d] for d in (*node.ctrl_deps, *node.data_deps)), default=0)
                ready = ready if node.type == wire.RECV else max(ready, slots[rank][far])
                key = told.get("comm_src"), told.get("comm_dst"), told.get("comm_tag")
                if node.type == wire.COLL:
                    group = str(told["pg_name"])
                    here = waits.setdefault(group, {})
                    here[rank] = node, ready
                    members = traces.groups[int(group)]
                    if len(here) < len(members):
                        break
                    end = max(start for _, start in here.values()) + int(told["planc.ns"])
                    for member, (one, _) in here.items():
                        done[member][one.id] = slots[member][1] = end
                        at[member] += 1
                        left -= 1
                    waits[group] = {}
                    continue
                if node.type == wire.RECV:
                    if key not in sent:
                        break
                    end = max(ready, sent[key])
                else:
                    end = slots[rank][far] = ready + int(told["planc.ns"])
                if node.type == wire.SEND:
                    sent[key] = end
                done[rank][node.id] = end
                at[rank] += 1
                left -= 1
        assert left < before, "the replay is stuck"
    return max(max(ends.values()) for ends in done) / 1e9


@pytest.mark.parametrize("degrees", [{"dp": 1}, TP, {"dp": 2, "tp": 2}, {"dp": 1, "pp": 2}])
def test_replay_takes_as_long_as_the_step(tmp_path: Path, degrees: dict[str, int]) -> None:
    plan = planc.compile(small_spec(parallelism=degrees, workload={"batch": 16384}))  # µs, not ns
    traces = read_traces(written(tmp_path, plan))
    assert len(traces.ranks) == 8
    assert replay(traces) == pytest.approx(timeline(plan).step, rel=1e-3)


def test_reference_replays(tmp_path: Path, example) -> None:  # type: ignore[no-untyped-def]
    plan = example("moe-61l-ep64-dp2")
    traces = read_traces(written(tmp_path, plan))
    line = planc.export.Job(plan).timeline
    assert len(traces.ranks) == 128 and replay(traces) == pytest.approx(line.step, rel=1e-3)


@pytest.mark.parametrize("way", ["mean", "p2p"])
def test_bytes_of_dispatch_are_those_of_the_plan(tmp_path: Path, way: str) -> None:
    plan = planc.compile(small_spec())
    numbers = read_traces(written(tmp_path, plan, all_to_all=way)).numbers()
    total = 0
    for number, block in enumerate(plan.blocks.blocks):
        if block.kind in ("dispatch", "combine"):
            matrix = plan.byte_matrix(number)
            total += int(matrix.sum() - matrix.trace())
    told = numbers["SEND bytes"] if way == "p2p" else numbers["ALL_TO_ALL bytes"] * 7 / 8  # without one's own chunk
    assert told == pytest.approx(total, rel=0 if way == "p2p" else 1e-3)


def test_the_largest_chunk_stands_for_all(tmp_path: Path) -> None:
    """`max` is what the fullest pair sends, times the ranks: never less than `mean`, and more where traffic is skewed."""
    traffic = {"popularity": "zipf", "exponent": 1.5, "tokens": 256}
    plan = planc.compile(small_spec(traffic=traffic, workload={"batch": 4096}))
    sizes = {}
    for way in ("mean", "max", "p2p"):
        traces = read_traces(written(tmp_path / way, plan, all_to_all=way))
        of_dispatch = [node for node in traces.ranks[0] if node.attributes["planc.op"] == "dispatch"]
        layer = [node for node in of_dispatch if node.attributes["planc.layer"] == 0]
        sizes[way] = [int(node.attributes["comm_size"]) for node in layer if way != "p2p" or node.type == wire.SEND]
        if way == "p2p":
            sent = {}
            for rank, nodes in enumerate(traces.ranks):
                for node in nodes:
                    told = node.attributes
                    if node.type == wire.SEND and (told["planc.op"], told["planc.layer"]) == ("dispatch", 0):
                        sent[rank, told["comm_dst"]] = int(told["comm_size"])
    assert sizes["max"] == [8 * max(sent.values())] and sizes["mean"] == [8 * -(-sum(sent.values()) // 56)]
    assert sizes["max"] > sizes["mean"]


@pytest.mark.parametrize(
    ("execution", "words"),
    [
        ({"expert_chunks": 4}, "all that dispatch brings"),
        ({"compute_streams": 2, "communication_streams": 2}, "one slot"),
    ],
)
def test_what_a_simulator_does_otherwise_is_said(tmp_path: Path, execution: dict[str, int], words: str) -> None:
    plan = planc.compile(small_spec(execution=execution, workload={"batch": 512, "micro_batches": 2}))
    folder = written(tmp_path, plan)
    traces = read_traces(folder)
    assert replay(traces) >= max(int(node.attributes["planc.ns"]) for nodes in traces.ranks for node in nodes) / 1e9
    assert words in (folder / "run.sh").read_text()


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    """Every wire type, in nodes and attributes; what no protobuf may hold is refused."""
    folder = written(tmp_path, planc.compile(small_spec()))
    path, before = folder / "trace.0.et", read_traces(folder)
    plain = path.read_bytes()
    later = b"\xf8\x3f\x05" + b"\xfa\x3f\x02ab" + b"\xf9\x3f" + bytes(8) + b"\xfd\x3f" + bytes(4)  # field 1023
    path.write_bytes(plain + wire.node(9999, wire.head("x", wire.COMP), (1,), (), later))
    after = read_traces(folder)
    assert after.ranks[0][:-1] == before.ranks[0] and after.ranks[0][-1].attributes == {}
    for broken, words in (
        (b"\xf8\x3f" + b"\x80" * 10 + b"\x01", "longer than 64 bits"),
        (b"\xf8\x3f" + b"\xff" * 9 + b"\x7f", "longer than 64 bits"),
        (b"\xf8\x3f\x80", "cut off"),
        (b"\xfb\x3f", "wire type 3"),
        (b"\x00\x01", "number 0"),
    ):
        path.write_bytes(plain + wire.node(9999, wire.head("x", wire.COMP), (1,), (), broken))
        with pytest.raises(planc.PlancError, match=words):
            read_traces(folder)


def test_durations_are_whole_ns_in_the_roofline(tmp_path: Path) -> None:
    for nodes in read_traces(written(tmp_path, planc.compile(small_spec()))).ranks:
        for node in nodes:
            if node.type == wire.COMP:
                assert int(float(node.attributes["num_ops"]) / 1e12 * 1e9) == node.attributes["planc.ns"]


def test_network_is_in_gib_and_half_a_latency(tmp_path: Path) -> None:
    plan = planc.compile(
        small_spec(
            cluster={"links": {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "50 GB/s", "latency": "5 us"}}}
        )
    )
    bandwidth, latency = flat_network(plan)
    size = 8 << 20
    assert 2 * latency + size / (bandwidth * 2**30) * 1e9 == pytest.approx(5000 + size / (50e9 * 0.8) * 1e9)


MUTANTS = {
    "duplicate": "one id",
    "dangling": "not there",
    "circle": "in a circle",
    "missed": "misses collective",
    "size": "differ in type or size",
    "message": "one end only",
    "rank": "rank 3 has no trace",
    "group": "not ranks",
    "cut": "ends after",
}


@pytest.mark.parametrize("how", MUTANTS)
def test_broken_traces_are_refused(tmp_path: Path, how: str) -> None:
    folder = written(tmp_path, planc.compile(small_spec(parallelism={"dp": 1, "pp": 2})))
    path = folder / "trace.0.et"
    content = path.read_bytes()
    node = wire.node(9999, wire.head("x", wire.COMP), (1,), (), b"")
    extra = {
        "duplicate": wire.node(1, wire.head("x", wire.COMP), (), (), b""),
        "dangling": wire.node(9999, wire.head("x", wire.COMP), (8888,), (), b""),
        "circle": wire.node(9999, wire.head("x", wire.COMP), (9999,), (), b""),
        "missed": wire.node(9999, wire.head("x", wire.COLL), (1,), (), _coll(1)),
        "message": wire.node(9999, wire.head("x", wire.SEND), (1,), (), _send()),
        "cut": node[:-1],
    }
    path.write_bytes(content + extra.get(how, b""))
    if how == "size":
        for rank in range(4):
            own = folder / f"trace.{rank}.et"
            own.write_bytes(own.read_bytes() + wire.node(9999, wire.head("x", wire.COLL), (1,), (), _coll(1 + rank)))
    if how == "rank":
        (folder / "trace.3.et").unlink()
    if how == "group":
        (folder / "comm_groups.json").write_text(json.dumps({"1": [0, 1, 2, 99]}))
    with pytest.raises(planc.PlancError) as caught:
        read_traces(folder)
    assert caught.value.diagnostics[0].code == "PLN508" and MUTANTS[how] in caught.value.diagnostics[0].message


def _coll(size: int) -> bytes:
    told = (("comm_type", wire.INT64, 6), ("comm_size", wire.INT64, size), ("pg_name", wire.STRING, "1"))
    return b"".join(wire.attribute(*one) for one in told)


def _send() -> bytes:
    told = {"comm_src": 0, "comm_dst": 1, "comm_tag": 7, "comm_size": 1}
    return b"".join(wire.attribute(k, wire.INT32, v) for k, v in told.items())


def test_ranks_that_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "comm_groups.json").write_text('{"1": [0, 1], "2": [0, 1]}')
    for rank, order in enumerate((("1", "2"), ("2", "1"))):
        nodes = [wire.node(1, wire.head("start", wire.COMP), (), (), b"")]
        for number, group in enumerate(order, 2):
            told = _coll(1)[: -len(wire.attribute("pg_name", wire.STRING, "1"))]
            told += wire.attribute("pg_name", wire.STRING, group)
            nodes.append(wire.node(number, wire.head("x", wire.COLL), (number - 1,), (), told))
        (tmp_path / f"trace.{rank}.et").write_bytes(wire.metadata({}) + b"".join(nodes))
    with pytest.raises(planc.PlancError, match="in a circle"):
        read_traces(tmp_path)


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    plan = planc.compile(small_spec())
    first, second = (written(tmp_path / name, plan) for name in "ab")
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


STRICT: dict[str, tuple[str, object]] = {
    "members that are no numbers": ("comm_groups.json", {"1": [0.5, 1]}),
    "members that are text": ("comm_groups.json", {"1": ["0", "1"]}),
    "a group by another name": ("comm_groups.json", {"01": [0, 1]}),
    "a list of groups": ("comm_groups.json", [[0, 1]]),
    "nesting": ("comm_groups.json", "[" * 100_000),
    "another trace of a rank": ("trace.00.et", b""),
    "empty messages": ("trace.0.et", bytes(100)),
}


@pytest.mark.parametrize("name", STRICT)
def test_files_that_only_look_right(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path, planc.compile(small_spec()))
    file, content = STRICT[name]
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    (folder / file).write_bytes(data)
    if file == "trace.00.et":  # is no trace, and so in nobody's way
        assert len(read_traces(folder).ranks) == 8
        return
    with pytest.raises(planc.PlancError) as caught:
        read_traces(folder)
    assert [d.code for d in caught.value.diagnostics] == ["PLN508"]


@pytest.mark.parametrize(
    "told",
    [
        {"comm_size": (wire.INT64, 0)},
        {"comm_size": (wire.STRING, "8")},
        {"comm_type": (wire.INT64, 77)},
        {"pg_name": (wire.STRING, "1_0")},
        {"pg_name": (wire.STRING, "9")},
    ],
)
def test_attributes_that_mean_nothing(tmp_path: Path, told: dict[str, tuple[int, Any]]) -> None:
    folder = written(tmp_path, planc.compile(small_spec()))
    plain = {"comm_type": (wire.INT64, 6), "comm_size": (wire.INT64, 8), "pg_name": (wire.STRING, "1")}
    rest = b"".join(wire.attribute(key, kind, value) for key, (kind, value) in (plain | told).items())
    for rank in range(8):
        path = folder / f"trace.{rank}.et"
        path.write_bytes(path.read_bytes() + wire.node(9999, wire.head("x", wire.COLL), (1,), (), rest))
    with pytest.raises(planc.PlancError, match="PLN508"):
        read_traces(folder)


def test_traces_of_two_plans(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", planc.compile(small_spec()))
    other = written(tmp_path / "b", planc.compile(small_spec(name="other")))
    (folder / "trace.0.et").write_bytes((other / "trace.0.et").read_bytes())
    with pytest.raises(planc.PlancError, match="of another plan"):
        read_traces(folder)


@pytest.mark.parametrize("file", ["comm_groups.json", "trace.0.et"])
def test_pipes_are_no_traces(tmp_path: Path, file: str) -> None:
    folder = written(tmp_path, planc.compile(small_spec()))
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(planc.PlancError, match="PLN508"):
        read_traces(folder)
