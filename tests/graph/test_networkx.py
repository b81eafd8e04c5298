"""The DiGraph says what the arrays say: same ops, same edges, the attributes of docs/formats.md, no cycle."""

from __future__ import annotations

from collections import Counter

import networkx as nx
import numpy as np
import pytest
from small_specs import MOE, Compiled, Small

import planc
from planc.graph import ROWS, expand, range_text
from planc.spec.fields import parse_ranges

DECODE = {
    "moe-4l-16gpu-baseline": (),
    "moe-4l-64gpu": (),
    "mixtral-8x7b": (),
    "hetero-h100-h200": (),
    "moe-61l-ep64-dp2": ("model.layers=5", "workload.batch=256"),
    "deepseek-v3-128gpu": ("model.layers=5",),
    "deepseek-v3-ep256": ("model.layers=5",),
    "qwen3-235b-a22b": ("model.layers=3",),
}
PREFILL = ("workload.phase=prefill", "workload.prefill_chunk=256")
COMM = {"tp", "dispatch", "combine", "pp", "dp"}


def spelled(plan: planc.VerifiedPlan) -> tuple[Counter[str], Counter[tuple[str, str, str, int, str]]]:
    """Ops and edges written out one by one from the blocks, without the code that fills the DiGraph."""
    blocks, world = plan.blocks.blocks, plan.blocks.world_size
    ids = [
        [
            f"{b.name}.r{ranks[0]}" if len(ranks) == 1 else f"{b.name}.r{ranks[0]}-{ranks[-1]}"
            for ranks in b.ranks.tolist()
        ]
        for b in blocks
    ]
    edges: Counter[tuple[str, str, str, int, str]] = Counter()
    for e in plan.blocks.edges:
        source, target = blocks[e.source], blocks[e.target]
        kind, _, number = e.pattern.partition(":")
        of_rank: dict[int, list[int]] = {}
        for j, ranks in enumerate(target.ranks.tolist()):
            for rank in ranks:
                of_rank.setdefault(rank, []).append(j)
        for i, ranks in enumerate(source.ranks.tolist()):
            if kind == "rank":
                readers = {j for rank in ranks for j in of_rank.get(rank, [])}
            elif kind == "shift":
                readers = {j for rank in ranks for j in of_rank.get(rank + int(number), [])}
            else:
                assert int(number) == world
                readers = {j for j, other in enumerate(target.ranks.tolist()) if other != ranks}
            for j in readers:
                size = {"bf16": 2, "fp16": 2, "fp8": 1, "fp32": 4, "int32": 4}[e.tensor.dtype]
                rows = source.rows[i] if source.rows is not None else target.rows[j] if target.rows is not None else 0
                for n in e.tensor.shape:
                    size *= int(rows) if n == ROWS else n
                edges[ids[e.source][i], ids[e.target][j], e.tensor.dtype, size, e.comm] += 1
    return Counter(op for row in ids for op in row), edges


@pytest.mark.parametrize("name", ["moe-4l-16gpu-baseline", "moe-4l-64gpu", "mixtral-8x7b"])
def test_every_op_and_edge_is_there_once(example: Compiled, name: str) -> None:
    plan = example(name, *(["model.layers=2"] if name == "mixtral-8x7b" else []))
    ops, edges = spelled(plan)
    assert Counter(list(plan.graph)) == ops
    found = Counter(
        (s, t, d["tensor"].split("] ")[1].split()[0], d["bytes"], d.get("comm", ""))
        for s, t, d in plan.graph.edges(data=True)
    )
    assert found == edges
    assert max(edges.values()) == 1


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("name", DECODE)
def test_graphs_of_the_examples(example: Compiled, name: str, phase: str) -> None:
    plan = example(name, *DECODE[name], *(PREFILL if phase == "prefill" else ()))
    graph, expanded = plan.graph, plan.expanded
    assert nx.is_directed_acyclic_graph(graph)
    assert list(graph) == expanded.ids
    assert graph.number_of_edges() == len(expanded.source) == expanded.first_edge[-1]
    total = sum(int(expanded.edge_bytes(i).sum()) for i in range(len(plan.blocks.edges)))
    assert sum(d["bytes"] for _, _, d in graph.edges(data=True)) == total
    (first,) = (n for n in graph if graph.in_degree(n) == 0)
    assert graph.nodes[first]["kind"] == "input"
    assert set(nx.descendants(graph, first)) == set(graph) - {first}
    (last,) = (n for n, d in graph.nodes(data=True) if d["kind"] == "output_collect")
    assert set(nx.ancestors(graph, last)) == set(graph) - {last}


@pytest.mark.parametrize("name", ["moe-4l-16gpu-baseline", "mixtral-8x7b"])
def test_attributes(example: Compiled, name: str) -> None:
    plan = example(name)
    for op, data in plan.graph.nodes(data=True):
        assert {"kind", "micro_batch", "shape", "dtype", "layout"} <= set(data), op
        assert ("gpu" in data) != ("ranks" in data)
        assert op.endswith(f".r{data.get('gpu', data.get('ranks'))}")
        assert ("expert" in data) == (data["kind"] == "expert")
        assert ("layer" in data) == op.startswith("L")
        if "layer" in data:
            assert op.startswith(f"L{data['layer']}.")
        assert isinstance(data.get("gpu", 0), int)
    for source, target, data in plan.graph.edges(data=True):
        ends = [plan.graph.nodes[n] for n in (source, target)]
        places = [n.get("gpu", n.get("ranks")) for n in ends]
        assert isinstance(data["bytes"], int)
        assert ("comm" in data) == (data.get("style") == "dashed") == (places[0] != places[1])
        assert data.get("comm", "tp") in COMM


def test_experts_and_their_tokens(small: Small) -> None:
    plan = planc.compile(small(model={"moe": MOE | {"experts": 6}}, parallelism={"dp": 2, "ep": 4, "tp": 1}))
    experts = [d for _, d in plan.graph.nodes(data=True) if d["kind"] == "expert"]
    assert Counter((d["layer"], d["gpu"] // 4, d["expert"]) for d in experts) == Counter(
        (layer, replica, expert) for layer in (0, 1) for replica in (0, 1) for expert in range(6)
    )
    assert sum(d["shape"][0] for d in experts) == 64 * 2 * 2  # tokens × top-k × layers
    for op, data in plan.graph.nodes(data=True):
        if data["kind"] == "expert":
            (dispatch,) = (
                d for s, _, d in plan.graph.in_edges(op, data=True) if plan.graph.nodes[s]["kind"] == "dispatch"
            )
            assert dispatch["bytes"] == data["shape"][0] * 64 * 2


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches(small: Small, micro_batches: int) -> None:
    plan = planc.compile(small(workload={"micro_batches": micro_batches}, parallelism={"ep": 8, "tp": 2}))
    graph = plan.graph
    assert nx.is_directed_acyclic_graph(graph)
    inner = Counter(d["micro_batch"] for _, d in graph.nodes(data=True) if "layer" in d)
    assert set(inner) == set(range(micro_batches))
    assert len(set(inner.values())) == 1
    for source, target in graph.edges:  # micro-batches meet only at the ends
        a, b = graph.nodes[source], graph.nodes[target]
        assert a["micro_batch"] == b["micro_batch"] or a["kind"] == "input_split" or b["kind"] == "output_collect"


def test_arrays_from_listed_pairs_equal_arrays_from_patterns(example: Compiled) -> None:
    from dataclasses import replace

    plan = example("moe-4l-16gpu-baseline")
    listed = []
    for number, edge in enumerate(plan.blocks.edges):
        listed.append(replace(edge, pattern="pairs", pairs=np.stack(plan.expanded.pairs(number), axis=1)))
    again = expand(replace(plan.blocks, edges=tuple(listed)))
    assert (again.source == plan.expanded.source).all()
    assert (again.target == plan.expanded.target).all()


@pytest.mark.parametrize("numbers", [[5], [0, 1], [0, 2], [0, 1, 2, 7], [3, 4, 8, 9], [0, 2, 4], list(range(8, 16))])
def test_ranges_read_back(numbers: list[int]) -> None:
    assert parse_ranges(range_text(numbers)) == numbers
    assert ("," in range_text(numbers)) == (numbers[-1] - numbers[0] != len(numbers) - 1)
