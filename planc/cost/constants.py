"""The constants of every family of ops, as a fit file writes them: quantities with units, shares, and plain exponents.

A field's comment names its part in the forms of `planc.cost.compute` and `planc.cost.transfer`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from planc.spec.fields import BytesPerSecond, Fraction, PositiveSeconds, Seconds, Strict

#: exponent of a smooth maximum: 1 adds, a large one takes the larger
Overlap = Annotated[float, Field(ge=0.5, le=64, allow_inf_nan=False)]
#: exponent of a power of sizes
Power = Annotated[float, Field(ge=-8, le=8, allow_inf_nan=False)]
#: a plain factor
Factor = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]
#: bandwidth at 2, 4 and 8 ranks, or over 2, 4 and 8 nodes
Bandwidths = Annotated[tuple[BytesPerSecond, BytesPerSecond, BytesPerSecond], Field(strict=False)]


class Gemm(Strict):
    """Dense GEMM."""

    overhead: PositiveSeconds
    compute_efficiency: Fraction
    memory_efficiency: Fraction
    overlap: Overlap
    tile_edge: Factor  #: rows plus columns of a tile cost this many elements of reuse
    prologue: Factor  #: depth that filling the pipeline costs a block
    step_latency: Seconds  #: least time a block needs per element of depth
    split_overhead: Seconds  #: adding up the parts of a split depth


class ExpertGemm(Strict):
    """Grouped GEMM of the experts, for one kind of load."""

    overhead: PositiveSeconds
    per_expert: Seconds  #: each expert with tokens
    per_routed: Seconds  #: each expert of the model, of which the sorting kernels keep count
    compute_efficiency: Fraction
    memory_efficiency: Fraction
    overlap: Overlap
    activation_passes: Factor  #: rows move this often through memory at peak bandwidth
    per_choice: Seconds  #: sorting, per (token, choice) of the whole group


class Xqa(Strict):
    """Grouped-query decode kernel."""

    overhead: PositiveSeconds
    block: PositiveSeconds  #: a block of up to 64 tokens
    token: Seconds  #: each further token of a block
    group_cost: Factor  #: how much longer a block of 32 heads takes
    group_power: Power
    split_overhead: Seconds
    memory_efficiency: Fraction
    overlap: Overlap


class Mmha(Strict):
    """Multi-head decode kernel."""

    overhead: PositiveSeconds
    block: PositiveSeconds
    token: Seconds
    split_overhead: Seconds  #: per doubling of the parts of a sequence
    memory_efficiency: Fraction
    l2_bandwidth: BytesPerSecond
    overlap: Overlap


class AttentionDecode(Strict):
    """MHA and GQA decode."""

    xqa: Xqa
    mmha: Mmha


class MlaDecode(Strict):
    """MLA decode."""

    overhead: PositiveSeconds
    block: PositiveSeconds  #: 64 cached tokens
    block_heads: Factor  #: more of it with a full tile of 64 heads
    sequence: Seconds
    sequence_heads: Factor
    start: Seconds  #: per doubling of the parts that a sequence can have
    memory_efficiency: Fraction
    query_efficiency: Fraction
    overlap: Overlap


class Nccl(Strict):
    """A collective of NCCL over 4 ranks, with powers of ranks ÷ 4."""

    ll_latency: PositiveSeconds
    ll_latency_power: Power
    ll_bandwidth: BytesPerSecond
    ll128_latency: Seconds
    ll128_latency_power: Power
    ll128_bandwidth: BytesPerSecond
    ll128_bandwidth_power: Power
    simple_latency: Seconds
    simple_bandwidth: Bandwidths


class CustomAllReduce(Strict):
    """One-shot and two-shot all-reduce over 4 ranks, with powers of ranks ÷ 4."""

    one_shot_latency: PositiveSeconds
    one_shot_latency_power: Power
    one_shot_bandwidth: BytesPerSecond
    one_shot_bandwidth_power: Power
    two_shot_latency: Seconds
    two_shot_latency_power: Power
    two_shot_bandwidth: BytesPerSecond
    two_shot_bandwidth_power: Power
    large_latency: Seconds
    large_bandwidth: Bandwidths


class LowLatency(Strict):
    """DeepEP low-latency dispatch or combine."""

    overhead: PositiveSeconds
    per_expert: Seconds
    per_hidden: Seconds
    remote_latency: Seconds
    nvlink_bandwidth: BytesPerSecond
    nic_bandwidth: BytesPerSecond
    pair_bandwidth: BytesPerSecond  #: of one pair of a sender and an expert
    overlap: Overlap


class Normal(Strict):
    """DeepEP normal dispatch or combine."""

    node_overhead: PositiveSeconds
    node_per_hidden: Seconds
    token_bandwidth: BytesPerSecond  #: of work per token, to however many ranks it goes
    nvlink_bandwidth: BytesPerSecond  #: of its copies to ranks
    node_overlap: Overlap  #: of those two
    filling: Seconds  #: until the channels are full
    overhead: PositiveSeconds
    per_node: Seconds
    nic_bandwidth: Bandwidths
    overlap: Overlap
