"""Every mistake is caught by the verifier, the proof, or both, and docs/prove-mutations.md says by which."""

from __future__ import annotations

from dataclasses import replace

import pytest
from breaking import SPECS, good
from mutation_table import CHANGES, PAGE, WRONGS, page, rows
from test_blind_spots import edge_changes

from planc.prove import prove


def test_every_mistake_is_caught_and_the_page_says_how() -> None:
    found = list(rows())
    assert [row.what for row in found if not row.codes and not row.fault] == []
    wrong = {w.what for w in WRONGS}
    assert all(row.fault and not row.codes for row in found if row.what in wrong)
    assert len(CHANGES) + len(WRONGS) >= 50 and len({row.what for row in found}) == len(found)
    assert page(found) == PAGE.read_text(encoding="utf-8"), "run `make mutations`"


def test_the_plans_are_good_before() -> None:
    assert [name for name in SPECS if not prove(good(name), layers=99).holds] == []


@pytest.mark.parametrize("name", SPECS)
def test_the_proof_alone_sees_every_rewired_edge(name: str) -> None:
    """Edges from elsewhere, swapped and dropped, all over a plan: the numbers come out wrong, or an op cannot run. Edges that
    only say "after" carry none."""
    draft = good(name)
    wired = [
        (what, graph)
        for what, graph in edge_changes(draft.blocks)
        if " marked " not in what and ".done" not in what and "after" not in what
    ]
    tried = wired[5::23]
    assert len(tried) > 4
    unseen = [what for what, graph in tried if prove(replace(draft, blocks=graph), layers=99).holds]
    assert unseen == []
