"""The command line: exit status, what goes to which stream, forms of diagnostics, help, and every command once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from planc import cli, pipeline
from planc.diagnostics import CODES
from planc.spec import load_model, shipped_folder
from planc.spec.text import parse_yaml

HERE = Path(__file__).parent
BAD = HERE.parent / "bad_specs"
COMMANDS = ("build", "check", "verify", "explain", "show", "place", "costs", "trace", "import-hf", "schema", "init")
SPEC = """name: small
model: {base: moe-4l, layers: 2, hidden: 64, attention: {heads: 8, head_dim: 8}, moe: {experts: 8, intermediate: 32}}
cluster: h100-sxm-1x8
workload: {batch: 64, isl: 16}
"""


class Answer(NamedTuple):
    """What one run of planc gave."""

    status: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`planc ARGUMENTS` inside this process, in an empty folder that holds spec.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)

    def call(*arguments: object) -> Answer:
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        return Answer(status, *capsys.readouterr())

    return call


def planc(*arguments: object, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """`python -m planc ARGUMENTS` as another process."""
    command = [sys.executable, "-m", "planc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False, **more)


# --- as another process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "stream", "text"),
    [
        (("--version",), 0, "stdout", "planc 0."),
        (("--help",), 0, "stdout", "Example: planc build"),
        ((), 2, "stderr", "usage: planc"),
        (("no-such-command",), 2, "stderr", "invalid choice"),
        (("check",), 2, "stderr", "required: spec"),
        (("check", "mixtral-8x7b"), 0, "stderr", "no faults"),
        (("check", "nowhere.yaml"), 1, "stderr", "error[PLN001]"),
        (("check", BAD / "top_k.yaml"), 1, "stderr", "error[PLN101]"),
        (("explain", "PLN201"), 0, "stdout", "memory overflow"),
    ],
)
def test_status_and_streams(arguments: tuple[object, ...], status: int, stream: str, text: str) -> None:
    done = planc(*arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
    assert text in getattr(done, stream)
    assert text not in (done.stderr if stream == "stdout" else done.stdout)


@pytest.mark.parametrize("arguments", [("--help",), ("explain", "PLN101"), ("build", "--help")])
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    code = "import sys; from planc.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert not {"numpy", "pydantic", "networkx", "jinja2", "yaml", "graphviz"} & set(done.stderr.split())


def test_a_full_standard_output_and_one_that_is_closed() -> None:
    commands = (
        ("schema", "plan"),
        ("explain", "PLN101"),
        ("check", "nowhere", "--format", "json"),
        ("show", "mixtral-8x7b"),
    )
    for arguments in commands:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "planc", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, "error[PLN017]: cannot write standard output" in done.stderr) == (1, True), arguments
        assert "Traceback" not in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "planc", "schema", "plan"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_spec_from_a_pipe_and_a_name_that_is_no_text(tmp_path: Path) -> None:
    faulty = SPEC.replace("isl", "isll")
    done = planc("check", "/dev/stdin", input=faulty)
    assert (done.returncode, "error[PLN010]" in done.stderr) == (1, True)
    for form in ("text", "json", "github"):
        done = planc("check", os.fsdecode(b"\xff\n.yaml"), "--format", form, cwd=tmp_path)
        assert (done.returncode, "PLN001" in done.stdout + done.stderr) == (1, True)
        assert "Traceback" not in done.stderr


def test_output_without_utf_8(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC.replace("small", "größe"), encoding="utf-8")
    done = planc("check", "spec.yaml", cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, "gr\\xf6\\xdfe: no faults" in done.stderr) == (0, True)


# --- forms of diagnostics ----------------------------------------------------------------------------------------------


def test_text(run: Run) -> None:
    file = BAD / "top_k.yaml"
    done = run("check", file)
    assert (done.status, done.out) == (1, "")
    line = next(n for n, text in enumerate(file.read_text().split("\n"), 1) if "PLN101" in text)
    assert (
        f"error[PLN101]: top_k 17 exceeds the 16 experts of a layer\n  --> {file}:{line}:16 (model.moe.top_k)\n"
        in done.err
    )
    assert re.search(
        r"\n 4 \|   moe: \{top_k: 17\}.*\n   \|                \^\^\n  help: top_k is at most 16\n", done.err
    )
    assert "\033" not in done.err


def test_json(run: Run) -> None:
    done = run("check", BAD / "several_in_the_schema.yaml", "--format", "json")
    rows = json.loads(done.out)["diagnostics"]
    assert (done.status, done.err) == (1, "")
    assert len(rows) > 5
    assert all(
        {"code", "severity", "message", "path", "file", "line", "column", "hint", "related"} == row.keys()
        for row in rows
    )
    assert [row["line"] for row in rows] == sorted(row["line"] for row in rows)
    assert {row["code"] for row in rows} < CODES.keys()


def test_github(run: Run) -> None:
    awkward = Path("a,b:c%.yaml")
    awkward.write_text((BAD / "several_in_the_schema.yaml").read_text())
    done = run("check", awkward, "--format", "github")
    assert (done.status, done.err) == (1, "")
    for line in done.out.splitlines():
        assert re.fullmatch(r"::error file=a%2Cb%3Ac%25\.yaml,line=\d+,col=\d+,title=PLN\d{3}::\S.*", line)


def test_warnings_do_not_change_the_status(run: Run) -> None:
    done = run("check", "spec.yaml", "--set", "cluster=h100-sxm-1x4", "--json")
    assert done.status == 0
    assert "warning[PLN203]" in done.err
    assert json.loads(done.out)["parallelism"]["ep"] == 4


def test_colour_only_on_a_terminal_that_wants_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1;31merror[PLN001]" in run("check", "nowhere").err
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run("check", "nowhere").err


def test_a_spec_cannot_write_to_the_terminal(run: Run) -> None:
    Path("spec.yaml").write_text(SPEC + '"\\e[2Jkey": 1\n# \u202e\u009b31m')
    for form in ("text", "github"):
        done = run("check", "spec.yaml", "--format", form)
        assert (done.status, "\033" in done.out + done.err) == (1, False)


def test_our_own_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.delenv("PLANC_DEBUG", raising=False)
    monkeypatch.setattr(pipeline, "place", broken)
    done = run("check", "spec.yaml")
    assert (done.status, "error[PLN900]: RuntimeError: a bug" in done.err) == (70, True)
    monkeypatch.setenv("PLANC_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run("check", "spec.yaml")


# --- commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, run: Run) -> None:
    done = run(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"Example: planc {command}" in " ".join(done.out.split())
    assert command in run("--help").out


@pytest.mark.parametrize("code", CODES)
def test_explain_every_code(code: str, run: Run) -> None:
    done = run("explain", code.lower())
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"{code}: {CODES[code].title}\n\n{CODES[code].explanation}")


def test_build_verify_explain_show(run: Run) -> None:
    built = run("build", "spec.yaml", "--json")
    summary = json.loads(built.out)
    assert (built.status, summary["parallelism"]["ep"]) == (0, 8)
    assert sorted(summary["files"]) == sorted(str(path) for path in Path("out/small").iterdir())
    assert run("verify", "out/small").status == 0
    assert json.loads(run("verify", "out/small/plan.json", "--json").out)["name"] == "small"
    assert "GPU 3: h100-sxm" in run("explain", "out/small", "--gpu", 3).out
    assert "expert 5 of layer 1" in run("explain", "out/small", "--expert", "1:5").out
    assert "kv cache" in run("explain", "spec.yaml", "--memory").out.replace("_", " ")
    assert run("explain", "out/small/plan.json").out.startswith("small: moe-4l on h100-sxm-1x8, decode step")
    assert run("show", "out/small", "--type", "dot").out.startswith("digraph")
    assert run("show", "spec.yaml", "-o", "one.svg").status == 0
    assert Path("one.svg").read_text().startswith(("<svg", "<?xml"))


BAD_ARGUMENTS: list[tuple[tuple[object, ...], int, str]] = [
    (("check", "spec.yaml", "--set", "nokey"), 1, "PLN008"),
    (("check", "spec.yaml", "--set", "workload.batch=0"), 1, "PLN014"),
    (("check", "spec.yaml", "--format", "xml"), 2, "invalid choice"),
    (("build", "spec.yaml", "--figures", "simplified,nicest"), 1, "PLN015"),
    (("build", "spec.yaml", "--figures", ""), 1, "PLN015"),
    (("verify", "."), 1, "PLN001"),
    (("verify", "spec.yaml"), 1, "PLN004"),
    (("explain", "PLN999"), 1, "PLN015"),
    (("explain", "nowhere"), 1, "PLN001"),
    (("explain", "spec.yaml", "--gpu", 8), 1, "PLN014"),
    (("explain", "spec.yaml", "--gpu", -1), 1, "PLN014"),
    (("explain", "spec.yaml", "--gpu", "one"), 2, "invalid int"),
    (("explain", "spec.yaml", "--gpu", "9" * 5000), 2, "invalid int"),
    (("explain", "spec.yaml", "--expert", "0:8"), 1, "PLN014"),
    (("explain", "spec.yaml", "--expert", "9:0"), 1, "PLN014"),
    (("explain", "spec.yaml", "--expert", "²:1"), 1, "PLN014"),
    (("explain", "spec.yaml", "--expert", "first"), 1, "PLN014"),
    (("show", "spec.yaml", "--figure", "nicest"), 2, "invalid choice"),
    (("show", "spec.yaml", "--figure", "comprehensive", "--layers", "5"), 1, "PLN014"),
    (("show", "spec.yaml", "--figure", "comprehensive", "--layers", "5-1"), 1, "PLN012"),
    (("show", "spec.yaml", "-o", "no/such/folder/x.svg"), 1, "PLN017"),
    (("import-hf", "nowhere.json"), 1, "PLN001"),
    (("import-hf", "spec.yaml"), 1, "PLN004"),
    (("schema", "moon"), 2, "invalid choice"),
    (("init", "-o", "/proc/starter.yaml"), 1, "PLN017"),
    (("init", "-o", "."), 1, "PLN017"),
]


@pytest.mark.parametrize(("arguments", "status", "text"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: tuple[object, ...], status: int, text: str, run: Run) -> None:
    before = sorted(Path().rglob("*"))
    done = run(*arguments)
    assert (done.status, text in done.err, done.out) == (status, True, "")
    assert sorted(Path().rglob("*")) == before


def test_a_figure_that_is_too_large(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from planc.render import comprehensive

    monkeypatch.setattr(comprehensive, "MAX_OPS", 10)
    built = run("build", "spec.yaml", "-o", "here")
    assert (built.status, "note[PLN208]" in built.err) == (0, True)
    assert not list(Path("here").glob("comprehensive*"))
    assert "PLN208" in run("show", "here", "--figure", "comprehensive").err


def test_png_without_graphviz(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = run("show", "spec.yaml", "--type", "png", "-o", "x.png")
    assert (done.status, "PLN501" in done.err, Path("x.png").exists()) == (1, True, False)


def test_import_hf(run: Run) -> None:
    configs = HERE.parent / "spec" / "hf_configs"
    assert run("import-hf", configs / "mixtral-8x7b.json", "-o", "model.yaml").status == 0
    assert load_model("model.yaml").layers == 32
    Path("other.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert "PLN019" in run("import-hf", "other.json").err


def test_init_writes_a_good_spec(run: Run) -> None:
    printed = run("init")
    assert (printed.status, run("init", "-o", "new.yaml").status) == (0, 0)
    assert Path("new.yaml").read_text() == printed.out
    assert run("check", "new.yaml").status == 0


# --- schemas ---------------------------------------------------------------------------------------------------------------


def allows(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """A light check of a value against a JSON Schema: the keywords that pydantic writes for keys, types and choices."""
    if "$ref" in schema:
        return allows(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(allows(part, value, root) for part in schema["anyOf"])
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    if names and not any(
        isinstance(value, types[name]) and (name == "boolean") == isinstance(value, bool) for name in names
    ):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, dict):
        known, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        if not set(schema.get("required", [])) <= value.keys() or (extra is False and not value.keys() <= known.keys()):
            return False
        return all(
            allows(known.get(key, extra if isinstance(extra, dict) else {}), v, root) for key, v in value.items()
        )
    if isinstance(value, list):
        return all(allows(schema.get("items", {}), item, root) for item in value)
    return True


@pytest.mark.parametrize(("what", "folder"), [("spec", "."), ("model", "models"), ("cluster", "clusters")])
def test_schemas_accept_what_ships(what: str, folder: str, run: Run) -> None:
    schema = json.loads(run("schema", what).out)
    files = sorted((shipped_folder("specs") / folder).glob("*.yaml"))
    assert files
    for file in files:
        tree = parse_yaml(file.read_text(encoding="utf-8"), str(file)).value
        assert allows(schema, tree, schema), file
        assert not allows(schema, tree | {"zz": 1}, schema)
        assert not allows(schema, [tree], schema)


def test_the_plan_schema_accepts_a_plan(run: Run) -> None:
    run("build", "spec.yaml", "-o", "here", "--figures", "none")
    schema = json.loads(run("schema", "plan").out)
    plan = json.loads(Path("here/plan.json").read_text())
    assert allows(schema, plan, schema)
    assert not allows(schema, plan | {"memory": 5}, schema)
