"""The policy `given`: experts where a map has them, and what of a map the spec does not allow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_specs import small_spec

import planc
from planc import pipeline
from planc.export.slots import slot_tables
from planc.placement.given import with_map

FLAT = {"dp": 1, "pp": 1, "ep": 8, "tp": 1}
#: two layers of 8 experts on 8 GPUs: backwards, and shuffled
ONE_EACH = np.array([[[7], [6], [5], [4], [3], [2], [1], [0]], [[3], [1], [4], [0], [5], [2], [7], [6]]])
#: 8 experts and 8 further copies on 8 GPUs
TWO_EACH = np.concatenate([ONE_EACH, np.roll(ONE_EACH, 3, axis=1)], axis=2)


def written(tables: np.ndarray, folder: Path) -> Path:
    path = folder / "map.json"
    path.write_text(json.dumps([row.reshape(-1).tolist() for row in tables]))
    return path


def spec_with(path: Path, **parts: Any) -> planc.Spec:
    return small_spec(placement={"map": str(path)}, **{"parallelism": FLAT} | parts)


def test_experts_are_where_the_map_has_them(tmp_path: Path) -> None:
    """Compiled, verified, written, read back and priced like any other plan."""
    plan = planc.compile(spec_with(written(ONE_EACH, tmp_path)))
    assert plan.spec.policy == "given"
    for layer, table in slot_tables(plan).items():
        assert np.array_equal(table, ONE_EACH[layer])
    pipeline.write(plan, tmp_path / "out", ())
    (tmp_path / "map.json").unlink()  # a written plan stands by itself
    again, _ = pipeline.verify_folder(tmp_path / "out")
    assert again.placement.experts_of_rank(0) == {0: [7], 1: [3]}
    assert plan.estimate().tpot > 0


def test_copies_are_taken_where_the_rule_has_room(tmp_path: Path) -> None:
    path = written(TWO_EACH, tmp_path)
    plan = planc.compile(spec_with(path, expert_rule={"slots_per_gpu": 2}))
    for layer, table in slot_tables(plan).items():
        assert np.array_equal(table, np.sort(TWO_EACH[layer], axis=1))
    assert not plan.placement.relaxed and all((part.copies == 2).all() for part in plan.placement.layers.values())


#: a GPU with five experts of both layers, and three with none
CROWDED = np.full((2, 8, 5), -1)
CROWDED[:, 0], CROWDED[:, 1, 0], CROWDED[:, 2, 0], CROWDED[:, 3, 0] = np.arange(5), 5, 6, 7
LARGE = {"moe": {"experts": 8, "top_k": 2, "intermediate": 200_000, "gated": False}}  # 51 MB an expert
#: nine experts on eight GPUs, in rounds: one GPU has two; and 16 in rounds, but uneven
ROUNDS = np.full((2, 8, 2), -1)
ROUNDS[:, :, 0], ROUNDS[:, 5, 1] = np.arange(8), 8
UNEVEN = np.full((2, 8, 3), -1)
UNEVEN[:, :, :2], UNEVEN[:, 7, 1], UNEVEN[:, 0, 2] = np.arange(16).reshape(8, 2), -1, 15
NINE, SIXTEEN = ({"moe": {"experts": n, "top_k": 2, "intermediate": 32}} for n in (9, 16))
TWICE = ONE_EACH.repeat(2, axis=2)
REFUSED = {
    "more than the rule allows": (TWO_EACH, {}, "PLN202", "set expert_rule.slots_per_gpu: 2"),
    "copies where there are none": (
        TWO_EACH,
        {"expert_rule": {"slots_per_gpu": 2, "spares": "idle"}},
        "PLN202",
        "set expert_rule: {slots_per_gpu: 2, spares: replicate}",
    ),
    "copies without a rule": (TWO_EACH, {"expert_rule": "none"}, "PLN202", "spares: replicate"),
    "one GPU with both copies": (TWICE, {"expert_rule": {"slots_per_gpu": 2}}, "PLN025", "change the map"),
    "a rule over all layers": (
        ONE_EACH,
        {"expert_rule": {"scope": "model", "slots_per_gpu": 2}},
        "PLN202",
        "set expert_rule.scope: layer",
    ),
    "another number of GPUs": (ONE_EACH[:, :6], {}, "PLN025", "parallelism.ep"),
    "uneven rounds": (UNEVEN, {"model": SIXTEEN}, "PLN202", "set expert_rule.slots_per_gpu: 3"),
    "too much memory": (CROWDED, {"expert_rule": "none", "model": LARGE, "gpu": {"memory": "400 MB"}}, "PLN201", ""),
}


def test_rounds_are_rounds(tmp_path: Path) -> None:
    """More experts than slots, in turns, as without a map; and so with a map of import-map, which changes no rule then."""
    path = written(ROUNDS, tmp_path)
    plan = planc.compile(spec_with(path, model=NINE))
    assert plan.placement.relaxed and plan.placement.rounds == 2
    spec, _, told = with_map(small_spec(parallelism=FLAT, model=NINE), path)
    assert told == ["placement.policy: given"] and planc.compile(spec).placement.rounds == 2
    uneven, _, told = with_map(small_spec(parallelism=FLAT, model=SIXTEEN), written(UNEVEN, tmp_path))
    assert told[1:] == ["expert_rule.slots_per_gpu: 3"] and planc.compile(uneven).placement.rounds == 3


@pytest.mark.parametrize("name", REFUSED)
def test_maps_that_the_spec_does_not_allow(name: str, tmp_path: Path) -> None:
    tables, parts, code, hint = REFUSED[name]
    spec = spec_with(written(tables, tmp_path), **parts)
    with pytest.raises(planc.PlancError) as error:
        planc.compile(spec)
    first = error.value.diagnostics[0]
    assert first.code == code and hint in first.hint, first
    if code == "PLN201":
        assert any("experts" in row for row in first.related)  # the itemised sum
    else:
        assert [d.code for d in pipeline.file_faults(spec, pipeline.place(spec))] == [
            d.code for d in error.value.diagnostics
        ]


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({"placement": {"policy": "given"}}, "PLN011"),
        ({"placement": {"policy": "linear", "map": "m.json"}}, "PLN111"),
        ({"placement": {"map": "m.json"}, "model": {"moe": None, "dense_mlp": {"intermediate": 64}}}, "PLN111"),
        ({"placement": {"map": "gone.json"}}, "PLN001"),
    ],
)
def test_specs_that_contradict_a_map(parts: dict[str, Any], code: str) -> None:
    with pytest.raises(planc.PlancError) as error:
        planc.compile(small_spec(parallelism=FLAT, **parts))
    assert [d.code for d in error.value.diagnostics] == [code]


def test_a_spec_is_widened_for_the_map_that_runs(tmp_path: Path) -> None:
    path = written(TWO_EACH, tmp_path)
    spec, form, told = with_map(small_spec(parallelism=FLAT, expert_rule={"spares": "idle"}), path)
    assert form == "a list of rows"
    assert told == ["placement.policy: given", "expert_rule.slots_per_gpu: 2", "expert_rule.spares: replicate"]
    assert planc.compile(spec).placement.rounds == 2
    spec, _, told = with_map(small_spec(parallelism=FLAT), written(ONE_EACH, tmp_path))
    assert told == ["placement.policy: given"] and planc.compile(spec).placement.rounds == 1


def test_placed_in_order_a_map_costs_what_linear_costs(tmp_path: Path) -> None:
    """A gate that keeps to a token's best groups reaches fewer nodes when experts are in order, whoever says so."""
    moe = {"experts": 8, "top_k": 2, "intermediate": 32, "groups": 4, "top_groups": 2}
    parts = {"model": {"moe": moe}, "parallelism": FLAT, "execution": {"all_to_all": "normal"}}
    linear = planc.compile(small_spec(**parts))
    in_order = np.arange(8).reshape(1, 8, 1).repeat(2, axis=0)
    same = planc.compile(small_spec(placement={"map": str(written(in_order, tmp_path))}, **parts))
    assert same.estimate().tpot == linear.estimate().tpot
    mixed = planc.compile(small_spec(placement={"map": str(written(ONE_EACH, tmp_path))}, **parts))
    assert mixed.estimate().tpot > linear.estimate().tpot


def test_what_a_map_leaves_open_is_asked_for(tmp_path: Path) -> None:
    """The same slots on half as many GPUs would be another deployment."""
    path = written(TWO_EACH, tmp_path)
    for parallelism in ({"dp": 1, "pp": 1, "ep": "auto", "tp": 1}, {"dp": "auto"}):
        with pytest.raises(planc.PlancError) as error:
            with_map(small_spec(parallelism=parallelism), path)
        [fault] = error.value.diagnostics
        assert fault.code == "PLN025" and fault.hint.startswith("set parallelism.ep")


def test_faults_of_the_spec_come_first(tmp_path: Path) -> None:
    with pytest.raises(planc.PlancError) as error:
        with_map(small_spec(parallelism=FLAT | {"stages": [3, 4]}), written(ONE_EACH, tmp_path))
    assert {d.code for d in error.value.diagnostics} == {"PLN108"}


def test_traffic_beside_a_map_is_checked_too(tmp_path: Path) -> None:
    spec = spec_with(written(ONE_EACH, tmp_path), traffic={"file": str(tmp_path / "gone.npz")})
    assert [d.code for d in pipeline.file_faults(spec, pipeline.place(spec))] == ["PLN001"]


def test_a_spec_behind_a_link_finds_its_map(tmp_path: Path) -> None:
    """`..` of a linked folder is that of the folder itself: another file of the name lies there."""
    (tmp_path / "store" / "proj").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "proj").symlink_to(tmp_path / "store" / "proj")
    path = written(ONE_EACH, tmp_path / "work")
    (tmp_path / "store" / "map.json").write_text(json.dumps([list(range(8))] * 2))
    spec = small_spec(parallelism=FLAT)
    text = json.loads(spec.model_dump_json())
    text["parallelism"] = FLAT
    spec = planc.parse_spec(json.dumps(text), folder=tmp_path / "work" / "proj")
    plan = planc.compile(with_map(spec, path)[0])
    assert plan.placement.experts_of_rank(0) == {0: [7], 1: [3]}


def test_pipes_and_odd_names_are_no_maps(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "a\nb.json"):
        with pytest.raises(planc.PlancError) as error:
            with_map(small_spec(parallelism=FLAT), path)
        assert [d.code for d in error.value.diagnostics] == ["PLN024"] and error.value.diagnostics[0].hint
    with pytest.raises(planc.PlancError, match="named pipe"):
        planc.compile(spec_with(tmp_path / "pipe"))


def test_a_map_of_devices_tells_what_it_decides(tmp_path: Path) -> None:
    """A spec with the keys that are told is the same plan; a degree that is given stays, and contradicts the map."""
    device = [{"device_id": d, "device_expert": [7 - d]} for d in range(8)]
    layers = [{"layer_id": n, "device_count": 8, "device_list": device} for n in range(2)]
    path = tmp_path / "expert_map.json"
    path.write_text(json.dumps({"moe_layer_count": 2, "layer_list": layers}))
    _, _, told = with_map(small_spec(parallelism={"dp": 1, "pp": 1, "ep": "auto", "tp": 1}), path)
    assert told[1:] == ["parallelism.ep: 8", "parallelism.expert_tp: 1"]
    with pytest.raises(planc.PlancError, match="for 8 ranks, and 4 hold experts"):
        with_map(small_spec(parallelism={"dp": 1, "pp": 1, "ep": "auto", "tp": 1, "expert_tp": 2}), path)


def test_a_map_far_away_is_refused(tmp_path: Path) -> None:
    """Before a plan is written that cannot be read."""
    far = tmp_path
    for _ in range(20):
        far = far / ("a" * 60)
        far.mkdir()
    with pytest.raises(planc.PlancError, match="PLN024"):
        with_map(small_spec(parallelism=FLAT), written(ONE_EACH, far))
