"""Quantities: exact in, readable out, and nothing but a quantity with its unit accepted."""

from __future__ import annotations

from fractions import Fraction

import pytest

from planc.units import (
    EXAMPLES,
    UNITS,
    format_bytes,
    format_count,
    format_flops,
    format_rate,
    format_seconds,
    parse_quantity,
    split_evenly,
)

EXACT: dict[tuple[object, str], int | float] = {
    ("64 GB", "bytes"): 64 * 10**9,
    ("64GB", "bytes"): 64 * 10**9,
    ("  64   GB ", "bytes"): 64 * 10**9,
    ("80 GiB", "bytes"): 80 * 2**30,
    ("1 KiB", "bytes"): 1024,
    ("1 kB", "bytes"): 1000,
    ("0.1 GB", "bytes"): 10**8,
    ("1.000000001 GB", "bytes"): 1_000_000_001,
    ("16 Gb", "bytes"): 2 * 10**9,
    ("8 bit", "bytes"): 1,
    ("1_000 B", "bytes"): 1000,
    ("+1e3 B", "bytes"): 1000,
    ("-1 GB", "bytes"): -(10**9),
    ("9007199254740993 B", "bytes"): 2**53 + 1,
    ("0.3 B", "bytes"): 0.3,
    ("1.8 TB/s", "bytes_per_s"): 1_800_000_000_000,
    ("400 Gb/s", "bytes_per_s"): 50 * 10**9,
    ("400 Gbps", "bytes_per_s"): 50 * 10**9,
    ("400 Gbit/s", "bytes_per_s"): 50 * 10**9,
    ("1 GBps", "bytes_per_s"): 10**9,
    ("3.35 TB/s", "bytes_per_s"): 3_350_000_000_000,
    ("1 TiB/s", "bytes_per_s"): 2**40,
    ("400 TFLOPS", "flops"): 400 * 10**12,
    ("989.5 TFLOPS", "flops"): 989_500_000_000_000,
    ("2.5 PFLOP/s", "flops"): 2_500_000_000_000_000,
    ("1979 Tflops", "flops"): 1979 * 10**12,
    ("100 us", "seconds"): 0.0001,
    ("100 µs", "seconds"): 0.0001,
    ("100 μs", "seconds"): 0.0001,
    ("12.5 us", "seconds"): 12.5e-6,
    ("2000 ms", "seconds"): 2,
    ("7 ns", "seconds"): 7e-9,
    ("60 %", "fraction"): 0.6,
    ("60%", "fraction"): 0.6,
    ("100 %", "fraction"): 1,
    ("0.6", "fraction"): 0.6,
    (0.6, "fraction"): 0.6,
    (1, "fraction"): 1,
}

REFUSED: list[tuple[object, str]] = [
    *((value, dimension) for dimension in UNITS for value in (None, True, [], {}, b"1 GB", "", " ", "GB", "%", "-", "1 x", "1 GB GB")),
    *((value, dimension) for dimension in ("bytes", "bytes_per_s", "flops", "seconds") for value in (64, 64.0, "64", "0")),
    *((float(value), dimension) for dimension in UNITS for value in ("nan", "inf", "-inf")),
    *((value, "bytes") for value in ("1 gb", "1 GB/s", "1 TFLOPS", "1 Gi", "1,5 GB", "1 000 GB", "٣ GB", "0x10 GB", "1e1000 GB", "1.2.3 GB", "--1 GB")),
    *((value, "bytes_per_s") for value in ("1 GB", "1 GB / s", "1 GB/S", "1 TB/ms", "1 MT/s")),
    *((value, "flops") for value in ("400 TFLOP", "400 tflops", "1 TOPS", "1 GB")),
    *((value, "seconds") for value in ("1 m", "1 min", "1 sec", "1 US", "1:30")),
    *((value, "fraction") for value in ("60 percent", "60 %%", "6/10")),
    ("9" * 65 + " GB", "bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "dimension"), EXACT)
def test_exact(value: object, dimension: str) -> None:
    found = parse_quantity(value, dimension)
    assert found == EXACT[value, dimension]
    assert type(found) is type(EXACT[value, dimension])


@pytest.mark.parametrize(("value", "dimension"), REFUSED)
def test_refused(value: object, dimension: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_quantity(value, dimension)
    assert EXAMPLES[dimension] in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("dimension", UNITS)
def test_every_unit_of_the_table(dimension: str) -> None:
    assert parse_quantity(EXAMPLES[dimension], dimension) > 0
    for unit, factor in UNITS[dimension].items():
        exact = Fraction(15, 8) * factor
        assert parse_quantity(f"1.875 {unit}", dimension) == (int(exact) if exact.denominator == 1 else float(exact))


def test_prefixes_are_decimal_and_binary() -> None:
    for power, prefix in enumerate("KMGTP", 1):
        assert UNITS["bytes"][f"{prefix}iB"] == 1024**power
        assert UNITS["bytes"][f"{prefix}B"] == UNITS["flops"][f"{prefix}FLOPS"] == 1000**power
        assert UNITS["bytes_per_s"][f"{prefix}b/s"] * 8 == 1000**power


def test_formats() -> None:
    assert [format_bytes(n) for n in (0, 1, 999, 1000, 58_720_256, 999_999, 10**24)] == [
        "0 B", "1 B", "999 B", "1 kB", "58.72 MB", "1 MB", "1000000 EB",
    ]  # fmt: skip
    assert format_rate(1.8e12) == "1.8 TB/s"
    assert format_flops(989.5e12) == "989.5 TFLOPS"
    assert [format_seconds(s) for s in (0, 1e-9, 27e-6, 0.002366, 1, 90)] == [
        "0 us",
        "0.001 us",
        "27 us",
        "2.366 ms",
        "1 s",
        "90 s",
    ]
    assert [format_count(n) for n in (7, 12_345, 1_500_000, 671.03e9, 1.2e12)] == [
        "7",
        "12,345",
        "1.5 M",
        "671.03 B",
        "1.2 T",
    ]


@pytest.mark.parametrize(("total", "parts"), [(0, 3), (2, 3), (3, 3), (10, 4), (64, 64)])
def test_split_evenly(total: int, parts: int) -> None:
    shares = split_evenly(total, parts)
    assert (sum(shares), len(shares)) == (total, parts)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1
