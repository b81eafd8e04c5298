"""The tables say what the plan says: read by csv and pyarrow, and added up by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from pyarrow import parquet
from random_specs import specs
from small_specs import Compiled, small_spec

import planc
from planc.export import Job, refusals, tables, target, write
from planc.export.links import most_links
from planc.export.targets import options_of
from planc.render.style import comm_of

Row = dict[str, Any]
TABLES = ("placement", "ranks", "links", "ops")
INTS = {"layer", "expert", "copy", "shard", "replica", "rank", "node", "gpu", "slot", "stage", "ep_index", "tp_group"} | {
    "tp_index", "micro_batch", "source", "target", "bytes", "rows",
}  # fmt: skip
FLOATS = {"start_us", "end_us"}
NAMES = ("reference", "stages", "micro-batches", "copies", "turns", "dense")
Get = Callable[[str], planc.VerifiedPlan]


@pytest.fixture(scope="module")
def plan_of(example: Compiled) -> Get:
    """A plan by what is special about it, made once."""
    dense: dict[str, Any] = {"model": {"moe": None, "dense_mlp": {"intermediate": 64}}}
    copies: dict[str, Any] = {
        "model": {"moe": {"experts": 3, "top_k": 2, "intermediate": 32}, "vocab": 512},
        "parallelism": {"dp": 1, "pp": 1, "ep": 8, "tp": 2, "expert_tp": 2},
        "expert_rule": {"scope": "layer", "slots_per_gpu": 1, "spares": "replicate"},
        "workload": {"batch": 60},
    }
    turns: dict[str, Any] = {
        "model": {"moe": {"experts": 12, "top_k": 3, "intermediate": 32}, "vocab": 512},
        "parallelism": {
            "dp": 1,
            "pp": 2,
            "ep": 4,
            "tp": 4,
            "expert_tp": 2,
            "gating": "sharded",
            "tp_comm": "reduce_scatter",
        },
        "expert_rule": {"scope": "layer", "slots_per_gpu": 1, "on_overflow": "rounds"},
        "workload": {"batch": 60},
    }
    made: dict[str, planc.VerifiedPlan] = {}

    def get(name: str) -> planc.VerifiedPlan:
        if name not in made:
            made[name] = {
                "reference": lambda: example("moe-61l-ep64-dp2"),
                "stages": lambda: example("moe-4l-16gpu-baseline"),
                "micro-batches": lambda: example("moe-4l-64gpu", "workload.micro_batches=2"),
                "copies": lambda: planc.compile(small_spec(**copies)),
                "turns": lambda: planc.compile(small_spec(**turns)),
                "dense": lambda: planc.compile(small_spec(**dense)),
            }[name]()
        return made[name]

    return get


def written(plan: planc.VerifiedPlan, form: str = "csv", **options: str) -> dict[str, bytes]:
    """Table -> content of its file."""
    job = Job(plan, options=options_of([form], {f"{form}.{key}": value for key, value in options.items()}))
    return {name.removesuffix(f".{form}"): content for name, content in target(form).files(job)}


def value(column: str, cell: str) -> Any:
    if cell == "":
        return None
    return int(cell) if column in INTS or column.endswith("_bytes") else float(cell) if column in FLOATS else cell


def read(content: bytes) -> list[Row]:
    """A CSV file as rows of typed values, None for empty cells; every line has as many cells as the header."""
    header, *lines = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
    return [{c: value(c, cell) for c, cell in zip(header, line, strict=True)} for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_hold_the_same_rows(name: str, plan_of: Get) -> None:
    texts, files = written(plan_of(name)), written(plan_of(name), "parquet")
    assert tuple(texts) == tuple(files) == TABLES
    for table in TABLES:
        found = parquet.read_table(io.BytesIO(files[table]))
        assert found.to_pylist() == read(texts[table]), table
        assert found.schema.metadata[b"planc.plan"] == plan_of(name).spec.name.encode()
        for field in found.schema:
            whole = field.name in INTS or field.name.endswith("_bytes")
            assert field.type == (pa.int64() if whole else pa.float64() if field.name in FLOATS else pa.string())


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_the_same_plan_gives_the_same_bytes(form: str) -> None:
    one, other = (planc.compile(planc.load_spec("moe-4l-16gpu-baseline")) for _ in range(2))
    assert written(one, form) == written(other, form)


@pytest.mark.parametrize("name", NAMES)
def test_placement_is_the_plans(name: str, plan_of: Get) -> None:
    plan = plan_of(name)
    par, cluster = plan.parallelism, plan.spec.cluster
    rows = read(written(plan)["placement"])
    assert bool(rows) == (plan.spec.model.moe is not None)
    held: dict[tuple[int, int], dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    turns: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for row in rows:
        assert row["shard"] == len(held[row["layer"], row["expert"]][row["replica"], row["copy"]])  # in their order
        held[row["layer"], row["expert"]][row["replica"], row["copy"]].append(row["rank"])
        assert row["slot"] not in turns[row["layer"], row["rank"]]
        turns[row["layer"], row["rank"]][row["slot"]] = row["expert"]
        per_node = cluster.groups[0].gpus_per_node
        assert (row["node"], row["gpu"]) == divmod(row["rank"], per_node)
        assert row["replica"] == row["rank"] // (par.pp * par.ep)
    moe = plan.spec.model.moe
    for layer in plan.spec.model.moe_layer_ids:
        for expert in range(moe.experts if moe else 0):
            copies = held[layer, expert]
            assert list(copies.values()) == plan.placement.ranks_of_expert(layer, expert)
            assert sorted(copies) == list(copies) and {copy for _, copy in copies} == set(range(len(copies) // par.dp))
    for rank in range(par.world_size):
        experts = {layer: [turn[slot] for slot in sorted(turn)] for (layer, of), turn in turns.items() if of == rank}
        assert experts == plan.placement.experts_of_rank(rank)
        assert all(sorted(turn) == list(range(len(turn))) for (_, of), turn in turns.items() if of == rank)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_hold_what_the_plan_says(name: str, plan_of: Get) -> None:
    plan = plan_of(name)
    par, graph = plan.parallelism, plan.spec.cluster
    rows = read(written(plan)["ranks"])
    assert [row["rank"] for row in rows] == list(range(par.world_size))
    for row in rows:
        place = (row["replica"] * par.pp + row["stage"]) * par.ep + row["tp_group"] * par.tp + row["tp_index"]
        assert place == row["rank"] and row["ep_index"] == row["tp_group"] * par.tp + row["tp_index"] < par.ep
        assert row["node"] * graph.groups[0].gpus_per_node + row["gpu"] == row["rank"]
        assert row["gpu_name"] == graph.groups[0].gpu.name
        items = {key.removesuffix("_bytes"): size for key, size in row.items() if key.endswith("_bytes")}
        used, capacity = items.pop("used"), items.pop("capacity")
        assert items == plan.memory.of_rank(row["rank"])
        assert used == sum(items.values()) <= capacity == graph.groups[0].gpu.memory


def totals(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], int]:
    found: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        found[tuple(row[key] for key in keys)] += row["bytes"]
    return dict(found)


@pytest.mark.parametrize("links", ["op", "step"])
@pytest.mark.parametrize("name", NAMES)
def test_links_add_up_to_the_plans_volumes(name: str, links: str, plan_of: Get) -> None:
    """By class and kind of link, as the plan counts them in another way; what stays on a rank is no link."""
    plan = plan_of(name)
    rows = read(written(plan, links=links)["links"])
    away = {
        (comm, link): size
        for comm, part in plan.volumes.items()
        for link, size in part.items()
        if size and link != "local"
    }
    assert totals(rows, "comm", "link") == away
    assert all(row["source"] != row["target"] and row["bytes"] > 0 for row in rows)
    keys = [(row["comm"], row["kind"], row["op"], row["source"], row["target"]) for row in rows]
    assert len(set(keys)) == len(keys)
    per_node = plan.spec.cluster.groups[0].gpus_per_node
    for row in rows:
        same = row["source"] // per_node == row["target"] // per_node
        assert (row["link"] == "nvlink") == same
    if links == "step":
        assert {row[key] for row in rows for key in ("op", "layer", "micro_batch")} == {None}
        by_op = read(written(plan, links="op")["links"])
        assert totals(rows, "kind", "source", "target") == totals(by_op, "kind", "source", "target")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(parts=specs())
def test_links_of_any_plan_add_up(parts: dict[str, Any]) -> None:
    try:
        plan = planc.compile(small_spec(**parts))
    except planc.PlancError:
        assume(False)
        raise
    away = {(c, k): v for c, part in plan.volumes.items() for k, v in part.items() if v and k != "local"}
    for links in ("op", "step"):
        assert totals(read(written(plan, links=links)["links"]), "comm", "link") == away


@pytest.mark.parametrize("name", ["stages", "micro-batches", "copies", "turns", "dense"])
def test_links_of_an_op_are_its_byte_matrix(name: str, plan_of: Get) -> None:
    """And those beside collectives are edges of `plan.graph`."""
    plan = plan_of(name)
    want: dict[tuple[str, str, int, int], int] = {}
    for number, block in enumerate(plan.blocks.blocks):
        for op, ranks in enumerate(block.ranks.tolist() if block.collective else []):
            for (i, j), size in np.ndenumerate(plan.byte_matrix(number, op)):
                if i != j and size:
                    want[comm_of(block.kind), plan.blocks.op_id(number, op), ranks[i], ranks[j]] = int(size)
    ends = {"pp_send", "input", "output_collect"}
    for source, end, facts in plan.graph.edges(data=True):
        kinds = {plan.graph.nodes[node]["kind"] for node in (source, end)} & ends
        if facts.get("comm") in ("pp", "dp") and kinds:
            ranks = [int(re.findall(r"\.r(\d+)", node)[-1]) for node in (source, end)]
            if ranks[0] != ranks[1]:
                want[facts["comm"], source, ranks[0], ranks[1]] = facts["bytes"]
    rows = read(written(plan, links="op")["links"])
    assert totals(rows, "comm", "op", "source", "target") == want and len(rows) == len(want)
    for row in rows:
        facts = plan.graph.nodes[row["op"]]
        assert [row[key] for key in ("kind", "micro_batch", "layer")] == [
            facts["kind"], facts["micro_batch"], facts.get("layer")
        ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_ops_are_the_graphs_at_the_timelines_times(name: str, plan_of: Get) -> None:
    plan = plan_of(name)
    line = Job(plan).timeline
    rows = read(written(plan)["ops"])
    assert [row["op"] for row in rows] == list(plan.graph)
    for number, (row, facts) in enumerate(zip(rows, plan.graph.nodes.values(), strict=True)):
        told = {key: row[key] for key in ("kind", "layer", "micro_batch", "expert", "ranks")} | {"gpu": row["rank"]}
        assert told == {key: facts.get(key) for key in told}
        assert row["start_us"] == pytest.approx(line.start[number] * 1e6, abs=1e-6)
        assert row["end_us"] == pytest.approx(line.end[number] * 1e6, abs=1e-6)
    ends = {row["op"]: row["end_us"] for row in rows}
    begins = {row["op"]: row["start_us"] for row in rows}
    assert max(ends.values()) == pytest.approx(line.step * 1e6, abs=1e-6)
    if plan.spec.execution.expert_chunks == 1:
        assert all(begins[end] >= ends[source] - 1e-3 for source, end in plan.graph.edges)
    far = {block.kind for block in plan.blocks.blocks if line.stream_of(block) == "communication"}
    for row in rows:
        assert row["stream"] == ("communication" if row["kind"] in far else "compute")
        if row["kind"] == "expert":
            assert row["rows"] == plan.graph.nodes[row["op"]]["shape"][0]


def test_times_follow_known_traffic_and_bytes_do_not(plan_of: Get) -> None:
    """As in the plan itself; a note says so."""
    skewed = planc.compile(
        small_spec(
            parallelism={"dp": 1, "ep": 8, "tp": 1},
            placement={"policy": "topology"},
            traffic={"popularity": "zipf", "exponent": 1.0, "topics": 2, "tokens": 512, "seed": 1},
        )
    )
    rows = read(written(skewed)["links"])
    away = {(c, k): v for c, part in skewed.volumes.items() for k, v in part.items() if v and k != "local"}
    assert totals(rows, "comm", "link") == away
    spans: dict[int, set[float]] = defaultdict(set)
    for row in read(written(skewed)["ops"]):
        if row["kind"] == "expert":
            spans[row["layer"]].add(round(row["end_us"] - row["start_us"], 3))
    assert all(len(some) > 2 for some in spans.values())  # even routing has at most two token counts
    [note] = target("csv").notes(Job(skewed))
    assert "even routing" in note and not list(target("csv").notes(Job(plan_of("copies"))))


def test_a_recording_is_not_read_and_a_note_says_so(tmp_path: Path) -> None:
    """As where only the written plan is at hand: its files need nothing but the plan."""
    (tmp_path / "loads.json").write_text(json.dumps({"logical_count": [[[90, 10, 5, 5, 5, 5, 5, 5]] * 2]}))
    parts: dict[str, Any] = {"parallelism": {"dp": 1, "ep": 8, "tp": 1}, "placement": {"policy": "linear"}}
    known = planc.compile(small_spec(**parts, traffic={"file": str(tmp_path / "loads.json")}))
    assert written(known)["ops"] == written(planc.compile(small_spec(**parts)))["ops"]
    for form in ("csv", "parquet", "kineto"):
        *_, note = target(form).notes(Job(known))
        assert "even routing, without the recording" in note


def test_names_are_quoted(plan_of: Get) -> None:
    """A GPU's name is the only text of a user's in the tables."""
    plan, name = plan_of("dense"), 'a,"b"\n=1+1;é'
    group = plan.spec.cluster.groups[0]
    odd = group.model_copy(update={"gpu": group.gpu.model_copy(update={"name": name})})
    cluster = plan.spec.cluster.model_copy(update={"groups": [odd]})
    plan = dataclasses.replace(plan, spec=plan.spec.model_copy(update={"cluster": cluster, "name": name}))
    rows = read(written(plan)["ranks"])
    assert {row["gpu_name"] for row in rows} == {name} and len(rows) == plan.parallelism.world_size
    found = parquet.read_table(io.BytesIO(written(plan, "parquet")["ranks"]))
    assert found.to_pylist() == rows and found.schema.metadata[b"planc.plan"].decode() == name


def test_a_plan_without_experts_has_an_empty_placement(plan_of: Get) -> None:
    plan = plan_of("dense")
    assert written(plan)["placement"] == b"layer,expert,copy,shard,replica,rank,node,gpu,slot\n"
    found = parquet.read_table(io.BytesIO(written(plan, "parquet")["placement"]))
    assert found.num_rows == 0 and found.schema.field("slot").type == pa.int64()


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_many_links_are_summed_and_too_many_refused(
    form: str, plan_of: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of("stages")
    ops, step = (written(plan, form, links=links)["links"] for links in ("op", "step"))
    rows = len(read(written(plan, links="op")["links"]))
    job = Job(plan, options=options_of([form], {}))
    assert written(plan, form)["links"] == ops != step and not list(target(form).notes(job))
    monkeypatch.setattr(tables, "MANY_LINKS", rows // 2)
    assert written(plan, form)["links"] == step
    [note] = target(form).notes(job)
    assert "sums over a step" in note and "links=op" in note
    monkeypatch.setattr(tables, "MAX_ROWS", plan.blocks.op_count)
    assert plan.blocks.op_count < rows and not refusals(plan, [form])[form]
    asked = {f"{form}.links": "op"}
    [fault] = refusals(plan, [form], asked)[form]
    assert fault.code == "PLN503" and "step" in fault.hint
    with pytest.raises(planc.PlancError):
        write(plan, [form], tmp_path / "none", options=asked)
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(tables, "MAX_ROWS", plan.blocks.op_count - 1)
    [fault] = refusals(plan, [form])[form]
    assert "207 ops" in fault.message
    with pytest.raises(planc.PlancError) as error:
        write(plan, [form], tmp_path / "none", options={f"{form}.links": "x"})
    assert error.value.diagnostics[0].code == "PLN502"


@pytest.mark.parametrize("name", NAMES)
def test_there_are_no_more_links_than_was_said(name: str, plan_of: Get) -> None:
    plan = plan_of(name)
    rows, said = len(read(written(plan, links="op")["links"])), most_links(plan)
    assert rows <= said <= 8 * rows


def test_without_pyarrow_only_parquet_is_left_out(
    plan_of: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    plan = plan_of("stages")
    [fault] = refusals(plan, ["parquet"])["parquet"]
    assert fault.code == "PLN510" and "pip install 'planc[parquet]'" in fault.hint
    with pytest.raises(planc.PlancError):
        write(plan, ["parquet", "csv"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    write(plan, ["all"], tmp_path)
    assert (tmp_path / "csv" / "links.csv").exists() and not (tmp_path / "parquet").exists()
