"""How long it takes: floors from bytes, FLOPs and latencies, and the price of single ops with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.cost.fits import FitFile, load_fit
    from planc.cost.floors import Floors, busiest_bytes, step_floors
    from planc.cost.ops import Costs, Prices, load_costs

_HOMES = {
    "Costs": "ops",
    "FitFile": "fits",
    "Floors": "floors",
    "Prices": "ops",
    "busiest_bytes": "floors",
    "load_costs": "ops",
    "load_fit": "fits",
    "step_floors": "floors",
}
__all__ = ["Costs", "FitFile", "Floors", "Prices", "busiest_bytes", "load_costs", "load_fit", "step_floors"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: prices need none of what floors read, plans and their rooms."""
    if name not in _HOMES:
        raise AttributeError(f"module 'planc.cost' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"planc.cost.{_HOMES[name]}"), name)
