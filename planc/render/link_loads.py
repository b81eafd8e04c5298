"""Link loads as bars: the busiest and the mean link of each kind beside identity placement, and the busiest link of every
MoE layer beside its bound. 1,000 px wide, for the plan document.
"""

from __future__ import annotations

from collections.abc import Iterator

from planc.planner import Certificate
from planc.render.style import FONT
from planc.render.text import text_width, xml_escape
from planc.units import format_seconds

WIDTH, LEFT, RIGHT = 1000, 110, 16
_OURS, _PLAIN, _BOUND = "#0072b2", "#b9b9b9", "#d55e00"
_STRIP = 150.0  #: height of the panel of layers


def link_loads_svg(certificate: Certificate) -> str:
    """Two panels: kinds of links (dispatch, mean over layers), and layers (dispatch and combine)."""
    y = 64.0
    kinds = list(_kinds(certificate, y))
    below = y + 46 * len(certificate.kinds) + 52
    height = round(below + _STRIP + 58)
    title = f"Link loads: {certificate.tokens:,.0f} tokens of an EP group, {certificate.transfer} transfer"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'id="link-loads" role="img" aria-label="{xml_escape(title)}" font-family="{xml_escape(FONT)}" font-size="12" '
            f'style="font-kerning:none">',
            f"<title>{xml_escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="12" y="22" font-size="14" font-weight="bold">{xml_escape(title)}</text>',
            *_legend(44.0),
            *kinds,
            *_layers(certificate, below),
            "</svg>",
            "",
        ]
    )


def _legend(y: float) -> Iterator[str]:
    x = float(LEFT)
    for fill, words in ((_OURS, "this placement, busiest link"), (_PLAIN, "identity placement, busiest link")):
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="14" height="11" fill="{fill}"/>'
        yield f'<text x="{x + 19:.1f}" y="{y:.1f}">{words}</text>'
        x += 19 + text_width(words, 12) + 20
    for colour, words in (("#111", "mean link"), (_BOUND, "bound of a layer")):
        yield f'<path d="M{x + 7:.1f} {y - 11:.1f}v13" stroke="{colour}" stroke-width="2.5"/>'
        yield f'<text x="{x + 16:.1f}" y="{y:.1f}">{words}</text>'
        x += 16 + text_width(words, 12) + 20


def _kinds(certificate: Certificate, y: float) -> Iterator[str]:
    rows = certificate.kinds
    longest = max(max(row.busiest_seconds, row.identity_seconds) for row in rows)
    room = WIDTH - LEFT - RIGHT - 90
    for number, row in enumerate(rows):
        top = y + 46 * number
        name, count = row.kind.replace("_", " "), f"{row.links:,} links"
        yield f'<g id="link-kind-{row.kind}"><title>{name}, mean over layers: busiest {format_seconds(row.busiest_seconds)}, mean {format_seconds(row.mean_seconds)}, busiest under identity {format_seconds(row.identity_seconds)}</title>'
        yield f'<text x="{LEFT - 8}" y="{top + 14:.1f}" text-anchor="end">{name}</text>'
        yield f'<text x="{LEFT - 8}" y="{top + 28:.1f}" text-anchor="end" font-size="10" fill="#444">{count}</text>'
        for shift, seconds, fill in ((0, row.busiest_seconds, _OURS), (17, row.identity_seconds, _PLAIN)):
            width = max(1.0, room * seconds / longest)
            yield f'<rect x="{LEFT}" y="{top + shift:.1f}" width="{width:.1f}" height="15" fill="{fill}"/>'
            yield f'<text x="{LEFT + width + 6:.1f}" y="{top + shift + 12:.1f}" font-size="11">{format_seconds(seconds)}</text>'
        mean = LEFT + room * row.mean_seconds / longest
        yield f'<path d="M{mean:.1f} {top - 2:.1f}v19" stroke="#111" stroke-width="2.5"/></g>'


def _layers(certificate: Certificate, y: float) -> Iterator[str]:
    """A bar per MoE layer: identity behind, this placement before it, the bound as a tick."""
    layers = certificate.layers
    longest = max(max(row.seconds, row.identity_seconds) for row in layers)
    room = WIDTH - LEFT - RIGHT
    pitch = min(60.0, room / len(layers))
    bar = max(1.0, pitch * 0.72)
    end = y + _STRIP
    yield f'<text x="{LEFT}" y="{y - 14:.0f}">every MoE layer: its busiest link in dispatch and in combine, added</text>'
    for share in (0.0, 0.5, 1.0):
        level = end - share * _STRIP
        yield f'<path d="M{LEFT} {level:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end" font-size="11">{format_seconds(share * longest)}</text>'
    for number, row in enumerate(layers):
        x = LEFT + number * pitch + (pitch - bar) / 2
        plain, ours, bound = (_STRIP * s / longest for s in (row.identity_seconds, row.seconds, row.bound_seconds))
        yield f"<g><title>layer {row.layer}: {format_seconds(row.seconds)}, identity {format_seconds(row.identity_seconds)}, bound {format_seconds(row.bound_seconds)}; busiest: {xml_escape(row.busiest)}</title>"
        yield f'<path fill="{_PLAIN}" d="M{x:.1f} {end:.1f}v{-plain:.1f}h{bar:.1f}v{plain:.1f}z"/>'
        inner = bar * 0.7
        yield f'<path fill="{_OURS}" d="M{x + (bar - inner) / 2:.1f} {end:.1f}v{-ours:.1f}h{inner:.1f}v{ours:.1f}z"/>'
        yield f'<path d="M{x:.1f} {end - bound:.1f}h{bar:.1f}" stroke="{_BOUND}" stroke-width="2"/></g>'
    every = max(1, int(-(-(text_width(str(layers[-1].layer), 10) + 6) // pitch)))
    for number in range(0, len(layers), every):
        x = LEFT + (number + 0.5) * pitch
        yield f'<text x="{x:.1f}" y="{end + 14:.1f}" font-size="10" text-anchor="middle">{layers[number].layer}</text>'
    yield f'<text x="{LEFT - 8}" y="{end + 18:.1f}" font-size="11" text-anchor="end">layer</text>'
