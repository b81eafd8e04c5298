"""The small plan by real processes says what the one-process proof says; of wrong plans it names the op, and never hangs.

torch comes from its own registry of CPU builds, without what it needs for other things (planc's environment has the rest),
into a folder of its own under build/: it is no dependency of planc or of its tests. Where it cannot be installed these
tests are skipped; in CI they fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registry import installed
from small_specs import ROOT, Compiled, Small

import planc
from planc.prove import Proof, processes, prove
from planc.prove.holdings import holdings
from planc.prove.model import Weights
from planc.prove.processes import merged, prove_by_processes, run_records
from planc.prove.share import Record, read_share, shares
from planc.prove.shrink import shrink
from planc.verify import Draft

TORCH = "torch==2.13.0"
INDEX = "https://download.pytorch.org/whl/cpu"  # CPU builds: a tenth of the default ones
TIMEOUT = 10.0
MOE = {"experts": 8, "top_k": 2, "intermediate": 32, "gated": True, "shared_experts": 1}
DP = {"parallelism": {"dp": 2, "tp": 2, "pp": 1}}
PP = {"parallelism": {"dp": 1, "tp": 2, "pp": 2}, "workload": {"batch": 64, "micro_batches": 2}, "model": {"vocab": 96}}
LEADER = {"parallelism": DP["parallelism"] | {"gating": "leader"}}
HALVES = DP | {"workload": {"batch": 64, "micro_batches": 2}, "model": {"vocab": 96}}


@pytest.fixture(scope="session")
def torch_home() -> Path:
    """A folder with torch, made on first use and kept."""
    return installed(
        "torch", (TORCH, INDEX), lambda home: ["install", f"--index-url={INDEX}", f"--target={home}", TORCH]
    )


@pytest.fixture
def torch(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch where processes find it; it is never imported here."""
    monkeypatch.syspath_prepend(str(torch_home))
    return torch_home


# --- without torch ---------------------------------------------------------------------------------------------------


def test_without_torch_it_says_so(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(planc.PlancError) as error:
        prove_by_processes(planc.compile(small(**DP)), 8)
    (fault,) = error.value.diagnostics
    assert fault.code == "PLN420" and "pip install" in fault.hint


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_process_is_told_its_own_part(small: Small, count: int) -> None:
    plan = planc.compile(small(**PP))
    whole = shrink(plan)
    records = shares(plan, count)
    ops, groups = set(), set()
    for record in records:
        share = read_share(json.loads(json.dumps(record)))
        groups.add(tuple(share.groups))
        names = [share.small.graph.op_id(*op) for op in share.program]
        for name, (number, op) in zip(names, share.program, strict=True):
            block = share.small.graph.blocks[number]
            assert {int(r) for r in block.ranks[op]} & set(share.ranks) or block.kind == "output_collect", name
        ops |= set(names)
        held = holdings(share.small.draft, Weights(share.small.draft.spec.model, 0), share.ranks)
        assert [rank for rank, one in enumerate(held) if one.weights] == share.ranks
        assert share.small.draft.spec.model == whole.draft.spec.model
    assert len(groups) == 1  # communicators are made by all in one order
    assert ops == {whole.graph.op_id(n, op) for n, block in enumerate(whole.graph.blocks) for op in range(len(block))}


def test_there_are_no_more_processes_than_ranks(small: Small) -> None:
    with pytest.raises(ValueError, match="9 processes cannot share 8 ranks"):
        shares(planc.compile(small(**DP)), 9)


# --- with torch ------------------------------------------------------------------------------------------------------


def _agree(one: Proof, many: Proof) -> None:
    assert one.holds and many.holds, (one.faults, many.faults)
    assert many.errors.keys() == one.errors.keys() and many.max_relative_error <= 1e-9
    own = {k: v for k, v in one.bytes_moved.items() if k != "input_split" and not k.endswith("edges")}
    assert many.bytes_moved == own == many.bytes_planned  # of edges and the scatter processes keep no count
    assert (many.ops, many.tokens, many.ranks, many.layers) == (one.ops, one.tokens, one.ranks, one.layers)
    assert many.memory_equal


@pytest.mark.parametrize(("parts", "count"), [(DP | {"model": {"moe": MOE}}, 8), (PP, 8), (PP, 3)])
def test_processes_agree_with_one(small: Small, torch: Path, parts: dict[str, Any], count: int) -> None:
    plan = planc.compile(small(**parts))
    _agree(prove(plan), prove_by_processes(plan, count))


@pytest.mark.parametrize(
    "degrees",
    [
        "parallelism={dp: 1, tp: 4, expert_tp: 2}",
        "parallelism={dp: 1, tp: 2, pp: 2, gating: leader}",
        "parallelism={dp: 1, tp: 4, tp_comm: reduce_scatter}",
    ],
)
def test_processes_may_stand_for_uneven_runs_of_ranks(example: Compiled, torch: Path, degrees: str) -> None:
    plan = example("mixtral-8x7b", degrees)
    _agree(prove(plan), prove_by_processes(plan, 5))


def _swapped(plan: planc.VerifiedPlan, name: str, ranks: Callable[[np.ndarray], np.ndarray]) -> Draft:
    """The plan with other ranks in one block."""
    blocks = tuple(replace(b, ranks=ranks(b.ranks.copy())) if b.name == name else b for b in plan.blocks.blocks)
    graph = replace(plan.blocks, blocks=blocks)
    return Draft(plan.spec, plan.parallelism, {}, plan.placement, plan.memory, graph)


def test_swapped_ranks_of_a_collective_are_found_where_the_sum_is_read(small: Small, torch: Path) -> None:
    def swap(ranks: np.ndarray) -> np.ndarray:
        ranks[0, 1], ranks[1, 0] = ranks[1, 0], ranks[0, 1]
        return ranks

    plan = _swapped(planc.compile(small(**DP)), "L0.attn_all_reduce", swap)
    proof = prove_by_processes(plan, 8, timeout=TIMEOUT)
    assert not proof.holds
    assert proof.faults[0][0] == prove(plan).faults[0][0] == "L0.attn_add.r0"


def test_an_expert_on_another_rank_is_named(small: Small, torch: Path) -> None:
    plan = _swapped(planc.compile(small(**DP)), "L0.expert.s0", lambda ranks: ranks[[1, 0, *range(2, len(ranks))]])
    proof = prove_by_processes(plan, 8, timeout=TIMEOUT)
    assert ("L0.expert.s0.r0", "rank 0 holds nothing of `L0.E2.`") in proof.faults


def _other_order(records: list[Record], plan: planc.VerifiedPlan) -> None:
    """Rank 3 runs the second micro-batch first."""

    def turn(op: list[int]) -> int:
        block = records[3]["blocks"][op[0]]
        return {"input": -9, "input_split": -9, "output_collect": 9}.get(block["kind"], -block["micro_batch"])

    records[3]["program"].sort(key=turn)


def _other_size(records: list[Record], plan: planc.VerifiedPlan) -> None:
    """Rank 5 has a model of twice the hidden size."""
    records[5] = shares(plan, 8, scale=2)[5]


def _without(name: str) -> Callable[[list[Record], planc.VerifiedPlan], None]:
    """Rank 2 does not run the op of this block."""

    def change(records: list[Record], plan: planc.VerifiedPlan) -> None:
        one = records[2]
        one["program"] = [op for op in one["program"] if one["blocks"][op[0]]["name"] != name]

    return change


def _unfed(name: str) -> Callable[[list[Record], planc.VerifiedPlan], None]:
    """Of rank 0 nothing comes to the op of this block."""

    def change(records: list[Record], plan: planc.VerifiedPlan) -> None:
        one = records[0]
        one["edges"] = [edge for edge in one["edges"] if one["blocks"][edge["ends"][2]]["name"] != name]

    return change


def _unreadable(records: list[Record], plan: planc.VerifiedPlan) -> None:
    records[4]["spec"] = {}


@pytest.mark.parametrize(
    ("parts", "change", "op", "why"),
    [
        (HALVES, _other_order, "m0.L0.attn_all_reduce.r2-3", "ranks 3 are in m1.L0.attn_all_reduce.r2-3 of step 0"),
        (HALVES, _other_size, "m0.L0.attn_all_reduce.r4-5", "[4, 12] from ranks 4, [4, 24] from ranks 5"),
        (
            HALVES,
            _without("m1.L0.dispatch"),
            "m1.L0.expert.s0.r2",
            "reads m1.L0.dispatch.r0-3, which runs later or not",
        ),
        (PP, _without("m1.S0.pp_send"), "m1.S1.pp_recv.r6", "waited 10 s for ranks 2 at end of step 0"),
        (LEADER, _unfed("L0.moe_broadcast"), "L0.moe_broadcast.r0-1", "its first member has nothing to send"),
        (HALVES, _unreadable, "start", "the key `model` is missing"),
    ],
    ids=["order", "size", "missing", "unsent", "unfed", "unreadable"],
)
def test_what_processes_do_not_agree_on_is_named(
    small: Small, torch: Path, parts: dict[str, Any], change: Any, op: str, why: str
) -> None:
    plan = planc.compile(small(**parts))
    records = shares(plan, 8)
    change(records, plan)
    started = time.monotonic()
    proof = merged(shrink(plan), records[0], run_records(records, TIMEOUT))
    assert time.monotonic() - started < 60 + 2 * TIMEOUT  # torch starts slowly on a busy machine
    assert not proof.holds
    assert any(fault[0] == op and why in fault[1] for fault in proof.faults), proof.faults
    if why.startswith("waited"):
        assert proof.faults[0][0] == op  # other ops wait for this one


def test_under_torchrun(torch: Path) -> None:
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "planc.prove.processes")
    environment = os.environ | {"PYTHONPATH": f"{torch}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *run, "mixtral-8x7b", "--timeout=30"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 ranks in 2 processes, 2 steps" in done.stdout
    assert done.stdout.endswith("the plan holds\n")
