"""Launch scripts run with a stand-in for the engine, which tells what it was started with."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Started(NamedTuple):
    """What became of a script: its status and messages, and what the engine was given, nothing if it did not start."""

    status: int
    errors: str
    words: list[str]
    variables: dict[str, str]
    folder: str


def start(script: Path, program: str, *arguments: str, check: bool = True, **variables: str) -> Started:
    """Run a script in the folder above its own, with a ``program`` in the path that only tells how it was called. With
    ``check`` a script that fails raises CalledProcessError."""
    bash = shutil.which("bash")
    assert bash, "the script is for bash, which this machine lacks"
    here = script.parent.parent
    told, fake = here / "told", here / "bin" / program
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        f'#!/bin/sh\nprintf "%s\\0" "$@" > "{told}.words"\nenv -0 > "{told}.variables"\npwd > "{told}.folder"\n'
    )
    fake.chmod(0o755)
    kinds = ("words", "variables", "folder")
    for kind in kinds:
        Path(f"{told}.{kind}").unlink(missing_ok=True)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}"} | variables
    command = [bash, str(script.relative_to(here)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, check=check)
    words, known, folder = (path.read_text() if (path := Path(f"{told}.{kind}")).exists() else "" for kind in kinds)
    pairs = (line.partition("=") for line in known.split("\0") if line)
    return Started(done.returncode, done.stderr, words.split("\0")[:-1], {k: v for k, _, v in pairs}, folder.strip())


def parsed(words: Sequence[str], options: Mapping[str, Any], *positional: str) -> argparse.Namespace:
    """The words by ``options``: flag -> a type, a list of choices, or None for a switch. Any other word is a failure."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in positional:
        parser.add_argument(name)
    for flag, kind in options.items():
        how = {"action": "store_true"} if kind is None else {"choices" if isinstance(kind, list) else "type": kind}
        parser.add_argument(flag, **how)
    found, unknown = parser.parse_known_args(list(words))
    assert not unknown, unknown
    return found
