"""What a search answers is what simulating every candidate of a small space says."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from small_specs import GPU, MOE, small_spec

import planc
from planc.search.answer import QUICKEST, Question, answer
from planc.search.evaluate import Evaluator, Outcome
from planc.search.explore import Explorer, Goal
from planc.search.space import Shape, declared, shapes, slots_of

BATCHES = (3, 64, 512)
FEW: dict[str, tuple[Any, ...]] = {"pp": (1, 2), "micro_batches": (1, 2), "split": ("balanced",), "batch": BATCHES}
WIDE = {"hidden": 512, "moe": MOE | {"intermediate": 256}}
LONG = {"isl": 2048}
TWO_KINDS = [
    {"nodes": 1, "gpus_per_node": 4, "gpu": GPU | {"memory": "60 MB"}},
    {"nodes": 1, "gpus_per_node": 4, "gpu": GPU | {"name": "slow", "memory_bandwidth": "500 GB/s", "memory": "90 MB"}},
]
#: name -> (spec, axes)
SPACES: dict[str, tuple[planc.Spec, dict[str, tuple[Any, ...]]]] = {
    "small": (
        small_spec(model=WIDE, workload=LONG, gpu={"memory": "60 MB"}),
        FEW | {"expert_tp": (1, 2), "dp": (1, 2)},
    ),
    "vocab": (
        small_spec(model=WIDE | {"vocab": 999}, workload=LONG, gpu={"memory": "60 MB"}),
        FEW | {"dp": (1,), "expert_tp": (1, 2), "micro_batches": (1,)},
    ),
    "sizes": (small_spec(gpu={"memory": "2 MB"}), FEW | {"gpus": (2, 4, 8), "expert_tp": (1,), "pp": (1,)}),
    "scopes": (
        small_spec(),
        FEW | {"scope": ("layer", "model", "none"), "expert_tp": (1,), "tp": (1, 2), "dp": (1, 2)},
    ),
    "spares": (small_spec(model=WIDE | {"moe": MOE | {"experts": 6}}), FEW | {"expert_tp": (1,), "ep": (4, 8)}),
    "together": (small_spec(), FEW | {"serving": ("apart", "together"), "expert_tp": (1,), "dp": (1,)}),
    "dense": (small_spec(model={"moe": None, "dense_mlp": {"intermediate": 64}}), FEW),
    "two kinds": (small_spec(model=WIDE, cluster={"groups": TWO_KINDS}), FEW | {"expert_tp": (1,), "dp": (1, 2)}),
    "dtypes": (small_spec(model=WIDE), FEW | {"dtypes.dispatch": ("fp8", "bf16"), "ep": (8,), "expert_tp": (1,)}),
    "memory alone": (
        small_spec(gpu={"memory": "400 kB"}, workload={"isl": 60}),
        {"pp": (1,), "ep": (4,), "tp": (1, 2), "expert_tp": (1,), "micro_batches": (1,)},
    ),
}


class Space:
    """A space of which every candidate is simulated, once."""

    def __init__(self, name: str) -> None:
        self.spec, self.asked = SPACES[name]
        self.evaluator = Evaluator(self.spec)
        self.known: dict[tuple[Shape, int], Outcome] = {}
        found, _ = shapes(self.spec, declared(self.spec, self.asked))
        batches = self.asked.get("batch", range(1, 80))
        self.every = {
            (s, b): row for s in found for b in batches if (row := self.evaluate([(s, b)])[0].row) is not None
        }
        assert self.every

    def evaluate(self, wanted: list[tuple[Shape, int]], *, whole: bool = False) -> list[Outcome]:
        for one in wanted:
            if one not in self.known:
                self.known[one] = self.evaluator.outcome(*one, ttft=True)
        return [self.evaluator.outcome(*one, whole=True) if whole else self.known[one] for one in wanted]

    def explorer(self) -> Explorer:
        return Explorer(self.spec, declared(self.spec, self.asked), self.evaluate)

    def best(self, goal: Goal) -> list[float]:
        """What the best batch of every shape is worth, best first."""
        found: dict[Shape, float] = {}
        for (shape, _), row in self.every.items():
            one = self.spec.model.moe is not None and slots_of(self.spec, shape) == 1
            if goal.keeps(row) and (goal.one_expert_per_gpu is None or one is goal.one_expert_per_gpu):
                found[shape] = max(goal.worth(row), found.get(shape, -float("inf")))
        return sorted(found.values(), reverse=True)

    def at(self, key: str, part: float) -> float:
        """The value that so large a part of the candidates stays below."""
        values = sorted(row[key] for row in self.every.values() if row[key] is not None)
        return float(values[int(part * (len(values) - 1))])


space = lru_cache(Space)


def goals(of: Space) -> list[Goal]:
    """Every objective, free and under bounds that some candidates keep."""
    quick, soon, much = of.at("tpot_s", 0.3), of.at("ttft_s", 0.5), of.at("tps", 0.6)
    return [
        *(Goal(objective) for objective in ("tps", "tps-per-gpu", "tpot", "cost", "gpus")),
        *(Goal(objective, tpot=quick) for objective in ("tps", "tps-per-gpu", "tpot")),
        *(Goal(objective, tps=much) for objective in ("tpot", "gpus", "cost")),
        Goal("tps", ttft=soon),
        Goal("tps", quick, soon, of.at("tps", 0.2)),
        Goal("gpus", of.at("tpot_s", 0.7), tps=of.at("tps", 0.4)),
        *(Goal("tps", of.at("tpot_s", 0.6), one_expert_per_gpu=one) for one in (True, False)),
        Goal("tps", of.at("tpot_s", 0.0) / 2),
        Goal("tpot", tps=of.at("tps", 1.0) * 1.1),
        Goal("tps", ttft=of.at("ttft_s", 0.0) / 2),
    ]


@pytest.mark.parametrize("name", SPACES)
def test_the_best_are_those_of_every_candidate(name: str) -> None:
    """In order, whichever goal came before; where shapes are equal any of them."""
    of = space(name)
    explorer = of.explorer()
    refused = 0
    for goal in goals(of):
        every = of.best(goal)
        for top in (1, 5):
            found = explorer.search(goal, top=top)
            assert found.optimal
            worth = [goal.worth(one.row) for one in found.top]
            assert worth == pytest.approx(every[:top], rel=1e-9), goal
            assert all(one.row == of.every[one.shape, one.batch] for one in found.top)
            assert len({one.shape for one in found.top}) == len(found.top)
        refused += not every
        counts_add_up(explorer, goal)
    assert refused >= 3


def counts_add_up(explorer: Explorer, goal: Goal) -> None:
    pruned = explorer.pruned(goal)
    assert explorer.candidates == len(explorer.known) + pruned.total(), (goal, pruned)
    assert all(count > 0 for count in pruned.values())


@pytest.mark.parametrize("name", ["small", "sizes", "together"])
def test_little_is_simulated_for_one_goal(name: str) -> None:
    """A search that simulated all would be right, too."""
    of = space(name)
    explorer = of.explorer()
    explorer.search(Goal("tps", of.at("tpot_s", 0.5)))
    assert 0 < len(explorer.known) < len(of.every) / 4
    counts_add_up(explorer, Goal("tps", of.at("tpot_s", 0.5)))


@pytest.mark.parametrize("name", ["small", "sizes", "dense", "two kinds", "memory alone"])
def test_every_point_of_the_front_is_the_best_under_its_bound(name: str) -> None:
    of = space(name)
    record = answer(of.spec, Question(Goal("tps"), of.asked, front=5), of.evaluate)
    assert len(record["front"]) > 1
    for row in record["front"]:
        goal = Goal("tps-per-gpu", row["tpot_bound_s"])
        assert row["tps_per_gpu"] == pytest.approx(of.best(goal)[0], rel=1e-9)
    first, last = record["front"][0], record["front"][-1]
    assert first["tpot_s"] * (1 - QUICKEST) <= -of.best(Goal("tpot"))[0] and last["tpot_bound_s"] is None
    for before, after in zip(record["front"], record["front"][1:], strict=False):
        assert before["tps_per_gpu"] < after["tps_per_gpu"] and before["tpot_s"] < after["tpot_s"]


@pytest.mark.parametrize("name", ["small", "sizes", "scopes"])
def test_the_record_says_what_was_found(name: str) -> None:
    of = space(name)
    goal = Goal("tps", of.at("tpot_s", 0.5))
    record = answer(of.spec, Question(goal, of.asked, top=5, front=3), of.evaluate)
    assert record["optimal"] and record["winner"] == record["top"][0]
    assert record["winner"]["tps"] == pytest.approx(of.best(goal)[0], rel=1e-9)
    assert record["candidates"] == record["simulated"] + sum(record["pruned"].values())
    assert record["simulated"] == len(record["simulations"])
    for kept, key in ((True, "one_expert_per_gpu"), (False, "several_experts_per_gpu")):
        best = of.best(Goal("tps", goal.tpot, one_expert_per_gpu=kept))
        assert (record[key] and record[key]["tps"]) == (pytest.approx(best[0], rel=1e-9) if best else None)
    assert len(record["top"]) == 5
    assert [row["tps"] for row in record["top"]] == pytest.approx(of.best(goal)[:5], rel=1e-9)


def test_a_search_that_stops_early_says_so() -> None:
    of = space("small")
    explorer = of.explorer()
    found = explorer.search(Goal("tps"), top=5, most=8)
    assert not found.optimal and len(explorer.known) <= 8
    assert found.most is not None and found.most >= of.best(Goal("tps"))[0]
    assert any("stopped" in reason for reason in explorer.pruned(Goal("tps"), optimal=False))


@pytest.mark.parametrize("goal", ["tpot", "ttft", "tps"])
def test_what_cannot_be_names_the_nearest(goal: str) -> None:
    """The bound that binds, and how near the nearest plan comes to it: the best without the bound, of TTFT one of those seen."""
    of = space("small")
    asked = {"tpot": of.at("tpot_s", 0) / 2, "ttft": of.at("ttft_s", 0) / 2, "tps": of.at("tps", 1) * 2}
    with pytest.raises(planc.PlancError) as error:
        answer(of.spec, Question(Goal("tps", **{goal: asked[goal]}), of.asked), of.evaluate)
    [fault] = error.value.diagnostics
    assert fault.code == "PLN430" and goal.upper() in fault.message and fault.path == f"--{goal}"
    assert fault.related[0].startswith("nearest: dp ")
