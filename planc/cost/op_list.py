"""A CSV of ops: read, checked cell by cell, priced, and written back with its prices.

The header names `kind`, `dtype` and the columns that the kinds in the file need (`planc.cost.ops.KINDS`); other columns
are kept as they are. Lines before it that start with `#` are comments, and are left out of what is written. A list of
measured times (columns `us`, `us_p10` and `us_p90`, as `benchmarks/gpu` writes it) is priced too: its `us` is called
`measured_us` beside the price. Every fault is reported with its line; a file with a fault is not priced.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planc.cost.ops import CHOICES, KINDS, Costs
from planc.diagnostics import Diagnostic, PlancError, Span, closest
from planc.spec.text import decode, read_bytes

#: names of element types in measured tables -> planc's
DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "half": "fp16", "float16": "fp16"}
DTYPES |= {"fp8": "fp8", "fp8_block": "fp8", "int8": "fp8"}
ADDED = ("us", "low_us", "high_us", "provenance")
SPREAD = ("us_p10", "us_p90")  #: what says of a list that its `us` is measured
_GATED = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0}
_LEAST = {"ranks": 2.0, "kv_heads": 0.0}
_MOST = 1e15
_MOST_FAULTS = 1000
#: (kind, the smaller column, the larger one)
_ORDERED = (
    ("expert_gemm", "top_k", "experts"),
    ("expert_gemm", "ep", "experts"),
    ("attention_decode", "kv_heads", "heads"),
    ("attention_prefill", "kv_heads", "heads"),
    ("attention_prefill", "tokens", "kv_len"),
    ("dispatch", "top_k", "experts"),
    ("combine", "top_k", "experts"),
)


@dataclass(frozen=True, slots=True)
class OpList:
    """A checked list: header (a measured `us` as `measured_us`) and rows as written, their lines, and the rows of each
    kind and dtype with their sizes."""

    file: str
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    groups: dict[tuple[str, str], tuple[list[int], dict[str, list[float | str]]]]


def read_ops(path: str | os.PathLike[str]) -> OpList:
    """Read a list of ops. Raises PlancError with every fault (PLN404, PLN405)."""
    name = os.fspath(path)
    text = decode(read_bytes(name), name)
    comments = 0
    while text.startswith("#"):
        text = text.partition("\n")[2]
        comments += 1
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(comments + reader.line_num)
    except csv.Error as error:
        raise PlancError(
            [Diagnostic("PLN404", f"malformed CSV: {error}", span=Span(name, comments + reader.line_num, 1))]
        ) from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if set(SPREAD) <= set(header):
        header = ["measured_us" if cell == "us" else cell for cell in header]
    _check_header(header, Span(name, lines[0] if lines else 1, 1))
    groups: dict[tuple[str, str], tuple[list[int], dict[str, list[float | str]]]] = {}
    faults: list[Diagnostic] = []
    for index, row in enumerate(rows[1:]):
        found = _read_row(dict(zip(header, row, strict=False)), row, header, Span(name, lines[index + 1], 1))
        if isinstance(found, list):
            faults += found
            if len(faults) >= _MOST_FAULTS:
                raise PlancError(faults[:_MOST_FAULTS])
            continue
        key, values = found
        at, columns = groups.setdefault(key, ([], defaultdict(list)))
        at.append(index)
        for column, value in values.items():
            columns[column].append(value)
    if faults:
        raise PlancError(faults)
    return OpList(name, header, rows[1:], lines[1:], groups)


def _check_header(header: list[str], span: Span) -> None:
    found = ",".join(header)[:200] or "nothing"
    hint = f"the first line names the columns, as in kind,dtype,m,n,k; it has: {found}"
    faults = [
        Diagnostic("PLN404", f"the column `{column}` is missing", span=span, hint=hint)
        for column in ("kind", "dtype")
        if column not in header
    ]
    twice = sorted({column[:60] for column in header if header.count(column) > 1})
    faults += [Diagnostic("PLN404", f"the column `{column}` appears twice", span=span) for column in twice]
    taken = [column for column in ADDED if column in header]
    hint = "price the list of ops, not one that is priced already"
    faults += [
        Diagnostic("PLN404", f"the column `{column}` is one that prices add", span=span, hint=hint) for column in taken
    ]
    if faults:
        raise PlancError(faults)


def _read_row(
    cells: dict[str, str], row: list[str], header: list[str], span: Span
) -> tuple[tuple[str, str], dict[str, float | str]] | list[Diagnostic]:
    """Kind, dtype and sizes of one row, or what is wrong with it."""
    if len(row) != len(header):
        return [Diagnostic("PLN404", f"{len(row)} cells under {len(header)} columns", span=span)]
    kind, dtype = cells["kind"].strip(), cells["dtype"].strip()
    if kind not in KINDS:
        hint = closest(kind, KINDS) or f"kinds: {', '.join(KINDS)}"
        return [Diagnostic("PLN405", f"`{kind[:40]}` is not a kind of op", "kind", span, hint)]
    faults = []
    carries_dtype = not {"library", "mode"} & set(KINDS[kind])
    if dtype not in DTYPES and (carries_dtype or dtype):
        hint = f"dtypes: {', '.join(DTYPES)}"
        faults.append(Diagnostic("PLN405", f"`{dtype[:40]}` is not a dtype", "dtype", span, hint))
    values: dict[str, float | str] = {}
    for column in KINDS[kind]:
        if column not in cells:
            faults.append(Diagnostic("PLN404", f"{kind} needs the column `{column}`", column, span))
            continue
        try:
            values[column] = _cell(column, cells[column].strip())
        except ValueError as error:
            faults.append(Diagnostic("PLN405", f"`{column}` of {kind}: {error}", column, span))
    faults += [*_order_faults(kind, values, span)]
    return faults or ((kind, DTYPES.get(dtype, "bf16")), values)


def _order_faults(kind: str, values: dict[str, float | str], span: Span) -> Iterator[Diagnostic]:
    for one, small, large in _ORDERED:
        if kind == one and small in values and large in values and float(values[small]) > float(values[large]):
            message = f"{small} {values[small]:g} exceeds {large} {values[large]:g}"
            yield Diagnostic("PLN405", message, small, span)


def _cell(column: str, text: str) -> float | str:
    """The value of one cell; ValueError says what is wrong with it."""
    if not text:
        raise ValueError("the cell is empty")
    if column in CHOICES:
        if text not in CHOICES[column]:
            raise ValueError(f"`{text[:40]}` is not one of {', '.join(CHOICES[column])}")
        return text
    if column == "gated":
        if text.lower() not in _GATED:
            raise ValueError(f"`{text[:40]}` is not true or false")
        return _GATED[text.lower()]
    if column == "skew" and text in ("balanced", "uniform"):
        return 0.0
    return _number(column, text.removeprefix("power_law_") if column == "skew" else text)


def _number(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"`{text[:40]}` is not a number") from None
    if column == "skew":
        if not 0 < value <= 8:
            raise ValueError(f"`{text[:40]}` is neither `balanced` nor an exponent above 0 and at most 8")
        return value
    least = _LEAST.get(column, 1.0)
    if not math.isfinite(value) or not least <= value <= _MOST:
        raise ValueError(f"`{text[:40]}` is not a number from {least:g} to {_MOST:g}")
    if column in ("experts", "ep", "ranks", "nodes", "top_k") and (value != int(value) or value > 65536):
        raise ValueError(f"`{text[:40]}` is not a whole number of at most 65536")
    return value


def price_ops(ops: OpList, costs: Costs) -> str:
    """The list with its prices, as CSV text: microseconds to six significant digits. Raises PlancError where the GPU
    has no peak for a dtype."""
    faults = [
        Diagnostic(
            "PLN110", f"{costs.gpu.name} gives no peak FLOPS for {dtype}", "dtype", Span(ops.file, ops.lines[row], 1)
        )
        for (kind, dtype), (at, _) in ops.groups.items()
        if dtype not in costs.hardware.peaks and not {"library", "mode"} & set(KINDS[kind])
        for row in at[:_MOST_FAULTS]
    ]
    if faults:
        raise PlancError(faults)
    added = np.empty((len(ops.rows), len(ADDED)), dtype="U16")
    for (kind, dtype), (at, sizes) in ops.groups.items():
        price = costs.price(kind, sizes, dtype)
        for column, values in enumerate((price.seconds, price.low, price.high)):
            added[at, column] = [f"{value * 1e6:.6g}" for value in values.tolist()]
        added[at, 3] = price.provenance
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*ops.header, *ADDED])
    writer.writerows([*row, *more] for row, more in zip(ops.rows, added.tolist(), strict=True))
    return out.getvalue()
