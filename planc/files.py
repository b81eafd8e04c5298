"""Files written whole or not at all: to a temporary folder first, moved when all of them are there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from planc.diagnostics import Diagnostic, PlancError


def write_whole(
    folder: str | os.PathLike[str], files: Iterable[tuple[str, bytes]], before: Iterable[str]
) -> list[Path]:
    """Write ``files`` (name, content) into ``folder``; those of ``before`` that are not among them are removed. A name may
    have folders in it, separated by `/`; a script, which begins with `#!`, can be executed.

    All files are written to a temporary folder first and moved when they are whole, so an interrupted or failed run
    leaves earlier output as it was.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with staging_in(target) as staging:
            names = []
            for name, content in files:
                path = staging / "new" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                if content.startswith(b"#!"):
                    path.chmod(path.stat().st_mode | 0o111)
                names.append(name)
            _exchange(staging, target, names, [name for name in before if name not in set(names)])
        sweep(target)
    except OSError as error:
        message = f"cannot write to {target}: {error.strerror or error}"
        hint = "choose another folder with -o, or free some space; earlier output is as it was"
        raise PlancError([Diagnostic("PLN017", message, hint=hint)]) from None
    return [target / name for name in names]


@contextmanager
def staging_in(folder: Path) -> Iterator[Path]:
    """A temporary folder inside ``folder`` that is gone afterwards, also when the process is told to end. It is locked, so
    that `sweep` of another process knows it is in use."""
    with _ended_in_order():
        staging = Path(tempfile.mkdtemp(prefix=f".planc-{os.getpid()}-", dir=folder))
        lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield staging
        finally:
            os.close(lock)
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP leave through the `finally` blocks, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one would break off the cleaning up
        raise SystemExit(128 + number)

    told = (signal.SIGTERM, signal.SIGHUP)
    before = [
        number for number in told if signal.getsignal(number) is signal.SIG_DFL
    ]  # what others handle stays theirs
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


def sweep(target: Path) -> None:
    """Remove what builds that were killed left in the folder; those of builds still running, here or in another container, are
    not touched, nor what only has a similar name."""
    for left_over in target.glob(".planc-*-*"):
        name = re.fullmatch(r"\.planc-[1-9]\d*-[a-z0-9_]{8}", left_over.name)
        if name is not None and not _locked(left_over):
            shutil.rmtree(left_over, ignore_errors=True)


def _locked(folder: Path) -> bool:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _exchange(staging: Path, target: Path, names: list[str], stale: list[str]) -> None:
    """Move the new files in and the stale ones out; whatever stops it half way, the old files are put back."""
    old = staging / "old"
    old.mkdir()
    aside: list[str] = []
    placed: list[str] = []
    try:
        for name in (*names, *stale):
            if (target / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
            if os.path.lexists(target / name):
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                _keep(target / name, old / name)
                aside.append(name)
        for name in names:
            placed.append(name)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / "new" / name, target / name)
        for name in stale:
            (target / name).unlink(missing_ok=True)
    except BaseException:
        for name in set(placed) - set(aside):
            (target / name).unlink(missing_ok=True)
        for name in aside:
            os.replace(old / name, target / name)
        raise


def _keep(path: Path, copy: Path) -> None:
    """A second name for the file, or a copy where the file system has no hard links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, copy)
