"""`planc trace`: what it writes, whole or not at all, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from planc import cli

SPEC = """name: small
model: {base: moe-4l, layers: 2, hidden: 64, attention: {heads: 8, head_dim: 8}, moe: {experts: 8, intermediate: 32}}
cluster: h100-sxm-1x8
workload: {batch: 64, isl: 16}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    return tmp_path


def test_trace_writes_a_file_per_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "spec.yaml", "-o", "traces", "--ranks", "0-1,5", "--json"]) == 0
    said = capsys.readouterr()
    files = [str(Path("traces") / f"rank-{rank}.json.gz") for rank in (0, 1, 5)]
    assert json.loads(said.out)["files"] == files and "wrote 3 files to traces" in said.err
    assert sorted(map(str, Path("traces").iterdir())) == files
    assert json.loads(gzip.decompress(Path(files[2]).read_bytes()))["distributedInfo"]["rank"] == 5


def test_a_plan_and_its_spec_give_the_same_trace() -> None:
    assert cli.main(["build", "spec.yaml", "-o", "plan", "--figures", "none"]) == 0
    for source in ("spec.yaml", "plan"):
        assert cli.main(["trace", source, "-o", f"of-{source}", "--chrome"]) == 0
        assert [path.name for path in Path(f"of-{source}").iterdir()] == ["step.json.gz"]
    assert Path("of-plan/step.json.gz").read_bytes() == Path("of-spec.yaml/step.json.gz").read_bytes()


@pytest.mark.parametrize(("ranks", "code"), [("0-8", "PLN014"), ("3-1", "PLN012"), ("a", "PLN012"), ("", "PLN012")])
def test_bad_ranks_are_refused_and_nothing_is_written(
    ranks: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["trace", "spec.yaml", "-o", "traces", "--ranks", ranks, "--format", "json"]) == 1
    [fault] = json.loads(capsys.readouterr().out)["diagnostics"]
    assert (fault["code"], fault["file"]) == (code, "--ranks")
    assert not Path("traces").exists()


def test_traces_are_written_whole_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "spec.yaml", "-o", "traces", "--ranks", "0"]) == 0
    before = Path("traces/rank-0.json.gz").read_bytes()
    Path("traces/rank-4.json.gz").mkdir()
    Path("spec.yaml").write_text(SPEC.replace("batch: 64", "batch: 128"))
    assert cli.main(["trace", "spec.yaml", "-o", "traces"]) == 1
    assert "error[PLN017]: cannot write to traces: rank-4.json.gz is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in Path("traces").iterdir()) == ["rank-0.json.gz", "rank-4.json.gz"]
    assert Path("traces/rank-0.json.gz").read_bytes() == before
