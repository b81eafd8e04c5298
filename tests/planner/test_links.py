"""The link search and its bounds against independent counting, brute force and an exact solver."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

import planc
from planc.planner.bounds import link_bound
from planc.planner.exact import least_busiest
from planc.planner.fabric import Fabric
from planc.planner.layer import Problem, Tokens, expected_seconds
from planc.planner.links import Demand, LinkState, crowding, improve
from planc.planner.migration import nearest
from planc.planner.objectives import Width, copies_to_move, layer_links
from planc.planner.tables import EMPTY, copies_of, copy_index, counts_of, table_of, tidy
from planc.routing.tokens import Skew, generate_tokens
from planc.spec import Cluster
from planc.topology import token_loads, topology

MODES = ("dedup", "direct")


def cluster(nodes: int, gpus: int, pod: int = 2, rails: int = 0, routing: str = "rail", domain: int = 0) -> Cluster:
    links = f"{{nvlink: {{bandwidth: 450 GB/s}}, nic: {{bandwidth: 50 GB/s, rails: {rails}, routing: {routing}}}, leaf: {{nodes: {pod}, oversubscription: 2}}}}"
    base = f"{{base: h100-sxm-{nodes}x{gpus}, nvlink_domain: {domain}, links: {links}}}"
    return planc.parse_spec(f"name: x\nmodel: deepseek-v3\ncluster: {base}\nworkload: {{batch: 1, isl: 1}}\n").cluster


FABRICS = {
    "a rail for each GPU": (cluster(4, 8), 1, 1),
    "two rails": (cluster(4, 8, rails=2), 1, 1),
    "shortest routes": (cluster(4, 8, routing="shortest"), 1, 1),
    "leaders gate": (cluster(4, 8), 8, 1),
    "experts split over two": (cluster(4, 8), 1, 2),
    "split, shortest, two rails": (cluster(4, 8, rails=2, routing="shortest"), 1, 2),
    "NVLink beyond the node": (cluster(8, 4, pod=4, domain=8), 1, 1),
    "unequal nodes": (
        planc.load_spec("hetero-h100-h200", ["cluster.groups.1.gpus_per_node=4", "cluster.groups.1.nodes=8"]).cluster,
        1,
        1,
    ),
}


def fabric_of(name: str) -> Fabric:
    made, tp, width = FABRICS[name]
    ranks = np.arange(made.gpus)
    return Fabric(topology(made), ranks[::tp], ranks.reshape(-1, width))


def sample(
    fabric: Fabric, tokens: int, k: int, seed: int = 1, skew: Skew | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(topk [tokens, k], source) with as many experts as holders."""
    experts, sources = len(fabric.holders), len(fabric.sources)
    skew = skew or Skew("lognormal", 1.0, 4, 2.0)
    made = generate_tokens(tokens=tokens, layers=1, experts=experts, top_k=k, sources=sources, skew=skew, seed=seed)
    return made.topk[:, 0].astype(np.int64), made.on_sources(sources)


def demand(topk: np.ndarray, source: np.ndarray) -> Demand:
    number, k = topk.shape
    zeros = np.zeros(number, dtype=np.int64)
    return Demand(np.repeat(np.arange(number), k), topk.reshape(-1), source, zeros, np.ones(1))


def counted(fabric: Fabric, topk: np.ndarray, source: np.ndarray, at: np.ndarray, mode: str) -> np.ndarray:
    """Loads by `token_loads`, which walks tokens and knows nothing of the search."""
    target = fabric.holders[at[topk]].reshape(len(topk), -1)
    return token_loads(fabric.topology, fabric.sources[source], target, mode).tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FABRICS)
def test_loads_are_those_of_tokens_walked_one_by_one(name: str, mode: str) -> None:
    fabric = fabric_of(name)
    topk, source = sample(fabric, 400, 3)
    random = np.random.default_rng(0)
    at = random.permutation(len(fabric.holders))
    state = LinkState(fabric, demand(topk, source), len(at), at, mode, smooth=False)
    assert np.array_equal(state.loads[:-1], counted(fabric, topk, source, at, mode))
    for _ in range(30):
        a, b = random.choice(len(at), 2, replace=False).tolist()
        state.swap(a, b, *state.change(a, b))
    assert np.allclose(state.loads[:-1], counted(fabric, topk, source, state.at, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FABRICS)
def test_the_search_relieves_the_busiest_link(name: str, mode: str) -> None:
    fabric = fabric_of(name)
    topk, source = sample(fabric, 400, 3)
    at, small = np.arange(len(fabric.holders)), len(fabric.holders) <= 16
    states = [LinkState(fabric, demand(topk, source), len(at), at, mode, smooth=False) for _ in range(2)]
    before = states[0].utilization().max()
    for state in states:
        improve(state, at.copy(), 0, small)
    assert states[0].utilization().max() < before
    assert np.allclose(states[0].loads[:-1], counted(fabric, topk, source, states[0].at, mode))
    assert np.array_equal(states[0].at, states[1].at)
    bound, why = link_bound(fabric, demand(topk, source), len(at), 1, mode)
    assert 0.3 * states[0].utilization().max() < bound <= states[0].utilization().max() * (1 + 1e-9), why


def test_promises_are_exact_in_direct_mode() -> None:
    """What prices promise for a swap is the change of the priced loads, for copies without a token in common."""
    fabric = fabric_of("two rails")
    topk, source = sample(fabric, 300, 1)
    at = np.random.default_rng(1).permutation(len(fabric.holders))
    state = LinkState(fabric, demand(topk, source), len(at), at, "direct", smooth=False)
    prices = np.random.default_rng(2).integers(0, 1000, len(state.loads)).astype(float)
    prices[-1] = 0
    promised = state.promises(prices)
    for a, b in ((0, 9), (3, 30), (17, 18), (8, 31)):
        assert promised[a, b] == pytest.approx(-(state.change(a, b)[0] * prices).sum())


def test_promises_are_exact_in_dedup_mode_without_shared_tokens() -> None:
    fabric = fabric_of("a rail for each GPU")
    topk, source = sample(fabric, 60, 2)
    at = np.arange(len(fabric.holders))
    state = LinkState(fabric, demand(topk, source), len(at), at, "dedup", smooth=False)
    prices = np.random.default_rng(2).integers(0, 1000, len(state.loads)).astype(float)
    prices[-1] = 0
    promised = state.promises(prices)
    tried = 0
    for a in range(0, 32, 3):
        for b in range(a + 1, 32, 5):
            if not (np.isin(topk, a).any(axis=1) & np.isin(topk, b).any(axis=1)).any():
                assert promised[a, b] == pytest.approx(-(state.change(a, b)[0] * prices).sum())
                tried += 1
    assert tried > 20


def test_smoothing_keeps_the_sum_and_draws_to_the_pod() -> None:
    fabric = fabric_of("a rail for each GPU")
    topk, source = sample(fabric, 200, 2)
    at = np.arange(len(fabric.holders))
    raw, smooth = (LinkState(fabric, demand(topk, source), len(at), at, "dedup", smooth=s) for s in (False, True))
    assert 0.5 < smooth.drawn < 1
    assert smooth.tokens.sum() == pytest.approx(raw.tokens.sum())
    assert smooth.tokens.std() < raw.tokens.std()
    assert np.allclose(smooth.loads, smooth._count_all())


def test_crowding_is_a_sum_of_powers() -> None:
    assert crowding(np.array([1.0, 0.5]), 16) == pytest.approx(1 + 0.5**16)


def test_empty_slots_and_copies_may_not_meet() -> None:
    """Two copies of expert 0 and two empty slots on four holders of one slot: after the search each is apart."""
    fabric = Fabric(topology(cluster(2, 2, pod=1)), np.arange(4), np.repeat(np.arange(4), 2).reshape(4, 2)[:, :1])
    rows = np.arange(40)
    made = Demand(rows, rows % 6, rows % 4, np.zeros(40, dtype=np.int64), np.ones(1))
    expert = np.array([0, 0, 1, 2, 3, 4, EMPTY, EMPTY])
    at = np.array([0, 1, 2, 3, 2, 3, 0, 1])
    state = LinkState(fabric, made, 8, at, "dedup", smooth=False)
    improve(state, expert, 0, True)
    for holder in range(4):
        held = expert[state.at == holder]
        assert len(held) == 2 == len(set(held.tolist()))


def partitions(experts: int, size: int):
    """All ways to put experts in order on nodes of ``size``, one per set of nodes' contents."""
    if experts == 0:
        yield []
        return
    from itertools import combinations

    def split(left: tuple[int, ...]):
        if not left:
            yield []
            return
        for chosen in combinations(left, size):
            rest = tuple(e for e in left if e not in chosen)
            for other in split(rest):
                yield [chosen, *other]

    yield from split(tuple(range(experts)))


@pytest.mark.parametrize("seed", range(4))
def test_small_cases_reach_the_optimum_over_all_partitions(seed: int) -> None:
    """Eight experts on four nodes of two (2,520 placements up to the order inside a node, which is tried for NVLink)."""
    fabric = Fabric(topology(cluster(4, 2)), np.arange(8), np.arange(8)[:, None])
    topk, source = sample(fabric, 150, 2, seed, Skew("lognormal", 1.0, 3, 2.0))
    state = LinkState(fabric, demand(topk, source), 8, np.arange(8), "dedup", smooth=False)
    improve(state, np.arange(8), 0, True)
    best = np.inf
    for parts in partitions(8, 2):
        at = np.empty(8, dtype=np.int64)
        at[np.concatenate(parts)] = np.arange(8)
        loads = counted(fabric, topk, source, at, "dedup")
        best = min(best, (loads / fabric.topology.capacity).max())
    assert state.utilization().max() <= best * (1 + 1e-9)
    for mode in MODES:
        bound = link_bound(fabric, demand(topk, source), 8, 1, mode)[0]
        least = min(
            (counted(fabric, topk, source, np.array(at), mode) / fabric.topology.capacity).max()
            for at in list(permutations(range(8)))[::101]
        )
        assert bound <= least * (1 + 1e-9)


def test_small_cases_against_the_exact_solver() -> None:
    """HiGHS proves the optimum of 8 experts; the search is at most 5 % off on the mean (here it is not off at all)."""
    gaps = []
    for seed in range(3):
        fabric = Fabric(topology(cluster(4, 2)), np.arange(8), np.arange(8)[:, None])
        topk, source = sample(fabric, 60, 2, seed, Skew("lognormal", 1.0, 3, 2.0))
        made = demand(topk, source)
        state = LinkState(fabric, made, 8, np.arange(8), "dedup", smooth=False)
        improve(state, np.arange(8), 0, True)
        exact = least_busiest(fabric, made, 8, "dedup", limit=60)
        relaxed = least_busiest(fabric, made, 8, "dedup", relaxed=True)
        assert exact is not None and relaxed is not None
        assert relaxed.seconds <= exact.bound * (1 + 1e-6) <= exact.seconds * (1 + 2e-6)
        loads = counted(fabric, topk, source, exact.at, "dedup")
        assert (loads / fabric.topology.capacity).max() == pytest.approx(exact.seconds, rel=1e-6)
        assert link_bound(fabric, made, 8, 1, "dedup")[0] <= exact.seconds * (1 + 1e-9)
        gaps.append(state.utilization().max() / exact.seconds - 1)
    assert np.mean(gaps) <= 0.05 and min(gaps) > -1e-6


@pytest.mark.parametrize("mode", MODES)
def test_renumbering_a_symmetric_cluster_changes_no_objective(mode: str) -> None:
    """Swap pods, nodes of a pod, and rails, sources along with holders."""
    fabric = fabric_of("a rail for each GPU")
    topk, source = sample(fabric, 300, 3)
    width = Width(7168, 14336)
    table = np.random.default_rng(0).permutation(32).astype(np.int32)[:, None]
    plain = layer_links(fabric, table, topk, source, 32, mode, width)
    ranks = np.arange(32).reshape(2, 2, 8)
    for renamed in (ranks[::-1], ranks[:, ::-1], ranks[:, :, ::-1], np.roll(ranks, 3, axis=2)):
        name = renamed.reshape(-1)  # rank r is now called name[r]
        moved = np.empty_like(table)
        moved[name] = table
        other = layer_links(fabric, moved, topk, name[source], 32, mode, width)
        assert other.seconds == pytest.approx(plain.seconds)
        assert (other.most_tokens, other.most_bytes) == (plain.most_tokens, plain.most_bytes)
        assert sorted(other.dispatch.tokens) == sorted(plain.dispatch.tokens)


def test_combine_goes_the_other_way() -> None:
    fabric = fabric_of("a rail for each GPU")
    topk, source = sample(fabric, 100, 2)
    links = layer_links(fabric, np.arange(32, dtype=np.int32)[:, None], topk, source, 32, "direct", Width(1, 2))
    t = fabric.topology
    for up, down in (("nvlink_up", "nvlink_down"), ("nic_up", "nic_down"), ("spine_up", "spine_down")):
        a, b = t.first[up], t.first[down]
        n = b - a
        assert np.array_equal(links.combine.tokens[a:b], links.dispatch.tokens[b : b + n])
    busiest = (links.dispatch.tokens / t.capacity).max()
    assert links.seconds == pytest.approx(busiest + 2 * busiest)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_copies_share_the_sources_in_rank_order() -> None:
    table = np.array([[0], [1], [0], [2], [0], [3]], dtype=np.int32)
    counts = counts_of(table, 4)
    assert counts.tolist() == [3, 1, 1, 1]
    expert, holder = copies_of(table)
    chosen = copy_index(counts, np.zeros((6, 1), dtype=np.int64), np.arange(6), 6)
    assert holder[chosen[:, 0]].tolist() == [0, 0, 2, 2, 4, 4]
    assert expert[chosen[:, 0]].tolist() == [0] * 6
    assert np.array_equal(table_of(expert, holder, 6, 1), table)
    with pytest.raises(ValueError, match="slots"):
        table_of(expert, np.zeros_like(holder), 6, 1)


# --- staying near ----------------------------------------------------------------------------------------------------


def test_a_renamed_plan_comes_back_whole() -> None:
    """The same contents with nodes of a pod and GPUs of a node renamed: nothing needs to move."""
    fabric = fabric_of("a rail for each GPU")
    current = np.random.default_rng(3).permutation(32).astype(np.int32)[:, None]
    ranks = np.arange(32).reshape(2, 2, 8)[:, ::-1, :][:, :, np.random.default_rng(4).permutation(8)].reshape(-1)
    renamed = current[ranks]
    assert copies_to_move(current, renamed) > 20
    assert np.array_equal(nearest(fabric, renamed, current, lambda table: 1.0), current)


def test_staying_near_never_costs_time() -> None:
    fabric = fabric_of("two rails")
    topk, source = sample(fabric, 300, 3)
    problem = Problem(fabric, 32, 1, 32, Width(1, 1), "dedup", "link", 0)
    random = np.random.default_rng(5)

    def judge(table: np.ndarray) -> float:
        return expected_seconds(problem, table, Tokens(topk, source))

    for _ in range(5):
        table, current = (tidy(random.permutation(32).astype(np.int32)[:, None]) for _ in range(2))
        found = nearest(fabric, table, current, judge)
        assert judge(found) <= judge(table) * (1 + 1e-9)
        assert copies_to_move(current, found) <= copies_to_move(current, table)
