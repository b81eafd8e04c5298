"""How long one call takes: many calls on different data in one CUDA graph, replayed between two events.

A graph leaves out what launching costs the CPU, as serving engines do in decode; its replays hold every gap between
kernels, and one follows the other without a pause, so that launching a graph is not in its time either. Every call of a graph has its own weights, caches and inputs, so that they are not in L2 when it starts: `cold`
where what the calls of a graph touch is at least twice L2, so that no call finds what the previous replay left there.
Nothing here needs torch: a device (`benchmarks.gpu.device.Cuda`) gives `samples`, `capture` and `l2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

REPLAYS = 30  #: samples of one row, fewer where they take longer than `MOST_SECONDS`
LEAST_REPLAYS = 7
MOST_SECONDS = 0.6
WARM_UP = 3  #: calls before anything is timed: libraries load, choose their kernels, and allocate
GRAPH_SECONDS = 3e-3  #: a replay takes about so long, or has `MOST_CALLS` calls
MOST_CALLS = 1024
RAMP_SECONDS = 20e-3  #: replays before samples are taken: clocks settle under load

Call = Callable[[], Any]


class Device(Protocol):
    """What times and captures; see `benchmarks.gpu.device.Cuda`."""

    l2: float  #: bytes

    def samples(self, run: Call, count: int) -> list[float]:
        """Seconds that the GPU works on what ``run`` launches, ``count`` times, one right after the other."""
        ...

    def capture(self, calls: Sequence[Call]) -> tuple[Call, str]:
        """One function that launches all calls, and how: `graph`, or `stream` where they cannot be captured."""
        ...


@dataclass(frozen=True, slots=True)
class Times:
    """Of one call: median and spread over replays, s; calls of a replay; whether data was cold; `graph` or `stream`."""

    seconds: float
    p10: float
    p90: float
    calls: int
    cold: bool
    how: str


def calls_for(seconds: float, size: float, l2: float) -> int:
    """Calls of one graph, for calls of about ``seconds`` that touch ``size`` bytes: long enough to time, and enough data
    to turn L2 over twice."""
    enough = max(GRAPH_SECONDS / max(seconds, 1e-9), 2.0 * l2 / max(size, 1.0))
    return int(min(max(math.ceil(enough), 2), MOST_CALLS))


def replays_for(seconds: float) -> int:
    """Samples to take of a replay of ``seconds``."""
    return int(min(max(MOST_SECONDS / max(seconds, 1e-9), LEAST_REPLAYS), REPLAYS))


def quantile(samples: Sequence[float], share: float) -> float:
    """Linear between the sorted samples, as numpy's."""
    ordered, place = sorted(samples), share * (len(samples) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def times_of(samples: Sequence[float], calls: int, cold: bool, how: str) -> Times:
    """Median and spread of samples, each the mean of one replay's calls."""
    median, low, high = (quantile(samples, share) for share in (0.5, 0.1, 0.9))
    return Times(median, low, high, calls, cold, how)


def time_calls(device: Device, make: Callable[[], Call], size: float) -> Times:
    """Time of one call. ``make`` gives a call on the next data; ``size``: bytes that one call touches."""
    first = make()
    for _ in range(WARM_UP):
        first()
    rough = min(device.samples(first, WARM_UP))
    calls = calls_for(rough, size, device.l2)
    replay, how = device.capture([make() for _ in range(calls)])
    once = device.samples(replay, 1)[0]
    once = min(device.samples(replay, min(math.ceil(RAMP_SECONDS / max(once, 1e-9)), 20)))
    samples = [seconds / calls for seconds in device.samples(replay, replays_for(once))]
    return times_of(samples, calls, calls * size >= 2.0 * device.l2, how)
