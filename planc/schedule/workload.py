"""The same plan at another workload: degrees, placement and structure stay, token counts change."""

from __future__ import annotations

from typing import Any

from planc.cost.step import Step
from planc.graph import build_graph
from planc.placement import memory_table
from planc.spec import Spec
from planc.verify import Draft


def at_workload(plan: Step, **changes: Any) -> Draft:
    """The plan's step with other values of ``workload``, as a draft: it is priced and simulated, never written."""
    spec = changed(plan.spec, **changes)
    par, placement = plan.parallelism, plan.placement
    memory = memory_table(spec, par, placement)
    return Draft(spec, par, {}, placement, memory, build_graph(spec, par, placement))


def changed(spec: Spec, **changes: Any) -> Spec:
    """The spec with other values of ``workload``."""
    return spec.model_copy(update={"workload": spec.workload.model_copy(update=changes)})
