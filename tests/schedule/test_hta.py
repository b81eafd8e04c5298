"""HolisticTraceAnalysis, which reads profiler traces of real runs, sees in planc's traces what planc says of its step.

It is installed from the package registry, without its notebook (which it does not need to read traces), into an
environment of its own under build/: nothing of it is a dependency of planc. Where it cannot be installed the test is
skipped; in CI it fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterable
from pathlib import Path

import pytest
from registry import installed
from small_specs import Compiled

from planc import export, pipeline
from planc.schedule import Timeline, timeline

PACKAGES = (
    "HolisticTraceAnalysis==0.5.0",
    "narwhals==2.29.0",
    "networkx==3.6.1",
    "numpy==2.4.6",
    "packaging==26.3",
    "pandas==3.1.1",
    "plotly==7.1.0",
    "psutil==7.2.2",
    "python-dateutil==4.0.0",
    "PyYAML==6.0.4",
    "six==1.17.0",
)


@pytest.fixture(scope="session")
def hta_python() -> Path:
    """Python of an environment with HolisticTraceAnalysis, made on first use and kept."""

    def into(home: Path) -> list[str]:
        venv.create(home, symlinks=True)
        return ["--python", str(home / "bin" / "python"), "install", *PACKAGES]

    return installed("HolisticTraceAnalysis", PACKAGES, into) / "bin" / "python"


def _read(python: Path, folders: Iterable[Path]) -> list[dict[int, dict[str, float]]]:
    """What HTA says of every rank's trace in each folder."""
    script = Path(__file__).with_name("hta_breakdowns.py")
    # without the switch HTA rounds times to whole microseconds, which many of a decode step's kernels do not last
    environment = {"PATH": os.environ["PATH"], "HTA_DISABLE_NS_ROUNDING": "1"}
    done = subprocess.run([python, script, *folders], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [{int(rank): facts for rank, facts in found.items()} for found in json.loads(done.stdout.splitlines()[-1])]


def _agrees(simulated: Timeline, ranks: Iterable[int], found: dict[int, dict[str, float]]) -> None:
    usage, busy = simulated.usage, simulated.stream_busy()
    assert sorted(found) == sorted(ranks)
    for rank, said in found.items():
        step = simulated.step * 1e6
        outside = step - said["kernel"]  # HTA's step of a rank begins with its first kernel and ends with its last
        want = {
            "compute": usage.compute[rank] * 1e6,
            "non_compute": usage.exposed[rank] * 1e6,
            "idle": usage.idle[rank] * 1e6 - outside,
        }
        for kind, name in (("compute", "COMPUTATION"), ("communication", "COMMUNICATION")):
            want[name] = sum(s for (r, k, _), s in busy.items() if (r, k) == (rank, kind)) * 1e6
        for name, us in want.items():
            assert said[name] == pytest.approx(us, rel=1e-3, abs=1e-6 * step), (rank, name)
        percent = 100 * usage.overlapped[rank] / usage.communication[rank]
        assert said["overlap_percent"] == pytest.approx(percent, rel=1e-3, abs=0.0051), rank  # HTA rounds to 0.01


def test_hta_agrees_with_the_timeline(hta_python: Path, example: Compiled, tmp_path: Path) -> None:
    stages = timeline(example("moe-4l-16gpu-baseline"))
    halves = timeline(example("moe-4l-64gpu", "workload.micro_batches=2"))
    streams = "execution={compute_streams: 2, communication_streams: 2, expert_chunks: 2}"
    many = timeline(example("moe-4l-64gpu", "workload.micro_batches=2", streams))
    assert halves.usage.overlapped.min() > 0.05 * halves.usage.communication.max()  # or there were little to compare
    steps = {"stages": (stages, range(16)), "halves": (halves, (0, 9, 63)), "many": (many, (7,))}
    for name, (simulated, ranks) in steps.items():
        pipeline.write_traces(simulated, tmp_path / name, ranks)
    export.write(example("moe-4l-16gpu-baseline"), ["kineto"], tmp_path)  # all ranks, as the first of the steps
    steps["kineto"] = steps["stages"]
    for (simulated, ranks), found in zip(
        steps.values(), _read(hta_python, [tmp_path / name for name in steps]), strict=True
    ):
        _agrees(simulated, ranks, found)
