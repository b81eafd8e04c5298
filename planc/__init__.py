"""planc compiles a model, a cluster and a workload into a verified deployment plan for MoE inference.

>>> import planc
>>> plan = planc.compile(planc.load_spec("mixtral-8x7b"))
>>> plan.parallelism.world_size
8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.cost import Costs, Prices, load_costs
    from planc.diagnostics import Diagnostic, PlancError
    from planc.pipeline import compile
    from planc.placement.place import ExpertMap, Request, place
    from planc.routing import Traffic, load_traffic
    from planc.schedule import Estimate, Timeline
    from planc.spec import Cluster, Spec, load_cluster, load_spec, parse_spec
    from planc.verify import VerifiedPlan, load_plan

__version__ = "0.1.0"

_HOMES = {
    "Cluster": "planc.spec",
    "Costs": "planc.cost",
    "Diagnostic": "planc.diagnostics",
    "Estimate": "planc.schedule",
    "ExpertMap": "planc.placement.place",
    "PlancError": "planc.diagnostics",
    "Prices": "planc.cost",
    "Request": "planc.placement.place",
    "Spec": "planc.spec",
    "Timeline": "planc.schedule",
    "Traffic": "planc.routing",
    "VerifiedPlan": "planc.verify",
    "compile": "planc.pipeline",
    "load_cluster": "planc.spec",
    "load_costs": "planc.cost",
    "load_plan": "planc.verify",
    "load_spec": "planc.spec",
    "load_traffic": "planc.routing",
    "parse_spec": "planc.spec",
    "place": "planc.placement.place",
}
__all__ = [
    "Cluster",
    "Costs",
    "Diagnostic",
    "Estimate",
    "ExpertMap",
    "PlancError",
    "Prices",
    "Request",
    "Spec",
    "Timeline",
    "Traffic",
    "VerifiedPlan",
    "__version__",
    "compile",
    "load_cluster",
    "load_costs",
    "load_plan",
    "load_spec",
    "load_traffic",
    "parse_spec",
    "place",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import planc` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
