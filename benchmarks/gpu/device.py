"""The GPU through torch: a pool of random numbers to read from, events to time with, graphs to capture, facts to report.

torch is imported when a device is asked for, and is no dependency of planc.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu.timing import Call

ALIGN = 512  #: elements: every tensor starts at a multiple
POOL = 0.5  #: share of the free memory that the pool takes; the rest is for outputs
_CHUNK = 1 << 27  #: elements made at once
INSTALL = (
    "on a machine with an NVIDIA GPU and its driver:\n"
    "  pip install torch          # a CUDA build; planc itself does not need it\n"
    "  python -m benchmarks.gpu --gpu-name h100-sxm -o rows.csv\n"
    "fit and check need neither: they read the rows file (docs/gpu.md)"
)


class NoGpu(Exception):
    """Why nothing, or nothing more, can be measured here, and what to do about it."""


class TooLarge(Exception):
    """An op does not fit the pool."""


def require() -> Any:
    """torch with a GPU. Raises NoGpu."""
    try:
        import torch
    except ImportError as error:
        raise NoGpu(f"measuring needs torch, which is missing here ({error})\n{INSTALL}") from None
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        message = f"torch {torch.__version__} (built for {built}) finds no GPU here: does `nvidia-smi` list one?"
        raise NoGpu(f"{message}\n{INSTALL}")
    return torch


def place(position: int, count: int, total: int) -> tuple[int, int]:
    """(start, next position) of ``count`` elements in a ring of ``total``. A tensor never wraps around."""
    if count > total:
        raise TooLarge(f"{count:,} elements, where the pool has {total:,}")
    start = position if position + count <= total else 0
    return start, start + math.ceil(count / ALIGN) * ALIGN


class Cuda:
    """One GPU. Every tensor that `take` gives is the next slice of one large pool of normally distributed random
    numbers: data that a kernel has not just read, without filling it for every op. Zeros would draw less power."""

    def __init__(self, torch: Any, index: int = 0, share: float = POOL) -> None:
        self.torch, self.index, self.share = torch, index, share
        torch.cuda.set_device(index)
        self.properties = torch.cuda.get_device_properties(index)
        self.l2 = float(getattr(self.properties, "L2_cache_size", 0) or 128 << 20)
        self.pool: Any = None
        self.position = 0
        self.graphs = True
        torch.manual_seed(0)

    def dtype(self, name: str) -> Any:
        """torch's type of planc's name."""
        torch = self.torch
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[name]

    def fill(self, name: str) -> None:
        """Make the pool one of this dtype."""
        torch, dtype = self.torch, self.dtype(name)
        if self.pool is not None and self.pool.dtype == dtype:
            return
        self.pool = None
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.index)[0]
        self.pool = torch.empty(int(free * self.share) // (1 if name == "fp8" else 2), dtype=dtype, device="cuda")
        self.position = 0
        for start in range(0, len(self.pool), _CHUNK):
            part = self.pool[start : start + _CHUNK]
            part.copy_(torch.randn(len(part), dtype=torch.float32, device="cuda"))
        torch.cuda.empty_cache()

    def take(self, *shape: int) -> Any:
        """The next tensor of the pool."""
        count = math.prod(shape)
        start, self.position = place(self.position, count, len(self.pool))
        return self.pool[start : start + count].view(shape)

    def integers(self, most: int, *shape: int) -> Any:
        """Random whole numbers below ``most``."""
        return self.torch.randint(most, shape, device="cuda")

    def samples(self, run: Call, count: int) -> list[float]:
        """Seconds of ``count`` runs between events. A run before the first event keeps the GPU busy while the next is
        launched, so that no launch is in a sample."""
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        run()
        for number, event in enumerate(events):
            event.record()
            if number < count:
                run()
        events[-1].synchronize()
        return [float(begin.elapsed_time(end)) * 1e-3 for begin, end in pairwise(events)]

    def capture(self, calls: Sequence[Call]) -> tuple[Call, str]:
        """A graph of all calls; where capturing fails, the launches themselves, whose gaps then count."""

        def stream() -> None:
            for call in calls:
                call()

        if not self.graphs:
            return stream, "stream"
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # libraries allocate their workspace of the capturing stream before the capture
            calls[0]()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        try:
            # thread_local: NCCL's watchdog queries events from a thread of its own, which must not end the capture
            with cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                stream()
        except RuntimeError as error:
            if "memory" in str(error):
                raise
            cuda.synchronize()
            return stream, "stream"
        return graph.replay, "graph"

    def release(self) -> None:
        """Give memory of the last op back. Raises where the GPU no longer answers."""
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()

    def clock(self) -> int | None:
        """MHz of the SMs now, where the driver's library says."""
        try:
            return int(self.torch.cuda.clock_rate(self.index))
        except Exception:  # without pynvml, or on a GPU that hides its clocks
            return None

    def copy_bandwidth(self) -> float:
        """Bytes per second of a copy inside device memory: read plus written."""
        part = len(self.pool) // 4
        source, target = self.pool[:part], self.torch.empty_like(self.pool[:part])
        run = lambda: target.copy_(source)  # noqa: E731
        return 2.0 * source.numel() * source.element_size() / min(self.samples(run, 10))

    def launch_seconds(self) -> dict[str, float]:
        """Seconds from one empty kernel to the next: in a graph, and launched one by one."""
        calls = [lambda: self.torch.cuda._sleep(0)] * 1000
        replay, how = self.capture(calls)
        stream = lambda: [call() for call in calls]  # noqa: E731
        found = {}
        for name, run in ((how, replay), ("stream", stream)):
            found[name] = min(self.samples(run, 10)) / len(calls)
        return found

    def facts(self) -> dict[str, str]:
        """What a reader of the rows must know of this machine."""
        torch, p = self.torch, self.properties
        found = {
            "device": p.name,
            "driver": "unknown",
            "torch": str(torch.__version__),
            "cuda": str(torch.version.cuda),
            "sms": str(p.multi_processor_count),
            "memory_bytes": str(p.total_memory),
            "l2_bytes": str(int(self.l2)),
        }
        return found | self._driver()

    def _driver(self) -> dict[str, str]:
        """Driver and clocks, of `nvidia-smi`."""
        fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        uuid = getattr(self.properties, "uuid", None)
        command += ["-i", f"GPU-{uuid}"] if uuid else ["-i", str(self.index)]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
            driver, now, most, memory, power = (cell.strip() for cell in answer.splitlines()[0].split(","))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return {}
        return {"driver": driver, "clocks": f"SM {now} idle (most {most}), memory {memory}, power limit {power}"}


Maker = Callable[[], Call]
