"""A few candidates of a small spec, for the tests of their evaluation by workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from small_specs import small_spec

import planc
from planc.search.evaluate import Outcome
from planc.search.space import Shape, declared, shapes


def spec() -> planc.Spec:
    """Two MoE layers on 8 GPUs."""
    return small_spec(model={"vocab": 96})


def asked() -> list[tuple[Shape, int]]:
    """Eight candidates of different degrees, one of which is no plan because its batch does not fit memory."""
    legal, _ = shapes(spec(), declared(spec(), {}))
    chosen = legal[:: len(legal) // 7][:7]
    return [(shape, 64) for shape in chosen] + [(chosen[0], 10**8)]


def rows(outcomes: Iterable[Outcome]) -> list[list[Any]]:
    """Outcomes as JSON has them."""
    return [[outcome.row, outcome.refused] for outcome in outcomes]
