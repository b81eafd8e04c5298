"""Bounds on the step time of every candidate at once: what no schedule of its ops undercuts.

A step takes at least the longest chain of ops that wait for each other, and at least the work of its busiest stream. Both
are sums of the very prices that `planc.cost.step` gives single ops, computed here for all token counts of a shape together;
ops that other ops delay, stages less even than can be, and ranks that hold more than the others only add to it. With one
micro-batch and one stage the chain is the step itself, so few candidates need a simulation (`planc.search.explore`).

Times are float arrays over `Bounds.grid`: tokens t of a TP group and micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from planc.cost.book import PriceBook
from planc.cost.exchange import Exchanges
from planc.cost.kernels import Context, kernels
from planc.cost.loads import TILE
from planc.cost.ops import Costs
from planc.cost.step import StepPrices, against_preset, exchange_mode, kv_length, product_dtype, sms_of_exchanges
from planc.graph import OpBlock, PlanGraph
from planc.graph.types import TensorType
from planc.placement import Parallelism, Placement, place_experts
from planc.placement.memory import padded_width
from planc.placement.stages import make_parallelism
from planc.search.space import Shape, spec_of
from planc.spec import Spec

Array = np.ndarray
Layers = tuple[int, ...]
ANY = 1e-9  #: of a round of tokens, less than a single one
ROUNDING = 1 - 1e-6  #: links count whole bytes, and sums round


@dataclass(frozen=True, slots=True)
class Bare:
    """A step without its graph: what placement and exchanges follow from."""

    spec: Spec
    parallelism: Parallelism
    placement: Placement
    blocks: PlanGraph


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds of a layer of one micro-batch: ``chain`` of ops that wait for each other, work on a GPU's ``compute`` and
    ``communication`` stream."""

    chain: Array
    compute: Array
    communication: Array


class Bounds:
    """Bounds for the shapes of one spec on one cluster. Parts that several shapes share are made once."""

    def __init__(
        self, spec: Spec, book: PriceBook, grid: Array, *, prefill: bool = False, only: int | None = None
    ) -> None:
        """``only``: the node group whose GPUs count, of a cluster of several kinds; None for the quickest at every op."""
        self.spec, self.book, self.grid, self.prefill, self.only = spec, book, grid.astype(float), prefill, only
        self._kept: dict[object, Any] = {}

    def _spec(self, shape: Shape) -> Spec:
        return spec_of(self.spec, shape, 1, prefill_chunk=int(self.prefill))

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    # --- a step -------------------------------------------------------------------------------------------------

    def step(self, shape: Shape) -> Array:
        """Seconds from step to step at least, at every t of the grid: of decode steps, or of prefill steps."""
        spec = self._spec(shape)
        dense = len(spec.model.dense_layer_ids)
        parts = [(dense, self._dense(spec, shape))] if dense else []
        parts += [(count, self._moe(spec, shape, layers)) for layers, count in self._alike(shape)]
        ends = self._ends(spec, shape)
        chain = sum(n * layer.chain for n, layer in parts) + ends.chain
        compute = sum(n * layer.compute for n, layer in parts) + ends.compute
        communication = sum(n * layer.communication for n, layer in parts) + ends.communication
        execution = spec.execution
        busiest = np.maximum(compute / execution.compute_streams, communication / execution.communication_streams)
        busiest = busiest * shape.micro_batches
        if spec.model.vocab:
            return np.asarray(np.maximum(chain, busiest / shape.pp) * ROUNDING)
        # steps by themselves: the busiest stage does all its work beside the way of one micro-batch through the others
        return np.asarray((chain + np.maximum(busiest - chain, 0.0) / shape.pp) * ROUNDING)

    def scale(self, shape: Shape, point: int) -> Array:
        """Of every point of the grid, the least ratio of an op's seconds there to its seconds at ``point``: by how much a step
        shrinks or grows at least, float [grid]; of an op on GPUs of several kinds the least of any."""
        kinds = range(len(self.spec.cluster.groups))
        if len(kinds) > 1 and self.only is None:

            def alone(n: int) -> Bounds:
                make = partial(Bounds, self.spec, self.book, self.grid, prefill=self.prefill, only=n)
                return self._once(("only", n), make)  # type: ignore[no-any-return]

            return np.asarray(np.minimum.reduce([alone(n).scale(shape, point) for n in kinds]))
        spec = self._spec(shape)
        parts = list(self._local(spec, shape).values())
        for layers, _ in self._alike(shape):
            if not layers:  # of some ops nothing is known
                return np.where(np.arange(len(self.grid)) == point, 1.0, 0.0)
            parts.append(self._experts(spec, shape, layers))
        if shape.tp > 1:
            names = "all_reduce", "all_gather", "reduce_scatter"
            parts += [self._collective(spec, shape, name, self._width(spec)) for name in names]
        ratios = [part / part[point] for part in parts if part[point] > 0]
        # hand-overs, and the scatter of the input: latency, or bytes of tokens
        if shape.pp > 1 or not spec.model.vocab:
            ratios.append(np.minimum(self.grid / self.grid[point], 1.0))
        for layers, _ in self._alike(shape):
            ratios += self._ratios_of_exchanges(spec, shape, layers, point)
            if shape.expert_tp > 1:
                ratios.append(self._ratio_of_sums(spec, shape, layers[0], point))
        return np.asarray(np.minimum.reduce(ratios))

    def _dense(self, spec: Spec, shape: Shape) -> Layer:
        def make() -> Layer:
            at = self._local(spec, shape)
            reduce = self._collective(spec, shape, "all_reduce", self._width(spec))
            compute = sum(at[kind] for kind in ("attn_qkv", "attn_core", "attn_out", "dense_up", "dense_down"))
            compute = compute + 2 * at["add"]
            return Layer(compute + 2 * reduce, compute, 2 * reduce)

        return self._once(("dense", *_near(shape)), make)  # type: ignore[no-any-return]

    def _attention(self, spec: Spec, shape: Shape) -> Layer:
        """Attention with its sum and residual, the gate, and the way back to all ranks of a TP group."""

        def make() -> Layer:
            at = self._local(spec, shape)
            scatter, width = shape.tp_comm == "reduce_scatter", self._width(spec)
            reduced = self._collective(spec, shape, "reduce_scatter" if scatter else "all_reduce", width)
            back = self._collective(spec, shape, "broadcast" if shape.leaders else "all_gather", width)
            add = at["add of its tokens"] if scatter else at["add"]
            compute = at["attn_qkv"] + at["attn_core"] + at["attn_out"] + add + at["gate"] + at["aggregate"]
            return Layer(compute + reduced + back, compute, reduced + back)

        return self._once(("attention", *_near(shape)), make)  # type: ignore[no-any-return]

    def _moe(self, spec: Spec, shape: Shape, layers: Layers) -> Layer:
        base, experts = self._attention(spec, shape), self._experts(spec, shape, layers)
        dispatch, combine = self._exchange(spec, shape, layers)
        shared, shared_sum = self._shared(spec, shape)
        chunks, execution = spec.execution.expert_chunks, spec.execution
        reached = np.maximum(dispatch + experts / chunks, dispatch / chunks + experts)
        split_sum, last_sum = self._expert_sums(spec, shape, layers)
        one = execution.compute_streams == execution.communication_streams == 1
        # in the graph's order shared experts run while results come back
        if one and shape.pp == shape.micro_batches == 1:
            chain = base.chain + reached + np.maximum(last_sum + combine, shared) + shared_sum
        else:
            chain = base.chain + np.maximum(reached + last_sum + combine, shared + shared_sum)
        compute, communication = base.compute + shared, base.communication + dispatch + combine + shared_sum
        if shape.scope == "model":  # another rank is the fullest in every layer
            return Layer(chain, compute, communication)
        return Layer(chain, compute + experts, communication + split_sum)

    # --- local ops ----------------------------------------------------------------------------------------------

    def _gpus(self, spec: Spec) -> list[Costs]:
        taken = sms_of_exchanges(spec)
        groups = spec.cluster.groups if self.only is None else spec.cluster.groups[self.only : self.only + 1]
        return [self.book.costs(group.gpu, spec.cluster, taken) for group in groups]

    def _price(self, spec: Spec, kind: str, columns: dict[str, Any], dtype: str) -> Array:
        """Seconds of a kernel on the quickest GPU of the cluster, float [grid]."""
        return np.asarray(
            np.minimum.reduce(
                [
                    np.maximum(costs.price(kind, columns, dtype).seconds, costs.floor(kind, columns, dtype))
                    for costs in self._gpus(spec)
                ]
            )
            + 0.0 * self.grid
        )

    def _local(self, spec: Spec, shape: Shape) -> dict[str, Array]:
        """Op kind -> seconds of one op, float [grid]; of what a model lacks, zeros."""
        return self._once(("local", *_near(shape)), lambda: self._make_local(spec, shape))  # type: ignore[no-any-return]

    def _make_local(self, spec: Spec, shape: Shape) -> dict[str, Array]:
        model, tp, h, t = spec.model, shape.tp, spec.model.hidden, self.grid
        source = t if shape.leaders or tp == 1 else t / tp
        par = Parallelism(1, 1, tp, tp, 1, ((0, model.layers),), shape.gating, shape.tp_comm)  # type: ignore[arg-type]
        at = Context(spec, par, kv_length(spec), product_dtype(spec))

        def seconds(kind: str, rows: Array, *shapes: tuple[Any, ...]) -> Array:
            """Of a kind that reads (and, with two shapes, writes) tensors of these shapes."""
            tensors = [TensorType(part, "bf16") for part in (shapes or ((rows, h),))]
            ports = {"in": tensors[0]}
            out = dict.fromkeys(("x", "logits", "u"), tensors[-1])
            reads = ports | {"u": tensors[0]}
            block = OpBlock(kind, kind, np.zeros((1, 1), dtype=np.int32), reads=reads, writes=out)
            total = np.zeros(len(t))
            for kernel in kernels(at, block):
                total = total + self._price(spec, kernel.kind, dict(kernel.sizes), kernel.dtype)
            return total

        kinds = {kind: seconds(kind, t) for kind in ("attn_qkv", "attn_core", "attn_out")}
        kinds |= {"add": seconds("residual_add", t), "add of its tokens": seconds("residual_add", source)}
        if model.dense_mlp and model.dense_layer_ids:
            inner = t, model.dense_mlp.intermediate // tp
            kinds |= {"dense_up": seconds("dense_up", t, (t, h), inner), "dense_down": seconds("dense_down", t, inner)}
        if model.moe is not None:
            kinds |= {"gate": seconds("gate", source), "aggregate": seconds("aggregate", source)}
            split, rows = (tp, t) if shape.leaders else (1, source)
            if model.moe.shared_width:
                inner = rows, model.moe.shared_width // split
                kinds |= {"shared_up": seconds("shared_up", rows, (rows, h), inner)}
                kinds |= {"shared_down": seconds("shared_down", rows, inner)}
        if model.vocab:
            shard = padded_width(model.vocab, tp)
            rows = np.maximum(1.0, t // spec.workload.isl) if self.prefill else t
            kinds["embed"] = seconds("embed", t)
            kinds["lm_head"] = seconds("lm_head", t, (t, h), (rows, shard))
            kinds["sample"] = seconds("sample", rows, (rows, shard * tp))
        return kinds

    def _shared(self, spec: Spec, shape: Shape) -> tuple[Array, Array]:
        """(compute of the shared experts, the sum of their shards)."""
        zero = np.zeros(len(self.grid))
        at = self._local(spec, shape)
        if "shared_up" not in at:
            return zero, zero
        total = self._collective(spec, shape, "all_reduce", self._width(spec)) if shape.leaders else zero
        return at["shared_up"] + at["shared_down"], total

    def _ends(self, spec: Spec, shape: Shape) -> Layer:
        """Embedding, head and sampling, and hand-overs between stages."""
        zero = np.zeros(len(self.grid))
        if not spec.model.vocab:
            return Layer(zero, zero, zero)
        at = self._local(spec, shape)
        width = padded_width(spec.model.vocab, shape.tp) * shape.tp * spec.model.bytes_of("activations")
        gather = np.zeros(len(self.grid)) if self.prefill else self._collective(spec, shape, "all_gather", width)
        compute = at["embed"] + at["lm_head"] + at["sample"]
        return Layer(compute + gather, compute, gather)

    # --- experts and their exchanges ----------------------------------------------------------------------------

    def _alike(self, shape: Shape) -> list[tuple[Layers, int]]:
        """MoE layers in groups, with their number: those of a group have experts on the same ranks of their stage, or take
        at least as long as one of those listed. Where the batch decides which layers a stage has, and so who holds their
        experts, none is listed and nothing is known of them."""

        def make() -> list[tuple[Layers, int]]:
            ids = self.spec.model.moe_layer_ids
            if not ids:
                return []
            if self._fixed_stages(shape) is None:
                return [((), len(ids))]
            bare = self.bare(shape)
            exchanges, found = Exchanges(bare, exchange_mode(bare.spec)), dict[object, list[int]]()
            for layer in ids:
                stage = 0 if self._stages_lie_alike(shape) else bare.parallelism.stage_of_layer(layer)
                found.setdefault((exchanges.place(layer), stage), []).append(layer)
            if shape.scope == "model":
                return [((layers[0],), len(layers)) for layers in found.values()]
            return [(tuple(layers[0] for layers in found.values()), len(ids))]

        return self._once(("alike", *self._group(shape)), make)  # type: ignore[no-any-return]

    def _stages_lie_alike(self, shape: Shape) -> bool:
        """Whether every stage of a replica has its ranks on nodes, NVLink domains and leaves as the first has."""
        return self._lie_alike(shape.ep, shape.pp)

    def _lie_alike(self, ep: int, count: int) -> bool:
        """Whether so many EP groups, one after the other, lie alike on nodes, NVLink domains and leaves."""

        def make() -> bool:
            cluster, found = self.spec.cluster, set()
            for stage in range(0, count * ep, ep):
                of = slice(stage, stage + ep)
                places = cluster.node_of_rank[of], cluster.domain_of_rank[of], cluster.leaf_of_rank[of]
                found.add(tuple(np.unique(place, return_inverse=True)[1].tobytes() for place in places))
            return len(found) == 1

        return count == 1 or self._once(("lie alike", count, ep), make)

    def _fixed_stages(self, shape: Shape) -> tuple[tuple[int, int], ...] | None:
        """The layers of every stage as far as experts and exchanges depend on them; None where those change with the batch."""
        model = self.spec.model
        if shape.pp == 1 or (shape.scope != "model" and self._stages_lie_alike(shape)):
            return ((0, model.layers),)
        if shape.scope == "model" and (shape.split == "even" or not model.dense_layer_ids):
            own = replace(shape, dp=1)
            degrees = {key: getattr(own, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}
            return make_parallelism(spec_of(self.spec, own, 1), degrees).stages
        ids = model.moe_layer_ids
        if shape.scope == "model" or len(ids) < shape.pp:
            return None
        ends = [*ids[1 : shape.pp], model.layers]  # one MoE layer at least in every stage, to see where it lies
        return tuple(pairwise([0, *ends]))

    def _group(self, shape: Shape) -> tuple[object, ...]:
        """What the placement in an EP group, and where it lies, follow from."""
        key = shape.ep, shape.tp, shape.expert_tp, shape.leaders, shape.scope, shape.spares, shape.dtypes
        alone = shape.pp == 1 or (shape.scope != "model" and self._stages_lie_alike(shape))
        return key if alone else (*key, shape.pp, shape.split)

    def bare(self, shape: Shape) -> Bare:
        """The shape's placement in one replica, with as many tokens a source as there are experts, so that every expert has
        the same."""

        def make() -> Bare:
            moe, stages = self.spec.model.moe, self._fixed_stages(shape)
            assert moe is not None and stages is not None
            tokens = moe.experts * (1 if shape.leaders else shape.tp)
            own = replace(shape, dp=1, pp=1, micro_batches=1, split="balanced")
            chunk = tokens if self.prefill else 0
            spec = spec_of(self.spec, own, tokens * shape.ep // shape.tp, prefill_chunk=chunk)
            spec = spec.model_copy(update={"cluster": self.spec.cluster})
            pp, gating = len(stages), shape.gating
            par = Parallelism(1, pp, shape.ep, shape.tp, shape.expert_tp, stages, gating, shape.tp_comm)  # type: ignore[arg-type]
            return Bare(spec, par, place_experts(spec, par), PlanGraph((), (), pp * shape.ep))

        return self._once(("bare", *self._group(shape)), make)  # type: ignore[no-any-return]

    def _least(self, layers: Layers, make: Callable[[int], Array]) -> Array:
        """The least of several layers, elementwise; zeros where there are none."""
        return np.asarray(np.minimum.reduce([make(n) for n in layers])) if layers else np.zeros(len(self.grid))

    def _rounds(self, shape: Shape, whole: Callable[[Array], Array]) -> Array:
        """How many tokens every expert gets: ``whole`` makes a number of rounds, in each of which every expert gets one."""
        moe = self.spec.model.moe
        assert moe is not None
        return whole(self._source(shape) * (shape.ep // (shape.tp if shape.leaders else 1)) * moe.top_k / moe.experts)

    def _exchange(
        self, spec: Spec, shape: Shape, layers: Layers, whole: Callable[[Array], Array] | None = None
    ) -> tuple[Array, Array]:
        """Seconds of dispatch and of combine, float [grid] each; ``whole``: of whole rounds (`_rounds`), up or down."""
        moe = spec.model.moe
        even = moe is not None and moe.experts * shape.expert_tp % shape.ep == 0 and shape.spares == "idle"
        # what is left of a round goes to experts that may lie nearer than others, where not all sources and ranks are alike
        if whole is None and (shape.leaders or shape.scope == "model" or not even):
            whole = _down

        def make() -> tuple[Array, Array]:
            moe = self.spec.model.moe
            assert moe is not None
            prices = StepPrices(self.bare(shape), self.book, None)
            times = self._rounds(shape, whole or (lambda rounds: rounds))
            times = times / (moe.top_k * (shape.ep // (shape.tp if shape.leaders else 1)))
            parts = self.bare(shape).placement.layers
            if all((parts[n].copies == 1).all() for n in layers):
                # every source sends to every expert that has a token: part of a round goes as far as a whole one
                times = np.maximum(times, ANY)

            def seconds(role: str, layer: int) -> Array:
                exchange, par = prices.exchanges.of(layer), prices.plan.parallelism
                ranks = par.stage_ranks(par.stage_of_layer(layer))[0].astype(np.int64)
                carried = prices.carried(role, exchange, 0, ranks)
                each = [prices.exchange_seconds(role, costs, carried, times) for costs in self._gpus(spec)]
                return np.asarray(np.minimum.reduce(each))

            return (
                self._least(layers, lambda n: seconds("dispatch", n)),
                self._least(layers, lambda n: seconds("combine", n)),
            )

        if not layers:
            return np.zeros(len(self.grid)), np.zeros(len(self.grid))
        mode = exchange_mode(spec), sms_of_exchanges(spec), whole
        return self._once(("exchange", mode, layers, *self._group(shape)), make)  # type: ignore[no-any-return]

    def _source(self, shape: Shape) -> Array:
        """Tokens that one gating rank sends."""
        return self.grid if shape.leaders else self.grid / shape.tp

    def _loads(self, shape: Shape, layer: int) -> tuple[Array, Array]:
        """(tokens of every expert copy on the fullest rank in a layer, int [grid, copies]; tokens of the EP group)."""
        moe, bare = self.spec.model.moe, self.bare(shape)
        assert moe is not None
        part = bare.placement.layers[layer]
        sources = shape.ep // shape.tp if shape.leaders else shape.ep
        tokens = np.floor(self._source(shape) + 1e-9) * sources
        rank = int(np.bincount(part.rank, weights=1.0 / part.copies[part.expert]).argmax())
        here = np.flatnonzero(part.rank == rank)
        expert, copies = part.expert[here], part.copies[part.expert[here]]
        turn = here - np.searchsorted(part.expert, expert)
        share, rest = np.divmod((tokens * moe.top_k).astype(np.int64), moe.experts)
        load = share[:, None] + (expert[None, :] < rest[:, None])
        return load // copies + (turn < load % copies), tokens

    def _experts(self, spec: Spec, shape: Shape, layers: Layers) -> Array:
        """Seconds of the experts of the fullest rank, float [grid]."""

        def make(layer: int) -> Array:
            moe, chunks = spec.model.moe, spec.execution.expert_chunks
            assert moe is not None
            load, tokens = self._loads(shape, layer)
            rows, active = load.sum(axis=1), np.maximum((load > 0).sum(axis=1), 1)
            padded = (np.ceil(load / TILE) * TILE).sum(axis=1)
            s = {
                "rows": np.maximum(rows / chunks, 1.0),
                "active": np.maximum(active, 1.0),  # where there are no rows, the price is not taken
                "padded": np.maximum(padded / chunks, np.maximum(active, 1.0) * TILE),
                "tokens": np.maximum(tokens, 1.0),
            }
            sizes: dict[str, float] = {
                "hidden": spec.model.hidden,
                "intermediate": moe.intermediate,
                "experts": moe.experts,
            }
            sizes |= {"top_k": moe.top_k, "ep": shape.ep / shape.expert_tp, "tp": shape.expert_tp}
            s |= {name: np.full(len(rows), float(value)) for name, value in sizes.items()}
            s["gated"] = np.full(len(rows), float(moe.gated))
            found = []
            for costs in self._gpus(spec):
                price, floor, _, _ = costs.experts_of_rank(s, spec.model.dtype_of("expert_weights"))
                found.append(np.where(rows > 0, np.maximum(price.seconds, floor), 0.0) * chunks)
            return np.asarray(np.minimum.reduce(found))

        key = "experts", sms_of_exchanges(spec), layers, *self._group(shape)
        return self._once(key, lambda: self._least(layers, make))  # type: ignore[no-any-return]

    def _expert_sums(self, spec: Spec, shape: Shape, layers: Layers) -> tuple[Array, Array]:
        """Seconds of the sums of expert shards on the fullest rank: of all turns, and of the last, which nothing hides; each at
        the rows of its least expert."""
        zero = np.zeros(len(self.grid))
        if shape.expert_tp == 1 or not layers:
            return zero, zero

        def make() -> tuple[Array, Array]:
            load, _ = self._loads(shape, layers[0])
            width = spec.model.hidden * spec.model.bytes_of("combine")
            least = self._reduce(spec, "all_reduce", shape.expert_tp, load.min(axis=1) * width)
            return least * load.shape[1], least

        return self._once(("sums", sms_of_exchanges(spec), layers, *self._group(shape)), make)  # type: ignore[no-any-return]

    def _ratios_of_exchanges(self, spec: Spec, shape: Shape, layers: Layers, point: int) -> list[Array]:
        """Of dispatch and of combine, with as few tokens as may be, to their most at ``point``. EP groups that lie otherwise
        than the first have other exchanges: of those only that seconds grow no faster than tokens."""
        few, many = self._rounds(shape, _down), self._rounds(shape, _up)
        found = [np.minimum(few / many[point], 1.0)]
        if self._lie_alike(shape.ep, shape.dp * shape.pp):
            pairs = zip(*(self._exchange(spec, shape, layers, whole) for whole in (_down, _up)), strict=True)
            found = [least / most[point] for least, most in pairs if most[point] > 0]
        for ratio in found:
            ratio[point] = 1.0
        return found

    def _ratio_of_sums(self, spec: Spec, shape: Shape, layer: int, point: int) -> Array:
        """Of the sum of expert shards: the expert of the fewest tokens, at every point, to that of the most at ``point``."""
        load, _ = self._loads(shape, layer)
        width = spec.model.hidden * spec.model.bytes_of("combine")
        least = self._reduce(spec, "all_reduce", shape.expert_tp, load.min(axis=1) * width)
        most = self._reduce(spec, "all_reduce", shape.expert_tp, load.max(axis=1) * width)[point]
        ratio = least / most if most > 0 else np.ones(len(least))
        ratio[point] = 1.0
        return np.asarray(ratio)

    # --- collectives of a TP group ------------------------------------------------------------------------------

    def _width(self, spec: Spec) -> int:
        """Bytes of a token of the residual stream."""
        return spec.model.hidden * spec.model.bytes_of("activations")

    def _collective(self, spec: Spec, shape: Shape, kind: str, width: float) -> Array:
        """Seconds of a collective of a TP group over t tokens of ``width`` bytes."""
        if shape.tp == 1:
            return np.zeros(len(self.grid))
        key = "collective", kind, shape.tp, width, sms_of_exchanges(spec), shape.dtypes
        return self._once(key, lambda: self._reduce(spec, kind, shape.tp, self.grid * width))  # type: ignore[no-any-return]

    def _reduce(self, spec: Spec, kind: str, ranks: int, size: Array) -> Array:
        """Seconds of a collective inside an NVLink domain over ``size`` bytes in all; nothing where there are none."""
        link = spec.cluster.links.nvlink
        sent = size * ((2.0 if kind == "all_reduce" else 1.0) * (ranks - 1) / ranks)
        floor = sent / link.bandwidth
        name = {"broadcast": "all_gather"}.get(kind, kind)
        found = []
        for costs in self._gpus(spec):
            if costs.fit is None:
                found.append(link.latency + sent / (link.bandwidth * link.utilization))
                continue
            near, _ = against_preset(spec.cluster.links, costs.gpu.name)
            each = []
            for library in ("custom", "nccl") if name == "all_reduce" else ("nccl",):
                price = costs.price(name, {"ranks": ranks, "bytes": np.maximum(size, 1.0), "library": library}).seconds
                least = costs.price(name, {"ranks": ranks, "bytes": 1.0, "library": library}).seconds
                each.append(least + np.maximum(price - least, 0.0) / near if near != 1.0 else price)
            found.append(np.minimum.reduce(each))
        return np.where(size > 0, np.maximum(np.minimum.reduce(found), floor), 0.0)


def _down(rounds: Array) -> Array:
    return np.asarray(np.floor(rounds + 1e-9))


def _up(rounds: Array) -> Array:
    return np.asarray(np.ceil(rounds - 1e-9))


def _near(shape: Shape) -> tuple[object, ...]:
    """What local ops and collectives of a TP group follow from."""
    return shape.tp, shape.leaders, shape.tp_comm, shape.micro_batches > 1, shape.dtypes
