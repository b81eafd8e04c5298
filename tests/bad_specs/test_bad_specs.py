"""Every faulty spec says in comments, on the faulty lines, what planc must answer: exactly that, sorted by place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planc.diagnostics import CODES, Diagnostic, PlancError, render_text
from planc.pipeline import compile, place
from planc.spec import load_spec
from planc.verify import plan_notes

HERE = Path(__file__).parent
SPECS = sorted(path.stem for path in HERE.glob("*.yaml"))
_MARK = re.compile(r"# (error|warning|note): ((?:PLN\d{3} ?)+)")
Found = set[tuple[str, int, str, str]]

#: codes that no spec file with a comment in it can cause, and the test module that causes them
ELSEWHERE = {
    "PLN001": "cli/test_cli.py",
    "PLN002": "spec/test_text.py",
    "PLN003": "spec/test_text.py",
    "PLN008": "spec/test_load.py",
    "PLN017": "cli/test_write.py",
    "PLN018": "cli/test_hand_edited_plan.py",
    "PLN019": "spec/test_import_hf.py",
    "PLN020": "spec/test_import_hf.py",
    "PLN021": "routing/test_recorded.py",
    "PLN022": "routing/test_recorded.py",
    "PLN023": "routing/test_recorded.py",
    "PLN024": "placement/test_expert_map.py",
    "PLN025": "placement/test_expert_map.py",
    "PLN208": "cli/test_cli.py",
    "PLN210": "cli/test_place.py",
    "PLN211": "cli/test_place.py",
    "PLN212": "cli/test_place.py",
    "PLN316": "cli/test_hand_edited_plan.py",
    "PLN318": "verify/test_certificate.py",
    "PLN401": "cost/test_fits.py",
    "PLN402": "cost/test_fits.py",
    "PLN403": "cost/test_no_price.py",
    "PLN404": "cost/test_costs_command.py",
    "PLN405": "cost/test_costs_command.py",
    "PLN406": "cli/test_estimate_command.py",
    "PLN407": "cli/test_estimate_command.py",
    "PLN408": "cost/test_costs_command.py",
    "PLN410": "cli/test_gate_command.py",
    "PLN411": "cli/test_gate_command.py",
    "PLN412": "cli/test_gate_command.py",
    "PLN420": "prove/test_processes.py",
    "PLN421": "cli/test_prove_command.py",
    "PLN422": "cli/test_prove_command.py",
    "PLN430": "cli/test_search_command.py",
    "PLN431": "search/test_search_workers.py",
    "PLN432": "render/test_search_figure.py",
    "PLN433": "search/test_search_workers.py",
    "PLN434": "search/test_search_workers.py",
    "PLN435": "cli/test_search_command.py",
    "PLN436": "cli/test_search_command.py",
    "PLN437": "cli/test_search_command.py",
    "PLN438": "cli/test_search_command.py",
    "PLN501": "cli/test_cli.py",
    "PLN502": "cli/test_export_command.py",
    "PLN503": "export/test_export_sglang.py",
    "PLN504": "export/test_export_permutation.py",
    "PLN505": "export/test_export_permutation.py",
    "PLN506": "export/test_export_permutation.py",
    "PLN507": "export/test_export_permutation.py",
    "PLN508": "export/test_export_chakra.py",
    "PLN510": "export/test_export_tables.py",
    "PLN900": "cli/test_cli.py",
} | {f"PLN3{n:02}": "verify/test_mutations.py" for n in (*range(1, 16), 17)}


def marked(spec: Path) -> Found:
    """What the comments of a spec, and of the files it names, announce."""
    found: Found = set()
    seen, waiting = set(), [spec]
    while waiting:
        file = waiting.pop()
        text = file.read_text(encoding="utf-8")
        seen.add(file)
        named = ((file.parent / name).resolve() for name in re.findall(r"[\w./-]{1,60}\.yaml", text))
        waiting += [other for other in named if other.is_file() and other not in seen]
        for number, line in enumerate(text.split("\n"), 1):
            for severity, codes in _MARK.findall(line):
                found |= {(file.name, number, severity, code) for code in codes.split()}
    return found


def answer(file: Path) -> tuple[Diagnostic, ...]:
    """The faults of a spec, else the notes about its plan."""
    try:
        spec = load_spec(file)
        placed = place(spec)
        return tuple(sorted(plan_notes(spec, placed.par, placed.placement), key=Diagnostic.sort_key))
    except PlancError as error:
        return error.diagnostics


def places(diagnostics: tuple[Diagnostic, ...]) -> Found:
    return {
        (Path(d.span.file).name if d.span else "", d.span.line if d.span else 0, d.severity, d.code)
        for d in diagnostics
    }


@pytest.mark.parametrize("name", SPECS)
def test_bad_spec(name: str) -> None:
    file = HERE / f"{name}.yaml"
    found = answer(file)
    assert places(found) == marked(file), render_text(found)
    assert list(found) == sorted(found, key=Diagnostic.sort_key)
    for diagnostic in found:
        assert diagnostic.message
        assert diagnostic.message.isprintable()


def test_every_code_is_caused_somewhere() -> None:
    by_specs = {code for name in SPECS for *_, code in marked(HERE / f"{name}.yaml")}
    assert by_specs | ELSEWHERE.keys() == CODES.keys()
    for code, module in ELSEWHERE.items():
        assert code in (HERE.parent / module).read_text(encoding="utf-8"), f"{module} never mentions {code}"


def test_every_part_is_used() -> None:
    named = {
        name for file in HERE.rglob("*.yaml") for name in re.findall(r"[\w-]+(?=\.yaml|-2x8)", file.read_text("utf-8"))
    }
    assert {file.stem for file in HERE.glob("*/*.yaml")} <= named


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("several")])
def test_faults_come_sorted_by_place(name: str) -> None:
    rows = [(d.span.line, d.span.column) for d in answer(HERE / f"{name}.yaml") if d.span]
    assert len(rows) > 5
    assert rows == sorted(rows)


def test_good_specs_have_no_faults() -> None:
    """The runner can tell good from bad: the shipped examples get notes at most."""
    for file in (HERE.parent.parent / "specs").glob("*.yaml"):
        assert all(d.severity != "error" for d in answer(file)), file


def test_checking_and_compiling_agree() -> None:
    for name in ("top_k", "memory_of_weights", "unknown_keys"):
        file = HERE / f"{name}.yaml"
        with pytest.raises(PlancError) as error:
            compile(load_spec(file))
        assert error.value.diagnostics == answer(file)
