"""`planc place`: the map, the report in both forms, what is assumed, interruption, and refusals without output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planc.planner import plan as planning
from planc.spec import shipped_folder

SAMPLES = shipped_folder("specs") / "traffic"
SPEC = "moe-61l-ep64-dp2"


@pytest.fixture
def place(run):
    return lambda *arguments: run("place", "--workers", "1", *arguments)


def traffic(path: Path, tokens: int = 300, layers: int = 3, experts: int = 16, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, experts + 1)
    topk = np.stack(
        [
            [random.permutation(np.argsort(-weights / random.standard_exponential(experts))[:2]) for _ in range(layers)]
            for _ in range(tokens)
        ]
    )
    np.savez(path, topk_ids=topk.astype(np.int16), source_rank=random.integers(0, 16, tokens), experts=experts)
    return path


def test_a_map_and_a_report(place, tmp_path: Path) -> None:
    file = traffic(tmp_path / "day.npz")
    answer = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "map.json", "--json")
    assert answer.status == 0, answer.err
    report = answer.json
    assert set(report) >= {"objectives", "bounds", "gaps", "held_out", "seconds"}
    assert report["held_out"]["tokens"] == 75
    result = report["held_out"]["link_seconds"]
    assert result["result"] <= min(result.values()) * (1 + 1e-9)
    assert report["objectives"]["dedup"]["seconds"] >= report["bounds"]["dedup_seconds"] > 0
    rows = json.loads(Path("map.json").read_text())
    assert list(rows) == ["physical_to_logical_map"]
    assert [sorted(row) for row in rows["physical_to_logical_map"]] == [list(range(16))] * 3
    assert "PLN212" in answer.err  # a bare cluster does not say how wide tokens are


def test_the_report_as_tables(place, tmp_path: Path) -> None:
    answer = place("--traffic", traffic(tmp_path / "day.npz"), "--cluster", "h100-sxm-2x8")
    assert answer.status == 0 and answer.out == ""
    for words in ("busiest links", "imbalance", "bound", "identity (no map)", "spare GPUs", "held-out tokens"):
        assert words in answer.err
    assert not Path("map.json").exists()


def test_a_deployment_spec_says_it_all(place) -> None:
    answer = place(
        "--traffic", "sample-eplb-weight.json", "--cluster", SPEC, "--objective", "balance", "--json", "-o", "m"
    )
    assert answer.status == 0, answer.err
    assert answer.json["assumed"] == [] and answer.json["expert_bytes"] == 58_720_256
    rows = json.loads(Path("m").read_text())["physical_to_logical_map"]
    assert len(rows) == 61 and all(sorted(row) == list(range(64)) for row in rows)
    assert rows[0] == list(range(64))  # a dense layer's row is there and valid


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        (("--slots", 2), 32),
        (("--redundant", 16), 32),
        (("--redundant", 0), 16),
        (("--slots", 3, "--redundant", 32), 48),
    ],
)
def test_slots_and_redundant_copies(place, tmp_path: Path, arguments: tuple[object, ...], slots: int) -> None:
    file = traffic(tmp_path / "day.npz")
    place("--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "map.json", "--objective", "balance", *arguments)
    for row in json.loads(Path("map.json").read_text())["physical_to_logical_map"]:
        assert len(row) == slots and set(row) == set(range(16))
        for gpu in np.array(row).reshape(16, -1):
            assert len(set(gpu.tolist())) == len(gpu)


def test_slots_that_stay_empty_are_said(place, tmp_path: Path) -> None:
    file = traffic(tmp_path / "day.npz")
    answer = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "map.json", "--redundant", 4)
    assert "PLN211" in answer.err and answer.status == 0
    assert json.loads(Path("map.json").read_text())["physical_to_logical_map"][0].count(-1) == 12


def test_what_runs_now_is_kept_when_it_is_as_good(place, tmp_path: Path) -> None:
    file = traffic(tmp_path / "day.npz")
    first = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "map.json", "--json").json
    again = place(
        "--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "next.json", "--json", "--current", "map.json"
    ).json
    assert first["objectives"]["bytes_to_move"] is None
    assert again["objectives"]["bytes_to_move"] == 0 == again["bounds"]["bytes_to_move"]
    assert Path("map.json").read_bytes() == Path("next.json").read_bytes()


def test_scenarios_are_judged_together(place, tmp_path: Path) -> None:
    one, two = traffic(tmp_path / "day.npz"), traffic(tmp_path / "night.npz", tokens=200, seed=4)
    report = place("--traffic", one, "--cluster", "h100-sxm-2x8", "--scenario", two, "--json").json
    assert [s["name"] for s in report["scenarios"]] == ["night.npz"]
    assert report["objectives"]["worst_case_seconds"] >= report["objectives"]["dedup"]["seconds"]


def test_times_can_be_asked_for_a_number_of_tokens(place, tmp_path: Path) -> None:
    file = traffic(tmp_path / "day.npz")
    plain = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--json").json
    scaled = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--json", "--tokens", 600).json
    assert scaled["objectives"]["dedup"]["seconds"] == pytest.approx(2 * plain["objectives"]["dedup"]["seconds"])
    assert scaled["gaps"]["dedup_seconds"] == pytest.approx(plain["gaps"]["dedup_seconds"])


REFUSALS = {
    "fewer slots than experts": (("--slots", 1, "--cluster", "h100-sxm-1x8"), "PLN202"),
    "fewer slots than copies": (("--slots", 1, "--redundant", 8), "PLN202"),
    "more copies than GPUs can hold apart": (("--slots", 17), "PLN014"),
    "groups that do not divide": (("--groups", 5), "PLN109"),
    "a trace for another model": (("--cluster", SPEC), "PLN023"),
    "a model without experts": (("--cluster", "dense.yaml"), "PLN023"),
    "no such cluster": (("--cluster", "h100-6x"), "PLN007"),
    "a current map of another cluster": (("--current", "other.json"), "PLN025"),
    "a current map that is none": (("--current", "day.npz"), "PLN024"),
    "a scenario of another shape": (("--scenario", "wide.npz"), "PLN023"),
    "a scenario that is not there": (("--scenario", "gone.npz"), "PLN001"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_coded_and_write_nothing(place, tmp_path: Path, name: str) -> None:
    file = traffic(tmp_path / "day.npz")
    traffic(tmp_path / "wide.npz", experts=20)
    Path("other.json").write_text('{"physical_to_logical_map": [[0, 1], [0, 1], [0, 1]]}')
    Path("dense.yaml").write_text(
        "name: d\nmodel: llama-3.1-8b\ncluster: h100-sxm-1x8\nworkload: {batch: 8, isl: 16}\n"
    )
    arguments, code = REFUSALS[name]
    cluster = () if "--cluster" in arguments else ("--cluster", "h100-sxm-2x8")
    answer = place("--traffic", file, "--out", "map.json", "--json", *cluster, *arguments)
    assert (answer.status, answer.out) == (1, ""), answer.err
    assert f"error[{code}]" in answer.err, answer.err
    assert not Path("map.json").exists()


@pytest.mark.parametrize(
    "wrong", [("--slots", "0"), ("--redundant", "-1"), ("--objective", "speed"), ("--workers", "x")]
)
def test_wrong_usage(place, wrong: tuple[str, str]) -> None:
    answer = place("--traffic", "x.npz", "--cluster", "h100-sxm-2x8", *wrong)
    assert answer.status == 2 and wrong[0] in answer.err


def test_ctrl_c_returns_the_best_so_far_marked_so(place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real, calls = traffic(tmp_path / "day.npz"), planning.plan_unit, []

    def interrupted(problem: Any, unit: Any, *, search: bool = True) -> Any:
        calls.append(search)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(problem, unit, search=search)

    monkeypatch.setattr(planning, "plan_unit", interrupted)
    answer = place("--traffic", file, "--cluster", "h100-sxm-2x8", "--out", "map.json", "--json")
    assert answer.status == 130 and "PLN210" in answer.err
    assert answer.json["interrupted"] is True
    assert calls == [True, True, False, False]
    assert len(json.loads(Path("map.json").read_text())["physical_to_logical_map"]) == 3


INTERRUPTING = """
import json, os, signal, sys
from planc.placement.place import place
from planc.routing import load_traffic
from planc.spec import load_cluster

def interrupt(done, total):  # as a terminal does: the signal goes to every process of the group
    if done == 3:
        os.killpg(os.getpgrp(), signal.SIGINT)

if __name__ == "__main__":
    found = place(load_traffic(sys.argv[1]), load_cluster("h100-sxm-2x8"), workers=2, progress=interrupt, stop=True)
    print(json.dumps([found.certificate.interrupted, *found.tables.shape, sorted(found.certificate.held_out.chosen)]))
"""


def test_ctrl_c_with_processes_at_work(tmp_path: Path) -> None:
    script = tmp_path / "interrupting.py"
    script.write_text(INTERRUPTING)
    command = [sys.executable, str(script), str(traffic(tmp_path / "day.npz", layers=40))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, start_new_session=True, check=False)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    interrupted, layers, holders, slots, chosen = json.loads(done.stdout)
    assert (interrupted, layers, holders, slots) == (True, 40, 16, 1)
    assert chosen
