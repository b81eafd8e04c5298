"""Field types shared by the spec models: quantities with units, names, and bounded counts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from planc.units import EXAMPLES, parse_quantity

_NAME = re.compile(r"[^\x00-\x1f\x7f<>\"'`\\]{1,100}")


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _written(dimension: str) -> PlainSerializer:
    """In JSON a quantity is text in its base unit, so that what was written can be read back as a spec."""
    unit = {"bytes": "B", "bytes_per_s": "B/s", "flops": "FLOPS", "seconds": "s"}[dimension]
    return PlainSerializer(lambda v: f"{int(v) if v == int(v) else repr(v)} {unit}", return_type=str, when_used="json")


def _quantity(dimension: str, *, positive: bool = True) -> Any:
    def read(value: object) -> int | float:
        try:
            number = parse_quantity(value, dimension)
        except ValueError as error:
            raise PydanticCustomError("quantity", "{reason}", {"reason": str(error)}) from None
        if number < 0 or (positive and number == 0):
            bound = "positive" if positive else "zero or more"
            raise PydanticCustomError("range", "{value} must be {bound}", {"value": str(value), "bound": bound})
        if number > 1e24 or 0 < number < 1e-15:
            raise PydanticCustomError("range", "{value} is beyond any machine", {"value": str(value)[:40]})
        return float(number)

    schema = {"type": ["string", "number"], "examples": [EXAMPLES[dimension]]}
    return Annotated[float, BeforeValidator(read), _written(dimension), WithJsonSchema(schema)]


def _read_bytes(value: object) -> int:
    try:
        number = parse_quantity(value, "bytes")
    except ValueError as error:
        raise PydanticCustomError("quantity", "{reason}", {"reason": str(error)}) from None
    if number != int(number) or not 0 < number <= 1e18:
        raise PydanticCustomError(
            "range", "{value} is not a whole, sensible number of bytes", {"value": str(value)[:40]}
        )
    return int(number)


Bytes = Annotated[
    int, BeforeValidator(_read_bytes), _written("bytes"), WithJsonSchema({"type": "string", "examples": ["64 GB"]})
]
BytesPerSecond = _quantity("bytes_per_s")
Flops = _quantity("flops")
Seconds = _quantity("seconds", positive=False)
PositiveSeconds = _quantity("seconds")


def _read_fraction(value: object) -> float:
    try:
        number = parse_quantity(value, "fraction")
    except ValueError as error:
        raise PydanticCustomError("quantity", "{reason}", {"reason": str(error)}) from None
    if not 1e-6 <= number <= 1:
        raise PydanticCustomError("range", "{value} must be above 0 and at most 100 %", {"value": str(value)[:40]})
    return float(number)


Fraction = Annotated[
    float, BeforeValidator(_read_fraction), WithJsonSchema({"type": ["string", "number"], "examples": ["80 %", 0.8]})
]


def _read_name(value: object) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("wrong_type", "expected a name (text)")
    if not _NAME.fullmatch(value) or not value.isprintable() or value.strip() != value:
        raise PydanticCustomError(
            "name",
            "{value} is not a usable name: 1 to 100 printable characters on one line, without quotes, `\\`, `<` or `>`",
            {"value": repr(value[:40])},
        )
    return value


Name = Annotated[str, BeforeValidator(_read_name)]
Count = Annotated[int, Field(ge=1, le=10**7)]
Degree = Annotated[int, Field(ge=1, le=10**6)]
Dtype = Literal["bf16", "fp16", "fp8"]

#: bytes of one element
DTYPE_BYTES: dict[str, int] = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "int32": 4}


def parse_ranges(text: str, limit: int = 10**7) -> list[int]:
    """``"0-2,7"`` -> ``[0, 1, 2, 7]``. Raises ValueError for anything else, or for more than ``limit`` numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        if match is None:
            raise ValueError(f"`{part[:40]}` is not a number or a range such as `3-60`")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or len(numbers) + last - first >= limit:
            raise ValueError(f"`{part[:40]}` runs backwards or is too long")
        numbers.extend(range(first, last + 1))
    return numbers
