"""When everything runs: the simulated step of a verified plan, its critical path, and what follows for TPOT, TTFT and TPS."""

from __future__ import annotations

from planc.schedule.simulate import Slow, Wiring, simulate
from planc.schedule.timeline import Timeline, timeline

__all__ = ["Slow", "Timeline", "Wiring", "simulate", "timeline"]
