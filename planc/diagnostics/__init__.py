"""Coded messages about a spec, a plan or a file: what is wrong, where, and the change that would fix it."""

from planc.diagnostics.codes import CODES, Code
from planc.diagnostics.model import Diagnostic, PlancError, Severity, Span, closest
from planc.diagnostics.render import render_github, render_json, render_text

__all__ = [
    "CODES",
    "Code",
    "Diagnostic",
    "PlancError",
    "Severity",
    "Span",
    "closest",
    "render_github",
    "render_json",
    "render_text",
]
