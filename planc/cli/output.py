"""What the commands print, and the files they write: human text to stderr, data to stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, render_github, render_json, render_text


def drop_stdout() -> None:
    """What is still buffered cannot be written; Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unwritable(name: str, error: OSError) -> PlancError:
    return PlancError([Diagnostic("PLN017", f"cannot write {name}: {error.strerror or error}")])


def report(diagnostics: Iterable[Diagnostic], options: argparse.Namespace) -> None:
    style = getattr(options, "format", "text")
    diagnostics = tuple(diagnostics)
    if not diagnostics:
        return
    if style == "json":
        print(render_json(diagnostics))
    elif style == "github":
        print(render_github(diagnostics))
    else:
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(render_text(diagnostics, colour=colour), file=sys.stderr)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def refuse_to_overwrite(path: str | None) -> None:
    """A file that people edit is not written over."""
    if path is not None and os.path.lexists(path):
        hint = "choose another name with -o, or remove the file first"
        raise PlancError([Diagnostic("PLN017", f"{path} is there already", hint=hint)])


def write_text(content: str | bytes, path: str | None) -> None:
    """To a file, whole or not at all, or to standard output."""
    data = content if isinstance(content, bytes) else content.encode()
    if path is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    temporary = f"{path}.planc-{os.getpid()}"
    try:
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise unwritable(path, error) from None
    say(f"wrote {path}")


def cores() -> int:
    """Processes that this machine can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def planning(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal, for work that reports (done, of how many); nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
