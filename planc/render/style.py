"""How figures look: one table. Kind of op by shape and fill, class of communication by stroke; dashed is communication
and nothing else. Colours are the Okabe-Ito set and light tints of it, readable in black text and to the colour-blind.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Shape = Literal["ellipse", "box", "parallelogram", "round"]


class OpStyle(NamedTuple):
    """Graphviz shape, fill, and the family that the legend explains."""

    shape: Shape
    fill: str
    family: str


ATTENTION, DENSE, ROUTING, EXPERT, IO = "#a9d8f4", "#f5cd73", "#f0e9a0", "#7fceb8", "#dddddd"
COMMUNICATION = "#ffffff"

OPS: dict[str, OpStyle] = {
    "input": OpStyle("round", IO, "input and output"),
    "input_split": OpStyle("box", COMMUNICATION, "collective"),
    "embed": OpStyle("ellipse", IO, "input and output"),
    "attn_qkv": OpStyle("ellipse", ATTENTION, "attention"),
    "attn_core": OpStyle("ellipse", ATTENTION, "attention"),
    "attn_out": OpStyle("ellipse", ATTENTION, "attention"),
    "residual_add": OpStyle("ellipse", "#ffffff", "sum"),
    "dense_up": OpStyle("ellipse", DENSE, "dense MLP"),
    "dense_down": OpStyle("ellipse", DENSE, "dense MLP"),
    "gate": OpStyle("parallelogram", ROUTING, "routing"),
    "expert": OpStyle("ellipse", EXPERT, "expert"),
    "shared_up": OpStyle("ellipse", "#c5e8dc", "shared expert"),
    "shared_down": OpStyle("ellipse", "#c5e8dc", "shared expert"),
    "aggregate": OpStyle("parallelogram", ROUTING, "routing"),
    "all_reduce": OpStyle("box", COMMUNICATION, "collective"),
    "reduce_scatter": OpStyle("box", COMMUNICATION, "collective"),
    "all_gather": OpStyle("box", COMMUNICATION, "collective"),
    "broadcast": OpStyle("box", COMMUNICATION, "collective"),
    "dispatch": OpStyle("box", COMMUNICATION, "collective"),
    "combine": OpStyle("box", COMMUNICATION, "collective"),
    "pp_send": OpStyle("ellipse", IO, "pipeline hand-over"),
    "pp_recv": OpStyle("ellipse", IO, "pipeline hand-over"),
    "lm_head": OpStyle("ellipse", IO, "input and output"),
    "sample": OpStyle("ellipse", IO, "input and output"),
    "output_collect": OpStyle("round", IO, "input and output"),
}

#: stroke of a communication edge, and of the outline of a collective, by class
COMMS: dict[str, str] = {
    "tp": "#b0467f",
    "dispatch": "#d55e00",
    "combine": "#0072b2",
    "pp": "#7a5c00",
    "dp": "#555555",
}
COMM_OF_KIND = {"dispatch": "dispatch", "combine": "combine", "input_split": "dp"}
DASH = "5 3"
FONT = "Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def comm_of(kind: str) -> str:
    """Communication class of a collective kind."""
    return COMM_OF_KIND.get(kind, "tp")
