"""docs/deploy.md: every command of the walk-through runs, and prints what the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from small_specs import ROOT

from planc import cli

PAGE = (ROOT / "docs" / "deploy.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def recorded(path: str) -> None:
    """Loads in the form that the page's Python saves: [steps, layers, experts], dense layers empty."""
    random = np.random.default_rng(0)
    loads = random.permuted(np.tile(1 / np.arange(1, 257) ** 0.5, (61, 1)), axis=1)
    loads[:3] = 0
    np.savez(path, logical_count=random.poisson(2000 * loads, size=(2, 61, 256)).astype(np.int32))


def test_the_walk_through_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded("loads.npz")
    printed, ran = "", 0
    for kind, text in BLOCKS:
        if kind == "yaml":
            Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif kind == "sh":
            printed = ""
            for line in text.splitlines():
                if not line.startswith("planc "):
                    continue
                status = cli.main(shlex.split(line)[1:])
                out = capsys.readouterr()
                printed += out.out + out.err
                ran += 1
                assert status == ("error[" in out.err), (line, out.err)
        elif kind == "text":
            shown = [line for line in text.splitlines() if line not in printed.splitlines()]
            assert not shown, (shown, printed)
    assert ran == sum(line.startswith("planc ") for kind, text in BLOCKS if kind == "sh" for line in text.splitlines())
    assert (
        Path("next-deploy/sglang/expert_location.json").read_text()
        != Path("deploy/sglang/expert_location.json").read_text()
    )
