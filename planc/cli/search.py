"""`planc search`: the best plan for a model, a cluster and bounds."""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import TYPE_CHECKING, Any

from planc.cli.estimate import book_of, read_bound
from planc.cli.output import cores, planning, print_json, say, write_text
from planc.diagnostics import Diagnostic, PlancError, Span

if TYPE_CHECKING:
    from planc.search.answer import Question, Record
    from planc.spec import Spec


def search(options: argparse.Namespace) -> int:
    """Search the declared space and print, draw, write or build what was found."""
    from planc.report.search import search_text
    from planc.search.answer import answer
    from planc.search.workers import evaluating
    from planc.spec import check_spec, load_spec

    spec = load_spec(options.spec, options.set)
    faults = check_spec(spec)
    if faults:
        raise PlancError(faults)
    question = read_question(spec, options)
    if options.build == "":
        raise _bad("--build", "an empty name is no folder")
    known = read_record(options.resume) if options.resume is not None else None
    book = book_of(options.fit, [spec])
    if spec.traffic is not None:
        say(
            "candidates are compared under even routing; `planc build` places the winner's experts for the spec's traffic"
        )
    if spec.policy == "given":
        say("candidates have their experts placed in order: the map of the spec fits one shape")
    workers = options.workers or cores()
    with (
        planning("simulating candidates") as progress,
        evaluating(
            spec, workers=workers, dask=options.dask, fits=options.fit, ttft=question.goal.ttft is not None, say=say
        ) as evaluate,
    ):
        record = answer(spec, question, evaluate, book=book, known=known, progress=progress)
    if options.output is not None:
        write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", options.output)
    _draw(record, options)
    if options.build is not None:
        _build(record, options.build)
    if options.json:
        print_json({key: value for key, value in record.items() if key not in ("spec", "sources", "simulations")})
    else:
        write_text(search_text(record, options.gpu_hour), None)
    return 0


def _draw(record: Record, options: argparse.Namespace) -> None:
    if options.plot is not None:
        from planc.render import search_svg

        write_text(search_svg(record), options.plot)
    if options.html is not None:
        from planc.render import search_html

        write_text(search_html(record), options.html)


def _build(record: Record, folder: str) -> None:
    """The winner as a normal plan."""
    from planc import pipeline
    from planc.search.answer import winner_spec

    plan = pipeline.compile(winner_spec(record))
    files = pipeline.write(plan, folder, list(pipeline.FIGURES))
    say(f"wrote the winner's plan, {len(files)} files, to {folder}")


def read_record(path: str) -> Record:
    """A result of `planc search`. Raises PlancError PLN438 for what is none."""
    from planc.report.search_file import SCHEMA, check_record

    try:
        with open(path, encoding="utf-8") as handle:
            record = json.load(handle)
    except OSError as error:
        raise PlancError(
            [Diagnostic("PLN001", f"cannot read {path}: {error.strerror}", span=Span(path, 1, 1))]
        ) from None
    except (ValueError, RecursionError) as error:
        raise PlancError([Diagnostic("PLN438", f"{path} is no JSON: {error}", span=Span(path, 1, 1))]) from None
    faults = check_record(record)
    if faults:
        hint = f"`planc search SPEC -o FILE.json` writes one (schema {SCHEMA}; `planc schema search`)"
        raise PlancError(
            [Diagnostic("PLN438", f"{path} is no result of a search: {faults[0]}", span=Span(path, 1, 1), hint=hint)]
        )
    return dict(record)


# --- options ----------------------------------------------------------------------------------------------------------


def read_question(spec: Spec, options: argparse.Namespace) -> Question:
    """The goal and the space that options ask for. Raises PlancError: PLN406 for what cannot be read, PLN435 for what
    contradicts itself."""
    from planc.search.answer import Question
    from planc.search.explore import Goal

    target = spec.target
    goal = Goal(
        options.objective,
        read_bound("--tpot", options.tpot) or target.tpot,
        read_bound("--ttft", options.ttft) or target.ttft,
        _read_rate("--tps", options.tps) or (target.tps if options.objective == "gpus" else None),
        options.one_expert_per_gpu or None,
    )
    asked: dict[str, tuple[Any, ...]] = {}
    for key, values in map(_read_axis, options.over):
        if key in asked:
            raise _contradiction("--over", f"the values of {key} are given twice", f"write all of them once: {key}=A,B")
        asked[key] = values
    if options.gpus is not None:
        if "gpus" in asked:
            raise _contradiction("--gpus", "the GPUs are given twice: by --gpus and by --over gpus", "leave one out")
        asked["gpus"] = _read_gpus(spec, options.gpus)
    for count in asked.get("gpus", ()):
        if count > spec.cluster.gpus:
            message = f"{count:,} GPUs are asked for; the cluster has {spec.cluster.gpus:,}"
            raise _contradiction("--gpus", message, "give the spec a larger cluster: --set cluster=NAME-NODESx8")
    if goal.objective == "gpus" and goal.tps is None:
        message = "the fewest GPUs for what? a target of TPS is missing"
        raise _contradiction("--objective", message, "add --tps, or a `target.tps` to the spec")
    if options.one_expert_per_gpu and spec.model.moe is None:
        raise _contradiction("--one-expert-per-gpu", f"{spec.model.name} has no experts", "leave the option out")
    if options.one_expert_per_gpu and "none" in asked.get("scope", ()):
        message = "one expert per GPU is asked for, and a space without the rule"
        raise _contradiction("--over", message, "leave `--over scope=none` or --one-expert-per-gpu out")
    return Question(goal, asked, options.top, options.front, options.limit, options.sensitivity, options.pools)


def _contradiction(option: str, message: str, hint: str) -> PlancError:
    return PlancError([Diagnostic("PLN435", message, option, Span(option, 1, 1), hint)])


def _bad(option: str, message: str, hint: str = "") -> PlancError:
    return PlancError([Diagnostic("PLN406", message, option, Span(option, 1, 1), hint)])


def _read_rate(option: str, text: str | None) -> float | None:
    """Tokens per second: ``450k``, ``1.5M``, ``20000``."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kM]?)\s*", text)
    if match is None or not float(match[1]):
        raise _bad(option, f"`{text[:40]}` is not a number of tokens per second, such as 20000 or 450k")
    return float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6}[match[2]]


def _read_gpus(spec: Spec, text: str) -> tuple[int, ...]:
    """``128``, ``64,128``, ``<=128`` (or ≤) and ``16..128``: whole nodes, and parts of one where that is all there is."""
    node = spec.cluster.groups[0].gpus_per_node
    at_most = re.fullmatch(r"\s*(?:<=|≤)\s*([0-9]{1,7})\s*", text)
    between = re.fullmatch(r"\s*([0-9]{1,7})\s*\.\.\s*([0-9]{1,7})\s*", text)
    if at_most or between:
        low, high = (1, int(at_most[1])) if at_most else (int(between[1]), int(between[2]))  # type: ignore[index]
        if low > high:
            hint = f"write {high}..{low}" if high else "at least one"
            raise _contradiction("--gpus", f"from {low} to {high} GPUs there are none", hint)
        parts = [n for n in range(1, node) if node % n == 0]
        found = [n for n in (*parts, *range(node, min(high, spec.cluster.gpus) + 1, node)) if low <= n <= high]
        if not found:
            raise _bad("--gpus", f"no whole node of {node} GPUs, and no even part of one, is in `{text[:40]}`")
        return tuple(found)
    values = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,6}\s*", value) for value in values):
        raise _bad("--gpus", f"`{text[:40]}` is not a number of GPUs", "write 128, 64,128, <=128 or 16..128")
    return tuple(sorted({int(value) for value in values}))


def _read_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """``tp=1,2,4``, ``gating=leader`` or ``dtypes.dispatch=fp8,bf16``."""
    from planc.search.space import AXES
    from planc.spec.fields import DTYPE_BYTES
    from planc.spec.model import Dtypes

    key, _, values = text.partition("=")
    key, parts = key.strip(), [part.strip() for part in values.split(",")]
    dtypes = {f"dtypes.{role}": tuple(DTYPE_BYTES) for role in Dtypes.model_fields}
    words = dtypes.get(key) or AXES.get(key)
    if key not in AXES and key not in dtypes:
        raise _bad("--over", f"`{key[:40]}` is no axis of the space", f"axes: {', '.join((*AXES, *dtypes))}")
    if words is not None:
        wrong = [part for part in parts if part not in words]
        if wrong:
            raise _bad("--over", f"`{wrong[0][:40]}` is no value of {key}", f"values: {', '.join(words)}")
        return key, tuple(dict.fromkeys(parts))
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", part) for part in parts) or len(parts) > 1000:
        raise _bad("--over", f"`{text[:40]}` gives no whole numbers of at least 1 for {key}", f"write {key}=1,2,4")
    numbers = tuple(sorted({int(part) for part in parts}))
    if key == "batch" and numbers[-1] > 10**8:
        raise _bad("--over", f"a batch of {numbers[-1]:,}; planc plans up to 100,000,000")
    if key == "micro_batches" and numbers[-1] > 64:
        raise _bad("--over", f"{numbers[-1]:,} micro-batches; planc plans up to 64")
    return key, numbers


def is_record(name: str) -> bool:
    """Whether a file is a result of a search rather than a plan: `FILE.json`, or `FILE.json#2` for the second best."""
    path = name.partition("#")[0]
    if not path.endswith(".json") or not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as handle:
        return '"planc.search/' in handle.read(200)
