"""`planc export`: the plan as files that engines, orchestrators and simulators read."""

from __future__ import annotations

import argparse

from planc.cli.commands import load_any
from planc.cli.output import planning, print_json, report, say
from planc.diagnostics import Diagnostic, PlancError, Span


def export(options: argparse.Namespace) -> int:
    """Write the targets asked for, list those there are."""
    from planc.export import write

    if options.list:
        _list(options)
        return 0
    if options.apply_permutation or options.checkpoint:
        return _apply_permutation(options)
    names = [name.strip() for part in options.to for name in part.split(",") if name.strip()]
    if options.plan is None or not names or not options.output:
        missing = "a plan" if options.plan is None else "--to" if not names else "-o"
        hint = "planc export PLAN --to sglang,chakra -o FOLDER; planc export --list tells what there is"
        raise PlancError([Diagnostic("PLN502", f"{missing} is missing", missing, Span("--to", 1, 1), hint)])
    plan = load_any(options.plan, options.set)
    asked = dict(part.partition("=")[::2] for part in options.option)
    done = write(plan, names, options.output, model=options.model, image=options.image, options=asked)
    if options.json:
        print_json(
            {
                "name": plan.spec.name,
                "files": [str(path) for path in done.paths],
                "notes": done.notes,
                "refused": {name: [fault.message for fault in faults] for name, faults in done.refused.items()},
            }
        )
    say(
        f"{plan.spec.name}: wrote {len(done.paths)} files for {', '.join(done.notes) or 'no target'} to {options.output}"
    )
    for note in dict.fromkeys(note for told in done.notes.values() for note in told):
        say(f"  {', '.join(name for name, told in done.notes.items() if note in told)}: {note}")
    if not options.json:
        report([fault for faults in done.refused.values() for fault in faults], options)
    return 0


def _list(options: argparse.Namespace) -> None:
    from planc.export import TARGETS, target

    found = {name: target(name) for name in TARGETS}
    if options.json:
        told = ("title", "version", "says", "lacks", "options")
        print_json({name: {key: getattr(one, key) for key in told} for name, one in found.items()})
        return
    for name, one in found.items():
        print(f"{name}: {one.title} {one.version}".rstrip())
        print(f"  can: {one.says}\n  cannot: {one.lacks}")
        for key, values in one.options.items():
            print(f"  --option {name}.{key}={'|'.join(values)}")


def _apply_permutation(options: argparse.Namespace) -> int:
    from planc.export.checkpoint import apply_permutation

    needed = {
        "--apply-permutation": options.apply_permutation,
        "--checkpoint": options.checkpoint,
        "-o": options.output,
    }
    missing = next((name for name, value in needed.items() if not value), None)
    beside = options.plan is not None or options.to or options.set or options.option or options.model or options.image
    if missing or beside:
        message = (
            f"{missing} is missing" if missing else "a checkpoint is relabelled without a plan, --to and their options"
        )
        hint = "planc export --apply-permutation permutation.json --checkpoint FOLDER -o NEW_FOLDER"
        raise PlancError(
            [Diagnostic("PLN502", message, "--apply-permutation", Span("--apply-permutation", 1, 1), hint)]
        )
    with planning("relabelling experts") as progress:
        written, left_out = apply_permutation(options.apply_permutation, options.checkpoint, options.output, progress)
    if options.json:
        print_json({"files": [str(path) for path in written], "left_out": left_out})
    say(f"wrote {len(written)} files to {options.output}")
    if left_out:
        say(f"  left out, as they have other weights or are hidden: {', '.join(left_out)}")
    return 0
