"""`planc export`: files for the targets asked for, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planc.export.targets import TARGETS


def test_the_command(run: Callable[..., Any], tmp_path: Path) -> None:
    spec = "moe-61l-ep64-dp2"
    found = run("export", spec, "--to", "sglang", "-o", tmp_path / "out", "--json")
    assert found.status == 0 and len(found.json["files"]) == 2 and "leaders" in found.json["notes"]["sglang"][0]
    assert "MODEL:?" in (tmp_path / "out" / "sglang" / "launch.sh").read_text()
    (tmp_path / "out" / "sglang" / "old").write_text("of an earlier export")
    assert run("export", spec, "--to", "sglang", "-o", tmp_path / "out").status == 0
    assert not (tmp_path / "out" / "sglang" / "old").exists()
    for options, word in (
        (("--to", "sglan", "-o", "x"), "did you mean `sglang`"),
        (("--to", "sglang"), "-o is missing"),
        (("-o", "x"), "--to is missing"),
        (("--to", "sglang", "-o", "x", "--option", "sglang.x=1"), "not an option"),
    ):
        answer = run("export", spec, *options)
        assert answer.status == 1 and "PLN502" in answer.err and word in answer.err, answer
    answer = run("export", "moe-4l-64gpu", "--to", "all", "-o", tmp_path / "all")
    assert answer.status == 0 and "PLN503" in answer.err
    listed = run("export", "--list").out
    assert all(f"{name}: " in listed for name in TARGETS)
