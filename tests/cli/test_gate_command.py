"""`planc gate`: the report in both forms, recordings, refusals, and the figure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planc.report import gate as gate_module
from planc.report.gate import GateRequest, gate_report, gate_text
from planc.routing.bias import imbalance
from planc.spec import load_spec, shipped_folder

SPEC = "mixtral-8x7b"
ZIPF = ("--set", "traffic={popularity: zipf, exponent: 0.8, tokens: 600, seed: 4}")


@pytest.fixture
def gate(run):
    return lambda *arguments: run("gate", *arguments)


def test_before_and_after_as_json(gate) -> None:
    answer = gate(SPEC, *ZIPF, "--steps", 80, "--rate", "0.005", "--json")
    assert answer.status == 0, answer.err
    found = answer.json
    assert (found["steps"], found["judged_steps"], found["tokens_per_step"], found["seed"]) == (80, 20, 600, 4)
    assert found["gate"] == {"score": "softmax", "experts": 8, "top_k": 2, "groups": 1, "top_groups": 1}
    before, after = found["before"], found["after"]
    assert before["imbalance_per_expert_ratio"] > 2
    assert after["imbalance_per_expert_ratio"] < 1.25
    assert after["load_variance_tokens2"] < before["load_variance_tokens2"] / 20
    assert before["changed_decisions_share"] == before["router_weight_lost_share"] == 0
    assert 0 < after["router_weight_lost_share"] < after["changed_decisions_share"] < 0.4
    for side in (before, after):
        assert sum(side["load_per_expert_tokens"]) == pytest.approx(600 * 2)
        by_step = side["imbalance_per_expert_by_step_ratio"]
        assert len(by_step) == 80
        assert np.mean(by_step[60:]) == pytest.approx(side["imbalance_per_expert_ratio"])
    copies = found["redundant_copies"]
    assert [row["copies"] for row in copies] == [0, 1, 2, 4, 8]
    evenness = [row["imbalance_per_gpu_ratio"] for row in copies]
    assert evenness[0] == pytest.approx(before["imbalance_per_gpu_ratio"])  # one expert a GPU: nothing to place
    assert evenness == sorted(evenness, reverse=True) and evenness[-1] < 1.2
    assert copies[4]["memory_bytes"] == 8 * 3 * 4096 * 14336 * 2
    assert "note[PLN412]" in answer.err
    assert [note["code"] for note in found["notes"]] == ["PLN412"]


def test_the_report_in_words(gate) -> None:
    answer = gate(SPEC, *ZIPF, "--steps", 40, "--capacity", 1.25, "--overflow", "next", "--drift", 0.01, "--layer", 3)
    assert answer.status == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0] == "mixtral-8x7b, layer 3: softmax gate, top-2 of 8 experts"
    assert lines[1] == "traffic: zipf 0.8, seed 4"
    assert lines[2] == "40 steps of 600 tokens; popularity drifts by 0.01 logits a step"
    spec = load_spec(SPEC, ZIPF[1:])
    asked = GateRequest(steps=40, capacity=1.25, overflow="next", drift=0.01, layer=3)
    found = gate_report(spec, asked)
    assert answer.out == gate_text(found) + "\n"  # the same request, the same text
    row = next(line for line in lines if line.startswith("imbalance per expert"))
    judged = [imbalance(run.loads[30:]).mean() for run in (found.balanced.before, found.balanced.after)]
    assert row.split()[-2:] == [f"{value:.2f}" for value in judged]
    assert any(line.startswith("dropped at a capacity of 188 tokens") for line in lines)
    assert any(line.startswith("passed on to a next best expert") for line in lines)
    assert "still falling" in answer.out  # 40 steps of 0.001 are too few


def test_copies_are_placed_for_the_steps_before_those_that_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = gate_module.balanced, []

    def spied(loads: np.ndarray, *rest: Any) -> Any:
        seen.append(loads[0])
        return real(loads, *rest)

    monkeypatch.setattr(gate_module, "balanced", spied)
    found = gate_report(load_spec(SPEC, ZIPF[1:]), GateRequest(steps=12, drift=0.2))
    assert len(seen) == len(found.copies) == 5
    assert all(loads.tolist() == found.balanced.before.loads[:9].mean(axis=0).tolist() for loads in seen)


def test_without_traffic_all_experts_are_equally_popular_and_it_says_so(gate) -> None:
    answer = gate(SPEC, "--steps", 8, "--tokens", 400)
    assert answer.status == 0
    assert "traffic: none in the spec, so all experts are equally popular" in answer.out


def test_a_gate_that_has_a_bias_and_groups(gate) -> None:
    answer = gate("deepseek-v3-ep256", "--steps", 2, "--tokens", 64)
    assert answer.status == 0 and answer.err == ""
    assert answer.out.startswith("deepseek-v3-ep256, layer 3: sigmoid gate, top-8 of 256 experts, 4 of 8 groups\n")


def test_one_expert_in_all_counts_the_gpus_of_the_layer(gate) -> None:
    answer = gate("moe-4l-64gpu", "--steps", 2, "--json")
    assert answer.json["gpus"] == 16


def test_a_recording_gets_made_up_scores_and_it_says_so(gate) -> None:
    sample = shipped_folder("specs").resolve() / "traffic" / "sample-logical-count.npz"
    answer = gate("moe-61l-ep64-dp2", "--set", f"traffic.file={sample}", "--steps", 6, "--tokens", 3000, "--json")
    assert answer.status == 0, answer.err
    assert "note[PLN411]: router scores are made up to give the recorded loads" in answer.err
    assert answer.json["traffic"].startswith("recorded: sample-logical-count.npz")
    recorded = np.load(sample)["logical_count"][:, 3].sum(axis=0).astype(float)
    loads = np.array(answer.json["before"]["load_per_expert_tokens"])
    assert np.corrcoef(recorded, loads)[0, 1] > 0.98
    assert np.abs(recorded / recorded.sum() - loads / loads.sum()).sum() / 2 < 0.06


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("moe-61l-ep64-dp2", "--layer", 1), "PLN014"),
        ((SPEC, "--layer", 32), "PLN014"),
        ((SPEC, "--capacity", 0), "PLN014"),
        ((SPEC, "--drift", 100), "PLN014"),
        ((SPEC, "--tokens", 2_000_000), "PLN014"),
        ((SPEC, "--steps", 20_000), "PLN014"),
        ((SPEC, "--set", "model=llama-3.1-8b"), "PLN410"),
        ((SPEC, "--set", "traffic.file=nowhere.npz"), "PLN001"),
        (("nowhere",), "PLN001"),
    ],
)
def test_refusals(gate, arguments: tuple[object, ...], code: str) -> None:
    answer = gate(*arguments, "-o", "loads.svg", "--json")
    assert (answer.status, answer.out) == (1, ""), answer.err
    assert f"error[{code}]" in answer.err
    assert not Path("loads.svg").exists()


@pytest.mark.parametrize(
    "wrong",
    [("--rate", "-1"), ("--rate", "nan"), ("--capacity", "x"), ("--rule", "x"), ("--steps", "0"), ("--drift", "inf")],
)
def test_wrong_usage(gate, wrong: tuple[str, str]) -> None:
    answer = gate(SPEC, *wrong)
    assert answer.status == 2 and wrong[0] in answer.err


def test_the_figure_is_written_and_the_same_each_time(gate) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        assert gate(SPEC, *ZIPF, "--steps", 30, "-o", name).status == 0
        texts.append(Path(name).read_text())
    assert texts[0] == texts[1]
    assert ET.fromstring(texts[0]).get("id") == "gate-loads"
