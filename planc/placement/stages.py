"""Pipeline stages: contiguous runs of layers, uneven where that balances what a rank reads."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from planc.placement.memory import kv_bytes_per_token
from planc.placement.mesh import Parallelism
from planc.spec import Spec
from planc.spec.model import attention_parameters, dense_mlp_parameters, expert_parameters, shared_parameters

#: dp, pp, ep, tp and expert_tp before the mesh is made
Degrees = dict[str, int]


def make_parallelism(spec: Spec, degrees: Degrees) -> Parallelism:
    """The mesh of legal degrees, with its pipeline stages balanced by the bytes a rank reads per layer."""
    asked = spec.parallelism
    if asked.stages:
        ends = [sum(asked.stages[: i + 1]) for i in range(len(asked.stages))]
        stages = tuple(zip([0, *ends[:-1]], ends, strict=True))
    else:
        stages = balanced_stages(_layer_costs(spec, degrees), degrees["pp"])
    return Parallelism(**degrees, stages=stages, gating=asked.gating, tp_comm=asked.tp_comm)


def _layer_costs(spec: Spec, degrees: Degrees) -> list[float]:
    """Bytes that a rank reads for each layer of a step: its weights there, and the KV cache of its sequences."""
    model, tp = spec.model, degrees["tp"]
    weight = model.bytes_of("weights")
    groups = degrees["dp"] * max(1, degrees["ep"] // tp)
    kv = -(-spec.workload.batch // groups) * spec.workload.context * kv_bytes_per_token(model, tp)
    attention = sum(attention_parameters(model, tp)) * weight + kv
    dense = dense_mlp_parameters(model) // tp * weight
    shared_tp = tp if spec.parallelism.gating == "leader" else 1  # as in `memory._replica_items`
    moe = 0.0
    if model.moe is not None:
        share = max(1.0, model.moe.experts * degrees["expert_tp"] / degrees["ep"]) / degrees["expert_tp"]
        moe = (
            share * expert_parameters(model) * model.bytes_of("expert_weights")
            + shared_parameters(model) // shared_tp * weight
        )
    is_moe = set(model.moe_layer_ids)
    return [attention + (moe if i in is_moe else dense) for i in range(model.layers)]


def balanced_stages(costs: list[float], stages: int) -> tuple[tuple[int, int], ...]:
    """Contiguous runs of at least one layer with the smallest largest sum of costs; earlier stages fill up first.

    Bisects the largest sum: whether one suffices is seen by filling stage after stage (``stages`` look-ups).
    """
    prefix = np.concatenate([[0.0], np.cumsum(costs)])
    low, high = max(*costs, prefix[-1] / stages) * (1 - 1e-9), float(prefix[-1])
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _filled(prefix, stages, middle) else (middle, high)
    ends = _filled(prefix, stages, high)
    assert ends is not None, "the sum of all costs suffices for any number of stages up to the layers"
    return tuple(pairwise([0, *ends]))


def _filled(prefix: np.ndarray, stages: int, limit: float) -> list[int] | None:
    """End of each stage when stages fill up to ``limit`` in turn and leave a layer for each that follows, or None."""
    layers, end, ends = len(prefix) - 1, 0, []
    for following in range(stages - 1, -1, -1):
        reach = int(np.searchsorted(prefix, prefix[end] + limit * (1 + 1e-9), side="right")) - 1
        end, start = min(reach, layers - following), end
        if end == start:
            return None
        ends.append(end)
    return ends if end == layers else None
