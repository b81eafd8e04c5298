"""`planc prove`: run a plan on small numbers and compare it with the model run whole."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planc.cli.commands import load_any
from planc.cli.output import print_json, write_text
from planc.diagnostics import PlancError

if TYPE_CHECKING:
    from planc.prove import Proof


def prove(options: argparse.Namespace) -> int:
    """Execute the plan and print what was found; exit status 1 where it does not compute what the model does."""
    from planc.prove import prove as run
    from planc.prove.recorded import faults_of

    plan = load_any(options.plan, options.set)
    sizes = {key: getattr(options, key) for key in ("layers", "tokens", "scale", "steps", "seed")}
    if options.processes:
        from planc.prove.processes import prove_by_processes

        count = min(options.processes, plan.parallelism.world_size)
        proof = prove_by_processes(plan, count, **sizes, timeout=float(options.timeout))
    else:
        proof = run(plan, **sizes)
    if options.json:
        print_json(record(proof))
    elif proof.holds:
        write_text(words(proof), None)
    found = faults_of(proof)
    if found:
        raise PlancError(found)
    return 0


def record(proof: Proof) -> dict[str, Any]:
    """The proof as JSON."""
    return {
        "name": proof.name,
        "holds": proof.holds,
        "ranks": proof.ranks,
        "layers": sorted(proof.layers.values()),
        "steps": proof.steps,
        "seed": proof.seed,
        "sizes": proof.sizes,
        "ops": proof.ops,
        "tokens_routed": proof.tokens,
        "max_relative_error": proof.max_relative_error,
        "errors": dict(sorted(proof.errors.items())),
        "bytes_equal": proof.bytes_equal,
        "bytes_moved": dict(sorted(proof.bytes_moved.items())),
        "bytes_planned": dict(sorted(proof.bytes_planned.items())),
        "memory_equal": proof.memory_equal,
        "faults": [{"op": op, "why": why} for op, why in proof.faults],
        "seconds": proof.seconds,
    }


def words(proof: Proof) -> str:
    """The proof in words."""
    from planc.graph import range_text

    sizes = ", ".join(f"{name} {value}" for name, value in proof.sizes.items())
    moved = sum(proof.bytes_moved.values())
    lines = [
        f"{proof.name}: the plan computes what the model does",
        f"  {proof.ops:,} ops on {proof.ranks} ranks, layers {range_text(sorted(proof.layers.values()))}, {proof.steps} steps; {sizes}",
        f"  largest relative error {proof.max_relative_error:.2g} (float64, bound 1e-9); {proof.tokens:,} tokens routed",
        f"  {moved:,} bytes moved by collectives, each op's matrix equal to the plan's; every item of every rank's memory equal to its memory table",
        f"  {proof.seconds:.2f} s",
    ]
    return "\n".join(lines) + "\n"
