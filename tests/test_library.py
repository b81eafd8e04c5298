"""The public surface: its names, the README's example, and files that must be up to date."""

import json
import re
import subprocess
import sys
from pathlib import Path

import planc
from planc.report.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"Cluster", "Diagnostic", "ExpertMap", "PlancError", "Request", "Spec", "Traffic", "VerifiedPlan"}
NAMES |= {
    "Costs",
    "Estimate",
    "Prices",
    "Timeline",
    "load_costs",
    "compile",
    "load_cluster",
    "load_plan",
    "load_spec",
    "load_traffic",
    "parse_spec",
    "place",
}


def test_public_names():
    assert set(planc.__all__) == NAMES | {"__version__"}
    assert all(getattr(planc, name) is not None for name in NAMES)


def test_importing_planc_is_light():
    code = (
        "import sys, planc; print([m for m in ('numpy', 'pydantic', 'networkx', 'jinja2', 'yaml') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_readme_library_example_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 4
    code = "\n".join(blocks).replace("specs/", f"{ROOT}/specs/")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["graph"].nodes["L2.expert.r33"]["expert"] == 1
    assert (tmp_path / "out/my-plan/plan.json").exists()
    assert names["found"]["winner"]["ep"] == 8 and names["found"]["optimal"]
    assert len(json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]) == 58


def test_readme_spec_example_is_valid():
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    spec = planc.parse_spec(example, folder=ROOT / "specs")
    assert planc.compile(spec).parallelism == planc.compile(planc.load_spec("moe-61l-ep64-dp2")).parallelism


def test_readme_shows_what_a_refusal_really_prints():
    command, shown = re.search(
        r"```\n\$ (planc check [^\n]*)\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    ).groups()
    run = [sys.executable, "-m", *command.split()]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, shown)


def test_readme_names_the_make_targets():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "check", "bench"} <= targets
    assert set(re.findall(r"`?make ([a-z]+)", text)) <= targets


def test_published_schemas_are_up_to_date():
    for what in ("spec", "plan"):
        assert json.loads((ROOT / f"docs/{what}.schema.json").read_text()) == json_schema(what), (
            f"run make schema ({what})"
        )


def test_readme_figure_is_up_to_date():
    from planc.render import PAGE_FIGURES, svg

    plan = planc.compile(planc.load_spec("moe-61l-ep64-dp2"))
    drawn = svg(PAGE_FIGURES["simplified_moe_dag"](plan))
    assert (ROOT / "docs/figures/simplified_moe_dag.svg").read_text() == drawn, "run make figures"


def test_example_specs_point_editors_to_the_schema():
    files = sorted((ROOT / "specs").glob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        assert file.read_text().startswith("# yaml-language-server: $schema=../docs/spec.schema.json\n"), file
