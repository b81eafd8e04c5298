"""deployment_plan.md and .html from the templates. Every number comes from the plan; the templates hold only words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from planc import units
from planc.report.facts import document_facts
from planc.schedule import Estimate
from planc.spec import shipped_folder
from planc.verify import VerifiedPlan

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&])")


def markdown_escape(value: object) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table cell."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(shipped_folder("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown and shell text; what goes into HTML is escaped by `e` or by markdown-it
    )
    environment.filters |= {
        "md": markdown_escape,
        "bytes": units.format_bytes,
        "rate": units.format_rate,
        "flops": units.format_flops,
        "seconds": units.format_seconds,
        "count": units.format_count,
        "thousands": lambda n: f"{n:,}",
        "percent": lambda x: f"{100 * x:.1f} %",
    }
    return environment


def document_markdown(plan: VerifiedPlan, figures: Mapping[str, str], found: Estimate) -> str:
    """The plan document. ``figures`` maps figure names that were drawn to their captions; ``found`` is the prediction."""
    template = _environment().get_template("deployment_plan.md.j2")
    return template.render(document_facts(plan, found), figures=figures)


def document_html(plan: VerifiedPlan, markdown: str, pictures: Mapping[str, str]) -> str:
    """The same document as one page without references to other files. ``pictures`` maps ``NAME.svg`` to the SVG
    text that replaces the image of that name; images without a picture become links."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = re.sub(r'(<p>)?<img src="([\w.]+)" alt="([^"]*)"[^>]*>(?(1)(</p>)?)', lambda m: _picture(m, pictures), body)
    template = _environment().get_template("page.html.j2")
    return template.render(title=plan.spec.name, body=body)


def _picture(match: re.Match[str], pictures: Mapping[str, str]) -> str:
    """A figure in place of the paragraph that holds only its image; a link where there is no picture."""
    opened, name, alt, closed = match.groups(default="")
    if name in pictures and bool(opened) == bool(closed):
        return f"<figure>{pictures[name]}</figure>"
    return f'{opened}<a href="{name}">{alt}</a>{closed}'
