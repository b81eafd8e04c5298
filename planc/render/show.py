"""One figure of a plan as SVG or DOT text, or through Graphviz's `dot` as PNG or PDF."""

from __future__ import annotations

import shutil

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.render.filters import Filter
from planc.spec.fields import parse_ranges
from planc.verify import VerifiedPlan


def draw(
    plan: VerifiedPlan,
    figure: str,
    form: str,
    *,
    layers: str | None = None,
    nodes: str | None = None,
    replicas: str | None = None,
) -> str | bytes:
    """Draw ``figure`` (a key of `PAGE_FIGURES`, or ``comprehensive_moe_dag``) as ``svg``, ``dot``, ``png`` or ``pdf``.

    ``layers``, ``nodes`` and ``replicas`` are ranges such as ``3-5,9``. Raises PlancError: PLN014 for ranges outside
    the plan, PLN111 for a filter that the figure does not have, PLN208 for a figure too large to draw, PLN501 where
    PNG or PDF is asked for and there is no ``dot``.
    """
    chosen = {
        "layers": chosen_range("layers", layers, plan.spec.model.layers),
        "nodes": chosen_range("nodes", nodes, plan.spec.cluster.nodes),
        "replica": chosen_range("replica", replicas, plan.parallelism.dp),
    }
    if form in ("png", "pdf") and shutil.which("dot") is None:
        hint = "install Graphviz (for Debian: apt-get install graphviz), or ask for svg"
        raise PlancError(
            [Diagnostic("PLN501", f"{form} is drawn by Graphviz, but no `dot` program is on the path", hint=hint)]
        )
    as_svg = form == "svg"
    text = (
        _comprehensive(plan, chosen, as_svg)
        if figure == "comprehensive_moe_dag"
        else _page(plan, figure, chosen, as_svg)
    )
    return text if form in ("svg", "dot") else _through_graphviz(text, form)


def chosen_range(name: str, text: str | None, size: int) -> frozenset[int] | None:
    """The numbers of option ``--name``, each below ``size``; None where it is not given. Raises PlancError: PLN012 for what
    is no range, PLN014 for numbers outside the plan."""
    if text is None:
        return None
    try:
        numbers = frozenset(parse_ranges(text))
    except ValueError as error:
        raise PlancError([Diagnostic("PLN012", str(error), span=Span(f"--{name}", 1, 1))]) from None
    if max(numbers) >= size:
        message = f"{name} {max(numbers)} is outside the plan: there are 0 to {size - 1}"
        raise PlancError([Diagnostic("PLN014", message, span=Span(f"--{name}", 1, 1))])
    return numbers


def _comprehensive(plan: VerifiedPlan, chosen: dict[str, frozenset[int] | None], as_svg: bool) -> str:
    from planc.render import comprehensive

    keep = Filter(chosen["layers"], chosen["nodes"], chosen["replica"])
    if not any(chosen.values()) and plan.blocks.op_count > comprehensive.MAX_OPS:
        message = f"a figure of all {plan.blocks.op_count:,} ops would be too large to open"
        raise PlancError([Diagnostic("PLN208", message, hint="draw a part with --layers, --nodes or --replica")])
    return comprehensive.comprehensive_svg(plan, keep) if as_svg else comprehensive.comprehensive_dot(plan, keep)


def _page(plan: VerifiedPlan, figure: str, chosen: dict[str, frozenset[int] | None], as_svg: bool) -> str:
    from planc.render import PAGE_FIGURES, detailed_view, dot, svg

    detailed = figure == "detailed_expert_dag"
    for name, numbers in chosen.items():
        if numbers is not None and not (detailed and name != "nodes" and len(numbers) == 1):
            allowed = "takes one --layers and one --replica" if detailed else "always shows the whole plan"
            message = f"--{name} does not fit this figure, which {allowed}"
            raise PlancError(
                [
                    Diagnostic(
                        "PLN111", message, span=Span(f"--{name}", 1, 1), hint="--figure comprehensive has all filters"
                    )
                ]
            )
    if detailed and not plan.placement.layers:
        raise PlancError([Diagnostic("PLN208", "the model has no experts to draw")])
    layer = min(chosen["layers"]) if chosen["layers"] else None
    if layer is not None and layer not in plan.placement.layers:
        raise PlancError([Diagnostic("PLN014", f"layer {layer} has no experts", span=Span("--layers", 1, 1))])
    view = detailed_view(plan, layer, min(chosen["replica"] or {0})) if detailed else PAGE_FIGURES[figure](plan)
    return svg(view) if as_svg else dot(view)


def _through_graphviz(text: str, form: str) -> bytes:
    """Lay out by the positions in the DOT (``neato -n2``), so that PNG and PDF look like the SVG."""
    import graphviz

    source = graphviz.Source(text, engine="neato")
    try:
        return bytes(source.pipe(format=form, neato_no_op=2))
    except (graphviz.ExecutableNotFound, graphviz.CalledProcessError) as error:
        raise PlancError([Diagnostic("PLN501", f"Graphviz did not draw the figure: {str(error)[:300]}")]) from None
