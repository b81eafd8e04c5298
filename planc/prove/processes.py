"""The small plan by real processes over torch.distributed (gloo): on this machine, or wherever torchrun starts them.

    torchrun --nproc-per-node 8 -m planc.prove.processes SPEC

`prove_by_processes` writes what each process is told (`planc.prove.share`) to a temporary folder, starts one launcher that
imports torch once and forks the processes, and watches: each writes the op it is in to a file before it runs it. Processes
stop by themselves when an op waits too long; should they not, they are killed and the files say where they were.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from planc.diagnostics import Diagnostic, PlancError
from planc.graph.types import range_text
from planc.prove.holdings import Held
from planc.prove.model import Weights
from planc.prove.process import FOUND, LEFT, WAITED, run_share
from planc.prove.proof import Proof, Run, sizes_of
from planc.prove.share import Record, read_share, shares
from planc.prove.shrink import Small, shrink
from planc.verify import Draft, VerifiedPlan, load_plan

START = 120.0  #: seconds that processes may take to import torch and find each other
GRACE = 1.0  #: seconds that the others get once one process has found a fault


def prove_by_processes(
    plan: VerifiedPlan | Draft,
    processes: int,
    *,
    layers: int = 1,
    tokens: int = 2,
    scale: int = 1,
    steps: int = 2,
    seed: int = 0,
    timeout: float = 60.0,
) -> Proof:
    """Run the plan on small numbers in ``processes`` processes of this machine, which share its ranks in contiguous runs,
    and compare it with the model run whole. ``timeout``: seconds that an op may wait for other processes; the other
    arguments are those of `planc.prove.prove`. Raises PlancError (PLN420) without torch.
    """
    need_torch()
    started = time.perf_counter()
    records = shares(plan, processes, layers=layers, tokens=tokens, scale=scale, steps=steps, seed=seed)
    small = shrink(plan, layers=layers, tokens=tokens, scale=scale, steps=records[0]["steps"])
    proof = merged(small, records[0], run_records(records, timeout))
    proof.seconds = time.perf_counter() - started
    return proof


def need_torch() -> None:
    """Raise PLN420 where torch, or its distributed part, is missing. Nothing is imported."""
    hint = "install torch 2.4 or newer beside planc, `pip install 'planc[prove]'`, or prove the plan in one process"
    if find_spec("torch") is None:
        raise PlancError(
            [Diagnostic("PLN420", "real processes talk through torch.distributed: there is no torch", hint=hint)]
        )
    if not hasattr(os, "fork"):
        raise PlancError(
            [Diagnostic("PLN420", "processes are forked, which this system cannot; torchrun can", hint=hint)]
        )


# --- the parent ------------------------------------------------------------------------------------------------------


def run_records(records: Sequence[Record], timeout: float) -> list[dict[str, Any]]:
    """Start a process for every record and return what each found; of one that had to be killed, where it was."""
    with tempfile.TemporaryDirectory(prefix="planc-prove-") as name:
        folder = Path(name)
        for number, record in enumerate(records):
            (folder / f"share-{number}.json").write_text(json.dumps(record), encoding="utf-8")
            (folder / f"at-{number}").write_text("start")
        loopback = [interface for _, interface in socket.if_nameindex() if interface in ("lo", "lo0")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
            # small numbers: threads would only be in each other's way
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **({"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}),
        }
        command = [sys.executable, "-m", "planc.prove.processes", "--launch", name, str(len(records)), repr(timeout)]
        with (folder / "log").open("w") as log:
            launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                _watch(launcher, folder, len(records), timeout)
            finally:
                _kill(launcher)
        return [_result(folder, number, timeout) for number in range(len(records))]


def _watch(launcher: subprocess.Popen[bytes], folder: Path, count: int, timeout: float) -> None:
    """Wait until the processes end. They are left no longer than ``GRACE`` once one has found a fault, and no longer than
    an op may wait when none of them moves."""
    begun = time.monotonic()
    moved, before, found = begun, [""] * count, 0.0
    while launcher.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        at = [(folder / f"at-{number}").read_text() for number in range(count)]
        if at != before:
            moved, before = now, at
        faults = _faults(folder, count)
        started = bool(faults) or any(one.strip() != "start" for one in at)
        if now - moved > (timeout + 10.0 if started else START):
            return
        if not found and any(fault[2] == FOUND for fault in faults):
            found = now
        if found and now - found > GRACE:
            return


def _faults(folder: Path, count: int) -> list[list[Any]]:
    """Faults that processes have reported so far."""
    files = [folder / f"result-{number}.json" for number in range(count)]
    return [fault for file in files if file.exists() for fault in json.loads(file.read_text())["faults"]]


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """End the launcher and every process that it forked: they are one session."""
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _result(folder: Path, number: int, timeout: float) -> dict[str, Any]:
    file = folder / f"result-{number}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    at = (folder / f"at-{number}").read_text().strip()
    log = (folder / "log").read_text(errors="replace").strip().splitlines()
    why = f"process {number} did not move any more and was stopped" + (f": {log[-1][:300]}" if log else "")
    return _nothing(number, at, why, LEFT)


def merged(small: Small, record: Record, results: Sequence[Mapping[str, Any]]) -> Proof:
    """What all processes found as one proof: largest errors, summed bytes against the plan's byte matrices, bytes held
    and needed against the memory table. Of faults the surest kind is kept: what ops found, else what waited, longest first."""
    draft = small.draft
    proof = Proof(
        record["name"], draft.parallelism.world_size, small.layers, record["steps"], record["seed"], sizes_of(small)
    )
    run = Run(small, Weights(draft.spec.model, record["seed"]), [Held() for _ in range(proof.ranks)], proof)
    if all(result["held"] is not None for result in results):
        parts = [result["held"] for result in results]
        shared = [item for item in parts[0] if all(item in part for part in parts)]  # needs: only after a whole step
        items = {item: np.concatenate([part[item] for part in parts]) for item in shared}
        proof.memory_equal = run.memory(items) and items.keys() >= run.planned.keys()
    for result in results:
        proof.ops += result.get("ops", 0)
        proof.tokens += result.get("tokens", 0)
        for kind, error in result["errors"].items():
            proof.errors[kind] = max(proof.errors.get(kind, 0.0), error)
    if all(result["moved"] is not None for result in results):
        graph = small.graph
        numbers = {
            graph.op_id(number, op): (number, op)
            for number, block in enumerate(graph.blocks)
            if block.collective
            for op in range(len(block))
        }
        moved: dict[tuple[int, int], np.ndarray] = {}
        for name, matrix in (row for result in results for row in result["moved"]):
            moved[numbers[name]] = moved.get(numbers[name], 0) + np.array(matrix)
        run.moved(graph, moved)
    kept = dict.fromkeys(_causes(record["process_of"], results))
    proof.faults += [fault for fault in kept if fault not in proof.faults][:20]
    return proof


def _causes(process_of: list[int], results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Faults of the surest kind that there is. What waited: first those whose missing processes do not wait themselves."""
    faults = [(result["process"], *fault) for result in results for fault in result["faults"]]
    surest = min((fault[3] for fault in faults), default=LEFT)
    at = {result["process"]: result["at"] for result in results}
    stuck = {process for process, _, _, sure, _, _ in faults if sure == WAITED}
    rows = []
    for process, op, why, sure, since, waits in faults:
        missing = [other for other in waits if at[other] != op]
        text = why
        if sure == WAITED and missing:
            places = [f"ranks {_ranks(process_of, other)} at {at[other]}" for other in missing]
            text = f"{why} for {', '.join(places)}"
        if sure == surest:
            rows.append((any(other in stuck for other in missing), since, op, text, process))
    return [(op, text) for _, _, op, text, _ in sorted(rows)]


def _ranks(process_of: list[int], process: int) -> str:
    return range_text([rank for rank, there in enumerate(process_of) if there == process])


# --- the processes ---------------------------------------------------------------------------------------------------


def _launch(folder: Path, count: int, timeout: float) -> int:
    """Import torch once, fork the processes, which find each other through a file, and speak for those that die."""
    import torch

    children: dict[int, int] = {}
    for number in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                _child(torch.distributed.FileStore(str(folder / "store"), count), folder, number, timeout)
                code = 0
            except Exception as error:  # the last word of a process
                (folder / f"error-{number}").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(code)  # no farewell between processes: some may be gone
        children[child] = number
    while children:
        child, status = os.wait()
        number = children.pop(child)
        if status:
            word = folder / f"error-{number}"
            code = os.waitstatus_to_exitcode(status)
            why = (
                word.read_text()[:500]
                if word.exists()
                else f"process {number} ended with {'signal' if code < 0 else 'status'} {abs(code)}"
            )
            at = (folder / f"at-{number}").read_text().strip()
            _write(folder, number, _nothing(number, at, why, FOUND))
    return 0


def _nothing(process: int, at: str, why: str, sure: int) -> dict[str, Any]:
    """The result of a process that has none: where it was, and why."""
    fault = [at, why, sure, 0.0, []]
    return {"process": process, "at": at, "moved": None, "held": None, "errors": {}, "faults": [fault]}


def _write(folder: Path, number: int, result: Mapping[str, Any]) -> None:
    part = folder / f"result-{number}.part"
    part.write_text(json.dumps(result), encoding="utf-8")
    part.rename(folder / f"result-{number}.json")  # whole or absent


def _child(store: Any, folder: Path, number: int, timeout: float) -> None:
    share = read_share(json.loads((folder / f"share-{number}.json").read_text(encoding="utf-8")))
    place = os.open(folder / f"at-{number}", os.O_WRONLY)

    def say(what: str) -> None:  # one write of a fixed size, so that a reader never sees half an op
        os.pwrite(place, what.encode()[:200].ljust(200), 0)

    result = run_share(share, store, say, timeout)
    _write(folder, number, result)
    stay = timeout if any(fault[2] == WAITED for fault in result["faults"]) else GRACE / 2
    _linger(store, [f"done/{other}" for other in range(len(set(share.process_of)))], f"done/{number}", stay)


def _linger(store: Any, others: list[str], own: str, seconds: float) -> None:
    """Stay until all are done, or for some seconds: whoever leaves takes the connections of the others along, who would
    report that instead of what they wait for."""
    store.set(own, "1")
    end = time.monotonic() + seconds
    while time.monotonic() < end and not store.check(others):
        time.sleep(0.02)


def _torchrun(arguments: argparse.Namespace) -> int:
    """One process of those that torchrun started. All make the same plan and take their own part; the first reports, and
    its exit status is the answer."""
    from torch import distributed

    from planc.pipeline import compile as compile_plan
    from planc.spec import load_spec

    started = time.perf_counter()
    store, process, count = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore("planc", store)
    path = Path(arguments.spec)
    plan = load_plan(path) if path.is_dir() or path.suffix == ".json" else compile_plan(load_spec(arguments.spec))
    sizes = {name: getattr(arguments, name) for name in ("layers", "tokens", "scale", "steps", "seed")}
    records = shares(plan, count, **sizes)
    result = run_share(
        read_share(records[process]), store, lambda what: store.set(f"at/{process}", what), arguments.timeout
    )
    store.set(f"result/{process}", json.dumps(result))
    if process:
        _linger(store, ["reported"], f"done/{process}", arguments.timeout + 2 * GRACE)
        return 0
    end = time.monotonic() + arguments.timeout + GRACE
    while time.monotonic() < end and not store.check([f"result/{other}" for other in range(count)]):
        time.sleep(0.05)
    results = [_stored(store, other) for other in range(count)]
    small = shrink(
        plan,
        layers=arguments.layers,
        tokens=arguments.tokens,
        scale=arguments.scale,
        steps=records[0]["steps"],
    )
    proof = merged(small, records[0], results)
    proof.seconds = time.perf_counter() - started
    sys.stdout.write(summary(proof, count))
    sys.stdout.flush()
    store.set("reported", "1")
    time.sleep(0.5)  # where this process is the store, the others must have read that
    return 0 if proof.holds else 1


def _stored(store: Any, process: int) -> dict[str, Any]:
    """What a process said, or where it was last."""
    if store.check([f"result/{process}"]):
        return dict(json.loads(store.get(f"result/{process}")))
    at = store.get(f"at/{process}").decode() if store.check([f"at/{process}"]) else "start"
    return _nothing(process, at, f"process {process} is still here, or gone", LEFT)


def summary(proof: Proof, processes: int) -> str:
    """The proof in a few lines."""
    lines = [
        f"{proof.name}: {proof.ranks} ranks in {processes} processes, {proof.steps} steps, {proof.ops} ops, "
        f"{proof.seconds:.1f} s",
        f"largest relative error {proof.max_relative_error:.1e}",
        f"bytes {'as planned' if proof.bytes_equal else 'DIFFER'}: "
        + ", ".join(f"{kind} {size}" for kind, size in sorted(proof.bytes_moved.items())),
        f"memory {'as planned' if proof.memory_equal else 'DIFFERS'}",
        *(f"FAULT {op}: {why}" for op, why in proof.faults),
        "the plan holds" if proof.holds else "the plan DOES NOT HOLD",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """What a process runs: the launcher's `--launch FOLDER COUNT TIMEOUT`, or under torchrun a spec or plan."""
    parser = argparse.ArgumentParser(
        prog="torchrun … -m planc.prove.processes", description="A small plan by real processes (docs/prove.md)."
    )
    parser.add_argument("spec", nargs="?", help="a spec, or a plan.json or its folder")
    parser.add_argument("--launch", nargs=3, help=argparse.SUPPRESS)
    for name, default in (("layers", 1), ("tokens", 2), ("scale", 1), ("steps", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that an op may wait for other processes")
    arguments = parser.parse_args(argv)
    if arguments.launch:
        folder, count, timeout = arguments.launch
        return _launch(Path(folder), int(count), float(timeout))
    if not arguments.spec or "RANK" not in os.environ:
        parser.error("name a spec, and start it with torchrun; `planc prove` starts processes on this machine")
    return _torchrun(arguments)


if __name__ == "__main__":
    sys.exit(main())
