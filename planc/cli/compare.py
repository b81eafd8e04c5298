"""`planc compare`: plans side by side."""

from __future__ import annotations

import argparse

from planc.cli.commands import load_any
from planc.cli.estimate import book_of, read_bound
from planc.cli.output import print_json, write_text
from planc.diagnostics import Diagnostic, PlancError, Span


def compare(options: argparse.Namespace) -> int:
    """Predict every plan and print what sets them apart."""
    from planc.report.side_by_side import comparison_record, comparison_text, sides
    from planc.schedule import estimate, known_traffic

    if len(options.plans) < 2:
        raise PlancError(
            [Diagnostic("PLN406", "a comparison needs two plans or more", span=Span("planc compare", 1, 1))]
        )
    bound = read_bound("--tpot", options.tpot)
    plans = [load_any(name) for name in options.plans]
    book = book_of(options.fit, plans)
    found = [estimate(plan, book=book, traffic=known_traffic(plan, files=True)) for plan in plans]
    group, bound = sides(found, bound)
    if options.json:
        print_json(comparison_record(group, bound, options.gpu_hour))
    else:
        write_text(comparison_text(group, bound, options.gpu_hour), None)
    return 0
