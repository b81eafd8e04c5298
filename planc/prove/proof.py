"""The proof: a plan's graph and the model whole, side by side, on the same seeded numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planc.graph import OpBlock, PlanGraph, expand
from planc.placement import step_tokens
from planc.prove.execute import Machine, planned_bytes
from planc.prove.holdings import Held, held_bytes, holdings
from planc.prove.kinds import planned_choices
from planc.prove.model import Array, Sequence, Weights, Whole, drawn
from planc.prove.shrink import Small, shrink
from planc.prove.values import WRONG, Broken
from planc.verify import Draft, VerifiedPlan

TOLERANCE = 1e-9


@dataclass
class Proof:
    """What was run and found. ``errors``: kind of op -> largest relative error; ``faults``: (op, what is wrong) of ops that
    could not run or computed something else; ``bytes_equal``: bytes of every collective and edge class against the plan's
    byte matrices; ``memory_equal``: bytes of every item on every rank against the memory table."""

    name: str
    ranks: int
    layers: dict[int, int]
    steps: int
    seed: int
    sizes: dict[str, int] = field(default_factory=dict)
    ops: int = 0
    tokens: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)
    bytes_moved: dict[str, int] = field(default_factory=dict)
    bytes_planned: dict[str, int] = field(default_factory=dict)
    memory_equal: bool = False
    seconds: float = 0.0

    @property
    def max_relative_error(self) -> float:
        """Over all ops compared."""
        return max(self.errors.values(), default=0.0)

    @property
    def bytes_equal(self) -> bool:
        """Whether every class moved what the plan says."""
        return self.bytes_moved == self.bytes_planned

    @property
    def holds(self) -> bool:
        """Whether the plan computes what the model does."""
        return not self.faults and self.max_relative_error <= TOLERANCE and self.bytes_equal and self.memory_equal


def prove(
    plan: VerifiedPlan | Draft, *, layers: int = 1, tokens: int = 2, scale: int = 1, steps: int = 2, seed: int = 0
) -> Proof:
    """Run the plan on small numbers and compare it with the model run whole.

    ``layers``: how many of those alike; ``tokens`` and ``scale``: see `planc.prove.shrink`; ``steps``: decode steps, of which
    the first routes as the plan counts (then bytes must be equal) and the others as the gate decides.
    """
    started = time.perf_counter()
    proof = Proof(plan.spec.name, plan.parallelism.world_size, {}, steps, seed)
    try:
        _prove(plan, proof, layers, tokens, scale)
    except Broken as broken:
        proof.faults.append((broken.op, broken.why))
    except WRONG as error:  # a draft that was not verified may be anything
        proof.faults.append(("plan", f"cannot be run ({type(error).__name__}: {error})"))
    proof.seconds = time.perf_counter() - started
    return proof


def sizes_of(small: Small) -> dict[str, int]:
    """The small model's sizes by name; 0 where it has none."""
    spec, model = small.draft.spec, small.draft.spec.model
    return {
        "hidden": model.hidden,
        "heads": model.attention.heads,
        "experts": model.moe.experts if model.moe else 0,
        "top_k": model.moe.top_k if model.moe else 0,
        "expert_width": model.moe.intermediate if model.moe else 0,
        "vocab": model.vocab,
        "batch": spec.workload.batch,
        "isl": spec.workload.isl,
    }


def _prove(plan: VerifiedPlan | Draft, proof: Proof, layers: int, tokens: int, scale: int) -> None:
    small = shrink(plan, layers=layers, tokens=tokens, scale=scale, steps=proof.steps)
    spec = small.draft.spec
    if spec.workload.phase == "prefill":  # the chunks of a prompt are steps too
        whole = spec.workload.isl // step_tokens(spec, small.draft.parallelism).group
        proof.steps = min(proof.steps, whole) if spec.workload.prefill_chunk and whole else 1
    proof.layers, proof.sizes = small.layers, sizes_of(small)
    weights = Weights(spec.model, proof.seed)
    Run(small, weights, holdings(small.draft, weights), proof).all_steps(proof.steps)


class Run:
    """One proof under way."""

    def __init__(self, small: Small, weights: Weights, held: list[Held], proof: Proof) -> None:
        self.small, self.weights, self.held, self.proof = small, weights, held, proof
        self.draft, self.par = small.draft, small.draft.parallelism
        self.spec, self.model = small.draft.spec, small.draft.spec.model
        self.t = step_tokens(self.spec, self.par).group
        self.mb = self.spec.workload.micro_batches
        self.whole = Whole(weights)
        self.logits: Array = np.zeros((0, 0))
        self.planned = planned_bytes(self.draft)

    def all_steps(self, steps: int) -> None:
        """Every step on both sides."""
        sequences = self.sequences()
        held_equal = self.memory(held_bytes(self.draft, self.held))
        x = self.input(0)
        machine = Machine(self.draft, self.small.graph, self.held, planned=True)
        for step in range(steps):
            planned = step == 0
            machine.planned = planned
            self.whole.forced = self.forced(machine) if planned and self.model.moe else None
            want = self.whole.step(np.concatenate(x), sequences)
            if self.model.vocab:
                self.logits = self.whole.logits(want)
            machine.check = self.check
            stream = machine.step(x)
            self.proof.ops, self.proof.tokens = machine.ops, machine.tokens
            if planned:
                self.moved(machine.graph, machine.moved.collectives, machine.moved.edges)
                self.proof.memory_equal = self.memory(machine.needs()) and held_equal
            ids = self.output(want, stream)
            x = self.input(step + 1) if ids is None else self.again(ids)
            if self.proof.faults:
                return

    # --- inputs -------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> int:
        """TP groups of a replica."""
        return self.par.attention_dp

    def input(self, step: int) -> list[Array]:
        """The batch of every replica: ids, or hidden states."""
        count = self.groups * self.mb * self.t
        rng = np.random.default_rng([self.proof.seed, step])
        if self.model.vocab:
            return [rng.integers(0, self.model.vocab, count) for _ in range(self.par.dp)]
        return [rng.normal(size=(count, self.model.hidden)) for _ in range(self.par.dp)]

    def again(self, ids: Array) -> list[Array]:
        """Sampled ids as the next step's input."""
        return list(ids.reshape(self.par.dp, -1))

    def _runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(replica, TP group, micro-batch, first token) of every run of tokens that one TP group has in a micro-batch."""
        for d in range(self.par.dp):
            for g in range(self.groups):
                for mb in range(self.mb):
                    yield d, g, mb, ((d * self.groups + g) * self.mb + mb) * self.t

    def sequences(self) -> list[tuple[Sequence, slice]]:
        """Sequences of the model whole, with the contexts that they and the ranks' caches begin with."""
        found: list[tuple[Sequence, slice]] = []
        decode = self.spec.workload.phase == "decode"
        width = 1 if decode else self.spec.workload.isl
        for d, g, mb, first in self._runs():
            mine = []
            for start in range(0, self.t, width):
                part = slice(first + start, first + min(self.t, start + width))
                mine.append((Sequence(), part))
            self._contexts(d, g, mb, [one for one, _ in mine])
            found += mine
        return found

    def _contexts(self, d: int, g: int, mb: int, sequences: list[Sequence]) -> None:
        """Drawn keys and values of earlier tokens, whole for the model and in shards for the ranks of the TP group."""
        a, par, work = self.model.attention, self.par, self.spec.workload
        room, before = work.context, work.isl if work.phase == "decode" else 0
        for layer in range(self.model.layers):
            shapes = (
                ((a.kv_lora_rank,), (a.qk_rope_head_dim,)) if a.kind == "mla" else ((a.kv_head_count, a.head_dim),) * 2
            )
            drawn_ = [
                drawn(self.proof.seed, f"cache {part} {layer} {d} {g} {mb}", len(sequences), before, *shape)
                for part, shape in enumerate(shapes)
            ]
            for n, sequence in enumerate(sequences):
                sequence.cache[layer] = drawn_[0][n], drawn_[1][n]
                sequence.length = before
            stage = par.stage_of_layer(layer)
            for shard in range(par.tp):
                rank = int(par.stage_ranks(stage)[d, g * par.tp + shard])
                pair = []
                for array in drawn_:
                    part = array
                    if a.kind != "mla":
                        kv = a.kv_head_count
                        low, size = (shard * kv // par.tp, max(1, kv // par.tp))
                        part = array[:, :, low : low + size]
                    kept = np.zeros((len(sequences), room, *part.shape[2:]))
                    kept[:, :before] = part
                    pair.append(kept)
                self.held[rank].cache[mb, layer] = pair

    def forced(self, machine: Machine) -> dict[int, Array]:
        """The planned choices of all tokens, by layer."""
        count = self.par.dp * self.groups * self.mb * self.t
        chosen = np.zeros((count, self.model.moe.top_k if self.model.moe else 1), dtype=int)
        for _, g, _, first in self._runs():
            chosen[first : first + self.t] = planned_choices(machine, g * self.t + np.arange(self.t))
        return dict.fromkeys(self.model.moe_layer_ids, chosen)

    # --- comparing ----------------------------------------------------------------------------------------------

    def check(self, block: OpBlock, op: int, value: Array) -> None:
        """An op's value against the same tokens of the model whole."""
        rank = int(block.ranks[op, 0])
        replica, local = divmod(rank, self.par.replica_size)
        local %= self.par.ep
        first = ((replica * self.groups + local // self.par.tp) * self.mb + block.micro_batch) * self.t
        if block.kind == "sample":
            self._error(block.kind, self._id(block, op), value, self.logits[first + self._last])
            return
        name = f"L{block.layer}.{block.name.rpartition('.')[2]}"
        want = self.whole.seen.get(name)
        if want is None:
            self.proof.faults.append((self._id(block, op), "the model has no such value"))
            return
        start = first if len(value) == self.t else first + local % self.par.tp * len(value)
        self._error(block.kind, self._id(block, op), value, want[start : start + len(value)])

    def _id(self, block: OpBlock, op: int) -> str:
        return f"{block.name}.r{int(block.ranks[op, 0])}"

    def _error(self, kind: str, name: str, value: Array, want: Array) -> None:
        if value.shape != want.shape:
            self.proof.faults.append((name, f"has the shape {value.shape}, not {want.shape}"))
            return
        error = float(np.abs(value - want).max(initial=0.0) / max(float(np.abs(want).max(initial=0.0)), 1e-30))
        self.proof.errors[kind] = max(self.proof.errors.get(kind, 0.0), error)
        if not error <= TOLERANCE and len(self.proof.faults) < 20:
            self.proof.faults.append((name, f"differs from the model by {error:.2g} (relative)"))

    def output(self, want: Array, stream: list[Any]) -> Array | None:
        """The stream that leaves, against the model's output; ids of the next step where there is a vocabulary."""
        if not self.model.vocab:
            have = np.concatenate(stream)
            expected = self._collected(want)
            self._error("output_collect", "output_collect", have, expected)
            return None
        ids = self.logits.argmax(axis=1)
        wanted = ids[np.concatenate([first + self._last for first in self._stream_order()])]
        have = np.concatenate(stream)
        if have.shape != wanted.shape or (have != wanted).any():
            self.proof.faults.append(("output_collect", "the sampled ids differ from the model's"))
        return ids if self.spec.workload.phase == "decode" else None

    @property
    def _last(self) -> Array:
        """Of a run's tokens those that need logits: all of a decode step, of a prefill step the last of every prompt."""
        if self.spec.workload.phase == "decode":
            return np.arange(self.t)
        isl = self.spec.workload.isl
        return np.minimum(np.arange(1, max(1, self.t // isl) + 1) * isl, self.t) - 1

    def _stream_order(self) -> list[int]:
        """First tokens of the runs in the order in which they are collected: micro-batch by micro-batch; of each the first
        rank's own before those of the others."""
        return [
            ((d * self.groups + g) * self.mb + mb) * self.t
            for mb in range(self.mb)
            for d in range(self.par.dp)
            for g in range(self.groups)
        ]

    def _collected(self, want: Array) -> Array:
        return np.concatenate([want[first : first + self.t] for first in self._stream_order()])

    # --- bytes --------------------------------------------------------------------------------------------------

    def moved(
        self,
        graph: PlanGraph,
        matrices: Mapping[tuple[int, int], np.ndarray],
        edges: Mapping[str, int] | None = None,
    ) -> None:
        """Bytes of every collective op against the plan's byte matrix of it, and of edges between ranks; without ``edges``
        those and the scatter of the input are left out."""
        from planc.graph.traffic import byte_matrix

        draft = self.draft
        moved: dict[str, int] = {}
        planned: dict[str, int] = {}
        for block in draft.blocks.blocks:
            if block.collective and (block.kind != "input_split" or edges is not None):
                for op in range(len(block)):
                    want = byte_matrix(draft.spec, draft.parallelism, draft.placement, block, op)
                    planned[block.kind] = planned.get(block.kind, 0) + int(want.sum())
        for (number, op), have in sorted(matrices.items()):
            block = graph.blocks[number]
            if block.kind == "input_split" and edges is None:
                continue
            moved[block.kind] = moved.get(block.kind, 0) + int(have.sum())
            there = draft.blocks.by_name.get(block.name)
            if there is None:
                want = np.zeros_like(have)
            else:
                want = byte_matrix(draft.spec, draft.parallelism, draft.placement, draft.blocks.blocks[there], op)
            if have.shape != want.shape or (have != want).any():
                why = f"moves {int(have.sum())} bytes, not the {int(want.sum())} of the plan, or others"
                self.proof.faults.append((graph.op_id(number, op), why))
        moved |= dict.fromkeys(planned.keys() - moved.keys(), 0)
        if edges is not None:
            moved |= {f"{comm} edges": size for comm, size in edges.items()}
            planned |= {f"{comm} edges": size for comm, size in self._edge_bytes().items()}
        self.proof.bytes_moved, self.proof.bytes_planned = moved, planned

    def _edge_bytes(self) -> dict[str, int]:
        """Planned bytes of edges between ranks, outside collectives."""
        graph, found = self.draft.blocks, dict[str, int]()
        whole = expand(graph)
        for number, edge in enumerate(graph.edges):
            if edge.comm not in ("pp", "dp") or graph.blocks[edge.source].kind in ("input", "input_split"):
                continue
            source, target = whole.pairs(number)
            away = graph.blocks[edge.source].ranks[source, 0] != graph.blocks[edge.target].ranks[target, 0]
            size = int(whole.edge_bytes(number)[away].sum())
            if size:
                found[edge.comm] = found.get(edge.comm, 0) + size
        return found

    def memory(self, seen: Mapping[str, np.ndarray]) -> bool:
        """Whether bytes by rank, held or needed by ops, are those of `planned_bytes`."""
        equal = True
        for item, size in seen.items():
            planned = self.planned.get(item, np.zeros_like(size))
            wrong = np.flatnonzero(size != planned)
            if len(wrong):
                rank = int(wrong[0])
                why = f"rank {rank} needs {size[rank]} bytes, where the memory table has {planned[rank]}"
                self.proof.faults.append((item, why))
                equal = False
        return equal
