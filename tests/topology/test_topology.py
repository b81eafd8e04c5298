"""Links, routes and loads against networkx, against routes walked one by one, and on paper."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

import planc
from planc.report.topology import layer_loads, topology_text
from planc.topology import LINK_KINDS, pair_loads, token_loads, topology


def cluster(**links):
    """2 leaf pods of 2 nodes, 4 GPUs a node."""
    leaf = {"nodes": 2, "oversubscription": 2}
    parts = {"nvlink": {"bandwidth": "400 GB/s"}, "nic": {"bandwidth": "50 GB/s"}, "leaf": leaf} | links
    gpu = "{name: g, peak: {bf16: 1 TFLOPS}, memory: 80 GB, memory_bandwidth: 1 TB/s}"
    text = (
        f"name: t\nmodel: olmoe-1b-7b\ncluster: {{name: c, nodes: 4, gpus_per_node: 4, gpu: {gpu}, links: {parts}}}\n"
    )
    return planc.parse_spec(text + "workload: {batch: 1, isl: 1}\n").cluster


def uneven():
    spec = planc.load_spec("hetero-h100-h200", ["cluster.groups.1.gpus_per_node=4", "cluster.groups.1.nodes=8"])
    return spec.cluster


def test_capacities_follow_from_the_spec():
    found = topology(cluster(nic={"bandwidth": "50 GB/s", "rails": 2, "utilization": "100 %"}))
    counts = np.bincount(found.kind_of_link).tolist()
    assert dict(zip(LINK_KINDS, counts, strict=True)) == {
        "nvlink_up": 16,
        "nvlink_down": 16,
        "nic_up": 8,  # 4 nodes · 2 rails, two GPUs on each
        "nic_down": 8,
        "spine_up": 4,  # 2 pods · 2 rails
        "spine_down": 4,
    }
    first = {kind: found.capacity[found.first[kind]] for kind in LINK_KINDS}
    assert first["nvlink_up"] == 400e9 * 0.8
    assert first["nic_up"] == 2 * 50e9
    assert first["spine_up"] == 2 * 2 * 50e9 / 2  # two ports, each of two GPUs' bandwidth, oversubscribed 2:1


@pytest.mark.parametrize("make", [cluster, uneven])
def test_routes_are_shortest_paths_of_the_link_graph(make):
    """Every route is a path of the graph, from its GPU to its GPU, and none is shorter."""
    found = topology(make())
    graph = found.graph()
    ends = {data["link"]: edge for *edge, data in graph.edges(data=True) if "link" in data}
    gpus = range(len(found.node))
    for source in list(gpus)[::5]:
        lengths = nx.single_source_shortest_path_length(graph, f"gpu{source}")
        for target in list(gpus)[::3]:
            route = found.route(source, target)
            hops, here = 0, f"gpu{source}"
            for link in route:
                a, b = ends[link]
                if here != a:  # between a GPU and its NIC port
                    assert graph.has_edge(here, a) and "link" not in graph.edges[here, a]
                    hops += 1
                here, hops = b, hops + 1
            if here != f"gpu{target}":
                assert graph.has_edge(here, f"gpu{target}")
                hops += 1
            same_rail = found.port_at[found.node[target], found.rail[source]] == found.port[target]
            if source == target or same_rail or found.domain[source] == found.domain[target]:
                assert hops == lengths[f"gpu{target}"]
            else:  # rail-optimised: one NVLink hop more instead of changing rails in the network
                assert hops >= 4


def shortest():
    """`cluster` with routes that enter by the target's own port."""
    return cluster(nic={"bandwidth": "50 GB/s", "routing": "shortest"})


def test_shortest_routes_are_shortest_in_the_graph():
    """networkx finds no route with fewer devices, between any two GPUs."""
    found = topology(shortest())
    graph = found.graph()
    for source in range(len(found.node)):
        lengths = nx.single_source_shortest_path_length(graph, f"gpu{source}")
        for target in range(len(found.node)):
            route = found.route(source, target)
            inside = found.domain[source] == found.domain[target]
            assert len(route) + (0 if inside else 2) == lengths[f"gpu{target}"]


def test_latency_of_a_route_is_that_of_the_classes_it_crosses():
    found = topology(
        cluster(
            nvlink={"bandwidth": "400 GB/s", "latency": "1 us"},
            nic={"bandwidth": "50 GB/s", "latency": "2 us"},
            leaf={"nodes": 2, "oversubscription": 2, "latency": "4 us"},
            spine={"latency": "8 us"},
        )
    )
    inside, same_rail, other_pod, other_rail = 1e-6, 2e-6 + 4e-6, 2e-6 + 4e-6 + 8e-6, 2e-6 + 4e-6 + 1e-6
    for (source, target), seconds in {(0, 1): inside, (0, 4): same_rail, (0, 8): other_pod, (0, 5): other_rail}.items():
        assert found.latency[found.route(source, target)].sum() == pytest.approx(seconds)


@pytest.mark.parametrize("make", [cluster, uneven, shortest])
def test_loads_are_those_of_routes_walked_one_by_one(make):
    found = topology(make())
    gpus = len(found.node)
    random = np.random.default_rng(3)
    source, target = random.integers(0, gpus, (2, 500))
    tokens = random.integers(1, 9, 500)
    walked = np.zeros(found.links, dtype=np.int64)
    for s, t, n in zip(source.tolist(), target.tolist(), tokens.tolist(), strict=True):
        walked[found.route(s, t)] += n
    assert (pair_loads(found, source, target, tokens).tokens == walked).all()


def test_deduplication_sends_one_copy_per_node_and_gpu():
    """A token on GPU 0 for GPUs 4, 4, 5 and 13: two NIC copies instead of four, handed on from the same rail."""
    found = topology(cluster())
    token, experts = np.array([0]), np.array([[4, 4, 5, 13]])
    direct, dedup = (token_loads(found, token, experts, mode) for mode in ("direct", "dedup"))
    assert direct.largest_by_kind()["nic_up"] == 4 and dedup.largest_by_kind()["nic_up"] == 2
    names = {found.names[i]: int(n) for i, n in enumerate(dedup.tokens) if n}
    assert names == {
        "nic_up node 0 rail 0": 2,
        "nic_down node 1 rail 0": 1,
        "nic_down node 3 rail 0": 1,
        "spine_up leaf 0 rail 0": 1,
        "spine_down leaf 1 rail 0": 1,
        "nvlink_up GPU 4": 1,
        "nvlink_down GPU 5": 1,
        "nvlink_up GPU 12": 1,
        "nvlink_down GPU 13": 1,
    }
    assert dedup.busiest(1e9)[0] == "nic_up node 0 rail 0"


def test_ranks_outside_the_cluster_are_refused():
    with pytest.raises(ValueError, match="0 to 15"):
        token_loads(topology(cluster()), np.array([0]), np.array([[16]]), "direct")


def test_renumbering_like_nodes_changes_no_load():
    """Swapping nodes of one pod permutes the loads and changes none of them."""
    found = topology(cluster())
    random = np.random.default_rng(5)
    source, target = random.integers(0, 16, 300), random.integers(0, 16, (300, 4))
    swapped = np.arange(16)
    swapped[0:4], swapped[4:8] = range(4, 8), range(0, 4)
    for mode in ("direct", "dedup"):
        one = token_loads(found, source, target, mode)
        two = token_loads(found, swapped[source], swapped[target], mode)
        assert one.largest_by_kind() == two.largest_by_kind()
        assert sorted(one.tokens) == sorted(two.tokens)


def test_plan_loads_carry_the_plan_s_bytes():
    """NIC bytes of a dispatch are the layer's bytes that leave their NVLink domain, in every replica."""
    plan = planc.compile(planc.load_spec("moe-61l-ep64-dp2"))
    loads = layer_loads(plan, "dispatch")
    kinds = loads.topology.kind_of_link
    up, down = (loads.tokens[kinds == LINK_KINDS.index(k)].sum() for k in ("nic_up", "nic_down"))
    assert up == down == plan.volumes["dispatch"]["nic"] / 58
    text = topology_text(plan)
    assert "nic_up" in text and "combine of layer 3" in text
