"""Fit files: the fitted constants of one GPU with their source, range and error (`specs/fits/*.yaml`).

A fit belongs to the GPU that it names and to no other. A family that was not measured is listed under ``absent`` and
priced from the GPU's spec, marked so; a family that is neither fitted nor absent is a fault.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from planc.cost import constants as c
from planc.diagnostics import Diagnostic, PlancError, Span
from planc.spec.fields import Name, Strict
from planc.spec.presets import read_tree, shipped_folder
from planc.spec.text import Located, Path_
from planc.spec.validate import validate

Constants = TypeVar("Constants")

_Bound = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)]
Pair = Annotated[tuple[_Factor, _Factor], Field(strict=False)]


class Interval(Strict):
    """The middle 90 % of measured ÷ predicted: within the fitted range of sizes, and outside it. ``rough`` stands
    for ``inside`` where measured times scatter more (`planc.cost.ops.rough`)."""

    inside: Pair
    outside: Pair
    rough: Pair | None = None


class Fit(Strict, Generic[Constants]):
    """One family: its constants, and what they rest on."""

    source: Annotated[str, Field(min_length=1, max_length=1000)]
    dtype: Annotated[str, Field(max_length=40)] = ""  #: dtypes measured, as words
    rows: Annotated[int, Field(ge=1, le=10**7)]
    fill: Literal["packed", "spread"] = "spread"  #: how the skewed loads were rounded (`planc.cost.loads`)
    derived: bool = False  #: measured on another GPU, whose chip is the same (`FitFile.like`)
    valid: dict[str, Annotated[tuple[_Bound, _Bound], Field(strict=False)]]
    interval: Interval
    constants: Constants

    def __reduce__(self) -> tuple[Any, ...]:
        # fits go to worker processes, and `Fit[Gemm]` is no name that pickle could look up
        return _empty, (type(self.constants),), self.__getstate__()


def _empty(constants: type) -> Any:
    made: Any = Fit.__class_getitem__(constants)
    return made.__new__(made)


class FitFile(Strict):
    """All families of one GPU."""

    gpu: Name
    source: Annotated[str, Field(max_length=1000)] = ""
    sms: Annotated[int, Field(ge=1, le=10_000)]
    absent: Annotated[tuple[str, ...], Field(strict=False)] = ()
    like: Annotated[str, Field(max_length=100)] = ""  #: a GPU with the same chip, whose fit prices absent compute ops
    gemm: Fit[c.Gemm] | None = None
    expert_gemm_balanced: Fit[c.ExpertGemm] | None = None
    expert_gemm_skewed: Fit[c.ExpertGemm] | None = None
    expert_gemm_fp8_balanced: Fit[c.ExpertGemm] | None = None
    expert_gemm_fp8_skewed: Fit[c.ExpertGemm] | None = None
    attention_decode: Fit[c.AttentionDecode] | None = None
    mla_decode: Fit[c.MlaDecode] | None = None
    all_reduce: Fit[c.Nccl] | None = None
    all_gather: Fit[c.Nccl] | None = None
    reduce_scatter: Fit[c.Nccl] | None = None
    all_to_all: Fit[c.Nccl] | None = None
    all_reduce_custom: Fit[c.CustomAllReduce] | None = None
    dispatch_low_latency: Fit[c.LowLatency] | None = None
    combine_low_latency: Fit[c.LowLatency] | None = None
    dispatch_normal: Fit[c.Normal] | None = None
    combine_normal: Fit[c.Normal] | None = None


#: the families of a fit file
FAMILIES = tuple(name for name in FitFile.model_fields if name not in ("gpu", "source", "sms", "absent", "like"))
#: those that the chip alone decides, and no link
COMPUTE = tuple(name for name in FAMILIES if name.startswith(("gemm", "expert_gemm", "attention", "mla")))


def fit_names() -> list[str]:
    """GPUs for which a fit ships."""
    return sorted(path.stem for path in (shipped_folder("specs") / "fits").glob("*.yaml"))


def load_fit(path: str | os.PathLike[str]) -> FitFile:
    """Read one fit file, or a shipped fit by the name of its GPU. Raises PlancError with every fault found."""
    name = os.fspath(path)
    shipped = shipped_folder("specs") / "fits" / f"{name}.yaml"
    name = os.fspath(shipped) if len(Path(name).parts) == 1 and shipped.is_file() else name
    located = read_tree(name, None)
    fit = typing.cast(FitFile, validate(FitFile, located, name))
    faults = list(_faults(fit, located, name))
    if faults:
        raise PlancError(faults)
    return _with_chip(fit) if fit.like else fit


def _with_chip(fit: FitFile) -> FitFile:
    """The fit with the compute families of the GPU that has the same chip, marked derived, where it has none itself."""
    other = load_fit(fit.like)
    parts = {name: getattr(other, name) for name in COMPUTE if getattr(fit, name) is None}
    taken = {name: part.model_copy(update={"derived": True}) for name, part in parts.items() if part is not None}
    return fit.model_copy(update=taken | {"absent": tuple(name for name in fit.absent if name not in taken)})


def _faults(fit: FitFile, located: Located, file: str) -> Iterator[Diagnostic]:
    def at(*path: str | int) -> Span:
        found: Path_ = path
        while found and found not in located.places:
            found = found[:-1]
        return located.places.get(found, Span(file, 1, 1))

    if fit.like and (fit.like not in fit_names() or fit.like == fit.gpu):
        hint = f"there are fits of {', '.join(fit_names())}"
        yield Diagnostic("PLN401", f"`{fit.like[:40]}` is no other GPU with a fit", "like", at("like"), hint)
    for name in fit.absent:
        if name not in FAMILIES:
            yield Diagnostic("PLN401", f"`{name[:40]}` in `absent` is not a family", "absent", at("absent"))
        elif getattr(fit, name) is not None:
            yield Diagnostic("PLN401", f"`{name}` is fitted and listed as absent", "absent", at("absent"))
    for name in FAMILIES:
        part = getattr(fit, name)
        if part is None:
            if name not in fit.absent:
                hint = "fit it, or list it under `absent` to have it priced from the GPU's spec"
                yield Diagnostic("PLN401", f"the family `{name}` is missing", name, Span(file, 1, 1), hint)
            continue
        for size, (low, high) in part.valid.items():
            if low > high:
                message = f"the range of `{size}` runs from {low:g} down to {high:g}"
                yield Diagnostic("PLN402", message, f"{name}.valid.{size}", at(name, "valid", size))
        yield from _interval_faults(name, part.interval, at(name, "interval"))


def _interval_faults(name: str, interval: Interval, span: Span) -> Iterator[Diagnostic]:
    lower, higher = interval.outside
    for word, (low, high) in (("inside", interval.inside), ("rough", interval.rough or interval.inside)):
        if not lower <= low <= 1.0 <= high <= higher:
            message = f"intervals must widen around 1: outside {lower:g} ≤ {word} {low:g} ≤ 1 ≤ {high:g} ≤ {higher:g}"
            yield Diagnostic("PLN402", message, f"{name}.interval", span)
