"""Running a plan's graph op by op, with nothing but the graph and what each rank holds.

The executor knows what a kind of op means (`kinds`). Which ops there are, on which ranks, what reads what, who takes part in a
collective and which expert an op runs all come from the graph; weights and KV cache from the rank that the op is on. Data
crosses ranks only inside collectives and over edges between ranks, and every crossing is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from planc.graph import ROWS, Expanded, OpBlock, PlanGraph, TensorType, expand
from planc.placement import step_tokens, working_sets
from planc.prove.holdings import Held
from planc.prove.kinds import KINDS, SEVERAL, dispatch_copies
from planc.prove.model import Array
from planc.prove.values import WRONG, Broken, Members, Moved, Out, Reads, Routed, Rows, Value, value_bytes
from planc.verify import Draft


class Machine:
    """All ranks of a small plan. ``planned``: tokens go where the plan counts them, else where their gates choose.

    ``places``: of every op of a block (by its rank array, which blocks share) rank -> member; ``copies``: of every dispatch op
    where its experts are.
    """

    def __init__(self, draft: Draft, graph: PlanGraph, held: list[Held], *, planned: bool) -> None:
        self.draft, self.graph, self.held, self.planned = draft, graph, held, planned
        self.par, self.model = draft.parallelism, draft.spec.model
        self.expanded: Expanded = expand(graph)
        self.order = program_order(graph)
        self.into: list[list[int]] = [[] for _ in graph.blocks]
        for number, edge in enumerate(graph.edges):
            self.into[edge.target].append(number)
        self.sources = [_sources(self.expanded, number) for number in range(len(graph.edges))]
        self.places = {
            id(b.ranks): [{r: n for n, r in enumerate(row)} for row in b.ranks.tolist()] for b in graph.blocks
        }
        self.copies = dispatch_copies(graph)
        self.length = draft.spec.workload.isl if draft.spec.workload.phase == "decode" else 0
        self.moved = Moved()
        self.received = np.zeros(graph.world_size, dtype=np.int64)  #: most rows that a dispatch brought a rank
        self.returned = np.zeros(graph.world_size, dtype=np.int64)  #: most values that a combine brought back
        self.stream = np.zeros(graph.world_size, dtype=np.int64)  #: most values of a residual stream that a layer reads
        kinds = working_sets(draft.spec, draft.parallelism, draft.placement)
        #: by kind of op: most values that one keeps beside it
        self.working = {kind: np.zeros(graph.world_size, dtype=np.int64) for kind in kinds}
        self.ops = 0
        self.tokens = 0
        self.outputs: dict[int, list[dict[str, Value]]] = {}
        self.check: Callable[[OpBlock, int, Array], None] = lambda block, op, value: None

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self, batch: list[Array]) -> list[Value]:
        """Run every op once. ``batch``: the input of every replica. Returns what output_collect read."""
        self.outputs, self.moved, self.batch = {}, Moved(), batch
        stream: list[Value] = []
        for number in self.order:
            block = self.graph.blocks[number]
            made = []
            for op in range(len(block)):
                reads = {port: self._gather(number, op, port) for port in block.reads}
                out = self._run(number, op, reads)
                for port, tensor in block.writes.items():
                    self._shape(block, op, port, tensor, out.get(port))
                if block.kind == "output_collect":
                    stream = reads["stream"][0]
                made.append(out)
                self.ops += 1
            self.outputs[number] = made
        self.length += 1 if self.draft.spec.workload.phase == "decode" else step_tokens(self.draft.spec, self.par).group
        return stream

    def _run(self, number: int, op: int, reads: Reads) -> Out:
        """One op. What arrives may be anything, as the plan may be wrong: an op that cannot compute with it says so."""
        try:
            return KINDS[self.graph.blocks[number].kind](self, number, op, reads)
        except WRONG as error:
            why = f"cannot compute with what arrives ({type(error).__name__}: {error})"
            raise Broken(self.name(number, op), why) from error

    def name(self, number: int, op: int) -> str:
        """Text id of an op."""
        return self.graph.op_id(number, op)

    def _gather(self, number: int, op: int, port: str) -> Members:
        """What an op reads on a port, for every member."""
        block = self.graph.blocks[number]
        found: Members = [[] for _ in range(block.ranks.shape[1])]
        place = self.places[id(block.ranks)][op]
        for edge in self.into[number]:
            if self.graph.edges[edge].into != port:
                continue
            for source in self.sources[edge].get(op, ()):
                self._carry(edge, source, number, op, place, found)
        if not any(found):
            raise Broken(self.name(number, op), f"nothing arrives on its port `{port}`")
        most = max(map(len, found))
        if most > 1 and block.kind not in SEVERAL:
            raise Broken(self.name(number, op), f"{most} values arrive on its port `{port}`, which takes one")
        return found

    def _carry(self, number: int, source: int, target: int, op: int, place: dict[int, int], found: Members) -> None:
        """One edge: from the ranks of its source op to those of its target op."""
        edge = self.graph.edges[number]
        origin, block = self.graph.blocks[edge.source], self.graph.blocks[target]
        if edge.source not in self.outputs:
            raise Broken(self.name(target, op), f"reads {self.name(edge.source, source)}, which runs later")
        values = self.outputs[edge.source][source]
        if edge.out not in values:
            raise Broken(self.name(edge.source, source), f"writes nothing on `{edge.out}`")
        per_member = values[edge.out] if origin.collective else [values[edge.out]]
        kind = edge.pattern.partition(":")[0]
        shared = self.places[id(origin.ranks)][source].keys()
        for n, rank in enumerate(origin.ranks[source].tolist()):
            value = per_member[n]
            if value is None or (n and kind == "group" and not block.collective):
                continue  # of a replicated value one copy is read
            if kind == "rank" or (kind == "pairs" and (rank in place or not shared.isdisjoint(place))):
                if rank in place:
                    found[place[rank]].append(self._part(edge.tensor, value, rank, block, origin))
                continue
            if n and kind == "pairs" and not block.collective:
                continue
            to = [rank + int(edge.pattern.partition(":")[2])] if kind == "shift" else block.ranks[op].tolist()
            for there in to:
                if there in place:
                    found[place[there]].append(value)
                    if origin.kind != "input" and rank != there:
                        self.moved.edges[edge.comm] = self.moved.edges.get(edge.comm, 0) + value_bytes(
                            value, edge.tensor.dtype
                        )

    def _part(self, tensor: TensorType, value: Value, rank: int, block: OpBlock, origin: OpBlock) -> Value:
        """A rank's own part of a value: of the input its micro-batch, of a whole residual stream its shard of tokens."""
        if not isinstance(value, np.ndarray) or not tensor.shape or tensor.shape[0] == ROWS:
            return value
        if origin.kind == "input_split":
            size = step_tokens(self.draft.spec, self.par).group
            value = value[block.micro_batch * size : (block.micro_batch + 1) * size]
        rows = tensor.shape[0]
        if rows != len(value) and "tokens" in tensor.layout and rows * self.par.tp == len(value):
            return value[rank % self.par.tp * rows : (rank % self.par.tp + 1) * rows]
        return value

    def _shape(self, block: OpBlock, op: int, port: str, tensor: TensorType, made: Value) -> None:
        """What an op wrote must have the shape that the graph says."""
        for value in made if block.collective and isinstance(made, list) else [made]:
            if not isinstance(value, (np.ndarray, Rows, Routed)):
                continue
            want = tuple(len(value.shape) and value.shape[0] if n == ROWS else n for n in tensor.shape)
            if block.kind == "input_split":
                want = (value.shape[0], *want[1:])
            if value.shape != want:
                where = f"{block.name}.r{int(block.ranks[op, 0])}"
                raise Broken(where, f"wrote {value.shape} on `{port}`, where the graph says {tensor.text()}")

    def send(self, number: int, op: int, source: int, target: int, value: Value, dtype: str) -> None:
        """Count data of a collective from one member to another."""
        key = number, op
        if key not in self.moved.collectives:
            group = self.graph.blocks[number].ranks.shape[1]
            self.moved.collectives[key] = np.zeros((group, group), dtype=np.int64)
        if source != target or self.graph.blocks[number].kind in ("dispatch", "combine"):
            self.moved.collectives[key][source, target] += value_bytes(value, dtype)

    def keeps(self, number: int, op: int, values: int, member: int = 0) -> None:
        """Note how many values an op reads and makes on a member's rank, beside the residual stream."""
        block = self.graph.blocks[number]
        most = self.working.setdefault(block.kind, np.zeros_like(self.stream))
        most[block.ranks[op, member]] = max(most[block.ranks[op, member]], values)

    def arrives(self, rank: int, rows: dict[int, Rows]) -> None:
        """Note the rows of all experts that a dispatch brings a rank."""
        self.received[rank] = max(self.received[rank], sum(len(some.origin) for some in rows.values()))

    def comes_back(self, rank: int, parts: Array) -> None:
        """Note the results that a combine brings back to the rank of their tokens."""
        self.returned[rank] = max(self.returned[rank], parts.size)

    def needs(self) -> dict[str, np.ndarray]:
        """What `planned_bytes` has beside weights and caches -> bytes that every rank was seen to need, the most of any
        layer."""
        model, micro_batches = self.model, self.draft.spec.workload.micro_batches
        size, there, back = (model.bytes_of(role) for role in ("activations", "dispatch", "combine"))
        most = np.maximum.reduce(list(self.working.values()))
        buffers = self.received * model.hidden * (there + back) + self.returned * back
        return {
            "activations": (most + 2 * self.stream) * size * micro_batches,
            "dispatch_buffers": buffers * micro_batches,
        } | {f"activations of {kind}": values * size for kind, values in self.working.items()}

    def one(self, reads: dict[str, Members], port: str) -> Value:
        """What a local op reads on a port, once."""
        return reads[port][0][0]


def planned_bytes(draft: Draft) -> dict[str, np.ndarray]:
    """Bytes of every rank by item of the memory table, and of what single ops keep alive by their kind; int64 [world]."""
    par = draft.parallelism
    sets = working_sets(draft.spec, par, draft.placement)
    return draft.memory.items | {f"activations of {kind}": np.tile(v.reshape(-1), par.dp) for kind, v in sets.items()}


def program_order(graph: PlanGraph) -> list[int]:
    """Blocks in an order in which everything is written before it is read."""
    waiting = [0] * len(graph.blocks)
    after: list[list[int]] = [[] for _ in graph.blocks]
    for edge in graph.edges:
        waiting[edge.target] += 1
        after[edge.source].append(edge.target)
    ready = deque(n for n, count in enumerate(waiting) if not count)
    order: list[int] = []
    while ready:
        number = ready.popleft()
        order.append(number)
        for target in after[number]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if len(order) < len(graph.blocks):
        stuck = next(n for n, count in enumerate(waiting) if count)
        raise Broken(graph.blocks[stuck].name, "waits for itself: the graph has a cycle")
    return order


def _sources(whole: Expanded, number: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for source, target in zip(*(part.tolist() for part in whole.pairs(number)), strict=True):
        found.setdefault(target, []).append(source)
    return found
