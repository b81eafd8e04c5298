"""Who evaluates candidates: this process, worker processes beside it, or the workers of a Dask cluster.

Whoever does it, outcomes are the same and come in the order asked. A worker keeps an `Evaluator` for every spec it was given;
the spec and the fits travel with every candidate, because a worker may be new, or on a machine that has none of the files.
"""

from __future__ import annotations

import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import planc
from planc.cost.book import PriceBook
from planc.diagnostics import Diagnostic, PlancError
from planc.planner.plan import for_children
from planc.search.evaluate import Evaluator, Outcome
from planc.search.explore import Evaluate
from planc.search.space import Shape
from planc.spec import Spec

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

DEATHS = 3  #: of workers in a row, without a result between them, after which a search gives up
CONNECT = 10.0  #: seconds to reach a scheduler
STAFFED = 60.0  #: seconds that a cluster may be without workers
LOOK = 5.0  #: seconds without a result after which to look whether there still are workers

Candidate = tuple[Shape, int]
Say = Callable[[str], None]


class Record(NamedTuple):
    """What a worker makes its evaluator of."""

    version: str  #: of planc: another one may predict something else
    content: bytes  #: pickled: the spec, fits by GPU
    ttft: bool


@contextmanager
def evaluating(
    spec: Spec,
    *,
    workers: int = 1,
    dask: str | None = None,
    fits: Sequence[str] = (),
    ttft: bool = False,
    say: Say | None = None,
) -> Iterator[Evaluate]:
    """A function that evaluates candidates of ``spec`` as `Evaluator` does, while the context is open.

    ``workers``: processes on this machine; ``dask``: the address of a scheduler, whose workers do it instead; ``fits``: files
    of fits, which all workers price with; ``say``: is told of workers that died or are waited for. Raises PlancError PLN431
    without Dask, PLN434 where the cluster cannot be reached or used, and PLN433 (the function) where workers keep dying.
    """
    prices = {}
    if fits:
        from planc.cost.fits import load_fit  # its models take a while to make

        prices = {fit.gpu: fit for fit in map(load_fit, fits)}
    # candidates are compared under even routing: what is known of traffic stays here
    bare = spec.model_copy(update={"traffic": None, "scenarios": {}})
    record = Record(planc.__version__, pickle.dumps((bare, prices)), ttft)
    tell: Say = say or (lambda text: None)
    evaluator = Evaluator(spec, PriceBook(prices))

    def here(asked: Sequence[Candidate], *, whole: bool = False) -> list[Outcome]:
        return [evaluator.outcome(*candidate, ttft=ttft, whole=whole) for candidate in asked]

    if dask is not None:
        with _cluster(dask, record, tell) as evaluate:
            yield evaluate
    elif workers > 1:
        with _processes(workers, record, here, tell) as evaluate:
            yield evaluate
    else:
        yield here


# --- a worker --------------------------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()


def outcome(record: Record, candidate: Candidate, whole: bool) -> Outcome:
    """What becomes of a candidate; run by a worker."""
    with _one_at_a_time:  # a worker of Dask may have threads, an evaluator's caches are for one
        return _evaluator(record.version, record.content).outcome(*candidate, ttft=record.ttft, whole=whole)


def ready(record: Record) -> None:
    """Raise where this worker cannot evaluate candidates."""
    with _one_at_a_time:
        _evaluator(record.version, record.content)


@lru_cache(maxsize=2)
def _evaluator(version: str, content: bytes) -> Evaluator:
    if version != planc.__version__:
        raise _unreachable(f"a worker has planc {planc.__version__}, this is planc {version}")
    spec, fits = pickle.loads(content)
    return Evaluator(spec, PriceBook(fits))


# --- sharing out -----------------------------------------------------------------------------------------------------


def _shared_out(
    asked: Sequence[Candidate],
    submit: Callable[[Candidate], Future[Outcome]],
    died: type[Exception],
    say: Say,
    *,
    room: int,
    renew: Callable[[], None] = lambda: None,
    idle: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Outcomes in the order asked, ``room`` candidates at a time. When a worker ``died``, what was running is submitted again
    after ``renew``; ``idle`` is called when there was no result for a while."""
    found: dict[int, Outcome] = {}
    waiting = list(range(len(asked)))[::-1]
    running: dict[Future[Outcome], int] = {}
    deaths = 0
    while waiting or running:
        try:
            while waiting and len(running) < room:
                running[submit(asked[waiting[-1]])] = waiting[-1]
                waiting.pop()
            ended = wait(running, LOOK, FIRST_COMPLETED).done
            for future in ended:
                found[running[future]] = future.result()
                del running[future]
                deaths = 0
            if not ended:
                idle()
        except died as error:
            deaths += 1 + getattr(error, "allowed_failures", 0)  # Dask has tried as often itself
            again = sorted(running.values(), reverse=True)
            if deaths >= DEATHS:
                raise _dying([asked[number] for number in reversed(again)]) from error
            say(f"a worker process died; {len(again)} candidates are evaluated again")
            for future in running:
                future.cancel()
            renew()
            running.clear()
            waiting += again
    return [found[number] for number in range(len(asked))]


def _dying(flying: Sequence[Candidate]) -> PlancError:
    """PLN433, with the candidates that were running."""
    degrees = ("dp", "pp", "ep", "tp", "expert_tp", "micro_batches")
    related = [
        f"evaluated then: {' '.join(f'{key}={getattr(shape, key)}' for key in degrees)} batch={batch}"
        for shape, batch in flying
    ]
    hint = "if memory is short, use fewer workers; else evaluate such a candidate alone with `planc estimate`"
    message = f"{DEATHS} or more worker processes died one after another, without a result between them"
    return PlancError([Diagnostic("PLN433", message, hint=hint, related=tuple(related))])


# --- processes of this machine ---------------------------------------------------------------------------------------


@contextmanager
def _processes(workers: int, record: Record, here: Evaluate, say: Say) -> Iterator[Evaluate]:
    """Evaluates by a pool of processes. It is started for the first candidates that can be shared out: what takes no longer
    than starting it is done here."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # a fork has all modules already; where the system's own libraries start threads, it may hang
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    pools: list[ProcessPoolExecutor] = []  # the one in use, if any

    def submit(whole: bool, candidate: Candidate) -> Future[Outcome]:
        if not pools:
            pools.append(ProcessPoolExecutor(workers, context))
        with for_children(), warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads, such as a progress bar's: the children need none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            return pools[0].submit(outcome, record, candidate, whole)

    def end() -> None:
        while pools:
            pool = pools.pop()
            for process in list(pool._processes.values()):
                process.kill()  # nobody waits for what they still do, which may take minutes
            pool.shutdown(cancel_futures=True)

    def evaluate(asked: Sequence[Candidate], *, whole: bool = False) -> list[Outcome]:
        if len(asked) < 2 and not pools:
            return here(asked, whole=whole)
        return _shared_out(asked, partial(submit, whole), BrokenProcessPool, say, room=workers, renew=end)

    try:
        yield evaluate
    finally:
        end()


# --- a Dask cluster --------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(address: str, record: Record, say: Say) -> Iterator[Evaluate]:
    """Evaluates by the workers of the cluster whose scheduler has this address."""
    if find_spec("distributed") is None:
        hint = "`pip install 'planc[dask]'`, or use the processes of this machine"
        raise PlancError([Diagnostic("PLN431", "a Dask cluster is reached through the package distributed", hint=hint)])
    from distributed import Client
    from distributed.scheduler import KilledWorker

    _reach(address)
    try:
        client = Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise _unreachable(f"`{address[:80]}` is no scheduler: {error}") from error
    with client:
        _staffed(client, address, say)
        for worker, answer in client.run(ready, record, on_error="return").items():
            if isinstance(answer, PlancError):
                raise answer
            if isinstance(answer, Exception) and not isinstance(answer, OSError):  # not one that has gone meanwhile
                raise _unreachable(f"worker {worker} cannot evaluate candidates: {answer}") from answer
        executor = client.get_executor(pure=False)

        def evaluate(asked: Sequence[Candidate], *, whole: bool = False) -> list[Outcome]:
            try:
                return _shared_out(
                    asked,
                    lambda candidate: executor.submit(outcome, record, candidate, whole),
                    KilledWorker,
                    say,
                    room=len(asked),  # the scheduler knows best who has room
                    idle=lambda: _staffed(client, address, say),
                )
            except (CancelledError, OSError) as error:
                raise _unreachable(f"the scheduler at `{address[:80]}` has gone") from error

        try:
            yield evaluate
        finally:
            executor.shutdown(wait=False)


def _reach(address: str) -> None:
    """Raise PLN434 unless something at the address speaks as Dask does. A client by itself waits without end for a server
    that accepts and stays silent, and complains on stderr of what is no address."""
    import asyncio

    from distributed import Security
    from distributed.comm import connect

    async def greet() -> None:
        arguments = Security().get_connection_args("client")
        comm = await asyncio.wait_for(connect(address, timeout=CONNECT, **arguments), CONNECT + 1)
        await comm.close()

    try:
        asyncio.run(greet())
    except (OSError, ValueError, TypeError, ImportError) as error:
        why = str(error) or f"no answer after {CONNECT:g} s"
        raise _unreachable(f"there is no Dask scheduler at `{address[:80]}`: {why[:200]}") from error


def _staffed(client: Any, address: str, say: Say) -> None:
    """Wait until the cluster has a worker, but not without end."""
    if client.nthreads():
        return
    say(f"the cluster at {address[:80]} has no workers; waiting up to {STAFFED:g} s for one")
    try:
        client.wait_for_workers(1, timeout=STAFFED)
    except TimeoutError as error:
        raise _unreachable(f"the cluster at `{address[:80]}` had no workers for {STAFFED:g} s") from error


def _unreachable(message: str) -> PlancError:
    hint = "name a scheduler as `tcp://HOST:PORT`, whose workers have this version of planc"
    return PlancError([Diagnostic("PLN434", message, hint=hint)])
