"""Rows files: a CSV that `planc costs` prices as it is, with what was measured, under comments that say where.

The comments are `# name: value`, one a line, the first of them `# planc rows: 1`. A fit needs `gpu`, `device`, `driver`,
`torch`, `date` and `sms`; the columns are those of `planc costs` and `EXTRA`.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from planc.cost.op_list import OpList, read_ops
from planc.cost.ops import KINDS
from planc.diagnostics import Diagnostic, PlancError, Span

VERSION = "planc rows"
NEEDED = (VERSION, "gpu", "device", "driver", "torch", "date", "sms")
#: median, 10th and 90th percentile over replays in µs; calls of a replay; whether data was cold (yes, no); `graph` or
#: `stream`; clock of the SMs right after, MHz; what ran
EXTRA = ("us", "us_p10", "us_p90", "calls", "cold", "timing", "sm_mhz", "software")
COLUMNS = ("kind", "dtype", *dict.fromkeys(name for names in KINDS.values() for name in names), *EXTRA)
_LONGEST = 300  #: characters of a comment's value


@dataclass(frozen=True, slots=True)
class Rows:
    """A checked rows file: its comments, its ops, and of each row the time, its spread and what ran."""

    facts: dict[str, str]
    ops: OpList
    seconds: np.ndarray  #: float [rows]
    software: np.ndarray  #: text [rows]


def write_facts(out: TextIO, facts: dict[str, str]) -> None:
    """The comments and the header line."""
    for name, value in ({VERSION: "1"} | facts).items():
        out.write(f"# {name}: {clean(value)}\n")
    csv.writer(out, lineterminator="\n").writerow(COLUMNS)


def write_row(out: TextIO, row: dict[str, Any]) -> None:
    """One measured op; columns that its kind does not have stay empty."""
    csv.DictWriter(out, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n").writerow(row)


def clean(text: str) -> str:
    """Printable, on one line."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(kept.split())[:_LONGEST]


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """Read a rows file. Raises PlancError with every fault: PLN404 for its comments and columns, PLN405 for cells."""
    ops = read_ops(path)
    with open(path, encoding="utf-8-sig") as handle:
        facts = dict(_facts(handle))
    top = Span(ops.file, 1, 1)
    hint = "a rows file is what `python -m benchmarks.gpu --gpu-name GPU -o rows.csv` writes (docs/gpu.md)"
    missing = [name for name in NEEDED if not facts.get(name)]
    faults = [Diagnostic("PLN404", f"the comment `# {name}: …` is missing", name, top, hint) for name in missing]
    if facts.get(VERSION, "1") != "1":
        faults.append(Diagnostic("PLN404", f"rows of version {facts[VERSION]}, not 1", VERSION, top, hint))
    if "sms" in facts and not (facts["sms"].isascii() and facts["sms"].isdigit() and 0 < int(facts["sms"]) <= 10_000):
        faults.append(Diagnostic("PLN405", f"`# sms: {facts['sms']}` is not a number of SMs", "sms", top))
    names = {"us": "measured_us", "us_p10": "us_p10", "us_p90": "us_p90"}  # as `read_ops` calls them
    absent = [name for name, read in names.items() if read not in ops.header]
    faults += [Diagnostic("PLN404", f"the column `{name}` is missing", name, top, hint) for name in absent]
    if not ops.rows:
        faults.append(Diagnostic("PLN404", "no measured row", span=top, hint=hint))
    if faults:
        raise PlancError(faults)
    at = [ops.header.index(name) for name in names.values()]
    times = []
    for row, line in zip(ops.rows, ops.lines, strict=True):
        try:
            times.append(_times([row[place] for place in at]))
        except ValueError as error:
            faults.append(Diagnostic("PLN405", str(error), "us", Span(ops.file, line, 1)))
    if faults:
        raise PlancError(faults[:1000])
    place = ops.header.index("software") if "software" in ops.header else None
    software = ["" if place is None else clean(row[place]) for row in ops.rows]
    return Rows(facts, ops, np.array(times), np.array(software))


def _times(cells: list[str]) -> float:
    """Seconds of the median; ValueError says what is wrong with the three cells."""
    try:
        median, low, high = (float(cell) for cell in cells)
    except ValueError:
        raise ValueError(f"`{'`, `'.join(cell[:20] for cell in cells)}` are not three numbers of µs") from None
    if not (math.isfinite(high) and 0 < low <= median <= high <= 1e12):
        raise ValueError(f"us_p10 {low:g} ≤ us {median:g} ≤ us_p90 {high:g} does not hold for positive times")
    return median * 1e-6


def _facts(lines: TextIO) -> Iterator[tuple[str, str]]:
    for line in lines:
        if not line.startswith("#"):
            return
        name, colon, value = line[1:].partition(":")
        if colon:
            yield name.strip(), clean(value)
