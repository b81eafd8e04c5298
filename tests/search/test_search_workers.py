"""Candidates come out the same whoever evaluates them, also when workers are killed; what cannot work is refused in time.

Dask comes from the package registry into a folder of its own under build/, with what it needs: it is no dependency of planc
or of its tests. Where it cannot be installed these tests are skipped; in CI they fail.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from registry import installed
from search_workers import asked, rows, spec
from small_specs import ROOT

import planc
from planc.diagnostics import Diagnostic
from planc.search import workers
from planc.search.evaluate import Evaluator, Outcome
from planc.search.space import Shape
from planc.search.workers import evaluating

HERE = Path(__file__).parent
PACKAGES = (
    "click==8.5.1",
    "cloudpickle==3.1.3",
    "dask==2026.8.0",
    "distributed==2026.8.0",
    "fsspec==2026.9.0",
    "importlib_metadata==10.2.0",  # with the next and the last one: before Python 3.12
    "lazy-importer==0.1.0",
    "locket==1.0.0",
    "msgpack==1.2.4",
    "packaging==26.3",
    "partd==1.4.2",
    "psutil==7.2.2",
    "sortedcontainers==2.4.0",
    "tblib==3.2.2",
    "toolz==1.2.0",
    "tornado==6.6.1",
    "zict==3.0.0",
    "zipp==4.1.2",
)
forks = pytest.mark.skipif(
    sys.platform != "linux", reason="worker processes that are no forks have no changed functions"
)


def alone(*, whole: bool = False) -> list[Outcome]:
    """What one evaluator says of all candidates."""
    evaluator = Evaluator(spec())
    return [evaluator.outcome(*one, ttft=True, whole=whole) for one in asked()]


def in_workers(monkeypatch: pytest.MonkeyPatch, first: Callable[[Shape], Any]) -> None:
    """Have worker processes do something before they evaluate a candidate. This process does not."""
    here, evaluated = os.getpid(), Evaluator.outcome

    def outcome(self: Evaluator, shape: Shape, batch: int, **options: Any) -> Outcome:
        if os.getpid() != here:
            first(shape)
        return evaluated(self, shape, batch, **options)

    monkeypatch.setattr(Evaluator, "outcome", outcome)


def die(shape: Shape | None = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- processes of this machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_workers_says_the_same(count: int) -> None:
    with evaluating(spec(), workers=count, ttft=True) as evaluate:
        found = evaluate(asked())
        assert found == alone()
        assert evaluate(asked()[::-1]) == found[::-1]
        assert evaluate(asked(), whole=True) == alone(whole=True)
        assert evaluate([]) == []
    assert found[0].row and found[0].row["ttft_s"] and found[-1].refused.startswith("PLN201")


def test_processes_start_with_the_first_candidates_to_share() -> None:
    with evaluating(spec(), workers=2) as evaluate:
        evaluate(asked()[:1])
        assert not multiprocessing.active_children()
        evaluate(asked()[:2])
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


@forks
@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_worker_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    def die_some_times(shape: Shape) -> None:
        died = len(list(tmp_path.iterdir()))
        if shape == asked()[3][0] and died < times:
            (tmp_path / str(died)).touch()
            die()

    in_workers(monkeypatch, die_some_times)
    said: list[str] = []
    with evaluating(spec(), workers=2, ttft=True, say=said.append) as evaluate:
        assert evaluate(asked()) == alone()
    assert len(said) == times and all("died" in text for text in said)


def test_workers_killed_between_two_waves_are_replaced() -> None:
    with evaluating(spec(), workers=2, ttft=True) as evaluate:
        evaluate(asked())
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        assert evaluate(asked()) == alone()


@forks
def test_workers_that_keep_dying_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    poison = asked()[2][0]
    in_workers(monkeypatch, lambda shape: die() if shape == poison else None)
    with evaluating(spec(), workers=2) as evaluate, pytest.raises(planc.PlancError) as error:
        evaluate(asked())
    (fault,) = error.value.diagnostics
    degrees = asdict(poison)
    assert fault.code == "PLN433" and len(fault.related) <= 2
    assert any(f"dp={degrees['dp']} pp={degrees['pp']} ep={degrees['ep']} " in text for text in fault.related)
    assert not multiprocessing.active_children()


@forks
def test_deaths_with_results_between_them_do_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate kills its worker once: eight deaths, never three without a result."""

    def die_once(shape: Shape) -> None:
        mark = tmp_path / str(hash(shape))
        if not mark.exists():
            mark.touch()
            die()

    in_workers(monkeypatch, die_once)
    with evaluating(spec(), workers=2, ttft=True) as evaluate:
        assert evaluate(asked()) == alone()
    assert len(list(tmp_path.iterdir())) == 7  # the last candidate has the shape of the first


@forks
def test_ctrl_c_does_not_wait_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    in_workers(monkeypatch, lambda shape: time.sleep(60))
    started = time.monotonic()
    Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), evaluating(spec(), workers=2) as evaluate:
        evaluate(asked())
    assert time.monotonic() - started < 20
    assert not multiprocessing.active_children()


@forks
def test_what_a_worker_refuses_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Diagnostic("PLN403", "no price", "cluster", related=("one", "two"))

    def refuse(shape: Shape) -> None:
        raise planc.PlancError([fault])

    in_workers(monkeypatch, refuse)
    with evaluating(spec(), workers=2) as evaluate, pytest.raises(planc.PlancError) as error:
        evaluate(asked())
    assert error.value.diagnostics == (fault,)


def test_workers_price_with_the_fits_that_are_given(tmp_path: Path) -> None:
    file = tmp_path / "slow.yaml"
    shipped = (ROOT / "specs" / "fits" / "h100-sxm.yaml").read_text("utf-8")
    file.write_text(shipped.replace("compute_efficiency: 94.81 %", "compute_efficiency: 9.481 %"), "utf-8")
    mixtral = planc.load_spec("mixtral-8x7b")
    candidates = [(Shape(1, 1, 8, tp), 256) for tp in (1, 8)]
    with evaluating(mixtral) as evaluate:
        as_shipped = evaluate(candidates)
    found = []
    for count in (1, 2):
        with evaluating(mixtral, workers=count, fits=[str(file)]) as evaluate:
            kept = file.rename(tmp_path / "elsewhere")  # as on another machine
            found.append(evaluate(candidates))
            kept.rename(file)
    assert found[0] == found[1]
    for one, slow in zip(as_shipped, found[1], strict=True):
        assert one.row and slow.row and slow.row["tpot_s"] > one.row["tpot_s"]


def test_a_spec_travels_whole() -> None:
    mixtral = planc.load_spec("mixtral-8x7b")
    copy = pickle.loads(pickle.dumps(mixtral))
    assert copy == mixtral and copy.span("workload") == mixtral.span("workload") is not None


# --- a Dask cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def dask_home() -> Path:
    """A folder with Dask, made on first use and kept."""
    return installed("dask", PACKAGES, lambda home: ["install", f"--target={home}", *PACKAGES])


def answer(home: Path, script: str, *arguments: object) -> Any:
    """What a script with Dask prints."""
    paths = os.pathsep.join(map(str, (home, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_dask_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    with pytest.raises(planc.PlancError) as error, evaluating(spec(), dask="tcp://127.0.0.1:8786"):
        pass
    (fault,) = error.value.diagnostics
    assert fault.code == "PLN431" and "pip install 'planc[dask]'" in fault.hint


def test_a_killed_worker_of_a_cluster_is_survived(dask_home: Path, tmp_path: Path) -> None:
    found = answer(dask_home, "dask_cluster.py", "die", tmp_path)["found"]
    assert (tmp_path / "died").exists()
    assert found == json.loads(json.dumps([rows(alone()), rows(alone(whole=True)[:2])]))


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("always", "PLN433", "died"),
        ("version", "PLN434", f"a worker has planc 0.0.1, this is planc {planc.__version__}"),
        ("lack", "PLN434", "No module named 'planc"),
        ("none", "PLN434", "no workers for 2 s"),
        ("leave", "PLN434", "no workers for 2 s"),
    ],
)
def test_a_cluster_that_cannot_do_it(dask_home: Path, tmp_path: Path, how: str, code: str, message: str) -> None:
    found = answer(dask_home, "dask_cluster.py", how, tmp_path)
    assert found["code"] == code and message in found["message"], found
    assert bool(found["related"]) == (how == "always")
    if how in ("none", "leave"):
        assert "waiting up to 2 s" in found["said"][-1]


def test_addresses_without_a_cluster(dask_home: Path) -> None:
    assert answer(dask_home, "dask_addresses.py") == ["PLN434"] * 8
