"""The same spec gives the same bytes, whatever the hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from small_specs import ROOT

CODE = """
import hashlib, sys, planc
from planc.verify import plan_json
plan = planc.compile(planc.load_spec(sys.argv[1], sys.argv[2:]))
text = plan_json(plan).encode()
print(len(text), hashlib.sha256(text).hexdigest())
print(hashlib.sha256(repr(sorted(plan.graph_pairwise.edges(data="bytes"))).encode()).hexdigest())
print(hashlib.sha256(repr(list(plan.graph.edges(data=True))).encode()).hexdigest())
"""
SPECS = [["specs/moe-4l-64gpu.yaml"], ["specs/hetero-h100-h200.yaml", "model.layers=2", "expert_rule.spares=replicate"]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s[0])
def test_bytes_do_not_depend_on_the_hash_seed(spec: list[str]) -> None:
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", CODE, *spec], env=env, cwd=ROOT, capture_output=True, text=True, check=True
        )
        found.append(run.stdout)
    assert found[0] == found[1]
    assert len(found[0].split()) == 4
