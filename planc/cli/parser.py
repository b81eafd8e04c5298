"""The arguments of every command. An example stands at the end of each help text."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from planc import __version__
from planc.cli import commands, compare, costs, estimate, export, gate, place, prove, search, trace

Run = Callable[[argparse.Namespace], int]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="planc",
        description="Compile a model, a cluster and a workload into a verified deployment plan for MoE inference.",
        epilog="Example: planc build specs/moe-61l-ep64-dp2.yaml",
    )
    parser.add_argument("--version", action="version", version=f"planc {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str, example: str) -> argparse.ArgumentParser:
        part = subparsers.add_parser(name, help=text, description=text, epilog=f"Example: {example}")
        part.set_defaults(run=run)
        part.add_argument("--format", choices=("text", "json", "github"), default="text", help="form of diagnostics")
        return part

    text = "compile a spec, verify the plan and write its files"
    _build(command("build", commands.build, text, "planc build specs/moe-61l-ep64-dp2.yaml"))
    _check(command("check", commands.check, "report every fault of a spec; builds nothing", "planc check spec.yaml"))
    text = "check a written plan again, from its files alone"
    _verify(command("verify", commands.verify, text, "planc verify out/moe-61l-ep64-dp2"))
    text = "explain a diagnostic code, or part of a plan"
    _explain(command("explain", commands.explain, text, "planc explain out/PLAN --gpu 17"))
    text = "draw one figure of a plan again, with filters"
    _show(command("show", commands.show, text, "planc show out/PLAN --figure comprehensive --layers 3-5"))
    text = "place experts for known traffic, with bounds"
    example = "planc place --traffic trace.npz --cluster h100-sxm-32x8 --out map.json"
    _place(command("place", place.place, text, example))
    text = "predict TPOT, TTFT and TPS of a plan, with floors and intervals"
    example = "planc estimate specs/moe-61l-ep64-dp2.yaml --sweep batch=64..1024"
    _estimate(command("estimate", estimate.estimate, text, example))
    text = "compare plans: predictions, reasons for the difference, equal GPUs and equal latency"
    example = "planc compare specs/moe-4l-64gpu.yaml specs/moe-4l-16gpu-baseline.yaml"
    _compare(command("compare", compare.compare, text, example))
    text = "find the best plan for a model, a cluster and bounds: every legal plan, the front, and why"
    _search(command("search", search.search, text, "planc search specs/deepseek-v3-128gpu.yaml --tpot 50ms"))
    text = "balance the loads of a gate by its bias: what that does, what it costs, what copies do instead"
    _gate(command("gate", gate.gate, text, "planc gate deepseek-v3-ep256 --rate 0.003 -o loads.svg"))
    text = "run a plan on small numbers and compare it with the model run whole"
    _prove(command("prove", prove.prove, text, "planc prove specs/moe-61l-ep64-dp2.yaml"))
    text = "price a list of ops: microseconds with an interval and their provenance"
    _costs(command("costs", costs.costs, text, "planc costs --gpu h100-sxm ops.csv"))
    text = "simulate the step and write it as profiler traces, for Perfetto and HolisticTraceAnalysis"
    _trace(command("trace", trace.trace, text, "planc trace out/PLAN -o traces --ranks 0-7"))
    text = "write a plan as files that engines, orchestrators and simulators read"
    _export(command("export", export.export, text, "planc export out/PLAN --to sglang,chakra -o deploy"))
    text = "make a plan of the expert map that a deployment runs with: verified, drawn, to be priced and compared"
    example = "planc import-map expert_location.json specs/deepseek-v3-ep256.yaml -o out/running"
    _import_map(command("import-map", commands.import_map, text, example))
    text = "turn a Hugging Face config.json into a model file"
    part = command("import-hf", commands.import_hf, text, "planc import-hf config.json -o model.yaml")
    part.add_argument("path", help="a local config.json")
    _output(part)
    part = command("schema", commands.schema, "print a JSON Schema", "planc schema spec > spec.schema.json")
    part.add_argument("what", choices=("spec", "model", "cluster", "plan", "search"))
    _output(command("init", commands.init, "write a commented starter spec", "planc init -o my-deployment.yaml"))
    return parser


def _output(part: argparse.ArgumentParser) -> None:
    part.add_argument("-o", "--output", metavar="FILE", help="default: standard output")


def _spec(part: argparse.ArgumentParser) -> None:
    part.add_argument("spec", help="spec file, or the name of a shipped example")
    part.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. workload.batch=512"
    )


def _costs(part: argparse.ArgumentParser) -> None:
    part.add_argument("--gpu", required=True, metavar="GPU", help="a GPU preset such as h100-sxm, or a GPU file")
    part.add_argument(
        "--fit", metavar="FILE", help="a fit file of this GPU, such as benchmarks/gpu writes (docs/gpu.md)"
    )
    part.add_argument("ops", metavar="FILE", help="CSV: kind, dtype and the columns that the kinds need")


def _export(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", nargs="?", help="folder of a written plan, its plan.json, or a spec")
    part.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    text = "targets, separated by commas, or `all` that can express the plan"
    part.add_argument("--to", action="append", default=[], metavar="NAMES", help=text)
    part.add_argument("-o", "--output", metavar="FOLDER", help="where to write; a folder for each target")
    part.add_argument(
        "--model", default="", metavar="PATH", help="the checkpoint to serve: a folder, or a name on a hub"
    )
    part.add_argument("--image", default="", metavar="IMAGE", help="the container that serves it")
    text = "an option of a target; may be repeated"
    part.add_argument("--option", action="append", default=[], metavar="TARGET.KEY=VALUE", help=text)
    text = "relabel the experts of a checkpoint by this permutation.json, without a plan"
    part.add_argument("--apply-permutation", metavar="FILE", help=text)
    part.add_argument("--checkpoint", metavar="FOLDER", help="safetensors files to relabel a copy of, into -o")
    part.add_argument("--list", action="store_true", help="list the targets, and what each can and cannot express")
    part.add_argument("--json", action="store_true", help="print what was written as JSON")


def _build(part: argparse.ArgumentParser) -> None:
    _spec(part)
    _written(part)
    _workers(part)
    part.add_argument("--prove", action="store_true", help="run the plan on small numbers first, and keep the proof")


def _written(part: argparse.ArgumentParser) -> None:
    names = ", ".join(commands.FIGURE_NAMES)
    text = "where to write (default: out/NAME, with -running for a plan of a map)"
    part.add_argument("-o", "--output", metavar="FOLDER", help=text)
    part.add_argument("--figures", default="all", help=f"all, none, or a list of: {names}")
    part.add_argument("--json", action="store_true", help="print a summary as JSON")


def _import_map(part: argparse.ArgumentParser) -> None:
    part.add_argument("map", help="the map of SGLang, TensorRT-LLM, vLLM-Ascend or EPLB (docs/formats.md)")
    _spec(part)
    _written(part)


def _workers(part: argparse.ArgumentParser) -> None:
    part.add_argument("--workers", type=_positive, metavar="N", help="processes that plan layers (default: all cores)")


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**7:
        raise argparse.ArgumentTypeError(f"`{text[:40]}` is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _dollars(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"`{text[:40]}` is not a price in dollars above 0")
    return value


def _place(part: argparse.ArgumentParser) -> None:
    text = "npz, npy, json or jsonl with token choices or expert loads, or the name of a shipped sample"
    part.add_argument("--traffic", required=True, metavar="FILE", help=text)
    part.add_argument("--cluster", required=True, metavar="SPEC", help="deployment spec, cluster file, or shipped name")
    part.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    part.add_argument("--slots", type=_positive, metavar="N", help="expert slots per GPU (default: as few as needed)")
    text = "copies beyond one of each expert (default: every slot is filled)"
    part.add_argument("--redundant", type=_count, metavar="R", help=text)
    part.add_argument("--groups", type=_positive, metavar="G", help="groups of experts in the gate")
    part.add_argument("--current", metavar="MAP", help="expert map that runs now: move as little as can be")
    text = "further traffic that the placement must be good for; may be repeated"
    part.add_argument("--scenario", action="append", default=[], metavar="FILE", help=text)
    part.add_argument("--objective", choices=("link", "balance"), default="link", help="what comes first")
    text = "dispatch sends one copy per node (dedup) or per expert (direct)"
    part.add_argument("--transfer", choices=("dedup", "direct"), default="dedup", help=text)
    part.add_argument("--top-k", type=_positive, metavar="K", help="experts of a token, where the file has only loads")
    part.add_argument("--tokens", type=_positive, metavar="T", help="tokens of an EP group that times are for")
    part.add_argument("--seed", type=_count, default=0, metavar="S", help="seed of the search")
    _workers(part)
    part.add_argument("-o", "--out", metavar="FILE", help="the expert map (SGLang's physical_to_logical_map)")
    part.add_argument("--json", action="store_true", help="print the report as JSON")


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"`{text[:40]}` is not a number from 0 to 1e6")
    return value


def _gate(part: argparse.ArgumentParser) -> None:
    _spec(part)
    part.add_argument("--steps", type=_positive, default=200, metavar="N", help="steps of tokens (default: 200)")
    part.add_argument("--tokens", type=_positive, metavar="T", help="tokens of a step (default: those of the traffic)")
    text = "change of an expert's bias a step, in scores (default: 0.001)"
    part.add_argument("--rate", type=_amount, default=0.001, metavar="R", help=text)
    text = "by the sign of the distance from the mean load, or by the distance over the mean"
    part.add_argument("--rule", choices=("sign", "proportional"), default="sign", help=text)
    text = "most tokens of an expert over the mean (default: no limit)"
    part.add_argument("--capacity", type=_amount, metavar="F", help=text)
    text = "what is over the capacity is dropped, or passed on to the next best expert"
    part.add_argument("--overflow", choices=("drop", "next"), default="drop", help=text)
    text = "standard deviation, in logits, by which popularity changes a step (default: 0)"
    part.add_argument("--drift", type=_amount, default=0.0, metavar="D", help=text)
    part.add_argument("--seed", type=_count, metavar="S", help="seed of the tokens (default: that of the traffic)")
    part.add_argument("--layer", type=_count, metavar="L", help="MoE layer of the model (default: the first)")
    part.add_argument("-o", "--output", metavar="FILE", help="a figure of the loads over time, as SVG")
    part.add_argument("--json", action="store_true", help="print the report as JSON")


def _check(part: argparse.ArgumentParser) -> None:
    _spec(part)
    part.add_argument("--json", action="store_true", help="print degrees and memory as JSON")


def _estimate(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", help="folder of a plan, its plan.json, or a spec")
    part.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    text = "values of batch, isl, osl or micro_batches: batch=64,128, batch=64..4096 (doubling) or batch=64..512:64"
    part.add_argument("--sweep", metavar="KEY=VALUES", help=text)
    part.add_argument(
        "--plot", metavar="FILE.svg", help="with --sweep batch=…: TPS against TPOT, with --tpot as a line"
    )
    text = "find the batch with the most TPS within --tpot and --ttft (default: the spec's target) and memory"
    part.add_argument("--best", action="store_true", help=text)
    part.add_argument("--tpot", metavar="TIME", help="bound for --best, e.g. 20ms")
    part.add_argument("--ttft", metavar="TIME", help="bound for --best, e.g. 1s")
    part.add_argument("--path", action="store_true", help="list every op of the critical path")
    _fit(part)
    text = "a GPU (its rank) or link (its name) that is slower than planned by a factor; may be repeated"
    part.add_argument("--slow", action="append", default=[], metavar="WHAT=FACTOR", help=text)
    part.add_argument("--json", action="store_true", help="print the prediction as JSON")


def _compare(part: argparse.ArgumentParser) -> None:
    text = "folder of a plan, its plan.json, a spec, or the result of a search (FILE.json, FILE.json#2 for its second best)"
    part.add_argument("plans", nargs="+", metavar="PLAN", help=text)
    part.add_argument("--tpot", metavar="TIME", help="common bound (default: the slowest plan's own TPOT)")
    _fit(part)
    text = "price of a GPU hour, for $ per million tokens"
    part.add_argument("--gpu-hour", type=_dollars, metavar="DOLLARS", help=text)
    part.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _search(part: argparse.ArgumentParser) -> None:
    _spec(part)
    text = "what is best: most tokens per second, most per GPU, shortest TPOT, fewest dollars per token, fewest GPUs for --tps"
    part.add_argument("--objective", choices=("tps", "tps-per-gpu", "tpot", "cost", "gpus"), default="tps", help=text)
    part.add_argument("--tpot", metavar="TIME", help="bound, e.g. 20ms (default: the spec's target)")
    part.add_argument("--ttft", metavar="TIME", help="bound, e.g. 1s (default: the spec's target)")
    part.add_argument("--tps", metavar="RATE", help="at least so many tokens per second, e.g. 450k")
    text = "numbers of GPUs: 128, 64,128, '<=128' or 16..128 (whole nodes; default: the whole cluster)"
    part.add_argument("--gpus", metavar="N", help=text)
    text = "values of an axis of the space, e.g. tp=1,2 or dtypes.dispatch=fp8,bf16 (default: what is legal); may be repeated"
    part.add_argument("--over", action="append", default=[], metavar="KEY=VALUES", help=text)
    text = "only plans with at most one expert of a layer per GPU"
    part.add_argument("--one-expert-per-gpu", action="store_true", help=text)
    part.add_argument("--top", type=_positive, default=10, metavar="N", help="rows to list (default: 10)")
    part.add_argument(
        "--front", type=_count, default=8, metavar="N", help="points of the front, 0 for none (default: 8)"
    )
    part.add_argument("--pools", action="store_true", help="also share the GPUs between pools for prefill and decode")
    part.add_argument(
        "--sensitivity", action="store_true", help="also say what would change the winner, and at which value"
    )
    text = "simulations after which a search stops without proof (default: 10000)"
    part.add_argument("--limit", type=_positive, default=10_000, metavar="N", help=text)
    part.add_argument("--workers", type=_positive, metavar="N", help="processes that simulate (default: all cores)")
    part.add_argument(
        "--dask", metavar="ADDRESS", help="simulate on a Dask cluster instead (pip install 'planc[dask]')"
    )
    _fit(part)
    part.add_argument(
        "--gpu-hour", type=_dollars, metavar="DOLLARS", help="price of a GPU hour, for $ per million tokens"
    )
    part.add_argument("--build", metavar="FOLDER", help="compile, verify and write the winner as a plan")
    part.add_argument("-o", "--output", metavar="FILE.json", help="the result, for --resume and planc compare")
    part.add_argument("--resume", metavar="FILE.json", help="take over what an earlier search simulated")
    part.add_argument("--plot", metavar="FILE.svg", help="the front as a figure")
    part.add_argument(
        "--html", metavar="FILE.html", help="the front as a page with hover and filters (pip install 'planc[charts]')"
    )
    part.add_argument("--json", action="store_true", help="print the result as JSON")


def _fit(part: argparse.ArgumentParser) -> None:
    text = "a fit file of a GPU of the plan, in place of the one that ships; may be repeated (docs/gpu.md)"
    part.add_argument("--fit", action="append", default=[], metavar="FILE", help=text)


def _prove(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", help="folder of a plan, its plan.json, or a spec")
    part.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    text = "layers to run of those that are alike (default: one)"
    part.add_argument("--layers", type=_positive, default=1, metavar="N", help=text)
    text = "tokens of a gating rank, as few as its degrees allow times N (default: 2)"
    part.add_argument("--tokens", type=_positive, default=2, metavar="N", help=text)
    text = "hidden size, heads and widths, as small as degrees allow times N (default: 1)"
    part.add_argument("--scale", type=_positive, default=1, metavar="N", help=text)
    part.add_argument("--steps", type=_positive, default=2, metavar="N", help="decode steps (default: 2)")
    part.add_argument("--seed", type=_count, default=0, metavar="S", help="seed of weights and inputs")
    text = "run it by N real processes over torch.distributed with gloo (needs torch: docs/prove.md)"
    part.add_argument("--processes", type=_positive, metavar="N", help=text)
    text = "seconds that an op of --processes may wait for other processes (default: 60)"
    part.add_argument("--timeout", type=_positive, default=60, metavar="S", help=text)
    part.add_argument("--json", action="store_true", help="print the proof as JSON")


def _verify(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", help="folder of a plan, or its plan.json")
    text = "the recording that the plan was made for, to measure its links again"
    part.add_argument("--traffic", metavar="FILE", help=text)
    part.add_argument("--json", action="store_true", help="print the checks as JSON")


def _explain(part: argparse.ArgumentParser) -> None:
    what = "a code such as PLN201, `codes` for the list of them, or a plan (folder, plan.json or spec)"
    part.add_argument("what", help=what)
    part.add_argument("--gpu", type=int, metavar="RANK", help="what a GPU holds and runs")
    part.add_argument("--expert", metavar="LAYER:EXPERT", help="where an expert is, and what it receives")
    part.add_argument("--memory", action="store_true", help="memory by item of the fullest and emptiest GPU")


def _show(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", help="folder of a plan, its plan.json, or a spec")
    part.add_argument("--figure", choices=tuple(commands.FIGURE_NAMES), default="simplified")
    kind = "default: by the name given with -o, else svg; png and pdf need Graphviz's dot"
    part.add_argument("--type", choices=commands.PICTURE_TYPES, help=kind)
    part.add_argument("--topology", action="store_true", help="print the cluster's links and their busiest instead")
    part.add_argument("--layers", metavar="RANGE", help="comprehensive: these layers; detailed: this layer")
    part.add_argument("--nodes", metavar="RANGE", help="comprehensive: these nodes")
    part.add_argument("--replica", metavar="RANGE", help="comprehensive: these replicas; detailed: this replica")
    _output(part)


def _trace(part: argparse.ArgumentParser) -> None:
    part.add_argument("plan", help="folder of a plan, its plan.json, or a spec")
    text = "where to write rank-N.json.gz; traces of an earlier run there are replaced"
    part.add_argument("-o", "--output", required=True, metavar="FOLDER", help=text)
    part.add_argument("--ranks", metavar="RANGE", help="these ranks, e.g. 0-7,64 (default: all)")
    text = "one file of all these ranks instead, step.json.gz, with the critical path: for Perfetto"
    part.add_argument("--chrome", action="store_true", help=text)
    part.add_argument("--json", action="store_true", help="print what was written as JSON")
