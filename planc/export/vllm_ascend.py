"""vLLM-Ascend: a static expert map, the experts of every device."""

from __future__ import annotations

import json
from collections.abc import Iterator

from planc.diagnostics import Diagnostic
from planc.export.slots import slot_faults, slot_tables
from planc.export.target import Job, refusal
from planc.verify import VerifiedPlan

TITLE, MAP = "vLLM-Ascend", "expert_map.json"


def faults(job: Job) -> Iterator[Diagnostic]:
    """What vLLM-Ascend cannot be told."""
    par, title = job.plan.parallelism, TITLE
    yield from slot_faults(job.plan, title)
    if par.expert_tp > 1:
        message = f"an expert map places whole experts, and here {par.expert_tp} GPUs share one"
        yield refusal(title, message, "set parallelism.expert_tp: 1", "parallelism.expert_tp")
    if par.pp > 1:
        message = "every pipeline stage counts its MoE layers from 0, and would read the map of the first stage"
        yield refusal(title, message, "set parallelism.pp: 1", "parallelism.pp")


def map_text(plan: VerifiedPlan) -> str:
    """The map: MoE layers and devices are counted from 0, in order, as the engine reads them."""
    layers = []
    for number, (_, table) in enumerate(sorted(slot_tables(plan).items())):
        devices = [{"device_id": rank, "device_expert": held} for rank, held in enumerate(table.tolist())]
        layers.append(json.dumps({"layer_id": number, "device_count": len(table), "device_list": devices}))
    return f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n' + ",\n".join(layers) + "\n]}\n"
