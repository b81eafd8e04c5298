"""Copies onto holders so that the fullest holder carries as little as can be.

All layers are packed at once: heaviest copy first onto the emptiest holder, then swaps that relieve the fullest holder.
Layers that are not yet at their bound go on one by one, with exchanges of two copies against two, and with copies that
are taken from one expert and given to another.
"""

from __future__ import annotations

import numpy as np

from planc.planner.apportion import smallest_largest_share
from planc.planner.tables import EMPTY

_NEAR = 2e-4  #: a layer within this share of its bound is done
_FAR = 5e-3  #: a layer further from its bound than this share has moves of copies tried with a packing of their own
_FEW = 16  #: as has every layer of so few experts
_TAKERS, _GIVERS = 3, 16  #: experts that get and that lose a copy in such moves, where there are more
_BATCHED, _SINGLE = 400, 300  #: steps at most; a step relieves the fullest holder once


def balanced(loads: np.ndarray, counts: np.ndarray, holders: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the copies of every layer.

    ``loads``: float [layers, E]; ``counts``: copies of each expert, int [layers, E], together more than holders ×
    (slots − 1) and the same number in every layer. Returns (slot table int32
    [layers, holders, slots] with the expert in each slot or `EMPTY`, counts int64 [layers, E]); the counts returned can
    differ from those given where moving a copy to another expert evens the load. No holder has an expert twice.
    """
    table = longest_first(loads, counts, holders, slots)
    counts = counts.copy()
    _swap_all(table, loads, counts)
    bound = lower_bound(loads, int(counts.sum(axis=1).max()), holders, slots)
    fullest = holder_loads(table, loads, counts).max(axis=1)
    if slots > 1:
        for layer in np.flatnonzero(fullest > bound * (1 + _NEAR)).tolist():
            if slots == 2:
                _pair(table[layer], loads[layer], counts[layer], float(bound[layer]))
            _improve(table[layer], loads[layer], counts[layer], float(bound[layer]))
            _recount(table[layer], loads[layer], counts[layer], float(bound[layer]))
    return table, counts


def repacked(table: np.ndarray, loads: np.ndarray, node: np.ndarray) -> np.ndarray:
    """One layer's copies shared evenly among the holders of each node; none leaves its node. ``loads``: float [E];
    ``node``: int [holders]. int32 [holders, slots]."""
    counts = np.maximum(np.bincount(table[table != EMPTY], minlength=len(loads)), 1)
    result = table.copy()
    for n in range(int(node.max()) + 1):
        here = np.flatnonzero(node == n)
        held = table[here]
        experts, number = np.unique(held[held != EMPTY], return_counts=True)
        if not len(experts) or len(here) < 2:
            continue
        own = (loads / counts)[experts] * number  # of a copy elsewhere nothing changes
        inner = longest_first(own[None], number[None], len(here), table.shape[1])
        _swap_all(inner, own[None], number[None])
        result[here] = np.where(inner[0] == EMPTY, EMPTY, experts[inner[0]])
    return result


def lower_bound(loads: np.ndarray, copies: int, holders: int, slots: int) -> np.ndarray:
    """No placement of ``copies`` copies has a fullest holder below this, float [layers]: the mean load, and the largest
    share of a copy under the best split of the copies. Without copies to spare, and every slot filled, also: the heaviest
    expert beside the lightest that fill its holder, and, of the n · holders + 1 heaviest, the n + 1 that must meet."""
    found = [loads.sum(axis=1) / holders, smallest_largest_share(loads, copies, holders)]
    if copies == loads.shape[1] == holders * slots:
        order = -np.sort(-loads, axis=1)
        found.append(order[:, 0] + order[:, copies - slots + 1 :].sum(axis=1))
        for n in range(1, slots):
            met = order[:, n * holders - n : n * holders + 1].sum(axis=1)
            found.append(met + order[:, copies - (slots - n - 1) :].sum(axis=1))
    return np.asarray(np.maximum.reduce(found))


def copy_load(loads: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Load of one copy of each expert when its copies share evenly, with a zero appended for `EMPTY`; [layers, E + 1]."""
    share = loads / counts
    return np.concatenate([share, np.zeros((len(share), 1))], axis=1)


def holder_loads(table: np.ndarray, loads: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Load of every holder, float [layers, holders]."""
    share = copy_load(loads, counts)
    return np.asarray(np.take_along_axis(share, table.reshape(len(table), -1), axis=1).reshape(table.shape).sum(axis=2))


# --- heaviest first --------------------------------------------------------------------------------------------------


def longest_first(loads: np.ndarray, counts: np.ndarray, holders: int, slots: int) -> np.ndarray:
    """LPT with at most ``slots`` copies a holder and no expert twice on one, all layers at once. Holders differ by at most
    one copy, so only as many fill their last slot as must."""
    layers, experts = loads.shape
    share = loads / counts
    order = np.argsort(-share, axis=1, kind="stable")
    sorted_counts = np.take_along_axis(counts, order, axis=1)
    copies = int(counts.sum(axis=1).max())
    ends = np.cumsum(sorted_counts, axis=1)
    which = np.stack([np.searchsorted(row, np.arange(copies), side="right") for row in ends])
    every = np.arange(layers)
    table = np.full((layers, holders, slots), EMPTY, dtype=np.int32)
    total, used = np.zeros((layers, holders)), np.zeros((layers, holders), dtype=np.int64)
    full = counts.sum(axis=1) - holders * (slots - 1)  # holders that may still fill their last slot, [layers]
    lost: set[int] = set()  # layers in which an expert found no holder without it
    last = np.full((layers, holders), EMPTY)  # copies of one expert come one after another: the last tells
    for i in range(copies):
        here = np.flatnonzero(which[:, i] < experts)
        rows = every[here]
        expert = order[rows, which[rows, i]]
        room = used[rows] < slots - (full[rows] <= 0)[:, None]
        cost = np.where(room & (last[rows] != expert[:, None]), total[rows], np.inf)
        target = np.argmin(cost, axis=1)
        stuck = np.isinf(cost[np.arange(len(rows)), target])
        for n in np.flatnonzero(stuck).tolist():
            open_ = np.flatnonzero(room[n])
            target[n] = _make_room(
                table[rows[n]], used[rows[n]], total[rows[n]], share[rows[n]], int(expert[n]), open_.tolist()
            )
            if target[n] < 0:
                lost.add(int(rows[n]))
                target[n] = int(np.argmin(used[rows[n]]))
        table[rows, target, used[rows, target]] = expert
        used[rows, target] += 1
        full[rows] -= used[rows, target] == slots
        total[rows, target] += share[rows, expert]
        last[rows, target] = expert
    for layer in lost:
        table[layer] = _most_copies_first(counts[layer], holders, slots)
    return table


def _make_room(
    table: np.ndarray, used: np.ndarray, total: np.ndarray, share: np.ndarray, expert: int, open_: list[int]
) -> int:
    """Every holder with a free slot (``open_``) has the expert: move a copy from a holder without it to one of them.
    Returns the holder that now has room, or -1 where no such move is left."""
    for free in open_:
        held = set(table[free, : used[free]].tolist())
        for other in np.argsort(total, kind="stable").tolist():
            row = table[other, : used[other]].tolist()
            if expert in row:
                continue
            for j, e in enumerate(row):
                if e not in held:
                    table[free, used[free]] = e
                    used[free] += 1
                    total[free] += share[e]
                    table[other, j:-1] = table[other, j + 1 :]
                    table[other, -1] = EMPTY
                    used[other] -= 1
                    total[other] -= share[e]
                    return int(other)
    return -1


def _most_copies_first(counts: np.ndarray, holders: int, slots: int) -> np.ndarray:
    """Copies of one layer by the rules alone, whatever their load: the expert with the most copies first, onto the holders
    with the most room. That always works out (Gale-Ryser). int32 [holders, slots]."""
    table = np.full((holders, slots), EMPTY, dtype=np.int32)
    used = np.zeros(holders, dtype=np.int64)
    for e in np.argsort(-counts, kind="stable").tolist():
        chosen = np.argsort(used, kind="stable")[: counts[e]]
        table[chosen, used[chosen]] = e
        used[chosen] += 1
    return table


# --- swaps, all layers at once ---------------------------------------------------------------------------------------


def _swap_all(table: np.ndarray, loads: np.ndarray, counts: np.ndarray) -> None:
    """Swap one copy of the fullest holder with one elsewhere while that relieves it, in every layer at once."""
    layers, holders, slots = table.shape
    if holders < 2:
        return
    share = copy_load(loads, counts)
    x = np.take_along_axis(share, table.reshape(layers, -1), axis=1).reshape(table.shape)
    total = x.sum(axis=2)
    active = np.arange(layers)
    for _ in range(_BATCHED):
        t, xs, w = table[active], x[active], total[active]
        every = np.arange(len(active))
        hot = np.argmax(w, axis=1)
        mine, top = xs[every, hot], w[every, hot]
        gives = mine[:, :, None, None] - xs[:, None, :, :]  # what the holder loses, [active, slots, holders, slots]
        after = np.maximum(top[:, None, None, None] - gives, w[:, None, :, None] + gives)
        own = t[every, hot]
        theirs = (own[:, :, None, None] == t[:, None, :, :]).any(axis=3)  # two empty slots may not meet either
        ours = (t[:, :, :, None] == own[:, None, None, :]).any(axis=3)
        after[np.broadcast_to(theirs[:, :, :, None] | ours[:, None, :, :], after.shape)] = np.inf
        after[every, :, hot] = np.inf
        flat = after.reshape(len(active), -1)
        best = np.argmin(flat, axis=1)
        better = flat[every, best] < top * (1 - 1e-12)
        i, g, j = np.unravel_index(best, (slots, holders, slots))
        rows, i, g, j, hot = active[better], i[better], g[better], j[better], hot[better]
        if not len(rows):
            return
        moved = x[rows, hot, i] - x[rows, g, j]
        total[rows, hot] -= moved
        total[rows, g] += moved
        for array in (table, x):
            array[rows, hot, i], array[rows, g, j] = array[rows, g, j], array[rows, hot, i].copy()
        active = rows


# --- one layer at a time ---------------------------------------------------------------------------------------------


def _improve(table: np.ndarray, loads: np.ndarray, counts: np.ndarray, bound: float) -> None:
    """Relieve the fullest holder of one layer by the best of three moves until none helps: one copy against one, two
    against two, or one more copy of an expert on it at the cost of another expert's."""
    for _ in range(_SINGLE):
        share = np.append(loads / counts, 0.0)
        total = share[table].sum(axis=1)
        top = float(total.max())
        if top <= bound * (1 + _NEAR):
            return
        hot = int(np.argmax(total))
        if _exchange(table, share, total, hot, 1) or _exchange(table, share, total, hot, 2):
            continue
        if not _reapportion(table, loads, counts, share, total, hot):
            return


def _exchange(table: np.ndarray, share: np.ndarray, total: np.ndarray, hot: int, width: int) -> bool:
    """Exchange ``width`` copies of holder ``hot`` against as many of another one if that relieves it."""
    slots = table.shape[1]
    if width > slots:
        return False
    chosen = np.array(_choices(slots, width))  # [choices, width]
    mine, theirs = table[hot][chosen], table[:, chosen]  # [choices, width], [holders, choices, width]
    gives = share[mine].sum(axis=1)[:, None, None] - share[theirs].sum(axis=2)[None]  # [choices, holders, choices]
    after = np.maximum(total[hot] - gives, total[None, :, None] + gives)
    after[:, hot] = np.inf
    after[after >= total[hot] * (1 - 1e-12)] = np.inf
    for flat in np.argsort(after, axis=None, kind="stable")[:64].tolist():
        a, g, b = np.unravel_index(flat, after.shape)
        if np.isinf(after[a, g, b]):
            return False
        here, there = table[hot].copy(), table[g].copy()
        here[chosen[a]], there[chosen[b]] = table[g][chosen[b]], table[hot][chosen[a]]
        if _distinct(here) and _distinct(there):
            table[hot], table[g] = here, there
            return True
    return False


def _choices(slots: int, width: int) -> list[tuple[int, ...]]:
    from itertools import combinations

    return list(combinations(range(slots), width))


def _distinct(row: np.ndarray) -> bool:
    """No expert twice, and at most one empty slot: holders differ by at most one copy."""
    return len(np.unique(row)) == len(row)


def _reapportion(
    table: np.ndarray, loads: np.ndarray, counts: np.ndarray, share: np.ndarray, total: np.ndarray, hot: int
) -> bool:
    """Give an expert of holder ``hot`` one more copy, in the slot of a copy of another expert that has several."""
    holders, _ = table.shape
    takers = [e for e in table[hot].tolist() if e != EMPTY and counts[e] < holders]
    spots = np.argwhere((table != EMPTY) & (counts[table] > 1))
    if not takers or not len(spots):
        return False
    has = np.zeros((len(loads), holders))
    rows, columns = np.nonzero(table != EMPTY)
    has[table[rows, columns], rows] = 1.0
    giver = table[spots[:, 0], spots[:, 1]]
    grows = loads[giver] / (counts[giver] - 1) - share[giver]
    base = total[None, :] + grows[:, None] * has[giver]  # the giver's other copies take over
    base[np.arange(len(spots)), spots[:, 0]] -= loads[giver] / (counts[giver] - 1)
    best, move = float(_crowding(total / total[hot])) * (1 - 1e-9), None
    for taker in takers:
        new = loads[taker] / (counts[taker] + 1)
        after = base - (share[taker] - new) * has[taker][None, :]
        after[np.arange(len(spots)), spots[:, 0]] += new
        score = _crowding(after / total[hot])
        score[(giver == taker) | (has[taker][spots[:, 0]] > 0)] = np.inf
        n = int(np.argmin(score))
        if score[n] < best:
            best, move = float(score[n]), (taker, n)
    if move is None:
        return False
    taker, n = move
    counts[giver[n]] -= 1
    counts[taker] += 1
    table[spots[n, 0], spots[n, 1]] = taker
    return True


def _recount(table: np.ndarray, loads: np.ndarray, counts: np.ndarray, bound: float) -> None:
    """Move copies from expert to expert, pack each outcome anew, and keep the best while it is better: for layers that stay
    far from their bound, as where one expert fills many holders. Each outcome is a layer to the code above, so all are
    packed at once. With few experts every move is tried. `_improve` looks at all full holders, so it may leave the fullest
    one fuller than it was: what it makes of an outcome is kept only where it does not."""
    holders, slots = table.shape
    few = len(counts) <= _FEW
    copies, near = int(counts.sum()), bound * (1 + (_NEAR if few else _FAR))
    if (slots < 3 and not few) or copies == len(counts):
        return
    while True:
        share = np.append(loads / counts, 0.0)
        total = share[table].sum(axis=1)
        fullest = float(total.max())
        moves = _moves(loads, counts, holders, None if few else table[int(np.argmax(total))])
        if fullest <= near or not moves:
            return
        tried, every = np.array(moves), np.tile(loads, (len(moves), 1))
        tables = longest_first(every, tried, holders, slots)
        _swap_all(tables, every, tried)
        after = holder_loads(tables, every, tried).max(axis=1)
        best = int(np.argmin(after))
        if after[best] >= fullest * (1 - 1e-4):
            return
        table[:], counts[:] = tables[best], tried[best]
        further, moved = table.copy(), counts.copy()
        _improve(further, loads, moved, bound)
        if holder_loads(further[None], loads[None], moved[None]).max() <= after[best]:
            table[:], counts[:] = further, moved


def _moves(loads: np.ndarray, counts: np.ndarray, holders: int, hot: np.ndarray | None) -> list[np.ndarray]:
    """Count vectors with one copy moved; with ``hot``, the experts of the fullest holder, only to the heaviest of them, from
    the experts that miss it least."""
    takers, givers = np.flatnonzero(counts < holders), np.flatnonzero(counts > 1)
    if hot is not None:
        on_it = np.array([e for e in hot.tolist() if e != EMPTY and counts[e] < holders], dtype=np.int64)
        takers = on_it[np.argsort(-(loads / counts)[on_it], kind="stable")[:_TAKERS]]
        givers = givers[np.argsort((loads[givers] / (counts[givers] - 1)), kind="stable")[:_GIVERS]]
    found = []
    for taker in takers.tolist():
        for giver in givers.tolist():
            if giver != taker:
                moved = counts.copy()
                moved[taker] += 1
                moved[giver] -= 1
                found.append(moved)
    return found


def _crowding(relative: np.ndarray) -> np.ndarray:
    """Sum over holders of a high power of their load (relative to the fullest): it falls also when one of several
    equally full holders is relieved, which the maximum alone does not show."""
    square = relative * relative
    fourth = square * square
    return np.asarray((fourth**8).sum(axis=-1))


# --- two slots a holder ----------------------------------------------------------------------------------------------


def _pair(table: np.ndarray, loads: np.ndarray, counts: np.ndarray, bound: float) -> None:
    """Two slots a holder: the best pairing of given copies is heaviest with lightest, so only the counts are searched.
    A further copy goes to the heavier or the lighter expert of the fullest pair (a lighter partner helps as much),
    taken from an expert that has several. Writes the best pairing found into ``table`` and ``counts``."""
    holders = len(table)
    best = counts.copy()
    fullest, crowding, pair = _folded(loads, best[None], holders)
    start, wide = float(fullest[0]), False
    for _ in range(_SINGLE):
        if fullest[0] <= bound * (1 + _NEAR):
            break
        moves = _count_moves(loads, best, pair[0], holders, 48 if wide else 12)
        if not len(moves):
            break
        tried = _folded(loads, moves, holders)
        n = int(np.argmin(tried[1]))
        if tried[1][n] < crowding[0] * (1 - 1e-9):
            best = moves[n]
            fullest, crowding, pair = (part[n : n + 1] for part in tried)
        elif wide or fullest[0] < start * 0.995:
            break
        else:
            wide = True
    new = _fold_table(loads, best, holders)
    now = float((loads / counts)[table].sum(axis=1, where=table != EMPTY).max())
    if new is not None and (loads / best)[new].sum(axis=1, where=new != EMPTY).max() < now * (1 - 1e-12):
        table[:], counts[:] = new, best


def _count_moves(loads: np.ndarray, counts: np.ndarray, pair: np.ndarray, holders: int, width: int) -> np.ndarray:
    """Count vectors with one copy moved to an expert of the fullest pair or to one of the lightest experts, taken from
    one of the ``width`` experts that miss it least; int [n, E]."""
    share = loads / counts
    light = np.argsort(share, kind="stable")[: width // 6].tolist()
    takers = [e for e in dict.fromkeys([*pair.tolist(), *light]) if e != EMPTY and counts[e] < holders]
    several = np.flatnonzero(counts > 1)
    givers = several[np.argsort(loads[several] / (counts[several] - 1), kind="stable")[:width]].tolist()
    moves = []
    for taker in takers:
        for giver in givers:
            if giver != taker:
                moved = counts.copy()
                moved[taker] += 1
                moved[giver] -= 1
                moves.append(moved)
    return np.array(moves)


def _folded(loads: np.ndarray, counts: np.ndarray, holders: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(fullest pair's load, crowding, the two experts of the fullest pair) for each row of ``counts``."""
    share, experts = _sorted_copies(loads, counts, holders)
    sums = share[:, :holders] + share[:, : holders - 1 : -1]
    top, every = np.argmax(sums, axis=1), np.arange(len(counts))
    pairs = np.stack([experts[every, top], experts[every, 2 * holders - 1 - top]], axis=1)
    return sums.max(axis=1), _crowding(sums * (holders / loads.sum())), pairs


def _sorted_copies(loads: np.ndarray, counts: np.ndarray, holders: int) -> tuple[np.ndarray, np.ndarray]:
    """(load, expert) of all copies, heaviest first, filled up with empty slots to two a holder; [n, 2 · holders] each for
    counts [n, E] whose rows have one sum."""
    share = loads / counts
    order = np.argsort(-share, axis=1, kind="stable")
    copies = int(counts[0].sum())
    expert = np.full((len(counts), 2 * holders), EMPTY)
    expert[:, :copies] = np.repeat(order, np.take_along_axis(counts, order, axis=1).reshape(-1)).reshape(-1, copies)
    padded = np.concatenate([share, np.zeros((len(share), 1))], axis=1)
    return np.take_along_axis(padded, expert, axis=1), expert


def _fold_table(loads: np.ndarray, counts: np.ndarray, holders: int) -> np.ndarray | None:
    """Heaviest with lightest as a table; a pair of one expert trades partners with a neighbour. None where it cannot."""
    (share,), (expert,) = _sorted_copies(loads, counts[None], holders)
    table = np.stack([expert[:holders], expert[: holders - 1 : -1]], axis=1).astype(np.int32)
    heavy, light = share[:holders], share[: holders - 1 : -1].copy()
    for h in np.flatnonzero((table[:, 0] == table[:, 1]) & (table[:, 0] != EMPTY)).tolist():
        e = table[h, 0]
        after = np.maximum(heavy[h] + light, heavy + light[h])
        after[(table == e).any(axis=1)] = np.inf
        g = int(np.argmin(after))
        if np.isinf(after[g]):
            return None
        table[h, 1], table[g, 1] = table[g, 1], table[h, 1]
        light[h], light[g] = light[g], light[h]
    return table
