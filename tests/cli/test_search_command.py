"""`planc search`: the answer in every form, its files, and refusals without output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_specs import ROOT

import planc
from planc.report.search_file import check_record

Run = Callable[..., Any]
SPEC = "mixtral-8x7b"
#: a space that is searched in a second
SMALL = (
    *("--over", "pp=1", "--over", "expert_tp=1", "--over", "gating=sharded", "--over", "micro_batches=1"),
    *("--front", 2, "--top", 3, "--workers", 1),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search of the small space wrote: result.json, and the winner in the folder plan."""
    folder = tmp_path_factory.mktemp("search")
    options = [str(part) for part in SMALL]
    command = [sys.executable, "-m", "planc", "search", SPEC, *options, "-o", "result.json", "--build", "plan"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def test_the_answer_as_json(run: Run) -> None:
    found = run("search", SPEC, *SMALL, "--tpot", "25ms", "--json").json
    winner = found["winner"]
    assert found["schema"] == "planc.search/1" and found["optimal"] and found["bounds"]["tpot_s"] == 0.025
    assert winner == found["top"][0] and len(found["top"]) == 3
    assert (winner["gpus"], winner["dp"], winner["pp"], winner["ep"], winner["tp"]) == (8, 1, 1, 8, 1)
    assert winner["tpot_s"] <= 0.025 and winner["tps"] == pytest.approx(winner["batch"] / winner["tpot_s"])
    assert winner["tpot_floor_s"] < winner["tpot_interval_s"][0] <= winner["tpot_s"] <= winner["tpot_interval_s"][1]
    assert [row["tps"] for row in found["top"]] == sorted((row["tps"] for row in found["top"]), reverse=True)
    assert sum(found["pruned"].values()) + found["simulated"] == found["candidates"]
    assert found["one_expert_per_gpu"] == winner and found["several_experts_per_gpu"]["rounds"] > 1
    rates = [row["tps_per_gpu"] for row in found["front"]]
    assert rates == sorted(rates) and all(row["reason"] for row in found["front"])
    assert found["baselines"][0]["name"] == "the spec's own plan"
    assert found["baselines"][0]["tps"] == planc.compile(planc.load_spec(SPEC)).estimate().tps


def test_a_map_of_the_spec_is_left_out(run: Run, result: Path) -> None:
    """It fits one shape; candidates have their experts placed in order, and so has the plan that is built."""
    Path("map.json").write_text(json.dumps([list(range(8))] * 32))
    mapped = ("--set", f"placement.map={Path('map.json').absolute()}", "--build", "plan")
    found = run("search", SPEC, *SMALL, *mapped, "--json")
    assert found.status == 0 and "the map of the spec fits one shape" in found.err
    assert found.json["winner"] == json.loads((result / "result.json").read_text())["winner"]
    assert planc.load_plan(Path("plan")).spec.policy == "linear"


def test_the_answer_in_words(run: Run) -> None:
    answer = run("search", SPEC, *SMALL, "--tpot", "25ms", "--gpu-hour", "2")
    assert answer.status == 0
    for words in (
        "most TPS with TPOT ≤ 25 ms on 8 GPUs",
        "the best of the declared space",
        "one expert of a layer per GPU:",
        "per million tokens at $2 a GPU and hour",
        "best 3",
        "front: TPS per GPU against TPS per user",
        "beside it",
        "PLN107: degree does not divide",
    ):
        assert words in answer.out, words


def test_an_unfinished_proof_is_said(run: Run) -> None:
    answer = run("search", SPEC, *SMALL, "--objective", "tpot", "--top", "10", "--limit", "1")
    assert "the search stopped before it was proved" in answer.out


def test_the_winner_is_a_plan_with_the_same_numbers(run: Run, result: Path) -> None:
    record = json.loads((result / "result.json").read_text())
    assert run("verify", result / "plan").status == 0
    found = run("estimate", result / "plan", "--json").json
    winner = record["winner"]
    assert (found["tpot_s"], found["tps"], found["ttft_s"]) == (winner["tpot_s"], winner["tps"], winner["ttft_s"])
    assert (
        found["intervals"]["tpot_s"] == winner["tpot_interval_s"]
        and found["floors"]["tpot_s"] == winner["tpot_floor_s"]
    )
    assert found["breakdown"]["critical_path_s"].keys() and found["gpus"] == winner["gpus"]


def test_the_file_has_its_schema_and_the_same_bytes_everywhere(run: Run, result: Path, tmp_path: Path) -> None:
    text = (result / "result.json").read_text()
    assert check_record(json.loads(text)) == []
    assert set(json.loads(text)) <= set(run("schema", "search").json["properties"])
    for seed, workers in (("1", "1"), ("2", "2")):
        options = [str(part) for part in (*SMALL[:-1], workers)]
        command = [sys.executable, "-m", "planc", "search", SPEC, *options, "-o", "again.json"]
        subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed}
        )
        assert (tmp_path / "again.json").read_text() == text


def test_a_search_goes_on_from_its_file(run: Run, result: Path) -> None:
    first = json.loads((result / "result.json").read_text())
    again = run("search", SPEC, *SMALL, "--resume", result / "result.json", "--json").json
    assert again["top"] == first["top"] and again["front"] == first["front"]
    other = run("search", SPEC, *SMALL, "--set", "workload.isl=999", "--resume", result / "result.json")
    assert other.status == 1 and "PLN437" in other.err


def test_plans_of_a_result_are_compared(run: Run, result: Path) -> None:
    file = str(result / "result.json")
    found = run("compare", file, f"{file}#2", SPEC, "--json").json
    record = json.loads(Path(file).read_text())
    assert [plan["name"] for plan in found["plans"]] == [f"{SPEC}#1", f"{SPEC}#2", SPEC]
    assert [plan["tps"] for plan in found["plans"][:2]] == [row["tps"] for row in record["top"][:2]]
    for wrong in ("#0", "#4", "#x"):
        assert "PLN406" in run("compare", file + wrong, SPEC).err


def test_pictures_and_pages(run: Run, tmp_path: Path) -> None:
    assert run("search", SPEC, *SMALL, "--plot", "front.svg", "--html", "front.html").status == 0
    assert (tmp_path / "front.svg").read_text().startswith("<svg")
    assert "plotly" in (tmp_path / "front.html").read_text()


def test_pools_and_what_changes_the_winner(run: Run) -> None:
    found = run("search", SPEC, *SMALL, "--over", "tp=1,2", "--pools", "--sensitivity", "--json").json
    (row,) = found["pools"]["rows"]
    osl = planc.load_spec(SPEC).workload.osl
    assert row["prefill_gpus"] + row["decode_gpus"] == 8
    assert row["tps"] == pytest.approx(min(row["decode"]["tps"], osl * row["prompts_per_s"]))
    assert row["binds"] == ("decode" if row["tps"] == row["decode"]["tps"] else "prefill")
    assert row["ttft_s"] > row["hand_over_s"] > 0
    names = [row["what"] for row in found["sensitivity"]]
    assert names.count("NIC bandwidth") == names.count("input length") == 2 and "skew of the experts" in names
    text = run("search", SPEC, *SMALL, "--over", "tp=1,2", "--pools", "--sensitivity").out
    assert "what changes the winner" in text and "what binds" in text


def test_objectives(run: Run) -> None:
    quick = run("search", SPEC, *SMALL, "--objective", "tpot", "--json").json["winner"]
    most = run("search", SPEC, *SMALL, "--json").json["winner"]
    fewest = run(
        "search", SPEC, *SMALL, "--objective", "gpus", "--gpus", "<=8", "--tps", "9k", "--tpot", "60ms", "--json"
    ).json
    assert quick["tpot_s"] < most["tpot_s"] and quick["tps"] < most["tps"]
    assert fewest["bounds"]["gpus"] == [1, 2, 4, 8] and fewest["winner"]["gpus"] == 4
    one = run("search", SPEC, *SMALL, "--one-expert-per-gpu", "--json").json
    assert {row["rounds"] for row in one["top"]} == {1}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--tpot", "1us"), "PLN430", ("what binds is TPOT", "nearest: dp", "bound 1 us")),
        (("--ttft", "1us"), "PLN430", ("what binds is TTFT", "nearest: dp")),
        (("--tps", "900M"), "PLN430", ("what binds is TPS", "TPS of the 900,000,000 asked for")),
        (("--set", "workload.isl=4000000"), "PLN430", ("no legal plan of the space fits memory",)),
        (("--gpus", "none"), "PLN406", ("`none` is not a number of GPUs",)),
        (("--gpus", "3..2"), "PLN435", ("from 3 to 2 GPUs there are none",)),
        (("--gpus", "5..7"), "PLN406", ("no whole node",)),
        (("--gpus", "16"), "PLN435", ("the cluster has 8",)),
        (("--gpus", "8", "--over", "gpus=8"), "PLN435", ("given twice",)),
        (("--objective", "gpus"), "PLN435", ("the fewest GPUs for what?",)),
        (("--one-expert-per-gpu", "--over", "scope=none"), "PLN435", ("one expert per GPU is asked for",)),
        (("--tps", "many"), "PLN406", ("`many` is not a number",)),
        (("--tps", "0"), "PLN406", ("`0` is not a number",)),
        (("--tpot=-1ms",), "PLN406", ()),
        (("--over", "speed=1"), "PLN406", ("`speed` is no axis", "axes: gpus")),
        (("--over", "tp"), "PLN406", ("no whole numbers",)),
        (("--over", "tp=0"), "PLN406", ("no whole numbers",)),
        (("--over", "tp=１"), "PLN406", ("no whole numbers",)),
        (("--over", "tp=1,,2"), "PLN406", ("no whole numbers",)),
        (("--over", "gating=all"), "PLN406", ("values: leader, sharded",)),
        (("--over", "dtypes.kv_cache=int3"), "PLN406", ("no value of dtypes.kv_cache",)),
        (("--over", "micro_batches=65"), "PLN406", ("up to 64",)),
        (("--over", "ep=3"), "PLN436", ("the declared space has no legal plan",)),
        (("--over", "ep=8", "--over", "tp=7"), "PLN436", ("PLN107", "open an axis")),
        (("--resume", "absent.json"), "PLN001", ()),
    ],
)
def test_what_cannot_be_searched_is_refused(
    run: Run, tmp_path: Path, options: tuple[str, ...], code: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "kept.json").write_text("as it was")
    space = SMALL[:4] + SMALL[6:] if "gating=all" in options else SMALL
    answer = run("search", SPEC, *space, *options, "-o", "kept.json", "--build", "plan")
    assert answer.status == 1 and code in answer.err and not answer.out
    for word in words:
        assert word in answer.err, answer.err
    assert (tmp_path / "kept.json").read_text() == "as it was" and sorted(os.listdir(tmp_path)) == ["kept.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": "planc.search/1"}', '{"schema": "planc.plan/1"}', "\x00", "1e999"]
)
def test_files_that_are_no_results_are_refused(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    assert "PLN438" in run("search", SPEC, *SMALL, "--resume", "other.json").err


def test_a_truncated_or_edited_result_is_refused(run: Run, result: Path, tmp_path: Path) -> None:
    text = (result / "result.json").read_text()
    (tmp_path / "half.json").write_text(text[: len(text) // 2])
    record = json.loads(text)
    record["simulations"][0]["shape"]["wheels"] = 4
    (tmp_path / "odd.json").write_text(json.dumps(record))
    for name in ("half.json", "odd.json"):
        assert "PLN438" in run("search", SPEC, *SMALL, "--resume", name).err, name
        if name == "half.json":
            assert "PLN438" in run("compare", name, SPEC).err


@pytest.mark.parametrize(
    "more",
    [
        ("workload.phase=prefill",),
        ("workload.batch=1",),
        ("cluster=h100-sxm-1x1", "model=llama-3.1-8b", "expert_rule=none"),
        ("model=llama-3.1-70b",),
        ("workload.batch=99999999",),
        ("parallelism.tp=8", "parallelism.ep=8", "workload.osl=0"),
    ],
    ids=" ".join,
)
def test_other_specs_are_searched(run: Run, more: tuple[str, ...]) -> None:
    sets = [part for one in more for part in ("--set", one)]
    answer = run(
        "search", SPEC, "--over", "pp=1", "--over", "micro_batches=1", "--top", 1, "--front", 0, *sets, "--json"
    )
    assert answer.status == 0, answer.err
    assert answer.json["winner"]["tps"] > 0


def test_the_library_finds_what_the_command_does() -> None:
    from planc.search import find

    spec = planc.load_spec(ROOT / "specs" / f"{SPEC}.yaml")
    over = {"pp": [1], "expert_tp": [1], "gating": ["sharded"], "micro_batches": [1], "tp": [1]}
    found = find(spec, tpot=0.03, over=over, top=1, front=0)
    assert found["winner"]["tpot_s"] <= 0.03 and found["optimal"]
    with pytest.raises(planc.PlancError, match="PLN430"):
        find(spec, tpot=1e-6, over=over, top=1, front=0)
