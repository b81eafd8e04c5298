"""Traffic: the load of every expert over time, and the tokens behind it where they are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planc.routing.tokens import Skew, TokenTraffic, generate_tokens, race


@dataclass(frozen=True, eq=False)
class Traffic:
    """Where tokens go in each MoE layer.

    ``name``: how reports call it: the file's name, or the generator in words ("zipf 1.0, 16 topics, seed 0").
    ``origin``: where it is from, in one sentence. ``experts``: E. ``loads``: float64 [steps, layers, E], tokens (or
    weight) of each expert, steps in time order; the sum over the steps of every layer is positive, single steps of a
    layer may be all zero. ``tokens``: the tokens themselves where they were recorded or generated; ``loads`` is then
    [1, layers, E], their sum. ``digest``: SHA-256 of the file's bytes in hex, empty when generated.
    """

    name: str
    origin: str
    experts: int
    loads: np.ndarray
    tokens: TokenTraffic | None
    digest: str = ""

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.loads.shape[1])

    @property
    def top_k(self) -> int | None:
        """Experts of a token, where tokens are known."""
        return None if self.tokens is None else int(self.tokens.topk.shape[2])

    def split(self, share: float) -> tuple[Traffic, Traffic | None]:
        """The first ``share`` of the time to optimise on, and the rest to judge on: tokens where they are known, else
        steps, at least one on either side. One token or one step cannot be split: that is (all of it, None).

        A layer that had no tokens in one part has there its load over all the time, spread evenly over the part's steps.
        """
        if self.tokens is not None:
            count = len(self.tokens.source)
            if count < 2:
                return self, None
            first, rest = self.tokens.split(share)
            cut = len(first.source)
            return self._of_tokens(first, 0, count), self._of_tokens(rest, cut, count)
        steps = len(self.loads)
        if steps < 2:
            return self, None
        cut = max(1, min(steps - 1, round(steps * share)))
        return self._of_steps(0, cut), self._of_steps(cut, steps)

    def _of_tokens(self, part: TokenTraffic, start: int, count: int) -> Traffic:
        span = f"tokens {start + 1:,} to {start + len(part.source):,} of {count:,}"
        return Traffic(
            self.name, f"{self.origin}; {span}", self.experts, loads_of_tokens(part), part, digest=self.digest
        )

    def _of_steps(self, start: int, end: int) -> Traffic:
        loads = self.loads[start:end].copy()
        silent = loads.sum(axis=(0, 2)) == 0
        loads[:, silent] = self.loads[:, silent].sum(axis=0) / len(loads)
        origin = f"{self.origin}; steps {start + 1:,} to {end:,} of {len(self.loads):,}"
        return Traffic(self.name, origin, self.experts, loads, None, digest=self.digest)


def loads_of_tokens(tokens: TokenTraffic) -> np.ndarray:
    """Tokens of each expert as `Traffic.loads` has them, float64 [1, layers, E]."""
    return tokens.loads()[None].astype(np.float64)


def generated(
    skew: Skew, *, tokens: int, layers: int, experts: int, top_k: int, sources: int, seed: int = 0
) -> Traffic:
    """Traffic of ``tokens`` generated tokens in ``layers`` MoE layers, gated by ``sources`` sources. The same arguments
    give the same tokens. Raises ValueError for sizes that cannot be."""
    drawn = generate_tokens(
        tokens=tokens, layers=layers, experts=experts, top_k=top_k, sources=sources, skew=skew, seed=seed
    )
    name = f"{words_of(skew)}, seed {seed}"
    origin = f"generated: {name}; {tokens:,} tokens of {sources:,} sources, top-{top_k} of {experts:,} experts"
    return Traffic(name, origin, experts, loads_of_tokens(drawn), drawn)


def words_of(skew: Skew) -> str:
    """A skew in words: ``zipf 1.0, 16 topics``."""
    words = skew.popularity.replace("_", " ")
    if skew.popularity != "uniform":
        words += f" {float(skew.exponent)}"
    if skew.topics:
        words += f", {skew.topics} topics" if skew.topics > 1 else ", 1 topic"
        if skew.strength != Skew().strength:
            words += f" of strength {float(skew.strength)}"
    return words + (f", {skew.top_groups} of {skew.groups} groups" if skew.groups > 1 else "")


def tokens_of_loads(traffic: Traffic, *, tokens: int, top_k: int, sources: int, seed: int = 0) -> TokenTraffic:
    """Draw tokens whose expected loads follow the loads of ``traffic``, for what needs tokens where only loads are known.

    Each token chooses k distinct experts in each layer, independently of its other layers and of its source; an expert
    whose load is zero is chosen only where fewer than k experts have any. No expert can take more than every token, so
    loads beyond that are cut. Raises ValueError for sizes that cannot be.
    """
    if not 1 <= top_k <= traffic.experts or min(tokens, sources) < 1:
        raise ValueError("needs tokens, sources ≥ 1 and 1 ≤ top_k ≤ experts")
    rates = rates_of_loads(traffic.loads.sum(axis=0), top_k)
    topk = np.empty((tokens, traffic.layers, top_k), dtype=np.int32)
    one_kind = np.zeros(tokens, dtype=np.int64)
    for layer in range(traffic.layers):
        topk[:, layer] = race(rates[layer][None], one_kind, top_k, np.random.default_rng([seed, 2, layer]))
    source = np.random.default_rng([seed, 2]).integers(0, sources, tokens).astype(np.int32)
    return TokenTraffic(topk, source, traffic.experts, sources)


def rates_of_loads(loads: np.ndarray, top_k: int) -> np.ndarray:
    """Rates at which experts arrive so that the first k to arrive have loads like these, float [..., E].

    A token takes the experts that arrive before some moment. At rate w an expert has arrived by moment 1 with probability
    1 − exp(−w), so that −log(1 − p) is the rate at which it is among the chosen with probability p.
    """
    chance = np.minimum(top_k * loads / loads.sum(axis=-1, keepdims=True), 1 - 1e-9)
    return np.asarray(-np.log1p(-chance))
