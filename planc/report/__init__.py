"""The plan in words: the plan document, predictions, explanations, and the published schemas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planc.report.document import document_html, document_markdown

__all__ = ["document_html", "document_markdown"]


def __getattr__(name: str) -> Any:
    """Import the document when it is asked for: a prediction needs no templates."""
    if name not in __all__:
        raise AttributeError(f"module 'planc.report' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("planc.report.document"), name)
