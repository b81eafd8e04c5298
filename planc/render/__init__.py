"""Pictures of a verified plan: one neutral `View` per figure, written as SVG and as DOT."""

from collections.abc import Callable

from planc.render.deployment import deployment_view
from planc.render.detailed import detailed_view
from planc.render.dot import dot
from planc.render.frontier import best_under, tps_tpot_svg
from planc.render.gate import gate_loads_svg
from planc.render.memory import memory_svg
from planc.render.placement import expert_heat_map_svg, link_bars_svg
from planc.render.search import search_gpus_svg, search_svg
from planc.render.search_page import search_html
from planc.render.simplified import simplified_view
from planc.render.svg import svg
from planc.render.timeline import timeline_svg
from planc.render.view import Edge, Frame, Label, Node, View
from planc.verify import VerifiedPlan

#: figures that fit a page 1,000 px wide, by file name
PAGE_FIGURES: dict[str, Callable[[VerifiedPlan], View]] = {
    "simplified_moe_dag": simplified_view,
    "detailed_expert_dag": detailed_view,
    "complete_deployment_dag": deployment_view,
}

__all__ = [
    "PAGE_FIGURES",
    "Edge",
    "Frame",
    "Label",
    "Node",
    "View",
    "best_under",
    "deployment_view",
    "detailed_view",
    "dot",
    "expert_heat_map_svg",
    "gate_loads_svg",
    "link_bars_svg",
    "memory_svg",
    "search_gpus_svg",
    "search_html",
    "search_svg",
    "simplified_view",
    "svg",
    "timeline_svg",
    "tps_tpot_svg",
]
