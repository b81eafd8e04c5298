"""When everything runs: the simulated step of a verified plan, its critical path, and what follows for TPOT, TTFT and TPS."""

from __future__ import annotations

from planc.schedule.estimate import Estimate, estimate, known_traffic
from planc.schedule.simulate import Slow, Wiring, simulate
from planc.schedule.sweep import Best, Point, Sweep
from planc.schedule.timeline import Timeline, timeline

__all__ = [
    "Best",
    "Estimate",
    "Point",
    "Slow",
    "Sweep",
    "Timeline",
    "Wiring",
    "estimate",
    "known_traffic",
    "simulate",
    "timeline",
]
