"""The command line: the only place that prints or exits.

Exit status: 0 good, 1 the spec or plan was refused, 2 wrong usage, 70 a fault in planc itself.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

from planc.cli.output import drop_stdout, report, unwritable
from planc.cli.parser import make_parser
from planc.diagnostics import Diagnostic, PlancError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = make_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a file name need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        drop_stdout()
        return 1
    except KeyboardInterrupt:
        print("interrupted; earlier output is as it was", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            drop_stdout()
            report(unwritable("standard output", error).diagnostics, argparse.Namespace(format="text"))
            return 1
        if os.environ.get("PLANC_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}"
        hint = "set PLANC_DEBUG=1 for the traceback"
        report([Diagnostic("PLN900", message, hint=hint)], options)
        return 70


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        return status
    except PlancError as error:
        report(error.diagnostics, options)
        return 1
