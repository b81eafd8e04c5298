"""The best of a declared space, against every candidate simulated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_specs import MOE, ROOT, small_spec

import planc
from planc.search.answer import Question, answer
from planc.search.evaluate import Evaluator, Outcome
from planc.search.explore import Explorer, Goal
from planc.search.pools import best_prefill, prompt_tokens, splits
from planc.search.space import Shape, declared, shapes

WIDE = {"hidden": 1024, "vocab": 4096, "moe": MOE | {"intermediate": 512, "experts": 8}}
BATCHES = (1, 3, 40, 256, 1024)


def shipped(name: str, *sets: str) -> planc.Spec:
    return planc.load_spec(ROOT / "specs" / f"{name}.yaml", list(sets))


#: name -> (spec, axes that are closed)
SPACES: dict[str, tuple[planc.Spec, dict[str, tuple[Any, ...]]]] = {
    "small": (small_spec(model=WIDE), {"micro_batches": (1, 2), "expert_tp": (1, 2), "pp": (1,)}),
    "no vocabulary": (small_spec(), {"micro_batches": (1, 2), "expert_tp": (1,), "gpus": (2, 4, 8)}),
    "together": (
        small_spec(model=WIDE, execution={"serving": "together"}),
        {"pp": (1,), "expert_tp": (1,), "micro_batches": (1,)},
    ),
    "mixtral": (
        shipped("mixtral-8x7b"),
        {"pp": (1,), "expert_tp": (1,), "micro_batches": (1, 2), "gating": ("sharded",)},
    ),
}
GOALS = (
    Goal(),
    Goal("tpot"),
    Goal("tps-per-gpu", one_expert_per_gpu=True),
    Goal("tps", one_expert_per_gpu=False),
    "median tpot",
    "median ttft",
    "fewest gpus",
)


class Whole:
    """Every candidate of a space, simulated."""

    def __init__(self, name: str) -> None:
        self.spec, axes = SPACES[name]
        self.asked = axes | {"batch": BATCHES}
        self.evaluator = Evaluator(self.spec)
        self.calls = 0
        found, _ = shapes(self.spec, declared(self.spec, self.asked))
        self.rows = []
        for shape in found:
            for batch in BATCHES:
                row = self.evaluator.outcome(shape, batch, ttft=True).row
                if row is not None:
                    self.rows.append((shape, batch, row))

    def evaluate(self, asked: list[tuple[Shape, int]], *, whole: bool = False) -> list[Outcome]:
        self.calls += len(asked)
        return [self.evaluator.outcome(*one, ttft=True, whole=whole) for one in asked]

    def goal(self, asked: Goal | str) -> Goal:
        """A goal whose bounds some candidates keep and some miss."""
        if isinstance(asked, Goal):
            return asked
        if asked == "median tpot":
            return Goal("tps", tpot=float(np.median([row["tpot_s"] for *_, row in self.rows])))
        if asked == "median ttft":
            return Goal("tps", ttft=float(np.median([row["ttft_s"] for *_, row in self.rows if row["ttft_s"]])))
        return Goal("gpus", tps=float(np.median([row["tps"] for *_, row in self.rows])))

    def best(self, goal: Goal, explorer: Explorer) -> list[float]:
        """What the best candidate of every shape is worth, best first."""
        worth: dict[Shape, float] = {}
        for shape, _, row in self.rows:
            kept = goal.one_expert_per_gpu is None or goal.one_expert_per_gpu is explorer.one_expert(shape)
            if kept and goal.keeps(row):
                worth[shape] = max(worth.get(shape, -np.inf), goal.worth(row))
        return sorted(worth.values(), reverse=True)


WHOLE: dict[str, Whole] = {}


@pytest.fixture(params=SPACES)
def whole(request: pytest.FixtureRequest) -> Whole:
    if request.param not in WHOLE:
        WHOLE[request.param] = Whole(request.param)
    return WHOLE[request.param]


@pytest.mark.parametrize("asked", GOALS, ids=str)
def test_the_best_five_are_those_of_all_candidates(whole: Whole, asked: Goal | str) -> None:
    goal = whole.goal(asked)
    explorer = Explorer(whole.spec, declared(whole.spec, whole.asked), whole.evaluate)
    want = whole.best(goal, explorer)[:5]
    found = explorer.search(goal, top=5)
    assert found.optimal
    assert [goal.worth(one.row) for one in found.top] == pytest.approx(want, rel=1e-12)
    assert want or found.nearest is None or not goal.keeps(found.nearest.row) or goal.one_expert_per_gpu is not None


def test_few_candidates_are_simulated(whole: Whole) -> None:
    """The bounds leave most of them out; least where prefill takes turns, of which they know nothing."""
    explorer = Explorer(whole.spec, declared(whole.spec, whole.asked), whole.evaluate)
    explorer.search(Goal())
    assert 0 < len(explorer.known) < len(whole.rows) / (1 if whole.spec.execution.serving == "together" else 3)


@pytest.mark.parametrize("asked", [Goal(), "median tpot"], ids=str)
def test_every_candidate_is_simulated_or_has_a_reason(whole: Whole, asked: Goal | str) -> None:
    goal = whole.goal(asked)
    explorer = Explorer(whole.spec, declared(whole.spec, whole.asked), whole.evaluate)
    explorer.search(goal, top=3)
    pruned = explorer.pruned(goal)
    assert pruned.total() + len(explorer.known) == explorer.candidates
    assert all(count > 0 for count in pruned.values())


def test_a_search_that_stops_early_says_what_the_rest_could_be_worth(whole: Whole) -> None:
    explorer = Explorer(whole.spec, declared(whole.spec, whole.asked), whole.evaluate)
    found = explorer.search(Goal("tpot"), top=40, most=5)
    assert not found.optimal and found.most is not None
    assert found.most >= max(goal_worth for goal_worth in whole.best(Goal("tpot"), explorer)[4:])


def test_every_point_of_the_front_is_the_best_under_its_bound(whole: Whole) -> None:
    record = answer(whole.spec, Question(Goal(), whole.asked, top=1, front=4), whole.evaluate)
    assert record["front"]
    for point in record["front"]:
        bound = point["tpot_bound_s"]
        inside = [row["tps_per_gpu"] for *_, row in whole.rows if bound is None or row["tpot_s"] <= bound]
        assert point["tps_per_gpu"] == pytest.approx(max(inside), rel=1e-12)
        assert not [
            row
            for *_, row in whole.rows
            if row["tpot_s"] < point["tpot_s"] * (1 - 1e-9) and row["tps_per_gpu"] > point["tps_per_gpu"] * (1 + 1e-9)
        ]


def test_what_was_simulated_is_taken_over(whole: Whole) -> None:
    question = Question(Goal(), whole.asked, top=3, front=2)
    first = answer(whole.spec, question, whole.evaluate)
    before = whole.calls
    again = answer(whole.spec, question, whole.evaluate, known=first)
    assert whole.calls - before < (before if before < 100 else 100)  # the reported rows, whole, and the baselines
    for key in ("winner", "top", "front", "baselines", "candidates", "optimal"):
        assert again[key] == first[key], key


@pytest.mark.parametrize("ttft", [None, 0.2])
def test_the_best_prefill_is_that_of_all(ttft: float | None) -> None:
    spec = shipped("mixtral-8x7b")
    own = Evaluator(spec)
    closed = {"pp": (1,), "gating": ("sharded",), "tp": (1, 2), "tp_comm": ("all_reduce",)}
    found = best_prefill(own, Goal(ttft=ttft), closed, 8)
    axes = closed | {"expert_tp": (1,), "split": ("balanced",), "spares": ("idle",)}
    every, _ = shapes(spec, declared(spec, axes | {"micro_batches": (1, 2), "gpus": (8,)}))
    rates = []
    for shape in every:
        for tokens in prompt_tokens(spec).tolist():
            row = own.prefill(shape, tokens * shape.micro_batches).row if tokens % shape.tp == 0 else None
            if row is not None and (ttft is None or row["ttft_s"] <= ttft):
                rates.append(row["prompts_per_s"])
    assert found is not None and found[2].row is not None
    assert found[2].row["prompts_per_s"] == pytest.approx(max(rates), rel=1e-12)


def test_pools_share_whole_nodes() -> None:
    assert splits(small_spec(cluster={"groups": [{"nodes": 4, "gpus_per_node": 8}]})) == [(8, 24), (16, 16), (24, 8)]
    assert splits(shipped("mixtral-8x7b")) == [(4, 4)]
    assert len(splits(shipped("deepseek-v3-128gpu", "cluster=h100-sxm-128x8", "parallelism.ep=auto"))) == 15
