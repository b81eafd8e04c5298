"""The file that `planc search -o` writes and `--resume` and `planc compare` read: its schema, `planc.search/1`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA = "planc.search/1"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SearchRow(_Part):
    """A candidate: its degrees and choices as `planc build` takes them, and the prediction that `planc estimate` gives for its
    plan (times in s, memory in B of the fullest GPU). Of a baseline that is no plan the numbers are null and ``reason`` says why;
    of a point of the front it says what decides. ``path_s``: seconds of the critical path by class of op."""

    name: str = ""
    reason: str = ""
    gpus: int
    dp: int
    pp: int
    ep: int
    tp: int
    expert_tp: int
    stages: list[int]
    gating: Literal["leader", "sharded"]
    tp_comm: Literal["all_reduce", "reduce_scatter"]
    rule: Literal["layer", "model", "none"]
    slots_per_gpu: int | None
    spares: Literal["idle", "replicate"]
    rounds: int | None
    one_expert_per_gpu: bool
    micro_batches: int
    split: Literal["balanced", "even"]
    batch: int | None
    serving: Literal["apart", "together"]
    dtypes: dict[str, str]
    tpot_s: float | None
    tpot_interval_s: list[float] | None
    tpot_floor_s: float | None
    ttft_s: float | None
    tps: float | None
    tps_per_gpu: float | None
    tps_per_user: float | None
    path_s: dict[str, float] | None
    memory_used_bytes: int | None
    memory_capacity_bytes: int | None
    tpot_bound_s: float | None = None


class Bounds(_Part):
    """What was asked for: seconds, tokens per second, numbers of GPUs."""

    tpot_s: float | None
    ttft_s: float | None
    tps: float | None
    gpus: list[int]


class Choices(_Part):
    """All of a candidate but its batch; ``dtypes``: pairs of a role and its dtype that differ from the spec's."""

    dp: int
    pp: int
    ep: int
    tp: int
    expert_tp: int
    gating: Literal["leader", "sharded"]
    tp_comm: Literal["all_reduce", "reduce_scatter"]
    micro_batches: int
    split: Literal["balanced", "even"]
    scope: Literal["layer", "model", "none"]
    spares: Literal["idle", "replicate"]
    serving: Literal["apart", "together"]
    dtypes: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class SimulatedRow(_Part):
    """Its numbers."""

    gpus: int
    step_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tpot_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ttft_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    tps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    tps_per_gpu: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Simulation(_Part):
    """One candidate that was simulated: its shape and batch with the numbers, or why it is no plan."""

    shape: Choices
    batch: int
    row: SimulatedRow | None
    refused: str


class SearchFile(_Part):
    """The result of a search. ``optimal``: whether no candidate of ``space`` can be better than ``winner``; else ``most`` is what
    one could be worth. ``pruned``: candidates that were not simulated, by reason."""

    schema_: Literal["planc.search/1"]
    name: str
    objective: Literal["tps", "tps-per-gpu", "tpot", "cost", "gpus"]
    bounds: Bounds
    space: dict[str, Any]
    candidates: int
    pruned: dict[str, int]
    simulated: int
    optimal: bool
    most: float | None
    winner: SearchRow
    one_expert_per_gpu: SearchRow | None
    several_experts_per_gpu: SearchRow | None
    top: Annotated[list[SearchRow], Field(min_length=1)]
    front: list[SearchRow]
    baselines: list[SearchRow]
    sensitivity: list[dict[str, Any]] = []
    pools: dict[str, Any] | None = None
    spec: dict[str, Any]
    sources: dict[str, str]
    fingerprint: str
    simulations: list[Simulation]

    model_config = ConfigDict(alias_generator=lambda name: name.rstrip("_"), populate_by_name=True)


def check_record(record: object) -> list[str]:
    """What is wrong with the result of a search as read; nothing where it is one."""
    try:
        SearchFile.model_validate(record)
    except ValidationError as error:
        return [f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in error.errors()]
    return []
