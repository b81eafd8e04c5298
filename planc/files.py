"""Files written whole or not at all: to a temporary folder first, moved when all of them are there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
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
        with tempfile.TemporaryDirectory(prefix=f".planc-{os.getpid()}-", dir=target) as staging:
            names = []
            for name, content in files:
                path = Path(staging) / "new" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                if content.startswith(b"#!"):
                    path.chmod(path.stat().st_mode | 0o111)
                names.append(name)
            _exchange(Path(staging), target, names, [name for name in before if name not in set(names)])
        sweep(target)
    except OSError as error:
        message = f"cannot write to {target}: {error.strerror or error}"
        hint = "choose another folder with -o, or free some space; earlier output is as it was"
        raise PlancError([Diagnostic("PLN017", message, hint=hint)]) from None
    return [target / name for name in names]


def sweep(target: Path) -> None:
    """Remove what builds that were killed left in the folder; those of builds still running are not touched."""
    for left_over in target.glob(".planc-*-*"):
        owner = left_over.name.split("-")[1]
        try:
            os.kill(int(owner), 0)
        except (ValueError, ProcessLookupError):
            shutil.rmtree(left_over, ignore_errors=True)
        except OSError:
            continue


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
