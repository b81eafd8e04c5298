"""Collectives between real processes: what each process brings of its own members, and what they get.

Bytes are counted by what the members of this process send: rows as they are sent in dispatch and combine, and of sums and
gathers the parts that members exchange directly, whatever rings or trees the backend makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from planc.placement import step_tokens
from planc.prove.kinds import gathered
from planc.prove.model import Array
from planc.prove.values import Broken, Members, Out, Reads, Routed, Rows, Value
from planc.units import split_evenly

if TYPE_CHECKING:
    from planc.prove.process import Process


def _own(m: Process, number: int, op: int, reads: Members, what: str) -> list[Value]:
    """What this process's members bring, one each."""
    own = m.own(number, op)
    values = [reads[n][0] for n in own if reads[n]]
    if len(values) != len(own):
        raise Broken(m.name(number, op), f"{len(values)} of {len(own)} members bring {what}")
    return values


def _ranks(m: Process, number: int, op: int) -> list[int]:
    return [int(rank) for rank in m.graph.blocks[number].ranks[op]]


def _for_all(m: Process, number: int, op: int, values: list[Value]) -> list[Value]:
    """By member: values of this process's own, nothing for the others."""
    out: list[Value] = [None] * len(_ranks(m, number, op))
    for n, value in zip(m.own(number, op), values, strict=True):
        out[n] = value
    return out


def _first(m: Process, number: int, op: int, own: list[int], read: Members) -> Array | None:
    """What the first member brings, on the process that it is on; elsewhere nothing."""
    value = read[0][0] if 0 in own and read[0] else None
    if 0 in own and value is None:
        raise Broken(m.name(number, op), "its first member has nothing to send")
    return value


def _alike(m: Process, number: int, op: int, arrays: list[Array]) -> list[int]:
    """The group's processes, once all of its members bring arrays of one shape."""
    if len({array.shape for array in arrays}) > 1:
        raise Broken(m.name(number, op), "members bring different sizes")
    processes = m.processes(_ranks(m, number, op))
    m.same(number, op, processes, arrays[0])
    return processes


def _input_split(m: Process, number: int, op: int, reads: Reads) -> Out:
    """A scatter of a replica's part of the batch over its TP groups, from the first member."""
    ranks, own = _ranks(m, number, op), m.own(number, op)
    processes = m.processes(ranks)
    part = _first(m, number, op, own, reads["batch"])
    shape = m.same(number, op, processes, part)
    groups = len(ranks) // m.par.tp
    size = shape[0] // groups
    pieces = [] if part is None else [part[n // m.par.tp * size :][:size] for n in range(len(ranks))]
    if len(processes) == 1:
        return {"x": _for_all(m, number, op, pieces)}
    members = m.members_of(number, op, processes)
    most = max(map(len, members))
    room = np.zeros((most, size, *shape[1:]), dtype=np.int64 if m.model.vocab else np.float64)
    lists = None
    if part is not None:
        lists = []
        for some in members:
            padded = np.zeros_like(room)
            padded[: len(some)] = [pieces[n] for n in some]
            lists.append(m.torch.from_numpy(padded))
    group = m.communicator(number, op, processes)
    m.dist.scatter(m.torch.from_numpy(room), lists, src=m.process_of[ranks[0]], group=group)
    return {"x": _for_all(m, number, op, list(room[: len(own)]))}


def _all_reduce(m: Process, number: int, op: int, reads: Reads) -> Out:
    """Sums of partial sums: those of a process's members first, then over processes."""
    values = _own(m, number, op, reads["y"], "a partial sum")
    arrays = [value.values if isinstance(value, Rows) else value for value in values]
    processes = _alike(m, number, op, arrays)
    total = np.sum(arrays, axis=0)
    if len(processes) > 1:
        m.dist.all_reduce(m.torch.from_numpy(total), group=m.communicator(number, op, processes))
    ranks, dtype = _ranks(m, number, op), m.graph.blocks[number].reads["y"].dtype
    cuts = np.cumsum([0, *split_evenly(total.size, len(ranks))])
    for source, array in zip(m.own(number, op), arrays, strict=True):
        for target in range(len(ranks)):
            m.send(number, op, source, target, array.reshape(-1)[cuts[target] : cuts[target + 1]], dtype)
            m.send(number, op, source, target, total.reshape(-1)[cuts[source] : cuts[source + 1]], dtype)
    made = Rows(total, values[0].origin) if isinstance(values[0], Rows) else total
    return {"y": _for_all(m, number, op, [made] * len(values))}


def _reduce_scatter(m: Process, number: int, op: int, reads: Reads) -> Out:
    arrays = _own(m, number, op, reads["y"], "a partial sum")
    processes = _alike(m, number, op, arrays)
    ranks, own, dtype = _ranks(m, number, op), m.own(number, op), m.graph.blocks[number].reads["y"].dtype
    rows = len(arrays[0]) // len(ranks)
    parts = np.sum(arrays, axis=0)[: rows * len(ranks)].reshape(len(ranks), rows, *arrays[0].shape[1:])
    members = m.members_of(number, op, processes)
    if len(processes) == 1:
        mine = parts
    elif len({len(some) for some in members}) == 1:
        mine = np.zeros((len(own), *parts.shape[1:]))
        ordered = np.concatenate([parts[some] for some in members])
        group = m.communicator(number, op, processes)
        m.dist.reduce_scatter_tensor(m.torch.from_numpy(mine), m.torch.from_numpy(ordered), group=group)
    else:  # processes with more and fewer ranks of the group
        mine = np.sum(m.all_to_all(number, op, processes, [parts[some] for some in members]), axis=0)
    for source, array in zip(own, arrays, strict=True):
        for target in range(len(ranks)):
            m.send(number, op, source, target, array[target * rows : (target + 1) * rows], dtype)
    return {"y": _for_all(m, number, op, list(mine))}


def _all_gather(m: Process, number: int, op: int, reads: Reads) -> Out:
    arrays = _own(m, number, op, reads["x"], "a part")
    processes = _alike(m, number, op, arrays)
    ranks, tensor = _ranks(m, number, op), m.graph.blocks[number].reads["x"]
    members = m.members_of(number, op, processes)
    padded = np.zeros((max(map(len, members)), *arrays[0].shape), dtype=arrays[0].dtype)
    padded[: len(arrays)] = arrays
    room = [padded]
    if len(processes) > 1:
        room = [np.zeros_like(padded) for _ in processes]
        tensors = [m.torch.from_numpy(one) for one in room]
        m.dist.all_gather(tensors, m.torch.from_numpy(padded), group=m.communicator(number, op, processes))
    parts = {n: one[i] for some, one in zip(members, room, strict=True) for i, n in enumerate(some)}
    whole = gathered(m, number, op, [parts[n] for n in range(len(ranks))])
    for source, array in zip(m.own(number, op), arrays, strict=True):
        for target in range(len(ranks)):
            m.send(number, op, source, target, array, tensor.dtype)
    return {"x": _for_all(m, number, op, [whole] * len(arrays))}


def _broadcast(m: Process, number: int, op: int, reads: Reads) -> Out:
    ranks, own = _ranks(m, number, op), m.own(number, op)
    processes = m.processes(ranks)
    first = _first(m, number, op, own, reads["x"])
    shape = m.same(number, op, processes, first)
    data = np.zeros(shape) if first is None else np.array(first)
    if len(processes) > 1:
        group = m.communicator(number, op, processes)
        m.dist.broadcast(m.torch.from_numpy(data), src=m.process_of[ranks[0]], group=group)
    if 0 in own:
        for target in range(1, len(ranks)):
            m.send(number, op, 0, target, data, m.graph.blocks[number].reads["x"].dtype)
    return {"x": _for_all(m, number, op, [data] * len(own))}


def _dispatch(m: Process, number: int, op: int, reads: Reads) -> Out:
    """Every choice of every token to a copy of its expert, as one all-to-all of rows and one of where each is from.

    Copies take equal parts of an expert's tokens in the order of sources, so every process must know how many tokens of
    every source chose every expert: those counts are gathered first.
    """
    block, copies = m.graph.blocks[number], m.share.copies[number, op]
    ranks, own = _ranks(m, number, op), m.own(number, op)
    processes = m.processes(ranks)
    assert m.model.moe is not None
    hidden = m.model.hidden
    routed: dict[int, Routed] = {n: reads["tokens"][n][0] for n in own if reads["tokens"][n]}
    counts = np.zeros((len(ranks), m.model.moe.experts), dtype=np.int64)
    for n, one in routed.items():
        counts[n] = np.bincount(one.chosen.reshape(-1), minlength=m.model.moe.experts)
        m.tokens += len(one.tokens)
    m.agree(number, op, processes, [m.model.moe.experts, hidden])
    if len(processes) > 1:
        m.dist.all_reduce(m.torch.from_numpy(counts), group=m.communicator(number, op, processes))
    lost = [expert for expert in np.flatnonzero(counts.sum(axis=0)).tolist() if expert not in copies]
    if lost:
        why = f"no op runs expert {lost[0]}, which {int(counts[:, lost[0]].sum())} tokens chose"
        raise Broken(m.name(number, op), why)
    first = np.cumsum(counts, axis=0) - counts  # by source and expert: tokens of the sources before
    ends = {e: np.cumsum(split_evenly(int(counts[:, e].sum()), len(holders))) for e, holders in copies.items()}
    # a row's mark: reading member, expert, turn among the expert's tokens, source, token, choice
    marks: list[list[tuple[int, ...]]] = [[] for _ in processes]
    rows: list[list[Array]] = [[] for _ in processes]
    index = {process: n for n, process in enumerate(processes)}
    dtype = block.writes["tokens"].dtype
    for source, one in routed.items():
        turn = first[source].copy()
        for token, choices in enumerate(one.chosen.tolist()):
            for place, expert in enumerate(choices):
                at = int(turn[expert])
                turn[expert] += 1
                for member in copies[expert][int(np.searchsorted(ends[expert], at, side="right"))]:
                    there = index[m.process_of[ranks[member]]]
                    marks[there].append((member, expert, at, source, token, place))
                    rows[there].append(one.tokens[token])
                    m.send(number, op, source, member, one.tokens[token], dtype)
    values, origins = _exchange(m, number, op, processes, marks, rows, 6)
    out: list[dict[int, Rows] | None] = [{} if n in own else None for n in range(len(ranks))]
    for expert, holders in copies.items():
        for member in (n for holder in holders for n in holder if n in own):
            mine = out[member]
            assert mine is not None
            if expert in mine:
                raise Broken(m.name(number, op), f"expert {expert} is twice on rank {ranks[member]}")
            some = np.flatnonzero((origins[:, 0] == member) & (origins[:, 1] == expert))
            some = some[np.argsort(origins[some, 2], kind="stable")]
            mine[expert] = Rows(values[some], [(a, b, c) for a, b, c in origins[some, 3:].tolist()])
    for n in own:
        m.arrives(ranks[n], out[n] or {})
    return {"tokens": out}


def _combine(m: Process, number: int, op: int, reads: Reads) -> Out:
    """Every row back to its token; of the shards of an expert the first sends the sum."""
    ranks, own = _ranks(m, number, op), m.own(number, op)
    processes = m.processes(ranks)
    k = m.model.moe.top_k if m.model.moe else 1
    tokens = step_tokens(m.draft.spec, m.par).source
    dtype = m.graph.blocks[number].reads["y"].dtype
    index = {process: n for n, process in enumerate(processes)}
    marks: list[list[tuple[int, ...]]] = [[] for _ in processes]
    rows: list[list[Array]] = [[] for _ in processes]
    for member in own:
        for part in reads["y"][member] if member % m.par.expert_tp == 0 else ():
            for value, origin in zip(part.values, part.origin, strict=True):
                there = index[m.process_of[ranks[origin[0]]]]
                marks[there].append(origin)
                rows[there].append(value)
                m.send(number, op, member, origin[0], value, dtype)
    m.agree(number, op, processes, [tokens, k, m.model.hidden])
    values, origins = _exchange(m, number, op, processes, marks, rows, 3)
    parts: list[Array | None] = [None] * len(ranks)
    for source in np.unique(origins[:, 0]).tolist():
        some = origins[:, 0] == source
        places = origins[some, 1] * k + origins[some, 2]
        times = np.bincount(places, minlength=tokens * k)
        if (times != 1).any():
            token = int(np.flatnonzero(times != 1)[0]) // k
            why = f"token {token} of rank {ranks[source]} comes back {times.min()} to {times.max()} times a choice"
            raise Broken(m.name(number, op), why)
        made = np.zeros((tokens * k, m.model.hidden))
        made[places] = values[some]
        parts[source] = made
        m.comes_back(ranks[source], made)
    return {"parts": parts}


def _exchange(
    m: Process,
    number: int,
    op: int,
    processes: list[int],
    marks: list[list[tuple[int, ...]]],
    rows: list[list[Array]],
    width: int,
) -> tuple[Array, Array]:
    """All-to-alls with uneven splits, of rows and of their marks; what came, in the order of processes."""
    sent = [np.array(some, dtype=np.float64).reshape(len(some), m.model.hidden) for some in rows]
    said = [np.array(some, dtype=np.int64).reshape(len(some), width) for some in marks]
    came, heard = m.all_to_all(number, op, processes, sent), m.all_to_all(number, op, processes, said)
    return np.concatenate(came), np.concatenate(heard)


COLLECTIVES: dict[str, Callable[[Process, int, int, Reads], Out]] = {
    "input_split": _input_split,
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "dispatch": _dispatch,
    "combine": _combine,
}
