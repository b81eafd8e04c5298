"""PLN403: what neither a fit nor the spec prices is refused, and no other GPU's fit is used for it."""

from __future__ import annotations

import pytest

import planc
from planc.diagnostics import PlancError


def test_a_gpu_without_fit_and_links_has_no_price_for_communication() -> None:
    costs = planc.load_costs("gb200")
    with pytest.raises(PlancError, match="PLN403"):
        costs.price("all_reduce", {"ranks": 8, "bytes": 1e6, "library": "nccl"})
