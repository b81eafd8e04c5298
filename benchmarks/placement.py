"""Expert placement beside the algorithms of its peers, re-stated from their descriptions (`peers.py`), in one run.

Run: make bench-placement   (writes the part "Expert placement" of docs/benchmarks.md)
"""

from __future__ import annotations

from collections.abc import Iterable

import placement_balance as even
import placement_links as busy
from sections import machine, write_part

TEXT = """## Expert placement

`make bench-placement` on {machine}. Everything beside planc is re-stated from its published description
in `benchmarks/peers.py`; EPLB's greedy may put two copies of an expert on one GPU, planc may not. Loads and traffic are
generated; seeds are in the scripts. Bound: mean load, or the largest share under the best split of the slots (without spares
also who must meet). Figures are fullest GPU ÷ mean GPU, mean over layers. Seconds are for all layers: EPLB loops is packing as
published, layer by layer and copy by copy, with Python lists; EPLB at once packs all layers together in numpy, as engines do;
planc is the whole call with its certificate.

### Even load, four slots a GPU and more

Targets: mean gap ≤ 0.2 %, in no layer worse than EPLB, no expert twice on a GPU, ≤ 0.7 s.

{many}

### Two slots, and four without spares

Targets: in no layer worse than EPLB, 1 to 3 % better on average with two slots.

{two}

### One slot: the optimum

The optimum is found without the greedy: the least τ with Σ⌈load ÷ τ⌉ ≤ slots.

{one}

### Busiest link

256 experts, one a GPU, on 32 nodes of 8 H100 (leaf pods of 4 nodes), top-8, one copy of a token per node. Planned on {tokens:,}
tokens (a quarter of them only judges), measured on {fresh:,} fresh ones of the same distribution: Σ over layers of the busiest
link's time in dispatch, and tokens over it (mean over layers). Targets with topics at 2 : 1: 15 % below identity, 8 % below
longest first; without structure never above; 58 layers in 25 s on two cores.

{links}

With copies (one slot on more GPUs, or two slots), 2 : 1, 16 topics of strength 2, 4 layers. Of an expert's c copies, in the
order of the GPUs, the n-th serves the n-th part of the sources, for everyone but "at random". Fullest GPU ÷ mean GPU says what
the quiet links cost in evenness: planc was asked for links first. Targets: 35 % below identity, 15 % below longest first.

{copies}

### Small cases

Busiest link beside HiGHS on the mixed-integer program ({limit:g} s each), and all placements in the first case of 8 experts.
Best known: the better of the solver's and planc's.

{small}

### 1,024 GPUs

128 nodes of 8, 2 : 1, 16 topics; limit: minutes, < 4 GB. 58 layers: from the seconds a layer, shared by two workers.

{large}

### Spares

58 × 64 experts, lognormal 1, one expert a GPU: load of the fullest GPU in mean loads of an expert. The closed form, Σ⌈load ÷ τ⌉ −
experts, asked how many spares keep every GPU at or below that load, gives the spares back.

{spares}
"""


def table(header: str, rows: Iterable[str]) -> str:
    """A Markdown table; rows are printed as they come."""
    lines = [header]
    for row in rows:
        print(row, flush=True)
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    """Measure everything and write the part of the document."""
    shapes = tuple(even.SHAPES)
    text = TEXT.format(
        machine=machine(),
        tokens=busy.TOKENS,
        fresh=busy.FRESH,
        limit=busy.SMALL_LIMIT,
        many=table(even.HEADER, (even.balance_row(case, s) for case in even.MANY for s in shapes)),
        two=table(even.HEADER, (even.balance_row(c, s) for c in (*even.TWO, *even.NO_SPARES) for s in shapes)),
        one=table(even.ONE_HEADER, (even.one_slot_row(case, "lognormal 1") for case in even.ONE)),
        links=table(busy.LINK_HEADER, (busy.link_row(scene) for scene in busy.LINKS)),
        copies=table(busy.COPIES_HEADER, (busy.copies_row(scene) for scene in busy.COPIES)),
        small=table(busy.SMALL_HEADER, (busy.small_row(*sizes) for sizes in busy.SMALL)),
        large=table(busy.LARGE_HEADER, busy.large_rows()),
        spares=table(even.SPARES_HEADER, even.spare_rows()),
    )
    write_part(text)


if __name__ == "__main__":
    main()
