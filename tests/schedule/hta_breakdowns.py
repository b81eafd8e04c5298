"""What HolisticTraceAnalysis says of folders of traces, as JSON. Runs in an environment of its own: `test_hta.py`."""

from __future__ import annotations

import json
import sys

from hta.trace_analysis import TraceAnalysis


def breakdowns(folder: str) -> dict[int, dict[str, float]]:
    """Per rank: times of the temporal breakdown, sums over kernels by type (µs), and the overlap (percent)."""
    analysis = TraceAnalysis(trace_dir=folder)
    times = analysis.get_temporal_breakdown(visualize=False)
    overlap = analysis.get_comm_comp_overlap(visualize=False)
    _, kernels = analysis.get_gpu_kernel_breakdown(visualize=False)
    by_type = kernels.groupby(["rank", "kernel_type"])["sum (us)"].sum()
    answer: dict[int, dict[str, float]] = {}
    for row in times.to_dict("records"):
        rank = int(row["rank"])
        answer[rank] = {name: float(row[f"{name}_time(us)"]) for name in ("idle", "compute", "non_compute", "kernel")}
        answer[rank] |= {kind: float(by_type[rank, kind]) for kind in ("COMPUTATION", "COMMUNICATION")}
    for row in overlap.to_dict("records"):
        answer[int(row["rank"])]["overlap_percent"] = float(row["comp_comm_overlap_pctg"])
    return answer


json.dump([breakdowns(folder) for folder in sys.argv[1:]], sys.stdout)
