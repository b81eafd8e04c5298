"""The commands: each takes the parsed options and returns the exit status."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planc.cli.output import cores, planning, print_json, refuse_to_overwrite, report, say, write_text
from planc.diagnostics import CODES, Diagnostic, PlancError, Span

if TYPE_CHECKING:
    from planc.spec import Spec
    from planc.verify import VerifiedPlan

PICTURE_TYPES = ("svg", "dot", "png", "pdf")
FIGURE_NAMES = {
    "comprehensive": "comprehensive_moe_dag",
    "simplified": "simplified_moe_dag",
    "detailed": "detailed_expert_dag",
    "deployment": "complete_deployment_dag",
}


def build(options: argparse.Namespace) -> int:
    from planc import pipeline

    figures = _figures(options.figures)
    spec = _load_spec(options)
    with planning("planning layers") as progress:
        plan = pipeline.compile(spec, workers=options.workers or cores(), progress=progress)
    if options.prove:
        from planc.prove.recorded import proved

        plan = proved(plan)
    return _write_plan(plan, options, figures)


def import_map(options: argparse.Namespace) -> int:
    from planc import pipeline
    from planc.placement.given import with_map

    figures = _figures(options.figures)
    taken = next((text for text in options.set if re.match(r"\s*placement(\.(policy|map|current))?\s*=", text)), None)
    if taken is not None:
        message = f"`{taken[:60]}`: the map of the command line is the placement"
        raise PlancError(
            [Diagnostic("PLN111", message, "--set", Span("--set", 1, 1), "leave it out, or use planc build")]
        )
    spec, form, changed = with_map(_load_spec(options), options.map)
    plan = pipeline.compile(spec)
    say(f"{options.map}: {form}; set {', '.join(changed)}")
    return _write_plan(plan, options, figures)


def _write_plan(plan: VerifiedPlan, options: argparse.Namespace, figures: Sequence[str]) -> int:
    """Write a plan with its figures, and say what it is."""
    from planc import pipeline

    name = plan.spec.name + (
        "-running" if plan.spec.policy == "given" else ""
    )  # beside the plan that is compared with it
    folder = options.output or os.path.join("out", re.sub(r"/|^\.+$", "_", name))
    files = pipeline.write(plan, folder, figures)
    if plan.notes:
        report(plan.notes, argparse.Namespace(format="text"))
    left_out = [name for name in figures if name not in pipeline.drawn(plan, figures)]
    hint = "planc show --figure comprehensive draws a part of it with --layers, --nodes or --replica"
    report(
        [
            Diagnostic("PLN208", f"{name} is not part of this build", hint=hint, severity="note")
            for name in left_out
            if plan.placement.layers or name != "detailed_expert_dag"  # a dense model has no experts to draw
        ],
        argparse.Namespace(format="text"),
    )
    if options.json:
        print_json(_summary(plan) | {"files": [str(path) for path in files]})
    par = plan.parallelism
    say(
        f"{plan.spec.name}: {par.world_size} GPUs, dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}; "
        f"{plan.blocks.op_count:,} ops, {len(plan.expanded.source):,} edges, {len(plan.checks)} checks passed"
    )
    say(f"wrote {len(files)} files to {folder}")
    return 0


def _load_spec(options: argparse.Namespace) -> Spec:
    from planc.spec import load_spec

    return load_spec(options.spec, options.set)


def _figures(text: str) -> list[str]:
    if text in ("all", "none"):
        return list(FIGURE_NAMES.values()) if text == "all" else []
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in FIGURE_NAMES]
    if unknown:
        message = f"`{unknown[0][:40]}` is not a figure; there are {', '.join(FIGURE_NAMES)}"
        raise PlancError([Diagnostic("PLN015", message, span=Span("--figures", 1, 1))])
    return [FIGURE_NAMES[name] for name in names]


def _summary(plan: VerifiedPlan) -> dict[str, Any]:
    par, memory = plan.parallelism, plan.memory
    return {
        "name": plan.spec.name,
        "world_size": par.world_size,
        "parallelism": {
            key: getattr(par, key) for key in ("dp", "pp", "ep", "tp", "expert_tp", "attention_dp", "gating")
        },
        "reasons": plan.reasons,
        "expert_rule": {"rounds": plan.placement.rounds, "relaxed": plan.placement.relaxed},
        "memory": {
            "fullest_rank": memory.fullest,
            "used_bytes": int(memory.used[memory.fullest]),
            "items": memory.of_rank(memory.fullest),
        },
        "limits": plan.limits,
        "ops": plan.blocks.op_count,
        "edges": len(plan.expanded.source),
        "notes": [{"code": n.code, "severity": n.severity, "message": n.message} for n in plan.notes],
        "checks": [{"name": c.name, "count": c.count, "what": c.what} for c in plan.checks],
    }


def check(options: argparse.Namespace) -> int:
    from planc import pipeline
    from planc.verify import plan_notes

    spec = _load_spec(options)
    placed = pipeline.place(spec)
    faults = pipeline.file_faults(spec, placed)
    if faults:
        raise PlancError(faults)
    notes = plan_notes(spec, placed.par, placed.placement)
    if notes:
        report(notes, options)
    par, memory = placed.par, placed.memory
    used, room = int(memory.used[memory.fullest]), int(memory.capacity[memory.fullest])
    if options.json:
        degrees = {key: getattr(par, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}
        print_json({"name": spec.name, "parallelism": degrees, "reasons": placed.reasons, "used_bytes": used})
    say(
        f"{spec.name}: no faults; dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}, {used / 1e9:.1f} of {room / 1e9:.1f} GB on the fullest GPU"
    )
    return 0


def verify(options: argparse.Namespace) -> int:
    from planc import pipeline
    from planc.prove.recorded import prove_again

    plan, compared = pipeline.verify_folder(options.plan)
    measured = pipeline.measure_again(plan, options.traffic)
    executed = prove_again(plan)
    if options.json:
        print_json({"name": plan.spec.name, "checks": _summary(plan)["checks"], "files": compared})
    for check in plan.checks:
        say(f"ok  {check.name} ({check.count:,} {check.what})")
    say(f"ok  {len(compared)} files say what plan.json says")
    if executed:
        say(f"ok  {executed}")
    if measured:
        say(measured if measured.startswith("link times not") else f"ok  {measured}")
    return 0


def explain(options: argparse.Namespace) -> int:
    if options.what == "codes":
        print("\n".join(f"{code}  {entry.title}" for code, entry in CODES.items()))
        return 0
    if options.what.upper().startswith("PLN"):
        code = options.what.upper()
        if code not in CODES:
            raise PlancError(
                [
                    Diagnostic(
                        "PLN015",
                        f"{code} is not a diagnostic code",
                        hint="`planc explain codes` lists them",
                    )
                ]
            )
        title, explanation, since, status = CODES[code]
        print(f"{code}: {title}\n\n{explanation}\n\nSince {since}, {status}.")
        return 0
    from planc.report.explain import explain_expert, explain_gpu, explain_memory, explain_plan

    plan = load_any(options.what)
    texts = []
    if options.gpu is not None:
        texts.append(explain_gpu(plan, options.gpu))
    if options.expert is not None:
        texts.append(explain_expert(plan, options.expert))
    if options.memory:
        texts.append(explain_memory(plan))
    print("\n\n".join(texts or [explain_plan(plan)]))
    return 0


def load_any(name: str, overrides: Sequence[str] = ()) -> VerifiedPlan:
    """A plan from its folder or plan.json; a spec is compiled, with ``overrides``."""
    from planc.pipeline import compile
    from planc.spec import load_spec, shipped_folder
    from planc.verify import load_plan

    example = os.path.isfile(shipped_folder("specs") / f"{name}.yaml")
    shipped = example and not os.path.exists(os.path.join(name, "plan.json"))
    if (os.path.isdir(name) and not shipped) or name.endswith(".json"):
        if overrides:
            message = "a written plan is as it is: --set changes keys of a spec"
            hint = "give the spec in place of the plan; `planc estimate` also sweeps a workload: --sweep batch=…"
            raise PlancError([Diagnostic("PLN406", message, "--set", Span("--set", 1, 1), hint)])
        return load_plan(name)
    return compile(load_spec(name, overrides))


def _type_of(path: str | None) -> str:
    """The picture type that a file name asks for; svg without one."""
    ending = os.path.splitext(path or "")[1].lstrip(".").lower()
    return ending if ending in PICTURE_TYPES else "svg"


def show(options: argparse.Namespace) -> int:
    if options.topology:
        from planc.report.topology import topology_text

        write_text(topology_text(load_any(options.plan)) + "\n", options.output)
        return 0
    from planc.render.show import draw

    text = draw(
        load_any(options.plan),
        FIGURE_NAMES[options.figure],
        options.type or _type_of(options.output),
        layers=options.layers,
        nodes=options.nodes,
        replicas=options.replica,
    )
    write_text(text, options.output)
    return 0


def import_hf(options: argparse.Namespace) -> int:
    from planc.spec.hf import import_config, to_yaml

    tree, notes = import_config(options.path)
    if notes:
        report(notes, argparse.Namespace(format="text"))
    refuse_to_overwrite(options.output)
    write_text(to_yaml(tree), options.output)
    return 0


def schema(options: argparse.Namespace) -> int:
    from planc.report.schema import json_schema

    print_json(json_schema(options.what))
    return 0


def init(options: argparse.Namespace) -> int:
    from planc.spec import shipped_folder

    refuse_to_overwrite(options.output)
    write_text((shipped_folder("templates") / "starter_spec.yaml").read_text(encoding="utf-8"), options.output)
    return 0
