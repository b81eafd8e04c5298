"""The best plan for a model, a cluster and bounds: the declared space, bounds on all of it, and exact predictions of what may be best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.spec import Spec


def find(
    spec: Spec,
    *,
    objective: str = "tps",
    tpot: float | None = None,
    ttft: float | None = None,
    tps: float | None = None,
    one_expert_per_gpu: bool = False,
    over: Mapping[str, Sequence[Any]] | None = None,
    top: int = 10,
    front: int = 8,
    pools: bool = False,
    sensitivity: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """The record that `planc search --json` prints (docs/search.md), with what `planc.search.answer.winner_spec` needs.

    ``tpot`` and ``ttft`` in seconds, ``tps`` in tokens per second; ``over``: values of axes of the space, such as
    ``{"tp": [1, 2], "gpus": [64]}``. ``workers`` above 1: below ``if __name__ == "__main__"``. Raises PlancError: PLN430 where
    no plan keeps the bounds, PLN436 where the space has none, and what the spec is refused for.
    """
    from planc.diagnostics import PlancError
    from planc.search.answer import Question, answer
    from planc.search.explore import Goal
    from planc.search.workers import evaluating
    from planc.spec import check_spec

    faults = check_spec(spec)
    if faults:
        raise PlancError(faults)
    goal = Goal(objective, tpot, ttft, tps, one_expert_per_gpu or None)
    asked = {key: tuple(values) for key, values in (over or {}).items()}
    question = Question(goal, asked, top, front, sensitivity=sensitivity, pools=pools)
    with evaluating(spec, workers=workers, ttft=ttft is not None) as evaluate:
        return answer(spec, question, evaluate)
