"""Chakra traces read strictly: what simulators take without a word, a circle or a collective that a member misses, is refused."""

from __future__ import annotations

import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from planc.diagnostics import Diagnostic, PlancError
from planc.export.chakra_file import COLL, COMM_NAMES, COMP, NODE_NAMES, RECV, SEND, Node, Value, parse
from planc.spec.text import decode, parse_json, read_bytes

_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
_TRACE = re.compile(r"trace\.(0|[1-9][0-9]{0,8})\.et")


@dataclass(frozen=True, eq=False)
class Traces:
    """Nodes of every rank in an order in which they can run, members of groups, and what the files say of themselves."""

    ranks: tuple[tuple[Node, ...], ...]
    groups: Mapping[int, tuple[int, ...]]
    about: Mapping[str, Value]

    def numbers(self) -> dict[str, int]:
        """Nodes by type, and `comm_size` bytes by kind, over all ranks."""
        found: Counter[str] = Counter()
        for nodes in self.ranks:
            for node in nodes:
                kind = NODE_NAMES[node.type]
                found[kind] += 1
                if node.type in (COLL, SEND):
                    name = COMM_NAMES.get(int(node.attributes["comm_type"]), "?") if node.type == COLL else kind
                    found[f"{name} bytes"] += int(node.attributes["comm_size"])
        return dict(sorted(found.items()))


def read_traces(folder: str | os.PathLike[str]) -> Traces:
    """Read `trace.<rank>.et` and `comm_groups.json` of a folder. Raises PlancError PLN508 with the first fault."""
    base = Path(folder)
    try:
        record = parse_json(decode(read_bytes(base / "comm_groups.json"), "comm_groups.json"), "comm_groups.json")
        found = {
            int(name[1]): base / name[0]
            for path in base.iterdir()
            if (name := _TRACE.fullmatch(path.name)) and path.is_file()
        }
    except (OSError, ValueError) as error:
        raise _fault(f"{base}: {error}") from None
    except PlancError as error:
        raise _fault(error.diagnostics[0].message) from None
    if not isinstance(record, dict) or not all(map(_is_group, record.items())):
        raise _fault("comm_groups.json is not a mapping of numbers of groups to ranks")
    groups = {int(number): tuple(members) for number, members in record.items()}
    about: dict[str, Value] = {}
    ranks: list[list[Node]] = []
    for rank in range(len(found)):
        if rank not in found:
            raise _fault(f"rank {rank} has no trace")
        try:
            said, nodes = parse(found[rank].read_bytes())
        except (OSError, ValueError) as error:
            raise _fault(f"rank {rank}: {error}") from None
        if rank and said != about:
            raise _fault(f"rank {rank}: its trace is of another plan than that of rank 0")
        about = said
        ranks.append(_in_order(rank, nodes))
    world = len(ranks)
    if not world or about.get("planc.world", world) != world:
        raise _fault(f"there are traces of {world} ranks, not of {about.get('planc.world', 'any')}")
    for number, members in groups.items():
        if len(set(members)) != len(members) or not all(0 <= m < world for m in members):
            raise _fault(f"group {number} has members that are not ranks, or are there twice")
    _meets(ranks, groups)
    return Traces(tuple(map(tuple, ranks)), groups, about)


def _is_group(item: tuple[str, object]) -> bool:
    number, members = item
    return bool(_NUMBER.fullmatch(number)) and isinstance(members, list) and all(type(m) is int for m in members)


def _fault(message: str) -> PlancError:
    return PlancError(
        [Diagnostic("PLN508", message, hint="export the plan again; nothing of the traces can be trusted")]
    )


def _in_order(rank: int, nodes: list[Node]) -> list[Node]:
    """The nodes in the order in which a simulator issues them: the lowest id first of those that can start."""
    by_id = {node.id: node for node in nodes}
    if len(by_id) < len(nodes):
        raise _fault(f"rank {rank}: two nodes have one id")
    waiting: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    for node in nodes:
        deps = {*node.ctrl_deps, *node.data_deps}
        if not deps <= by_id.keys():
            raise _fault(f"rank {rank}: node {node.id} depends on node {min(deps - by_id.keys())}, which is not there")
        if node.type not in (COMP, SEND, RECV, COLL) or (not deps and node.type != COMP):
            raise _fault(
                f"rank {rank}: node {node.id} is of type {node.type}; a rank computes and communicates, and begins with COMP"
            )
        waiting[node.id] = len(deps)
        for dep in deps:
            readers[dep].append(node.id)
    ready = [number for number, count in waiting.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(by_id[number])
        for reader in readers[number]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        raise _fault(f"rank {rank}: {len(nodes) - len(order)} of {len(nodes)} nodes depend on each other in a circle")
    return order


_MESSAGE = ("comm_src", "comm_dst", "comm_tag", "comm_size")


def _check_numbers(told: Mapping[str, Value], names: tuple[str, ...]) -> None:
    """Attributes that are numbers, sizes of at least 1; a kind that there is. Raises KeyError, ValueError."""
    for name in names:
        if type(told[name]) is not int or int(told[name]) < (1 if name == "comm_size" else 0):
            raise ValueError(f"a proper `{name}`")
    if "comm_type" in names and told["comm_type"] not in COMM_NAMES:
        raise ValueError("a `comm_type` that there is")
    if names is _MESSAGE and told["comm_src"] == told["comm_dst"]:
        raise ValueError("another rank to talk to")


def _meets(ranks: list[list[Node]], groups: Mapping[int, tuple[int, ...]]) -> None:
    """Collectives have all of their members, messages both ends, and no rank waits for another in a circle."""
    calls: dict[tuple[int, int], list[tuple[int, object, object]]] = defaultdict(list)
    ends: dict[int, Counter[tuple[object, ...]]] = {SEND: Counter(), RECV: Counter()}
    event: list[dict[int, object]] = []  #: node -> what it is part of, of all ranks
    for rank, nodes in enumerate(ranks):
        turn: Counter[int] = Counter()
        mine: dict[int, object] = {}
        for node in nodes:
            mine[node.id] = (rank, node.id)
            told = node.attributes
            try:
                if node.type in (COLL, SEND, RECV):
                    _check_numbers(told, ("comm_type", "comm_size") if node.type == COLL else _MESSAGE)
                if node.type == COLL:
                    name = str(told["pg_name"])
                    group = int(name) if _NUMBER.fullmatch(name) else -1
                    if rank not in groups[group]:
                        raise _fault(
                            f"rank {rank}: node {node.id} is a collective of group {group}, which it is not in"
                        )
                    calls[group, turn[group]].append((rank, told["comm_type"], told["comm_size"]))
                    mine[node.id] = ("group", group, turn[group])
                    turn[group] += 1
                elif node.type in (SEND, RECV):
                    key = told["comm_src"], told["comm_dst"], told["comm_tag"], told["comm_size"]
                    if rank != (key[0] if node.type == SEND else key[1]):
                        raise _fault(f"rank {rank}: node {node.id} is another rank's end of a message")
                    mine[node.id] = (node.type, *key, ends[node.type][key])
                    ends[node.type][key] += 1
            except (KeyError, ValueError) as error:
                raise _fault(f"rank {rank}: node {node.id} lacks {error}") from None
        event.append(mine)
    for (group, turn_), members in calls.items():
        if {rank for rank, *_ in members} != set(groups[group]):
            missed = min(set(groups[group]) - {rank for rank, *_ in members})
            raise _fault(f"rank {missed} misses collective {turn_} of group {group}")
        if len({(kind, size) for _, kind, size in members}) > 1:
            raise _fault(f"members of group {group} differ in type or size of collective {turn_}")
    if ends[SEND] != ends[RECV]:
        (source, target, tag, size), _ = min(((ends[SEND] - ends[RECV]) + (ends[RECV] - ends[SEND])).items())
        raise _fault(f"a message from rank {source} to {target} (tag {tag}, {size} bytes) has one end only")
    deps: dict[object, set[object]] = defaultdict(set)
    for rank, nodes in enumerate(ranks):
        for node in nodes:
            own = event[rank][node.id]
            deps[own].update(event[rank][d] for d in (*node.ctrl_deps, *node.data_deps))
            if isinstance(own, tuple) and node.type == RECV:
                deps[own].add((SEND, *own[1:]))
    from graphlib import CycleError, TopologicalSorter

    try:
        TopologicalSorter(deps).prepare()
    except CycleError:
        raise _fault("ranks wait for each other's collectives in a circle") from None
