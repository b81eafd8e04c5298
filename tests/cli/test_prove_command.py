"""`planc prove`, and plans that carry their proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from planc.prove import proof as proving

Run = Callable[..., tuple[int, str, str]]
SPEC = "mixtral-8x7b"


def test_a_proof_in_words_and_as_json(run: Run) -> None:
    status, out, _ = run("prove", SPEC)
    assert status == 0 and "the plan computes what the model does" in out and "bytes moved" in out
    status, out, _ = run("prove", SPEC, "--json", "--layers", "2", "--steps", "3", "--seed", "7")
    found = json.loads(out, parse_constant=pytest.fail)
    assert status == 0 and found["holds"] and found["layers"] == [0, 1] and (found["steps"], found["seed"]) == (3, 7)
    assert found["max_relative_error"] == max(found["errors"].values()) <= 1e-9
    assert found["bytes_equal"] and found["bytes_moved"] == found["bytes_planned"] and found["memory_equal"]
    assert found["ops"] > 0 and found["tokens_routed"] > 0 and found["faults"] == []


def test_scale_and_tokens_make_the_numbers_larger(run: Run) -> None:
    small, large = (
        json.loads(run("prove", SPEC, "--json", *more)[1])["sizes"] for more in ((), ("--scale", "2", "--tokens", "3"))
    )
    assert large["hidden"] == 2 * small["hidden"] and large["batch"] == small["batch"] * 3 // 2


def test_a_plan_that_computes_something_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "TOLERANCE", 0.0)
    status, out, err = run("prove", SPEC)
    assert (status, out) == (1, "") and "PLN421" in err and "differs from the model by" in err
    status, _, err = run("build", SPEC, "--prove", "--figures", "none", "-o", "plan")
    assert status == 1 and "PLN421" in err and not Path("plan").exists()


def test_a_plan_carries_its_proof(run: Run) -> None:
    assert run("build", SPEC, "--prove", "--figures", "none", "-o", "plan")[0] == 0
    text = Path("plan/deployment_plan.md").read_text()
    assert "## Proof by execution" in text and "Not shown: layers that are like" in text
    status, _, err = run("verify", "plan")
    assert status == 0 and "executed again" in err
    first = Path("plan/plan.json").read_bytes()
    assert run("build", SPEC, "--prove", "--figures", "none", "-o", "plan")[0] == 0
    assert Path("plan/plan.json").read_bytes() == first
    assert run("build", SPEC, "--figures", "none", "-o", "plan")[0] == 0
    assert "Proof by execution" not in Path("plan/deployment_plan.md").read_text()
    assert "executed again" not in run("verify", "plan")[2]


@pytest.mark.parametrize(("key", "value"), [("ops", 1), ("seed", 1), ("layers", '"0,1"'), ("tokens", 0), ("steps", 99)])
def test_a_proof_that_says_otherwise(run: Run, key: str, value: object) -> None:
    assert run("build", SPEC, "--prove", "--figures", "none", "-o", "plan")[0] == 0
    path = Path("plan/plan.json")
    record = json.loads(path.read_text())
    old = f'"{key}": {json.dumps(record["proof"][key])}'
    before, proof = path.read_text().split('"proof": {')
    path.write_text(before + '"proof": {' + proof.replace(old, f'"{key}": {value}', 1))
    status, _, err = run("verify", "plan")
    assert status == 1 and ("PLN422" in err or "PLN316" in err)


def test_more_processes_than_ranks_and_no_torch(run: Run) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        status, out, err = run("prove", SPEC, "--processes", "99")
        assert (status, out) == (1, "") and "PLN420" in err
