"""What ops hand to each other when a plan's graph is run, and what is raised where one cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planc.prove.model import Array
from planc.spec.fields import DTYPE_BYTES


class Broken(Exception):
    """The graph cannot be run, or computes what its op cannot mean: which op, and why."""

    def __init__(self, op: str, why: str) -> None:
        super().__init__(f"{op}: {why}")
        self.op, self.why = op, why


#: what Python raises where a plan that was not verified asks for what cannot be
WRONG = (ArithmeticError, AssertionError, AttributeError, LookupError, StopIteration, TypeError, ValueError)


@dataclass
class Routed:
    """Tokens on their way out: what a gate hands to dispatch."""

    tokens: Array
    chosen: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens."""
        return self.tokens.shape


@dataclass
class Rows:
    """Rows of one expert with where each is from: (member of the EP group, token, choice)."""

    values: Array
    origin: list[tuple[int, int, int]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows."""
        return self.values.shape


@dataclass
class Moved:
    """Bytes from rank to rank, by block of a collective or by class of an edge."""

    collectives: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    edges: dict[str, int] = field(default_factory=dict)


Value = Any
Members = list[list[Value]]  #: of every member of an op, what it reads on one port
Reads = dict[str, Members]
Out = dict[str, Value]


def value_bytes(value: Value, dtype: str) -> int:
    """Bytes of a value at a dtype of the spec."""
    array = (
        value.values if isinstance(value, Rows) else value.tokens if isinstance(value, Routed) else np.asarray(value)
    )
    return int(array.size) * DTYPE_BYTES[dtype]
