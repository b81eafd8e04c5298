"""`planc estimate` and `planc compare`: reports in both forms, and refusals without output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_specs import ROOT

import planc

Run = Callable[..., tuple[int, str, str]]
SPEC = "mixtral-8x7b"
PAIR = "moe-4l-64gpu", "moe-4l-16gpu-baseline"


def parsed(run: Run, *arguments: object) -> dict[str, Any]:
    status, out, _ = run(*arguments, "--json")
    assert status == 0
    value: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    return value


def test_the_prediction_as_json(run: Run) -> None:
    found = parsed(run, "estimate", SPEC)
    plan = planc.compile(planc.load_spec(SPEC))
    expected = plan.estimate()
    assert (found["tpot_s"], found["ttft_s"], found["tps"]) == (expected.tpot, expected.ttft, expected.tps)
    assert found["tps_per_gpu"] == pytest.approx(found["tps"] / 8)
    assert found["tps"] * found["tpot_s"] == pytest.approx(found["batch"])  # Little's law
    for key in ("tpot_s", "ttft_s", "tps", "tps_per_gpu"):
        low, high = found["intervals"][key]
        assert low <= found[key] <= high
    assert found["floors"]["tpot_s"] < found["tpot_s"] and found["floors"]["ttft_s"] < found["ttft_s"]
    parts = found["breakdown"]
    assert sum(parts["critical_path_s"].values()) == pytest.approx(found["step_s"])
    assert sum(parts["split"].values()) == pytest.approx(1) == pytest.approx(sum(found["provenance"].values()))
    assert found["largest_batch"] == plan.limits["batch"]


def test_the_prediction_in_words(run: Run) -> None:
    status, out, _ = run("estimate", SPEC)
    assert status == 0
    for text in (
        "TPOT",
        "90 % interval",
        "at best",
        "TPS per GPU",
        "class of ops",
        "attention",
        "prices: ",
        "busiest links",
    ):
        assert text in out


def test_a_written_plan_is_predicted_as_its_spec_is(run: Run) -> None:
    assert run("build", SPEC, "--figures", "none", "-o", "plan")[0] == 0
    assert parsed(run, "estimate", "plan") == parsed(run, "estimate", SPEC)
    status, out, err = run("estimate", "plan", "--set", "workload.batch=8")  # it would be left aside without a word
    assert (status, out) == (1, "") and "PLN406" in err and "--set" in err


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        ("{tpot: 1 s}", "target TPOT ≤ 1 s: reached\n"),
        ("{tpot: 1 us}", "target TPOT ≤ 1 us: missed, and beyond the floor"),
        ("{ttft: 1 us}", "target TTFT ≤ 1 us: missed, and beyond the floor"),
        ("{tps: 1}", "target TPS ≥ 1: reached\n"),
        ("{tps: 1000000}", "target TPS ≥ 1,000,000: missed, and beyond the floor"),
    ],
)
def test_the_target_stands_beside_the_prediction(run: Run, target: str, verdict: str) -> None:
    assert verdict in run("estimate", SPEC, "--set", f"target={target}")[1]
    assert parsed(run, "estimate", SPEC)["target"] == {}


def test_a_target_inside_the_interval(run: Run) -> None:
    tpot, (low, high) = (found := parsed(run, "estimate", SPEC))["tpot_s"], found["intervals"]["tpot_s"]
    for wanted, verdict in (((tpot + high) / 2, "reached"), ((low + tpot) / 2, "missed")):
        target = parsed(run, "estimate", SPEC, "--set", f"target.tpot={1e6 * wanted:.6f} us")["target"]
        assert target["tpot_s"]["verdict"] == f"{verdict}, but not by the whole interval"
        per_second = parsed(run, "estimate", SPEC, "--set", f"target.tps={found['batch'] / wanted}")["target"]["tps"]
        assert per_second["verdict"] == f"{verdict}, but not by the whole interval"


def test_a_sweep(run: Run) -> None:
    points = parsed(run, "estimate", SPEC, "--sweep", "batch=64..256")["points"]
    assert [p["batch"] for p in points] == [64, 128, 256]
    assert [p["tpot_s"] for p in points] == sorted(p["tpot_s"] for p in points)
    assert points[2]["tpot_s"] == parsed(run, "estimate", SPEC)["tpot_s"]
    rows = parsed(run, "estimate", SPEC, "--sweep", "isl=100,300..500:100")["points"]
    assert [p["isl"] for p in rows] == [100, 300, 400, 500]
    status, out, _ = run("estimate", SPEC, "--sweep", "batch=64,100000")
    assert status == 0 and out.count("does not fit memory") == 1


def test_the_best_batch(run: Run) -> None:
    best = parsed(run, "estimate", SPEC, "--best", "--tpot", "20ms")
    assert best["best"]["tpot_s"] <= 0.02 and best["bounds"] == {"tpot_s": 0.02, "ttft_s": None}
    more = parsed(run, "estimate", SPEC, "--sweep", f"batch={best['best']['batch'] + 8}")["points"][0]
    assert more["tpot_s"] > 0.02
    assert best["simulated"] + best["pruned"] == best["steps"]
    status, out, err = run("estimate", SPEC, "--best", "--tpot", "1 ms")
    assert (status, out) == (1, "") and "PLN407" in err and "nearest: batch 8 with TPOT" in err and "floor" in err
    assert "--> --tpot" in err  # the bound came from there


def test_a_name_that_no_file_can_have(run: Run) -> None:
    status, out, err = run("estimate", "plan" * 300)
    assert (status, out) == (1, "") and "PLN001" in err
    status, out, err = run("trace", SPEC, "--ranks", "0", "-o", "traces" * 100)
    assert (status, out) == (1, "") and "PLN017" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sweep", "bach=1,2"),
        ("--sweep", "batch=0"),
        ("--sweep", "batch=9..3"),
        ("--sweep", "batch=1..x"),
        ("--sweep", "batch=1..100000:1"),
        ("--best", "--tpot", "20"),
        ("--best", "--ttft", "-1 s"),
        ("--best", "--ttft", "nan s"),
        ("--slow", "8=2"),
        ("--slow", "3=0.5"),
        ("--slow", "nic_up nowhere=2"),
        ("--slow", "3=2", "--sweep", "batch=64"),
        ("--slow", "3=2", "--best"),
        ("--slow", "²=2"),
        ("--slow", f"{'9' * 5000}=2"),
        ("--sweep", "micro_batches=65"),
        ("--sweep", "micro_batches=1..99999999"),
        ("--sweep", "batch=٣"),
        ("--best", "--tpot", "1e309 s"),
        ("--tpot", "20ms"),
        ("--ttft", "1 s"),
        ("--best", "--sweep", "batch=8,16"),
        ("--best", "--slow", "3=2"),
        ("--sweep", "batch=8", "--slow", "3=2"),
        ("--plot", "x.svg"),
    ],
)
def test_unusable_options(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run("estimate", SPEC, *arguments)
    assert (status, out) == (1, "") and "PLN406" in err and "Traceback" not in err


def test_stragglers(run: Run) -> None:
    plain = parsed(run, "estimate", SPEC)
    slow = parsed(run, "estimate", SPEC, "--slow", "3=2")
    link = parsed(run, "estimate", SPEC, "--slow", "nvlink_up GPU 0=10")
    assert slow["tpot_s"] > 1.5 * plain["tpot_s"]
    assert link["tpot_s"] > plain["tpot_s"]


def test_claims_have_verdicts(run: Run) -> None:
    (claim,) = parsed(run, "estimate", PAIR[0])["claims"]
    assert claim["verdicts"]["tpot_s"]["verdict"] == "impossible"
    assert claim["sequences_in_flight"] == pytest.approx(990) and claim["tps_per_gpu"] == pytest.approx(7031.25)
    reach = claim["longest_isl"]
    assert 0 < reach["predicted"] < reach["floor"] < 1024
    at = parsed(run, "estimate", PAIR[0], "--sweep", f"isl={reach['predicted']}", "--set", "workload.batch=990")
    assert at["points"][0]["tpot_s"] <= 2.2e-3
    at = parsed(run, "estimate", PAIR[0], "--sweep", f"isl={reach['predicted'] + 16}", "--set", "workload.batch=990")
    assert at["points"][0]["tpot_s"] > 2.2e-3


@pytest.mark.parametrize(
    ("tpot", "verdict"),
    [
        ("1 us", "impossible"),
        ("3.3 ms", "quicker than predicted"),
        ("5 ms", "as predicted"),
        ("1 s", "slower than predicted"),
    ],
)
def test_every_verdict(run: Run, tpot: str, verdict: str) -> None:
    found = parsed(run, "estimate", PAIR[0], "--set", f"claims=[{{name: x, tpot: {tpot}}}]")
    assert found["claims"][0]["verdicts"]["tpot_s"]["verdict"] == verdict
    assert verdict in run("estimate", PAIR[0], "--set", f"claims=[{{name: x, tpot: {tpot}}}]")[1]


def test_the_stated_latency_split_stands_beside_the_predicted(run: Run) -> None:
    (claim,) = parsed(run, "estimate", "moe-61l-ep64-dp2")["claims"]
    stated, predicted = claim["latency_split"]["stated"], claim["latency_split"]["predicted"]
    assert list(stated.values()) == [0.40, 0.35, 0.15, 0.10]
    assert set(predicted) == set(stated) and sum(predicted.values()) == pytest.approx(1)


def test_a_comparison(run: Run) -> None:
    found = parsed(run, "compare", *PAIR, "--gpu-hour", "2")
    first, second = found["plans"]
    assert (first["gpus"], second["gpus"]) == (64, 16)
    assert first["dollars_per_million_tokens"] == pytest.approx(1e6 / first["tps_per_gpu"] / 3600 * 2)
    (difference,) = found["differences"]
    assert difference["step_s"] == pytest.approx(sum(r["plan_s"] - r["against_s"] for r in difference["by_class"]))
    assert sum(r["share_of_difference"] for r in difference["by_class"]) == pytest.approx(1)
    assert [p["copies"] for p in found["equal_gpus"]["plans"]] == [1, 4]
    assert found["equal_gpus"]["plans"][1]["tps"] == pytest.approx(4 * second["tps"])
    assert found["equal_latency"]["tpot_s"] == pytest.approx(second["tpot_s"])
    assert all(p["tpot_s"] <= second["tpot_s"] * (1 + 1e-9) for p in found["equal_latency"]["plans"])
    (claim,) = found["claims"]
    assert claim["claimed_tps_ratio"] == pytest.approx(3.75) and claim["claimed_tpot_ratio"] == pytest.approx(8.3 / 2.2)
    assert claim["claimed_tps_per_gpu_ratio"] == pytest.approx(0.9375)
    cell = next(c for c in claim["grid"] if (c["isl"], c["batch"]) == (1024, 1024))
    assert cell["tps_ratio"] == pytest.approx(first["tps"] / second["tps"])
    assert cell["tps_per_gpu_ratio"] == pytest.approx(cell["tps_ratio"] / 4)


def test_a_comparison_in_words(run: Run) -> None:
    status, out, _ = run("compare", *PAIR)
    assert status == 0
    for text in (
        "TPS per GPU",
        "of the difference",
        "On equal terms",
        "Claimed: moe-4l-64gpu has 3.75 times",
        "does not fit",
    ):
        assert text in out
    status, out, err = run("compare", PAIR[0])
    assert (status, out) == (1, "") and "PLN406" in err


def test_help_is_quick_and_has_examples() -> None:
    parser = (ROOT / "planc" / "cli" / "parser.py").read_text()
    assert "planc compare specs/moe-4l-64gpu.yaml specs/moe-4l-16gpu-baseline.yaml" in parser


def test_what_redundant_copies_recover(run: Run) -> None:
    found = parsed(run, "estimate", SPEC, "--slow", "3=2")["straggler"]
    assert found["redundant_copies"] == 0 and found["recovered_share"] == 0
    assert "no expert has a second copy" in run("estimate", SPEC, "--slow", "3=2")[1]
    assert found["lost_s"] == pytest.approx(found["step_s"] - found["step_as_planned_s"])
    sets = ["--set", "cluster=h100-sxm-2x8", "--set", "parallelism={dp: 1, ep: 16}"]
    sets += ["--set", "expert_rule={slots_per_gpu: 1, spares: replicate}"]
    sets += ["--set", "workload={batch: 8192, isl: 128}"]  # enough tokens that experts compute, not only read weights
    found = parsed(run, "estimate", SPEC, "--slow", "3=2", *sets)["straggler"]
    assert found["redundant_copies"] == 8 and 0 < found["recovered_share"] < 1
    assert found["step_as_planned_s"] < found["step_by_speed_s"] < found["step_s"]
    assert "of it is recovered" in run("estimate", SPEC, "--slow", "3=2", *sets)[1]


def test_the_critical_path_by_name(run: Run) -> None:
    found = parsed(run, "estimate", PAIR[1], "--path")
    path = found["critical_path"]
    assert path[0]["op"] == "input_split.r0-7" and path[0]["waited_for"] == "start"
    assert any(step["op"].startswith("L3.expert.s1.r") for step in path)
    assert path[-1]["end_s"] == pytest.approx(found["step_s"])
    assert [a["end_s"] for a in path[:-1]] == pytest.approx([b["start_s"] for b in path[1:]])
    assert path[1]["op"] in run("estimate", PAIR[1], "--path")[1]
    busy = found["breakdown"]["busy_s"]
    assert all(part["min"] <= part["mean"] <= part["max"] <= found["step_s"] for part in busy.values())


def test_what_a_claim_reaches_fits_memory_and_counts_the_traffic(run: Run) -> None:
    claim = ["--set", "claims=[{name: x, tpot: 1 s}]"]
    (found,) = parsed(run, "estimate", SPEC, *claim)["claims"]
    limit = planc.compile(planc.load_spec(SPEC)).limits["isl"]
    assert limit * 63 // 64 <= found["longest_isl"]["predicted"] == found["longest_isl"]["floor"] <= limit
    sets = ["--set", "workload={batch: 2048, isl: 64, osl: 64}", "--set", "placement={policy: linear}"]
    sets += ["--set", "parallelism={dp: 1, ep: 8, tp: 1}", "--set", "claims=[{name: x, tpot: 40 ms}]"]
    (even,) = parsed(run, "estimate", SPEC, *sets)["claims"]
    sets += ["--set", "traffic={popularity: zipf, exponent: 2, tokens: 500}"]
    (uneven,) = parsed(run, "estimate", SPEC, *sets)["claims"]
    assert 64 <= uneven["longest_isl"]["predicted"] < 256 < even["longest_isl"]["predicted"]


def test_a_fit_of_ones_own(run: Run, tmp_path: Path) -> None:
    text = (ROOT / "specs" / "fits" / "h100-sxm.yaml").read_text()
    slower = tmp_path / "mine.yaml"
    slower.write_text(text.replace("compute_efficiency: 94.81 %", "compute_efficiency: 47 %"))
    assert slower.read_text() != text
    plain, mine = parsed(run, "estimate", SPEC), parsed(run, "estimate", SPEC, "--fit", slower)
    assert mine["ttft_s"] > 1.05 * plain["ttft_s"] and mine["tpot_s"] >= plain["tpot_s"]
    both = parsed(run, "compare", SPEC, SPEC, "--fit", slower)["plans"]
    assert [p["ttft_s"] for p in both] == [mine["ttft_s"]] * 2
    sweep = parsed(run, "estimate", SPEC, "--fit", slower, "--sweep", "batch=256")["points"][0]
    assert sweep["ttft_s"] == mine["ttft_s"]
    status, out, err = run("estimate", PAIR[0], "--fit", slower)
    assert (status, out) == (1, "") and "PLN408" in err and "reference-h100" in err
