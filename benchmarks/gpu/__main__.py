"""Measure a GPU, fit constants to it, check prices against it.

    python -m benchmarks.gpu --gpu-name h100-sxm -o rows.csv         # on the machine with the GPU; needs torch
    torchrun --nproc-per-node 8 -m benchmarks.gpu --gpu-name h100-sxm -o rows.csv    # with NCCL collectives
    python -m benchmarks.gpu fit rows.csv --gpu h100-sxm -o fit.yaml # anywhere
    python -m benchmarks.gpu check rows.csv --gpu h100-sxm [--fit fit.yaml]

docs/gpu.md says what is measured and what the numbers mean. Exit status: 0 good, 1 refused, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.check import check
from benchmarks.gpu.device import NoGpu
from benchmarks.gpu.fit import fit
from benchmarks.gpu.measure import measure
from benchmarks.gpu.operations import KINDS
from benchmarks.gpu.rows import read_rows
from planc.cost import load_costs
from planc.diagnostics import PlancError

_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"measure": _measure, "fit": _fit, "check": _check}
    run = commands[given.pop(0)] if given and given[0] in commands else _measure
    try:
        run(given)
    except (NoGpu, PlancError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    program = f"python -m benchmarks.gpu {command}".strip()
    return argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=formatter)


def _measure(arguments: list[str]) -> None:
    parser = _parser("")
    kinds = (*KINDS, *_COLLECTIVES)
    parser.add_argument("--gpu-name", required=True, metavar="GPU", help="planc's preset of this GPU, or a GPU file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ROWS.csv")
    parser.add_argument("--only", nargs="+", choices=kinds, default=[], metavar="KIND", help=f"of {', '.join(kinds)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th op: quicker, a worse fit")
    parser.add_argument(
        "--plain", action="store_true", help="torch's own ops, also where flash-attn or FlashMLA is there"
    )
    options = parser.parse_args(arguments)
    if options.every < 1:
        parser.error("--every must be at least 1")
    measure(options.gpu_name, options.output, tuple(options.only), options.every, options.plain)


def _fit(arguments: list[str]) -> None:
    parser = _parser("fit")
    parser.add_argument("rows", metavar="ROWS.csv")
    parser.add_argument("--gpu", required=True, help="a GPU preset, or a GPU file: the one that was measured")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FIT.yaml")
    options = parser.parse_args(arguments)
    text = fit(read_rows(options.rows), options.gpu)
    options.output.write_text(text, encoding="utf-8")


def _check(arguments: list[str]) -> None:
    parser = _parser("check")
    parser.add_argument("rows", metavar="ROWS.csv")
    parser.add_argument("--gpu", required=True, help="a GPU preset, or a GPU file")
    parser.add_argument("--fit", metavar="FIT.yaml", help="prices of this fit rather than of the shipped one")
    options = parser.parse_args(arguments)
    rows, costs = read_rows(options.rows), load_costs(options.gpu, options.fit)
    print(check(rows, costs), end="")
    if rows.facts["gpu"] != costs.gpu.name:
        print(
            f"note: the rows were measured as {rows.facts['gpu']}; these are prices of {costs.gpu.name}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    raise SystemExit(main())
