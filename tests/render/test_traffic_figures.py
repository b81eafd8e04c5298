"""What a build writes and says of a placement for known traffic."""

from __future__ import annotations

import re

import pytest
from small_specs import Compiled

from planc.pipeline import TRAFFIC_FIGURES, outputs
from planc.verify import VerifiedPlan

TRAFFIC = "traffic={popularity: zipf, exponent: 0.6, topics: 4, tokens: 512}"
SVG = "{http://www.w3.org/2000/svg}"
PLANS = {
    "scope model": ("moe-4l-64gpu", TRAFFIC),
    "rounds": ("deepseek-v3-128gpu", TRAFFIC, "model={base: deepseek-v3, layers: 6}"),
    "two replicas": ("moe-61l-ep64-dp2", TRAFFIC, "model={base: moe-61l, layers: 8}"),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, example: Compiled) -> VerifiedPlan:
    return example(*PLANS[request.param])


def test_a_build_writes_and_links_them_only_where_traffic_is_known(plan: VerifiedPlan, example: Compiled) -> None:
    files = dict(outputs(plan, ()))
    assert set(TRAFFIC_FIGURES) <= files.keys()
    assert all(f"]({name})" in files["deployment_plan.md"] for name in TRAFFIC_FIGURES)
    assert all(files[name].strip() in files["deployment_plan.html"] for name in TRAFFIC_FIGURES)
    plain = dict(outputs(example("moe-4l-64gpu"), ()))
    assert not set(TRAFFIC_FIGURES) & plain.keys()
    assert "Placement for known traffic" not in plain["deployment_plan.md"]


def test_the_document_has_bounds_gaps_and_spares(plan: VerifiedPlan) -> None:
    text = dict(outputs(plan, ()))["deployment_plan.md"]
    section = text.split("## Placement for known traffic")[1].split("\n## ")[0]
    assert re.search(
        r"\| busiest links, summed over layers \(dedup, planned for\) \| [\d.]+ us \| [\d.]+ us \| [\d.]+ % \|", section
    )
    assert "tokens that were not optimised on" in section
    assert "Stragglers and failures" in section and "Spare GPUs" in section
    rows = [line for line in section.split("\n") if line.startswith("|")]
    assert (
        len(
            {
                line.count("|")
                for line in rows
                if "spare GPUs of an EP group" in line or "load of the fullest GPU" in line
            }
        )
        == 1
    )
