"""Text in figures: escaping, widths, wrapping, and names of ranks, so that boxes are made to fit before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from xml.sax.saxutils import escape as _xml

from planc.graph import range_text

# Advance widths in 1/1000 em, the larger of DejaVu Sans and Liberation Sans (which stands for Helvetica and Arial),
# rounded up: measured with headless Chromium, canvas measureText at 1000 px. First the characters U+0020 to U+007E.
# The figures switch kerning off, because DejaVu Sans spreads some pairs by up to 0.056 em.
_REGULAR = """
318 401 460 838 637 951 780 275 391 391 500 838 318 361 318 337 637 637 637 637 637 637 637 637 637 637 337 337
838 838 838 557 1016 685 687 723 771 667 611 778 752 295 500 667 558 863 749 788 667 788 723 667 611 732 685 989
686 667 686 391 337 391 838 557 500 613 635 550 635 616 353 635 634 278 278 580 278 975 634 612 635 635 412 521
393 634 592 818 592 592 525 637 337 637 838
"""
_BOLD = """
349 457 521 838 696 1002 873 307 458 458 523 838 380 416 380 366 696 696 696 696 696 696 696 696 696 696 400 400
838 838 838 611 1000 774 763 734 831 684 684 821 837 373 557 775 638 996 837 851 733 851 771 721 683 813 774
1104 771 725 726 458 366 458 838 557 500 675 716 593 716 679 436 716 712 343 343 666 343 1042 712 688 716 716
494 596 479 712 652 924 646 652 583 712 366 712 838
"""
_SYMBOLS = {
    "·": 334,
    "×": 838,
    "→": 1000,
    "…": 1000,
    "–": 557,
    "—": 1000,
    "≥": 838,
    "≤": 838,
    "≈": 838,
    "µ": 637,
    "−": 838,
}
_SYMBOLS_BOLD = {
    "·": 380,
    "×": 838,
    "→": 1000,
    "…": 1000,
    "–": 557,
    "—": 1000,
    "≥": 838,
    "≤": 838,
    "≈": 838,
    "µ": 736,
    "−": 838,
}
#: the widest character of the Latin-1 supplement, and of all the other blocks measured (it is U+2031, ‱)
_LATIN, _OTHER = {False: 1000, True: 1085}, {False: 1736, True: 1887}


def _table(advances: str, symbols: dict[str, int]) -> dict[str, int]:
    return {chr(32 + i): int(width) for i, width in enumerate(advances.split())} | symbols


_WIDTHS = {False: _table(_REGULAR, _SYMBOLS), True: _table(_BOLD, _SYMBOLS_BOLD)}


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width in px that ``text`` needs at ``size`` px; an upper bound over the fonts in `style.FONT`."""
    known, latin, other = _WIDTHS[bold], _LATIN[bold], _OTHER[bold]
    units = sum(known.get(c) or (latin if c < "\u0100" else other) for c in text)
    return units * size / 1000


def fitted(text: str, size: float, width: float, *, bold: bool = False) -> str:
    """``text``, shortened with an ellipsis until it fits ``width`` px."""
    if text_width(text, size, bold=bold) <= width:
        return text
    kept, used = 0, text_width("…", size, bold=bold)
    for character in text:
        used += text_width(character, size, bold=bold)
        if used > width:
            break
        kept += 1
    return text[:kept] + "…"


def wrapped(text: str, size: float, width: float) -> list[str]:
    """``text`` broken at blanks into lines of at most ``width`` px; a single word that is longer is shortened."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fitted(word, size, width))
    return lines


def numbers_text(numbers: Sequence[int]) -> str:
    """Ascending numbers in few words: ``0–63``, ``0, 8 … 56`` (evenly spaced), else ``0–2, 7``."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    return range_text(list(numbers)).replace("-", "–").replace(",", ", ")


def named(word: str, numbers: Sequence[int]) -> str:
    """``GPU 3``, ``GPUs 0–63``, ``nodes 0–7``: a word and its numbers."""
    return f"{word}{'s' if len(numbers) != 1 else ''} {numbers_text(numbers)}"


def tokens_text(low: int, high: int | None = None) -> str:
    """``16 tok``, ``15–16 tok``; five digits and more are rounded: ``32.77k tok``."""
    words = [str(n) if n < 10_000 else f"{n / 1000:.4g}k" for n in sorted({low, low if high is None else high})]
    return f"{'–'.join(words)} tok"


def xml_escape(text: str) -> str:
    """Text for XML content and attribute values."""
    clean = text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
    return _xml(clean, {'"': "&quot;", "'": "&#39;"})


def dot_quote(text: str) -> str:
    """A quoted DOT string; line breaks become DOT's ``\\n``."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.split("\n"))
    return '"' + "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines) + '"'
