"""How fast it could be at best: floors from bytes, FLOPs and latencies."""

from planc.cost.floors import Floors, busiest_bytes, step_floors

__all__ = ["Floors", "busiest_bytes", "step_floors"]
