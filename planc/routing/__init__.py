"""Where tokens go: how many tokens each source rank sends to each expert of a layer."""

from planc.routing.balanced import balanced_counts, share_counts
from planc.routing.bias import Stream, balance
from planc.routing.gate import Gate, gate_of
from planc.routing.recorded import Expected, load_traffic
from planc.routing.tokens import Popularity, Skew, TokenTraffic, generate_tokens
from planc.routing.traffic import Traffic, generated, tokens_of_loads

__all__ = [
    "Expected",
    "Gate",
    "Popularity",
    "Skew",
    "Stream",
    "TokenTraffic",
    "Traffic",
    "balance",
    "balanced_counts",
    "gate_of",
    "generate_tokens",
    "generated",
    "load_traffic",
    "share_counts",
    "tokens_of_loads",
]
