"""Figures measured by the browser itself, and what is true of the texts of every figure."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planc.render.text import text_width

Box = list[float]  #: x, y, width, height
Figures = list[dict[str, Any]]

#: runs a test's `measure(figure)` on every figure, with the page's font and with the widest one
FRAME = """
const box = e => { const b = e.getBBox(); return [b.x, b.y, b.width, b.height]; };
%s
const figures = [...document.querySelectorAll('%s')];
const result = [];
for (const font of ['', 'DejaVu Sans']) {
  if (font) figures.forEach(f => f.setAttribute('font-family', font));
  result.push(...figures.map(measure));
}
const out = document.createElement('pre');
out.id = 'result';
out.textContent = JSON.stringify(result);
document.body.replaceChildren(out);
"""


def named(figures: list[tuple[str, str]]) -> str:
    """The body of a page of (name, SVG text)."""
    return "\n".join(f'<figure style="margin:0" id="{name}">{text}</figure>' for name, text in figures)


def measured_page(
    folder: Path, dump_dom: Callable[[Path], str], body: str, measure: str, which: str = "svg"
) -> Figures:
    """What `measure`, a function of a figure in JavaScript, says of every figure of a page: with its own font, then with
    the widest."""
    page = folder / "figures.html"
    head = '<!doctype html><html><head><meta charset="utf-8"></head><body style="margin:0">'
    page.write_text(f"{head}{body}<script>{FRAME % (measure, which)}</script></body></html>", encoding="utf-8")
    text = dump_dom(page).partition('<pre id="result">')[2].partition("</pre>")[0]
    found: Figures = json.loads(html.unescape(text))
    return found


def inside(inner: Box, outer: Box, slack: float = 0.0) -> bool:
    """One box lies in another."""
    return (
        inner[0] >= outer[0] - slack
        and inner[1] >= outer[1] - slack
        and inner[0] + inner[2] <= outer[0] + outer[2] + slack
        and inner[1] + inner[3] <= outer[1] + outer[3] + slack
    )


def no_two_texts_overlap(measured: Figures, height_slack: float) -> None:
    """``height_slack``: by how much the boxes of two lines may meet, as boxes are as high as the font and texts lower."""
    for figure in measured:
        texts = sorted(figure["texts"], key=lambda t: t["box"][1])
        for i, a in enumerate(texts):
            ax, ay, aw, ah = a["box"]
            for b in texts[i + 1 :]:
                bx, by, bw, _ = b["box"]
                if by >= ay + ah - height_slack:
                    break
                assert bx >= ax + aw - 0.5 or ax >= bx + bw - 0.5, (figure["name"], a["text"], b["text"])


def texts_are_readable(measured: Figures, least: float) -> None:
    """Every text is shown at its own scale, ``least`` px high or more, and no wider than was counted on."""
    for figure in measured:
        assert figure["scale"] == pytest.approx(1)
        for text in figure["texts"]:
            assert text["shown"] >= least
            assert text["length"] <= text_width(text["text"], text["size"], bold=text["bold"]) + 0.1, text
