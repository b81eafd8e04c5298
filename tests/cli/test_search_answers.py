"""What may be done with the answer of `planc search`, and questions that are odd, or that it refuses: on a tiny spec, many of each."""

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

from planc.report.search_file import check_record

Run = Callable[..., Any]
SPEC = """\
name: tiny
model: {name: tiny, layers: 2, hidden: 64, attention: {heads: 8, head_dim: 8}, moe: {experts: 8, top_k: 2, intermediate: 32}}
cluster:
  name: lab
  links: {nvlink: {bandwidth: 400 GB/s}, nic: {bandwidth: 50 GB/s}}
  groups: [{nodes: 2, gpus_per_node: 4, gpu: {name: small, peak: {bf16: 400 TFLOPS}, memory: 300 kB, memory_bandwidth: 1 TB/s}}]
workload: {batch: 64, isl: 16, osl: 4}
parallelism: {dp: 1}
"""
#: a small space, in this process
FEW = (
    "--workers",
    1,
    "--over",
    "pp=1",
    "--over",
    "expert_tp=1",
    "--over",
    "dp=1,2",
    "--over",
    "micro_batches=1",
    "--over",
    "tp_comm=all_reduce",
)
KEYS = ("tpot_s", "tps", "tps_per_gpu", "ttft_s")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def search(run: Run, spec: Path) -> Run:
    return lambda *options: run("search", spec, *FEW, *options)


@pytest.fixture
def record(search: Run, tmp_path: Path) -> Path:
    """A result in a file."""
    path = tmp_path / "found.json"
    assert search("--front", 2, "-o", path).status == 0
    return path


def test_json_has_the_winner_and_how_it_was_found(search: Run) -> None:
    found = search("--json", "--tpot", "500ns", "--front", 3).json
    assert found["candidates"] == found["simulated"] + sum(found["pruned"].values())
    assert found["optimal"] is True and found["most"] is None
    winner = found["winner"]
    assert winner == found["top"][0] and winner["tpot_s"] <= 500e-9
    assert winner["gpus"] == winner["dp"] * winner["pp"] * winner["ep"] == 8
    assert {"tp", "expert_tp", "gating", "tp_comm", "batch", "rounds", "stages", *KEYS} <= winner.keys()
    assert [row["tps"] for row in found["top"]] == sorted((row["tps"] for row in found["top"]), reverse=True)
    assert len(found["front"]) > 1 and all(row["reason"] for row in found["front"])
    assert found["bounds"] == {"tpot_s": 500e-9, "ttft_s": None, "tps": None, "gpus": [8]}
    assert not {"spec", "simulations"} & found.keys()


def test_text_names_the_winner_the_front_and_what_was_left_out(search: Run) -> None:
    out = search("--front", 2, "--gpu-hour", 2).out
    for part in ("tiny: most TPS on 8 GPUs", "the best of the declared space", "best 10", "front:", "beside it", "$"):
        assert part in out
    assert "left out:" in out and "PLN201: memory overflow" in out
    assert "the search stopped before it was proved" in search("--front", 0, "--limit", 1).out
    assert search("--front", 0, "--top", 1).out.count("dp 1 · pp 1") < out.count("dp 1 · pp 1")


@pytest.mark.parametrize(
    "options",
    [
        ("--tpot", "500ns"),
        ("--objective", "tpot", "--over", "gpus=2,4"),
        ("--over", "batch=100", "--over", "dtypes.dispatch=fp8"),
        ("--over", "scope=model", "--over", "spares=replicate"),
        ("--over", "serving=together", "--over", "batch=8,32"),
    ],
)
def test_the_built_winner_is_predicted_with_the_same_numbers(search: Run, run: Run, options: tuple[str, ...]) -> None:
    found = search("--json", "--build", "won", "--front", 0, *options).json["winner"]
    assert run("verify", "won").status == 0
    made = run("estimate", "won", "--json").json
    assert {key: made[key] for key in KEYS} == {key: found[key] for key in KEYS}


def test_the_same_question_gives_the_same_bytes(search: Run, spec: Path, tmp_path: Path) -> None:
    """Also where hashes of strings differ, and with worker processes."""
    assert search("-o", "1.json", "--front", 2).status == 0
    for seed, workers in (("1", "1"), ("2", "2")):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        call = [sys.executable, "-m", "planc", "search", spec, *FEW, "--workers", workers, "--front", 2]
        subprocess.run([*map(str, call), "-o", f"{seed}0.json"], env=env, check=True, capture_output=True, cwd=tmp_path)
        assert (tmp_path / f"{seed}0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_written_file_is_of_its_schema(record: Path, run: Run) -> None:
    made = json.loads(record.read_text())
    assert check_record(made) == []
    schema = run("schema", "search").json
    assert set(schema["required"]) <= made.keys() <= schema["properties"].keys()
    assert made["simulated"] == len(made["simulations"])
    for broken in (made | {"schema": "planc.search/2"}, made | {"more": 1}, made | {"top": []}, [made], None):
        assert check_record(broken)


def test_a_resumed_search_simulates_what_is_new(
    record: Path, search: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from planc.search.evaluate import Evaluator

    calls = []
    plain = Evaluator.outcome
    monkeypatch.setattr(Evaluator, "outcome", lambda *a, **k: calls.append(k["whole"]) or plain(*a, **k))
    again = search("--json", "--front", 2, "--resume", record)
    assert again.json["top"] == json.loads(record.read_text())["top"]
    new = calls.count(False)  # of baselines, and what other bounds lead to
    calls.clear()
    fresh = search("--json", "--front", 2)
    assert again.json | {"simulated": 0, "pruned": 0} == fresh.json | {"simulated": 0, "pruned": 0}
    assert 5 * new < calls.count(False)
    assert search("--tpot", "300ns", "--resume", record, "-o", record).status == 0  # another question; the file grows
    assert search("--ttft", "300ns", "--resume", record).out == search("--ttft", "300ns").out


@pytest.mark.parametrize("option", ["workload.isl=17", "model.moe.top_k=1", "cluster.links.nic.bandwidth=51 GB/s"])
def test_a_result_of_another_spec_is_not_resumed(record: Path, search: Run, option: str) -> None:
    before = record.read_bytes()
    answer = search("--resume", record, "--set", option, "-o", record)
    assert answer.status == 1 and "PLN437" in answer.err
    assert record.read_bytes() == before


def test_a_result_under_another_fit_is_not_resumed(run: Run, tmp_path: Path) -> None:
    few = "mixtral-8x7b", "--workers", 1, "--over", "ep=8", "--over", "tp=1", "--over", "batch=64", "--front", 0
    assert run("search", *few, "-o", "r.json").status == 0
    fit = tmp_path / "fit.yaml"
    fit.write_text((ROOT / "specs/fits/h100-sxm.yaml").read_text().replace("source:", "source: mine,", 1))
    assert run("search", *few, "--resume", "r.json").status == 0
    assert "PLN437" in run("search", *few, "--resume", "r.json", "--fit", fit).err


def test_compare_takes_results(record: Path, run: Run, spec: Path) -> None:
    made = json.loads(record.read_text())
    plans = run("compare", record, f"{record}#2", spec, "--json").json["plans"]
    assert [plan["name"] for plan in plans] == ["tiny#1", "tiny#2", "tiny"]
    for plan, row in zip(plans[:2], made["top"][:2], strict=True):
        assert plan["tpot_s"] == row["tpot_s"] and plan["tps"] == row["tps"]
    for place in ("#0", "#99", "#x", "#-1", "#²", "#1.0"):
        answer = run("compare", record, f"{record}{place}")
        assert answer.status == 1 and "PLN406" in answer.err, place


def test_other_files_are_no_results(record: Path, run: Run, search: Run, tmp_path: Path) -> None:
    text = record.read_text()
    made = json.loads(text)
    shape = made["simulations"][0] | {"shape": {"dp": 1}}
    bad = {
        "truncated.json": text[: len(text) // 2],
        "empty.json": "",
        "list.json": "[1]",
        "deep.json": "[" * 100_000,
        "plan.json": '{"schema": "planc.plan/9"}',
        "shape.json": json.dumps(made | {"simulations": [shape]}),
        "nan.json": text.replace('"step_s": ', '"step_s": NaN, "x": ', 1),
        "more.json": json.dumps(made | {"more": 1}),
    }
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
        answer = search("--resume", name, "-o", "kept.json")
        assert answer.status == 1 and "PLN438" in answer.err, (name, answer.err)
        assert not (tmp_path / "kept.json").exists()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "PLN438" in search("--resume", "bytes.json").err
    assert "PLN001" in search("--resume", "none.json").err and "PLN001" in search("--resume", tmp_path).err
    assert "PLN438" in run("compare", "truncated.json", record).err


@pytest.mark.parametrize(
    "changed",
    [
        *({"batch": batch} for batch in (0, None, 10**30)),
        *({"dtypes": dtypes} for dtypes in ({"x": "fp8"}, {"weights": "y"})),
        {"dp": 0, "ep": 0},
        {"dp": 3},
        {"micro_batches": 10**9},
        {"gating": "leader", "tp_comm": "reduce_scatter"},
    ],
)
def test_rows_made_by_hand_are_refused(record: Path, run: Run, changed: dict[str, Any]) -> None:
    made = json.loads(record.read_text())
    made["top"][0] |= changed
    record.write_text(json.dumps(made))
    answer = run("compare", record, f"{record}#2")
    assert answer.status == 1 and "PLN900" not in answer.err and "error[PLN" in answer.err


def test_figures_of_the_front(search: Run, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    assert search("--plot", "f.svg", "--html", "f.html", "--front", 2).status == 0
    assert (tmp_path / "f.svg").read_text().startswith("<svg ") and (tmp_path / "f.html").stat().st_size > 1000


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD: dict[str, list[tuple[object, ...]]] = {
    "PLN406": [
        *(("--gpus", text) for text in ("0", "x", "-1", "8,", "1..", "3..3", "９", "", " ", "8;9")),
        *(("--tps", text) for text in ("0", "-1", "1e9", "x", "", "nan", "5m", "k", "0.0000000001")),
        *(("--tpot", text) for text in ("0ms", "x", "20", "1e400s", "nan", "")),
        ("--ttft", "0s"),
        ("--tpot=-1ms",),
        ("--build", ""),
        *(("--over", f"tp={text}") for text in ("", "0", "-1", "1.5", "x", "1,,2", "０", "1..4", "9" * 50)),
        *(("--over", text) for text in ("", "=", "tp", "é=1", "x=1", "dtypes.x=fp8", "dtypes=fp8", "tp =", "\x00=1")),
        *(("--over", text) for text in ("gating=x", "scope=", "dtypes.weights=int4", "serving=apart,", "spares=Idle")),
        ("--over", "slots_per_gpu=" + ",".join(map(str, range(1, 1100)))),
        ("--over", "micro_batches=65"),
        ("--over", "batch=100000001"),
    ],
    "PLN430": [("--set", "workload.isl=100000"), ("--over", "batch=99999999"), ("--one-expert-per-gpu", "--over", "ep=4")],
    "PLN435": [
        ("--gpus", "8", "--over", "gpus=8"),
        ("--gpus", "9..3"),
        ("--gpus", "<=0"),
        ("--gpus", "16"),
        ("--over", "gpus=999999999"),
        ("--over", "tp=1", "--over", "tp=2"),
        ("--objective", "gpus"),
        ("--one-expert-per-gpu", "--over", "scope=none"),
        ("--one-expert-per-gpu", "--set", "model.moe=null", "--set", "model.dense_mlp.intermediate=64"),
    ],
    "PLN436": [("--over", "tp=3"), ("--over", "slots_per_gpu=9"), ("--over", "ep=1000000"), ("--over", "gating=leader", "--over", "tp_comm=reduce_scatter", "--over", "tp=2"), ("--set", "model.moe=null", "--set", "model.dense_mlp.intermediate=64", "--over", "expert_tp=2")],
    "PLN001": [("--fit", "none.yaml"), ("--resume", "none.json"), ("--resume", "")],
    "PLN017": [("-o", "none/x.json"), ("-o", ""), ("--plot", "none/x.svg")],
}  # fmt: skip


@pytest.mark.parametrize("code", BAD)
def test_bad_questions_have_their_code(code: str, run: Run, spec: Path, tmp_path: Path) -> None:
    """One line each that says so; the file that was asked for stays as it was."""
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    for options in BAD[code]:
        axes = ("--over", "pp=1") if "pp" not in str(options) else ()
        more = () if "-o" in options else ("-o", kept)
        answer = run("search", spec, "--workers", 1, "--front", 0, *axes, *more, *options, "--format", "json")
        found = json.loads(answer.out)["diagnostics"] if answer.out.startswith("{") else []
        if code == "PLN017" and "--plot" in options:
            kept.write_text("mine")  # what was found is written before it is drawn
        assert answer.status == 1 and [fault["code"] for fault in found] == [code], (options, answer)
        assert kept.read_text() == "mine", options


def test_one_gpu_is_one(run: Run, spec: Path) -> None:
    spec.write_text(SPEC.replace("300 kB", "1 MB"))
    answer = run("search", spec, "--workers", 1, "--front", 0, "--top", 1, "--gpus", 1)
    assert "on 1 GPU\n" in answer.out and "on 1 GPU:" in answer.out and "1 GPUs" not in answer.out


def test_missing_specs(run: Run) -> None:
    assert "PLN001" in run("search", "none.yaml").err
    assert run("search", "none.yaml").status == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tpot", "1ns"), "TPOT"),
        (("--tpot", "1ns", "--ttft", "1s"), "TPOT"),
        (("--ttft", "1ns"), "TTFT"),
        (("--tps", "999999999999M"), "TPS"),
        (("--tps", "100M", "--tpot", "90ns"), "TP"),
        (("--objective", "gpus", "--tps", "9000M", "--gpus", "<=8"), "TPS"),
    ],
)
def test_a_bound_that_no_plan_keeps(search: Run, options: tuple[str, ...], words: str) -> None:
    answer = search(*options)
    assert answer.status == 1 and "PLN430" in answer.err
    assert f"what binds is {words}" in answer.err and "nearest: dp " in answer.err
    assert not answer.out


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "workload.phase=prefill"),
        ("--set", "model.moe=null", "--set", "model.dense_mlp.intermediate=64", "--over", "scope=none"),
        ("--gpus", "1", "--set", "model.hidden=8"),
        ("--gpus", "≤8", "--objective", "gpus", "--tps", "1"),
        ("--over", "gpus=3,7"),
        ("--set", "workload.batch=100000"),  # the spec's own plan does not fit
        ("--set", "parallelism.dp=7"),  # and is none
        ("--set", "workload.osl=0"),
        ("--set", "expert_rule=none"),
        ("--set", "traffic.popularity=zipf"),
        ("--set", "execution.tokens_per_step=2.5", "--set", "execution.step_overhead=1 ms"),
        ("--over", "slots_per_gpu=1,8"),
        ("--top", "10000000"),
        ("--limit", "1"),
        ("--over", "batch=1"),
        ("--over", "gating=leader", "--over", "serving=together,apart", "--over", "batch=8"),
        ("--objective", "cost", "--gpu-hour", "0.01"),
    ],
)
def test_odd_questions_have_an_answer(search: Run, options: tuple[str, ...]) -> None:
    answer = search("--front", 2, *options)
    assert answer.status == 0, answer.err
    assert answer.out.startswith("tiny: ") and "nan" not in answer.out.replace("tenant", "")
