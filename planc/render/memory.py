"""The memory bar: what the fullest GPU holds, to scale, as a small SVG for the plan document."""

from __future__ import annotations

from planc.render.style import FONT
from planc.render.text import xml_escape
from planc.units import format_bytes
from planc.verify import VerifiedPlan

_FILLS = {
    "experts": "#7fceb8",
    "attention": "#a9d8f4",
    "dense_mlp": "#f5cd73",
    "shared_experts": "#c5e8dc",
    "gates": "#f0e9a0",
    "norms": "#eeeeee",
    "embedding": "#d9c6e8",
    "head": "#e8b8cf",
    "kv_cache": "#e9a36c",
    "activations": "#bcd2ee",
    "dispatch_buffers": "#e6d8b5",
    "reserve": "#cccccc",
}
_WIDTH, _LABELS, _BAR = 1000, 190, 640


def memory_svg(plan: VerifiedPlan) -> str:
    """A bar per item of the fullest rank, all on one scale that ends at the GPU's capacity. 1,000 px wide."""
    rank = plan.memory.fullest
    capacity = int(plan.memory.capacity[rank])
    rows = [(name, size) for name, size in plan.memory.of_rank(rank).items() if size]
    rows.append(("sum", int(plan.memory.used[rank])))
    title = f"Memory of GPU {rank}: {format_bytes(rows[-1][1])} of {format_bytes(capacity)}"
    height = 58 + 24 * len(rows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{xml_escape(title)}" font-family="{xml_escape(FONT)}" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="22" font-size="14" font-weight="bold">{xml_escape(title)}</text>',
        f'<rect x="{_LABELS}" y="36" width="{_BAR}" height="{24 * len(rows) + 4}" fill="none" stroke="#999"/>',
    ]
    for number, (name, size) in enumerate(rows):
        y = 40 + 24 * number
        share = size / capacity
        label = name.replace("_", " ")
        value = f"{format_bytes(size)} ({100 * share:.1f} %)"
        weight = ' font-weight="bold"' if name == "sum" else ""
        out.append(f'<g id="memory-{name}" class="memory"><title>{xml_escape(label)}: {size:,} B</title>')
        out.append(f'<text x="{_LABELS - 8}" y="{y + 15}" text-anchor="end"{weight}>{xml_escape(label)}</text>')
        fill = _FILLS.get(name, "#888888")
        out.append(
            f'<rect x="{_LABELS}" y="{y}" width="{max(1.0, _BAR * share):.1f}" height="20" fill="{fill}" stroke="#555"/>'
        )
        out.append(f'<text x="{_LABELS + _BAR + 8}" y="{y + 15}"{weight}>{value}</text></g>')
    return "\n".join([*out, "</svg>", ""])
