"""Where tokens go: how many tokens each source rank sends to each expert of a layer."""

from planc.routing.balanced import balanced_counts, share_counts

__all__ = ["balanced_counts", "share_counts"]
