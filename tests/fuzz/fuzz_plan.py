"""Fuzz the reader of plan.json, which takes the file for untrusted text: `make fuzz`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.harness import fuzz, json_text

with atheris.instrument_imports(include=["planc"]):
    from planc.diagnostics import PlancError, render_json, render_text
    from planc.verify import plan_json
    from planc.verify.read import parse_plan

from fuzz.seeds import plans


def run(text: str) -> None:
    try:
        plan_json(parse_plan(text)).encode()  # what was read can be written
    except PlancError as error:
        assert error.diagnostics
        assert all(d.span is not None for d in error.diagnostics)
        render_text(error.diagnostics).encode()
        render_json(error.diagnostics).encode()


if __name__ == "__main__":
    fuzz("plan", run, [json_text(json.loads(plan_json(plan))) for plan in plans()], json.loads, json_text)
