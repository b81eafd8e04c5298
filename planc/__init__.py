"""planc compiles a model, a cluster and a workload into a verified deployment plan for MoE inference.

>>> import planc
>>> plan = planc.compile(planc.load_spec("mixtral-8x7b"))
>>> plan.parallelism.world_size
8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.diagnostics import Diagnostic, PlancError
    from planc.pipeline import compile
    from planc.spec import Spec, load_spec, parse_spec
    from planc.verify import VerifiedPlan, load_plan

__version__ = "0.1.0"

_HOMES = {
    "Diagnostic": "planc.diagnostics",
    "PlancError": "planc.diagnostics",
    "Spec": "planc.spec",
    "VerifiedPlan": "planc.verify",
    "compile": "planc.pipeline",
    "load_plan": "planc.verify",
    "load_spec": "planc.spec",
    "parse_spec": "planc.spec",
}
__all__ = [
    "Diagnostic",
    "PlancError",
    "Spec",
    "VerifiedPlan",
    "__version__",
    "compile",
    "load_plan",
    "load_spec",
    "parse_spec",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import planc` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
