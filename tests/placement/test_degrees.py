"""Degrees left on auto, compared with a search through all of them; splitting of experts that do not fit; stages."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from small_specs import MOE, Small

import planc
from planc.diagnostics import PlancError
from planc.placement import memory_table, place_experts
from planc.placement.degrees import resolve
from planc.placement.legality import degree_faults, rule_faults
from planc.placement.stages import balanced_stages, make_parallelism

WIDE = {"hidden": 1024, "attention": {"heads": 16, "head_dim": 64}, "layers": 4}


def fitting(spec: planc.Spec, expert_tp: int = 1) -> list[tuple[int, int, int, int]]:
    """(dp, pp, ep, tp) of every choice of degrees that is legal and fits, found by trying all of them."""
    gpus = spec.cluster.gpus
    found = []
    for dp, pp, ep, tp in itertools.product(range(1, gpus + 1), repeat=4):
        if dp * pp * ep != gpus or ep % tp or pp > spec.model.layers:
            continue
        degrees = {"dp": dp, "pp": pp, "ep": ep, "tp": tp, "expert_tp": expert_tp}
        if degree_faults(spec, degrees):
            continue
        par = make_parallelism(spec, degrees)
        if not rule_faults(spec, par) and memory_table(spec, par, place_experts(spec, par)).fits:
            found.append((dp, pp, ep, tp))
    return found


@pytest.mark.parametrize("memory", ["60 MB", "30 MB", "20 MB", "14 MB", "9 MB", "7 MB"])
@pytest.mark.parametrize("asked", [{"dp": 1, "pp": 1}, {}, {"dp": 1}, {"pp": 1}])
def test_the_smallest_tp_that_fits(small: Small, memory: str, asked: dict[str, Any]) -> None:
    spec = small(model=WIDE, gpu={"memory": memory}, parallelism={"dp": "auto"} | asked, workload={"batch": 16})
    good = [d for d in fitting(spec) if all(d[("dp", "pp").index(k)] == v for k, v in asked.items())]
    if not good:
        with pytest.raises(planc.PlancError) as error:
            resolve(spec)
        assert {d.code for d in error.value.diagnostics} <= {"PLN201", "PLN204"}
        return
    placed = resolve(spec)
    par = placed.par
    chosen = (par.dp, par.pp, par.ep, par.tp)
    assert chosen in good
    assert par.tp == min(tp for dp, pp, ep, tp in good if (dp, pp, ep) == chosen[:3])
    assert par.pp == min(pp for _, pp, _, _ in good)
    assert placed.memory.fits


def test_the_reasons_name_what_was_passed_over(small: Small) -> None:
    spec = small(model=WIDE, gpu={"memory": "20 MB"}, parallelism={"dp": 1, "pp": 1}, workload={"batch": 16})
    placed = resolve(spec)
    assert placed.par.tp == 4
    assert "tp 2 needs" in placed.reasons["tp"]
    assert placed.reasons["dp"] == "given in the spec"


def test_the_smallest_group_with_a_slot_for_every_expert(small: Small) -> None:
    spec = small(parallelism={"dp": "auto"}, model={"moe": MOE | {"experts": 4}})
    par = resolve(spec).par
    assert (par.dp, par.ep) == (2, 4)
    assert resolve(small(parallelism={"dp": "auto"}, model={"moe": MOE | {"experts": 5}})).par.ep == 8
    assert resolve(small(parallelism={"dp": "auto"}, model={"moe": MOE | {"experts": 50}})).par.ep == 8  # in rounds


def test_tp_stays_in_the_smallest_node(small: Small) -> None:
    cluster = {"groups": [{"nodes": 1, "gpus_per_node": 8}, {"nodes": 2, "gpus_per_node": 4}]}
    for tp, code in ((4, ""), (8, "PLN105")):
        spec = small(cluster=cluster, parallelism={"dp": 1, "pp": 1, "ep": 16, "tp": tp})
        if code:
            with pytest.raises(planc.PlancError) as error:
                planc.compile(spec)
            assert [d.code for d in error.value.diagnostics] == [code]
        else:
            assert planc.compile(spec).parallelism.tp == tp


# --- experts that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "split"), [("10 MB", 1), ("6 MB", 2), ("5.9 MB", 2), ("2.6 MB", 4)])
def test_an_expert_that_does_not_fit_is_split(small: Small, memory: str, split: int) -> None:
    """One expert is 2 × 512 × 2048 parameters = 4,194,304 B; attention is 40,960 B a layer."""
    model = {
        "hidden": 512,
        "layers": 1,
        "attention": {"heads": 4, "head_dim": 4},
        "moe": MOE | {"experts": 2, "intermediate": 2048},
    }
    spec = small(
        model=model,
        gpu={"memory": memory, "reserve": 0.3},
        parallelism={"dp": 1, "pp": 1},
        workload={"batch": 8, "isl": 1},
    )
    plan = planc.compile(spec)
    assert plan.parallelism.expert_tp == split
    assert plan.memory.items["experts"].max() == 4_194_304 // split
    shards = [d for _, d in plan.graph.nodes(data=True) if d["kind"] == "expert"]
    assert sorted(d["expert"] for d in shards) == sorted([0, 1] * split)
    for expert in (0, 1):
        ranks = [d["gpu"] for d in shards if d["expert"] == expert]
        assert len({plan.spec.cluster.domain_of_rank[r] for r in ranks}) == 1
    sums = [d for _, d in plan.graph.nodes(data=True) if d["kind"] == "all_reduce" and d.get("layout") == "S(experts)"]
    assert len(sums) == (2 if split > 1 else 0)


def test_an_expert_larger_than_a_domain_is_refused(small: Small) -> None:
    model = {"moe": MOE | {"experts": 2, "intermediate": 65536}}
    with pytest.raises(planc.PlancError) as error:
        planc.compile(small(model=model, gpu={"memory": "3 MB"}))
    assert {d.code for d in error.value.diagnostics} <= {"PLN201", "PLN204"}


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "costs", [[1.0] * 7, [5.0, 1.0, 1.0, 1.0, 4.0], [1.0, 9.0, 1.0, 1.0], [2.0, 2.0, 3.0, 1.0, 1.0, 6.0]]
)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_as_even_as_can_be(costs: list[float], stages: int) -> None:
    found = balanced_stages(costs, stages)
    assert [first for first, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == len(costs)
    assert all(first < end for first, end in found)
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts)
    assert max(sum(costs[a:b]) for a, b in found) == best


@pytest.mark.parametrize("batch", [200, 2_000, 4_000])
def test_the_nodes_that_a_refusal_names_do_fit(small: Small, batch: int) -> None:
    """More nodes with the degree that the hint raises, everything else the same: the plan fits."""
    parts: dict[str, Any] = {"gpu": {"memory": "3 MB"}, "workload": {"batch": batch, "isl": 256}}
    degrees = {"dp": 1, "pp": 1, "ep": 8, "tp": 1, "expert_tp": 1}
    with pytest.raises(PlancError) as caught:
        resolve(small(**parts, parallelism=degrees))
    (fault,) = caught.value.diagnostics
    hint = re.search(r"use (\d+) nodes \((\w+) (\d+)\)", fault.hint)
    assert fault.code == "PLN201" and hint is not None, fault.hint
    nodes = {"groups": [{"nodes": int(hint[1]), "gpus_per_node": 4}]}
    resolve(small(**parts, parallelism=degrees | {hint[2]: int(hint[3])}, cluster=nodes))
