"""Degrees and the rank arithmetic that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from planc.spec import Cluster, Spec


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Resolved degrees. ``stages`` holds the layers of each pipeline stage as (first, end) pairs."""

    dp: int
    pp: int
    ep: int
    tp: int
    expert_tp: int
    stages: tuple[tuple[int, int], ...]
    gating: Literal["leader", "sharded"]
    tp_comm: Literal["all_reduce", "reduce_scatter"]

    @property
    def world_size(self) -> int:
        """dp × pp × ep."""
        return self.dp * self.pp * self.ep

    @property
    def replica_size(self) -> int:
        """Ranks of one model replica."""
        return self.pp * self.ep

    @property
    def stage_sizes(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(end - first for first, end in self.stages)

    @property
    def attention_dp(self) -> int:
        """TP groups of an EP group."""
        return self.ep // self.tp

    @property
    def holders(self) -> int:
        """G: places of an EP group that may hold an expert; each is ``expert_tp`` ranks."""
        return self.ep // self.expert_tp

    @property
    def leaders_gate(self) -> bool:
        """Whether only the first rank of a TP group gates (with tp 1 both modes are the same)."""
        return self.gating == "leader" and self.tp > 1

    def stage_of_layer(self, layer: int) -> int:
        """Pipeline stage that holds the layer."""
        return next(s for s, (first, end) in enumerate(self.stages) if first <= layer < end)

    def stage_ranks(self, stage: int) -> np.ndarray:
        """Ranks of a stage over all replicas, int32 [dp, ep]."""
        firsts = np.arange(self.dp, dtype=np.int32) * self.replica_size + stage * self.ep
        return firsts[:, None] + np.arange(self.ep, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens of one micro-batch of the planned step."""

    group: int  #: tokens t of a TP group
    source: int  #: tokens that one gating rank sends to dispatch
    logits: int  #: tokens of a TP group that need logits
    sequences: int  #: sequences of a TP group over all micro-batches, before padding
    padded: int  #: tokens of a step over all TP groups and micro-batches, after padding


def step_tokens(spec: Spec, par: Parallelism) -> StepTokens:
    """Tokens per TP group, padded so that every group runs the same shapes.

    Decode: one token a sequence, the batch shared over dp × attention DP × micro-batches and rounded up. Prefill:
    `prefill_chunk` tokens (one whole prompt by default). With sharded gating t is a multiple of tp.
    """
    work = spec.workload
    groups = par.dp * par.attention_dp
    sequences = -(-work.batch // groups)
    if work.phase == "decode":
        tokens = -(-sequences // work.micro_batches)
    else:
        tokens = -(-(work.prefill_chunk or work.isl) // work.micro_batches)
    if not par.leaders_gate:
        tokens = -(-tokens // par.tp) * par.tp
    source = tokens if par.leaders_gate else tokens // par.tp
    logits = tokens if work.phase == "decode" else max(1, tokens // work.isl)
    return StepTokens(tokens, source, logits, sequences, tokens * work.micro_batches * groups)


def tp_groups_fit(cluster: Cluster, tp: int) -> bool:
    """Whether every aligned run of ``tp`` ranks lies in one NVLink domain."""
    if tp == 1:
        return True
    domains = cluster.domain_of_rank
    whole = domains[: len(domains) // tp * tp].reshape(-1, tp)
    return len(domains) % tp == 0 and bool((whole[:, 0] == whole[:, -1]).all())
