"""A certificate that says anything else than what follows is refused, from the plan alone and with the traffic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_specs import Compiled

import planc
from planc import pipeline
from planc.diagnostics import PlancError
from planc.planner import Certificate
from planc.verify import Draft, load_plan
from planc.verify.certificate import check_certificate

TRAFFIC = "traffic={popularity: zipf, topics: 4, tokens: 512}"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def plan(example: Compiled) -> planc.VerifiedPlan:
    return example("moe-4l-64gpu", TRAFFIC)


def draft(plan: planc.VerifiedPlan, record: Record | None) -> Draft:
    certificate = None if record is None else Certificate.model_validate(record)
    parts = plan.parallelism, plan.reasons, plan.placement, plan.memory, plan.blocks, plan.notes
    return Draft(plan.spec, *parts, certificate)


def test_a_sound_certificate_passes(plan: planc.VerifiedPlan) -> None:
    assert plan.certificate is not None
    assert list(check_certificate(draft(plan, plan.certificate.model_dump()))) == []


def set_to(*path: str | int, value: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        part: Any = record
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value(part[path[-1]]) if callable(value) else value

    return change


def _first_bigger(text: str) -> str:
    head, _, rest = text.partition(",")
    return f"{int(head.split('x')[0]) + 7},{rest}"


CHANGES = {
    "imbalance of a layer": (set_to("layers", 1, "imbalance", value=lambda v: v * 1.01), "layers.1.imbalance"),
    "bound of a layer": (set_to("layers", 2, "imbalance_bound", value=lambda v: v * 0.9), "layers.2.imbalance_bound"),
    "loads": (set_to("layers", 0, "loads", value=_first_bigger), "layers.0"),
    "too few loads": (set_to("layers", 0, "loads", value="1,2,3"), "layers.0.loads"),
    "no loads": (set_to("layers", 0, "loads", value="0x16"), "layers"),
    "loads that are no numbers": (set_to("layers", 0, "loads", value="many"), "layers.0.loads"),
    "tokens at nodes": (set_to("layers", 3, "node_tokens", value=_first_bigger), "layers.3.node_tokens"),
    "nodes": (set_to("nodes", value="1-8"), "nodes"),
    "a layer's number": (set_to("layers", 0, "layer", value=9), "layers"),
    "a layer's time": (set_to("layers", 0, "seconds", value=lambda v: v * 2), "objectives.dedup.seconds"),
    "a layer's bound": (set_to("layers", 0, "bound_seconds", value=lambda v: v / 2), "bounds.dedup_seconds"),
    "mean imbalance": (set_to("objectives", "imbalance", value=lambda v: v + 1), "objectives.imbalance"),
    "worst imbalance": (set_to("objectives", "worst_layer_imbalance", value=1.0), "objectives.worst_layer_imbalance"),
    "memory spread": (set_to("objectives", "memory_spread", value=lambda v: v + 1), "objectives.memory_spread"),
    "a gap": (set_to("gaps", "direct_seconds", value=0.0), "gaps.direct_seconds"),
    "a result that lost": (set_to("held_out", "link_seconds", "identity", value=0.0), "held_out"),
    "no result": (set_to("held_out", "link_seconds", value=lambda v: {"identity": 1.0}), "held_out"),
    "the spares": (set_to("spares", 0, "fullest", value=1.0), "spares"),
    "the spares needed": (set_to("spares_for", "2", value=0), "spares"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_number_is_found(plan: planc.VerifiedPlan, name: str) -> None:
    assert plan.certificate is not None
    change, path = CHANGES[name]
    record = plan.certificate.model_dump()
    change(record)
    found = list(check_certificate(draft(plan, record)))
    assert {d.code for d in found} == {"PLN318"}
    assert any(d.path.startswith(f"certificate.{path}") for d in found), [d.path for d in found]


def test_an_objective_below_its_bound_is_found(plan: planc.VerifiedPlan) -> None:
    assert plan.certificate is not None
    record = plan.certificate.model_dump()
    record["objectives"]["direct"]["seconds"] = record["bounds"]["direct_seconds"] / 2
    record["gaps"]["direct_seconds"] = -0.5
    assert ["below its bound" in d.message for d in check_certificate(draft(plan, record))] == [True]


def test_a_certificate_stands_exactly_where_traffic_is_known(plan: planc.VerifiedPlan, example: Compiled) -> None:
    assert plan.certificate is not None
    plain = example("moe-4l-64gpu")
    assert plain.certificate is None
    assert [d.code for d in check_certificate(draft(plan, None))] == ["PLN318"]
    assert "PLN318" in [d.code for d in check_certificate(draft(plain, plan.certificate.model_dump()))]


def test_another_placement_contradicts_the_certificate(plan: planc.VerifiedPlan, example: Compiled) -> None:
    assert plan.certificate is not None
    other = example("moe-4l-64gpu", TRAFFIC, "placement.seed=1", "traffic.seed=5")
    assert {d.code for d in check_certificate(draft(other, plan.certificate.model_dump()))} == {"PLN318"}


def test_not_a_number_is_refused_on_reading(plan: planc.VerifiedPlan, tmp_path: Path) -> None:
    plan.write(tmp_path)
    file = tmp_path / "plan.json"
    text = file.read_text("utf-8")
    shown = json.dumps(json.loads(text)["certificate"]["objectives"]["imbalance"])
    file.write_text(text.replace(f'"imbalance": {shown}', '"imbalance": NaN', 1), "utf-8")
    with pytest.raises(PlancError) as error:
        load_plan(file)
    assert {d.code for d in error.value.diagnostics} <= {"PLN018", "PLN316", "PLN318"}


def test_link_times_are_measured_again_from_the_traffic(plan: planc.VerifiedPlan) -> None:
    assert pipeline.measure_again(plan) == "link times of 4 layers measured again on 512 tokens"
    assert plan.certificate is not None
    record = plan.certificate.model_dump()
    for layer in record["layers"]:
        layer["seconds"] *= 1.5
    record["objectives"]["dedup"]["seconds"] *= 1.5
    record["gaps"]["dedup_seconds"] = record["objectives"]["dedup"]["seconds"] / record["bounds"]["dedup_seconds"] - 1
    changed = planc.verify.verify(draft(plan, record))  # agrees with itself, so only the traffic can tell
    with pytest.raises(PlancError) as error:
        pipeline.measure_again(changed)
    assert {d.code for d in error.value.diagnostics} == {"PLN318"}
    assert len(error.value.diagnostics) == 5
