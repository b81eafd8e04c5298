"""The price of every op of a planned step: time with its interval, its floor, its fixed part, and where it comes from.

Local ops are sums of kernels (`planc.cost.kernels`). Experts are priced by their own rows, in the order of their turns: the
turns of a rank are one grouped GEMM, of which a turn costs what it adds. Collectives take the busiest rank's and link's
bytes of the actual placement and traffic. A GPU with a fit is priced by it as long as its spec is that of the preset;
every other by its spec. No price is below its floor: FLOPs ÷ peak, bytes ÷ bandwidth, at full rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from planc.cost import counts, transfer
from planc.cost.book import PriceBook
from planc.cost.exchange import Exchange, Exchanges, Mode, first_shards
from planc.cost.kernels import Context, Kernel, kernels
from planc.cost.loads import TILE
from planc.cost.ops import Costs
from planc.cost.price import NOTHING, BlockPrices, Price, added, block_prices, less, price_of, times_of
from planc.graph import OpBlock, PlanGraph
from planc.graph.traffic import byte_matrix
from planc.graph.types import content
from planc.placement import Parallelism, Placement
from planc.routing import Traffic
from planc.spec import Spec
from planc.spec.cluster import Cluster, Links
from planc.spec.load import load_cluster, preset_names
from planc.topology import LINK_KINDS, LinkLoads, Topology, pair_loads

#: what an op is counted under -> in words
CLASS_NAMES = {
    "attention": "attention",
    "dense": "dense and shared MLP",
    "gate": "gate and aggregate",
    "experts": "experts",
    "head": "embedding and head",
    "dispatch": "dispatch",
    "combine": "combine",
    "tp": "TP collectives",
    "pp": "PP hand-over",
    "ends": "input and output",
}
CLASSES = tuple(CLASS_NAMES)  #: in the order of reports
_CLASS_OF = {
    **dict.fromkeys(("attn_qkv", "attn_core", "attn_out"), "attention"),
    **dict.fromkeys(("dense_up", "dense_down", "shared_up", "shared_down", "residual_add"), "dense"),
    **dict.fromkeys(("gate", "aggregate"), "gate"),
    "expert": "experts",
    **dict.fromkeys(("embed", "lm_head", "sample"), "head"),
    "dispatch": "dispatch",
    "combine": "combine",
    **dict.fromkeys(("pp_send", "pp_recv"), "pp"),
    **dict.fromkeys(("input", "input_split", "output_collect"), "ends"),
}


def class_of(block: OpBlock) -> str:
    """The class that an op's time is counted under; collectives inside a TP group are `tp`."""
    return _CLASS_OF.get(block.kind, "tp")


class Step(Protocol):
    """What is priced: a verified plan, or the same plan's step with another workload."""

    @property
    def spec(self) -> Spec: ...
    @property
    def parallelism(self) -> Parallelism: ...
    @property
    def placement(self) -> Placement: ...
    @property
    def blocks(self) -> PlanGraph: ...


@dataclass(frozen=True, eq=False)
class Carried:
    """What dispatch or combine of one EP group carries. ``ranks`` in the group, NVLink ``domains`` that it spans; bytes:
    ``width`` of a token, of the busiest rank inside its domain (``stays``), over the busiest NIC (``leaves``), of a rank in
    all (``sent``) and with every token counted ``once``, on every link (``links``, float [links]); ``floor``: seconds of the
    busiest link at its full rate."""

    ranks: int
    domains: int
    width: float
    stays: float
    leaves: float
    sent: float
    once: float
    links: np.ndarray
    floor: float


_Turn = tuple[int, tuple[float, ...], tuple[float, ...]]


class StepPrices:
    """Prices of a plan's blocks, each made once and shared by blocks alike."""

    def __init__(self, plan: Step, book: PriceBook, traffic: Traffic | None, speed: np.ndarray | None = None) -> None:
        self.plan, self.book, self.traffic = plan, book, traffic
        self._found: dict[object, BlockPrices] = {}
        self._rows: dict[int, bytes] = {}  #: of the graph's arrays of rows, what they hold
        spec = plan.spec
        taken = sms_of_exchanges(spec)
        self._gpus = [book.costs(group.gpu, spec.cluster, taken) for group in spec.cluster.groups]
        self._at = Context(spec, plan.parallelism, kv_length(spec), product_dtype(spec))
        self.exchanges = Exchanges(plan, self.mode, traffic, speed)

    @property
    def mode(self) -> Mode:
        """How dispatch and combine send."""
        return exchange_mode(self.plan.spec)

    @property
    def topology(self) -> Topology:
        """Links of the cluster."""
        return self.exchanges.topology

    @cached_property
    def rate(self) -> np.ndarray:
        """Full bandwidth of every link, B/s; float [links]."""
        links = self.plan.spec.cluster.links
        share = [links.nvlink.utilization] * 2 + [links.nic.utilization] * 4
        return np.asarray(self.topology.capacity / np.array(share)[self.topology.kind_of_link])

    @cached_property
    def blocks(self) -> tuple[BlockPrices, ...]:
        """Prices of every block of the graph, in its order."""
        graph = self.plan.blocks.blocks
        first: dict[object, OpBlock] = {}
        keys = self._keys(graph)
        for key, block in zip(keys, graph, strict=True):
            first.setdefault(key, block)
        self._prepare(list(first.values()))
        self._found |= {key: self._made(block) for key, block in first.items()}
        return tuple(self._found[key] for key in keys)

    def _prepare(self, graph: Sequence[OpBlock]) -> None:
        wanted = list(self.wanted(graph))
        for costs in {id(c): c for c in self._gpus}.values():
            self.book.prepare(costs, wanted)

    def wanted(self, graph: Sequence[OpBlock]) -> Iterable[Kernel]:
        """Every kernel that the blocks need but experts and collectives."""
        for block in graph:
            if not block.collective and block.kind not in ("expert", "pp_send"):
                yield from kernels(self._at, block)

    def _keys(self, graph: Sequence[OpBlock]) -> list[object]:
        """What decides the prices of every block's ops. Layers alike share what their blocks are made of."""
        found: dict[tuple[object, ...], object] = {}
        keys = []
        for b in graph:
            shared = b.kind, id(b.ranks), id(b.reads), id(b.writes), id(b.rows), b.slot, self._place(b)
            if shared not in found:
                found[shared] = self._key(b)
            keys.append(found[shared])
        return keys

    def _place(self, block: OpBlock) -> object:
        """What decides where a block's tokens go."""
        if block.kind not in ("expert", "dispatch", "combine") or block.layer is None:
            return 0
        return block.layer if self.traffic is not None else self.exchanges.place(block.layer)

    def _key(self, block: OpBlock) -> object:
        reads = tuple((t.shape, t.dtype) for t in block.reads.values())
        writes = tuple((t.shape, t.dtype) for t in block.writes.values())
        rows: object = b""
        if block.rows is not None:  # blocks alike share the array
            rows = self._rows.get(id(block.rows))
            if rows is None:
                rows = self._rows[id(block.rows)] = content(block.rows)
        return (
            block.kind,
            block.ranks.shape,
            int(block.ranks[0, 0]),
            reads,
            writes,
            self._place(block),
            block.slot,
            rows,
        )

    def _made(self, block: OpBlock) -> BlockPrices:
        if block.kind == "expert":
            return self._experts(block)
        if block.kind in ("dispatch", "combine"):
            return self._exchange(block)
        if block.collective or block.kind == "pp_send":
            return self._transfer(block)
        return self._local(block)

    # --- local ops ----------------------------------------------------------------------------------------------

    def _gpu_of_op(self, block: OpBlock) -> np.ndarray:
        """Node group of each op's slowest rank; int [ops]. Groups with one GPU make no difference."""
        return np.asarray(self.plan.spec.cluster.group_of_rank[block.ranks[:, 0]])

    def _local(self, block: OpBlock) -> BlockPrices:
        parts = kernels(self._at, block)
        groups = self._gpu_of_op(block)
        by_group = {
            g: added([self.book.price(self._gpus[g], kernel) for kernel in parts]) for g in np.unique(groups).tolist()
        }
        return block_prices([by_group[g] for g in groups.tolist()])

    def _experts(self, block: OpBlock) -> BlockPrices:
        """What each op's rows add to the grouped GEMM of its rank, turn after turn."""
        plan, moe = self.plan, self.plan.spec.model.moe
        assert moe is not None and block.layer is not None
        exchange, part = self.exchanges.of(block.layer), plan.placement.layers[block.layer]
        par = plan.parallelism
        per_op = np.repeat(np.arange(len(block) // par.expert_tp), par.expert_tp) if par.expert_tp > 1 else None
        chosen = np.flatnonzero(part.slot == block.slot)
        chosen = chosen[np.argsort(part.rank[chosen], kind="stable")]
        before, upto = np.zeros((par.ep, 3)), np.zeros((par.ep, 3))
        load = np.stack([exchange.rows, exchange.rows > 0, np.ceil(exchange.rows / TILE) * TILE], axis=1)
        np.add.at(before, part.rank[part.slot < block.slot], load[part.slot < block.slot])
        np.add.at(upto, part.rank[part.slot <= block.slot], load[part.slot <= block.slot])
        index = np.tile(chosen, par.dp)
        if per_op is not None:
            index = index[per_op]
        groups = self._gpu_of_op(block)
        ranks = part.rank[index]
        turns = [(g, tuple(before[r]), tuple(upto[r])) for r, g in zip(ranks.tolist(), groups.tolist(), strict=True)]
        tokens = float(exchange.pairs.sum() / moe.top_k / par.expert_tp)
        made = self._turns(set(turns), tokens)
        return block_prices([made[turn] for turn in turns])

    def _turns(self, turns: set[_Turn], tokens: float) -> dict[_Turn, Price]:
        """Prices of turns: (group of the GPU, its load before, its load with this turn), loads as rows, experts with rows, and
        rows in whole tiles."""
        wanted: dict[int, set[Kernel]] = {}
        for group, *loads in turns:
            wanted.setdefault(group, set()).update(self._grouped(load, tokens) for load in loads if load[0])
        for group, members in wanted.items():
            self.book.prepare(self._gpus[group], sorted(members, key=lambda k: k.sizes))
        chunks = self.plan.spec.execution.expert_chunks
        found = {}
        for group, earlier, with_this in turns:
            both = (
                self.book.price(self._gpus[group], self._grouped(load, tokens)) if load[0] else NOTHING
                for load in (with_this, earlier)
            )
            found[group, earlier, with_this] = times_of(less(*both), chunks)
        return found

    def _grouped(self, load: tuple[float, ...], tokens: float) -> Kernel:
        model, par = self.plan.spec.model, self.plan.parallelism
        moe, chunks = model.moe, self.plan.spec.execution.expert_chunks
        assert moe is not None
        rows, active, padded = load
        sizes = {
            "rows": max(rows / chunks, 1.0),
            "active": active,
            "padded": max(padded / chunks, active * TILE),
            "tokens": max(tokens, 1.0),
            "hidden": model.hidden,
            "intermediate": moe.intermediate,
            "experts": moe.experts,
            "top_k": moe.top_k,
            "ep": par.ep / par.expert_tp,
            "tp": par.expert_tp,
            "gated": float(moe.gated),
        }
        return Kernel("experts", tuple((k, float(v)) for k, v in sizes.items()), model.dtype_of("expert_weights"))

    # --- communication ------------------------------------------------------------------------------------------

    def _slowest(self, block: OpBlock) -> Costs:
        """Prices of the group with the least memory bandwidth among a block's ranks: a collective waits for it."""
        groups = np.unique(self.plan.spec.cluster.group_of_rank[block.ranks]).tolist()
        found: list[Costs] = [self._gpus[g] for g in groups]
        return min(found, key=lambda c: (c.fit is not None, float(c.gpu.memory_bandwidth)))

    def _exchange(self, block: OpBlock) -> BlockPrices:
        """Dispatch or combine of every replica."""
        assert block.layer is not None
        exchange, role = self.exchanges.of(block.layer), block.kind
        found, ops, links, sizes = [], [], [], []
        for op, ranks in enumerate(block.ranks.astype(np.int64)):
            carried = self.carried(role, exchange, op, ranks)
            used = np.flatnonzero(carried.links)
            found.append(self._exchange_price(role, self._slowest(block), carried))
            links.append(used)
            ops.append(np.full(len(used), op))
            sizes.append(carried.links[used])
        return block_prices(found, np.concatenate(links), np.concatenate(ops), np.concatenate(sizes))

    def carried(self, role: str, exchange: Exchange, op: int, ranks: np.ndarray) -> Carried:
        """What the dispatch or combine (``role``) of EP group ``op`` carries between its ``ranks``, int [ep]."""
        spec, par = self.plan.spec, self.plan.parallelism
        width = float(spec.model.hidden * spec.model.bytes_of("dispatch" if role == "dispatch" else "combine"))
        if role == "dispatch" and spec.model.dtype_of(role) == "fp8":
            width = float(counts.wire_width("dispatch", self.mode, spec.model.hidden))
        pairs = exchange.pairs if role == "dispatch" else first_shards(exchange.pairs, par.expert_tp).T
        loads = exchange.links[op] if role == "dispatch" else _reversed(self.topology, exchange.answered[op])
        cluster, nic = spec.cluster, spec.cluster.links.nic
        domain = cluster.domain_of_rank[ranks]
        inside = pairs * (domain[:, None] == domain[None, :])
        far = self.topology.first["nic_up"]
        sent = float(pairs.sum(axis=1).max() if role == "dispatch" else pairs.sum(axis=0).max())
        return Carried(
            len(ranks),
            len(np.unique(domain)),
            width,
            float(max(inside.sum(axis=0).max(), inside.sum(axis=1).max())) * width,
            float((loads[far:] / self.rate[far:]).max(initial=0.0)) * nic.bandwidth * width,
            sent * width,
            exchange.sent * width,
            loads * width,
            float((loads / self.rate).max(initial=0.0)) * width,
        )

    def _exchange_price(self, role: str, costs: Costs, carried: Carried) -> Price:
        family = f"{role}_{self.mode}"
        fit = self._exchange_fit(role, costs, carried)
        if fit is None:
            return self._by_links(carried.links, carried.floor, family)
        seconds, fixed, s = self._fitted_exchange(fit, costs, carried, np.array([1.0]))
        cluster, dtype = self.plan.spec.cluster, self.plan.spec.model.dtype_of(role)
        even = against_preset(self.plan.spec.cluster.links, costs.gpu.name) == (1.0, 1.0) and _like_measured(cluster)
        even = even and carried.ranks % transfer.GPUS_PER_NODE == 0
        told = dtype == ("fp8" if role == "dispatch" else "bf16")
        apart = self.mode == "normal" and carried.domains > 1
        found = costs.inside(fit, s, seconds, derived=np.array([not (even and told)]), apart=apart)
        return price_of(found, carried.floor, fixed, family)

    def exchange_seconds(self, role: str, costs: Costs, carried: Carried, times: np.ndarray) -> np.ndarray:
        """Seconds of dispatch or combine that carries ``times`` as much, float [n]; as priced, floors included."""
        fit = self._exchange_fit(role, costs, carried)
        if fit is None:
            latency, moving = self._link_time(carried.links)
            seconds = np.where(times > 0, latency + moving * times, 0.0)
        else:
            seconds = self._fitted_exchange(fit, costs, carried, times)[0]
        return np.asarray(np.maximum(seconds, carried.floor * times))

    def _exchange_fit(self, role: str, costs: Costs, carried: Carried) -> Any:
        fit = getattr(costs.fit, f"{role}_{self.mode}", None)
        measured = self.mode != "normal" or carried.domains == 1 or _like_measured(self.plan.spec.cluster)
        return fit if measured else None

    def _fitted_exchange(
        self, fit: Any, costs: Costs, carried: Carried, times: np.ndarray
    ) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        """(seconds of exchanges that carry ``times`` as much, seconds that no size shrinks, sizes in the fit's columns)."""
        moe = self.plan.spec.model.moe
        assert moe is not None
        nodes, stays, sent = carried.domains, carried.stays, carried.sent
        low = self.mode == "low_latency"
        if not low:
            stays, sent = stays * self.exchanges.shared_on_a_gpu(nodes), carried.once
        near_scale, far_scale = against_preset(self.plan.spec.cluster.links, costs.gpu.name)
        tokens = np.maximum(sent * times / carried.width / (moe.top_k if low else 1), 1.0)
        sizes = {"nodes": nodes, "hidden": self.plan.spec.model.hidden, "top_k": moe.top_k, "experts": moe.experts}
        s = {"tokens": tokens} | {name: np.full(len(times), float(value)) for name, value in sizes.items()}
        form = transfer.low_latency_moved if low else transfer.normal_moved
        moved = [np.maximum(v * times, 1.0) for v in (stays / near_scale, carried.leaves / far_scale, sent)]
        fixed = float(form(fit.constants, s, *(np.ones(len(times)),) * 3)[0])
        return form(fit.constants, s, *moved), fixed, s

    def _by_links(self, sizes: np.ndarray, floor: float, family: str) -> Price:
        """Latency of the farthest class used + bytes ÷ planned bandwidth of the busiest link."""
        from planc.cost.spec_prices import KERNEL, WIDER

        if not sizes.any():
            return NOTHING._replace(family=family, provenance="spec")
        latency, moving = self._link_time(sizes)
        seconds = latency + moving
        return Price(seconds, floor, WIDER * seconds + KERNEL, floor, latency, "spec", family)

    def _link_time(self, sizes: np.ndarray) -> tuple[float, float]:
        """(latency of the farthest class used, bytes ÷ planned bandwidth of the busiest link), s."""
        used = np.flatnonzero(sizes)
        if not len(used):
            return 0.0, 0.0
        kinds = set(self.topology.kind_of_link[used].tolist())
        links = self.plan.spec.cluster.links
        far = any(LINK_KINDS[k].startswith(("nic", "spine")) for k in kinds)
        latency = links.nic.latency if far else links.nvlink.latency
        if far and links.leaf is not None:
            latency += links.leaf.latency
        if any(LINK_KINDS[k].startswith("spine") for k in kinds) and links.spine is not None:
            latency += links.spine.latency
        return latency, float((sizes[used] / self.topology.capacity[used]).max())

    def _transfer(self, block: OpBlock) -> BlockPrices:
        """Collectives of a TP group, the scatter of the input, and hand-overs between stages."""
        if self._inside_domains(block):
            return self._near(block)
        found, links, ops, sizes = [], [], [], []
        for op in range(len(block)):
            loads = self._loads(block, op)
            used = np.flatnonzero(loads)
            links.append(used)
            ops.append(np.full(len(used), op))
            sizes.append(loads[used])
            found.append(self._collective(block, op, loads))
        return block_prices(found, np.concatenate(links), np.concatenate(ops), np.concatenate(sizes))

    def _near(self, block: OpBlock) -> BlockPrices:
        """Collectives of groups inside an NVLink domain: only the links of their own ranks carry something, and groups with as
        many rows carry the same, at the same price."""
        rows = np.zeros(len(block), dtype=np.int64) if block.rows is None else block.rows
        _, first, kind = np.unique(rows, return_index=True, return_inverse=True)
        up, down = self.topology.first["nvlink_up"], self.topology.first["nvlink_down"]
        alike, on_links = [], []
        for op in first.tolist():
            loads, ranks = self._loads(block, op), block.ranks[op]
            alike.append(self._collective(block, op, loads))
            on_links.append(np.concatenate([loads[up + ranks], loads[down + ranks]]))
        links = np.concatenate([up + block.ranks, down + block.ranks], axis=1)
        sizes = np.stack(on_links)[kind]
        op, place = np.nonzero(sizes)
        return block_prices([alike[k] for k in kind.tolist()], links[op, place], op, sizes[op, place])

    def _inside_domains(self, block: OpBlock) -> bool:
        domain = self.plan.spec.cluster.domain_of_rank[block.ranks]
        return block.kind != "pp_send" and bool((domain == domain[:, :1]).all())

    def _loads(self, block: OpBlock, op: int) -> np.ndarray:
        """Bytes on every link, float [links]."""
        par = self.plan.parallelism
        ranks = block.ranks[op].astype(np.int64)
        if block.kind == "pp_send":
            size = np.array([block.writes["x"].row_bytes])
            return pair_loads(self.topology, ranks, ranks + par.ep, size).tokens.astype(float)
        group = len(ranks)
        if block.kind == "broadcast":  # as a library does it: the root scatters, everybody gathers
            matrix = np.full((group, group), block.writes["x"].row_bytes // group)
        else:
            matrix = byte_matrix(self.plan.spec, par, self.plan.placement, block, op)
        if block.kind == "input_split":
            matrix = matrix // par.tp  # the ranks of a TP group read one copy
        np.fill_diagonal(matrix, 0)
        source, target = np.nonzero(matrix)
        return pair_loads(self.topology, ranks[source], ranks[target], matrix[source, target]).tokens.astype(float)

    def _collective(self, block: OpBlock, op: int, loads: np.ndarray) -> Price:
        floor = float((loads / self.rate).max(initial=0.0))
        kind = {"broadcast": "all_gather"}.get(block.kind, block.kind)
        costs, group = self._slowest(block), block.ranks.shape[1]
        if (
            kind not in ("all_reduce", "all_gather", "reduce_scatter")
            or costs.fit is None
            or not self._inside_domains(block)
        ):
            return self._by_links(loads, floor, kind if block.kind != "pp_send" else "p2p")
        tensor = next(iter((block.writes if kind == "all_gather" else block.reads).values()))
        size = float(tensor.row_bytes * (block.row_count(op) or 1 if tensor.shape[0] < 0 else 1))
        choices = ("custom", "nccl") if kind == "all_reduce" else ("nccl",)
        best: Price | None = None
        for library in choices:
            sizes = {"ranks": float(group), "bytes": max(size, 1.0)}
            found = costs.price(kind, sizes | {"library": library})
            least = costs.price(kind, {"ranks": float(group), "bytes": 1.0, "library": library})
            near, _ = against_preset(self.plan.spec.cluster.links, costs.gpu.name)
            price = price_of(found, floor, float(least.seconds[0]), f"{kind}_{library}", near)
            if near != 1.0 or block.kind == "broadcast":
                price = price._replace(provenance="derived")
            best = price if best is None or price.seconds < best.seconds else best
        assert best is not None
        return best


def against_preset(links: Links, gpu: str) -> tuple[float, float]:
    """Bandwidth of a cluster's NVLink and NIC over that of the machines on which the GPU was measured."""
    measured = _measured_links(gpu)
    if measured is None:
        return 1.0, 1.0
    return links.nvlink.bandwidth / measured.nvlink.bandwidth, links.nic.bandwidth / measured.nic.bandwidth


@cache
def _measured_links(gpu: str) -> Links | None:
    """Links of the cluster preset of a GPU's name."""
    return load_cluster(gpu).links if gpu in preset_names("clusters") else None


def kv_length(spec: Spec) -> float:
    """Tokens of a sequence in the KV cache at a decode step: the input, and half of the output on average."""
    return spec.workload.isl + spec.workload.osl / 2


def product_dtype(spec: Spec) -> str:
    """Dtype of products of activations: theirs, 16 bit if they are stored in 8."""
    dtype = spec.model.dtype_of("activations")
    return "bf16" if dtype == "fp8" else dtype


def exchange_mode(spec: Spec) -> Mode:
    """How dispatch and combine send: as asked, else low-latency to decode and normal to prefill."""
    asked = spec.execution.all_to_all
    return asked if asked != "auto" else "low_latency" if spec.workload.phase == "decode" else "normal"


def sms_of_exchanges(spec: Spec) -> int:
    """SMs that dispatch and combine have for themselves: those of normal mode where micro-batches overlap, so that they run
    beside computation. Low-latency mode leaves the SMs while data is on the way."""
    overlap = spec.model.moe is not None and spec.workload.micro_batches > 1
    return transfer.NORMAL_SMS if overlap and exchange_mode(spec) == "normal" else 0


def _like_measured(cluster: Cluster) -> bool:
    """Nodes of eight GPUs with a NIC each, as dispatch and combine were measured on."""
    return all(
        g.gpus_per_node == transfer.GPUS_PER_NODE and g.nvlink_domain in (0, g.gpus_per_node) for g in cluster.groups
    ) and cluster.links.nic.rails in (0, transfer.GPUS_PER_NODE)


def _reversed(topology: Topology, loads: np.ndarray) -> np.ndarray:
    """The loads when everything goes the other way."""
    return LinkLoads(topology, loads).reversed().tokens
