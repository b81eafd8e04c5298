"""What the benchmarks share: their own part of docs/benchmarks.md, and the cost of a process."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"


def write_part(text: str, path: Path = DOCUMENT) -> None:
    """Put ``text`` in place of the part of the document with the same first line, or after the last part. A part goes
    from the top, or from a line that starts with ``## ``, to the next such line."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = [part.strip() for part in re.split(r"(?m)^(?=## )", before) if part.strip()]
    titles = [part.splitlines()[0] for part in parts]
    text = text.strip()
    title = text.splitlines()[0]
    if title in titles:
        parts[titles.index(title)] = text
    else:
        parts.insert(0 if title.startswith("# ") else len(parts), text)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def machine() -> str:
    """The machine in words."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def measure(command: list[str], output: Path | None = None) -> tuple[float, float]:
    """(seconds from start to exit, peak MB of its largest process) of one process. ``output``: where what it prints goes."""
    with open(output or os.devnull, "wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def best(command: list[str], runs: int = 3) -> tuple[float, float]:
    """The fastest of some runs in seconds, and the highest peak in MB."""
    made = [measure(command) for _ in range(runs)]
    return min(s for s, _ in made), max(m for _, m in made)
