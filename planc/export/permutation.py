"""Relabelled experts: engines that place expert i on a fixed rank can serve any placement of a checkpoint whose experts are
numbered so that index i is the expert that the plan has there.

A permutation maps the new index of an expert to its old number. Outputs are those of the checkpoint as it was, because the
router's rows move with the experts; a gate that limits groups asks more: new groups are old groups, in any order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.text import decode, parse_json, read_bytes

FORMAT = "planc-permutation-1"
_MOST_BYTES = 256_000_000
Seats = tuple[int, ...]  #: the ranks of an expert's copies, ascending


@dataclass(frozen=True)
class Permutation:
    """``old``: MoE layer -> old number of the expert of every new index; ``layers``: hidden layers of the model, layers of
    a draft model after them not counted; ``groups``: of experts in a gate that limits them, 1 where it does not."""

    experts: int
    layers: int
    groups: int
    old: dict[int, tuple[int, ...]]


def relabelled(here: Sequence[Seats], there: Sequence[Seats], groups: int) -> tuple[int, ...] | None:
    """Old number of the expert of every new index, so that index i, which an engine puts on the ranks ``here[i]``, is an
    expert that the plan has on these ranks, ``there[expert]``. Indices in a group of consecutive ones are the experts of
    one old group. None where there is no such permutation; the identity where that is one."""
    size = len(here) // groups
    blocks = [range(first, first + size) for first in range(0, len(here), size)]
    free: dict[tuple[Seats, ...], list[range]] = {}
    for block in reversed(blocks):
        free.setdefault(tuple(sorted(there[expert] for expert in block)), []).append(block)
    found: list[int] = []
    for block in blocks:
        alike = free.get(tuple(sorted(here[index] for index in block)))
        if not alike:
            return None
        old = sorted(alike.pop(), key=lambda expert: (there[expert], expert))
        new = sorted(block, key=lambda index: (here[index], index))
        place = dict(zip(new, old, strict=True))
        found += [place[index] for index in block]
    return tuple(found)


def permutation_json(permutation: Permutation) -> str:
    """The file that `read_permutation` reads, a line per layer."""
    rows = ",\n".join(f"{json.dumps(str(layer))}: {json.dumps(old)}" for layer, old in permutation.old.items())
    head = json.dumps(
        {
            "format": FORMAT,
            "experts": permutation.experts,
            "layers": permutation.layers,
            "groups": permutation.groups,
        }
    )
    return f'{head[:-1]}, "old_expert_of_new_index": {{\n{rows}\n}}}}\n'


def read_permutation(path: str | os.PathLike[str]) -> Permutation:
    """Read a permutation. Raises PlancError: PLN507 for one that is none, and what reading a JSON file raises."""
    name = os.fspath(path)
    record = parse_json(decode(read_bytes(Path(path), _MOST_BYTES), name), name)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _wrong(name, f"this is not a permutation of experts: its `format` is not `{FORMAT}`")
    numbers = [record.get(key) for key in ("experts", "layers", "groups")]
    rows = record.get("old_expert_of_new_index")
    if not all(type(n) is int and 1 <= n <= 10**6 for n in numbers) or not isinstance(rows, dict) or not rows:
        raise _wrong(name, "experts, layers and groups are whole numbers, old_expert_of_new_index lists by layer")
    experts, layers, groups = (int(n) for n in numbers if n is not None)
    if experts % groups:
        raise _wrong(name, f"{experts} experts are not {groups} equal groups")
    old = {}
    for key, row in rows.items():
        if not (key.isascii() and key.isdigit() and str(int(key[:9])) == key and int(key) < layers):
            raise _wrong(name, f"`{key[:40]}` is not a layer; there are layers 0 to {layers - 1}")
        old[int(key)] = _row(name, int(key), row, experts)
        broken = broken_group(old[int(key)], groups)
        if broken is not None:
            raise _wrong(name, f"layer {key}: {broken_text(broken, groups)}")
    return Permutation(experts, layers, groups, dict(sorted(old.items())))


def broken_group(old: Sequence[int], groups: int) -> int | None:
    """The first new group that is no old group as a whole."""
    size = len(old) // groups
    for group in range(groups):
        if len({expert // size for expert in old[group * size : (group + 1) * size]}) > 1:
            return group
    return None


def broken_text(group: int, groups: int) -> str:
    """What is wrong with it."""
    return f"group {group} of {groups} mixes experts of several old groups, so the gate would choose others"


def _row(name: str, layer: int, row: Any, experts: int) -> tuple[int, ...]:
    if not isinstance(row, list) or any(type(v) is not int for v in row) or len(row) != experts:
        raise _wrong(name, f"layer {layer}: expected a list of {experts} expert numbers")
    seen: set[int] = set()
    for expert in row:
        if expert in seen or not 0 <= expert < experts:
            what = "appears twice" if expert in seen else f"is none of experts 0 to {experts - 1}"
            raise _wrong(name, f"layer {layer}: {str(expert)[:40]} {what}")
        seen.add(expert)
    return tuple(row)


def _wrong(name: str, message: str) -> PlancError:
    hint = "use the permutation.json that `planc export` wrote for this model"
    return PlancError([Diagnostic("PLN507", message, span=Span(name, 1, 1), hint=hint)])
