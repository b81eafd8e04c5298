"""The certificate of a placement in words and tables: for a terminal, and for the plan document."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from planc.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from planc.planner import Certificate
    from planc.verify import VerifiedPlan

NAMES = {
    "planc": "planc's search",
    "identity": "identity (no map)",
    "longest_first": "longest first by node",
    "greedy": "EPLB's greedy",
    "hierarchical": "EPLB's greedy, groups on nodes",
    "current": "what runs now",
    "result": "the result",
}


class Row(NamedTuple):
    """One objective: what it is called, its value, the bound and the gap, all as text."""

    name: str
    value: str
    bound: str
    gap: str


def objective_rows(record: Certificate) -> list[Row]:
    """Every objective with its bound and gap, in the order in which they count."""
    o, b, g = record.objectives, record.bounds, record.gaps
    rows = []
    for mode, links, bound, gap in (
        ("dedup", o.dedup, b.dedup_seconds, g.dedup_seconds),
        ("direct", o.direct, b.direct_seconds, g.direct_seconds),
    ):
        if links is not None:
            planned = ", planned for" if mode == record.transfer else ""
            rows += [
                Row(f"busiest links, summed over layers ({mode}{planned})", *_times(links.seconds, bound, gap)),
                Row(f"busiest link of the worst layer ({mode})", format_seconds(links.worst_layer_seconds), "", ""),
                Row(f"most tokens across any single link ({mode})", f"{links.most_tokens:,.0f}", "", ""),
                Row(f"most bytes across any single link ({mode})", format_bytes(links.most_bytes), "", ""),
            ]
    rows += [
        Row("imbalance, mean over layers", f"{o.imbalance:.4f}", f"{b.imbalance:.4f}", _percent(g.imbalance)),
        Row("imbalance of the worst layer", f"{o.worst_layer_imbalance:.4f}", "", ""),
        Row("memory spread over nodes", _size(record, o.memory_spread), _size(record, b.memory_spread), ""),
    ]
    if o.bytes_to_move is not None:
        rows.append(
            Row(
                "to move from the current plan", _size(record, o.bytes_to_move), _size(record, b.bytes_to_move or 0), ""
            )
        )
    if record.scenarios and o.worst_case_seconds is not None:
        rows.append(
            Row(
                f"worst case of {1 + len(record.scenarios)} scenarios",
                *_times(o.worst_case_seconds, b.worst_case_seconds, g.worst_case_seconds),
            )
        )
    return rows


def _times(value: float, bound: float | None, gap: float | None) -> tuple[str, str, str]:
    return format_seconds(value), "" if bound is None else format_seconds(bound), "" if gap is None else _percent(gap)


def _percent(gap: float) -> str:
    return f"{100 * gap:.2f} %"


def _size(record: Certificate, value: int) -> str:
    """Bytes, or copies where the size of an expert is not known."""
    return format_bytes(value) if record.expert_bytes else f"{value:,} copies"


class Compared(NamedTuple):
    """One placement on the tokens that judge."""

    name: str
    seconds: str
    against: str
    imbalance: str
    layers: str


def compared_rows(record: Certificate) -> list[Compared]:
    """The result and what it was compared with, on held-out tokens; ``against``: how much less busy the result's links
    are."""
    held = record.held_out
    result = held.link_seconds.get("result", 0.0)
    rows = []
    for name in sorted(held.imbalance, key=lambda n: (n != "result", n)):
        seconds = held.link_seconds.get(name, 0.0)
        less = f"{100 * (1 - result / seconds):.1f} % less busy" if seconds and name != "result" else ""
        won = str(held.chosen.get(name, 0)) if name != "result" else ""
        shown = format_seconds(seconds) if seconds else "–"
        rows.append(Compared(NAMES[name], shown, less, f"{held.imbalance[name]:.4f}", won))
    return rows


def spare_rows(record: Certificate) -> list[tuple[str, str]]:
    """(spare GPUs, load of the fullest GPU in mean loads of an expert)."""
    return [(f"{point.spares:,}", f"{point.fullest:.3f}") for point in record.spares]


def placement_tables(record: Certificate, stream: IO[str]) -> None:
    """The report as tables on a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 120)
    judged = f"{record.held_out.tokens:,} held-out tokens" if record.held_out.tokens else "what was not held out"
    judged = judged if record.traffic.tokens else "the loads that judge"
    seen = f"{record.traffic.tokens:,} tokens a layer" if record.traffic.tokens else "loads only"
    table = Table(title=f"{record.traffic.name}: {seen}", title_justify="left")
    for heading in ("objective", "value", "bound", "gap"):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for row in objective_rows(record):
        table.add_row(*row)
    console.print(table)
    if record.bounds.why:
        console.print(f"the bound on links is most often that of {record.bounds.why}")
    table = Table(title=f"on {judged}", title_justify="left")
    for heading in ("placement", "busiest links", "the result is", "imbalance", "layers won"):
        table.add_column(heading, justify="left" if heading == "placement" else "right")
    for compared in compared_rows(record):
        table.add_row(*compared)
    console.print(table)
    curve = ", ".join(f"{spares}: {fullest}" for spares, fullest in spare_rows(record))
    console.print(f"spare GPUs: load of the fullest in mean loads of an expert (one expert a GPU): {curve}")
    needed = ", ".join(f"{target}: {spares}" for target, spares in record.spares_for.items())
    console.print(f"spare GPUs for a load of: {needed}")


def placement_facts(plan: VerifiedPlan) -> dict[str, Any]:
    """What the plan document says of a placement for known traffic."""
    record = plan.certificate
    assert record is not None
    return {
        "certificate": record,
        "objective_rows": objective_rows(record),
        "compared_rows": compared_rows(record),
        "spare_rows": spare_rows(record),
        "redundancy": redundancy_text(plan),
    }


def redundancy_text(plan: VerifiedPlan) -> str:
    """What a slow or lost GPU means for the experts it holds: how many have another copy, and on another node."""
    par, cluster = plan.parallelism, plan.spec.cluster
    total = several = apart = 0
    for layer, part in plan.placement.layers.items():
        first = int(par.stage_ranks(par.stage_of_layer(layer))[0, 0])
        node = cluster.node_of_rank[first + part.rank]
        copies = part.copies
        nodes = np.bincount(
            np.unique(part.expert.astype(np.int64) * cluster.nodes + node) // cluster.nodes, minlength=len(copies)
        )
        total += len(copies)
        several += int((copies > 1).sum())
        apart += int((nodes > 1).sum())
    text = f"Stragglers and failures: of {total:,} experts (over all layers of a replica) {several:,} have a second copy, {apart:,} on another node. "
    if not several:
        return (
            text + "A slow GPU slows its experts' layers by as much; spare GPUs with copies would share their tokens."
        )
    return text + (
        "Tokens of an expert with c copies can go to the other c − 1 when one is slow or lost; all other experts of a lost "
        "GPU must be loaded again."
    )
