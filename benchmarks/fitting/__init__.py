"""Fitting constants to measured rows: shared by `benchmarks/accuracy.py` and `benchmarks/gpu`.

Imports inside are relative, since the first runs as a script beside this folder and the second as a module above it.
"""

from .families import Family, Table, families, flat, namespace, table_of, tree
from .fit_file import fit_text
from .judge import Judged, judge, rough_rows, search

__all__ = [
    "Family",
    "Judged",
    "Table",
    "families",
    "fit_text",
    "flat",
    "judge",
    "namespace",
    "rough_rows",
    "search",
    "table_of",
    "tree",
]
