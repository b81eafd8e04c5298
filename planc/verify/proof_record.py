"""What a plan's file says of its proof by execution: what was run, on which numbers; whole numbers only, so that they are
the same on every machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=10**15)]


class ProofRecord(BaseModel):
    """A proof that held. ``layers``: layers of the plan that were run, as a range text; ``steps``, ``tokens``, ``scale`` and
    ``seed``: the options of `planc prove`; ``sizes``: of the small model; ``bytes``: moved in the first step by kind of
    collective, equal to the plan's byte matrices at those sizes; ``tolerance``: bound of every relative error, float64."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: Annotated[str, Field(max_length=1000)]
    steps: Count
    tokens: Count
    scale: Count
    seed: Count
    ops: Count
    tokens_routed: Count
    sizes: dict[str, Count]
    bytes: dict[str, Count]
    tolerance: Annotated[float, Field(gt=0, le=1)]
