"""The plan's tables as CSV: a header line, `\\n` after every row, an empty cell where there is nothing to say."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import repeat

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.tables import LACKS, LINKS, SAYS, Table, size_of, table_faults, table_notes, tables
from planc.export.target import Job, Target


def faults(job: Job) -> Iterator[Diagnostic]:
    """Tables too large."""
    yield from table_faults(job, TARGET.title, "csv.links")


def notes(job: Job) -> Iterator[str]:
    """What a table does not say."""
    yield from table_notes(job, "csv.links")


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """A file for each table."""
    for table in tables(job, "csv.links"):
        yield f"{table.name}.csv", _text(table)


def _text(table: Table) -> bytes:
    held = io.BytesIO()
    file = io.TextIOWrapper(held, encoding="utf-8", newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.types)
    for part in table.parts:
        size = size_of(part)
        cells = (part[column] for column in table.types)
        columns = [one.tolist() if isinstance(one, np.ndarray) else repeat(one, size) for one in cells]
        writer.writerows(zip(*columns, strict=True))
    file.flush()
    return held.getvalue()


TARGET = Target(
    title="CSV",
    version="",
    says=SAYS,
    lacks=LACKS,
    faults=faults,
    notes=notes,
    files=files,
    options={"links": LINKS},
)
