"""One MoE layer, expert by expert: gates, dispatch, every expert with its GPU, node, tokens and bytes, combine, aggregate."""

from __future__ import annotations

from collections.abc import Sequence

from planc.graph import OpBlock
from planc.render.detailed_copies import COLUMNS, Copy, Layer, collect, packed
from planc.render.folding import fold_layers, fold_replicas, placed_alike
from planc.render.grid import GAP, Facts, centred, collected, fed, straight
from planc.render.text import fitted, named, numbers_text, tokens_text
from planc.render.view import (
    LINE,
    MARGIN,
    SIZE,
    WIDTH,
    Edge,
    Label,
    Node,
    View,
    compose,
    content_top,
    needed_height,
    node,
)
from planc.units import format_bytes
from planc.verify import VerifiedPlan

NAME = "detailed_expert_dag"
COMPACT = 64  #: more experts than this share facts at the head of their row
_HEAD = 80.0  #: room for the words at the head of a row
_INTO, _OUT = MARGIN + _HEAD + 3, WIDTH - MARGIN - 6  #: where the dispatch and combine trunks run
_FIRST = _INTO + 7
_PITCH = (_OUT - 7 - _FIRST) / COLUMNS
_SHAPE = _PITCH - 3.5


def detailed_view(plan: VerifiedPlan, layer: int | None = None, replica: int = 0) -> View:
    """The figure for one MoE layer (the first by default) of one replica. Raises ValueError for a dense layer."""
    layers = plan.placement.layers
    if layer is None and layers:
        layer = min(layers)
    if layer is None or layer not in layers:
        raise ValueError(f"layer {layer} of {plan.spec.model.name} has no routed experts, so no detailed figure")
    if not 0 <= replica < plan.parallelism.dp:
        raise ValueError(f"replica {replica} is not one of the {plan.parallelism.dp}")
    what = collect(plan, layer, replica)
    caption = _caption(what)
    nodes, edges, labels = _drawn(what, content_top(caption))
    title = f"Layer {layer} of replica {replica}, expert by expert · {plan.spec.name}"
    return compose(NAME, title, caption, nodes, edges, (), labels)


def _caption(what: Layer) -> str:
    """What is drawn, what is folded, what is left out."""
    plan, par = what.plan, what.plan.parallelism
    rounds = plan.placement.layers[what.layer].rounds
    gpus = len({rank for c in what.copies for rank in c.ranks})
    experts = len({c.expert for c in what.copies})
    copies = f" in {len(what.copies)} copies" if len(what.copies) > experts else ""
    words = [f"{experts} experts{copies} on {gpus} of the {par.ep} GPUs of the EP group."]
    if rounds > 1:
        words.append(f"A GPU runs its {rounds} experts one after the other: turn 2 starts when turn 1 is done.")
    if par.expert_tp > 1:
        words.append(f"Each expert is split over {par.expert_tp} GPUs; its first GPU sends the all-reduced sum back.")
    run = next(r for r in fold_layers(plan) if r[0] <= what.layer <= r[1])
    if run[2] > 1:
        proof = "identical" if placed_alike(plan, run[0], run[1]) else "alike but for which expert is on which GPU"
        words.append(f"Layers {run[0]}–{run[1]} are {proof} (proven, ×{run[2]}).")
    alike = next(r for r in fold_replicas(plan) if r[0] <= what.replica <= r[1])
    if alike[2] > 1:
        words.append(f"Replicas {alike[0]}–{alike[1]} are identical (proven, ×{alike[2]}).")
    if len(what.copies) > COMPACT:
        words.append("Bytes at the head of a row are those of each of its experts.")
    if len(what.ops(what.block("gate"))) > COLUMNS:
        words.append("Of the gates and aggregates the first, the last, and those between as one are drawn.")
    words.append("Not drawn: the gate weights and the residual, which stay on the gate's GPU for its aggregate.")
    if plan.spec.workload.micro_batches > 1:
        words.append(f"One of {plan.spec.workload.micro_batches} micro-batches.")
    return " ".join(words)


def _drawn(what: Layer, top: float) -> tuple[list[Node], list[Edge], list[Label]]:
    """Everything from the gates down to the aggregates."""
    gates, gate_facts, labels = _sources(what, "gate", top)
    y = gates[0].y + gates[0].height + 26
    dispatch = _bar(what, "dispatch", y)
    rows, heads = _grid(what, dispatch.y + dispatch.height + GAP - 9)
    below = rows[-1][0].y + rows[-1][0].height
    combine = _bar(what, "combine", below + GAP)
    sums, sum_facts, more = _sources(what, "aggregate", combine.y + combine.height + 26)
    tensors = what.block("dispatch").writes["tokens"], what.block("combine").reads["y"]
    into = {c.id: (tensors[0].text(c.tokens), c.into) for c in what.copies}
    out = {c.id: (tensors[1].text(c.tokens), c.out) for c in what.copies}
    edges = [
        *straight(gates, [dispatch], "dispatch", gate_facts),
        *fed(dispatch, rows, _INTO, "dispatch", into),
        *collected(rows, combine, _OUT, "combine", out),
        *straight([combine], sums, "combine", sum_facts),
    ]
    return [*gates, dispatch, *(n for row in rows for n in row), combine, *sums], edges, [*labels, *heads, *more]


# --- gates, aggregates and the two collectives ----------------------------------------------------------------------


def _sources(what: Layer, kind: str, y: float) -> tuple[list[Node], Facts, list[Label]]:
    """The row of gates, or of aggregates: all of them up to `COLUMNS`, else the first, one ×N, and the last."""
    block = what.block(kind)
    ops = what.ops(block)
    groups = [[op] for op in ops]
    if len(ops) > COLUMNS:
        groups = [*groups[: COLUMNS - 2], ops[COLUMNS - 2 : -1], groups[-1]]
    port = "tokens" if kind == "gate" else "parts"
    tensor = block.writes[port] if kind == "gate" else block.reads[port]
    middles = centred(len(groups), COLUMNS, _FIRST, _PITCH)
    nodes = [_source(what, block, group, x - _SHAPE / 2, y) for group, x in zip(groups, middles, strict=True)]
    facts = {
        n.id: ((f"{len(g)} × " if len(g) > 1 else "") + tensor.text(), len(g) * tensor.row_bytes)
        for n, g in zip(nodes, groups, strict=True)
    }
    tokens = what.plan.tokens.source
    each = " each" if len(ops) > 1 else ""
    words = [f"{kind}s" if each else kind, tokens_text(tokens) + each, format_bytes(tensor.row_bytes)]
    return nodes, facts, _heading(words, y + nodes[0].height / 2)


def _source(what: Layer, block: OpBlock, ops: list[int], x: float, y: float) -> Node:
    """One gate or aggregate, or a run of them: ops of one block without row counts differ in nothing but the rank,
    so on like GPUs they are alike."""
    ranks = [int(block.ranks[op, 0]) for op in ops]
    nodes = sorted({int(n) for n in what.plan.spec.cluster.node_of_rank[ranks]})
    place, title = named("GPU", ranks), block.kind
    id, attributes = what.op_id(block, ops[0]), {"gpu": str(ranks[0])}
    if len(ops) > 1:
        alike = len(set(what.plan.spec.cluster.group_of_rank[ranks].tolist())) == 1
        title, place = f"×{len(ops)} alike" if alike else f"… {len(ops)} more", named("GPU", ranks)
        id = f"{block.name}.r{ranks[0]}-{ranks[-1]}"
        attributes = {"ranks": numbers_text(ranks)}
    tensor = next(iter(block.writes.values()))
    attributes |= {"layer": str(what.layer), "tensor": tensor.text(), "dtype": tensor.dtype}
    lines = (title, place, named("node", nodes))
    return node(id, block.kind, lines, x + 3, y, _SHAPE - 6, 52, attributes=attributes)


def _bar(what: Layer, kind: str, y: float) -> Node:
    """Dispatch or combine over the whole width, with what it moves."""
    block = what.block(kind)
    op = what.replica
    matrix = what.plan.byte_matrix(what.plan.blocks.by_name[block.name], op)
    nodes = what.plan.spec.cluster.node_of_rank[block.ranks[op]]
    far = int(matrix[nodes[:, None] != nodes[None, :]].sum())
    ranks = block.ranks[op].tolist()
    across = f"{format_bytes(far)} of it from node to node" if far else "all inside one node"
    moved = f"{format_bytes(int(matrix.sum()))} of tokens, {across}"
    lines = (f"{kind} · layer {what.layer} · {named('GPU', ranks)}", moved)
    tensor = next(iter(block.writes.values()))
    return node(
        what.op_id(block, op), kind, lines, MARGIN, y, WIDTH - 2 * MARGIN, 40, comm=kind,
        attributes={
            "layer": str(what.layer), "ranks": numbers_text(ranks).replace("–", "-"), "tensor": tensor.text(),
            "dtype": tensor.dtype,
        },
    )  # fmt: skip


# --- the experts ----------------------------------------------------------------------------------------------------


def _grid(what: Layer, top: float) -> tuple[list[list[Node]], list[Label]]:
    """Rows of at most `COLUMNS` experts, a node or several small ones to a row, and the words at their heads."""
    compact = len(what.copies) > COMPACT
    rows = packed(what.copies)
    texts = [[_lines(c, len({c.node for c in row}) > 1, compact) for c in row] for row in rows]
    height = max(needed_height(lines, "ellipse", _SHAPE, bold=not compact) or 0.0 for row in texts for lines in row)
    rounds = max(c.slot for c in what.copies) + 1
    drawn, labels, y = [], [], top
    for copies, lines in zip(rows, texts, strict=True):
        middles = centred(len(copies), COLUMNS, _FIRST, _PITCH)
        drawn.append(
            [_expert(what, c, t, x, y, height, not compact) for c, t, x in zip(copies, lines, middles, strict=True)]
        )  # fmt: skip
        labels += _heading(_row_words(what.plan, copies, rounds, compact), y + height / 2)
        y += height + GAP
    return drawn, labels


def _lines(copy: Copy, mixed: bool, compact: bool) -> tuple[str, ...]:
    """The text of one expert, in the form that needs the least height; ``mixed``: its row holds several nodes."""
    place, tokens = named("GPU", copy.ranks), tokens_text(copy.tokens)
    where = (f"node {copy.node}",) if mixed else ()
    if compact:
        forms = [(f"{copy.name} · {place}", tokens, *where), (copy.name, place, tokens, *where)]
    else:
        facts = (f"in {format_bytes(copy.into)}", f"out {format_bytes(copy.out)}")
        forms = [(copy.name, f"{place} · {tokens}", *where, *facts), (copy.name, place, tokens, *where, *facts)]
    forms.append(tuple(fitted(line, SIZE, 0.55 * _SHAPE) for line in forms[-1]))
    heights = {form: needed_height(form, "ellipse", _SHAPE, bold=not compact) for form in forms}
    return min((form for form in forms if heights[form]), key=lambda form: heights[form] or 0.0)


def _expert(what: Layer, copy: Copy, lines: tuple[str, ...], x: float, y: float, height: float, bold: bool) -> Node:
    tensor = what.block("dispatch").writes["tokens"]
    place = (
        {"gpu": str(copy.ranks[0])} if len(copy.ranks) == 1 else {"ranks": numbers_text(copy.ranks).replace("–", "-")}
    )
    tooltip = f"in {format_bytes(copy.into)}, out {format_bytes(copy.out)}"
    if bold:  # many small ones say the rest in their row's head; the file stays small enough for a page
        tooltip = f"{copy.name} · {named('GPU', copy.ranks)} · node {copy.node}: {copy.tokens} tokens, {tooltip}"
    attributes = {"layer": str(what.layer), **place, "expert": str(copy.expert), "tensor": tensor.text(copy.tokens)}
    attributes["dtype"] = tensor.dtype
    return node(
        copy.id, "expert", lines, x - _SHAPE / 2, y, _SHAPE, height, tooltip=tooltip, attributes=attributes, bold=bold
    )  # fmt: skip


def _row_words(plan: VerifiedPlan, copies: Sequence[Copy], rounds: int, compact: bool) -> list[str]:
    """Node, its GPU where there are several kinds, turn, and for the compact form the bytes of each expert."""
    words = [fitted(named("node", sorted({c.node for c in copies})), SIZE, _HEAD, bold=True)]
    cluster = plan.spec.cluster
    if len(cluster.groups) > 1:
        kinds = {cluster.groups[cluster.group_of_rank[c.ranks[0]]].gpu.name for c in copies}
        words.append(fitted(", ".join(sorted(kinds)), SIZE, _HEAD))
    if rounds > 1:
        words.append(f"turn {copies[0].slot + 1} of {rounds}")
    if not compact:
        ranks = sorted({r for c in copies for r in c.ranks})
        return [*words, named("GPU", ranks)] if len(named("GPU", ranks)) < 15 else words
    into, out = max(c.into for c in copies), max(c.out for c in copies)
    same = len({c.into for c in copies}) == 1
    return [*words, f"in {'' if same else '≤'}{format_bytes(into)}", f"out {'' if same else '≤'}{format_bytes(out)}"]


def _heading(words: Sequence[str], middle: float) -> list[Label]:
    """Words at the head of a row, centred on it from top to bottom."""
    first = middle - len(words) * LINE / 2 + LINE - 3.5
    return [
        Label(fitted(word, SIZE, _HEAD, bold=i == 0), MARGIN, first + i * LINE, bold=i == 0)
        for i, word in enumerate(words)
    ]
