"""The algorithms that expert placements are compared with, stated again from their published descriptions.

The load balancer for expert parallelism (EPLB) first replicates: the next copy goes to the expert with the largest load
per copy until the slots are full. It then packs: heaviest copy first, onto the GPU with the least load that has a free
slot. With one slot a GPU the packing is left out, and slot i is on GPU i. Hierarchical, it packs the expert groups of the gate
onto nodes first and does the rest inside each node. Both permit two copies of one expert on one GPU.

The published code replicates all layers at once (tensors) and packs with loops over layers and copies;
`packed_in_loops` does that with Python lists, `packed_at_once` is the faster form for all layers at once that engines ported
to numpy. Both give the same placement.

Tables are int [layers, gpus, slots], the expert in each slot; every slot is filled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Packing = Callable[[np.ndarray, int], np.ndarray]


def eplb_greedy(loads: np.ndarray, slots: int, gpus: int, packed: Packing) -> np.ndarray:
    """EPLB's global policy. ``loads``: float [layers, E]; ``slots``: of all GPUs together."""
    expert, counts = replicated(loads, slots)
    share = np.take_along_axis(loads / counts, expert, axis=1)
    return np.take_along_axis(expert, packed(share, gpus).reshape(len(loads), -1), axis=1).reshape(len(loads), gpus, -1)


def eplb_hierarchical(
    loads: np.ndarray, slots: int, gpus: int, groups: int, nodes: int, packed: Packing
) -> np.ndarray | None:
    """EPLB's policy for gates that choose groups of experts: groups onto nodes, then the global policy inside each node.
    None where groups, slots or GPUs do not divide over the nodes."""
    layers, experts = loads.shape
    if groups % nodes or slots % nodes or gpus % nodes:
        return None
    size = experts // groups
    home = packed(loads.reshape(layers, groups, size).sum(axis=2), nodes)  # groups of each node
    own = (home[:, :, :, None] * size + np.arange(size)).reshape(layers * nodes, -1)  # experts of each node
    inner = np.take_along_axis(np.repeat(loads, nodes, axis=0), own, axis=1)
    table = eplb_greedy(inner, slots // nodes, gpus // nodes, packed)
    whole = np.take_along_axis(own, table.reshape(layers * nodes, -1), axis=1)
    return whole.reshape(layers, gpus, -1)


def replicated(loads: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(expert of each slot [layers, slots], copies of each expert [layers, E]): first one of each, then one more of the
    expert whose copies carry most, until the slots are full."""
    layers, experts = loads.shape
    every = np.arange(layers)
    expert = np.empty((layers, slots), dtype=np.int64)
    expert[:, :experts] = np.arange(experts)
    counts = np.ones((layers, experts), dtype=np.int64)
    for slot in range(experts, slots):
        hottest = np.argmax(loads / counts, axis=1)
        expert[:, slot] = hottest
        counts[every, hottest] += 1
    return expert, counts


def packed_in_loops(weight: np.ndarray, packs: int) -> np.ndarray:
    """Items of each pack, int [layers, packs, items / packs]: heaviest first, onto the pack with the least weight that has
    room. ``weight``: float [layers, items]."""
    layers, items = weight.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (layers, 1)).reshape(layers, packs, 1)
    result = []
    for row in weight.tolist():
        total, held = [0.0] * packs, [[] for _ in range(packs)]
        for item in sorted(range(items), key=lambda i: -row[i]):
            pack = min((p for p in range(packs) if len(held[p]) < room), key=total.__getitem__)
            held[pack].append(item)
            total[pack] += row[item]
        result.append(held)
    return np.array(result)


def packed_at_once(weight: np.ndarray, packs: int) -> np.ndarray:
    """The same packs as `packed_in_loops`, all layers at once."""
    layers, items = weight.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (layers, 1)).reshape(layers, packs, 1)
    every = np.arange(layers)
    order = np.argsort(-weight, axis=1, kind="stable")
    total, used = np.zeros((layers, packs)), np.zeros((layers, packs), dtype=np.int64)
    result = np.empty((layers, packs, room), dtype=np.int64)
    for item in order.T:
        pack = np.argmin(np.where(used < room, total, np.inf), axis=1)
        result[every, pack, used[every, pack]] = item
        used[every, pack] += 1
        total[every, pack] += weight[every, item]
    return result


def longest_first_over_nodes(loads: np.ndarray, slots: int, gpus_per_node: int, nodes: int) -> np.ndarray:
    """LPT on nodes: EPLB's copies, heaviest first, onto the node with the least load that has a free slot, and there onto
    the GPU with the least load that has one."""
    layers, gpus = len(loads), gpus_per_node * nodes
    expert, counts = replicated(loads, slots)
    share = np.take_along_axis(loads / counts, expert, axis=1)
    table = np.empty((layers, gpus, slots // gpus), dtype=np.int64)
    for layer, row in enumerate(share.tolist()):
        total, held = [0.0] * gpus, [[] for _ in range(gpus)]
        on_node, room = [0.0] * nodes, [slots // nodes] * nodes
        for copy in sorted(range(slots), key=lambda i: -row[i]):
            node = min((n for n in range(nodes) if room[n]), key=on_node.__getitem__)
            members = range(node * gpus_per_node, (node + 1) * gpus_per_node)
            gpu = min((g for g in members if len(held[g]) < slots // gpus), key=total.__getitem__)
            held[gpu].append(int(expert[layer, copy]))
            total[gpu] += row[copy]
            on_node[node] += row[copy]
            room[node] -= 1
        table[layer] = held
    return table


def identity(layers: int, experts: int, slots: int, gpus: int) -> np.ndarray:
    """Consecutive experts on consecutive GPUs; the slots after the last expert begin again with the first."""
    return np.tile((np.arange(slots) % experts).reshape(gpus, -1), (layers, 1, 1))


def held_twice(tables: np.ndarray) -> int:
    """GPUs that hold two copies of one expert, over all layers. ``tables``: int [layers, gpus, slots], -1 for none."""
    ordered = np.sort(tables, axis=2)
    return int(((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any(axis=2).sum())
