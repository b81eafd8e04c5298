"""The verified plan: what every picture, document and export is made from. Only `verify` makes one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from planc.diagnostics import Diagnostic
from planc.graph import Expanded, PlanGraph, expand, to_networkx
from planc.graph.pairwise import pairwise
from planc.graph.traffic import byte_matrix, volumes
from planc.placement import MemoryTable, Parallelism, Placement, StepTokens, largest_that_fits, step_tokens
from planc.planner.certificate import Certificate
from planc.spec import Spec
from planc.verify.proof_record import ProofRecord

if TYPE_CHECKING:
    import networkx as nx

    from planc.schedule import Estimate


@dataclass(frozen=True)
class Check:
    """One thing that was verified: how many items were looked at, and the code it would have failed with."""

    name: str
    codes: tuple[str, ...]
    count: int
    what: str


@dataclass(frozen=True, eq=False)
class Draft:
    """A plan before verification: the same parts, nothing promised."""

    spec: Spec
    parallelism: Parallelism
    reasons: dict[str, str]
    placement: Placement
    memory: MemoryTable
    blocks: PlanGraph
    notes: tuple[Diagnostic, ...] = ()
    certificate: Certificate | None = None
    proof: ProofRecord | None = None


@dataclass(frozen=True, eq=False)
class VerifiedPlan:
    """A deployment plan that passed every check.

    ``blocks`` is the compact graph; `graph` its hub form as a networkx DiGraph, `expanded` the same as arrays.
    ``notes`` are warnings and notes for the reader; ``checks`` says what was verified; ``certificate`` says how good a
    placement for known traffic is, ``proof`` what was executed.
    """

    spec: Spec
    parallelism: Parallelism
    reasons: dict[str, str]
    placement: Placement
    memory: MemoryTable
    blocks: PlanGraph
    notes: tuple[Diagnostic, ...]
    checks: tuple[Check, ...]
    certificate: Certificate | None = None
    proof: ProofRecord | None = None

    @cached_property
    def expanded(self) -> Expanded:
        """Every op and edge as arrays."""
        return expand(self.blocks)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The step as a networkx DiGraph in hub form (see `planc.graph.expand.to_networkx` for the attributes)."""
        return to_networkx(self.expanded)

    @cached_property
    def graph_pairwise(self) -> nx.DiGraph[str]:
        """The step with every collective as direct edges between ranks (see `planc.graph.pairwise`): made on request,
        because a large plan has millions of them."""
        return pairwise(self.spec, self.parallelism, self.placement, self.expanded)

    @property
    def tokens(self) -> StepTokens:
        """Tokens of one micro-batch."""
        return step_tokens(self.spec, self.parallelism)

    @cached_property
    def volumes(self) -> dict[str, dict[str, int]]:
        """Bytes of one step: communication class -> link class -> bytes over all ranks."""
        return volumes(self.spec, self.parallelism, self.placement, self.blocks)

    @cached_property
    def limits(self) -> dict[str, int]:
        """The largest ``batch`` and ``isl`` that fit memory with everything else as it is."""
        args = self.spec, self.parallelism, self.placement
        return {key: largest_that_fits(*args, key) for key in ("batch", "isl")}

    def byte_matrix(self, block: int, op: int = 0) -> np.ndarray:
        """Bytes that each rank of a collective's group sends to each other rank, int64 [group, group]."""
        return byte_matrix(self.spec, self.parallelism, self.placement, self.blocks.blocks[block], op)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write plan.json, the document and the figures into ``folder``; see `planc.pipeline.write`."""
        from planc.pipeline import write  # upwards, and only when called: the plan is the library's handle

        return write(self, folder)

    def estimate(self) -> Estimate:
        """TPOT, TTFT and TPS with intervals and floors; see `planc.schedule.estimate`. Recorded traffic that the spec names
        is read."""
        from planc.schedule import estimate, known_traffic  # upwards, as in `write`

        return estimate(self, traffic=known_traffic(self, files=True))

    def __eq__(self, other: object) -> bool:
        from planc.verify.record import plan_record

        return isinstance(other, VerifiedPlan) and plan_record(self) == plan_record(other)

    def __hash__(self) -> int:
        return hash((self.spec.name, self.parallelism))
