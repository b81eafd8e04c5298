"""Programs from a package registry that only tests need, each in a folder of its own under build/."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from small_specs import ROOT


def installed(name: str, versions: Iterable[str], pip_arguments: Callable[[Path], list[str]]) -> Path:
    """A folder with what ``versions`` says, made on first use and kept. ``pip_arguments`` are those that install
    into the folder it is given, which it may prepare. Where it cannot be installed the test is skipped; in CI it fails."""
    key = hashlib.sha256("\n".join((sys.version, *versions)).encode()).hexdigest()[:12]
    home = ROOT / "build" / f"{name}-{key}"
    whole = home / "whole"
    home.parent.mkdir(exist_ok=True)
    with (home.parent / f"{name}-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side make it once
        if not whole.exists():
            shutil.rmtree(home, ignore_errors=True)
            pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
            only = ("--retries=1", "--no-deps", "--no-compile", "--only-binary=:all:", "--no-cache-dir")
            done = subprocess.run(
                [*pip, *pip_arguments(home), "-q", *only], capture_output=True, text=True, check=False
            )
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                reason = f"{name} cannot be installed: {' '.join(errors) or done.stderr[-500:]}"
                if os.environ.get("CI"):
                    pytest.fail(reason)
                pytest.skip(reason)
            whole.touch()
    return home
