"""Proof by execution: the plan's own graph, run on small numbers, against the model run whole."""

from __future__ import annotations

from planc.prove.proof import Proof, prove

__all__ = ["Proof", "prove"]
