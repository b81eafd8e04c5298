"""PLN318: what a plan says of its placement follows from the placement and the loads that it states.

Link times need the traffic itself, which a plan does not hold; `planc.placement.known_traffic.link_faults` measures them
again where the traffic can be had.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

import numpy as np

from planc.diagnostics import Diagnostic
from planc.placement import LayerPlacement
from planc.planner.balance import lower_bound
from planc.planner.certificate import Certificate, LayerRecord
from planc.planner.record import gap_of, seconds_of, spare_points, spares_for
from planc.spec.model import expert_parameters
from planc.units import decode_numbers
from planc.verify.plan import Draft
from planc.verify.structure import FEW


def check_certificate(draft: Draft) -> Iterator[Diagnostic]:
    """PLN318: there is a certificate exactly where the policy is `topology`, and its numbers are those that follow."""
    record, moe = draft.certificate, draft.spec.model.moe
    if (record is not None) != (draft.spec.policy == "topology" and moe is not None):
        what = "has none" if record is None else "has one"
        yield _fault(f"a plan has a certificate where its policy is topology; this one ({draft.spec.policy}) {what}")
    if record is None or moe is None:
        return
    if tuple(layer.layer for layer in record.layers) != draft.spec.model.moe_layer_ids:
        yield _fault("the layers are not the model's MoE layers", "layers")
        return
    found: list[Diagnostic] = []
    loads = np.stack(
        [_numbers(layer.loads, moe.experts, f"layers.{i}.loads", found) for i, layer in enumerate(record.layers)]
    )
    nodes = _numbers(record.nodes, None, "nodes", found, draft.spec.cluster.nodes)
    if not found and (loads.sum(axis=1) <= 0).any():
        found.append(_fault("a layer without load", "layers"))
    if found:
        yield from found
        return
    yield from list(_layer_faults(draft, record, loads, nodes))[:FEW]
    yield from _sum_faults(draft, record, loads)


def _fault(message: str, path: str = "") -> Diagnostic:
    return Diagnostic(
        "PLN318",
        message,
        f"certificate.{path}" if path else "certificate",
        hint="build the plan again, or undo the edit",
    )


def _numbers(text: str, count: int | None, path: str, found: list[Diagnostic], most: int = 0) -> np.ndarray:
    """``count`` numbers, or up to ``most``."""
    try:
        numbers = decode_numbers(text, most if count is None else count)
    except ValueError as error:
        found.append(_fault(str(error), path))
        return np.ones(count or 0, dtype=np.int64)
    if count is not None and len(numbers) != count:
        found.append(_fault(f"{len(numbers)} numbers instead of {count}", path))
        return np.ones(count, dtype=np.int64)
    return numbers


def _differs(path: str, said: float | None, follows: float | None) -> Iterator[Diagnostic]:
    if said is None or follows is None:
        if said is not follows:
            yield _fault("link times are given for all objectives or for none", path)
    elif not isclose(said, follows, rel_tol=1e-9, abs_tol=1e-12):
        yield _fault(f"the file says {said:.9g}, the placement and its loads give {follows:.9g}", path)


def _layer_faults(draft: Draft, record: Certificate, loads: np.ndarray, nodes: np.ndarray) -> Iterator[Diagnostic]:
    """Imbalance with its bound, and the tokens that arrive at each node, layer by layer."""
    par = draft.parallelism
    for number, (layer, row) in enumerate(zip(record.layers, loads.astype(float), strict=True)):
        part, path = draft.placement.layers[layer.layer], f"layers.{number}"
        share = row[part.expert] / part.copies[part.expert]
        total = np.bincount(part.rank // par.expert_tp, weights=share, minlength=par.holders)
        yield from _differs(f"{path}.imbalance", layer.imbalance, float(total.max() / total.mean()))
        copies = max(len(part.expert), len(row))
        slots = -(-copies // par.holders)
        bound = float(lower_bound(row[None], copies, par.holders, slots)[0] / total.mean())
        yield from _differs(f"{path}.imbalance_bound", layer.imbalance_bound, bound)
        yield from _node_faults(draft, part, layer, share, nodes, path)


def _node_faults(
    draft: Draft, part: LayerPlacement, layer: LayerRecord, share: np.ndarray, nodes: np.ndarray, path: str
) -> Iterator[Diagnostic]:
    par = draft.parallelism
    first = int(par.stage_ranks(par.stage_of_layer(layer.layer))[0, 0])
    node = draft.spec.cluster.node_of_rank[first + part.rank]
    place = np.searchsorted(nodes, node)
    found: list[Diagnostic] = []
    said = _numbers(layer.node_tokens, len(nodes), f"{path}.node_tokens", found)
    yield from found
    if len(nodes) == 0 or (place >= len(nodes)).any() or (nodes[np.minimum(place, len(nodes) - 1)] != node).any():
        yield _fault("the nodes are not those that hold the experts", "nodes")
    elif not found and np.abs(said - np.bincount(place, weights=share, minlength=len(nodes))).max() > 0.51:
        yield _fault("the tokens that arrive at the nodes are others", f"{path}.node_tokens")


def _sum_faults(draft: Draft, record: Certificate, loads: np.ndarray) -> Iterator[Diagnostic]:
    o, b, held = record.objectives, record.bounds, record.held_out
    layers = record.layers
    dedup, direct = seconds_of(o.dedup), seconds_of(o.direct)
    planned, bound = (dedup, b.dedup_seconds) if record.transfer == "dedup" else (direct, b.direct_seconds)
    seen = planned is not None  # whether tokens were looked at
    even = [layer.imbalance for layer in layers]
    size = expert_parameters(draft.spec.model) * draft.spec.model.bytes_of("expert_weights")
    for path, said, follows in (
        ("objectives.imbalance", o.imbalance, float(np.mean(even))),
        ("objectives.worst_layer_imbalance", o.worst_layer_imbalance, max(even)),
        ("objectives.memory_spread", o.memory_spread, _memory_spread(draft) * size),
        (f"objectives.{record.transfer}.seconds", planned, sum(layer.seconds for layer in layers) if seen else None),
        ("bounds.imbalance", b.imbalance, float(np.mean([layer.imbalance_bound for layer in layers]))),
        (f"bounds.{record.transfer}_seconds", bound, sum(layer.bound_seconds for layer in layers) if seen else None),
        ("gaps.dedup_seconds", record.gaps.dedup_seconds, gap_of(dedup, b.dedup_seconds)),
        ("gaps.direct_seconds", record.gaps.direct_seconds, gap_of(direct, b.direct_seconds)),
        ("gaps.imbalance", record.gaps.imbalance, gap_of(o.imbalance, b.imbalance)),
        ("gaps.worst_case_seconds", record.gaps.worst_case_seconds, gap_of(o.worst_case_seconds, b.worst_case_seconds)),
    ):
        yield from _differs(path, said, follows)
    for path, value, least in (
        ("objectives.dedup.seconds", dedup, b.dedup_seconds),
        ("objectives.direct.seconds", direct, b.direct_seconds),
        ("objectives.imbalance", o.imbalance, b.imbalance),
        ("objectives.worst_case_seconds", o.worst_case_seconds, b.worst_case_seconds),
    ):
        if value is not None and least is not None and value < least * (1 - 1e-9):
            yield _fault(f"{value:.9g} is below its bound {least:.9g}", path)
    first = held.link_seconds if record.objective == "link" else held.imbalance
    if "result" not in first or min(first.values()) < first["result"] * (1 - 1e-8):
        yield _fault("the result is worse than what it was compared with", "held_out")
    relative = loads.astype(float)
    if record.spares != spare_points(relative, draft.parallelism.holders) or record.spares_for != spares_for(relative):
        yield _fault("the curve of spares does not follow from the loads", "spares")


def _memory_spread(draft: Draft) -> int:
    """Copies on the fullest node of a stage less those on the emptiest, the largest over stages."""
    par, worst = draft.parallelism, 0
    for stage in range(par.pp):
        ranks = par.stage_ranks(stage)[0]
        node = draft.spec.cluster.node_of_rank[ranks]
        parts = [p for layer, p in draft.placement.layers.items() if par.stage_of_layer(layer) == stage]
        if parts:
            held = np.bincount(np.concatenate([p.rank for p in parts]), minlength=par.ep)
            per_node = np.array([held[node == n].sum() for n in np.unique(node[:: par.expert_tp])])
            worst = max(worst, int(per_node.max() - per_node.min()))
    return worst
