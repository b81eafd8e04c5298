"""What a search relies on: no simulated step is shorter than its bound, nor than what steps of the same shape foretell.

A few hundred steps in a usual run; PLANC_EXAMPLES=2000 draws so many random specs, others every time (`make nightly`).
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_specs import predicted_specs
from small_specs import GPU, LINKS, MOE, ROOT, small_spec

import planc
from planc.cost.book import PriceBook
from planc.placement import largest_that_fits, place_experts
from planc.placement.stages import make_parallelism
from planc.search.bound import Bounds
from planc.search.evaluate import Evaluator
from planc.search.explore import SLACK, Explorer
from planc.search.pools import prompt_tokens
from planc.search.space import Shape, declared, shapes, spec_of

ASKED = int(os.environ.get("PLANC_EXAMPLES", "0"))
RUN = settings(
    max_examples=ASKED or 12,
    deadline=None,
    derandomize=not ASKED,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a step takes too long to look for smaller specs
)
TOKENS = (1, 2, 3, 4, 7, 8, 16, 24, 64, 100, 136, 512, 2048)
SCOPES = {"scope": ("layer", "model")}
WIDE = {"hidden": 1024, "moe": MOE | {"intermediate": 512}}
MLA = {"kind": "mla", "heads": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
TWO_KINDS = [
    {"nodes": 1, "gpus_per_node": 4},
    {"nodes": 1, "gpus_per_node": 4, "gpu": GPU | {"name": "slow", "memory_bandwidth": "500 GB/s"}},
]


def shipped(name: str, *sets: str) -> planc.Spec:
    return planc.load_spec(ROOT / "specs" / f"{name}.yaml", list(sets))


#: name -> (spec, axes, steps to look at)
SPECS: dict[str, tuple[planc.Spec, dict[str, tuple[Any, ...]], int]] = {
    "small": (small_spec(), SCOPES, 30),
    "wide": (small_spec(model=WIDE), SCOPES, 30),
    "gqa": (small_spec(model=WIDE | {"attention": {"kind": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 8}}), {}, 20),
    "mla": (small_spec(model={"attention": MLA}), {}, 20),
    "vocab": (small_spec(model={"vocab": 32_001, "norm": "rms"}), {}, 20),
    "shared": (small_spec(model=WIDE | {"moe": MOE | {"shared_experts": 1}}), {}, 30),
    "shared beside sums": (  # of expert shards, on the other stream
        small_spec(
            model={"hidden": 1024, "moe": {"experts": 2, "top_k": 1, "intermediate": 32, "shared_experts": 1}},
            cluster={"groups": [{"nodes": 1, "gpus_per_node": 2}]},
        ),
        {"expert_tp": (2,), "ep": (2,), "pp": (1,), "micro_batches": (1,)},
        20,
    ),
    "spare": (small_spec(model=WIDE | {"moe": MOE | {"experts": 6}}), {"spares": ("replicate",), "ep": (4, 8)}, 20),
    "layers": (small_spec(model={"layers": 6, "first_k_dense": 2, "dense_mlp": {"intermediate": 64}}), {}, 20),
    "dense": (small_spec(model={"moe": None, "dense_mlp": {"intermediate": 64}}), {}, 20),
    "none": (small_spec(expert_rule="none"), {}, 10),
    "fp8": (small_spec(model=WIDE), {"dtypes.dispatch": ("fp8", "bf16"), "dtypes.kv_cache": ("fp8",)}, 20),
    "chunks": (small_spec(model=WIDE, execution={"expert_chunks": 2}), {}, 20),
    "streams": (small_spec(execution={"compute_streams": 2, "communication_streams": 2}), {}, 20),
    "normal": (small_spec(model=WIDE, execution={"all_to_all": "normal"}), {}, 20),
    "leaf": (small_spec(cluster={"links": LINKS | {"leaf": {"nodes": 1, "oversubscription": 4.0}}}), {}, 20),
    "two kinds": (small_spec(model=WIDE, cluster={"groups": TWO_KINDS}), {}, 20),
    "domains": (small_spec(cluster={"groups": [{"nodes": 2, "gpus_per_node": 4, "nvlink_domain": 2}]}), {}, 10),
    "mixtral": (shipped("mixtral-8x7b"), SCOPES, 12),
    "prompts": (shipped("mixtral-8x7b", "workload.isl=16384", "workload.prefill_chunk=16384"), {}, 12),
    "moe-4l": (shipped("moe-4l-64gpu", "cluster=reference-h100-4x8"), SCOPES, 20),
    "deepseek": (shipped("deepseek-v3-128gpu", "cluster=h100-sxm-4x8"), {}, 5),
    "deepseek, 2 nodes": (shipped("deepseek-v3-128gpu", "cluster=h200-sxm-2x8", "workload.isl=512"), {}, 5),
    "hetero": (shipped("hetero-h100-h200"), {"ep": (16, 32, 64)}, 8),
}


class Steps:
    """Bounds beside simulated steps, of one spec."""

    def __init__(self, spec: planc.Spec, axes: dict[str, tuple[Any, ...]], tokens: tuple[int, ...] = TOKENS) -> None:
        self.spec, self.grid = spec, np.array(tokens)
        self.shapes, _ = shapes(spec, declared(spec, axes))
        self.bounds, self.evaluator = Bounds(spec, PriceBook(), self.grid), Evaluator(spec)

    def points(self, shape: Shape) -> list[int]:
        return [p for p, t in enumerate(self.grid) if shape.leaders or t % shape.tp == 0]

    def simulated(self, shape: Shape, point: int) -> float | None:
        """Seconds of the step; None for what is no plan."""
        batch = int(self.grid[point]) * shape.groups * shape.micro_batches
        row = self.evaluator.outcome(shape, batch).row
        return None if row is None else float(row["step_s"])


STEPS: dict[str, Steps] = {}


@pytest.fixture(params=SPECS)
def drawn(request: pytest.FixtureRequest) -> tuple[Steps, random.Random, int]:
    spec, axes, count = SPECS[request.param]
    steps = STEPS.setdefault(request.param, Steps(spec, axes))
    return steps, random.Random(request.param), count


def test_no_step_is_shorter_than_its_bound(drawn: tuple[Steps, random.Random, int]) -> None:
    steps, rng, count = drawn
    seen = 0
    for _ in range(count):
        shape = rng.choice(steps.shapes)
        point = rng.choice(steps.points(shape))
        step = steps.simulated(shape, point)
        if step is not None:
            seen += 1
            assert 0 < steps.bounds.step(shape)[point] <= step, (shape, steps.grid[point])
    assert seen >= count // 3  # the others overflow memory


@pytest.mark.parametrize("name", ["vocab", "mixtral", "deepseek", "deepseek, 2 nodes"])
def test_bounds_of_plain_steps_are_near(name: str) -> None:
    """One micro-batch, stage and stream, GPUs of one kind, every rank gates, whole experts, a vocabulary (so that the way in and
    out is no part of the period): the bound is nearly the step, and few candidates need a simulation."""
    spec, axes, count = SPECS[name]
    steps = STEPS.setdefault(name, Steps(spec, axes))
    plain = [s for s in steps.shapes if s.micro_batches == s.pp == s.expert_tp == 1 and not s.leaders]
    rng = random.Random(name)
    for _ in range(-(-count // 2)):
        shape = rng.choice(plain)
        point = rng.choice(steps.points(shape))
        step = steps.simulated(shape, point)
        assert step is None or steps.bounds.step(shape)[point] >= 0.98 * step, (shape, steps.grid[point])


def test_steps_of_a_shape_bound_each_other(drawn: tuple[Steps, random.Random, int]) -> None:
    """`Bounds.scale` less `SLACK`: what is an assumption, not a theorem."""
    steps, rng, count = drawn
    for _ in range(-(-count // 2)):
        shape = rng.choice(steps.shapes)
        points = steps.points(shape)
        those_hold_each_other(steps, shape, rng.sample(points, min(2, len(points))))


def those_hold_each_other(steps: Steps, shape: Shape, points: list[int]) -> None:
    found = {p: step for p in points if (step := steps.simulated(shape, p)) is not None}
    for one, seconds in found.items():
        least = steps.bounds.scale(shape, one) * seconds
        assert least[one] == pytest.approx(seconds)
        for other, step in found.items():
            assert step >= least[other] * (1 - SLACK), (shape, steps.grid[one], steps.grid[other])


@pytest.mark.parametrize("name", ["small", "mla", "mixtral", "deepseek"])
def test_limits_of_memory_are_the_largest_batches(name: str) -> None:
    """To the grid, what `planc build` says is the largest batch that fits."""
    spec, _, _ = SPECS[name]
    explorer = Explorer(spec, declared(spec, {"split": ("even",)}), lambda asked, whole=False: [])
    for number in random.Random(name).sample(range(len(explorer.shapes)), 10):
        shape = explorer.shapes[number]
        least = spec_of(spec, shape, 1)
        par = make_parallelism(least, {key: getattr(shape, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")})
        batch = largest_that_fits(least, par, place_experts(least, par), "batch")
        assert explorer.fitting(number) == (explorer.batches(shape) <= batch).sum(), shape


@pytest.mark.parametrize("name", ["small", "gqa", "mla", "spare", "two kinds", "moe-4l", "deepseek, 2 nodes"])
def test_limits_of_memory_are_those_of_the_memory_table(name: str) -> None:
    """The most tokens of the grid that fit, no more and no fewer; the rough limit is never below."""
    spec, axes, _ = SPECS[name]
    explorer = Explorer(spec, declared(spec, axes), lambda asked, whole=False: [])
    evaluator, rng = Evaluator(spec), random.Random(name)
    for number in rng.sample(range(len(explorer.shapes)), min(12, len(explorer.shapes))):
        shape, fitting = explorer.shapes[number], explorer.fitting(number)
        points = [p for p in (fitting - 1, fitting) if 0 <= p < len(explorer.points)]
        fits = [not isinstance(evaluator.placed(shape, int(explorer.batches(shape)[p])), str) for p in points]
        assert fits == [p < fitting for p in points], (shape, fitting)
        assert not fitting or explorer.points[fitting - 1] <= explorer._roughly[number]


def test_prefill_steps_are_not_shorter_than_their_bounds() -> None:
    for name in ("vocab", "mixtral", "moe-4l", "deepseek, 2 nodes"):
        spec, axes, _ = SPECS[name]
        found, _ = shapes(spec, declared(spec, axes | {"expert_tp": (1,), "micro_batches": (1, 2)}))
        grid = prompt_tokens(spec)
        bounds, evaluator, rng = Bounds(spec, PriceBook(), grid, prefill=True), Evaluator(spec), random.Random(name)
        seen = 0
        for shape in rng.sample(found, 8):
            for point in rng.sample([p for p, t in enumerate(grid) if shape.leaders or t % shape.tp == 0], 1):
                row = evaluator.prefill(shape, int(grid[point]) * shape.micro_batches).row
                if row is not None:
                    seen += 1
                    assert 0 < bounds.step(shape)[point] <= row["step_s"], (name, shape, grid[point])
        assert seen


@pytest.mark.parametrize("name", ["small", "vocab", "gqa", "spare", "two kinds", "mixtral", "prompts", "moe-4l"])
def test_tpot_in_turns_with_prefill_is_not_shorter_than_its_bound(name: str) -> None:
    """Prompts of others take their part of TPOT; and where no prefill step fits beside the batch, none is looked at."""
    spec, axes, count = SPECS[name]
    evaluator, rng, ratios = Evaluator(spec), random.Random(name), []
    explorer = Explorer(spec, declared(spec, axes | {"serving": ("together",)}), lambda asked, whole=False: [])
    for number in rng.sample(range(len(explorer.shapes)), min(count, len(explorer.shapes))):
        shape = explorer.shapes[number]
        points = np.flatnonzero(explorer.allowed(number) & (np.arange(len(explorer.points)) < explorer.fitting(number)))
        for point in {*rng.sample(points.tolist(), min(1, len(points))), *points[-1:].tolist()}:
            row = evaluator.outcome(shape, int(explorer.batches(shape)[point])).row
            assert row is not None, (shape, point)
            ratios.append(explorer.bound(number)[0][point] / row["tpot_s"])
            assert ratios[-1] <= 1, (shape, explorer.points[point])
    assert max(ratios) > (0.6 if name == "two kinds" else 0.9)  # bounds take the quickest GPU of any kind


@RUN
@given(parts=predicted_specs(), seed=st.integers(0, 10**6))
def test_bounds_hold_for_any_spec(parts: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    parts = {k: v for k, v in parts.items() if k not in ("traffic", "parallelism")} | {"parallelism": {"dp": 1}}
    try:
        spec = small_spec(**parts)
    except planc.PlancError:
        assume(False)
        raise
    steps = Steps(spec, SCOPES if spec.model.moe and spec.expert_rule != "none" else {})
    assume(steps.shapes)
    for shape in rng.sample(steps.shapes, min(3, len(steps.shapes))):
        points = rng.sample(steps.points(shape), 2)
        for point in points:
            step = steps.simulated(shape, point)
            assert step is None or steps.bounds.step(shape)[point] <= step, (shape, steps.grid[point])
        those_hold_each_other(steps, shape, points)
