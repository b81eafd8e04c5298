"""What comes out is never worse than what it was compared with, the same for any number of processes, and marked when cut
short."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planc.planner import Fabric, Group, Problem, Width, certificate, plan_groups, tables_of
from planc.planner import plan as planning
from planc.planner.layer import plan_unit
from planc.planner.objectives import layer_links
from planc.planner.tables import EMPTY
from planc.routing.tokens import Skew, generate_tokens
from planc.routing.traffic import Traffic, generated
from planc.spec import load_cluster
from planc.topology import topology

STRUCTURE = {
    "topics": Skew("lognormal", 0.5, 6, 3.0),
    "skew alone": Skew("zipf", 0.8),
    "none": Skew(),
    "groups": Skew("lognormal", 0.5, 4, 2.0, groups=4, top_groups=2),
}


def problem_of(slots: int = 1, copies: int = 32, **changes: object) -> Problem:
    ranks = np.arange(32)
    fabric = Fabric(topology(load_cluster("h100-sxm-4x8")), ranks, ranks[:, None])
    made = Problem(fabric, 32, slots, copies, Width(7168, 14336), "dedup", "link", 0)
    return replace(made, **changes)


def traffic_of(name: str, layers: int = 3, tokens: int = 800, seed: int = 0) -> Traffic:
    return generated(STRUCTURE[name], tokens=tokens, layers=layers, experts=32, top_k=3, sources=32, seed=seed)


def planned(problem: Problem, traffic: Traffic, scenarios: tuple[Traffic, ...] = (), **more):
    group = Group(problem, tuple(range(traffic.layers)), **more)
    found = plan_groups([group], traffic, scenarios, top_k=3, workers=1)
    record = certificate(found, traffic, scenarios, layers=range(traffic.layers), tokens=None, expert_bytes=None)
    return tables_of(found), record


def check_tables(tables: np.ndarray, experts: int, copies: int) -> None:
    for table in tables:
        held = table[table != EMPTY]
        assert len(held) == copies and len(np.unique(held)) == experts
        assert all(len(set(row)) == len(row) for row in ([e for e in r if e != EMPTY] for r in table.tolist()))


@pytest.mark.parametrize("objective", ["link", "balance"])
@pytest.mark.parametrize("transfer", ["dedup", "direct"])
@pytest.mark.parametrize("name", STRUCTURE)
def test_never_worse_than_what_it_was_compared_with(name: str, transfer: str, objective: str) -> None:
    problem = problem_of(transfer=transfer, objective=objective, groups=4 if name == "groups" else 1)
    tables, record = planned(problem, traffic_of(name))
    check_tables(tables, 32, 32)
    first = record.held_out.link_seconds if objective == "link" else record.held_out.imbalance
    assert record.held_out.tokens == 200
    assert {"identity", "greedy", "longest_first", "result"} <= first.keys()
    assert first["result"] <= min(first.values()) * (1 + 1e-9)
    assert sum(record.held_out.chosen.values()) == 3
    o, b = record.objectives, record.bounds
    assert o.dedup is not None and b.dedup_seconds is not None and o.dedup.seconds >= b.dedup_seconds > 0
    assert o.direct is not None and b.direct_seconds is not None and o.direct.seconds >= b.direct_seconds > 0
    assert o.imbalance == pytest.approx(b.imbalance)  # one slot and no spare: the loads decide
    if name == "topics" and objective == "link":
        assert first["result"] < 0.95 * first["identity"]


@pytest.mark.parametrize(("slots", "copies"), [(1, 32), (2, 64), (2, 40), (3, 96)])
def test_slots_and_copies(slots: int, copies: int) -> None:
    for objective in ("link", "balance"):
        tables, record = planned(problem_of(slots, copies, objective=objective), traffic_of("topics", 2))
        check_tables(tables, 32, copies)
        assert np.ptp((tables != EMPTY).sum(axis=2), axis=1).max() <= 1
        assert record.copies == copies and record.slots == slots


def test_copies_relieve_links_and_even_loads() -> None:
    plain, spare = (planned(problem_of(s, c), traffic_of("skew alone", 2))[1] for s, c in ((1, 32), (2, 64)))
    assert spare.objectives.imbalance < 0.8 * plain.objectives.imbalance
    assert spare.objectives.dedup.seconds < plain.objectives.dedup.seconds


def test_better_on_tokens_nobody_has_seen() -> None:
    """A fresh sample of the same structured distribution: busiest links at least 10 % below identity placement."""
    skew, problem = STRUCTURE["topics"], problem_of()
    tables, _ = planned(problem, traffic_of("topics", 2, 3000))
    fresh = generate_tokens(tokens=20_000, layers=2, experts=32, top_k=3, sources=32, skew=skew, seed=0, sample=1)
    identity = np.arange(32, dtype=np.int32)[:, None]
    for layer in range(2):
        mine, plain = (
            layer_links(problem.fabric, t, fresh.topk[:, layer], fresh.source.astype(int), 32, "dedup", problem.width)
            for t in (tables[layer], identity)
        )
        assert mine.seconds < 0.9 * plain.seconds


def test_what_runs_now_stays_when_nothing_is_better() -> None:
    tables, _ = planned(problem_of(), traffic_of("topics"))
    again, record = planned(problem_of(), traffic_of("topics"), current=tables)
    assert np.array_equal(again, tables)
    assert record.objectives.bytes_to_move == 0
    other = np.random.default_rng(0).permuted(tables, axis=1)
    record = planned(problem_of(), traffic_of("topics"), current=other)[1]
    assert 0 < record.objectives.bytes_to_move <= 3 * 32


def test_scenarios_are_planned_for_together() -> None:
    one, two = traffic_of("topics"), traffic_of("topics", tokens=500, seed=9)
    alone, both = planned(problem_of(), one)[1], planned(problem_of(), one, (two,))[1]
    assert both.objectives.worst_case_seconds >= both.objectives.dedup.seconds
    assert both.bounds.worst_case_seconds <= both.objectives.worst_case_seconds
    assert alone.objectives.worst_case_seconds == alone.objectives.dedup.seconds
    assert [s.name for s in both.scenarios] == [two.name]


def test_loads_alone_are_enough() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (4, 2, 32))
    traffic = Traffic("loads", "recorded: loads", 32, loads, None)
    tables, record = planned(problem_of(), traffic)
    check_tables(tables, 32, 32)
    assert record.held_out.tokens > 0 and record.objectives.dedup is not None  # tokens were drawn from them
    _, record = planned(problem_of(objective="balance"), traffic)
    assert record.objectives.dedup is None and record.held_out.link_seconds == {} and record.kinds == []


def test_layers_that_share_slots_are_planned_together() -> None:
    """Four layers of eight experts on 32 holders of one slot: no holder has two experts in all."""
    problem = replace(problem_of(), experts=8)
    traffic = generated(STRUCTURE["topics"], tokens=400, layers=4, experts=8, top_k=2, sources=32, seed=0)
    group = Group(problem, (0, 1, 2, 3), together=True)
    tables = tables_of(plan_groups([group], traffic, [], top_k=2, workers=1))
    assert tables.shape == (4, 32, 1)
    assert ((tables != EMPTY).sum(axis=(0, 2)) == 1).all()
    assert all(sorted(t[t != EMPTY].tolist()) == list(range(8)) for t in tables)


def test_the_same_for_any_number_of_processes() -> None:
    group, traffic = Group(problem_of(), (0, 1, 2)), traffic_of("topics")
    records = []
    for workers in (1, 2):
        found = plan_groups([group], traffic, [], top_k=3, workers=workers)
        record = certificate(found, traffic, [], layers=range(3), tokens=None, expert_bytes=None)
        records.append((tables_of(found).tobytes(), record.model_dump()))
    assert records[0] == records[1]


def test_the_seed_is_part_of_the_plan() -> None:
    small = Problem(
        Fabric(topology(load_cluster("h100-sxm-2x8")), np.arange(16), np.arange(16)[:, None]),
        16, 1, 16, Width(1, 1), "dedup", "link", 0,
    )  # fmt: skip
    traffic = generated(Skew("lognormal", 1.0, 3, 2.0), tokens=300, layers=4, experts=16, top_k=2, sources=16, seed=0)
    tables = [planned(replace(small, seed=seed), traffic)[0] for seed in (0, 0, 1)]
    assert np.array_equal(tables[0], tables[1])


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    group = Group(problem_of(), (0, 1, 2))
    plan_groups([group], traffic_of("none"), [], top_k=3, workers=1, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_ctrl_c_keeps_what_was_found_or_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def interrupted(problem, unit, *, search: bool = True):
        calls.append(search)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plan_unit(problem, unit, search=search)

    monkeypatch.setattr(planning, "plan_unit", interrupted)
    group, traffic = Group(problem_of(), (0, 1, 2)), traffic_of("topics")
    found = plan_groups([group], traffic, [], top_k=3, workers=1, stop=True)
    assert found.interrupted and calls == [True, True, False, False]
    check_tables(tables_of(found), 32, 32)
    record = certificate(found, traffic, [], layers=range(3), tokens=None, expert_bytes=None)
    assert (record.interrupted and "planc" not in record.held_out.chosen) or record.held_out.chosen["planc"] == 1
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        plan_groups([group], traffic, [], top_k=3, workers=1)
