"""One process of a small plan: its own ranks' ops in program order, and torch.distributed between the processes.

Local ops are the executor's (`planc.prove.kinds`); collectives are done here once more, over gloo, with nothing but what
the process holds. Before a collective its processes tell each other which op they are in and what they bring, so that
another order or another size is an error with a name, not a hang or a wrong sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from planc.graph.types import range_text
from planc.prove.collectives import COLLECTIVES
from planc.prove.execute import Machine
from planc.prove.holdings import Held, held_bytes, holdings
from planc.prove.kinds import KINDS
from planc.prove.model import Array, Weights
from planc.prove.proof import Proof, Run
from planc.prove.share import Share, crossings
from planc.prove.values import Broken, Members, Out, Value, value_bytes

#: how sure a fault is to be a cause: what an op found, what waited too long, what was left alone or waited at the end of a step
FOUND, WAITED, LEFT = 0, 1, 2
HEADER = 12  #: numbers of a header
DTYPES = (np.float64, np.int64)
Say = Callable[[str], None]


def run_share(share: Share, store: Any, say: Say, timeout: float) -> dict[str, Any]:
    """Run a process's part and compare it with the model whole, which every process runs by itself. Returns plain values:
    errors, faults (op, why, how sure, since when, processes waited for), bytes moved, bytes held. ``store``: a torch.distributed store."""
    small = share.small
    weights = Weights(small.draft.spec.model, share.seed)
    held = holdings(small.draft, weights, share.ranks)
    proof = Proof(share.name, small.draft.parallelism.world_size, small.layers, share.steps, share.seed)
    run = Run(small, weights, held, proof)
    machine: Process | None = None
    found: list[list[Any]] = []
    at, since = "start", time.time()

    def saying(what: str) -> None:
        nonlocal at, since
        at, since = what, time.time()
        say(what)

    result: dict[str, Any] = {"moved": None, "held": None}
    try:
        saying("start")
        machine = Process(share, held, store, saying, timeout)
        _steps(share, run, machine, held, result, saying)
    except Broken as broken:
        found.append([broken.op, broken.why, FOUND, time.time(), []])
    except RuntimeError as error:  # whatever gloo says: a timeout, or a process that is gone
        text = str(error).strip().splitlines()[0]
        late = "imed out" in text or "imeout" in text
        why = f"waited {timeout:g} s" if late else f"another process left: {text[:200]}"
        ended = at.startswith(("start", "end of"))
        waits = [] if machine is None else machine.waits_for
        found.append([at, why, WAITED if late and not ended else LEFT, since, waits])
    faults = [[op, why, FOUND, float(n), []] for n, (op, why) in enumerate(proof.faults)] + found
    counted = {} if machine is None else {"ops": machine.ops, "tokens": machine.tokens}
    return result | {"process": share.process, "at": at, "errors": proof.errors, "faults": faults} | counted


def _steps(share: Share, run: Run, machine: Process, held: list[Held], result: dict[str, Any], say: Say) -> None:
    spec, mine = share.small.draft.spec, set(share.ranks)
    sequences = run.sequences()
    for rank, one in enumerate(held):
        if rank not in mine:  # contexts are drawn for all; kept are those of the process's ranks
            one.cache.clear()
    sizes = held_bytes(share.small.draft, held)
    result["held"] = {item: size[share.ranks].tolist() for item, size in sizes.items()}
    machine.check = run.check
    x = run.input(0)
    for step in range(share.steps):
        planned = machine.planned = step == 0
        run.whole.forced = run.forced(machine) if planned and spec.model.moe else None
        want = run.whole.step(np.concatenate(x), sequences)
        run.logits = run.whole.logits(want) if spec.model.vocab else want
        stream = machine.step(x)
        if planned:
            result["moved"] = [
                [machine.name(*key), matrix.tolist()] for key, matrix in sorted(machine.moved.collectives.items())
            ]
            result["held"] |= {item: size[share.ranks].tolist() for item, size in machine.needs().items()}
        ids = None
        if machine.collects:
            ids = run.output(want, stream)
        elif spec.model.vocab and spec.workload.phase == "decode":
            ids = run.logits.argmax(axis=1)
        x = run.input(step + 1) if ids is None else run.again(ids)
        say(f"end of step {step}")
        if machine.any_fault(bool(run.proof.faults)):
            return


class Process(Machine):
    """The ranks of one process."""

    def __init__(self, share: Share, held: list[Held], store: Any, say: Say, timeout: float) -> None:
        import torch
        from torch import distributed

        super().__init__(share.small.draft, share.small.graph, held, planned=True)
        self.torch, self.dist, self.say, self.share = torch, distributed, say, share
        self.me, self.process_of, self.timeout = share.process, share.process_of, timedelta(seconds=timeout)
        self.mine = set(share.ranks)
        self.steps = 0
        self.waits_for: list[int] = []  #: processes that the op under way needs, while it does
        self.sending: list[tuple[Any, str, int, Array]] = []  #: with the array, which must live as long
        self.made: dict[tuple[int, int], Out] = {}
        self.out_of: list[list[int]] = [[] for _ in self.graph.blocks]
        self.targets: list[dict[int, list[int]]] = [{} for _ in self.graph.edges]
        for number, edge in enumerate(self.graph.edges):
            self.out_of[edge.source].append(number)
            for source, target in zip(*(side.tolist() for side in self.expanded.pairs(number)), strict=True):
                self.targets[number].setdefault(source, []).append(target)
        count = max(share.process_of) + 1
        patient = timedelta(seconds=max(60.0, timeout))  # processes start at different times
        distributed.init_process_group("gloo", store=store, rank=self.me, world_size=count, timeout=patient)
        # every process makes every communicator, in one order, its own and the others'
        self.world = distributed.new_group(list(range(count)), timeout=self.timeout, backend="gloo")
        self.groups = {
            group: distributed.new_group(list(group), timeout=self.timeout, backend="gloo") for group in share.groups
        }

    @property
    def collects(self) -> bool:
        """Whether the stream leaves on one of the process's ranks."""
        return any(
            int(block.ranks[op, 0]) in self.mine
            for block in self.graph.blocks
            if block.kind == "output_collect"
            for op in range(len(block))
        )

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self, batch: list[Array]) -> list[Value]:
        """Run the program once. Returns what output_collect read, where it is on one of the process's ranks."""
        self.batch, self.made, self.sending = batch, {}, []
        self.moved.collectives.clear()
        self.moved.edges.clear()
        stream: list[Value] = []
        for number, op in self.share.program:
            block = self.graph.blocks[number]
            self.say(self.name(number, op))
            if block.kind == "output_collect":
                stream = self._collect(number, op)
            else:
                reads = {port: self._gather(number, op, port) for port in block.reads}
                run = COLLECTIVES.get(block.kind) or KINDS[block.kind]
                try:
                    out = run(self, number, op, reads)
                except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # sizes that do not go together
                    raise Broken(self.name(number, op), f"cannot be computed: {error}") from error
                for port, tensor in block.writes.items():
                    self._shape(block, op, port, tensor, out.get(port))
                self.made[number, op] = out
                self._post(number, op)
            self.ops += int(block.ranks[op, 0]) in self.mine  # an op of several processes counts once
        for work, name, to, *_ in self.sending:
            self.say(name)
            self.waits_for = [to]
            work.wait(self.timeout)
        self.length += 1
        self.steps += 1
        return stream

    def any_fault(self, fault: bool) -> bool:
        """Whether any process has one: all stop together."""
        self.waits_for = []
        flag = self.torch.tensor([int(fault)])
        self.dist.all_reduce(flag, group=self.world)
        return bool(flag.item())

    # --- edges --------------------------------------------------------------------------------------------------

    def _gather(self, number: int, op: int, port: str) -> Members:
        """What an op reads on a port, for every member of this process; from other processes it is received."""
        block = self.graph.blocks[number]
        found: Members = [[] for _ in range(block.ranks.shape[1])]
        place = {int(rank): n for n, rank in enumerate(block.ranks[op])}
        for edge in self.into[number]:
            if self.graph.edges[edge].into != port:
                continue
            origin = self.graph.blocks[self.graph.edges[edge].source]
            for source in self.sources[edge].get(op, ()):
                for n, rank, there in crossings(self.graph, edge, source, op):
                    if there not in self.mine:
                        continue
                    value = (
                        self._value(edge, source, n, op)
                        if rank in self.mine
                        else self._receive(edge, rank, there, number, op)
                    )
                    if value is not None:
                        part = (
                            self._part(self.graph.edges[edge].tensor, value, rank, block, origin)
                            if rank == there
                            else value
                        )
                        found[place[there]].append(part)
        if not block.collective and not any(found):
            raise Broken(self.name(number, op), f"nothing arrives on its port `{port}`")
        return found

    def _value(self, number: int, source: int, member: int, target: int) -> Value:
        """What an op of this process wrote for an edge; of the batch the replica's part."""
        edge = self.graph.edges[number]
        origin = self.graph.blocks[edge.source]
        if (edge.source, source) not in self.made:
            block = self.name(edge.target, target)
            raise Broken(block, f"reads {self.name(edge.source, source)}, which runs later or not at all")
        values = self.made[edge.source, source]
        if edge.out not in values:
            raise Broken(self.name(edge.source, source), f"writes nothing on `{edge.out}`")
        if origin.kind == "input":
            replica = int(self.graph.blocks[edge.target].ranks[target, 0]) // self.par.replica_size
            return values[edge.out][replica]
        return values[edge.out][member] if origin.collective else values[edge.out]

    def _post(self, number: int, op: int) -> None:
        """Send what other processes read of an op, and count what leaves its rank."""
        for edge in self.out_of[number]:
            target_block = self.graph.blocks[self.graph.edges[edge].target]
            if target_block.kind == "output_collect":
                continue  # a gather: `_collect`
            for target in self.targets[edge].get(op, ()):
                for n, rank, there in crossings(self.graph, edge, op, target):
                    if rank not in self.mine or rank == there:
                        continue
                    value = self._value(edge, op, n, target)
                    self._count(edge, value)
                    if there not in self.mine:
                        self._send(edge, rank, there, number, op, value)

    def _count(self, edge: int, value: Value) -> None:
        comm, dtype = self.graph.edges[edge].comm, self.graph.edges[edge].tensor.dtype
        if value is not None and self.graph.blocks[self.graph.edges[edge].source].kind != "input":
            self.moved.edges[comm] = self.moved.edges.get(comm, 0) + value_bytes(value, dtype)

    def _tag(self, edge: int, rank: int, there: int) -> int:
        """A message's own number between two processes: of its edge and both ranks; even for headers, odd for data."""
        world = len(self.process_of)
        return ((edge * world + rank) * world + there) * 2 % 2**31

    def _send(self, edge: int, rank: int, there: int, number: int, op: int, value: Value) -> None:
        if value is not None and not isinstance(value, np.ndarray):
            raise Broken(self.name(number, op), f"what it hands to rank {there} is no tensor")
        data = np.zeros(0) if value is None else np.ascontiguousarray(value)
        header = _header([self.steps, -1 if value is None else data.ndim, DTYPES.index(data.dtype.type), *data.shape])
        to, tag = self.process_of[there], self._tag(edge, rank, there)
        for array, mark in ((header, tag), (data, tag + 1)):
            if array.size:
                work = self.dist.isend(self.torch.from_numpy(array), to, group=self.world, tag=mark)
                self.sending.append((work, self.name(number, op), to, array))

    def _receive(self, edge: int, rank: int, there: int, number: int, op: int) -> Value:
        source, tag = self.process_of[rank], self._tag(edge, rank, there)
        header = np.zeros(HEADER, dtype=np.int64)
        self._take(header, source, tag)
        step, dims, kind = header[:3].tolist()
        if step != self.steps:
            raise Broken(self.name(number, op), f"rank {rank} sends data of step {step} in step {self.steps}")
        if dims < 0:
            return None
        value = np.zeros(header[3 : 3 + dims].tolist(), dtype=DTYPES[kind])
        if value.size:
            self._take(value, source, tag + 1)
        return value

    def _take(self, array: Array, source: int, tag: int) -> None:
        self.waits_for = [source]
        self.dist.irecv(self.torch.from_numpy(array), source, group=self.world, tag=tag).wait(self.timeout)

    # --- between the processes of a group -----------------------------------------------------------------------

    def processes(self, ranks: list[int]) -> list[int]:
        """Processes of a group's ranks, ascending."""
        return sorted({self.process_of[rank] for rank in ranks})

    def own(self, number: int, op: int) -> list[int]:
        """Members of a collective that are on this process."""
        return [n for n, rank in enumerate(self.graph.blocks[number].ranks[op].tolist()) if rank in self.mine]

    def agree(self, number: int, op: int, processes: list[int], facts: list[int]) -> list[list[int]]:
        """Every process of a group says which op it is in and some facts; all hear the facts of each. Raises Broken where
        they are not in the same op."""
        if len(processes) == 1:
            return [facts]
        self.waits_for = [process for process in processes if process != self.me]
        ranks = self.graph.blocks[number].ranks[op]
        mine = _header([self.steps, number, int(ranks[0]), int(ranks[-1]), len(ranks), *facts])
        heard = [self.torch.zeros(HEADER, dtype=self.torch.int64) for _ in processes]
        self.dist.all_gather(heard, self.torch.from_numpy(mine), group=self.communicator(number, op, processes))
        for process, header in zip(processes, (one.tolist() for one in heard), strict=True):
            if header[:5] != mine[:5].tolist():
                step, other, first, last, group = header[:5]
                name = f"{self.graph.blocks[other].name}.r{first}" + (f"-{last}" if group > 1 else "")
                why = f"ranks {self._ranks_of(process)} are in {name} of step {step} instead: another order of collectives"
                raise Broken(self.name(number, op), why)
        return [one.tolist()[5 : 5 + len(facts)] for one in heard]

    def _ranks_of(self, process: int) -> str:
        return range_text([rank for rank, there in enumerate(self.process_of) if there == process])

    def communicator(self, number: int, op: int, processes: list[int]) -> Any:
        """The group's communicator."""
        if tuple(processes) not in self.groups:
            raise Broken(self.name(number, op), f"no communicator joins the processes {range_text(processes)}")
        return self.groups[tuple(processes)]

    def same(self, number: int, op: int, processes: list[int], own: Array | None) -> tuple[int, ...]:
        """The shape that every process's values have. Raises Broken where they differ."""
        shape = [-1] if own is None else [own.ndim, DTYPES.index(own.dtype.type), *own.shape]
        facts = self.agree(number, op, processes, shape + [0] * (HEADER - 5 - len(shape)))
        said = {tuple(fact) for fact in facts if fact[0] >= 0}
        if len(said) > 1:
            parts = []
            for process, fact in zip(processes, facts, strict=True):
                parts.append(f"{fact[2 : 2 + fact[0]]} from ranks {self._ranks_of(process)}")
            raise Broken(self.name(number, op), f"members bring different sizes: {', '.join(parts)}")
        if not said:
            return ()
        (whole,) = said
        return whole[2 : 2 + whole[0]]

    def members_of(self, number: int, op: int, processes: list[int]) -> list[list[int]]:
        """Members of a collective on each of its processes."""
        ranks = self.graph.blocks[number].ranks[op].tolist()
        return [[n for n, rank in enumerate(ranks) if self.process_of[rank] == process] for process in processes]

    def all_to_all(self, number: int, op: int, processes: list[int], parts: list[Array]) -> list[Array]:
        """Parts [rows, …] to every process of a group; what every process sent here. Rows differ, widths do not."""
        if len(processes) == 1:
            return parts
        group = self.communicator(number, op, processes)
        sizes = self.torch.tensor([len(part) for part in parts])
        coming = self.torch.zeros_like(sizes)
        self.dist.all_to_all_single(coming, sizes, group=group)
        data = self.torch.from_numpy(np.concatenate(parts))
        out = self.torch.zeros((int(coming.sum()), *data.shape[1:]), dtype=data.dtype)
        self.dist.all_to_all_single(out, data, coming.tolist(), sizes.tolist(), group=group)
        return np.split(out.numpy(), np.cumsum(coming.numpy())[:-1])

    # --- the output ---------------------------------------------------------------------------------------------

    def _collect(self, number: int, op: int) -> list[Value]:
        """Gather the stream on the rank of output_collect, in the order of its edges."""
        block = self.graph.blocks[number]
        root = int(block.ranks[op, 0])
        wanted: list[tuple[int, int, int, int]] = [
            (edge, source, n, rank)
            for edge in self.into[number]
            for source in self.sources[edge].get(op, ())
            for n, rank, _ in crossings(self.graph, edge, source, op)
        ]
        own = [self._value(edge, source, n, op) for edge, source, n, rank in wanted if rank in self.mine]
        for edge, source, n, rank in wanted:
            if rank in self.mine and rank != root:
                self._count(edge, self._value(edge, source, n, op))
        processes = self.share.collecting[number, op]
        stacked = np.stack(own) if own and len({v.shape for v in own}) == 1 else None
        if own and stacked is None:
            raise Broken(self.name(number, op), "parts of the stream differ in size")
        self.same(number, op, processes, own[0] if own else None)
        counts = [fact[0] for fact in self.agree(number, op, processes, [len(own)])]
        if len(processes) == 1:
            return own
        most, shape, dtype = max(counts), own[0].shape if own else None, own[0].dtype if own else None
        if shape is None or dtype is None:  # a root without a part of its own knows the plan's
            tensor = block.reads["stream"]
            shape, dtype = tensor.shape, np.dtype(np.int64 if tensor.dtype == "int32" else np.float64)
        padded = np.zeros((most, *shape), dtype=dtype)
        if stacked is not None:
            padded[: len(own)] = stacked
        to = self.process_of[root]
        room = [self.torch.from_numpy(np.zeros_like(padded)) for _ in processes] if to == self.me else None
        self.dist.gather(self.torch.from_numpy(padded), room, dst=to, group=self.communicator(number, op, processes))
        if room is None:
            return []
        queues = {process: iter(one.numpy()) for process, one in zip(processes, room, strict=True)}
        return [next(queues[self.process_of[rank]]) for _, _, _, rank in wanted]


def _header(numbers: list[int]) -> Array:
    if len(numbers) > HEADER:
        raise ValueError("a header is too long")
    return np.array([*numbers, *[0] * (HEADER - len(numbers))], dtype=np.int64)
