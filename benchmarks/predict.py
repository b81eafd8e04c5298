"""Time of predictions: `planc estimate` from start to exit, and simulations beside the longest path by networkx.

networkx gets the finished graph with the seconds of every op for nothing and finds its longest path; it knows no streams
and no links. planc prices every op and simulates the step with both.

Run: make bench   (writes its part of docs/benchmarks.md)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import networkx as nx
from sections import best, machine, write_part

import planc
from planc.schedule import Sweep, Wiring, timeline
from planc.schedule.order import program_orders

RUNS = 5
SPECS = ("moe-61l-ep64-dp2", "deepseek-v3-128gpu", "deepseek-v3-ep256", "qwen3-235b-a22b", "deepseek-v3-10240gpu")
NETWORKX = ("moe-61l-ep64-dp2", "deepseek-v3-128gpu")
TEXT = """## Predictions

`make bench` on {machine}; best of {runs} runs. `planc estimate` is a process from start to exit with compiling, verifying,
both phases, intervals and the critical path. "all layers" and "layers alike" price nothing again: the simulation of every
layer, and the one that fills in layers alike (equal to 1e-9, tests/schedule). networkx: `dag_longest_path_length` on the same
ops with their prices, without streams and links. Limits: 1 s and 150 MB from start to answer, 5 s for all layers.

| spec | planc estimate | peak | price every op | all layers | layers alike | networkx, longest path |
|---|---:|---:|---:|---:|---:|---:|
{rows}

The best batch under 50 ms for deepseek-v3-128gpu: {best}.
"""


def quickest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of `RUNS` calls."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def longest_path(plan: planc.VerifiedPlan) -> float:
    """Seconds that networkx takes for the longest path through the priced graph."""
    line = timeline(plan)
    graph = nx.DiGraph()
    names = plan.expanded.ids
    seconds = [s for price in line.prices.blocks for s in price.seconds.tolist()]
    pairs = zip(plan.expanded.source.tolist(), plan.expanded.target.tolist(), strict=True)
    graph.add_weighted_edges_from((names[s], names[t], seconds[s]) for s, t in pairs)
    start = time.perf_counter()
    nx.dag_longest_path_length(graph)
    return time.perf_counter() - start


def row(spec: str, seconds: float, peak: float) -> str:
    """One line of the table."""
    plan = planc.compile(planc.load_spec(spec))
    wiring = Wiring(plan.expanded)
    first = timeline(plan, wiring=wiring)
    ordered = program_orders(plan, first.prices.blocks)[0]

    from planc.cost.book import PriceBook
    from planc.cost.step import StepPrices
    from planc.schedule import simulate

    price = quickest(lambda: StepPrices(plan, PriceBook(), None).blocks)
    every = quickest(lambda: simulate(plan, first.prices, ordered, wiring, whole=True))
    alike = quickest(lambda: simulate(plan, first.prices, ordered, wiring))
    other = "–"
    if spec in NETWORKX:
        slow = longest_path(plan)
        other = f"{slow * 1e3:.0f} ms ({slow / every:.0f}×)"
    cells = f"{price * 1e3:.0f} ms | {every * 1e3:.1f} ms | {alike * 1e3:.1f} ms | {other}"
    return f"| {spec} | {seconds:.2f} s | {peak:.0f} MB | {cells} |"


def main() -> None:
    """Measure and write the part of docs/benchmarks.md."""
    rows = []
    # before this process grows: a child's peak memory counts what its parent held when it was forked
    answers = {spec: best([sys.executable, "-m", "planc", "estimate", spec]) for spec in SPECS}
    for spec in SPECS:
        rows.append(row(spec, *answers[spec]))
        print(rows[-1], flush=True)
    plan = planc.compile(planc.load_spec("deepseek-v3-128gpu"))
    start = time.perf_counter()
    found = Sweep(plan).best_batch(0.05, None)
    took = time.perf_counter() - start
    words = f"{found.simulated} of {found.steps} different steps simulated in {took:.1f} s"
    write_part(TEXT.format(machine=machine(), runs=RUNS, rows="\n".join(rows), best=words))


if __name__ == "__main__":
    main()
