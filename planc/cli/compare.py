"""`planc compare`: plans side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from planc.cli.commands import load_any
from planc.cli.estimate import book_of, read_bound
from planc.cli.output import print_json, write_text
from planc.cli.search import is_record, read_record
from planc.diagnostics import Diagnostic, PlancError, Span

if TYPE_CHECKING:
    from planc.verify import VerifiedPlan


def compare(options: argparse.Namespace) -> int:
    """Predict every plan and print what sets them apart."""
    from planc.report.side_by_side import comparison_record, comparison_text, sides
    from planc.schedule import estimate, known_traffic

    if len(options.plans) < 2:
        raise PlancError(
            [Diagnostic("PLN406", "a comparison needs two plans or more", span=Span("planc compare", 1, 1))]
        )
    bound = read_bound("--tpot", options.tpot)
    plans = [_of_search(name) if is_record(name) else load_any(name) for name in options.plans]
    book = book_of(options.fit, [plan.spec for plan in plans])
    found = [estimate(plan, book=book, traffic=known_traffic(plan, files=True)) for plan in plans]
    group, bound = sides(found, bound)
    if options.json:
        print_json(comparison_record(group, bound, options.gpu_hour))
    else:
        write_text(comparison_text(group, bound, options.gpu_hour), None)
    return 0


def _of_search(name: str) -> VerifiedPlan:
    """The winner of a search, or the n-th best: `FILE.json#n`."""
    from planc.pipeline import compile
    from planc.search.answer import winner_spec

    path, _, place = name.partition("#")
    record = read_record(path)
    if place and not (place.isascii() and place.isdigit() and 1 <= int(place) <= len(record["top"])):
        message = f"`#{place[:20]}` is none of the best {len(record['top'])} of {path}"
        raise PlancError([Diagnostic("PLN406", message, span=Span(path, 1, 1))])
    number = int(place or 1)
    spec = winner_spec(record, number - 1)
    return compile(spec.model_copy(update={"name": f"{spec.name}#{number}"}))
