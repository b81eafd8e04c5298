"""`python -m benchmarks.gpu` without a GPU: its refusals, its grid, its bookkeeping with a stub, fits of made-up rows."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import collectives, device, grid, operations, timing
from benchmarks.gpu import measure as measuring
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.check import check
from benchmarks.gpu.fit import ROWS_PER_CONSTANT, settled
from benchmarks.gpu.rows import COLUMNS, read_rows, write_facts, write_row
from planc import cli
from planc.cost import Costs, load_costs, load_fit, loads, transfer
from planc.cost.fits import FAMILIES
from planc.cost.ops import KINDS, costs_of
from planc.diagnostics import PlancError

ROOT = Path(__file__).resolve().parents[2]
GPU = "h100-sxm"
FACTS = {
    "gpu": GPU, "device": "Made-up H100", "driver": "570.0", "torch": "2.13.0", "cuda": "12.8", "date": "2026-01-31",
    "sms": "132",
}  # fmt: skip
FITTED = ("gemm", "expert_gemm", "mla_decode", "all_reduce", "all_gather")


def _sizes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: 0 if row[name] == "balanced" else row[name] for name in KINDS[row["kind"]]}


def _truth() -> Costs:
    """Prices of a GPU unlike the shipped one: slower memory, quicker launches, other links."""
    shipped = load_costs(GPU)
    assert shipped.fit is not None
    changes: dict[str, dict[str, Any]] = {
        "gemm": {"overhead": 4e-6, "compute_efficiency": 0.7, "memory_efficiency": 0.6, "prologue": 180.0},
        "expert_gemm_balanced": {"overhead": 50e-6, "memory_efficiency": 0.7, "per_expert": 2e-7},
        "expert_gemm_skewed": {"overhead": 50e-6, "memory_efficiency": 0.7, "per_expert": 2e-7},
        "mla_decode": {"overhead": 12e-6, "block": 1.1e-6, "memory_efficiency": 0.7},
        "all_reduce": {"ll_latency": 12e-6, "simple_bandwidth": (150e9, 200e9, 260e9)},
        "all_gather": {"ll_latency": 5e-6, "simple_bandwidth": (180e9, 190e9, 210e9)},
    }
    fit = shipped.fit
    for name, update in changes.items():
        part = getattr(fit, name)
        constants = part.constants.model_copy(update=update)
        fit = fit.model_copy(update={name: part.model_copy(update={"constants": constants, "fill": "spread"})})
    return costs_of(shipped.gpu, shipped.links, fit)


def _write(path: Path, rows: list[dict[str, Any]], seconds: np.ndarray, facts: dict[str, str] = FACTS) -> Path:
    with open(path, "w", encoding="utf-8") as out:
        write_facts(out, facts)
        for row, value in zip(rows, seconds * 1e6, strict=True):
            times = {"us": f"{value:.6g}", "us_p10": f"{value * 0.98:.6g}", "us_p90": f"{value * 1.03:.6g}"}
            write_row(out, row | times | {"software": "made up"})
    return path


def _priced(costs: Costs, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([costs.price(row["kind"], _sizes(row), row["dtype"]).seconds[0] for row in rows])


@pytest.fixture(scope="module")
def split() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ops to fit to, and others of sizes that are not among them."""
    ops = [row for row in grid.rows(FITTED) if row["dtype"] == "bf16"]
    seen, among = grid.thinned(ops, 2), grid.collectives(8, FITTED)
    seen, ops = seen + [row for number, row in enumerate(among) if number % 3], ops + among
    known = {tuple(row.items()) for row in seen}
    return seen, [row for row in ops if tuple(row.items()) not in known]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, split: tuple[Any, Any]) -> tuple[Path, Path]:
    """Rows made of known constants and 2 % of noise, and their fit."""
    folder = tmp_path_factory.mktemp("gpu")
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.02, len(split[0])))
    rows = _write(folder / "rows.csv", split[0], _priced(_truth(), split[0]) * noise)
    assert main(["fit", str(rows), "--gpu", GPU, "-o", str(folder / "fit.yaml")]) == 0
    return rows, folder / "fit.yaml"


def test_a_fit_recovers_prices_of_other_sizes(fitted: tuple[Path, Path], split: tuple[Any, Any]) -> None:
    costs, truth = load_costs(GPU, fitted[1]), _truth()
    errors: dict[str, list[float]] = {}
    for row, wanted in zip(split[1], _priced(truth, split[1]), strict=True):
        price = costs.price(row["kind"], _sizes(row), row["dtype"])
        errors.setdefault(row["kind"], []).append(abs(price.seconds[0] / wanted - 1))
    assert set(errors) == set(FITTED)
    for kind, part in errors.items():
        assert len(part) >= 20 and np.median(part) < 0.02 and np.quantile(part, 0.9) < 0.06, kind


def test_the_file_of_a_fit(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    fit = load_fit(fitted[1])
    known = {"gemm", "expert_gemm_balanced", "expert_gemm_skewed", "mla_decode", "all_reduce", "all_gather"}
    assert (fit.gpu, fit.sms, set(fit.absent)) == (GPU, 132, set(FAMILIES) - known)
    assert fit.gemm is not None and fit.gemm.dtype == "bf16" and fit.gemm.valid["m"] == (1, 8192)
    assert fit.expert_gemm_skewed is not None and fit.expert_gemm_skewed.fill == "spread"
    low, high = fit.gemm.interval.inside
    assert 0.94 < low < 0.98 and 1.02 < high < 1.06  # the noise that was added
    for word in ("Made-up H100", "570.0", "2.13.0", "CUDA 12.8", "2026-01-31", "made up"):
        assert word in fit.gemm.source
    assert main(["fit", str(fitted[0]), "--gpu", GPU, "-o", str(tmp_path / "again.yaml")]) == 0
    assert (tmp_path / "again.yaml").read_bytes() == fitted[1].read_bytes()


def test_check_of_rows(fitted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(fitted[0]), "--gpu", GPU, "--fit", str(fitted[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "family rows measured ÷ price p10 p90 error, median p90 held provenance"
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names == sorted(names) and "gemm bf16" in names and "expert_gemm bf16 skewed" in names
    for line in lines[1:]:
        cells = line.replace("%", "").split("  ")
        ratio, *_, held = (float(cell) for cell in [cell for cell in cells if cell][2:8])
        assert 0.97 < ratio < 1.03 and held >= 80, line
        assert "fitted" in line
    assert (
        main(["check", str(fitted[0]), "--gpu", GPU]) == 0
    )  # the shipped fit, which is of another GPU than these rows
    assert "gemm bf16" in capsys.readouterr().out


def test_check_says_what_has_no_price(tmp_path: Path) -> None:
    ops = grid.collectives(2, ("all_reduce",))[:3]
    rows = read_rows(_write(tmp_path / "rows.csv", ops, np.full(3, 1e-5), FACTS | {"gpu": "gb200"}))
    assert "no price (PLN403)" in check(rows, load_costs("gb200"))


def test_planc_prices_a_rows_file(fitted: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["costs", "--gpu", GPU, "--fit", str(fitted[1]), str(fitted[0])]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(found[0])[-4:] == ["us", "low_us", "high_us", "provenance"]
    ratio = [float(row["measured_us"]) / float(row["us"]) for row in found]
    assert 0.98 < np.median(ratio) < 1.02


def test_a_fit_is_of_its_gpu(fitted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(fitted[0]), "--gpu", "h200-sxm", "-o", str(tmp_path / "fit.yaml")]) == 1
    assert "PLN408" in capsys.readouterr().err and not (tmp_path / "fit.yaml").exists()
    with pytest.raises(PlancError, match="PLN408"):
        load_costs("h200-sxm", fitted[1])
    assert cli.main(["costs", "--gpu", "h200-sxm", "--fit", str(fitted[1]), str(fitted[0])]) == 1
    assert "PLN408" in capsys.readouterr().err
    assert main(["check", str(fitted[0]), "--gpu", "h200-sxm"]) == 0
    assert "measured as h100-sxm" in capsys.readouterr().err


def test_too_few_rows_are_no_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops = [row for row in grid.rows(("gemm",)) if row["dtype"] == "bf16"]
    few = _write(tmp_path / "few.csv", ops[: ROWS_PER_CONSTANT * 8 - 1], np.full(ROWS_PER_CONSTANT * 8 - 1, 1e-5))
    assert main(["fit", str(few), "--gpu", GPU, "-o", str(tmp_path / "fit.yaml")]) == 1
    err = capsys.readouterr().err
    assert "gemm is left absent: 23 rows, where 8 constants need 24" in err and "PLN404" in err
    one_shape = [{**ops[0], "m": m} for m in range(1, 41)]
    flat = _write(tmp_path / "flat.csv", one_shape, np.linspace(1e-5, 2e-5, 40))
    assert main(["fit", str(flat), "--gpu", GPU, "-o", str(tmp_path / "fit.yaml")]) == 1
    assert "all rows are of one shape" in capsys.readouterr().err


_GOOD = "kind,dtype,m,n,k,us,us_p10,us_p90\ngemm,bf16,1,512,512,5,4.9,5.2\n"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda t: t.replace("# date: 2026-01-31\n", ""), "PLN404", "`# date: …` is missing"),
        (lambda t: t.replace("# planc rows: 1\n", ""), "PLN404", "`# planc rows: …` is missing"),
        (lambda t: t.replace("planc rows: 1", "planc rows: 2"), "PLN404", "rows of version 2"),
        (lambda t: t.replace("sms: 132", "sms: many"), "PLN405", "not a number of SMs"),
        (lambda t: t.replace("us_p90", "p90"), "PLN404", "column `us` is one that prices add"),
        (lambda t: t.replace(",us,", ",time,"), "PLN404", "column `us` is missing"),
        (lambda t: t.replace(",5,4.9,5.2", ",5,5.1,5.2"), "PLN405", "us_p10 5.1 ≤ us 5 ≤ us_p90 5.2"),
        (lambda t: t.replace(",5,4.9,5.2", ",nan,4.9,5.2"), "PLN405", "does not hold"),
        (lambda t: t.replace(",5,4.9,5.2", ",-5,-6,5.2"), "PLN405", "does not hold"),
        (lambda t: t.replace(",5,4.9,5.2", ",5,,5.2"), "PLN405", "are not three numbers"),
        (lambda t: t.replace("gemm,bf16,1,", "gemm,bf16,0,"), "PLN405", "not a number from 1"),
        (lambda t: t.replace("gemm,bf16", "gem,bf16"), "PLN405", "not a kind of op"),
        (lambda t: t[: t.index("gemm,")], "PLN404", "no measured row"),
        (lambda t: "", "PLN404", "`kind` is missing"),
        (lambda t: "\0\xff", "PLN", ""),
    ],
)
def test_malformed_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], code: str, words: str
) -> None:
    out = io.StringIO()
    write_facts(out, FACTS)
    text = out.getvalue().rpartition("kind,")[0] + _GOOD
    path = tmp_path / "rows.csv"
    path.write_text(text, "utf-8")
    assert len(read_rows(path).seconds) == 1
    path.write_text(change(text), "utf-8")
    for command in (["fit", "-o", str(tmp_path / "fit.yaml")], ["check"]):
        assert main([command[0], str(path), "--gpu", GPU, *command[1:]]) == 1
        err = capsys.readouterr().err
        assert code in err and words in err and "Traceback" not in err
    assert not (tmp_path / "fit.yaml").exists()


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.csv"), "--gpu", GPU]) == 1
    assert "PLN001" in capsys.readouterr().err


def test_without_torch(tmp_path: Path) -> None:
    """The command itself, in a process that cannot import torch even where it is installed."""
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv[0] = 'x'; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    command = [sys.executable, "-c", code, "--gpu-name", GPU, "-o", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    for words in ("needs torch", "pip install torch", "python -m benchmarks.gpu --gpu-name h100-sxm -o rows.csv"):
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=None), __version__="2.13.0+cpu"
    )
    monkeypatch.setitem(sys.modules, "torch", stub)
    assert main(["measure", "--gpu-name", GPU, "-o", str(tmp_path / "rows.csv")]) == 1
    err = capsys.readouterr().err
    assert "torch 2.13.0+cpu (built for no CUDA at all) finds no GPU here" in err and "nvidia-smi" in err
    assert main(["--gpu-name", "h100-smx", "-o", str(tmp_path / "rows.csv")]) == 1
    assert "PLN007" in capsys.readouterr().err


class Clock:
    """A device whose calls take a known time each, and now and then longer."""

    def __init__(self, each: float, l2: float = 50e6, graphs: bool = True) -> None:
        self.each, self.l2, self.graphs = each, l2, graphs
        self.now, self.timed, self.made = 0.0, 0, 0

    def make(self) -> Callable[[], None]:
        self.made += 1

        def call() -> None:
            self.now += self.each

        return call

    def samples(self, run: Callable[[], Any], count: int) -> list[float]:
        found = []
        for _ in range(count):
            before = self.now
            run()
            self.timed += 1
            found.append((self.now - before) * (1.5 if self.timed % 5 == 0 else 1.0))
        return found

    def capture(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], Any], str]:
        return lambda: [call() for call in calls], "graph" if self.graphs else "stream"


@pytest.mark.parametrize(("each", "size"), [(2e-6, 1e4), (5e-6, 2e6), (1e-4, 3e7), (0.05, 4e9)])
def test_timing(each: float, size: float) -> None:
    clock = Clock(each)
    found = timing.time_calls(clock, clock.make, size)
    assert found.seconds == pytest.approx(each) and found.p10 == pytest.approx(each)
    assert found.p10 <= found.seconds <= found.p90 <= each * 1.5 * (1 + 1e-9)
    assert 2 <= found.calls <= timing.MOST_CALLS and found.how == "graph"
    assert clock.made == found.calls + 1  # every call of a graph on data of its own
    assert found.cold == (found.calls * size >= 2 * clock.l2)
    assert found.cold == (size > 1e5)  # what is too small for the most calls is said to be warm


def test_how_often() -> None:
    assert timing.calls_for(1e-6, 1e9, 5e7) == timing.MOST_CALLS
    assert timing.calls_for(1.0, 1e9, 5e7) == 2
    assert timing.calls_for(1e-3, 1e6, 5e7) == 100  # twice L2 over
    assert timing.replays_for(1e-3) == timing.REPLAYS and timing.replays_for(10.0) == timing.LEAST_REPLAYS
    samples = [3.0, 1.0, 2.0, 5.0, 4.0]
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert timing.quantile(samples, share) == pytest.approx(np.quantile(samples, share))
    assert timing.quantile([7.0], 0.9) == 7.0


def test_slices_of_the_pool() -> None:
    position, starts = 0, []
    for _ in range(5):
        start, position = device.place(position, 1000, 4096)
        starts.append(start)
        assert start % device.ALIGN == 0 and start + 1000 <= 4096
    assert starts == [0, 1024, 2048, 3072, 0]
    with pytest.raises(device.TooLarge):
        device.place(0, 5000, 4096)


def test_the_grid_is_sound(tmp_path: Path) -> None:
    """Every op has the columns of its kind, a price, and neighbours enough for a fit."""
    ops = grid.rows() + grid.collectives(8)
    names = {"gemm", "expert_gemm", "attention_decode", "mla_decode", "attention_prefill", "norm", "embedding", "gate"}
    assert names | {"head", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"} == {row["kind"] for row in ops}
    assert {row["kind"] for row in grid.rows()} == set(operations.KINDS)
    assert [row["dtype"] for row in grid.rows()] == sorted(
        (r["dtype"] for r in grid.rows()), key=["bf16", "fp16", "fp8"].index
    )
    rows = read_rows(_write(tmp_path / "rows.csv", ops, np.ones(len(ops))))
    assert len(rows.seconds) == len(ops) == len({tuple(row.items()) for row in ops})
    assert all(grid.bytes_of(row) <= grid.MOST_BYTES for row in grid.rows())
    assert grid.thinned(ops, 1) == ops and len(grid.thinned(ops, 10)) == math.ceil(len(ops) / 10)
    assert grid.collectives(1) == [] and {row["ranks"] for row in grid.collectives(5)} == {2, 4}


@pytest.mark.parametrize("skew", ["balanced", 1.2])
@pytest.mark.parametrize(("tokens", "ep"), [(1, 1), (1, 32), (64, 8), (500, 4), (1024, 1)])
def test_routing_gives_the_loads_that_are_priced(tokens: int, ep: int, skew: Any) -> None:
    row = {"tokens": tokens, "top_k": 8, "experts": 256, "ep": ep, "skew": skew}
    on_rank = grid.local_loads(row)
    ids = grid.routing(on_rank, tokens, 8, 256)
    assert ids.shape == (tokens, 8) and ids.min() >= 0 and ids.max() <= max(255, len(on_rank))
    assert (np.bincount(ids[ids < len(on_rank)], minlength=len(on_rank)) == on_rank).all()
    for chosen in ids:
        mine = chosen[chosen < len(on_rank)]
        assert len(set(mine.tolist())) == len(mine)
    args = (np.array([float(value)]) for value in (tokens, 8, 256, ep))
    if skew == "balanced":
        priced = loads.balanced(*args)
        assert (on_rank.sum(), (on_rank > 0).sum()) == (priced.rows[0], priced.active[0])
    else:
        priced = loads.power_law(*args, np.array([skew]), "spread")
        assert on_rank.sum() == pytest.approx(priced.rows[0], rel=0.25, abs=1.5)


class Fake(Clock):
    """Stands for `Cuda`, without torch."""

    properties = SimpleNamespace(total_memory=80e9, name="Fake H100")

    def __init__(self, torch: Any, index: int) -> None:
        super().__init__(2e-4)
        self.filled: list[str] = []

    def fill(self, name: str) -> None:
        self.filled.append(name)

    def release(self) -> None:
        pass

    def clock(self) -> int:
        return 1980

    def facts(self) -> dict[str, str]:
        return {name: value for name, value in FACTS.items() if name not in ("gpu", "date")} | {"device": "Fake\nH100"}

    def launch_seconds(self) -> dict[str, float]:
        return {"graph": 1.3e-6, "stream": 4e-6}

    def copy_bandwidth(self) -> float:
        return 3e12


def test_a_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(fake: Fake, row: dict[str, Any], plain: bool) -> tuple[Callable[[], Callable[[], None]], str]:
        if row["kind"] == "norm" and row["tokens"] == 1:
            raise RuntimeError("CUDA out of memory.\nMore of it")
        return fake.make, "stub" + " plain" * plain

    monkeypatch.setattr(measuring, "require", lambda: None)
    monkeypatch.setattr(measuring, "Cuda", Fake)
    monkeypatch.setattr(operations, "build", build)
    path = tmp_path / "rows.csv"
    assert main(["--gpu-name", GPU, "-o", str(path), "--only", "norm", "gate", "--plain"]) == 0
    err = capsys.readouterr().err
    assert "left out 3: norm bf16: RuntimeError: CUDA out of memory." in err and "warning" not in err
    rows = read_rows(path)
    assert len(rows.seconds) == len(grid.rows(("norm", "gate"))) - 3
    np.testing.assert_allclose(rows.seconds, 2e-4)
    assert set(rows.software) == {"stub plain"}
    assert rows.facts["device"] == "Fake H100" and rows.facts["empty kernel"] == "1.30 us (graph), 4.00 us (stream)"
    assert rows.facts["copy bandwidth"].startswith("3000 GB/s") and rows.facts["gpu"] == GPU
    assert list(tmp_path.iterdir()) == [path]  # no unfinished file is left
    assert rows.ops.header == ["measured_us" if name == "us" else name for name in COLUMNS]
    assert cli.main(["costs", "--gpu", GPU, str(path)]) == 0
    assert main(["--gpu-name", "b200-sxm", "-o", str(path), "--only", "norm", "--every", "4"]) == 0
    assert "is --gpu-name right?" in capsys.readouterr().err
    assert main(["--gpu-name", GPU, "-o", str(path), "--only", "all_reduce"]) == 1
    assert "collectives need several GPUs" in capsys.readouterr().err


def test_an_unanswering_gpu_leaves_the_rows_so_far(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken(Fake):
        def release(self) -> None:
            if self.timed > 100:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measuring, "require", lambda: None)
    monkeypatch.setattr(measuring, "Cuda", Broken)
    monkeypatch.setattr(operations, "build", lambda fake, row, plain: (fake.make, "stub"))
    path = tmp_path / "rows.csv"
    assert main(["--gpu-name", GPU, "-o", str(path), "--only", "norm"]) == 1
    assert not path.exists()
    assert 0 < len(read_rows(tmp_path / "rows.csv.part").seconds) < len(grid.rows(("norm",)))


def test_torchrun_says_who_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert collectives.world() == (0, 1, 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert collectives.world() == (3, 8, 3)
    assert [collectives.calls_of(size) for size in (1024, 1 << 24, 1 << 29)] == [100, 20, 5]


def test_ranks_that_were_not_measured(fitted: tuple[Path, Path]) -> None:
    """What rows of 2 ranks cannot tell is not left to where a search began."""
    fit = load_fit(fitted[1])
    assert fit.all_reduce is not None
    constants = fit.all_reduce.constants.model_dump()
    flat = {name: value for name, value in constants.items() if name != "simple_bandwidth"}
    flat |= {f"simple_bandwidth.{place}": value for place, value in enumerate(constants["simple_bandwidth"])}
    found = settled(flat, np.array([2.0]))
    assert found["simple_bandwidth.0"] == found["simple_bandwidth.1"] == found["simple_bandwidth.2"]
    assert found["ll_latency_power"] == 0
    args = "all_reduce", np.array([2.0, 2.0]), np.array([1e3, 1e8])
    again = {name: value for name, value in found.items() if "." not in name}
    again["simple_bandwidth"] = tuple(found[f"simple_bandwidth.{place}"] for place in range(3))
    before, after = (transfer.nccl(SimpleNamespace(**c), *args) for c in (constants, again))
    np.testing.assert_allclose(after, before, rtol=2e-3)
    assert settled(flat, np.array([2.0, 4.0, 8.0])) == flat


class _Event:
    """An event of a stub of torch: it notes when it was recorded, in ms."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1.0

    def record(self) -> None:
        self.at = _Event.clock

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


@pytest.mark.parametrize(("fault", "how"), [(None, "graph"), ("operation not permitted when capturing", "stream")])
def test_events_and_graphs(fault: str | None, how: str) -> None:
    """`Cuda` over a stub of torch: samples leave the first run out; what cannot be captured is launched."""
    launched: list[str] = []

    @contextlib.contextmanager
    def graph(one: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        if fault:
            raise RuntimeError(fault)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        set_device=lambda index: None,
        get_device_properties=lambda index: SimpleNamespace(name="Stub", L2_cache_size=50 << 20),
        Event=_Event,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda side: contextlib.nullcontext(),
        synchronize=lambda: None,
        graph=graph,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: launched.append("graph")),
    )
    one = device.Cuda(SimpleNamespace(cuda=cuda, manual_seed=lambda seed: None))
    assert one.l2 == 50 << 20

    def run() -> None:
        _Event.clock += 2.0 if launched else 100.0  # the first run is slow, and in no sample
        launched.append("run")

    assert one.samples(run, 3) == pytest.approx([2e-3] * 3) and launched == ["run"] * 4
    launched.clear()
    replay, found = one.capture([run] * 5)
    launched.clear()
    replay()
    assert found == how and launched == (["graph"] if how == "graph" else ["run"] * 5)
    if fault:
        fault = "CUDA out of memory"
        with pytest.raises(RuntimeError, match="out of memory"):
            one.capture([run])
