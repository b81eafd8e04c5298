"""Running planc's command line inside the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from planc import cli


class Answer(NamedTuple):
    """What one run of planc gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """``run("estimate", spec)``: planc with these arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        return Answer(status, *capsys.readouterr())

    return call
