"""A plan written as an engine's map and imported again is the same placement, for every form of map."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_specs import small_spec

import planc
from planc.export import refusals, write
from planc.export.slots import redundant, slot_tables
from planc.placement.given import with_map

ASKED = int(os.environ.get("PLANC_EXAMPLES", "0"))
RUN = settings(max_examples=ASKED or 25, deadline=None, derandomize=not ASKED, suppress_health_check=list(HealthCheck))


@st.composite
def placed(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray]:
    """(parts of a spec, slot tables of its MoE layers): every slot full, no GPU with two copies of one expert."""
    holders, dense, layers = draw(st.sampled_from([4, 8])), draw(st.integers(0, 1)), draw(st.integers(1, 3))
    slots = draw(st.integers(1, 3))
    experts = draw(st.integers(2 if slots == 1 else slots, holders * slots))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tables = []
    for _ in range(layers):
        counts = np.ones(experts, dtype=int)
        while counts.sum() < holders * slots:
            counts[random.choice(np.flatnonzero(counts < holders))] += 1
        dealt = np.repeat(random.permutation(experts), counts[random.permutation(experts)])
        tables.append(random.permutation(dealt.reshape(slots, holders).T))  # like neighbours go to different holders
    moe = {"experts": experts, "top_k": min(2, experts), "intermediate": 32}
    model = {"layers": dense + layers, "first_k_dense": dense, "moe": moe}
    if dense:
        model["dense_mlp"] = {"intermediate": 64}
    parallelism = {"dp": 8 // holders, "pp": 1, "ep": holders, "tp": 1}
    return {"model": model, "parallelism": parallelism, "expert_rule": {"slots_per_gpu": slots}}, np.array(tables)


def maps(plan: planc.VerifiedPlan, folder: Path) -> dict[str, Path]:
    """Form -> the plan's map in it."""
    write(plan, ["sglang", "trtllm", "vllm", "vllm-ascend"], folder, model="m", options={"vllm.map": "pr-49572"})
    stacked = np.stack([table.reshape(-1) for _, table in sorted(slot_tables(plan).items())])
    np.save(folder / "eplb.npy", stacked)
    np.savez(folder / "eplb.npz", phy2log=stacked)
    (folder / "rows.json").write_text(json.dumps(stacked.tolist()))
    if not refusals(plan, ["vllm"])["vllm"] and not redundant(plan):  # copies are vLLM's, and no part of a permutation
        write(plan, ["vllm"], folder / "numbered", model="m")
    where = {  # there are such files where vLLM's own layout is another
        "vLLM with its pull request": folder / "vllm" / "expert_map.json",
        "vLLM with a relabelled checkpoint": folder / "numbered" / "vllm" / "permutation.json",
    }
    return {form: path for form, path in where.items() if path.exists()} | {
        "SGLang": folder / "sglang" / "expert_location.json",
        "TensorRT-LLM": folder / "trtllm" / "moe_load_balancer.yaml",
        "vLLM-Ascend": folder / "vllm-ascend" / "expert_map.json",
        "EPLB array": folder / "eplb.npy",
        "EPLB archive": folder / "eplb.npz",
        "rows": folder / "rows.json",
    }


@RUN
@given(case=placed())
def test_exported_and_imported_the_placement_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], np.ndarray]
) -> None:
    parts, tables = case
    folder = tmp_path_factory.mktemp("maps")
    (folder / "given.json").write_text(json.dumps(tables.reshape(len(tables), -1).tolist()))
    plan = planc.compile(small_spec(**parts, placement={"map": str(folder / "given.json")}))
    for table, (_, found) in zip(tables, sorted(slot_tables(plan).items()), strict=True):
        assert np.array_equal(np.sort(table, axis=1), found)
    bare = parts | {"expert_rule": {"slots_per_gpu": 1, "spares": "idle"}}
    for form, path in maps(plan, folder).items():
        spec, _, _ = with_map(small_spec(**bare), path)
        again = planc.compile(spec)
        assert again.placement.layers.keys() == plan.placement.layers.keys()
        for layer, part in plan.placement.layers.items():
            there = again.placement.layers[layer]
            same = (np.array_equal(getattr(part, key), getattr(there, key)) for key in ("expert", "rank", "slot"))
            assert all(same), (form, layer)
