"""Seconds and peak memory of `planc export`: every target for the reference, all of them together, and Chakra traces for 256 GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from planc.export import ALL, TARGETS

REFERENCE, LARGE = "moe-61l-ep64-dp2", "deepseek-v3-ep256"


def measured(spec: str, target: str) -> tuple[float, float, int]:
    """(seconds, peak MB, exit status) of an export in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "planc", "export", spec, "--to", target, "-o", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return time.perf_counter() - begin, usage.ru_maxrss / 1024, process.returncode


if __name__ == "__main__":
    for spec, target in [*((REFERENCE, name) for name in [*TARGETS, ALL]), (LARGE, "chakra")]:
        seconds, memory, status = measured(spec, target)
        print(f"{spec} {target}: {seconds:.2f} s, {memory:.0f} MB" + (f", exit status {status}" if status else ""))
