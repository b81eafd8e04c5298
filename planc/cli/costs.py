"""`planc costs`: the price of a list of ops."""

from __future__ import annotations

import argparse

from planc.cli.output import write_text


def costs(options: argparse.Namespace) -> int:
    """Read the list, price it from the GPU's fit or spec, or a given fit, and print it with its prices."""
    from planc.cost.op_list import price_ops, read_ops
    from planc.cost.ops import load_costs

    write_text(price_ops(read_ops(options.ops), load_costs(options.gpu, options.fit)), None)
    return 0
