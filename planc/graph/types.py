"""The compact graph: op blocks and edge blocks, with typed tensors between them.

A block stands for the ops of one kind, layer and micro-batch on many ranks; an edge block for the edges between
two blocks by one pattern. Everything per op or per edge (rows, experts) is an array, so a plan of 10,000 GPUs has
as many blocks as one of 16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from planc.spec.fields import DTYPE_BYTES

#: stands for a block's per-op row count in the first place of a shape
ROWS = -1

#: what an op is; collectives move data between the ranks of their group
COLLECTIVES = frozenset(
    {"input_split", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "dispatch", "combine"}
)
LOCAL_KINDS = frozenset(
    {
        "input",
        "embed",
        "attn_qkv",
        "attn_core",
        "attn_out",
        "residual_add",
        "dense_up",
        "dense_down",
        "gate",
        "shared_up",
        "shared_down",
        "expert",
        "aggregate",
        "pp_send",
        "pp_recv",
        "lm_head",
        "sample",
        "output_collect",
    }
)
KINDS = LOCAL_KINDS | COLLECTIVES

Comm = Literal["", "tp", "dispatch", "combine", "pp", "dp"]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape, dtype and layout of what an edge carries. Layout: ``R`` replicated over its group, ``S(axis)`` this
    rank's shard along an axis, ``P`` a partial sum. A first dimension of `ROWS` is the op's own row count."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = "R"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row when the first dimension is `ROWS`, else of the whole tensor."""
        elements = 1
        for size in self.shape:
            elements *= 1 if size == ROWS else size
        return elements * DTYPE_BYTES[self.dtype]

    def text(self, rows: int | None = None) -> str:
        """``[64, 7168] bf16 S(tokens)``; ``rows`` stands in for `ROWS`."""
        return f"{shape_text(self.shape, rows)} {self.dtype} {self.layout}"


def shape_text(shape: tuple[int, ...], rows: int | None = None) -> str:
    """``[64, 7168]``; `ROWS` is shown as ``rows``, or as ``m`` where it differs from op to op."""
    return "[" + ", ".join(str(("m" if rows is None else rows) if size == ROWS else size) for size in shape) + "]"


@dataclass(frozen=True, eq=False)
class OpBlock:
    """Like ops. ``ranks``: int32 [ops, group] (group 1 for local ops), in ascending order of the first rank.

    ``reads`` and ``writes``: port -> tensor type. ``rows``: int64 [ops] where a shape has `ROWS`. ``experts``:
    int32 [ops], the expert of each op. ``split`` is the degree by which this op's shards divide the whole.
    """

    name: str
    kind: str
    ranks: np.ndarray
    layer: int | None = None
    micro_batch: int = 0
    slot: int = 0
    split: int = 1
    reads: Mapping[str, TensorType] = field(default_factory=dict)
    writes: Mapping[str, TensorType] = field(default_factory=dict)
    rows: np.ndarray | None = None
    experts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def collective(self) -> bool:
        """Whether the op moves data inside a group of ranks."""
        return self.kind in COLLECTIVES

    def row_count(self, op: int) -> int | None:
        """Rows of one op, or None where its shapes are fixed."""
        return None if self.rows is None else int(self.rows[op])


@dataclass(frozen=True, eq=False)
class EdgeBlock:
    """Edges from a port of block ``source`` to a port of block ``target`` (indices into `PlanGraph.blocks`).

    ``pattern``: ``rank`` joins ops that share a rank; ``group:N`` ops whose ranks differ and whose first ranks are
    in one run of N; ``shift:K`` an op on rank r to the op on rank r + K; ``pairs`` the op numbers (counted in each
    block) listed in ``pairs`` [edges, 2].
    """

    source: int
    out: str
    target: int
    into: str
    tensor: TensorType
    pattern: str = "rank"
    comm: Comm = ""
    pairs: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class PlanGraph:
    """The step's graph in blocks. ``world_size`` bounds the ranks that ops may name."""

    blocks: tuple[OpBlock, ...]
    edges: tuple[EdgeBlock, ...]
    world_size: int

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Block name -> index."""
        return {block.name: i for i, block in enumerate(self.blocks)}

    @cached_property
    def first_op(self) -> np.ndarray:
        """Number of each block's first op, int64 [blocks + 1]; ops are numbered block by block."""
        return np.concatenate([[0], np.cumsum([len(b) for b in self.blocks])]).astype(np.int64)

    @property
    def op_count(self) -> int:
        """Ops of the expanded graph."""
        return int(self.first_op[-1])

    def op_id(self, block: int, op: int) -> str:
        """The op's text id: ``L3.expert.r17``, ``L3.dispatch.r0-63``."""
        return f"{self.blocks[block].name}.r{range_text(self.blocks[block].ranks[op].tolist())}"


def content(*arrays: np.ndarray) -> bytes:
    """What arrays hold, as a key: the same for equal arrays, whoever made them."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())
    return digest.digest()


def range_text(numbers: list[int]) -> str:
    """``[0, 1, 2, 7]`` -> ``0-2,7``; the inverse of `planc.spec.fields.parse_ranges` for ascending numbers."""
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:  # one run, as most groups of ranks are
        return f"{numbers[0]}-{numbers[-1]}"
    parts: list[str] = []
    i = 0
    while i < len(numbers):
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] == numbers[j] + 1:
            j += 1
        parts.append(str(numbers[i]) if i == j else f"{numbers[i]}-{numbers[j]}")
        i = j + 1
    return ",".join(parts)
