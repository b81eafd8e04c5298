"""Fuzz the reader of specs and, where a spec is sound and small, the compiler: `make fuzz`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import atheris
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fuzz.harness import ROOT, fuzz  # noqa: E402

with atheris.instrument_imports(include=["planc"]):
    import planc.placement.known_traffic  # noqa: F401, imported late otherwise
    from planc.diagnostics import PlancError, render_json, render_text
    from planc.pipeline import compile
    from planc.spec import Spec, parse_spec
    from planc.verify import plan_json
    from planc.verify.read import parse_plan

from fuzz.seeds import specs  # noqa: E402

FOLDER = ROOT / "tests" / "bad_specs"


def run(text: str) -> None:
    try:
        spec = parse_spec(text, folder=FOLDER)
    except PlancError as error:
        shown(error)
        return
    if not small(spec):
        return
    try:
        plan = compile(spec)
    except PlancError as error:
        assert not any(d.code.startswith("PLN3") for d in error.diagnostics), "the verifier refused planc's own plan"
        shown(error)
        return
    assert parse_plan(plan_json(plan)) == plan


def shown(error: PlancError) -> None:
    """Every fault can be shown."""
    assert error.diagnostics
    render_text(error.diagnostics).encode()
    render_json(error.diagnostics).encode()


def small(spec: Spec) -> bool:
    """Whether the spec compiles in about a second."""
    sizes = spec.model.layers, spec.model.moe.experts if spec.model.moe else 0, spec.cluster.gpus
    if spec.policy != "topology":
        return sizes[0] <= 8 and max(sizes) <= 32
    kinds = [
        *spec.scenarios.values(),
        *([spec.traffic] if spec.traffic else []),
    ]  # a search for a placement takes longer
    return sizes[0] <= 2 and max(sizes) <= 8 and len(kinds) <= 2 and all(kind.tokens <= 128 for kind in kinds)


def yaml_text(tree: Any) -> str:
    return str(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False, default_flow_style=None))


if __name__ == "__main__":
    files = sorted([*FOLDER.glob("*.yaml"), *(ROOT / "specs").glob("*.yaml")])
    texts = [file.read_text(encoding="utf-8") for file in files]
    seeds = [text for text in texts if len(text) < 20_000]
    fuzz("spec", run, seeds + [yaml_text(spec.model_dump(mode="json")) for spec in specs()], yaml.safe_load, yaml_text)
