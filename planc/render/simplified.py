"""The key ideas on one page: replicas, a dense layer, an MoE layer, the hand-overs; identical layers drawn once."""

from __future__ import annotations

from planc.graph import EdgeBlock
from planc.render.folding import fold_layers, fold_replicas, micro_batches_alike, placed_alike
from planc.render.simplified_layer import (
    ATTENTION,
    FRAME_WIDTH,
    FRAME_X,
    LANE,
    NODE_HEIGHT,
    RESIDUAL,
    Sheet,
    draw_layer,
    drawn_edge,
)
from planc.render.text import fitted, named
from planc.render.view import MARGIN, SIZE, Edge, Label, Node, Point, View, compose, content_top, frame, node
from planc.verify import VerifiedPlan

NAME = "simplified_moe_dag"
MAX_RUNS, FIRST_RUNS = 6, 3  #: up to six runs of layers are drawn; of more, three and a box that names the rest
_GAP = 42.0  #: between frames, for the line that leads to the next
_OUTER = 988.0  #: where the folded replicas' outputs run down the page
_REST = "rest"

_Run = tuple[int, int, int]


def simplified_view(plan: VerifiedPlan, most: int = MAX_RUNS) -> View:
    """The figure, from blocks alone: it is as large for 10,000 GPUs as for 16. ``most``: runs of layers that are drawn."""
    runs = fold_layers(plan)
    shown = runs if len(runs) <= most else runs[: min(FIRST_RUNS, most)]
    rest = runs[len(shown) :]
    caption = _caption(plan, runs, rest)
    sheet = Sheet(plan, content_top(caption))
    others = _top(sheet)
    frame_top = sheet.y
    sheet.y += 34
    _embed(sheet)
    entry = sheet.y
    for run in shown:
        sheet.y += _GAP if run != shown[0] else 24
        _run(sheet, run)
    if rest:
        sheet.y += _GAP
        _rest_box(sheet, rest)
    _head(sheet, bool(rest))
    size = plan.parallelism.replica_size
    title = f"replica 0 · {named('GPU', range(size))}"
    sheet.frames.insert(0, frame("replica0", title, 14, frame_top, 962, sheet.y + 14 - frame_top))
    sheet.y += 14
    _output(sheet, others, bool(rest))
    _between(sheet, entry)
    title = f"The plan in outline · {plan.spec.name}"
    return compose(NAME, title, caption, sheet.nodes, sheet.edges, sheet.frames, sheet.labels)


def _caption(plan: VerifiedPlan, runs: list[_Run], rest: list[_Run]) -> str:
    """What the figure folds, and on what proof."""
    words = []
    folded = [run for run in runs if run[2] > 1 and run not in rest]
    same = [run for run in folded if placed_alike(plan, *run[:2])]
    if same:
        words.append(f"Drawn once because proven identical block by block: layers {_named_runs(same)}.")
    moved = [run for run in folded if run not in same]
    if moved:
        drawn = f"layer {moved[0][0]}" if len(moved) == 1 else "the first of each"
        words.append(
            f"Layers {_named_runs(moved)} are proven alike but for which expert is on which GPU; {drawn} is drawn."
        )
    for first, last, count in fold_replicas(plan):
        if count > 1:
            words.append(f"Replicas {first}–{last} are proven identical (×{count}); replica {first} is drawn.")
    if rest:
        words.append(f"Layers {rest[0][0]}–{rest[-1][1]}, each run of them unlike the one before, are only named.")
    count = plan.spec.workload.micro_batches
    if count > 1:
        alike = "proven identical" if micro_batches_alike(plan) else "not all identical"
        words.append(f"Each of {count} micro-batches ({alike}) runs through all of it; the first is drawn.")
    words.append("A shape stands for its op on all the GPUs it names; tensors are those of one GPU or group.")
    if plan.placement.layers:
        words.append("×N in place of an expert: N more, each with as many tokens.")
    return " ".join(words)


def _named_runs(runs: list[_Run]) -> str:
    """``0–2 (×3), 3–60 (×58)``; a run of one layer is its number."""
    return ", ".join(f"{first}–{last} (×{count})" if count > 1 else str(first) for first, last, count in runs)


# --- input, output, and what stands between the layers ------------------------------------------------------------------


def _top(sheet: Sheet) -> list[Node]:
    """Input, its split over the replicas, and a box for the replicas that are not drawn."""
    graph, plan = sheet.graph, sheet.plan
    y = sheet.y
    sheet.put(graph.by_name["input"], MARGIN + 60, y, 120)
    split = graph.by_name["input_split"]
    sheet.put(split, 470, y, 230)
    others = []
    runs = fold_replicas(plan)
    x = 740.0
    size = plan.parallelism.replica_size
    for first, last, _ in [(1, runs[0][1], 0)] * (runs[0][2] > 1) + runs[1:]:
        ranks = range(first * size, (last + 1) * size)
        proof = "identical to replica 0 (proven)" if last <= runs[0][1] else "not identical to replica 0"
        count = f" · ×{last - first + 1}" if last > first else ""
        lines = (f"{named('replica', range(first, last + 1))}{count}", named("GPU", ranks), proof)
        others.append(
            node(
                f"replicas.{first}-{last}",
                "fold",
                lines,
                x,
                y - 4,
                232,
                50,
                attributes={"ranks": f"{ranks[0]}-{ranks[-1]}"},
            )
        )
        y += 60
    for box in others:
        edge = next(e for e in graph.edges if e.source == split)
        source = sheet.placed[split][0]
        level = box.y + box.height / 2
        points = (source.right, (725, source.right[1]), (725, level), box.left)
        bytes_ = edge.tensor.row_bytes
        sheet.edges.append(Edge(source.id, box.id, points, None, "dp", edge.tensor.text(), bytes_))
    sheet.nodes += others
    sheet.y = max(y, sheet.y + 60) + 12
    return others


def _embed(sheet: Sheet) -> None:
    """Embedding, below the split."""
    name = _prefixed(sheet.plan, "embed")
    if name in sheet.graph.by_name:
        sheet.put(sheet.graph.by_name[name], 470, sheet.y)
        sheet.y += NODE_HEIGHT


def _prefixed(plan: VerifiedPlan, name: str) -> str:
    return f"m0.{name}" if plan.spec.workload.micro_batches > 1 else name


def _run(sheet: Sheet, run: _Run) -> None:
    """One layer for a run of identical ones, after the hand-over that leads to it."""
    plan, (first, last, count) = sheet.plan, run
    par = plan.parallelism
    stage = par.stage_of_layer(first)
    if stage and first == par.stages[stage][0]:
        _hand_over(sheet, stage)
    moe = plan.spec.model.moe
    what = "dense"
    if moe is not None and first in plan.placement.layers:
        part = plan.placement.layers[first]
        used = len(set(part.rank.tolist())) * par.expert_tp
        what = f"MoE · {moe.experts} experts on {used} of {par.ep} GPUs · top-{moe.top_k}"
        what += f" · {part.rounds} turns" if part.rounds > 1 else ""
    title = f"layer{'s' if count > 1 else ''} {first}{f'–{last}' if count > 1 else ''} · {what}"
    title = f"stage {stage} · {title}" if par.pp > 1 else title
    note = ""
    if count > 1 and placed_alike(plan, first, last):
        note = f"×{count}, proven identical; the output of each is the input of the next"
    elif count > 1:
        note = f"×{count}, alike but for which GPU has which expert; each feeds the next"
    draw_layer(sheet, first, title, note)
    for layer_block in [i for i, b in enumerate(sheet.graph.blocks) if b.layer == last and b.micro_batch == 0]:
        block = sheet.graph.blocks[layer_block]  # the last layer of the run hands over from the place of the first
        twin = sheet.graph.by_name[block.name.replace(f"L{last}.", f"L{first}.", 1)]
        sheet.placed.setdefault(layer_block, sheet.placed.get(twin, []))


def _hand_over(sheet: Sheet, stage: int) -> None:
    """Send at the right, below where the stage ends; receive at the left, where the next one begins."""
    plan = sheet.plan
    send, recv = (sheet.graph.by_name[_prefixed(plan, n)] for n in (f"S{stage - 1}.pp_send", f"S{stage}.pp_recv"))
    source = next(e.source for e in sheet.graph.edges if e.target == send)
    middle = sheet.placed[source][0].bottom[0] if source in sheet.placed else 600
    sheet.put(send, middle, sheet.y)
    sheet.put(recv, ATTENTION, sheet.y)
    sheet.y += NODE_HEIGHT + 30


def _rest_box(sheet: Sheet, rest: list[_Run]) -> None:
    """A box that names the runs which are not drawn."""
    stages = sorted({sheet.plan.parallelism.stage_of_layer(layer) for run in rest for layer in run[:2]})
    lines = (
        f"{len(rest)} more run{'s' if len(rest) > 1 else ''} of layers, {rest[0][0]}–{rest[-1][1]}, not drawn",
        fitted(f"layers {_named_runs(rest)}", SIZE, FRAME_WIDTH - 20),
        f"each differs from the one before it in ops, GPUs, copies or tokens · {named('stage', stages)}",
    )
    box = node(
        _REST, "fold", lines, FRAME_X, sheet.y, FRAME_WIDTH, 54, attributes={"layer": f"{rest[0][0]}-{rest[-1][1]}"}
    )
    sheet.nodes.append(box)
    hidden = set(range(rest[0][0], rest[-1][1] + 1))
    for i, block in enumerate(sheet.graph.blocks):
        handed = block.kind in ("pp_send", "pp_recv") and block.micro_batch == 0 and i not in sheet.placed
        if (block.layer in hidden and block.micro_batch == 0) or handed:
            sheet.placed[i] = [box]
    sheet.y += 54


def _head(sheet: Sheet, rest: bool) -> None:
    """lm_head, gather and sampling in a row."""
    names = [_prefixed(sheet.plan, n) for n in ("lm_head", "logits_all_gather", "sample")]
    found = [sheet.graph.by_name[n] for n in names if n in sheet.graph.by_name]
    if not found:
        return
    sheet.y += _GAP
    for block, x in zip(found, (ATTENTION, 500, 842) if len(found) == 3 else (ATTENTION, 660), strict=True):
        sheet.put(block, x, sheet.y)
    sheet.y += NODE_HEIGHT


def _output(sheet: Sheet, others: list[Node], rest: bool) -> None:
    """The collected output, below the replica."""
    output = sheet.graph.by_name["output_collect"]
    edge = next(e for e in sheet.graph.edges if e.target == output)
    source = sheet.placed[edge.source][0]
    middle = source.bottom[0]
    made = sheet.put(output, middle, sheet.y + 34)
    for box in others:
        start, end = (box.x + box.width, box.y + box.height / 2), made.right
        points = (start, (_OUTER, start[1]), (_OUTER, end[1]), end)
        sheet.edges.append(Edge(box.id, made.id, points, None, "dp", edge.tensor.text(), edge.tensor.row_bytes))
    sheet.y = made.y + NODE_HEIGHT


# --- edges between the parts ----------------------------------------------------------------------------------------------


def _between(sheet: Sheet, entry: float) -> None:
    """Edges from part to part: every edge block whose ends are drawn and do not lie in one layer."""
    seen = {(edge.source, edge.target) for edge in sheet.edges}
    for edge in sorted(sheet.graph.edges, key=lambda e: not e.comm):
        ends = sheet.placed.get(edge.source), sheet.placed.get(edge.target)
        if not ends[0] or not ends[1] or ends[0][0].id == ends[1][0].id:
            continue
        source, target = ends[0][0], ends[1][0]
        layers = sheet.graph.blocks[edge.source].layer, sheet.graph.blocks[edge.target].layer
        if (source.id, target.id) in seen or (None not in layers and _y(target) < _y(source)):
            continue
        if layers[0] is not None and layers[0] == layers[1]:
            continue
        seen.add((source.id, target.id))
        points, label = _way(sheet, edge, source, target)
        sheet.edges.append(drawn_edge(edge, source, target, points, label))


def _y(n: Node) -> float:
    return n.y


def _way(sheet: Sheet, edge: EdgeBlock, s: Node, t: Node) -> tuple[list[Point], Label | None]:
    """Points and label of an edge between parts of the page."""
    text = edge.tensor.text()
    if t.kind in ("input_split", "all_gather", "sample", "pp_recv"):
        right = t.x > s.x
        points = [s.right, t.left] if right else [s.left, t.right]
        return points, Label(text, (points[0][0] + points[1][0]) / 2, points[0][1] - 6, "middle")
    if t.kind in ("embed", "output_collect", "pp_send"):
        x = t.top[0]
        points = [s.bottom, (x, t.y)] if s.bottom[0] == x else [s.bottom, (s.bottom[0], t.y - 16), (x, t.y - 16), t.top]
        return points, Label(text, x + 8, t.y - 20 if t.kind != "output_collect" else t.y - 6)
    return _entry(sheet, s, t, text)


def _entry(sheet: Sheet, s: Node, t: Node, text: str) -> tuple[list[Point], Label | None]:
    """Into a layer, the head or the box of the rest: down to the gap above it, left, and down the lane."""
    level = t.y + t.height / 2
    if s.kind == "pp_recv":
        points = [s.left, (LANE, s.left[1])]
        label = None
    else:
        frame = (
            max((f.y for f in sheet.frames[1:] if f.y <= t.y), default=t.y)
            if t.kind not in ("fold", "lm_head")
            else t.y
        )
        over = frame - 15
        points = [s.left, (LANE, s.left[1])] if s.kind == "embed" else [s.bottom, (s.bottom[0], over), (LANE, over)]
        label = Label(text, s.bottom[0] - 10, over - 6, "end") if s.kind != "embed" else Label(text, 200, s.left[1] - 6)
    if t.kind == "residual_add":
        first = next(n for n in sheet.nodes if n.kind == "attn_qkv" and n.attributes["layer"] == t.attributes["layer"])
        return [*points, (LANE, first.left[1]), (RESIDUAL, first.left[1]), (RESIDUAL, level), t.left], None
    return [*points, (LANE, level), t.left], label
