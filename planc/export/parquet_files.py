"""The plan's tables as Parquet, by pyarrow (the extra `parquet`); the plan's name is in each file's metadata."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.links import Value
from planc.export.tables import LACKS, LINKS, SAYS, Table, size_of, table_faults, table_notes, tables
from planc.export.target import Job, Target


def faults(job: Job) -> Iterator[Diagnostic]:
    """No pyarrow (PLN510), tables too large."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        hint = (
            "install pyarrow 17 or newer beside planc: `pip install 'planc[parquet]'`; or export `csv`, the same tables"
        )
        yield Diagnostic("PLN510", "Parquet files are written by pyarrow: there is none", hint=hint)
    yield from table_faults(job, TARGET.title, "parquet.links")


def notes(job: Job) -> Iterator[str]:
    """What a table does not say."""
    yield from table_notes(job, "parquet.links")


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """A file for each table."""
    from pyarrow import parquet

    for table in tables(job, "parquet.links"):
        held = io.BytesIO()
        parquet.write_table(_arrow(table, job.plan.spec.name), held)
        yield f"{table.name}.parquet", held.getvalue()


def _arrow(table: Table, plan: str) -> Any:
    """The table as a `pyarrow.Table`, its parts joined."""
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    schema = pa.schema([(name, types[kind]) for name, kind in table.types.items()], metadata={"planc.plan": plan})

    def column(cells: Value, kind: Any, size: int) -> Any:
        return pa.array(cells, kind) if isinstance(cells, np.ndarray) else pa.repeat(pa.scalar(cells, kind), size)

    parts = [schema.empty_table()]
    for part in table.parts:
        size = size_of(part)
        parts.append(pa.Table.from_arrays([column(part[f.name], f.type, size) for f in schema], schema=schema))
    return pa.concat_tables(parts).combine_chunks()


TARGET = Target(
    title="Parquet",
    version="",
    says=SAYS,
    lacks=LACKS,
    faults=faults,
    notes=notes,
    files=files,
    options={"links": LINKS},
)
