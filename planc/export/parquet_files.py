"""The plan's tables as Parquet, by pyarrow (the extra `parquet`); the plan's name is in each file's metadata."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from planc.diagnostics import Diagnostic
from planc.export.tables import LINKS, MAX_ROWS, Part, Table, size_of, table_faults, table_notes, tables
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
    yield from table_faults(job, TARGET.title, _links(job))


def notes(job: Job) -> Iterator[str]:
    """What a table does not say."""
    yield from table_notes(job, _links(job))


def _links(job: Job) -> str:
    return job.options.get("parquet.links", LINKS[0])


def files(job: Job) -> Iterator[tuple[str, bytes]]:
    """A file for each table."""
    from pyarrow import parquet

    for table in tables(job, _links(job)):
        held = io.BytesIO()
        parquet.write_table(_arrow(table, job.plan.spec.name), held)
        yield f"{table.name}.parquet", held.getvalue()


def _arrow(table: Table, plan: str) -> Any:
    """The table as a `pyarrow.Table`, its parts joined."""
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "text": pa.string()}
    schema = pa.schema([(name, types[kind]) for name, kind in table.types.items()], metadata={"planc.plan": plan})

    def whole(part: Part) -> Any:
        size = size_of(part)
        columns = [
            pa.array(part[field.name], field.type)
            if isinstance(part[field.name], np.ndarray | list)
            else pa.repeat(pa.scalar(part[field.name], field.type), size)
            for field in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    return pa.concat_tables([schema.empty_table(), *(whole(part) for part in table.parts())]).combine_chunks()


TARGET = Target(
    title="Parquet",
    version="",
    says="placement, ranks with their memory, bytes between ranks, ops with their times",
    lacks=f"which op reads what, tables of more than {MAX_ROWS:,} rows",
    faults=faults,
    notes=notes,
    files=files,
    options={"links": LINKS},
)
