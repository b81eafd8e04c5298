"""Text in figures: escaping, and widths, so that boxes are made to fit before anything is drawn."""

from __future__ import annotations

from xml.sax.saxutils import escape as _xml

# Advance widths of DejaVu Sans in 1/1000 em: the widest of the fonts in `style.FONT`, so text that fits here fits in
# all of them. Measured with headless Chromium (canvas measureText at 1000 px).
_NARROW = {"i": 278, "j": 278, "l": 278, "|": 337, " ": 318, ".": 318, ",": 318, ":": 337, ";": 337, "'": 275, "I": 295}
_NARROW |= {"f": 352, "t": 392, "r": 411, "(": 390, ")": 390, "[": 390, "]": 390, "/": 337, "-": 361, "·": 318, "!": 401}
_WIDE = {"m": 974, "w": 818, "M": 863, "W": 989, "%": 950, "@": 1000, "→": 838, "×": 838, "=": 838, "+": 838, "…": 1000}
_WIDE |= {"<": 838, ">": 838, "≥": 838, "≤": 838, "Q": 787, "O": 787, "G": 775, "D": 770, "N": 748, "H": 752, "U": 732}
_WIDTHS = _NARROW | _WIDE
_OTHER = {True: 690, False: 636}  # capitals, and everything else


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width in px that ``text`` needs at ``size`` px; an upper bound over the fonts in `style.FONT`."""
    units = sum(_WIDTHS.get(c, _OTHER[c.isupper()] if ord(c) < 0x2E80 else 1000) for c in text)
    return units * size / 1000 * (1.1 if bold else 1.0)


def fitted(text: str, size: float, width: float) -> str:
    """``text``, shortened with an ellipsis until it fits ``width`` px."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def xml_escape(text: str) -> str:
    """Text for XML content and attribute values."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return _xml(clean, {'"': "&quot;", "'": "&#39;"})


def dot_quote(text: str) -> str:
    """A quoted DOT string; line breaks become DOT's ``\\n``."""
    lines = text.split("\n")
    return '"' + "\\n".join("".join(c if c.isprintable() else " " for c in t).replace("\\", "\\\\").replace('"', '\\"') for t in lines) + '"'
