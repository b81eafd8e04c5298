"""One layer (or, where a rule counts experts over all layers, all layers of a stage together): candidates, search, gate.

A **unit** is what shares slots. Its experts are numbered layer after layer, so one table holds them all; every layer of
it keeps its own link loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planc.planner.apportion import apportion
from planc.planner.balance import lower_bound, repacked
from planc.planner.baselines import greedy, hierarchical, identity, longest_first_by_node
from planc.planner.bounds import link_bound
from planc.planner.certificate import Name
from planc.planner.fabric import Fabric, Transfer
from planc.planner.links import Demand, LinkState, improve
from planc.planner.migration import nearest
from planc.planner.objectives import LayerLinks, Width, imbalance, layer_links
from planc.planner.tables import EMPTY, copies_of, copy_index, counts_of, table_of, tidy

Objective = Literal["link", "balance"]
MODES: tuple[Transfer, ...] = ("dedup", "direct")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of one layer: ``topk`` int [tokens, k]; ``source`` int64 [tokens], index into the fabric's sources."""

    topk: np.ndarray
    source: np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    """One layer's traffic: of the recording or of a scenario. ``held_out`` is None where nothing is kept aside."""

    train: Tokens
    held_out: Tokens | None

    @property
    def judged(self) -> Tokens:
        """The tokens that judge."""
        return self.train if self.held_out is None else self.held_out

    @property
    def all(self) -> Tokens:
        """Every token."""
        parts = [self.train] if self.held_out is None else [self.train, self.held_out]
        return Tokens(np.concatenate([p.topk for p in parts]), np.concatenate([p.source for p in parts]))


@dataclass(frozen=True, eq=False)
class Problem:
    """What all units have in common. ``copies``: of a unit, together; ``slots``: places on a holder, as few
    as hold the copies (so that holders differ by at most one)."""

    fabric: Fabric
    experts: int
    slots: int
    copies: int
    width: Width
    transfer: Transfer
    objective: Objective
    seed: int
    groups: int = 1  #: equal groups of experts in the gate


@dataclass(frozen=True, eq=False)
class Unit:
    """``loads``: float [2, layers · E], of training and of judging, and ``all_loads`` of both; ``samples``: layer -> the
    traffic, then scenarios (none where only loads matter). ``current``: the table that runs now; ``packed``: the even
    packing, and ``greedy``: the published one, for all loads; where there are any."""

    number: int
    loads: np.ndarray
    all_loads: np.ndarray
    samples: tuple[tuple[Sample, ...], ...]
    current: np.ndarray | None
    packed: np.ndarray | None
    greedy: np.ndarray | None


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One layer as planned; times in seconds for the tokens of its sample."""

    table: np.ndarray
    links: dict[Transfer, LayerLinks]  #: dedup and direct, on all tokens
    identity: LayerLinks | None
    bounds: dict[Transfer, tuple[float, str]]  #: seconds per transfer, and the argument
    imbalance: float
    imbalance_bound: float
    worst: float  #: seconds over all scenarios, each scaled to the tokens of the first
    worst_bound: float


@dataclass(frozen=True, eq=False)
class UnitResult:
    """A unit as planned. ``judged``: candidate -> (seconds on the tokens that judge, imbalance there)."""

    chosen: Name
    judged: dict[Name, tuple[float, float]]
    layers: list[LayerResult]


def plan_unit(problem: Problem, unit: Unit, *, search: bool = True) -> UnitResult:
    """Place one unit. ``search`` False leaves out the search: what remains is the best of the quick candidates."""
    tables = dict(_candidates(problem, unit, search))
    judged = {name: _judge(problem, unit, table) for name, table in tables.items()}
    chosen = min(judged, key=lambda name: _rank(problem, judged[name], name))
    table = tables[chosen]
    if chosen == "planc" and unit.samples and problem.objective == "link" and _is_small(problem):
        table = _fitted_to_all(problem, unit, table)
    if unit.current is not None:
        table = _moved_least(problem, unit, table)
    layers = range(_layers(problem, unit))
    return UnitResult(chosen, judged, [_result(problem, unit, i, table, tables["identity"]) for i in layers])


def _layers(problem: Problem, unit: Unit) -> int:
    return int(unit.loads.shape[1]) // problem.experts


def _part(problem: Problem, table: np.ndarray, layer: int) -> np.ndarray:
    """The copies of one layer of the unit, by the layer's own expert numbers."""
    first = layer * problem.experts
    inside = (table >= first) & (table < first + problem.experts)
    return np.where(inside, table - first, EMPTY).astype(np.int32)


# --- candidates ------------------------------------------------------------------------------------------------------


def _candidates(problem: Problem, unit: Unit, search: bool) -> Iterator[tuple[Name, np.ndarray]]:
    """Every placement to be judged. What a user would run otherwise is fitted to all tokens, which can only favour it;
    the search never sees the tokens that judge."""
    if unit.current is not None and _usable(problem, unit.current, len(unit.all_loads)):
        yield "current", tidy(unit.current)
    yield from _quick(problem, unit, unit.all_loads, unit.greedy)
    if problem.objective == "balance" or not unit.samples:
        if unit.packed is not None:
            yield "planc", tidy(unit.packed)
    elif search:
        starts = [table for _, table in _quick(problem, unit, unit.loads[0], None)]
        starts += (
            [unit.current] if unit.current is not None and _usable(problem, unit.current, len(unit.all_loads)) else []
        )
        yield "planc", _searched(problem, unit, _best_start(problem, unit, starts))


def _quick(
    problem: Problem, unit: Unit, loads: np.ndarray, ready: np.ndarray | None
) -> Iterator[tuple[Name, np.ndarray]]:
    """Placements that take no search, for loads float [E]. ``ready``: the greedy's table where it is there already."""
    holders = len(problem.fabric.holders)
    shape = holders, problem.slots, problem.copies
    yield "identity", identity(len(loads), *shape)
    yield "greedy", tidy(greedy(loads[None], *shape)[0] if ready is None else ready)
    if problem.groups > 1 and len(loads) == problem.experts:
        whole = hierarchical(loads, problem.fabric.node, problem.slots, problem.copies, problem.groups)
        if whole is not None:
            yield "hierarchical", tidy(whole)
    if unit.samples:  # it differs from the greedy in what crosses links
        counts = apportion(loads[None], problem.copies, holders)[0]
        yield "longest_first", tidy(longest_first_by_node(loads, counts, problem.fabric.node, problem.slots))


def _best_start(problem: Problem, unit: Unit, tables: list[np.ndarray]) -> np.ndarray:
    """The quick placement with the least busy links on some of the training tokens."""

    def seconds(table: np.ndarray) -> float:
        total = 0.0
        for layer, samples in enumerate(unit.samples):
            train = samples[0].train
            some = Tokens(train.topk[:_LOOK], train.source[:_LOOK])
            total += expected_seconds(problem, _part(problem, table, layer), some)
        return total

    return min(tables, key=seconds)


_LOOK = 1024  #: tokens that decide where the search starts


def _fitted_to_all(problem: Problem, unit: Unit, table: np.ndarray) -> np.ndarray:
    """The search once more from what the gate chose, on all tokens: with few links every token counts. It must not be worse
    on those that judge."""
    whole = replace(unit, samples=tuple(tuple(Sample(s.all, None) for s in layer) for layer in unit.samples))
    found = tidy(_searched(problem, whole, table))
    return found if _judge(problem, unit, found)[0] <= _judge(problem, unit, table)[0] * (1 + 1e-9) else table


def _usable(problem: Problem, table: np.ndarray, experts: int) -> bool:
    """Whether the current plan is one that could be planned: as many slots, the same number of copies, none twice."""
    if table.shape != (len(problem.fabric.holders), problem.slots):
        return False
    expert, holder = copies_of(table)
    distinct = len(np.unique(expert * len(table) + holder)) == len(expert)
    return distinct and len(expert) == problem.copies and len(np.unique(expert)) == experts


def _searched(problem: Problem, unit: Unit, start: np.ndarray) -> np.ndarray:
    """The link search from a placement; the GPUs of a node then share its copies as evenly as can be."""
    expert, holder = copies_of(start)
    demand = _demand(problem, unit, counts_of(start, unit.loads.shape[1]))
    item = np.append(expert, np.full(start.size - len(expert), EMPTY))
    at = np.append(holder, np.repeat(np.arange(len(start)), (start == EMPTY).sum(axis=1)))
    small = _is_small(problem)
    state = LinkState(problem.fabric, demand, len(item), at, problem.transfer, smooth=not small)
    improve(state, item, problem.seed + unit.number, small)
    table = table_of(expert, state.at[: len(expert)], *start.shape)
    return table if problem.slots == 1 else tidy(repacked(table, unit.loads[0], problem.fabric.node))


def _is_small(problem: Problem) -> bool:
    return len(problem.fabric.holders) * problem.slots <= SMALL


SMALL = 16  #: up to so many slots every swap is measured, and the search starts again from shaken placements


def _demand(problem: Problem, unit: Unit, counts: np.ndarray) -> Demand:
    """Rows of the training tokens: a block for every layer of the unit and scenario."""
    rows, copies, sources, blocks = [], [], [], []
    weight: list[float] = []
    first, sources_there = 0, len(problem.fabric.sources)
    for layer, samples in enumerate(unit.samples):
        for sample in samples:
            tokens = sample.train
            chosen = copy_index(
                counts, tokens.topk.astype(np.int64) + layer * problem.experts, tokens.source, sources_there
            )
            number = len(tokens.source)
            rows.append(np.repeat(np.arange(first, first + number), chosen.shape[1]))
            copies.append(chosen.reshape(-1))
            sources.append(tokens.source)
            blocks.append(np.full(number, len(weight)))
            weight.append(1.0 / max(1, number))
            first += number
    return Demand(
        np.concatenate(rows), np.concatenate(copies), np.concatenate(sources), np.concatenate(blocks), np.array(weight)
    )


# --- the gate --------------------------------------------------------------------------------------------------------


#: the quieter change wins a tie: what is there now, then what engines do without a map
_ORDER: tuple[Name, ...] = ("current", "identity", "planc", "longest_first", "greedy", "hierarchical")


def _judge(problem: Problem, unit: Unit, table: np.ndarray) -> tuple[float, float]:
    """(link seconds, imbalance) on the tokens that judge: summed, and averaged, over the unit's layers. The seconds are
    the worst over all scenarios, each scaled to the tokens of the first."""
    layers = _layers(problem, unit)
    seconds = 0.0
    for layer, samples in enumerate(unit.samples):
        part = _part(problem, table, layer)
        seconds += max(expected_seconds(problem, part, s.judged) * _scale(samples, s, judged=True) for s in samples)
    evenness = [imbalance(_part(problem, table, i), row) for i, row in enumerate(unit.loads[1].reshape(layers, -1))]
    return seconds, float(np.mean(evenness))


def expected_seconds(problem: Problem, table: np.ndarray, tokens: Tokens) -> float:
    """Time of the busiest link in dispatch and combine that these tokens lead to expect.

    The most loaded of hundreds of links in a small sample is mostly noise, and the noise is the sources': so each source's
    counts are drawn towards its pod's by how little was seen of it, as in the search (`LinkState`). A few links are taken
    as they are.
    """
    expert, holder = copies_of(table)
    demand = demand_of(problem, table, tokens)
    state = LinkState(problem.fabric, demand, len(expert), holder, problem.transfer, smooth=not _is_small(problem))
    return float(state.utilization().max()) * (problem.width.dispatch + problem.width.combine)


def demand_of(problem: Problem, table: np.ndarray, tokens: Tokens) -> Demand:
    """One layer's tokens as rows of one block, every copy by its number."""
    counts = counts_of(table, problem.experts)
    chosen = copy_index(counts, tokens.topk.astype(np.int64), tokens.source, len(problem.fabric.sources))
    number, k = chosen.shape
    return Demand(
        np.repeat(np.arange(number), k), chosen.reshape(-1), tokens.source, np.zeros(number, dtype=np.int64), np.ones(1)
    )


def _scale(samples: tuple[Sample, ...], sample: Sample, *, judged: bool) -> float:
    first, this = (s.judged if judged else s.all for s in (samples[0], sample))
    return len(first.source) / max(1, len(this.source))


def _links(problem: Problem, table: np.ndarray, tokens: Tokens, transfer: Transfer) -> LayerLinks:
    args = problem.fabric, table, tokens.topk, tokens.source, problem.experts
    return layer_links(*args, transfer, problem.width)


def _rank(problem: Problem, judged: tuple[float, float], name: Name) -> tuple[float, float, int]:
    """What is put first, then the other, then the order of `_ORDER`."""
    seconds, evenness = (float(f"{value:.9g}") for value in judged)
    order = _ORDER.index(name)
    return (seconds, evenness, order) if problem.objective == "link" else (evenness, seconds, order)


def _moved_least(problem: Problem, unit: Unit, table: np.ndarray) -> np.ndarray:
    assert unit.current is not None

    def judge(candidate: np.ndarray) -> float:
        return _judge(problem, unit, candidate)[0]

    return tidy(nearest(problem.fabric, table, unit.current, judge))


# --- the result ------------------------------------------------------------------------------------------------------


def _result(problem: Problem, unit: Unit, layer: int, table: np.ndarray, plain: np.ndarray) -> LayerResult:
    part = _part(problem, table, layer)
    row = unit.all_loads.reshape(-1, problem.experts)[layer]
    copies = max(int((part != EMPTY).sum()), problem.experts)
    mean = row.sum() / len(part)
    fullest = float(lower_bound(row[None], copies, len(part), -(-copies // len(part)))[0])
    evenness = imbalance(part, row), fullest / mean
    if not unit.samples:
        return LayerResult(part, {}, None, {}, *evenness, 0.0, 0.0)
    samples, mode = unit.samples[layer], problem.transfer
    tokens = samples[0].all
    links = {m: _links(problem, part, tokens, m) for m in MODES}
    bounds = {m: _bound(problem, part, tokens, m) for m in MODES}
    worst, worst_bound = links[mode].seconds, bounds[mode][0]
    for sample in samples[1:]:
        scale = _scale(samples, sample, judged=False)
        worst = max(worst, _links(problem, part, sample.all, mode).seconds * scale)
        worst_bound = max(worst_bound, _bound(problem, part, sample.all, mode)[0] * scale)
    base = _links(problem, _part(problem, plain, layer), tokens, mode)
    return LayerResult(part, links, base, bounds, *evenness, worst, worst_bound)


def _bound(problem: Problem, part: np.ndarray, tokens: Tokens, transfer: Transfer) -> tuple[float, str]:
    """Seconds of dispatch and combine that no placement of these copies is below."""
    demand = demand_of(problem, part, tokens)
    copies = int((part != EMPTY).sum())
    per_byte, why = link_bound(problem.fabric, demand, copies, problem.slots, transfer)
    return per_byte * (problem.width.dispatch + problem.width.combine), why
