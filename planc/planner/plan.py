"""All layers: samples are cut, units are planned in parallel, and the results become tables and a certificate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from planc.planner.apportion import apportion
from planc.planner.balance import balanced
from planc.planner.baselines import greedy
from planc.planner.layer import Problem, Sample, Tokens, Unit, UnitResult, plan_unit
from planc.routing.tokens import TokenTraffic
from planc.routing.traffic import Traffic, tokens_of_loads

TRAIN_SHARE = 0.75  #: of the tokens to optimise on; the rest judges
MOST_TOKENS = 8192  #: tokens of a layer that are looked at; of a longer recording, so many spread evenly over it
DRAWN_TOKENS = 4096  #: tokens drawn from a traffic that says only loads

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that share an EP group: ``rows``: which rows of the traffic they are, in order; one unit each, or all in one
    where ``together`` (a rule that counts experts over all layers)."""

    problem: Problem
    rows: tuple[int, ...]
    together: bool = False
    current: np.ndarray | None = None  #: int32 [rows, holders, slots] of the plan that runs now


@dataclass(frozen=True, eq=False)
class Planned:
    """What was planned: units in the order of the groups, whether Ctrl-C cut the search short, and the time it took."""

    groups: tuple[Group, ...]
    units: tuple[tuple[Group, tuple[int, ...], UnitResult], ...]
    interrupted: bool
    seconds: float


def plan_groups(
    groups: Sequence[Group],
    traffic: Traffic,
    scenarios: Sequence[Traffic],
    *,
    top_k: int,
    workers: int,
    progress: Progress | None = None,
    stop: bool = False,
) -> Planned:
    """Plan every unit of every group.

    ``top_k``: experts of a token where the traffic says only loads. ``workers`` processes share the units; their number
    changes nothing in the result. With ``stop``, Ctrl-C ends the search: units not yet planned get the best of the quick
    candidates, and the result is marked. Raises KeyboardInterrupt otherwise.
    """
    start = time.perf_counter()
    tasks: list[tuple[Problem, Unit]] = []
    owners: list[tuple[Group, tuple[int, ...]]] = []
    for group in groups:
        for rows, unit in _units(group, traffic, scenarios, top_k, len(tasks)):
            tasks.append((group.problem, unit))
            owners.append((group, rows))
    results, interrupted = _run(tasks, workers, progress, stop)
    units = tuple((group, rows, result) for (group, rows), result in zip(owners, results, strict=True))
    return Planned(tuple(groups), units, interrupted, time.perf_counter() - start)


# --- samples ---------------------------------------------------------------------------------------------------------


def whole_loads(traffic: Traffic) -> np.ndarray:
    """Load of every expert over all steps as whole numbers, float [layers, E]: tokens as they are, weights as shares of
    ten million. What is stored with a plan is then what was planned for."""
    loads = traffic.loads.sum(axis=0)
    if not (loads == np.rint(loads)).all() or loads.max() >= 2**31:
        loads = np.rint(loads * (10**7 / loads.sum(axis=1, keepdims=True)))
    return np.asarray(loads)


def _units(
    group: Group, traffic: Traffic, scenarios: Sequence[Traffic], top_k: int, first: int
) -> Iterator[tuple[tuple[int, ...], Unit]]:
    problem, rows = group.problem, list(group.rows)
    train, held = traffic.split(TRAIN_SHARE)
    judged = held or train
    every = whole_loads(traffic)[rows]
    loads = np.stack([train.loads.sum(axis=0)[rows], judged.loads.sum(axis=0)[rows]])
    sources = len(problem.fabric.sources)
    wanted = problem.objective == "link" or traffic.tokens is not None
    cuts = [cut_samples(t, top_k, sources, problem.seed) for t in (traffic, *scenarios)] if wanted else []
    units = [tuple(range(len(rows)))] if group.together else [(i,) for i in range(len(rows))]
    packed = simple = None
    if not group.together:  # all layers at once, which is much quicker than one by one
        size = len(problem.fabric.holders), problem.slots
        simple = greedy(every, *size, problem.copies)
        if problem.slots > 1 and problem.objective == "balance":
            packed = balanced(every, apportion(every, problem.copies, size[0]), *size)[0]
    for number, members in enumerate(units, first):
        samples = tuple(tuple(layer_sample(cut, rows[i]) for cut in cuts) for i in members) if cuts else ()
        at = list(members)
        current = None if group.current is None else _joined(group.current[at], problem.experts)
        unit = Unit(
            number,
            loads[:, at].reshape(2, -1),
            every[at].reshape(-1),
            samples,
            current,
            None if packed is None else packed[members[0]],
            None if simple is None else simple[members[0]],
        )
        yield tuple(rows[i] for i in members), unit


def _joined(tables: np.ndarray, experts: int) -> np.ndarray:
    """Tables of the layers of a unit as one, experts numbered layer after layer."""
    shifted = [np.where(table >= 0, table + i * experts, table) for i, table in enumerate(tables)]
    if len(shifted) == 1:
        return np.asarray(shifted[0])
    stacked = np.concatenate(shifted, axis=1)
    width = max(1, int((stacked >= 0).sum(axis=1).max()))
    return np.asarray(-np.sort(-stacked, axis=1)[:, :width])


@dataclass(frozen=True, eq=False)
class Cut:
    """Tokens of a traffic on the sources of a plan: to optimise on, and to judge by."""

    train: tuple[np.ndarray, np.ndarray]  #: topk [tokens, layers, k], source [tokens]
    held_out: tuple[np.ndarray, np.ndarray] | None


def cut_samples(traffic: Traffic, top_k: int, sources: int, seed: int) -> Cut:
    """The tokens of a traffic in two parts. Where only loads are known, tokens are drawn from them, and the part that
    judges is drawn from later steps, or anew."""
    if traffic.tokens is not None:
        source = traffic.tokens.on_sources(sources)
        kept = np.arange(len(source))
        if len(kept) > MOST_TOKENS:
            kept = np.linspace(0, len(kept) - 1, MOST_TOKENS).astype(np.int64)
        if len(kept) < 2:
            return Cut((traffic.tokens.topk[kept], source[kept]), None)
        end = max(1, min(len(kept) - 1, round(len(kept) * TRAIN_SHARE)))
        one, two = kept[:end], kept[end:]
        return Cut((traffic.tokens.topk[one], source[one]), (traffic.tokens.topk[two], source[two]))
    train, held = traffic.split(TRAIN_SHARE)
    number = round(DRAWN_TOKENS * TRAIN_SHARE)
    first = tokens_of_loads(train, tokens=number, top_k=top_k, sources=sources, seed=seed)
    second = tokens_of_loads(held or train, tokens=DRAWN_TOKENS - number, top_k=top_k, sources=sources, seed=seed + 1)
    return Cut(_arrays(first, sources), _arrays(second, sources))


def _arrays(tokens: TokenTraffic, sources: int) -> tuple[np.ndarray, np.ndarray]:
    return tokens.topk, tokens.on_sources(sources)


def layer_sample(cut: Cut, row: int) -> Sample:
    """One layer's tokens of a cut."""
    train = Tokens(np.ascontiguousarray(cut.train[0][:, row]), cut.train[1])
    held = None if cut.held_out is None else Tokens(np.ascontiguousarray(cut.held_out[0][:, row]), cut.held_out[1])
    return Sample(train, held)


# --- running ---------------------------------------------------------------------------------------------------------


def _run(
    tasks: list[tuple[Problem, Unit]], workers: int, progress: Progress | None, stop: bool
) -> tuple[list[UnitResult], bool]:
    """Results of all tasks in order; True when Ctrl-C ended the search."""
    results: dict[int, UnitResult] = {}
    interrupted = False
    try:
        searched = any(unit.samples for _, unit in tasks)  # else a layer takes less than starting a process does
        many = workers > 1 and len(tasks) > 1 and searched
        for number, result in _parallel(tasks, workers) if many else _in_turn(tasks):
            results[number] = result
            if progress is not None:
                progress(len(results), len(tasks))
    except KeyboardInterrupt:
        if not stop:
            raise
        interrupted = True
        for number, (problem, unit) in enumerate(tasks):
            if number not in results:
                results[number] = plan_unit(problem, unit, search=False)
    return [results[number] for number in range(len(tasks))], interrupted


def _in_turn(tasks: list[tuple[Problem, Unit]]) -> Iterator[tuple[int, UnitResult]]:
    for number, task in enumerate(tasks):
        yield number, plan_unit(*task)


def _parallel(tasks: list[tuple[Problem, Unit]], workers: int) -> Iterator[tuple[int, UnitResult]]:
    """Results as they come. Problems go to each process once; a unit is sent when there is room for it."""
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

    problems: list[Problem] = list({id(problem): problem for problem, _ in tasks}.values())
    place = {id(problem): i for i, problem in enumerate(problems)}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (problems,))
    waiting = list(enumerate(tasks))[::-1]
    running: dict[Future[UnitResult], int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                number, (problem, unit) = waiting.pop()
                with for_children():
                    running[pool.submit(_work, place[id(problem)], unit)] = number
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def for_children() -> Iterator[None]:
    """What processes started inside are to have: SIGINT blocked, because Ctrl-C is the parent's to handle, and one thread
    each for linear algebra, because there is a process for every core."""
    import signal

    kept = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    masked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masked else set()
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


_problems: list[Problem] = []


def _start_worker(problems: list[Problem]) -> None:
    _problems[:] = problems


def _work(problem: int, unit: Unit) -> UnitResult:
    return plan_unit(_problems[problem], unit)


def units_of(planned: Planned) -> Iterable[tuple[Group, int, int, UnitResult]]:
    """(group, row of the traffic, layer inside its unit, result) of every layer, by row."""
    rows = [
        (row, group, inside, result) for group, members, result in planned.units for inside, row in enumerate(members)
    ]
    return [(group, row, inside, result) for row, group, inside, result in sorted(rows, key=lambda r: r[0])]
