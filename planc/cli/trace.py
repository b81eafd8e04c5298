"""`planc trace`: the simulated step as profiler traces."""

from __future__ import annotations

import argparse

from planc.cli.commands import load_any
from planc.cli.output import print_json, say


def trace(options: argparse.Namespace) -> int:
    """Simulate the step and write a trace per rank, or one of many."""
    from planc.pipeline import write_traces
    from planc.render.show import chosen_range
    from planc.schedule import known_traffic, timeline

    plan = load_any(options.plan)
    ranks = chosen_range("ranks", options.ranks, plan.blocks.world_size)
    step = timeline(plan, traffic=known_traffic(plan, files=True))
    files = write_traces(step, options.output, ranks, together=options.chrome)
    if options.json:
        print_json({"name": plan.spec.name, "step_seconds": step.step, "files": [str(path) for path in files]})
    say(
        f"{plan.spec.name}: a step of {step.step * 1e3:.3f} ms, simulated; wrote {len(files)} files to {options.output}"
    )
    return 0
