"""The expert-to-node heat map: where the experts of the busiest layer sit and how hot they are, and what every node gets in
every layer. 1,000 px wide, for the plan document.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planc.render.style import FONT
from planc.render.text import fitted, text_width, xml_escape
from planc.units import decode_numbers, format_count
from planc.verify import VerifiedPlan

WIDTH, LEFT, RIGHT = 1000, 92, 16
_CELL, _SMALL = 17.0, 5.0  #: height of a cell with a label, and without
_LABEL = 9.5  #: px of the smallest text
#: cold to hot, readable to the colour-blind; black text up to `_DARK`, then white
_HEAT = ("#fffbe6", "#fee8a8", "#fecf66", "#fdae3d", "#f3862a", "#d95f0e", "#a63d03", "#6e2602")
_DARK = 5
#: less than the mean, near it, more; with the ratio up to which each goes
_RATIO = (("#2166ac", 0.6), ("#6baed6", 0.8), ("#d1e5f0", 0.95), ("#f7f7f7", 1.05), ("#fddbc7", 1.2), ("#ef8a62", 1.4))
_MOST = ("#b2182b", np.inf)


def expert_heat_map_svg(plan: VerifiedPlan) -> str:
    """Upper panel: the layer whose busiest link takes longest (the most uneven one where link times are not known); lower
    panel: tokens that arrive at each node in each layer, over the layer's mean. Nodes too many for their width are drawn in
    groups, and cells too narrow for a number have none."""
    certificate = plan.certificate
    assert certificate is not None
    nodes = decode_numbers(certificate.nodes)
    shown = max(certificate.layers, key=lambda row: (row.seconds, row.imbalance))
    arriving = np.stack([decode_numbers(row.node_tokens) for row in certificate.layers]).astype(float)
    top = _Panel(nodes, plan, shown.layer, decode_numbers(shown.loads).astype(float))
    upper = list(top.draw(58.0))
    y = 58.0 + top.height + 46
    rows = max(4.0, min(12.0, 420 / len(arriving)))
    lower = list(_layers(arriving, [row.layer for row in certificate.layers], nodes, y, rows))
    height = round(y + rows * len(arriving) + 58)
    title = f"Experts on nodes: layer {shown.layer}, and all {len(arriving)} MoE layers"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'id="expert-heat-map" role="img" aria-label="{xml_escape(title)}" font-family="{xml_escape(FONT)}" '
            f'font-size="12" style="font-kerning:none">',
            f"<title>{xml_escape(title)}</title>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="12" y="22" font-size="14" font-weight="bold">{xml_escape(title)}</text>',
            *upper,
            *lower,
            "</svg>",
            "",
        ]
    )


class _Panel:
    """The layer with the busiest link: a column per node (or group of nodes), its copies by load."""

    def __init__(self, nodes: np.ndarray, plan: VerifiedPlan, layer: int, loads: np.ndarray) -> None:
        part, par = plan.placement.layers[layer], plan.parallelism
        share = loads[part.expert] / part.copies[part.expert]
        first = int(par.stage_ranks(par.stage_of_layer(layer))[0, 0])
        node = np.searchsorted(nodes, plan.spec.cluster.node_of_rank[first + part.rank])
        self.layer, self.nodes, self.groups = layer, nodes, _groups(len(nodes))
        order = np.lexsort((part.expert, -share))
        self.columns: list[list[tuple[int, float]]] = [[] for _ in range(len(self.groups))]
        column = np.searchsorted([g[-1] for g in self.groups], node[order])
        for c, e, load in zip(column.tolist(), part.expert[order].tolist(), share[order].tolist(), strict=True):
            self.columns[c].append((e, load))
        self.most, self.mean = float(share.max(initial=0.0)), float(share.mean())
        self.width = (WIDTH - LEFT - RIGHT) / len(self.groups)
        self.rows = max(len(column) for column in self.columns)
        widest = max(text_width(str(int(part.expert.max(initial=0))), _LABEL), 1)
        self.labelled = self.width >= widest + 3 and self.rows <= 40
        self.cell = _CELL if self.labelled else max(2.0, min(_SMALL, 300 / max(1, self.rows)))
        self.height = self.cell * self.rows + 34

    def draw(self, y: float) -> Iterator[str]:
        what = f"layer {self.layer}: each cell is an expert" + (" by its number" if self.labelled else "")
        each = "a node" if len(self.groups) == len(self.nodes) else f"{len(self.groups[0])} nodes"
        words = f"{what}, hottest first; a column is {each}"
        yield f'<text x="{LEFT}" y="{y - 14:.0f}">{xml_escape(fitted(words, 12, WIDTH - LEFT - 330))}</text>'
        yield from self._scale(y)
        boxes: dict[int, list[str]] = {}
        texts: list[str] = []
        for c, column in enumerate(self.columns):
            x = LEFT + c * self.width
            for r, (expert, load) in enumerate(column):
                level = self._level(load)
                top = y + r * self.cell
                boxes.setdefault(level, []).append(_box(x, top, self.width - 1, self.cell - 1))
                if self.labelled:
                    ink = ' fill="#fff"' if level >= _DARK else ""
                    texts.append(f'<text x="{x + (self.width - 1) / 2:.1f}" y="{top + 12:.1f}"{ink}>{expert}</text>')
        for level, paths in sorted(boxes.items()):
            yield f'<path class="heat{level}" fill="{_HEAT[level]}" stroke="#8a8a8a" stroke-width=".5" d="{"".join(paths)}"/>'
        yield f'<g font-size="{_LABEL}" text-anchor="middle">{"".join(texts)}</g>'
        yield from self._feet(y + self.rows * self.cell)

    def _level(self, load: float) -> int:
        return min(len(_HEAT) - 1, int(load / self.most * len(_HEAT))) if self.most else 0

    def _feet(self, y: float) -> Iterator[str]:
        """Node numbers and totals under the columns that have room for them."""
        totals = [sum(load for _, load in column) for column in self.columns]
        names = [str(int(self.nodes[g[0]])) for g in self.groups]
        step = _step(names, self.width)
        for c in range(0, len(names), step):
            x = LEFT + (c + 0.5) * self.width
            yield f'<text x="{x:.1f}" y="{y + 14:.1f}" font-size="{_LABEL}" text-anchor="middle" font-weight="bold">{names[c]}</text>'
        amounts = [f"{total:.0f}" if total < 999.5 else f"{total / 1000:.3g}k" for total in totals]
        step = _step(amounts, self.width)
        for c in range(0, len(amounts), step):
            x = LEFT + (c + 0.5) * self.width
            yield f'<text x="{x:.1f}" y="{y + 28:.1f}" font-size="{_LABEL}" text-anchor="middle">{amounts[c]}</text>'
        yield from _row_names([("node", y + 14), ("tokens", y + 28)])

    def _scale(self, y: float) -> Iterator[str]:
        x = WIDTH - RIGHT - 300
        yield f'<text x="{x}" y="{y - 14:.0f}" font-size="11">tokens</text>'
        for level, fill in enumerate(_HEAT):
            yield f'<rect x="{x + 44 + 20 * level}" y="{y - 24:.0f}" width="20" height="12" fill="{fill}" stroke="#8a8a8a" stroke-width=".5"/>'
        end = f"0 … {format_count(self.most)}"
        yield f'<text x="{x + 44 + 20 * len(_HEAT) + 6}" y="{y - 14:.0f}" font-size="11">{xml_escape(end)}</text>'


def _groups(nodes: int) -> list[np.ndarray]:
    """Node columns in groups of equal size, so that a column is at least 6 px wide."""
    size = -(-nodes // int((WIDTH - LEFT - RIGHT) / 6))
    return [np.arange(start, min(start + size, nodes)) for start in range(0, nodes, size)]


def _layers(arriving: np.ndarray, layers: list[int], nodes: np.ndarray, y: float, height: float) -> Iterator[str]:
    """Layers × nodes: tokens over the layer's mean, one path per colour."""
    groups = _groups(len(nodes))
    part = np.stack([arriving[:, g].mean(axis=1) for g in groups], axis=1)
    ratio = part / np.maximum(part.mean(axis=1, keepdims=True), 1e-30)
    width = (WIDTH - LEFT - RIGHT) / len(groups)
    words = "all MoE layers: tokens that arrive at each node, over the layer's mean"
    yield f'<text x="{LEFT}" y="{y - 12:.0f}">{words}</text>'
    bounds = [bound for _, bound in _RATIO]
    level = np.searchsorted(bounds, ratio, side="right")
    for number, (fill, _) in enumerate((*_RATIO, _MOST)):
        rows, columns = np.nonzero(level == number)
        boxes = "".join(
            _box(LEFT + c * width, y + r * height, width, height)
            for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
        )
        if boxes:
            yield f'<path class="ratio{number}" fill="{fill}" d="{boxes}"/>'
    end = y + height * len(layers)
    yield f'<rect x="{LEFT}" y="{y:.1f}" width="{width * len(groups):.1f}" height="{end - y:.1f}" fill="none" stroke="#8a8a8a"/>'
    every = max(1, int(-(-13 // height)))
    yield from _row_names([(f"layer {layers[r]}", y + (r + 0.5) * height + 4) for r in range(0, len(layers), every)])
    names = [str(int(nodes[g[0]])) for g in groups]
    for c in range(0, len(names), _step(names, width)):
        x = LEFT + (c + 0.5) * width
        yield f'<text x="{x:.1f}" y="{end + 14:.1f}" font-size="{_LABEL}" text-anchor="middle" font-weight="bold">{names[c]}</text>'
    yield from _row_names([("node", end + 14)])
    yield from _legend(end + 34)


def _legend(y: float) -> Iterator[str]:
    x = float(LEFT)
    low = "0"
    for fill, bound in (*_RATIO, _MOST):
        words = f"{low}–{bound:g}" if np.isfinite(bound) else f"over {low}"
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="14" height="12" fill="{fill}" stroke="#8a8a8a" stroke-width=".5"/>'
        yield f'<text x="{x + 18:.1f}" y="{y:.1f}" font-size="11">{words}</text>'
        x += 18 + text_width(words, 11) + 16
        low = f"{bound:g}"
    yield f'<text x="{x:.1f}" y="{y:.1f}" font-size="11">times the mean</text>'


def _row_names(rows: list[tuple[str, float]]) -> Iterator[str]:
    for name, y in rows:
        yield f'<text x="{LEFT - 6}" y="{y:.1f}" font-size="11" text-anchor="end">{name}</text>'


def _step(texts: list[str], width: float) -> int:
    """Every how many columns a text fits."""
    return max(1, int(-(-(max(text_width(t, _LABEL, bold=True) for t in texts) + 4) // width)))


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"
