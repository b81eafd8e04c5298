"""What a plan made for known traffic says of its placement: objectives, bounds, gaps, and how it did on held-out tokens.

Plain values, so that the same record goes into plan.json, the plan document, the figures and ``planc place --json``.
Times are for ``tokens`` tokens of an EP group: those of the sample as it is, or of the planned step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Name = Literal["planc", "identity", "longest_first", "greedy", "hierarchical", "current"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrafficRecord(_Part):
    """Where the traffic came from. ``tokens`` were looked at, the last ``held_out`` of them only to judge by."""

    name: str
    origin: str
    sha256: str
    tokens: int
    held_out: int


class LinkRecord(_Part):
    """One way of transfer. ``seconds``: sum over layers of the time of the busiest link in dispatch and of that in
    combine; ``worst_layer_seconds``: the largest of the summands; ``most_tokens`` and ``most_bytes``: across any single
    link in any layer."""

    seconds: float
    worst_layer_seconds: float
    most_tokens: float
    most_bytes: float


class Objectives(_Part):
    """In the order in which they count. ``imbalance``: fullest over mean holder, mean over layers. ``memory_spread``:
    expert bytes on the fullest node less those on the emptiest; ``bytes_to_move``: against the current plan. The last two
    count copies where the expert's size is not known. ``worst_case_seconds``: of the transfer planned for, over the
    traffic and all scenarios, each scaled to the same tokens. Link times are None where only loads are known and balance
    comes first: no tokens were looked at."""

    dedup: LinkRecord | None
    direct: LinkRecord | None
    imbalance: float
    worst_layer_imbalance: float
    memory_spread: int
    bytes_to_move: int | None
    worst_case_seconds: float | None


class Bounds(_Part):
    """No placement of these copies is below these, on the same tokens. ``why``: the argument that binds most often."""

    dedup_seconds: float | None
    direct_seconds: float | None
    imbalance: float
    memory_spread: int
    bytes_to_move: int | None
    worst_case_seconds: float | None
    why: str


class Gaps(_Part):
    """Objective ÷ bound − 1."""

    dedup_seconds: float | None
    direct_seconds: float | None
    imbalance: float
    worst_case_seconds: float | None


class HeldOut(_Part):
    """On tokens that were not optimised on (``tokens`` 0: there were none, all tokens judge). Per placement that was
    compared: the link seconds that these tokens lead to expect, of the transfer planned for (see
    `planc.planner.layer.expected_seconds`; empty without tokens), and mean imbalance; ``chosen``: layers that each one won."""

    tokens: int
    link_seconds: dict[str, float]
    imbalance: dict[str, float]
    chosen: dict[str, int]


class LayerRecord(_Part):
    """One MoE layer on the tokens looked at: busiest-link ``seconds`` (dispatch and combine) beside those of identity
    placement and the bound; the busiest link's name; ``loads``: tokens of each expert, and ``node_tokens``: tokens that
    arrive at each node's experts (a token counts once per expert), as number lists (see `planc.verify.codec`)."""

    layer: int
    chosen: str
    seconds: float
    identity_seconds: float
    bound_seconds: float
    busiest: str
    imbalance: float
    imbalance_bound: float
    loads: str
    node_tokens: str


class KindRecord(_Part):
    """One kind of link: how many carry something; time of the busiest and mean time of all, mean over layers (dispatch),
    and the busiest under identity placement."""

    kind: str
    links: int
    busiest_seconds: float
    mean_seconds: float
    identity_seconds: float


class SparePoint(_Part):
    """With so many holders beyond one per expert, the best replication leaves the fullest holder so many times the mean
    load of an expert (mean over layers; the same unit for every number of spares)."""

    spares: int
    fullest: float


class Certificate(_Part):
    """The whole record. ``objective``: what was put first; ``transfer``: how dispatch sends; ``nodes``: numbers of the
    nodes that `LayerRecord.node_tokens` lists."""

    policy: Literal["topology"]
    objective: Literal["link", "balance"]
    transfer: Literal["dedup", "direct"]
    tokens: float
    slots: int
    copies: int
    expert_bytes: int | None
    seed: int
    interrupted: bool
    traffic: TrafficRecord
    scenarios: list[TrafficRecord]
    objectives: Objectives
    bounds: Bounds
    gaps: Gaps
    held_out: HeldOut
    nodes: str
    layers: list[LayerRecord]
    kinds: list[KindRecord]
    spares: list[SparePoint]
    spares_for: dict[str, int] = {}  #: load of the fullest holder as above, in every layer -> spares needed
