"""How fast it could be at best: floors from bytes, FLOPs and latencies."""

from planc.cost.floors import Floors, step_floors

__all__ = ["Floors", "step_floors"]
