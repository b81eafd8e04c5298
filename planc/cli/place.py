"""`planc place`: expert placement by itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planc.cli.output import cores, planning, print_json, report, say, write_text
from planc.diagnostics import Diagnostic

if TYPE_CHECKING:
    import numpy as np

    from planc.placement.place import ExpertMap


def place(options: argparse.Namespace) -> int:
    """Read the traffic and the cluster, plan, write the map and print the report."""
    from planc.placement.expert_map import read_map
    from planc.placement.place import Request, empty_slots, expected_model
    from planc.placement.place import place as plan
    from planc.routing import load_traffic
    from planc.spec import Spec, load_target, shipped_folder

    target = load_target(options.cluster, options.set)
    expect = expected_model(target)
    samples = shipped_folder("specs") / "traffic"

    def traffic_of(name: str) -> Path:
        shipped = samples / name
        return shipped if len(Path(name).parts) == 1 and not Path(name).exists() and shipped.is_file() else Path(name)

    traffic = load_traffic(traffic_of(options.traffic), expect=expect)
    scenarios = [load_traffic(traffic_of(name), expect=expect) for name in options.scenario]
    model = target.model if isinstance(target, Spec) else None

    def current(experts: int, holders: int) -> np.ndarray:
        moe_layers = model.moe_layer_ids if model else tuple(range(traffic.layers))
        layers = model.layers if model else traffic.layers
        return read_map(options.current, experts=experts, holders=holders, moe_layers=moe_layers, layers=layers)

    request = Request(
        slots=options.slots,
        redundant=options.redundant,
        groups=options.groups,
        objective=options.objective,
        transfer=options.transfer,
        top_k=options.top_k,
        tokens=options.tokens,
        seed=options.seed,
    )
    with planning("placing layers") as progress:
        found = plan(
            traffic,
            target,
            request,
            scenarios=scenarios,
            current=current if options.current else None,
            workers=options.workers or cores(),
            progress=progress,
            stop=True,
        )
    if options.out is not None:
        write_text(found.text(), options.out)
    _notes(found, empty_slots(found.tables), options)
    if options.json:
        print_json(json_report(found))
    else:
        from planc.report.placement import placement_tables

        placement_tables(found.certificate, sys.stderr)
        say(f"planned in {found.seconds:.1f} s")
    return 130 if found.certificate.interrupted else 0


def json_report(found: ExpertMap) -> dict[str, object]:
    """The certificate's parts, and the wall-clock ``seconds`` of the planning."""
    values = found.certificate.model_dump()
    first = ("objectives", "bounds", "gaps", "held_out")
    return {key: values[key] for key in first} | {
        "seconds": found.seconds,
        "assumed": list(found.assumed),
        **{key: value for key, value in values.items() if key not in first},
    }


def _notes(found: ExpertMap, empty: int, options: argparse.Namespace) -> None:
    notes = []
    if found.certificate.interrupted:
        message = "interrupted: layers that were not reached have the best of the quick placements, not a searched one"
        notes.append(Diagnostic("PLN210", message, severity="warning"))
    if empty:
        message = f"{empty} slots stay empty (-1 in the map), and engines load no map with empty slots"
        hint = "leave out --redundant, or choose a number that fills them"
        notes.append(Diagnostic("PLN211", message, hint=hint, severity="note"))
    notes += [Diagnostic("PLN212", f"assumed: {text}", severity="note") for text in found.assumed]
    report(notes, options)
