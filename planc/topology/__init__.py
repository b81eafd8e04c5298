"""The cluster's links as a graph: capacities, routes between ranks, and the load that traffic puts on every link."""

from planc.topology.links import LINK_KINDS, Topology, topology
from planc.topology.load import LinkLoads, pair_loads, token_loads

__all__ = ["LINK_KINDS", "LinkLoads", "Topology", "pair_loads", "token_loads", "topology"]
