"""plan.json back to a plan: read as untrusted text, verified from its contents alone, faults placed in the file.

Whatever in the file follows from the rest (volumes, limits, memory classes, checks) is computed anew and compared.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from planc.diagnostics import CODES, Diagnostic, PlancError, Span
from planc.graph import EdgeBlock, OpBlock, PlanGraph, TensorType
from planc.placement import ITEMS, POLICY_NAMES, LayerPlacement, MemoryTable, Parallelism, Placement, layer_placement
from planc.spec import Spec, check_spec
from planc.spec.load import spec_from_values
from planc.spec.text import decode, parse_json, parse_yaml, read_bytes
from planc.verify.codec import decode_numbers, decode_tensor
from planc.verify.notes import plan_notes
from planc.verify.plan import Draft, VerifiedPlan
from planc.verify.record import SCHEMA, EdgeRecord, GraphRecord, MemoryRecord, PlacementRecord, PlanFile, plan_record
from planc.verify.verify import verify

MAX_PLAN_BYTES = 512_000_000
MAX_COPIES = 4_000_000  #: of a layer's experts in an EP group


def load_plan(path: str | os.PathLike[str]) -> VerifiedPlan:
    """Read a plan.json (or the folder that holds one) and verify it from its contents alone.

    Raises PlancError: PLN018 when the file is not a plan, PLN316 when derived values were changed, and whatever the
    verifier finds.
    """
    file = Path(path) / "plan.json" if os.path.isdir(path) else Path(path)
    return parse_plan(decode(read_bytes(file, MAX_PLAN_BYTES), str(file)), file=str(file))


def parse_plan(text: str, *, file: str = "<text>") -> VerifiedPlan:
    """Like `load_plan`, for the text of a plan.json held in a string."""
    try:
        draft, record = _read_draft(text, file)
        plan = verify(draft)
        changed = list(_differences(plan_record(plan), record, ""))
        if changed:
            raise PlancError(changed)
    except PlancError as error:
        raise PlancError(_located(error.diagnostics, text, file)) from None
    return plan


def _read_draft(text: str, file: str) -> tuple[Draft, dict[str, Any]]:
    record = parse_json(text, file)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        message = f"this is not a plan of schema {SCHEMA}" + (f" but {str(found)[:40]!r}" if found else "")
        raise PlancError([Diagnostic("PLN018", message, span=Span(file, 1, 1))])
    try:
        data = PlanFile.model_validate(record)
    except ValidationError as error:
        rows = error.errors(include_url=False)
        raise PlancError(
            Diagnostic("PLN018", f"{row['msg'][:1].lower()}{row['msg'][1:]}", ".".join(map(str, row["loc"])))
            for row in rows
        ) from None
    spec = _read_spec(data, file)
    p = data.parallelism
    stages = tuple((s[0], s[1]) for s in p.stages if len(s) == 2)
    if len(stages) != p.pp or min(p.dp, p.pp, p.ep, p.tp, p.expert_tp) < 1 or p.ep % p.tp or p.ep % p.expert_tp:
        raise PlancError([Diagnostic("PLN018", "the degrees do not form a mesh", "parallelism")])
    par = Parallelism(p.dp, p.pp, p.ep, p.tp, p.expert_tp, stages, p.gating, p.tp_comm)
    if par.world_size != spec.cluster.gpus or [b for _, b in stages][-1:] != [spec.model.layers]:
        raise PlancError(
            [Diagnostic("PLN018", "the degrees do not match the spec's cluster and layers", "parallelism")]
        )
    faults_found = [
        Diagnostic("PLN018", f"`{n.code[:40]}` is not a diagnostic code", f"notes.{i}")
        for i, n in enumerate(data.notes)
        if n.code not in CODES
    ]
    if not {"dp", "pp", "ep", "tp", "expert_tp"} <= data.reasons.keys() or (p.pp > 1 and "stages" not in data.reasons):
        faults_found.append(Diagnostic("PLN018", "a degree has no reason", "reasons"))
    experts = spec.model.moe.experts if spec.model.moe else 0
    placement = _read_placement(data.placement, par, experts, spec.model.moe_layer_ids, faults_found)
    memory = _read_memory(data.memory, par, faults_found)
    graph = _read_graph(data.graph, par, faults_found)
    if faults_found:
        raise PlancError(faults_found)
    notes = tuple(plan_notes(spec, par, placement))  # derived, and compared with what the file says
    return Draft(spec, par, data.reasons, placement, memory, graph, notes, data.certificate, data.proof), record


def _read_spec(data: PlanFile, file: str) -> Spec:
    """The spec in the file, checked like any other; its faults are placed under ``spec``."""
    try:
        spec = spec_from_values(data.spec, data.sources, file)
        found = check_spec(spec)
        if spec.placement.policy not in POLICY_NAMES:
            found.append(
                spec.fault("PLN015", f"`{spec.placement.policy}` is not a placement policy", "placement.policy")
            )
        if found:
            raise PlancError(found)
    except PlancError as error:
        inside = error.diagnostics
        raise PlancError(
            Diagnostic(d.code, d.message, f"spec.{d.path}", None, d.hint, d.related) for d in inside
        ) from None
    return spec


def _numbers(text: str, path: str, found: list[Diagnostic], most: int) -> np.ndarray:
    """The numbers of a list that may have ``most`` of them: a few characters can stand for millions."""
    try:
        return decode_numbers(text, most)
    except ValueError as error:
        found.append(Diagnostic("PLN018", str(error), path))
        return np.zeros(0, dtype=np.int64)


def _read_placement(
    record: PlacementRecord,
    par: Parallelism,
    experts: int,
    moe_layers: tuple[int, ...],
    found: list[Diagnostic],
) -> Placement:
    layers: dict[int, LayerPlacement] = {}
    most = min(MAX_COPIES, experts * par.ep)
    for number, row in enumerate(record.layers[: len(moe_layers)]):
        path = f"placement.layers.{number}"
        columns = [
            _numbers(getattr(row, k), f"{path}.{k}", found, most).astype(np.int32)
            for k in ("experts", "ranks", "slots")
        ]
        if len({len(c) for c in columns}) != 1 or not len(columns[0]):
            found.append(Diagnostic("PLN018", "experts, ranks and slots are columns of equal length", path))
            continue
        if columns[1].max() >= par.ep:
            found.append(
                Diagnostic("PLN018", f"rank {columns[1].max()} is outside an EP group of {par.ep}", f"{path}.ranks")
            )
            continue
        part = layer_placement(columns[0], columns[1])
        if not all(np.array_equal(a, b) for a, b in zip((part.expert, part.rank, part.slot), columns, strict=True)):
            message = "the copies are not in the order of their experts and ranks, each with its turn on the rank"
            found.append(Diagnostic("PLN316", message, f"{path}.slots", hint="build the plan again, or undo the edit"))
        for layer in _numbers(row.layers, f"{path}.layers", found, len(moe_layers)).tolist():
            layers[layer] = part
    if not found and (tuple(sorted(layers)) != moe_layers or len(record.layers) > len(moe_layers)):
        found.append(Diagnostic("PLN018", "the layers placed are not the model's MoE layers", "placement"))
    return Placement(par, layers, record.rounds, record.relaxed)


def _read_memory(rows: list[MemoryRecord], par: Parallelism, found: list[Diagnostic]) -> MemoryTable:
    items = {name: np.zeros(par.world_size, dtype=np.int64) for name in ITEMS}
    capacity, reserve = np.zeros((2, par.world_size), dtype=np.int64)
    for number, row in enumerate(rows[: par.world_size]):
        ranks = _numbers(row.ranks, f"memory.{number}.ranks", found, par.world_size)
        if len(ranks) and ranks.max() >= par.world_size:
            found.append(Diagnostic("PLN018", f"rank {ranks.max()} is outside the world", f"memory.{number}.ranks"))
            continue
        if set(row.items) != set(ITEMS) or any(
            abs(v) > 2**62 for v in (*row.items.values(), row.capacity, row.reserve)
        ):
            found.append(Diagnostic("PLN018", f"the items are {', '.join(ITEMS)}", f"memory.{number}.items"))
            continue
        for name in ITEMS:
            items[name][ranks] = row.items[name]
        capacity[ranks], reserve[ranks] = row.capacity, row.reserve
    return MemoryTable(items, capacity, reserve)


def _read_graph(record: GraphRecord, par: Parallelism, found: list[Diagnostic]) -> PlanGraph:
    blocks: list[OpBlock] = []
    shared: dict[tuple[str, int], np.ndarray] = {}
    for row in record.blocks:
        path = f"graph.{row.name}"
        reads, writes = (
            {p: _tensor(text, path, found) for p, text in ports.items()} for ports in (row.reads, row.writes)
        )
        key = (row.ranks, row.group)
        if key not in shared:  # equal rank lists become one array again, which expansion relies on for speed
            firsts = _numbers(row.ranks, path, found, par.world_size)  # an op names no rank that another one has
            group = row.group
            if not 1 <= group <= par.world_size or len(firsts) * group > par.world_size:
                found.append(Diagnostic("PLN018", f"{len(firsts)} groups of {str(group)[:40]} ranks", path))
                firsts, group = firsts[:0], 1
            shared[key] = (firsts[:, None] + np.arange(group)).astype(np.int32)
        ops = len(shared[key])
        rows = None if row.rows is None else _numbers(row.rows, path, found, ops)
        experts = None if row.experts is None else _numbers(row.experts, path, found, ops).astype(np.int32)
        blocks.append(
            OpBlock(
                row.name,
                row.kind,
                shared[key],
                row.layer,
                row.micro_batch,
                row.slot,
                row.split,
                reads,
                writes,
                rows,
                experts,
            )
        )
    names = {b.name: i for i, b in enumerate(blocks)}
    edges = [edge for row in record.edges if (edge := _read_edge(row, names, blocks, found)) is not None]
    unique = len(names) == len(blocks)  # the verifier tells of a block that is there twice
    if unique and any(edge.source > edge.target for edge in edges) and _sorts(len(blocks), edges):
        found.append(Diagnostic("PLN018", "blocks are not in an order in which they can run", "graph.blocks"))
    return PlanGraph(tuple(blocks), tuple(edges), record.world_size)


def _sorts(count: int, edges: list[EdgeBlock]) -> bool:
    """Whether blocks have an order at all; the verifier says what is wrong with those that have none."""
    from graphlib import CycleError, TopologicalSorter

    reads: dict[int, list[int]] = {number: [] for number in range(count)}
    for edge in edges:
        reads[edge.target].append(edge.source)
    try:
        TopologicalSorter(reads).prepare()
    except CycleError:
        return False
    return True


def _tensor(text: str, path: str, found: list[Diagnostic]) -> TensorType:
    try:
        return decode_tensor(text)
    except ValueError as error:
        found.append(Diagnostic("PLN018", str(error), path))
        return TensorType((), "bf16")


def _read_edge(
    row: EdgeRecord, names: dict[str, int], blocks: list[OpBlock], found: list[Diagnostic]
) -> EdgeBlock | None:
    path = f"graph.{row.source} -> {row.target}"
    ends = [text.rpartition(".") for text in (row.source, row.target)]
    unknown = [name for name, _, _ in ends if name not in names]
    if unknown:
        found.append(Diagnostic("PLN018", f"an edge names the block `{unknown[0][:60]}`, which does not exist", path))
        return None
    if not re.fullmatch(r"rank|group:[1-9]\d{0,6}|shift:-?\d{1,7}|pairs", row.pattern):
        found.append(Diagnostic("PLN018", f"`{row.pattern[:40]}` is not an edge pattern", path))
        return None
    pairs = None
    if row.pairs is not None:
        bounds = [len(blocks[names[name]]) for name, _, _ in ends]
        if not all(len(p) == 2 and 0 <= p[0] < bounds[0] and 0 <= p[1] < bounds[1] for p in row.pairs):
            found.append(Diagnostic("PLN018", "a pair names an op that its block does not have", path))
            return None
        pairs = np.array(row.pairs, dtype=np.int64).reshape(-1, 2)
    if (pairs is None) == (row.pattern == "pairs"):
        found.append(Diagnostic("PLN018", "`pairs` are listed exactly with the pattern `pairs`", path))
        return None
    (source, _, out), (target, _, into) = ends
    tensor = _tensor(row.tensor, path, found)
    return EdgeBlock(names[source], out, names[target], into, tensor, row.pattern, row.comm, pairs)


def _differences(want: Any, found: Any, path: str) -> Iterator[Diagnostic]:
    """Where the file says something else than what follows from the plan it holds."""
    if isinstance(want, dict) and isinstance(found, dict):
        for key in [*want, *(k for k in found if k not in want)]:
            inside = f"{path}.{key}" if path else str(key)
            yield from _differences(want.get(key), found.get(key), inside)
    elif isinstance(want, list) and isinstance(found, list) and len(want) == len(found):
        for number, (a, b) in enumerate(zip(want, found, strict=True)):
            yield from _differences(a, b, f"{path}.{number}")
    elif want != found and not (isinstance(want, float) and isinstance(found, int) and want == found):
        message = f"the file says {json.dumps(found)[:80]}, the plan in it gives {json.dumps(want)[:80]}"
        yield Diagnostic("PLN316", message, path, hint="build the plan again, or undo the edit")


def _located(diagnostics: tuple[Diagnostic, ...], text: str, file: str) -> Iterator[Diagnostic]:
    """Give faults their place in the file: parsed a second time with positions, and only when something is wrong."""
    places: dict[tuple[str | int, ...], Span] = {}
    numbers: dict[str, tuple[str, int]] = {}
    if any(d.span is None for d in diagnostics):
        try:
            located = parse_yaml(text, file)
            places = located.places
            graph = located.value["graph"]
            numbers = {b["name"]: ("blocks", i) for i, b in enumerate(graph["blocks"])}
            numbers |= {f"{e['source']} -> {e['target']}": ("edges", i) for i, e in enumerate(graph["edges"])}
        except (PlancError, KeyError, TypeError):
            pass  # the text is no YAML of a size that is read with positions: the path must do
    for d in diagnostics:
        if d.span is not None:
            yield d
            continue
        parts: list[str | int] = [int(p) if re.fullmatch("[0-9]{1,9}", p) else p for p in d.path.split(".") if p]
        name = d.path.removeprefix("graph.")
        if d.path.startswith("graph.") and name in numbers:
            parts = ["graph", *numbers[name]]
        while parts and tuple(parts) not in places:
            parts.pop()
        span = places.get(tuple(parts), Span(file, 1, 1))
        yield Diagnostic(
            d.code, d.message, d.path, Span(span.file, span.line, span.column), d.hint, d.related, d.severity
        )
