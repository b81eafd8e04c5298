"""Speed and memory of `planc search`, and its bounds beside a loop over single candidates: python benchmarks/search.py

Every number is of this machine and this run; results are kept in docs/benchmarks.md with the command.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time

import numpy as np

import planc
from planc.cost.book import PriceBook
from planc.search.bound import Bounds
from planc.search.explore import Explorer
from planc.search.space import declared

SPECS = ("moe-61l-ep64-dp2", "deepseek-v3-128gpu")
LOOPED = 2000  #: candidates of the loop


def main() -> None:
    """Bounds per second, then whole commands."""
    for name in SPECS:
        spec = planc.load_spec(name)
        started = time.perf_counter()
        explorer = Explorer(spec, declared(spec, {}), lambda asked, whole=False: [], PriceBook())
        for number in range(len(explorer.shapes)):
            explorer.bound(number)
        seconds = time.perf_counter() - started
        many = explorer.candidates / seconds
        rng = random.Random(0)
        book = PriceBook()
        started = time.perf_counter()
        for token in np.array_split(np.array(rng.choices(explorer.points.tolist(), k=LOOPED)), 20):
            # one candidate at a time, with what candidates of the same tokens share kept between them
            bounds = Bounds(spec, book, np.array([int(token[0]) // 8 * 8 + 8]))
            for shape in rng.choices(explorer.shapes, k=len(token)):
                bounds.step(shape)
        loop = LOOPED / (time.perf_counter() - started)
        print(
            f"{name}: {explorer.candidates:,} candidates of {len(explorer.shapes):,} legal shapes in {seconds:.2f} s: {many:,.0f} a second; "
            f"one at a time {loop:,.0f} a second: {many / loop:,.0f} times as many"
        )
    for words in (
        ["moe-61l-ep64-dp2", "--tpot", "50ms"],
        ["deepseek-v3-128gpu", "--tpot", "50ms"],
        ["deepseek-v3-128gpu", "--tpot", "50ms", "--front", "0", "--top", "1"],
        ["moe-61l-ep64-dp2", "--over", "serving=together", "--front", "0", "--top", "1"],
        ["mixtral-8x7b", "--over", "serving=together", "--front", "0", "--top", "1"],
        ["moe-4l-64gpu"],
        ["deepseek-v3-128gpu", "--set", "cluster=h100-sxm-128x8", "--tpot", "50ms", "--front", "0", "--top", "1"],
        ["deepseek-v3-128gpu", "--set", "cluster=h100-sxm-128x8", "--tpot", "50ms"],
    ):
        started = time.perf_counter()
        command = [sys.executable, "-m", "planc", "search", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"planc search {' '.join(words)}: {seconds:.1f} s (largest process so far {most:.0f} MB)")


if __name__ == "__main__":
    main()
