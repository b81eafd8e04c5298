"""The command line: the only place that prints or exits. Human text goes to stderr, data to stdout.

Exit status: 0 good, 1 the spec or plan was refused, 2 wrong usage, 70 a fault in planc itself.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from planc import __version__
from planc.diagnostics import CODES, Diagnostic, PlancError, Span, render_github, render_json, render_text

if TYPE_CHECKING:
    from planc.spec import Spec
    from planc.verify import VerifiedPlan

_TYPES = ("svg", "dot", "png", "pdf")
FIGURE_NAMES = {
    "comprehensive": "comprehensive_moe_dag",
    "simplified": "simplified_moe_dag",
    "detailed": "detailed_expert_dag",
    "deployment": "complete_deployment_dag",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a file name need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except KeyboardInterrupt:
        print("interrupted; earlier output is as it was", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            _drop_stdout()
            _report(_unwritable("standard output", error).diagnostics, argparse.Namespace(format="text"))
            return 1
        if os.environ.get("PLANC_DEBUG"):
            raise
        message = f"{type(error).__name__}: {error}"
        hint = "set PLANC_DEBUG=1 for the traceback"
        _report([Diagnostic("PLN900", message, hint=hint)], options)
        return 70


def _run(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        return status
    except PlancError as error:
        _report(error.diagnostics, options)
        return 1


def _drop_stdout() -> None:
    """What is still buffered cannot be written; Python would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unwritable(name: str, error: OSError) -> PlancError:
    return PlancError([Diagnostic("PLN017", f"cannot write {name}: {error.strerror or error}")])


def _report(diagnostics: Iterable[Diagnostic], options: argparse.Namespace) -> None:
    style = getattr(options, "format", "text")
    diagnostics = tuple(diagnostics)
    if not diagnostics:
        return
    if style == "json":
        print(render_json(diagnostics))
    elif style == "github":
        print(render_github(diagnostics))
    else:
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(render_text(diagnostics, colour=colour), file=sys.stderr)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _data(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


# --- arguments ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="planc",
        description="Compile a model, a cluster and a workload into a verified deployment plan for MoE inference.",
        epilog="Example: planc build specs/moe-61l-ep64-dp2.yaml",
    )
    parser.add_argument("--version", action="version", version=f"planc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=text, description=text, epilog=f"Example: {example}")
        part.set_defaults(run=run)
        part.add_argument("--format", choices=("text", "json", "github"), default="text", help="form of diagnostics")
        return part

    def with_spec(part: argparse.ArgumentParser) -> None:
        part.add_argument("spec", help="spec file, or the name of a shipped example")
        part.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. workload.batch=512"
        )

    part = command(
        "build",
        _build,
        "compile a spec, verify the plan and write its files",
        "planc build specs/moe-61l-ep64-dp2.yaml",
    )
    with_spec(part)
    part.add_argument("-o", "--output", metavar="FOLDER", help="where to write (default: out/NAME)")
    part.add_argument("--figures", default="all", help="all, none, or a list of: " + ", ".join(FIGURE_NAMES))
    part.add_argument("--json", action="store_true", help="print a summary as JSON")

    part = command("check", _check, "report every fault of a spec; builds nothing", "planc check spec.yaml")
    with_spec(part)
    part.add_argument("--json", action="store_true", help="print degrees and memory as JSON")

    part = command(
        "verify", _verify, "check a written plan again, from its files alone", "planc verify out/moe-61l-ep64-dp2"
    )
    part.add_argument("plan", help="folder of a plan, or its plan.json")
    part.add_argument("--json", action="store_true", help="print the checks as JSON")

    part = command(
        "explain", _explain, "explain a diagnostic code, or part of a plan", "planc explain out/PLAN --gpu 17"
    )
    part.add_argument(
        "what", help="a code such as PLN201, `codes` for the list of them, or a plan (folder, plan.json or spec)"
    )
    part.add_argument("--gpu", type=int, metavar="RANK", help="what a GPU holds and runs")
    part.add_argument("--expert", metavar="LAYER:EXPERT", help="where an expert is, and what it receives")
    part.add_argument("--memory", action="store_true", help="memory by item of the fullest and emptiest GPU")

    part = command(
        "show",
        _show,
        "draw one figure of a plan again, with filters",
        "planc show out/PLAN --figure comprehensive --layers 3-5",
    )
    part.add_argument("plan", help="folder of a plan, its plan.json, or a spec")
    part.add_argument("--figure", choices=tuple(FIGURE_NAMES), default="simplified")
    part.add_argument(
        "--type", choices=_TYPES, help="default: by the name given with -o, else svg; png and pdf need Graphviz's dot"
    )
    part.add_argument("--topology", action="store_true", help="print the cluster's links and their busiest instead")
    part.add_argument("--layers", metavar="RANGE", help="comprehensive: these layers; detailed: this layer")
    part.add_argument("--nodes", metavar="RANGE", help="comprehensive: these nodes")
    part.add_argument("--replica", metavar="RANGE", help="comprehensive: these replicas; detailed: this replica")
    part.add_argument("-o", "--output", metavar="FILE", help="default: standard output")

    part = command(
        "import-hf",
        _import_hf,
        "turn a Hugging Face config.json into a model file",
        "planc import-hf config.json -o model.yaml",
    )
    part.add_argument("path", help="a local config.json")
    part.add_argument("-o", "--output", metavar="FILE", help="default: standard output")

    part = command("schema", _schema, "print a JSON Schema", "planc schema spec > spec.schema.json")
    part.add_argument("what", choices=("spec", "model", "cluster", "plan"))

    part = command("init", _init, "write a commented starter spec", "planc init -o my-deployment.yaml")
    part.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    return parser


# --- commands -------------------------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    from planc import pipeline

    figures = _figures(options.figures)
    plan = pipeline.compile(_load_spec(options))
    folder = options.output or os.path.join("out", re.sub(r"/|^\.+$", "_", plan.spec.name))
    files = pipeline.write(plan, folder, figures)
    if plan.notes:
        _report(plan.notes, argparse.Namespace(format="text"))
    left_out = [name for name in figures if name not in pipeline.drawn(plan, figures)]
    hint = "planc show --figure comprehensive draws a part of it with --layers, --nodes or --replica"
    _report(
        [
            Diagnostic("PLN208", f"{name} is not part of this build", hint=hint, severity="note")
            for name in left_out
            if plan.placement.layers or name != "detailed_expert_dag"  # a dense model has no experts to draw
        ],
        argparse.Namespace(format="text"),
    )
    if options.json:
        _data(_summary(plan) | {"files": [str(path) for path in files]})
    par = plan.parallelism
    _say(
        f"{plan.spec.name}: {par.world_size} GPUs, dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}; "
        f"{plan.blocks.op_count:,} ops, {len(plan.expanded.source):,} edges, {len(plan.checks)} checks passed"
    )
    _say(f"wrote {len(files)} files to {folder}")
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


def _check(options: argparse.Namespace) -> int:
    from planc import pipeline
    from planc.verify import plan_notes

    spec = _load_spec(options)
    placed = pipeline.place(spec)
    notes = plan_notes(spec, placed.par, placed.placement)
    if notes:
        _report(notes, options)
    par, memory = placed.par, placed.memory
    used, room = int(memory.used[memory.fullest]), int(memory.capacity[memory.fullest])
    if options.json:
        degrees = {key: getattr(par, key) for key in ("dp", "pp", "ep", "tp", "expert_tp")}
        _data({"name": spec.name, "parallelism": degrees, "reasons": placed.reasons, "used_bytes": used})
    _say(
        f"{spec.name}: no faults; dp {par.dp} · pp {par.pp} · ep {par.ep} · tp {par.tp}, {used / 1e9:.1f} of {room / 1e9:.1f} GB on the fullest GPU"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from planc import pipeline

    plan, compared = pipeline.verify_folder(options.plan)
    if options.json:
        _data({"name": plan.spec.name, "checks": _summary(plan)["checks"], "files": compared})
    for check in plan.checks:
        _say(f"ok  {check.name} ({check.count:,} {check.what})")
    _say(f"ok  {len(compared)} files say what plan.json says")
    return 0


def _explain(options: argparse.Namespace) -> int:
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

    plan = _load_any(options.what)
    texts = []
    if options.gpu is not None:
        texts.append(explain_gpu(plan, options.gpu))
    if options.expert is not None:
        texts.append(explain_expert(plan, options.expert))
    if options.memory:
        texts.append(explain_memory(plan))
    print("\n\n".join(texts or [explain_plan(plan)]))
    return 0


def _load_any(name: str) -> VerifiedPlan:
    """A plan from its folder or plan.json; a spec is compiled."""
    from pathlib import Path

    from planc.pipeline import compile
    from planc.spec import load_spec
    from planc.verify import load_plan

    if Path(name).is_dir() or name.endswith(".json"):
        return load_plan(name)
    return compile(load_spec(name))


def _type_of(path: str | None) -> str:
    """The picture type that a file name asks for; svg without one."""
    ending = os.path.splitext(path or "")[1].lstrip(".").lower()
    return ending if ending in _TYPES else "svg"


def _show(options: argparse.Namespace) -> int:
    if options.topology:
        from planc.report.topology import topology_text

        _write_text(topology_text(_load_any(options.plan)) + "\n", options.output)
        return 0
    from planc.render.show import draw

    text = draw(
        _load_any(options.plan),
        FIGURE_NAMES[options.figure],
        options.type or _type_of(options.output),
        layers=options.layers,
        nodes=options.nodes,
        replicas=options.replica,
    )
    _write_text(text, options.output)
    return 0


def _refuse_to_overwrite(path: str | None) -> None:
    """A file that people edit is not written over."""
    if path is not None and os.path.lexists(path):
        hint = "choose another name with -o, or remove the file first"
        raise PlancError([Diagnostic("PLN017", f"{path} is there already", hint=hint)])


def _write_text(content: str | bytes, path: str | None) -> None:
    """To a file, whole or not at all, or to standard output."""
    data = content if isinstance(content, bytes) else content.encode()
    if path is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    temporary = f"{path}.planc-{os.getpid()}"
    try:
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise _unwritable(path, error) from None
    _say(f"wrote {path}")


def _import_hf(options: argparse.Namespace) -> int:
    from planc.spec.hf import import_config, to_yaml

    tree, notes = import_config(options.path)
    if notes:
        _report(notes, argparse.Namespace(format="text"))
    _refuse_to_overwrite(options.output)
    _write_text(to_yaml(tree), options.output)
    return 0


def _schema(options: argparse.Namespace) -> int:
    from planc.report.schema import json_schema

    _data(json_schema(options.what))
    return 0


def _init(options: argparse.Namespace) -> int:
    from planc.spec import shipped_folder

    _refuse_to_overwrite(options.output)
    _write_text((shipped_folder("templates") / "starter_spec.yaml").read_text(encoding="utf-8"), options.output)
    return 0
