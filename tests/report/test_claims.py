"""Claims as numbers: what a claimed TPS means, GPUs of a claim, and where verdicts change."""

from __future__ import annotations

import pytest
from small_specs import small_spec

import planc
from planc.report.claims import Judged, claim_records


@pytest.mark.parametrize(
    ("claimed", "verdict"),
    [
        (0.99, "impossible"),
        (1.0, "quicker than predicted"),
        (1.99, "quicker than predicted"),
        (2.0, "as predicted"),
        (2.5, "as predicted"),
        (4.0, "as predicted"),
        (4.01, "slower than predicted"),
    ],
)
def test_where_verdicts_change(claimed: float, verdict: str) -> None:
    assert Judged("tpot_s", claimed, predicted=3.0, low=2.0, high=4.0, floor=1.0).verdict == verdict


def test_tps_are_judged_as_tpot_and_per_gpu_of_the_claim() -> None:
    claims = [{"name": "a", "tps": 1000, "gpus": 4}, {"name": "b", "tps": 1000, "tpot": "2 ms"}]
    first, second = claim_records(planc.compile(small_spec(claims=claims)).estimate())
    assert first["verdicts"]["tps"]["claimed_tpot_s"] == pytest.approx(64 / 1000)
    assert first["tps_per_gpu"] == 250 and second["tps_per_gpu"] == 125
    assert first["sequences_in_flight"] is None and first["longest_isl"] == {}
    assert second["sequences_in_flight"] == 2 and set(second["verdicts"]) == {"tps", "tpot_s"}


def test_what_a_claim_reaches_is_for_the_sequences_it_implies() -> None:
    """Twice the sequences at the same TPOT reach half as far or less."""
    claims = [{"name": str(n), "tps": n / 100e-6, "tpot": "100 us"} for n in (2000, 4000)]
    few, many = claim_records(planc.compile(small_spec(claims=claims)).estimate())
    assert 0 < many["longest_isl"]["predicted"] <= 0.52 * few["longest_isl"]["predicted"]
