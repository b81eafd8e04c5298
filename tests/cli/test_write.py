"""Writing a plan: whole or not at all, in no other place, and never at the cost of what was there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import planc
from planc import cli, pipeline
from planc.diagnostics import CODES, PlancError
from planc.files import write_whole
from planc.verify import VerifiedPlan, load_plan

SPEC = """name: small
model: {base: moe-4l, layers: 2, hidden: 64, attention: {heads: 8, head_dim: 8}, moe: {experts: 8, intermediate: 32}}
cluster: h100-sxm-1x8
workload: {batch: 64, isl: 16}
"""
FIGURES = ["simplified_moe_dag"]
FILES = [
    "memory.svg",
    "timeline.svg",
    "simplified_moe_dag.svg",
    "simplified_moe_dag.dot",
    "deployment_plan.md",
    "deployment_plan.html",
    "plan.json",
]


@pytest.fixture(scope="module")
def plans() -> tuple[VerifiedPlan, VerifiedPlan]:
    """Two plans whose files differ."""
    first, second = (planc.compile(planc.parse_spec(SPEC.replace("64, isl", f"{batch}, isl"))) for batch in (64, 128))
    return first, second


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refuse(plan: VerifiedPlan, folder: object) -> str:
    """Write, which must fail with PLN017; its message."""
    with pytest.raises(PlancError) as error:
        pipeline.write(plan, str(folder), FIGURES)
    assert [d.code for d in error.value.diagnostics] == ["PLN017"]
    return error.value.diagnostics[0].message


def test_what_is_written(plans: tuple[VerifiedPlan, VerifiedPlan], tmp_path: Path) -> None:
    written = pipeline.write(plans[0], tmp_path / "a" / "b", FIGURES)
    assert sorted(p.name for p in written) == sorted(FILES) == sorted(content(tmp_path / "a" / "b"))
    assert load_plan(tmp_path / "a" / "b") == plans[0]
    first = content(tmp_path / "a")
    pipeline.write(plans[0], tmp_path / "a" / "b", FIGURES)
    assert content(tmp_path / "a") == first


@pytest.mark.parametrize(
    "folder", ["file", "file/below", "file/../x", "/proc/planc", "/proc/self/status", "/sys/planc", "x" * 300, "loop/a"]
)
def test_folders_that_cannot_be_written(folder: str, plans: tuple[VerifiedPlan, VerifiedPlan], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    refuse(plans[0], tmp_path / folder)
    assert content(tmp_path) == {"file": b"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("number", range(1, len(FILES) + 1))
def test_disk_full_at_the_nth_file(
    number: int, plans: tuple[VerifiedPlan, VerifiedPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.write(plans[0], tmp_path, FIGURES)
    (tmp_path / "mine.txt").write_text("mine")
    before = content(tmp_path)
    real, calls = Path.write_bytes, iter(range(1, 100))

    def write_bytes(path: Path, data: bytes) -> int:
        if next(calls) == number:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert "No space left on device" in refuse(plans[1], tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("number", [0, 2, len(FILES) - 1])
def test_a_build_that_ends_half_way(
    number: int,
    error: type[BaseException],
    plans: tuple[VerifiedPlan, VerifiedPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline.write(plans[0], tmp_path, FIGURES)
    before = content(tmp_path)
    real = pipeline.outputs

    def outputs(*arguments: Any) -> Iterator[tuple[str, str]]:
        for n, item in enumerate(real(*arguments)):
            if n == number:
                raise error
            yield item

    monkeypatch.setattr(pipeline, "outputs", outputs)
    with pytest.raises(error):
        pipeline.write(plans[1], tmp_path, FIGURES)
    assert content(tmp_path) == before


SLOW = """
import sys, time
from planc import cli, pipeline
real = pipeline.outputs
def outputs(*arguments):
    for number, item in enumerate(real(*arguments)):
        yield item
        if number == 2:
            print("half", flush=True)
            time.sleep(60)
pipeline.outputs = outputs
sys.exit(cli.main(["build", "spec.yaml", "-o", "here", "--figures", "simplified", "--set", "workload.batch=128"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_build_that_is_interrupted(number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    assert cli.main(["build", "spec.yaml", "-o", "here", "--figures", "simplified"]) == 0
    before = content(Path("here"))
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (status, False)
    whole = {name: data for name, data in content(Path("here")).items() if not name.startswith(".planc-")}
    assert whole == before
    left = [p for p in Path("here").iterdir() if p.name.startswith(".planc-")]
    assert len(left) == (0 if number == signal.SIGINT else 1)
    assert cli.main(["verify", "here"]) == 0  # what was killed half way is ignored
    assert cli.main(["build", "spec.yaml", "-o", "here", "--figures", "simplified"]) == 0
    assert cli.main(["verify", "here"]) == 0


def test_a_real_full_disk(plans: tuple[VerifiedPlan, VerifiedPlan], tmp_path: Path) -> None:
    """A tmpfs of 64 kB where this user may mount one; else a file size limit, which fails the same way."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "planc", disk], capture_output=True, check=False
        ).returncode
        == 0
    )
    try:
        if mounted:
            assert "No space left on device" in refuse(plans[0], disk)
        else:
            code = f"""
import resource, signal, sys
from planc import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(cli.main(["build", {str(tmp_path / "spec.yaml")!r}, "-o", {str(disk)!r}, "--figures", "none"]))
"""
            (tmp_path / "spec.yaml").write_text(SPEC)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            assert (done.returncode, "error[PLN017]" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
        assert content(disk) == {}
        assert list(disk.iterdir()) == []
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_other_files_are_left_alone(plans: tuple[VerifiedPlan, VerifiedPlan], tmp_path: Path) -> None:
    mine = {
        "notes.txt": b"1",
        "sub/plan.json": b"2",
        "detailed_expert_dag.svg.bak": b"3",
        ".hidden": b"4",
        "plan.json~": b"5",
    }
    for name, data in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    pipeline.write(plans[0], tmp_path, pipeline.FIGURES)
    all_figures = content(tmp_path).keys()
    pipeline.write(plans[1], tmp_path, FIGURES)  # figures of the earlier build that this one does not draw go
    after = content(tmp_path)
    assert mine.items() <= after.items()
    assert after.keys() == {*mine, *FILES}
    assert all_figures > after.keys()


NAMES = {
    "..": "out/_",
    ".": "out/_",
    "...": "out/_",
    "a/b": "out/a_b",
    "../up": "out/.._up",
    "/etc/x": "out/_etc_x",
    "a/../../b": "out/a_.._.._b",
    "~": "out/~",
    "$HOME": "out/$HOME",
    "-o": "out/-o",
    "größe 🚀": "out/größe 🚀",
    "a%2e%2e|b;c&d": "out/a%2e%2e|b;c&d",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_inside_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "deep" / "work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    Path("spec.yaml").write_text(SPEC.replace("name: small", f"name: '{name}'"), encoding="utf-8")
    assert cli.main(["build", "spec.yaml", "--figures", "none"]) == 0
    written = {str(p.parent.relative_to(work)) for p in tmp_path.rglob("plan.json")}
    assert written == {NAMES[name]}
    assert load_plan(work / NAMES[name]).spec.name == name


def test_a_name_too_long_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC.replace("name: small", f"name: {'🚀' * 100}"), encoding="utf-8")
    assert cli.main(["build", "spec.yaml", "--figures", "none"]) == 1
    assert "PLN017" in capsys.readouterr().err
    assert content(tmp_path).keys() == {"spec.yaml"}


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b', "a'b", "a\\b", "`a`", "a\nb", "a\x1b[2J"])
def test_names_that_would_need_escaping_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC.replace("name: small", f"name: {json.dumps(name)}"))
    assert cli.main(["build", "spec.yaml"]) == 1
    assert not Path("out").exists()


def test_a_refused_spec_leaves_the_earlier_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    build = ["build", "spec.yaml", "-o", "here", "--figures", "none"]
    assert cli.main(build) == 0
    before = content(tmp_path)
    for change in ("workload.batch=0", "parallelism.tp=3", "cluster.gpu.memory=1 kB", "model=no-such"):
        assert cli.main([*build, "--set", change]) == 1
    assert content(tmp_path) == before


def test_one_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("starter.yaml").write_text("mine")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["init", "-o", "starter.yaml"]) == 1
    assert content(tmp_path) == {"starter.yaml": b"mine"}


def test_builds_at_once_in_one_folder_leave_a_whole_plan(tmp_path: Path) -> None:
    """None removes what another is still writing, and what is there at the end is one build's plan."""
    command = [sys.executable, "-m", "planc", "build", "moe-4l-16gpu-baseline", "-o", str(tmp_path / "here")]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    said = [(build.communicate(timeout=120)[0], build.returncode) for build in builds]
    assert [status for _, status in said] == [0, 0, 0], said
    assert cli.main(["verify", str(tmp_path / "here")]) == 0
    assert not list((tmp_path / "here").glob(".planc-*"))


def test_what_a_killed_build_left_goes_with_the_next_and_a_running_one_s_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = tmp_path / f".planc-{ended.pid}-abcd1234", tmp_path / f".planc-{os.getppid()}-abcd1234"
    elsewhere, mine = tmp_path / f".planc-{ended.pid}-locked01", tmp_path / ".planc-notes-2024"
    for folder in (left, running, elsewhere, mine):
        folder.mkdir()
    locks = [os.open(folder, os.O_RDONLY) for folder in (running, elsewhere)]  # whatever their numbers say here
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert cli.main(["build", "moe-4l-16gpu-baseline", "-o", str(tmp_path), "--figures", "none"]) == 0
    for lock in locks:
        os.close(lock)
    assert not left.exists() and running.exists() and elsewhere.exists() and mine.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    slow = (
        "import sys, time, planc.files as f; from pathlib import Path; real = Path.write_bytes\n"
        "Path.write_bytes = lambda self, data: (real(self, data), time.sleep(60))\n"
        "from planc.cli import main; sys.exit(main())"
    )
    words = ["build", "moe-4l-16gpu-baseline", "-o", str(tmp_path), "--figures", "none"]
    with subprocess.Popen([sys.executable, "-c", slow, *words], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob(".planc-*/new/*")):
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number and not list(tmp_path.iterdir())


def test_signals_that_others_handle_stay_theirs(tmp_path: Path) -> None:
    """Under nohup a build goes on, and an application that uses the library is told itself."""
    heard: list[int] = []
    before = (
        signal.signal(signal.SIGTERM, lambda number, _: heard.append(number)),
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )

    def made() -> Iterator[tuple[str, bytes]]:
        yield "a", b"1"
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        yield "b", b"2"

    try:
        write_whole(tmp_path, made(), ())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert heard == [signal.SIGTERM] and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_that_people_edit_is_not_written_over(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert cli.main(["init", "-o", str(mine)]) == 0
    mine.write_text(mine.read_text() + "# mine\n")
    assert cli.main(["init", "-o", str(mine)]) == 1
    assert mine.read_text().endswith("# mine\n")


def test_a_picture_has_the_type_that_its_name_says(tmp_path: Path) -> None:
    for name, start in (("a.dot", "digraph"), ("a.svg", "<svg"), ("a", "<svg")):
        assert cli.main(["show", "moe-4l-16gpu-baseline", "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text().startswith(start)


def test_codes_are_listed_and_topology_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "codes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CODES)
    assert cli.main(["show", "moe-4l-16gpu-baseline", "--topology"]) == 0
    assert "nic_up" in capsys.readouterr().out
