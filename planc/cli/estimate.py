"""`planc estimate`: TPOT, TTFT and TPS of a plan, over workloads, and the best batch under bounds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planc.cli.commands import load_any
from planc.cli.output import planning, print_json, say, write_text
from planc.diagnostics import Diagnostic, PlancError, Span

if TYPE_CHECKING:
    from planc.cost.book import PriceBook
    from planc.schedule import Slow, Sweep
    from planc.spec import Spec
    from planc.verify import VerifiedPlan

SWEPT = ("batch", "isl", "osl", "micro_batches")
MOST_POINTS = 1000
MOST_MICRO_BATCHES = 64  #: as in a spec


def estimate(options: argparse.Namespace) -> int:
    """Predict a plan or a spec, and print the prediction."""
    from planc.report.estimate import (
        estimate_record,
        estimate_text,
        path_records,
        path_text,
        straggler_record,
        straggler_text,
    )
    from planc.schedule import estimate as predict
    from planc.schedule import known_traffic

    sweep = _read_sweep(options.sweep) if options.sweep else None
    bounds = read_bound("--tpot", options.tpot), read_bound("--ttft", options.ttft)
    _refuse_unused(options)
    plan = load_any(options.plan, options.set)
    traffic, book = known_traffic(plan, files=True), book_of(options.fit, [plan.spec])
    if sweep or options.best:
        from planc.schedule import Sweep

        made = Sweep(plan, traffic, book)
        return (
            _best(made, plan, bounds, options.json) if options.best else _swept(made, sweep or {}, options, bounds[0])
        )
    slow = _read_slow(plan, options.slow)
    found = predict(plan, book=book, traffic=traffic, slow=slow)
    straggler = None
    if slow is not None:
        planned = predict(plan, book=book, traffic=traffic)
        moved = predict(plan, book=book, traffic=traffic, slow=slow, by_speed=True)
        straggler = straggler_record(planned, found, moved)
    if options.json:
        more = {"straggler": straggler} if straggler else {}
        print_json(estimate_record(found) | more | ({"critical_path": path_records(found.own)} if options.path else {}))
        return 0
    parts = [estimate_text(found), *([straggler_text(straggler)] if straggler else [])]
    write_text("\n".join([*parts, *([path_text(found.own)] if options.path else [])]), None)
    return 0


def book_of(files: Sequence[str], specs: Sequence[Spec]) -> PriceBook:
    """Prices from the fits in ``files``. Raises PlancError PLN408 for a fit of a GPU that no spec has."""
    from planc.cost.book import PriceBook
    from planc.cost.fits import load_fit

    names = dict.fromkeys(group.gpu.name for spec in specs for group in spec.cluster.groups)
    fits = {}
    for file in files:
        fit = load_fit(file)
        if fit.gpu not in names:
            message = f"`{file}` is a fit of {fit.gpu}; the plan's GPUs are {', '.join(names)}"
            hint = "measure those (docs/gpu.md); a fit says nothing of another GPU"
            raise PlancError([Diagnostic("PLN408", message, "--fit", Span(file, 1, 1), hint)])
        fits[fit.gpu] = fit
    return PriceBook(fits)


def _refuse_unused(options: argparse.Namespace) -> None:
    """Refuse options that would be left aside without a word."""
    faults = [
        (options.plot and not options.sweep, "--plot", "a plot needs a sweep", "add --sweep batch=64..4096"),
        (
            options.best and options.sweep,
            "--sweep",
            "--best looks at every batch itself",
            "leave --best or --sweep out",
        ),
        (
            options.slow and (options.best or options.sweep),
            "--slow",
            "--best and --sweep predict the plan without stragglers",
            "leave --slow out, or predict one batch at a time with --set workload.batch=…",
        ),
        (
            options.tpot and not (options.best or options.plot),
            "--tpot",
            "a bound of TPOT is for --best, or a line in a --plot",
            "add --best",
        ),
        (options.ttft and not options.best, "--ttft", "a bound of TTFT is for --best", "add --best"),
    ]
    found = [Diagnostic("PLN406", text, name, Span(name, 1, 1), hint) for wrong, name, text, hint in faults if wrong]
    if found:
        raise PlancError(found)


def _swept(sweep: Sweep, asked: dict[str, list[int]], options: argparse.Namespace, bound: float | None) -> int:
    from planc.report.estimate import point_record, sweep_text

    (key, values), *_ = asked.items()
    _refuse_unplannable(sweep, key, values)
    if options.plot and key != "batch":
        message = f"a plot of TPS against TPOT is over batches, not over {key}"
        raise PlancError([Diagnostic("PLN406", message, "--plot", Span("--plot", 1, 1))])
    with planning("simulating") as progress:
        points = []
        for number, value in enumerate(values):
            points.append(sweep.at(**{key: value}))
            if progress:
                progress(number + 1, len(values))
    spec = sweep.plan.spec
    if options.plot:
        from planc.render import tps_tpot_svg

        drawn = tps_tpot_svg(points, bound_s=bound or spec.target.tpot, name=spec.name)
        write_text(drawn, options.plot)
    if options.json:
        print_json(
            {
                "name": spec.name,
                "gpus": sweep.plan.parallelism.world_size,
                "points": [point_record(p) for p in points],
            }
        )
    else:
        write_text(sweep_text(points), None)
    return 0


def _refuse_unplannable(sweep: Sweep, key: str, values: list[int]) -> None:
    """What a spec could not say is not simulated either: no memory holds the graph of a million micro-batches."""
    from planc.schedule.workload import changed
    from planc.spec import check_spec

    if key == "micro_batches" and values[-1] > MOST_MICRO_BATCHES:
        message = f"{values[-1]:,} micro-batches; planc plans up to {MOST_MICRO_BATCHES}"
        raise PlancError([Diagnostic("PLN406", message, "--sweep", Span("--sweep", 1, 1))])
    faults = check_spec(changed(sweep.plan.spec, **{key: values[-1]}))
    if faults:
        raise PlancError(faults)


def _best(sweep: Sweep, plan: VerifiedPlan, given: tuple[float | None, float | None], as_json: bool) -> int:
    from planc.report.estimate import best_record, best_text, bounds_text
    from planc.units import format_seconds

    target = plan.spec.target
    tpot, ttft = given[0] or target.tpot, given[1] or target.ttft
    with planning("simulating steps") as progress:
        best = sweep.best_batch(tpot, ttft, progress)
    if best.point is None:
        near = best.nearest
        message = f"no batch keeps {bounds_text(tpot, ttft)}"
        related: tuple[str, ...] = ()
        if near is not None:
            reached = "–" if near.ttft is None else format_seconds(near.ttft)
            related = (
                f"nearest: batch {near.batch:,} with TPOT {format_seconds(near.tpot)} "
                f"(floor {format_seconds(near.floor)}), TTFT {reached}",
            )
        hint = "raise the bound, shorten isl, or spread the model over more GPUs"
        option = next((name for name, value in zip(("--tpot", "--ttft"), given, strict=True) if value), None)
        path, span = (option, Span(option, 1, 1)) if option else ("target", plan.spec.span("target"))
        raise PlancError([Diagnostic("PLN407", message, path, span, hint, related)])
    if as_json:
        print_json({"name": plan.spec.name} | best_record(best, tpot, ttft))
    else:
        write_text(best_text(best, tpot, ttft), None)
    return 0


def read_bound(option: str, text: str | None) -> float | None:
    """Seconds from ``20ms``."""
    from planc.units import parse_quantity

    if text is None:
        return None
    try:
        value = float(parse_quantity(text, "seconds"))
    except OverflowError:
        value = -1.0
    except ValueError as error:
        raise PlancError([Diagnostic("PLN406", str(error), option, Span(option, 1, 1))]) from None
    if not 0 < value < 1e9:
        raise PlancError([Diagnostic("PLN406", f"`{text[:40]}` is not a bound above 0", option, Span(option, 1, 1))])
    return value


def _read_sweep(text: str) -> dict[str, list[int]]:
    """``batch=64,128``, ``batch=64..4096`` (doubling) or ``batch=64..1024:64`` (in steps)."""
    key, _, values = text.partition("=")
    found: list[int] = []
    if key in SWEPT:
        for part in values.split(","):
            match = re.fullmatch(r"\s*([0-9]{1,8})(?:\.\.([0-9]{1,8})(?::([0-9]{1,8}))?)?\s*", part)
            if match is None:
                found = []
                break
            first, last, step = (int(g) if g else None for g in match.groups())
            assert first is not None
            value = first
            while value <= (last if last is not None else first) and len(found) <= MOST_POINTS:
                found.append(value)
                value = value + step if step else value * 2 if last is not None and value else value + 1
    if not found or 0 in found or len(found) > MOST_POINTS:
        message = f"`{text[:60]}` is not a sweep of at most {MOST_POINTS:,} values of at least 1"
        hint = f"write KEY=64,128,256, KEY=64..4096 (doubling) or KEY=64..1024:64 (in steps); KEY is {', '.join(SWEPT)}"
        raise PlancError([Diagnostic("PLN406", message, "--sweep", Span("--sweep", 1, 1), hint)])
    return {key: sorted(set(found))}


def _read_slow(plan: VerifiedPlan, texts: list[str]) -> Slow | None:
    """``17=1.5`` (a GPU's compute), or the name of a link with its factor: ``nic_up node 0 rail 3=2``."""
    from planc.schedule import Slow
    from planc.topology import topology

    gpus: dict[int, float] = {}
    links: dict[int, float] = {}
    names = topology(plan.spec.cluster).names if any(not t.partition("=")[0].strip().isdigit() for t in texts) else ()
    for text in texts:
        what, _, factor = text.rpartition("=")
        what = " ".join(what.split())
        good = re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,6})?", factor.strip()) and float(factor) >= 1
        if good and re.fullmatch("[0-9]{1,7}", what) and int(what) < plan.parallelism.world_size:
            gpus[int(what)] = float(factor)
        elif good and what in names:
            links[names.index(what)] = float(factor)
        else:
            message = f"`{text[:60]}` has no factor of at least 1 that says how many times slower"
            hint = "write RANK=1.5, such as 17=1.5, or LINK=2, such as `nic_up node 0 rail 3=2`"
            if good and what.isdigit():
                message = f"there is no GPU {what[:20]} in this plan"
                hint = f"ranks are 0 to {plan.parallelism.world_size - 1}"
            elif good:
                message = f"this plan's cluster has no link `{what[:40]}`"
                hint = "`planc show --topology` names the busiest of each kind, such as `nic_up node 0 rail 3`"
            raise PlancError([Diagnostic("PLN406", message, "--slow", Span("--slow", 1, 1), hint)])
    if gpus or links:
        say("slower than planned: " + ", ".join(texts))
        return Slow(gpus, links)
    return None
