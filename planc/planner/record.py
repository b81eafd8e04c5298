"""From planned units to the certificate: sums over layers, scaled to the tokens that the numbers are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from planc.planner.apportion import copies_for, smallest_largest_share
from planc.planner.certificate import (
    Bounds,
    Certificate,
    Gaps,
    HeldOut,
    KindRecord,
    LayerRecord,
    LinkRecord,
    Name,
    Objectives,
    SparePoint,
    TrafficRecord,
)
from planc.planner.fabric import Transfer
from planc.planner.layer import LayerResult, Problem, UnitResult
from planc.planner.objectives import copies_to_move, memory_spread
from planc.planner.plan import Group, Planned, units_of, whole_loads
from planc.planner.tables import EMPTY
from planc.routing.traffic import Traffic
from planc.topology import LINK_KINDS
from planc.units import encode_numbers

TARGETS = (3.0, 2.0, 1.5, 1.25, 1.1)  #: load of the fullest holder, relative, for which spares are counted


def tables_of(planned: Planned) -> np.ndarray:
    """Slot tables of all layers by row of the traffic, int32 [layers, holders, slots]; groups of other EP groups have
    holders of their own."""
    tables = [result.layers[inside].table for _, _, inside, result in units_of(planned)]
    slots = max(table.shape[1] for table in tables)
    return np.stack([np.pad(t, ((0, 0), (0, slots - t.shape[1])), constant_values=EMPTY) for t in tables])


def certificate(
    planned: Planned,
    traffic: Traffic,
    scenarios: Sequence[Traffic],
    *,
    layers: Sequence[int],
    tokens: float | None,
    expert_bytes: int | None,
) -> Certificate:
    """The record of what was planned.

    ``layers``: model layer of each row of the traffic; ``tokens``: of an EP group, for which times are given (None: those
    of the sample); ``expert_bytes``: of one expert on a holder, None where that is not known.
    """
    problem = planned.groups[0].problem
    rows = list(units_of(planned))
    seen = _sample_tokens(traffic, rows)
    scale = (tokens if tokens is not None else float(sum(seen))) / max(1, sum(seen))
    results = [result.layers[inside] for _, _, inside, result in rows]
    objectives = _objectives(planned, results, scale, expert_bytes)
    bounds = _bounds(planned, results, scale, expert_bytes)
    every = whole_loads(traffic)
    return Certificate(
        policy="topology",
        objective=problem.objective,
        transfer=problem.transfer,
        tokens=sum(seen) * scale,
        slots=problem.slots,
        copies=int((results[0].table != EMPTY).sum()),
        expert_bytes=expert_bytes,
        seed=problem.seed,
        interrupted=planned.interrupted,
        traffic=_source(traffic, seen),
        scenarios=[_source(s, seen) for s in scenarios],
        objectives=objectives,
        bounds=bounds,
        gaps=Gaps(
            dedup_seconds=gap_of(seconds_of(objectives.dedup), bounds.dedup_seconds),
            direct_seconds=gap_of(seconds_of(objectives.direct), bounds.direct_seconds),
            imbalance=objectives.imbalance / bounds.imbalance - 1,
            worst_case_seconds=gap_of(objectives.worst_case_seconds, bounds.worst_case_seconds),
        ),
        held_out=_held_out(planned, seen, scale),
        nodes=encode_numbers(_nodes(planned).tolist()),
        layers=[_layer(r, layers[r[1]], every[r[1]], scale, _nodes(planned)) for r in rows],
        kinds=_kinds(problem, results, scale),
        spares=spare_points(every, len(problem.fabric.holders)),
        spares_for=spares_for(every),
    )


def gap_of(value: float | None, bound: float | None) -> float | None:
    """Objective ÷ bound − 1: None without an objective, 0 where the bound is zero."""
    if value is None or bound is None:
        return None
    return value / bound - 1 if bound else 0.0


def seconds_of(links: LinkRecord | None) -> float | None:
    """Summed busiest-link seconds, where tokens were looked at."""
    return None if links is None else links.seconds


def _sample_tokens(traffic: Traffic, rows: Sequence[tuple[Group, int, int, UnitResult]]) -> tuple[int, int]:
    """(tokens to optimise on, tokens that judge alone) of a layer."""
    from planc.planner.plan import cut_samples

    group = rows[0][0]
    if traffic.tokens is None and group.problem.objective == "balance":
        return 0, 0
    cut = cut_samples(traffic, 1, len(group.problem.fabric.sources), 0)
    return len(cut.train[1]), 0 if cut.held_out is None else len(cut.held_out[1])


def _source(traffic: Traffic, seen: tuple[int, int]) -> TrafficRecord:
    return TrafficRecord(
        name=traffic.name, origin=traffic.origin, sha256=traffic.digest, tokens=sum(seen), held_out=seen[1]
    )


def _objectives(planned: Planned, results: Sequence[LayerResult], scale: float, expert_bytes: int | None) -> Objectives:
    spread = max(memory_spread(_tables(planned, group), group.problem.fabric.node) for group in planned.groups)
    unit = expert_bytes or 1
    return Objectives(
        dedup=_links(results, "dedup", scale),
        direct=_links(results, "direct", scale),
        imbalance=float(np.mean([r.imbalance for r in results])),
        worst_layer_imbalance=float(max(r.imbalance for r in results)),
        memory_spread=spread * unit,
        bytes_to_move=_moved(planned, unit),
        worst_case_seconds=sum(r.worst for r in results) * scale if results[0].links else None,
    )


def _tables(planned: Planned, group: Group) -> np.ndarray:
    return np.stack([result.layers[i].table for g, _, i, result in units_of(planned) if g is group])


def _links(results: Sequence[LayerResult], mode: Transfer, scale: float) -> LinkRecord | None:
    links = [r.links[mode] for r in results if r.links]
    if not links:
        return None
    return LinkRecord(
        seconds=sum(part.seconds for part in links) * scale,
        worst_layer_seconds=max(part.seconds for part in links) * scale,
        most_tokens=max(part.most_tokens for part in links) * scale,
        most_bytes=max(part.most_bytes for part in links) * scale,
    )


def _moved(planned: Planned, unit: int) -> int | None:
    if all(group.current is None for group in planned.groups):
        return None
    moved = 0
    for group, row, inside, result in units_of(planned):
        if group.current is not None:
            moved += copies_to_move(group.current[group.rows.index(row)], result.layers[inside].table)
    return moved * unit


def _bounds(planned: Planned, results: Sequence[LayerResult], scale: float, expert_bytes: int | None) -> Bounds:
    problem, unit = planned.groups[0].problem, expert_bytes or 1
    why = Counter(r.bounds[problem.transfer][1] for r in results if r.bounds)
    held = sum(int((r.table != EMPTY).sum()) for r in results)
    even = held % len(problem.fabric.node_numbers) == 0
    return Bounds(
        dedup_seconds=sum(r.bounds["dedup"][0] for r in results) * scale if results[0].bounds else None,
        direct_seconds=sum(r.bounds["direct"][0] for r in results) * scale if results[0].bounds else None,
        imbalance=float(np.mean([r.imbalance_bound for r in results])),
        memory_spread=0 if even or len(planned.groups) > 1 else unit,
        bytes_to_move=_must_move(planned, unit),
        worst_case_seconds=sum(r.worst_bound for r in results) * scale if results[0].bounds else None,
        why=min(why, key=lambda text: (-why[text], text)) if why else "",
    )


def _must_move(planned: Planned, unit: int) -> int | None:
    """Copies that the plan has beyond those there are now must be loaded wherever they are put."""
    if all(group.current is None for group in planned.groups):
        return None
    moved = 0
    for group, row, inside, result in units_of(planned):
        if group.current is not None:
            size = group.problem.experts
            now, then = (
                np.bincount(t[t != EMPTY], minlength=size)
                for t in (group.current[group.rows.index(row)], result.layers[inside].table)
            )
            moved += int(np.maximum(then - now, 0).sum())
    return moved * unit


def _held_out(planned: Planned, seen: tuple[int, int], scale: float) -> HeldOut:
    units = [result for _, _, result in planned.units]
    names: list[Name] = sorted({name for result in units for name in result.judged})
    judged = seen[1] or seen[0]
    stretch = scale * sum(seen) / max(1, judged)
    compared = [name for name in names if all(name in result.judged for result in units)]
    seconds: dict[str, float] = {n: sum(r.judged[n][0] for r in units) * stretch for n in compared}
    seconds["result"] = sum(r.judged[r.chosen][0] for r in units) * stretch
    return HeldOut(
        tokens=seen[1],
        link_seconds=seconds if judged else {},
        imbalance={n: float(np.mean([r.judged[n][1] for r in units])) for n in compared}
        | {"result": float(np.mean([r.judged[r.chosen][1] for r in units]))},
        chosen=dict(sorted(Counter(str(r.chosen) for r in units).items())),
    )


def _nodes(planned: Planned) -> np.ndarray:
    return np.unique(np.concatenate([group.problem.fabric.node_numbers for group in planned.groups]))


def _layer(
    row: tuple[Group, int, int, UnitResult], layer: int, loads: np.ndarray, scale: float, nodes: np.ndarray
) -> LayerRecord:
    group, _, inside, result = row
    found, problem = result.layers[inside], group.problem
    mode = problem.transfer
    counts = np.bincount(found.table[found.table != EMPTY], minlength=len(loads))
    share = np.append(loads / np.maximum(counts, 1), 0.0)
    arriving = np.zeros(len(nodes))
    node = np.searchsorted(nodes, problem.fabric.node_numbers[problem.fabric.node])
    np.add.at(arriving, node, share[found.table].sum(axis=1))
    return LayerRecord(
        layer=layer,
        chosen=result.chosen,
        seconds=(found.links[mode].seconds if found.links else 0.0) * scale,
        identity_seconds=(found.identity.seconds if found.identity else 0.0) * scale,
        bound_seconds=(found.bounds[mode][0] if found.bounds else 0.0) * scale,
        busiest=found.links[mode].busiest[0] if found.links else "",
        imbalance=found.imbalance,
        imbalance_bound=found.imbalance_bound,
        loads=encode_numbers(loads.astype(np.int64).tolist()),
        node_tokens=encode_numbers(np.rint(arriving).astype(np.int64).tolist()),
    )


def _kinds(problem: Problem, results: Sequence[LayerResult], scale: float) -> list[KindRecord]:
    with_links = [r for r in results if r.links]
    if not with_links:
        return []
    mode = problem.transfer
    busiest = np.mean([r.links[mode].busiest_by_kind() for r in with_links], axis=0) * scale
    plain = np.mean([r.identity.busiest_by_kind() for r in with_links if r.identity], axis=0) * scale
    kinds = problem.fabric.topology.kind_of_link
    rows = []
    for number, kind in enumerate(LINK_KINDS):
        used = np.zeros(int((kinds == number).sum()), dtype=bool)
        mean = 0.0
        for r in with_links:
            part = r.links[mode].dispatch
            used |= part.tokens[kinds == number] > 0
            mean += float(part.utilization(problem.width.dispatch)[kinds == number].sum())
        if used.any():
            average = mean * scale / len(with_links) / int(used.sum())
            rows.append(
                KindRecord(
                    kind=kind,
                    links=int(used.sum()),
                    busiest_seconds=float(busiest[number]),
                    mean_seconds=average,
                    identity_seconds=float(plain[number]),
                )
            )
    return rows


# --- spares ----------------------------------------------------------------------------------------------------------


def spare_points(loads: np.ndarray, holders: int) -> list[SparePoint]:
    """Fullest holder against the number of spares, one expert a holder; mean over layers. ``loads``: float [layers, E]."""
    experts = loads.shape[1]
    steps = {0, 1, *(experts * n // 16 for n in (1, 2, 3, 4, 6, 8, 12, 16))}
    if experts <= holders <= 2 * experts:
        steps.add(holders - experts)
    mean = loads.mean(axis=1)
    return [
        SparePoint(spares=n, fullest=float((smallest_largest_share(loads, experts + n, experts + n) / mean).mean()))
        for n in sorted(steps)
    ]


def spares_for(loads: np.ndarray) -> dict[str, int]:
    """Target -> spares so that no holder carries more than it times the mean load of an expert, in any layer:
    Σ⌈load ÷ (target · mean)⌉ − E, the largest over layers."""
    relative = loads / loads.mean(axis=1, keepdims=True)
    return {f"{target:g}": int((copies_for(relative, target) - loads.shape[1]).max()) for target in TARGETS}
