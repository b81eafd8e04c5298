"""The plan in words: the deployment document in Markdown and as one self-contained HTML page."""

from planc.report.document import document_html, document_markdown

__all__ = ["document_html", "document_markdown"]
