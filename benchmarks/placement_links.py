"""The busiest link: planc beside identity, longest-first over nodes and EPLB's greedy, on tokens drawn afresh.

`python benchmarks/placement_links.py EXPERTS COPIES LAYERS WORKERS` plans for 1,024 GPUs and prints the seconds: a process
of its own, so that its peak memory can be measured.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peers
from placement_balance import fullest
from sections import measure

from planc import Cluster, Request, Traffic, load_cluster, place
from planc.planner import Fabric
from planc.planner.exact import least_busiest
from planc.planner.links import Demand
from planc.routing.tokens import Skew, TokenTraffic, generate_tokens
from planc.routing.traffic import generated, loads_of_tokens
from planc.spec.cluster import Leaf
from planc.topology import Topology, token_loads, topology

WIDTH = 7168 * 2  #: bytes of a token in dispatch
TOKENS, FRESH = 4096, 32_768
SEED, TOP_K = 3, 8
TRAFFIC = {
    "16 topics, strength 2": Skew("lognormal", 0.5, 16, 2.0),
    "16 topics, strength 3": Skew("lognormal", 0.5, 16, 3.0),
    "group-limited gate, 16 topics": Skew("lognormal", 0.5, 16, 2.0, groups=8, top_groups=4),
    "strong: 16 topics, strength 5": Skew("lognormal", 0.5, 16, 5.0),
    "no structure": Skew("lognormal", 0.5),
}


def cluster_of(nodes: int, oversubscription: float, *, gpus: int = 8, pod: int = 4) -> Cluster:
    """H100 nodes in leaf pods."""
    plain = load_cluster(f"h100-sxm-{nodes}x{gpus}")
    leaf = Leaf(nodes=pod, oversubscription=oversubscription)
    return plain.model_copy(update={"links": plain.links.model_copy(update={"leaf": leaf})})


class Busiest(NamedTuple):
    """The busiest link of every layer's dispatch: its seconds, and the tokens over it."""

    seconds: np.ndarray
    tokens: np.ndarray


def busiest(links: Topology, tables: np.ndarray, tokens: TokenTraffic, *, random: bool = False) -> Busiest:
    """Send every token to its experts. Of an expert with c copies, in the order of the GPUs, the n-th serves the n-th part
    of the sources; with ``random`` one of them is drawn for every token. ``tables``: int [layers, gpus, slots]."""
    draws = np.random.default_rng(0)
    found = []
    for layer, table in enumerate(tables):
        gpu = np.repeat(np.arange(len(table)), table.shape[1])
        held = table.reshape(-1) >= 0
        expert, gpu = table.reshape(-1)[held], gpu[held]
        order = np.lexsort((gpu, expert))
        counts = np.bincount(expert, minlength=tokens.experts)
        first, topk = np.cumsum(counts) - counts, tokens.topk[:, layer]
        part = draws.random(topk.shape) if random else (tokens.source / tokens.sources)[:, None]
        loads = token_loads(
            links, tokens.source, gpu[order][first[topk] + (part * counts[topk]).astype(np.int64)], "dedup"
        )
        found.append(loads.busiest(WIDTH)[1:])
    seconds, most = zip(*found, strict=True)
    return Busiest(np.array(seconds), np.array(most))


class Scene(NamedTuple):
    """Traffic of ``layers`` layers of ``experts`` in ``slots`` slots on ``nodes`` nodes of 8."""

    traffic: str
    oversubscription: float
    layers: int
    experts: int = 256
    slots: int = 256
    nodes: int = 32

    @property
    def gpus(self) -> int:
        """GPUs, all of them sources and holders."""
        return self.nodes * 8

    def sample(self) -> Traffic:
        """The tokens to plan on."""
        skew = TRAFFIC[self.traffic]
        sizes = {"layers": self.layers, "experts": self.experts, "top_k": TOP_K, "sources": self.gpus}
        return generated(skew, tokens=TOKENS, seed=SEED, **sizes)

    def fresh(self) -> TokenTraffic:
        """Other tokens of the same distribution."""
        sizes = {"layers": self.layers, "experts": self.experts, "top_k": TOP_K, "sources": self.gpus}
        return generate_tokens(tokens=FRESH, skew=TRAFFIC[self.traffic], seed=SEED, sample=1, **sizes)

    def rivals(self, loads: np.ndarray) -> dict[str, np.ndarray]:
        """The other tables, for these loads (float [layers, E])."""
        return {
            "identity": peers.identity(self.layers, self.experts, self.slots, self.gpus),
            "greedy": peers.eplb_greedy(loads, self.slots, self.gpus, peers.packed_at_once),
            "longest": peers.longest_first_over_nodes(loads, self.slots, 8, self.nodes),
        }

    def planned(self, traffic: Traffic, cluster: Cluster, workers: int) -> tuple[np.ndarray, float]:
        """(planc's tables, seconds of the whole call)."""
        start = time.perf_counter()
        found = place(traffic, cluster, Request(redundant=self.slots - self.experts), workers=workers)
        return found.tables, time.perf_counter() - start


def below(ours: Busiest, theirs: Busiest) -> str:
    """How far planc's sum over layers is below the other's, and in how many layers it is above."""
    above = int((ours.seconds > theirs.seconds * (1 + 1e-9)).sum())
    return f"{1 - ours.seconds.sum() / theirs.seconds.sum():.1%}" + (f" ({above} layers above)" if above else "")


def figures(found: Busiest) -> str:
    """Σ over layers in ms, and tokens over the busiest link."""
    return f"{found.seconds.sum() * 1e3:.2f} ms, {found.tokens.mean():,.0f}"


LINK_HEADER = (
    "| traffic | leaf : spine | layers | identity = EPLB greedy | longest first over nodes | planc | below identity | below longest first | "
    "worst layer, against identity's | s, 1 worker | s, 2 workers |\n|---|---|" + "---:|" * 9
)


def link_row(scene: Scene) -> str:
    """One expert a GPU."""
    cluster = cluster_of(scene.nodes, scene.oversubscription)
    links, traffic, fresh = topology(cluster), scene.sample(), scene.fresh()
    rivals = scene.rivals(traffic.loads[0])
    if (rivals["greedy"] != rivals["identity"]).any():
        raise SystemExit("with one slot a GPU and no spares, EPLB's greedy is the identity")
    tables, one = scene.planned(traffic, cluster, 1)
    two = scene.planned(traffic, cluster, 2)[1] if scene.layers > 8 else None
    plain, longest = (busiest(links, rivals[name], fresh) for name in ("identity", "longest"))
    ours = busiest(links, tables, fresh)
    cells = [
        scene.traffic,
        f"{scene.oversubscription:g} : 1",
        str(scene.layers),
        *(figures(part) for part in (plain, longest, ours)),
        below(ours, plain),
        below(ours, longest),
        f"{ours.seconds.max() / plain.seconds.max() - 1:+.1%}",
        f"{one:.1f}",
        "–" if two is None else f"{two:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


LINKS = (
    Scene("16 topics, strength 2", 2, 58),
    *(Scene(name, over, 4) for name in TRAFFIC for over in (2, 1) if (name, over) != ("16 topics, strength 2", 2)),
)

COPIES_HEADER = (
    "| slots on GPUs | identity without copies | identity | EPLB greedy | EPLB greedy, copy at random | longest first over nodes | "
    "planc | below identity | below EPLB | below longest first | fullest GPU: identity | EPLB | longest first | planc | s |\n"
    "|---|" + "---:|" * 14
)
COPIES = tuple(
    Scene("16 topics, strength 2", 2, 4, 256, slots, nodes) for slots, nodes in ((288, 36), (320, 40), (512, 32))
)


def copies_row(scene: Scene) -> str:
    """Copies of some experts in the spare slots."""
    cluster = cluster_of(scene.nodes, scene.oversubscription)
    links, traffic, fresh = topology(cluster), scene.sample(), scene.fresh()
    rivals = scene.rivals(traffic.loads[0])
    tables, seconds = scene.planned(traffic, cluster, 1)
    alone = np.full((scene.layers, scene.gpus, 1), -1)
    alone[:, : scene.experts, 0] = np.arange(scene.experts)
    found = {name: busiest(links, table, fresh) for name, table in {**rivals, "planc": tables, "alone": alone}.items()}
    found["random"] = busiest(links, rivals["greedy"], fresh, random=True)
    order = ("alone", "identity", "greedy", "random", "longest", "planc")
    loads = fresh.loads().astype(float)
    cells = [
        f"{scene.slots} on {scene.gpus}",
        *(figures(found[name]) for name in order),
        *(below(found["planc"], found[name]) for name in ("identity", "greedy", "longest")),
        *(f"{fullest(t, loads).mean():.2f}" for t in (*rivals.values(), tables)),
        f"{seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


# --- small cases -----------------------------------------------------------------------------------------------------

SMALL_HEADER = (
    "| nodes × GPUs, experts | cases | proven optimal | planc at the best known | mean gap | worst gap | identity's mean gap | "
    "s of planc | s of the solver |\n|---|" + "---:|" * 8
)
SMALL = ((4, 2, 8), (2, 4, 8), (3, 4, 12), (6, 2, 12), (4, 4, 16), (8, 2, 16))
SMALL_CASES, SMALL_TOKENS, SMALL_LIMIT = 3, 48, 4.0


def small_row(nodes: int, size: int, experts: int) -> str:
    """Against the mixed-integer program; where there are 8 experts, once against every placement as well. The sample is
    its tokens four times over, so that what planc optimises on and what it judges by are the same."""
    cluster = cluster_of(nodes, 2.0, gpus=size, pod=2)
    links = topology(cluster)
    ranks = np.arange(cluster.gpus, dtype=np.int64)
    fabric = Fabric(links, ranks, ranks[:, None])
    gaps, plain, proven, seconds, solver = [], [], 0, 0.0, 0.0
    for seed in range(SMALL_CASES):
        skew = Skew("lognormal", 0.5, 4, 2.0)
        sizes = {"layers": 1, "experts": experts, "top_k": 2, "sources": cluster.gpus}
        once = generate_tokens(tokens=SMALL_TOKENS, skew=skew, seed=seed, **sizes)
        four = TokenTraffic(np.tile(once.topk, (4, 1, 1)), np.tile(once.source, 4), experts, cluster.gpus)
        traffic = Traffic("small", "generated", experts, loads_of_tokens(four), four)
        start = time.perf_counter()
        table = place(traffic, cluster).tables
        seconds += time.perf_counter() - start
        ours = busiest(links, table, once).seconds[0]
        start = time.perf_counter()
        at, bound = solved(fabric, once)
        solver += time.perf_counter() - start
        best = busiest(links, at, once).seconds[0]
        if experts <= 8 and not seed:
            every = every_placement(links, once, size)
            if bound < best * (1 - 1e-4) or abs(every - best) > 1e-6 * best:
                raise SystemExit(f"the solver says {best}, enumeration {every}")
        proven += bound >= best * (1 - 1e-4)
        best = min(best, ours)
        gaps.append(ours / best - 1)
        plain.append(busiest(links, ranks[None, :, None], once).seconds[0] / best - 1)
    cells = [
        f"{nodes} × {size}, {experts}",
        str(SMALL_CASES),
        str(proven),
        f"{sum(g < 1e-9 for g in gaps)}",
        f"{np.mean(gaps):.1%}",
        f"{max(gaps):.1%}",
        f"{np.mean(plain):.0%}",
        f"{seconds:.2f}",
        f"{solver:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def solved(fabric: Fabric, tokens: TokenTraffic) -> tuple[np.ndarray, float]:
    """(the solver's best placement as tables, its bound in seconds)."""
    count = len(tokens.source)
    demand = Demand(
        np.repeat(np.arange(count), tokens.topk.shape[2]),
        tokens.topk[:, 0].reshape(-1).astype(np.int64),
        tokens.source.astype(np.int64),
        np.zeros(count, dtype=np.int64),
        np.ones(1),
    )
    found = least_busiest(fabric, demand, tokens.experts, "dedup", limit=SMALL_LIMIT)
    if found is None:
        return np.arange(len(fabric.holders))[None, :, None], 0.0
    table = np.full((1, len(fabric.holders), 1), -1)
    table[0, found.at, 0] = np.arange(tokens.experts)
    return table, found.bound * WIDTH


def every_placement(links: Topology, tokens: TokenTraffic, size: int) -> float:
    """The least busy busiest link over all placements of 8 experts on 8 GPUs."""
    best = np.inf
    for order in permutations(range(8)):
        table = np.argsort(order)  # GPU of each expert
        best = min(best, token_loads(links, tokens.source, table[tokens.topk[:, 0]], "dedup").utilization(WIDTH).max())
    return float(best)


# --- 1,024 GPUs ------------------------------------------------------------------------------------------------------

LARGE_HEADER = (
    "| experts, copies on GPUs | workers | s a layer | 58 layers on 2 cores | peak of a process |\n|---|" + "---:|" * 4
)
LARGE, LARGE_LAYERS, LARGE_TOKENS = ((256, 1024), (1024, 1024)), 4, 8192


def large_row(experts: int, copies: int, workers: int) -> str:
    """Measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder) / "seconds"
        arguments = [str(part) for part in (experts, copies, LARGE_LAYERS, workers)]
        _, peak = measure([sys.executable, __file__, *arguments], printed)
        seconds = float(printed.read_text())
    whole = seconds * 58 / LARGE_LAYERS / (2 if workers == 1 else 1)
    cells = [
        f"{experts}, {copies} on 1,024",
        str(workers),
        f"{seconds / LARGE_LAYERS:.2f}",
        f"{whole:.0f} s",
        f"{peak:.0f} MB",
    ]
    return "| " + " | ".join(cells) + " |"


def plan_large(experts: int, copies: int, layers: int, workers: int) -> None:
    """Plan for 128 nodes of 8, and print the seconds."""
    cluster = cluster_of(128, 2.0)
    skew = TRAFFIC["16 topics, strength 2"]
    sizes = {"layers": layers, "experts": experts, "top_k": TOP_K, "sources": cluster.gpus}
    traffic = generated(skew, tokens=LARGE_TOKENS, seed=SEED, **sizes)
    start = time.perf_counter()
    place(traffic, cluster, Request(redundant=copies - experts), workers=workers)
    print(time.perf_counter() - start)


def large_rows() -> Iterator[str]:
    """Both sizes, with one worker and with two."""
    for experts, copies in LARGE:
        for workers in (1, 2):
            yield large_row(experts, copies, workers)


if __name__ == "__main__":
    plan_large(*(int(part) for part in sys.argv[1:]))
