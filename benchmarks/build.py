"""Time and peak memory of `planc build`, beside plain networkx and the graphviz package on the same graph.

Every run is a process of its own, measured from start to exit by the operating system (wall clock, and peak resident
memory from rusage). The plain side gets the finished list of ops and edges for nothing: it only fills a DiGraph,
checks that it is acyclic and connected, and makes the DOT text. planc reads the spec, plans, verifies, and writes four
figures in two formats, the document and plan.json.

Run: make bench   (writes the first part of docs/benchmarks.md)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from sections import best, machine, measure, write_part

RUNS = 3  #: of `sections.best`
SPECS = ("moe-61l-ep64-dp2", "moe-4l-64gpu", "deepseek-v3-ep256", "deepseek-v3-128gpu", "deepseek-v3-10240gpu")
LIMITS = {  # seconds and MB that the project has set itself
    "moe-61l-ep64-dp2": (3, 300),
    "deepseek-v3-ep256": (5, 0),
    "deepseek-v3-10240gpu": (20, 2000),
}
INPUTS = """
import pickle, sys
import planc
graph = planc.compile(planc.load_spec(sys.argv[1])).graph
pickle.dump((list(graph.nodes(data=True)), list(graph.edges(data=True))), open(sys.argv[2], "wb"))
"""
PLAIN = """
import pickle, sys
import graphviz, networkx as nx
nodes, edges = pickle.load(open(sys.argv[1], "rb"))
graph = nx.DiGraph()
for name, attributes in nodes:
    graph.add_node(name, **attributes)
for source, target, attributes in edges:
    graph.add_edge(source, target, **attributes)
assert nx.is_directed_acyclic_graph(graph)
start = next(n for n in graph if graph.in_degree(n) == 0)
assert len(nx.descendants(graph, start)) == len(graph) - 1
dot = graphviz.Digraph()
for name, attributes in graph.nodes(data=True):
    dot.node(name, **{k: str(v) for k, v in attributes.items()})
for source, target, attributes in graph.edges(data=True):
    dot.edge(source, target, **{k: str(v) for k, v in attributes.items()})
open(sys.argv[2], "w").write(dot.source)
"""


def plain_inputs(spec: str, path: Path) -> None:
    """Ops and edges of a plan as plain tuples; made in a process of its own, because a child's peak memory counts
    what its parent held when it was forked."""
    measure([sys.executable, "-c", INPUTS, spec, str(path)])


def main() -> None:
    """Measure everything and write the first part of docs/benchmarks.md."""
    python = [sys.executable]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in SPECS:
            out = Path(folder) / spec
            seconds, peak = best([*python, "-m", "planc", "build", spec, "-o", str(out)])
            size = sum(f.stat().st_size for f in out.iterdir()) / 1e6
            limit = LIMITS.get(spec)
            bound = f"≤ {limit[0]} s" + (f", ≤ {limit[1]} MB" if limit[1] else "") if limit else "–"
            plain = "–"
            if spec in ("moe-61l-ep64-dp2", "moe-4l-64gpu", "deepseek-v3-ep256"):
                plain_inputs(spec, Path(folder) / "graph.pickle")
                script = [*python, "-c", PLAIN, f"{folder}/graph.pickle", f"{folder}/plain.dot"]
                other, other_peak = best(script)
                plain = f"{other:.2f} s, {other_peak:.0f} MB ({other / seconds:.1f}× the time)"
            rows.append(f"| {spec} | {seconds:.2f} s | {peak:.0f} MB | {size:.1f} MB | {bound} | {plain} |")
            print(rows[-1], flush=True)
    started = best([*python, "-m", "planc", "--help"])
    text = f"""# Benchmarks

`make bench` on {machine()}; best time and highest peak of {RUNS}
runs, each a process measured from start to exit.

| spec | planc build | peak | files | bound | plain networkx + graphviz, same graph |
|---|---:|---:|---:|---|---|
{chr(10).join(rows)}

The plain side starts from the finished ops and edges, fills a DiGraph, checks that it is acyclic and connected, and
writes one DOT. planc reads the spec, plans, verifies every rule, and writes four figures in two formats, the document
and plan.json.

`planc --help`: {started[0] * 1000:.0f} ms, {started[1]:.0f} MB.
"""
    write_part(text)


if __name__ == "__main__":
    main()
