"""Kineto traces of every rank: what a reader of JSON finds in them is the plan at the timeline's times."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections import Counter
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np
import pytest
from small_specs import Compiled, small_spec

import planc
from planc.export import Job, kineto, target, write

NAMES = ("reference", "stages", "dense")


def plan_of(name: str, example: Compiled) -> planc.VerifiedPlan:
    if name == "dense":
        return planc.compile(small_spec(model={"moe": None, "dense_mlp": {"intermediate": 64}}))
    return example("moe-61l-ep64-dp2" if name == "reference" else "moe-4l-16gpu-baseline")


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_its_ops(name: str, example: Compiled, tmp_path: Path) -> None:
    """Each op once on each of its ranks, as `plan.graph` names them; what is sent and received adds up over the ranks."""
    plan = plan_of(name, example)
    line, world = Job(plan).timeline, plan.parallelism.world_size
    paths = write(plan, ["kineto"], tmp_path).paths
    assert [path.name for path in paths] == [f"rank{rank}.json.gz" for rank in range(world)]
    want: Counter[str] = Counter()
    for block in plan.blocks.blocks:
        want[block.kind] += block.ranks.size
    found: Counter[str] = Counter()
    sent, received = Counter[str](), Counter[str]()
    number = {op: n for n, op in enumerate(plan.graph)}
    for rank, path in enumerate(paths):
        trace = read(path)
        assert trace["distributedInfo"] == {"backend": "nccl", "rank": rank, "world_size": world}
        assert trace["traceName"] == f"{plan.spec.name}, rank {rank}"
        ops = [event for event in trace["traceEvents"] if "op" in event.get("args", {})]
        assert len({event["args"]["op"] for event in ops}) == len(ops)
        for event in ops:
            args = event["args"]
            facts = plan.graph.nodes[args["op"]]
            found[facts["kind"]] += 1
            assert facts.get("layer") == args.get("layer") and facts.get("expert") == args.get("expert")
            if "gpu" in facts:
                assert facts["gpu"] == rank
            start, end = line.start[number[args["op"]]], line.end[number[args["op"]]]
            assert event["ts"] == pytest.approx(start * 1e6, abs=1e-5)
            assert event["ts"] + event.get("dur", 0.0) == pytest.approx(end * 1e6, abs=1e-5)
            if facts["kind"] in ("dispatch", "combine"):
                sent[args["op"]] += args["In msg nelems"]
                received[args["op"]] += args["Out msg nelems"]
    assert found == want
    assert sent == received and all(sent.values())
    for op, elements in sent.items():
        block = next(n for n, b in enumerate(plan.blocks.blocks) if op.startswith(f"{b.name}.r"))
        assert elements * 2 == int(np.sum(plan.byte_matrix(block)))  # 16-bit numbers


def test_the_same_plan_gives_the_same_bytes() -> None:
    one, other = (planc.compile(planc.load_spec("moe-4l-16gpu-baseline")) for _ in range(2))
    files = list(target("kineto").files(Job(one)))
    assert files == list(target("kineto").files(Job(other)))
    assert all(content[4:8] == bytes(4) for _, content in files)  # gzip's time of writing


def test_names_are_text_of_json(example: Compiled, tmp_path: Path) -> None:
    plan, name = plan_of("stages", example), 'a "b" \\ <c>\n&\x01é'
    odd = dataclasses.replace(plan, spec=plan.spec.model_copy(update={"name": name}))
    assert read(write(odd, ["kineto"], tmp_path).paths[3])["traceName"] == f"{name}, rank 3"


def test_one_trace_is_held_at_a_time(example: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(kineto, "packed", lambda trace: made.append(trace["distributedInfo"]["rank"]) or b"")
    files = target("kineto").files(Job(plan_of("stages", example)))
    assert isinstance(files, GeneratorType)
    assert next(files) == ("rank0.json.gz", b"") and made == [0]
    assert next(files)[0] == "rank1.json.gz" and made == [0, 1]


def test_a_smaller_plan_leaves_no_trace_of_the_larger(example: Compiled, tmp_path: Path) -> None:
    """A tool that reads the folder sees one step."""
    write(plan_of("stages", example), ["kineto"], tmp_path)
    write(plan_of("dense", example), ["kineto"], tmp_path)
    assert {path.name for path in (tmp_path / "kineto").iterdir()} == {f"rank{rank}.json.gz" for rank in range(8)}
