"""Coverage-guided fuzzing of planc's readers with atheris (`make fuzz`): anything but an answer or a PlancError, within 5
seconds of CPU and 1 GB of memory, is kept in build/fuzz. A run goes on after a crash, and keeps one per place in the code.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
MOST_SECONDS = 5
MOST_BYTES = 2**30

NUMBERS = (0, 1, 2, 3, 7, 8, 64, -1, 0.5, 1e-9, 1e300, 2**31, 2**63, 10**18, 10**30, True, None)
NUMBERS += (float("nan"), float("inf"), -0.0)
TEXTS = ("", "auto", "none", "0", "a.b", "ü×\u2028", "\ud800", "x" * 200, "1 GB", "1e-300 GB", "0 B/s", "999999 EB")
TEXTS += ("0-3", "0-3999999", "0x3999999", "[m, 64] bf16 R", "[] fp8 P", "sched.yaml", "../specs", "/dev/null")


class TooSlow(BaseException):
    """Not an Exception, so that nothing in planc takes it for a fault of the input."""


def places(tree: Any) -> list[tuple[Any, ...]]:
    """Paths of every value in a tree of dicts and lists, its own first; not all, where aliases make them many."""
    return list(itertools.islice(_places(tree, ()), 3000))


def _places(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in parts:
        yield from _places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def descent(tree: Any, rng: random.Random) -> tuple[Any, ...]:
    """A path found by choosing a key on every level, so that short sections are chosen as often as long ones."""
    path: tuple[Any, ...] = ()
    while isinstance(tree, (dict, list)) and tree and (not path or rng.random() < 0.85):
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        path, tree = (*path, key), tree[key]
    return path


def edit(tree: Any, donors: list[Any], rng: random.Random) -> Any:
    """One change that leaves the tree near valid: a value replaced, moved, dropped or doubled, or a key renamed."""
    paths = places(tree)[1:]
    if not paths:
        return copy.deepcopy(rng.choice(donors))
    path = rng.choice(paths) if rng.random() < 0.5 else descent(tree, rng)
    parent, key = at(tree, path[:-1]), path[-1]
    old = parent[key]
    donor = rng.choice([*donors, tree])
    match rng.randrange(10):
        case 0:
            parent[key] = rng.choice(NUMBERS)
        case 1:
            parent[key] = rng.choice(TEXTS)
        case 2 if isinstance(old, (int, float)) and abs(old) < 10**30:  # which NaN is not
            parent[key] = rng.choice((old + 1, old - 1, old * 2, old // 2, -old, old * 1000))
        case 3:
            del parent[key]
        case 4 if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(old))
        case 4:  # a key moves to another mapping, or takes another name
            homes = [p for p in places(tree) if isinstance(at(tree, p), dict)]
            names = [p[-1] for p in places(donor) if p and isinstance(p[-1], str)] or [""]
            at(tree, rng.choice(homes))[rng.choice((key, rng.choice(names)))] = copy.deepcopy(old)
        case 5 | 6:  # what stands at the same key elsewhere
            same = [p for p in places(donor) if p and p[-1] == key]
            parent[key] = copy.deepcopy(at(donor, rng.choice(same))) if same else rng.choice(NUMBERS)
        case 7:  # what stands anywhere else
            parent[key] = copy.deepcopy(at(donor, rng.choice(places(donor))))
        case 8 if isinstance(parent, list):  # small texts that stand for much, often
            parent += [copy.deepcopy(old) for _ in range(rng.choice((10, 100)))]
        case _ if isinstance(old, str) and old:  # digits and signs inside a text: ranges, sizes, units
            n = rng.randrange(len(old))
            parent[key] = old[:n] + rng.choice("0123456789-,x/. %[]mRP") + old[n + rng.randrange(2) :]
    return tree


def fuzz(
    name: str,
    run: Callable[[str], object],
    seeds: list[str],
    parse: Callable[[str], Any],
    dump: Callable[[Any], str],
) -> None:
    """Fuzz ``run`` on texts; ``parse`` and ``dump`` turn them into trees to edit and back. Options are libFuzzer's;
    files named are run once."""
    folder = BUILD / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for text in seeds:
        data = text.encode("utf-8", "surrogatepass")
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    donors = [tree for text in seeds if isinstance(tree := _tried(parse, text), dict)]
    seen: set[str] = set()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        tree = _tried(parse, data.decode("utf-8", "replace")) if rng.random() < 0.8 else None
        if not isinstance(tree, dict):
            return bytes(atheris.Mutate(data, most))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            tree = _tried(lambda t: edit(t, donors, rng), tree) or tree
        text = _tried(dump, tree)
        return text.encode("utf-8", "surrogatepass")[:most] if isinstance(text, str) else data

    def one(data: bytes) -> None:
        start = time.process_time()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
        try:
            run(text)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            keep(data, error, time.process_time() - start)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def keep(data: bytes, error: BaseException, seconds: float) -> None:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "/planc/" in f.filename
        ] or traceback.extract_tb(error.__traceback__)
        last = frames[-1]
        where = f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"
        if isinstance(error, TooSlow):  # stopped anywhere: the pipeline's part says which hang it is
            where = "-".join([type(error).__name__, *(f.name.strip("<>") for f in frames[:3])])
        if where in seen:
            return
        seen.add(where)
        (folder / f"crash-{where}").write_bytes(data)
        shown = "".join(traceback.format_exception(error)[-6:])
        sys.stderr.write(f"\n=== {name}: {where} after {seconds:.1f} s\n{shown}\n")

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGVTALRM, too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))  # over it: MemoryError
    longest = max(len(text.encode()) for text in seeds) * 3 // 2
    defaults = ["-timeout=60", "-rss_limit_mb=0", f"-max_len={longest}", f"-artifact_prefix={folder}/crash-"]
    files = [option for option in sys.argv[1:] if not option.startswith("-")]  # crashes to run again
    atheris.Setup(
        [sys.argv[0], *defaults, *sys.argv[1:], *([] if files else [str(corpus)])], one, custom_mutator=mutate
    )
    atheris.Fuzz()


def _tried(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except Exception:
        return None


def json_text(tree: Any) -> str:
    return json.dumps(tree)  # which escapes half a surrogate pair, where UTF-8 cannot hold it
