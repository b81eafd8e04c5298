"""`planc gate`: the loads of one MoE layer with a bias in its gate and without."""

from __future__ import annotations

import argparse

from planc.cli.output import planning, print_json, report, write_text


def gate(options: argparse.Namespace) -> int:
    """Run the gate over the spec's traffic, draw the loads and print the report."""
    from planc.report.gate import GateRequest, gate_json, gate_report, gate_text
    from planc.spec import load_spec

    asked = ("steps", "tokens", "rate", "rule", "capacity", "overflow", "drift", "seed", "layer")
    with planning("steps through the gate") as progress:
        found = gate_report(
            load_spec(options.spec, options.set),
            GateRequest(**{key: getattr(options, key) for key in asked}),
            progress=progress,
        )
    if options.output is not None:
        from planc.render import gate_loads_svg

        title = f"Loads of {found.name}, layer {found.layer}"
        write_text(gate_loads_svg(found.balanced, found.table, title, even=found.even), options.output)
    report(found.notes, options)
    if options.json:
        print_json(gate_json(found))
    else:
        print(gate_text(found))
    return 0
