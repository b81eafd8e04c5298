"""Fit files: those that ship are sound; a faulty one is refused with a code at the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from planc.cost.fits import FAMILIES, fit_names, load_fit
from planc.diagnostics import PlancError
from planc.spec import shipped_folder

SHIPPED = (shipped_folder("specs") / "fits" / "h100-sxm.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", fit_names())
def test_shipped_fits_are_sound(name: str) -> None:
    fit = load_fit(name)
    assert fit.gpu == name
    for family in FAMILIES:
        part = getattr(fit, family)
        assert (part is None) == (family in fit.absent)
        if part is not None:
            assert part.source and part.rows >= 4
            assert part.interval.outside[0] <= part.interval.inside[0] <= 1 <= part.interval.inside[1]


def _cut(family: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        start = text.index(f"\n{family}:") + 1
        end = text.index("\n", text.index("constants:", start)) + 1
        while text[end : end + 4] == "    ":
            end = text.index("\n", end) + 1
        return text[:start] + text[end:]

    return change


def _put(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


def _constant(name: str, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        start = text.index(f"    {name}: ") + 4
        return f"{text[:start]}{name}: {value}{text[text.index(chr(10), start) :]}"

    return change


def _line(prefix: str, line: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        start = text.index(prefix)
        return f"{text[:start]}{line}{text[text.index(chr(10), start) :]}"

    return change


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (_constant("overhead", "2.4 GB/s"), "PLN013", "unknown unit `GB/s`"),
        (_constant("overhead", "-1 us"), "PLN014", "must be positive"),
        (_constant("overhead", "0 us"), "PLN014", "must be positive"),
        (_constant("overhead", ".nan"), "PLN013", "nan"),
        (_constant("nvlink_bandwidth", "0 GB/s"), "PLN014", "must be positive"),
        (_constant("nic_bandwidth", "[37 GB/s, 40 GB/s]"), "PLN", "nic_bandwidth"),
        (_constant("memory_efficiency", "120 %"), "PLN014", "at most 100 %"),
        (_constant("overlap", ".inf"), "PLN01", "overlap"),
        (_constant("prologue", "-3"), "PLN014", "at least 0"),
        (_constant("tile_edge", "wide"), "PLN012", "expected a number"),
        (_put("    tile_edge:", "    tile_egde:"), "PLN010", "tile_egde"),
        (_put("sms: 132\n", ""), "PLN011", "sms"),
        (_cut("mla_decode"), "PLN401", "the family `mla_decode` is missing"),
        (_put("sms: 132\n", "sms: 132\nabsent: [gemm]\n"), "PLN401", "`gemm` is fitted and listed as absent"),
        (_put("sms: 132\n", "sms: 132\nabsent: [gem]\n"), "PLN401", "`gem` in `absent` is not a family"),
        (_put("valid: {m: [1, 8192]", "valid: {m: [8192, 1]"), "PLN402", "runs from 8192 down to 1"),
        (_line("  interval: ", "  interval: {inside: [1.1, 1.2], outside: [0.9, 1.3]}"), "PLN402", "widen around 1"),
        (_line("  interval: ", "  interval: {inside: [0.8, 1.2], outside: [0.9, 1.3]}"), "PLN402", "widen around 1"),
    ],
)
def test_faults_are_refused(tmp_path: Path, change: Callable[[str], str], code: str, words: str) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(change(SHIPPED), "utf-8")
    with pytest.raises(PlancError) as refused:
        load_fit(path)
    found = [d for d in refused.value.diagnostics if d.code.startswith(code)]
    assert found, refused.value
    assert any(words in f"{d.path} {d.message}" for d in found)
    assert all(d.span is not None and d.span.file == str(path) for d in found)


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(_cut("gemm")(_cut("mla_decode")(SHIPPED)), "utf-8")
    with pytest.raises(PlancError) as refused:
        load_fit(path)
    assert len(refused.value.diagnostics) == 2


@pytest.mark.parametrize("like", ["h100", "h800-sxm", "a100-sxm-80gb"])
def test_a_chip_that_has_no_fit_cannot_be_named(tmp_path: Path, like: str) -> None:
    text = (shipped_folder("specs") / "fits" / "h800-sxm.yaml").read_text()
    path = tmp_path / "fit.yaml"
    path.write_text(text.replace("like: h100-sxm", f"like: {like}"))
    with pytest.raises(PlancError, match="PLN401") as caught:
        load_fit(path)
    assert "is no other GPU with a fit" in caught.value.diagnostics[0].message
