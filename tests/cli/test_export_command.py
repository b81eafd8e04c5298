"""`planc export`: files for the targets asked for, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planc.export.targets import TARGETS


def test_the_command(run: Callable[..., Any], tmp_path: Path) -> None:
    spec = "moe-61l-ep64-dp2"
    found = run("export", spec, "--to", "sglang", "-o", tmp_path / "out", "--json")
    assert (
        found.status == 0
        and len(found.json["files"]) == 2
        and any("leaders" in note for note in found.json["notes"]["sglang"])
    )
    assert "MODEL:?" in (tmp_path / "out" / "sglang" / "launch.sh").read_text()
    for options, word in (
        (("--to", "sglan", "-o", "x"), "did you mean `sglang`"),
        (("--to", "SGLang", "-o", "x"), "did you mean `sglang`"),
        (("--to", "all,bogus", "-o", "x"), "`bogus`"),
        (("--to", ",", "-o", "x"), "--to is missing"),
        (("--to", "sglang", "-o", ""), "-o is missing"),
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


def test_a_plan_that_fails_verification_is_not_exported(run: Callable[..., Any], tmp_path: Path) -> None:
    """Expert 1 moved onto the GPU of expert 0, by hand: the file says a plan that breaks the rule."""
    assert run("build", "moe-4l-16gpu-baseline", "-o", tmp_path / "plan", "--figures", "none").status == 0
    path = tmp_path / "plan" / "plan.json"
    record = json.loads(path.read_text())
    block = next(block for block in record["graph"]["blocks"] if block["kind"] == "expert")
    block["ranks"] = "0-14,14"
    path.write_text(json.dumps(record))
    found = run("export", tmp_path / "plan", "--to", "all", "-o", tmp_path / "out")
    assert found.status == 1 and "error[PLN3" in found.err and not (tmp_path / "out").exists()


def listed(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "planc-export.json").read_text())["targets"]
    return record


def test_only_what_an_export_wrote_is_removed(run: Callable[..., Any], tmp_path: Path) -> None:
    """Files of the same targets, of those that are refused now, and nothing else that lies there."""
    out = tmp_path / "out"
    assert run("export", "moe-61l-ep64-dp2", "--to", "sglang,chakra", "-o", out).status == 0
    assert len(listed(out)["chakra"]["files"]) == 133 and (out / "chakra" / "trace.127.et").is_file()
    (out / "chakra" / "my.txt").write_text("mine")
    (out / "notes.md").write_text("mine")
    assert run("export", "moe-4l-64gpu", "--to", "chakra", "-o", out).status == 0
    assert not (out / "chakra" / "trace.127.et").exists() and (out / "chakra" / "trace.63.et").is_file()
    assert listed(out)["sglang"]["plan"] == "moe-61l-ep64-dp2" and listed(out)["chakra"]["plan"] == "moe-4l-64gpu"
    assert "flat switch" in " ".join(listed(out)["chakra"]["notes"])
    assert run("export", "moe-4l-64gpu", "--to", "all", "-o", out).status == 0
    assert "sglang" not in listed(out) and not (out / "sglang").exists()  # which cannot express this plan
    assert (out / "chakra" / "my.txt").read_text() == (out / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    "files", [["\udcff"], ["../../mine"], ["/mine"], ["a/../../mine"], [""], ["."], [3], "mine", None, [["mine"]]]
)
def test_a_list_that_planc_did_not_write_removes_nothing(
    run: Callable[..., Any], tmp_path: Path, files: object
) -> None:
    out = tmp_path / "x" / "out"
    out.mkdir(parents=True)
    kept = [tmp_path / "mine", tmp_path / "x" / "mine", out / "mine"]
    for path in kept:
        path.write_text("mine")
    record = {"format": "planc-export-1", "targets": {"sglang": {"files": files}}}
    (out / "planc-export.json").write_text(json.dumps(record))
    assert run("export", "moe-61l-ep64-dp2", "--to", "sglang", "-o", out).status == 0
    assert all(path.exists() for path in kept) and len(listed(out)["sglang"]["files"]) == 2
