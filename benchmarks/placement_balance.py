"""Even load: planc beside EPLB's algorithms, and spares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import peers

from planc import Cluster, Request, Traffic, load_cluster, place
from planc.planner.apportion import copies_for
from planc.planner.balance import lower_bound
from planc.planner.record import spare_points
from planc.routing.tokens import Skew, popularity_of

Result = TypeVar("Result")
SHAPES = {
    "lognormal 1": Skew("lognormal", 1.0),
    "lognormal 0.5": Skew("lognormal", 0.5),
    "zipf 1": Skew("zipf", 1.0),
    "zipf 0.6": Skew("zipf", 0.6),
    "power law 1.5": Skew("power_law", 1.5),
}
GROUPS = 8  #: of experts in the gate, for EPLB's hierarchical policy


class Case(NamedTuple):
    """``layers`` of ``experts`` in ``slots`` slots on ``gpus`` GPUs."""

    layers: int
    experts: int
    slots: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.layers} × {self.experts}, {self.slots} on {self.gpus}"


MANY = (Case(58, 256, 288, 32), Case(58, 256, 320, 64), Case(94, 128, 160, 32))
TWO = (Case(58, 256, 288, 144), Case(58, 64, 128, 64), Case(58, 64, 72, 36), Case(58, 64, 96, 48))
NO_SPARES = (Case(58, 256, 256, 64),)
ONE = (
    Case(58, 64, 64, 64),
    Case(58, 64, 72, 72),
    Case(58, 64, 80, 80),
    Case(58, 256, 288, 288),
    Case(58, 256, 320, 320),
)


def loads_of(case: Case, shape: str) -> np.ndarray:
    """Whole-numbered loads of a case, float [layers, E]: a million tokens a layer, seeded by the layer."""
    rows = [popularity_of(SHAPES[shape], case.experts, np.random.default_rng([7, i])) for i in range(case.layers)]
    return np.maximum(1.0, np.rint(np.stack(rows) * 1e6))


def quickest(work: Callable[[], Result]) -> tuple[Result, float]:
    """(result, seconds) of the fastest of three calls, or of one where it takes long."""
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
        if best > 1:
            break
    return result, float(best)


def fullest(tables: np.ndarray, loads: np.ndarray) -> np.ndarray:
    """Load of the fullest GPU over the mean GPU's, by layer. ``tables``: int [layers, gpus, slots], -1 for none."""
    result = []
    for table, load in zip(tables, loads, strict=True):
        share = np.append(load / np.maximum(1, np.bincount(table[table >= 0], minlength=len(load))), 0.0)
        total = share[table].sum(axis=1)
        result.append(total.max() / total.mean())
    return np.array(result)


def planned(case: Case, loads: np.ndarray) -> tuple[np.ndarray, float]:
    """(planc's tables, seconds of the whole call with the certificate)."""
    traffic = Traffic("loads", "generated", case.experts, loads[None], None)
    request = Request(slots=case.slots // case.gpus, redundant=case.slots - case.experts, objective="balance")
    cluster = cluster_of(case.gpus)
    found, seconds = quickest(lambda: place(traffic, cluster, request))
    return found.tables, seconds


def cluster_of(gpus: int) -> Cluster:
    """H100 nodes of 8 GPUs, or of 4 where 8 do not divide."""
    size = 8 if gpus % 8 == 0 else 4
    return load_cluster(f"h100-sxm-{gpus // size}x{size}")


HEADER = (
    "| layers × experts, slots on GPUs | loads | bound | EPLB greedy | EPLB groups | planc | gap mean | gap worst | layers worse "
    "than EPLB | twice on one GPU: EPLB | planc | s: EPLB loops | EPLB at once | planc |\n"
    "|---|---|" + "---:|" * 12
)


def balance_row(case: Case, shape: str) -> str:
    """One case in figures."""
    loads = loads_of(case, shape)
    at_once, at_once_s = quickest(lambda: peers.eplb_greedy(loads, case.slots, case.gpus, peers.packed_at_once))
    looped, looped_s = quickest(lambda: peers.eplb_greedy(loads, case.slots, case.gpus, peers.packed_in_loops))
    if (fullest(at_once, loads) != fullest(looped, loads)).any():
        raise SystemExit("the two forms of EPLB's greedy differ")
    by_group = None
    if case.experts == 256 and case.gpus % 8 == 0:
        args = case.slots, case.gpus, GROUPS, case.gpus // 8
        by_group = peers.eplb_hierarchical(loads, *args, peers.packed_at_once)
    tables, seconds = planned(case, loads)
    bound = lower_bound(loads, case.slots, case.gpus, case.slots // case.gpus) / (loads.sum(axis=1) / case.gpus)
    ours, theirs = fullest(tables, loads), fullest(at_once, loads)
    gap = ours / bound - 1
    cells = [
        str(case),
        shape,
        f"{bound.mean():.4f}",
        f"{theirs.mean():.4f}",
        "–" if by_group is None else f"{fullest(by_group, loads).mean():.3f}",
        f"{ours.mean():.4f}",
        f"{gap.mean():.3%}",
        f"{gap.max():.2%}",
        worse(ours, theirs),
        str(peers.held_twice(at_once)),
        str(peers.held_twice(tables)),
        f"{looped_s:.3f}",
        f"{at_once_s:.3f}",
        f"{seconds:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def worse(ours: np.ndarray, theirs: np.ndarray) -> str:
    """In how many layers planc is worse, and by how much at most."""
    by = ours / theirs - 1
    number = int((by > 1e-9).sum())
    return f"{number} (≤ {by.max():.2%})" if number else "0"


ONE_HEADER = (
    "| layers × experts, slots on GPUs | loads | optimum | EPLB greedy | planc | layers at the optimum | s: EPLB loops | "
    "planc |\n|---|---|" + "---:|" * 6
)


def one_slot_row(case: Case, shape: str) -> str:
    """One slot a GPU: the optimum is known."""
    loads = loads_of(case, shape)
    theirs, theirs_s = quickest(lambda: peers.eplb_greedy(loads, case.slots, case.gpus, peers.packed_in_loops))
    tables, seconds = planned(case, loads)
    best = np.array([smallest_share(row, case.slots) for row in loads])
    found = np.array([largest_share(table, row) for table, row in zip(tables, loads, strict=True)])
    mean = loads.sum(axis=1) / case.gpus
    cells = [
        str(case),
        shape,
        f"{(best / mean).mean():.6f}",
        f"{fullest(theirs, loads).mean():.6f}",
        f"{(found / mean).mean():.6f}",
        f"{int((found == best).sum())} of {case.layers}",
        f"{theirs_s:.3f}",
        f"{seconds:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def largest_share(table: np.ndarray, load: np.ndarray) -> float:
    """Load of the fullest GPU with one slot each."""
    counts = np.bincount(table[table >= 0], minlength=len(load))
    return float((load / counts).max())


def smallest_share(load: np.ndarray, slots: int) -> float:
    """The least possible largest share of a copy: the smallest τ of all load ÷ c with Σ⌈load ÷ τ⌉ ≤ slots, by bisection
    over the sorted candidates. It needs no greedy, so that it can check one."""
    most = slots - len(load) + 1
    choices = np.unique(load[:, None] / np.arange(1, most + 1))
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        need = np.ceil(load / choices[middle] * (1 - 1e-12)).sum()
        low, high = (low, middle) if need <= slots else (middle + 1, high)
    return float(choices[low])


SPARES_HEADER = (
    "| spares | GPUs | fullest GPU, mean over layers | EPLB greedy | share of the fullest without spares | spares by the closed "
    "form, mean and most |\n|---:|" + "---:|" * 5
)


def spare_rows() -> Iterator[str]:
    """The fullest GPU against spares, in mean loads of an expert, and the closed form turned round: the spares that it
    asks for to stay at or below the fullest GPU that planc has with so many."""
    case = Case(58, 64, 64, 64)
    loads = loads_of(case, "lognormal 1")
    relative = loads / loads.mean(axis=1, keepdims=True)
    first = None
    for spares in (point.spares for point in spare_points(loads, 64)):
        slots = 64 + spares
        traffic = Traffic("loads", "generated", 64, loads[None], None)
        tables = place(traffic, cluster_of(slots), Request(redundant=spares, objective="balance")).tables
        found = np.array([largest_share(t, row) for t, row in zip(tables, relative, strict=True)])
        _, counts = peers.replicated(loads, slots)
        theirs = (relative / counts).max(axis=1)
        need = np.array([int(copies_for(row[None], tau)[0]) - 64 for row, tau in zip(relative, found, strict=True)])
        first = found.mean() if first is None else first
        cells = [
            str(spares),
            str(slots),
            f"{found.mean():.3f}",
            f"{theirs.mean():.3f}",
            f"{found.mean() / first:.0%}",
            f"{need.mean():.1f}, {need.max()}",
        ]
        yield "| " + " | ".join(cells) + " |"
