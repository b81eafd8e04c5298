"""The text of a fit file."""

from __future__ import annotations

import json
from typing import Any

from .families import tree
from .judge import Judged

_PLAIN = ("overlap", "power", "_cost", "_heads", "prologue", "tile_edge", "_passes")


def _quantity(name: str, value: float) -> str:
    if name.endswith("bandwidth"):
        return f"{value / 1e9:.4g} GB/s"
    if name.endswith("efficiency"):
        return f"{value * 100:.4g} %"
    if name.endswith(_PLAIN):
        return f"{value:.4g}"
    return f"{value * 1e9:.4g} ns" if value < 1e-7 else f"{value * 1e6:.4g} us"


def _quoted(text: str) -> str:
    """A YAML string: JSON's quotes and escapes are YAML's too."""
    return json.dumps(text, ensure_ascii=False)


def _written(values: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_written(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: [{', '.join(_quantity(name, part) for part in value)}]")
        else:
            lines.append(f"{indent}{name}: {_quantity(name, value)}")
    return lines


def fit_text(
    gpu: str,
    source: str,
    sms: int,
    judged: list[Judged],
    absent: tuple[str, ...] = (),
    writer: str = "benchmarks/accuracy.py",
    like: str = "",
) -> str:
    """A fit file that `planc.cost.load_fit` accepts where every family is judged or ``absent``. ``sms``: streaming
    multiprocessors; ``writer``: the program that its first line names; ``like``: a GPU with the same chip."""
    head = [
        f"# Fitted times of {gpu}; written by {writer}. What each constant is: planc/cost/constants.py.",
        "# `interval`: the middle 90 % of measured ÷ predicted, inside the fitted sizes (`valid`) and outside them.",
        f"gpu: {gpu}",
        f"source: {_quoted(source)}",
        f"sms: {sms}",
    ]
    if like:
        head.append(f"like: {like}")
    if absent:
        head.append(f"absent: [{', '.join(absent)}]")
    for one in judged:
        family = one.family
        head += [f"{family.name}:", f"  source: {_quoted(one.source)}"]
        if family.dtype:
            head.append(f"  dtype: {family.dtype}")
        head.append(f"  rows: {len(one.seconds)}")
        if one.fill:
            head.append(f"  fill: {one.fill}")
        valid = ", ".join(f"{name}: [{low:.12g}, {high:.12g}]" for name, (low, high) in one.valid.items())
        head.append(f"  valid: {{{valid}}}")
        words = ", ".join(f"{word}: {pair}" for word, pair in one.interval.items())
        head.append(f"  interval: {{{words}}}")
        head += ["  constants:", *_written(tree(one.constants), "    ")]
    return "\n".join([*head, ""])
