"""The comprehensive map as SVG: title, legend, lanes and bands, joined from strings."""

from __future__ import annotations

import math

from planc.graph import COLLECTIVES
from planc.render.comprehensive_bands import Bands, Detail
from planc.render.comprehensive_cells import BASELINE, INK, draw_shape, outline
from planc.render.comprehensive_layout import (
    HEADING,
    LANE_SIZE,
    MARGIN,
    NO_LANES,
    SHORT,
    SIZE,
    Lanes,
    Section,
    make_lanes,
    make_sections,
    row_name,
)
from planc.render.filters import Filter
from planc.render.style import COMMS, DASH, FONT, OPS
from planc.render.svg import num
from planc.render.text import text_width, wrapped, xml_escape
from planc.render.view import COMM_NAMES
from planc.spec import ExpertRule
from planc.verify import VerifiedPlan

HEAD_WIDTH, LEAST_WIDTH = 1400.0, 760.0  #: title and legend stay where a reader at 1:1 sees them
STRIP_EVERY = 8  #: layers after which the GPU labels are repeated
STRIP = 34.0
MAX_BYTES = 1_000_000  #: of the SVG per 128 GPUs: larger ones open slowly, and some page hosts refuse them
LINE = 16.0


def comprehensive_svg(plan: VerifiedPlan, keep: Filter | None = None) -> str:
    """The map of every op of every layer on every GPU, or of those that ``keep`` keeps.

    It stays within `MAX_BYTES` per 128 GPUs: where it would not, tooltips tell less, and the map still shows all.
    """
    chosen = keep or Filter()
    sections, folded = make_sections(plan, chosen)
    names = max((text_width(row_name(plan.blocks.blocks[i]), SIZE) for s in sections for i in s.blocks), default=0.0)
    lanes = make_lanes(plan, chosen, names) if sections else NO_LANES
    width = max(lanes.width, LEAST_WIDTH)
    head, y = _head(plan, chosen, sections, folded, min(width, HEAD_WIDTH))
    heads, y = _panel_heads(plan, lanes, y)
    limit = MAX_BYTES * max(1, math.ceil(plan.parallelism.world_size / 128))
    text = ""
    for detail in Detail:
        bands = Bands(plan, lanes, detail)
        body, end = _body(bands, sections, y)
        text = _page(
            plan, width, end + MARGIN, [_lane_labels(lanes), *bands.symbols.definitions()], [*head, *heads, *body]
        )
        if len(text.encode()) <= limit:
            break
    return text


def _body(bands: Bands, sections: list[Section], y: float) -> tuple[list[str], float]:
    """All bands from ``y`` down, with the GPU labels above the first and again every few layers; and where they end."""
    parts: list[str] = []
    layers = 0
    for number, section in enumerate(sections):
        if number == 0 or (section.layer is not None and layers and layers % STRIP_EVERY == 0):
            parts.append(f'<use href="#lanes" y="{num(y)}"/>\n')
            y += STRIP
        layers += section.layer is not None
        template = bands.template(section)
        parts.append(
            f'<g id="{section.name}" class="band {section.kind.lower()}" transform="translate(0 {num(y)})">{template.fill(section)}</g>\n'
        )
        y += template.height
    return parts, y


def _page(plan: VerifiedPlan, width: float, height: float, definitions: list[str], content: list[str]) -> str:
    size = f'width="{num(width)}" height="{num(height)}"'
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {num(width)} {num(height)}" role="img" '
        f'id="comprehensive_moe_dag" class="planc-map" font-family="{xml_escape(FONT)}" font-size="{num(SIZE)}" '
        'text-anchor="middle" fill="#111111" style="font-kerning:none">\n'
        f"<title>comprehensive_moe_dag: {xml_escape(plan.spec.name)}</title>\n{_STYLE}\n"
    )
    page = f'<rect class="page" {size} fill="#ffffff"/>\n'
    return "".join([start, "<defs>", *definitions, "</defs>\n", page, *content, "</svg>\n"])


# Plain class names: selectors that name an ancestor do not reach what `<use>` draws.
_STYLE = (
    "<style>.mw{fill:none;stroke-width:1.2}.mf{fill:#fff;stroke:#bbb}.mn{fill:#f1f4f8}.mr{text-anchor:end}"
    ".ml,.mh,.mt,.mk,.mz{text-anchor:start}.mh{font-size:14px;font-weight:bold}.mb{font-weight:bold}"
    f".mg{{font-size:{num(LANE_SIZE)}px;font-weight:bold}}.md{{font-size:{num(HEADING)}px;font-weight:bold}}"
    f".mt{{font-size:12px}}.mk{{font-size:{num(HEADING)}px}}.mz{{font-size:18px;font-weight:bold}}</style>"
)


# --- lanes ----------------------------------------------------------------------------------------------------------


def _lane_labels(lanes: Lanes) -> str:
    """Nodes and GPUs over their lanes, to be used again every few layers."""
    parts = ['<g id="lanes">']
    for span in lanes.spans:
        parts.append(
            f'<rect x="{num(span.left)}" y="3" width="{num(span.end - span.left)}" height="15" fill="#dfe5ee"/>'
            f'<text class="md" x="{num((span.left + span.end) / 2)}" y="14.5">{xml_escape(span.label)}</text>'
        )
        parts += (f'<text class="mg" x="{num(lanes.centre(r))}" y="29">GPU {r}</text>' for r in span.ranks)
    return "".join([*parts, "</g>"])


def _panel_heads(plan: VerifiedPlan, lanes: Lanes, y: float) -> tuple[list[str], float]:
    """Replica and stage over each panel."""
    par, parts = plan.parallelism, []
    for panel in lanes.panels:
        text = f"replica {panel.replica}"
        if par.pp > 1:
            first, end = par.stages[panel.stage]
            text += f" · stage {panel.stage} · " + (
                f"layers {first}-{end - 1}" if end - first > 1 else f"layer {first}"
            )
        text += f" · GPU {panel.ranks[0]}-{panel.ranks[-1]}"
        parts.append(
            f'<rect x="{num(panel.left)}" y="{num(y)}" width="{num(panel.end - panel.left)}" height="22" fill="#c9d4e3"/>'
            f'<text class="mh" x="{num(panel.left + 6)}" y="{num(y + 16)}">{text}</text>\n'
        )
    return parts, y + 24


# --- title and legend -----------------------------------------------------------------------------------------------


def _head(
    plan: VerifiedPlan, keep: Filter, sections: list[Section], folded: bool, width: float
) -> tuple[list[str], float]:
    """Title, facts and legend, and where they end."""
    room = width - 2 * MARGIN
    parts, y = [], 30.0
    for line in wrapped(f"comprehensive_moe_dag · {plan.spec.name}", 18 * 1.1, room):
        parts.append(f'<text class="mz" x="{num(MARGIN)}" y="{num(y)}">{xml_escape(line)}</text>\n')
        y += 22
    for fact in _facts(plan, keep, folded, bool(sections)):
        for line in wrapped(fact, 12, room):
            parts.append(f'<text class="mt" x="{num(MARGIN)}" y="{num(y)}">{xml_escape(line)}</text>\n')
            y += LINE
    legend, end = _legend(plan, sections, y + 4, room)
    return [*parts, *legend], end


def _facts(plan: VerifiedPlan, keep: Filter, folded: bool, shown: bool) -> list[str]:
    par, model = plan.parallelism, plan.spec.model
    nodes = int(plan.spec.cluster.node_of_rank[par.world_size - 1]) + 1
    moe = (
        f" ({len(model.moe_layer_ids)} MoE of {model.moe.experts} experts, top-{model.moe.top_k})" if model.moe else ""
    )
    facts = [
        f"{par.world_size} GPUs on {nodes} node{'s' if nodes > 1 else ''} · dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}"
        + (f" · expert tp {par.expert_tp}" if par.expert_tp > 1 else "")
        + f" · {model.layers} layers{moe} · expert rule: {_rule(plan)}",
        f"A column per GPU, a band per layer; data flows downwards. The plan has {plan.blocks.op_count:,} ops and "
        f"{len(plan.expanded.source):,} edges; the DOT of this figure lists them all.",
    ]
    if folded:
        count = plan.spec.workload.micro_batches
        facts.append(
            f"×{count} micro-batches: drawn once, because their ops, GPUs, tensors and edges were compared and are the same."
        )
    if keep.text():
        facts.append(f"Shown here: {keep.text()}." if shown else f"No op of this plan lies in {keep.text()}.")
    return facts


def _rule(plan: VerifiedPlan) -> str:
    rule, rounds = plan.spec.expert_rule, plan.placement.rounds
    if not isinstance(rule, ExpertRule):
        return f"none, up to {rounds} experts of a layer on a GPU, one after the other"
    scope = "of one layer" if rule.scope == "layer" else "in all"
    text = f"at most {rule.slots_per_gpu} expert{'s' if rule.slots_per_gpu > 1 else ''} {scope} per GPU (scope {rule.scope})"
    return text + (f", relaxed to {rounds} that run one after the other" if plan.placement.relaxed else "")


def _legend(plan: VerifiedPlan, sections: list[Section], y: float, room: float) -> tuple[list[str], float]:
    """Samples of every family of ops and class of lines that the map uses, in rows."""
    items = [*_shape_items(plan, sections), *_line_items(plan, sections)]
    parts, x = ['<g class="legend">\n'], MARGIN
    for sample, sample_width, text in items:
        step = sample_width + 6 + text_width(text, HEADING) + 18
        if x > MARGIN and x + step > room + MARGIN:
            x, y = MARGIN, y + 20
        parts.append(
            f'<g transform="translate({num(x)} {num(y)})">{sample}'
            f'<text class="mk" x="{num(sample_width + 6)}" y="11">{xml_escape(text)}</text></g>\n'
        )
        x += step
    return [*parts, "</g>\n"], y + 30


def _shape_items(plan: VerifiedPlan, sections: list[Section]) -> list[tuple[str, float, str]]:
    """A sample per family: the shape and short name of its first kind, and all its kinds."""
    kinds = list(dict.fromkeys(plan.blocks.blocks[i].kind for s in sections for i in s.blocks))
    families: dict[tuple[str, str], list[str]] = {}
    for kind in kinds:
        families.setdefault(
            (OPS[kind].family, OPS[kind].shape if OPS[kind].family != "input and output" else ""), []
        ).append(kind)
    items = []
    for (family, _), members in families.items():
        first = members[0]
        text = "" if first in COLLECTIVES else SHORT.get(first, "E7")
        described = f"{family}: {', '.join(members)}"
        if first in COLLECTIVES:
            described = f"collective over the GPUs it spans: {', '.join(members)}"
        elif first == "expert":
            described = "expert, by its id"
        shape = draw_shape(first, outline(OPS[first].shape, 0, 0.5, 40, 13))
        items.append((f'{shape}<text x="20" y="{num(7 + BASELINE)}">{text}</text>', 40.0, described))
    return items


def _line_items(plan: VerifiedPlan, sections: list[Section]) -> list[tuple[str, float, str]]:
    used = {plan.blocks.edges[w.edge].comm for s in sections for w in s.wires}
    solid = f'<path class="mw" d="M0 7H40" stroke="{INK}"/>'
    aside = f'<path class="mw" d="M16 0V3H4V11H12" stroke="{INK}"/>'
    items = [
        (solid, 40.0, "data that stays on its GPU"),
        (aside, 16.0, "beside the shapes: skips rows, passes behind bars"),
    ]
    for comm, text in COMM_NAMES.items():
        if comm in used:
            line = f'<path class="mw" d="M0 7H40" stroke="{COMMS[comm]}" stroke-dasharray="{DASH}"/>'
            items.append((line, 40.0, f"communication, {comm}: {text}"))
    return items
