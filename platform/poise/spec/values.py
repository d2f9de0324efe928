"""Value types of specs: exact fractions, and names that are safe in a path."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

__all__ = ["CodeReference", "ExactNumber", "Name", "RunName"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_PATTERN = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CODE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class ExactNumber(float):
    """A finite float that keeps its spelling: `8/255` is read exactly and printed as `8/255`.

    `exact` is the rational number as written, `text` its spelling; the value is the float nearest to `exact`.
    """

    exact: Fraction
    text: str

    def __new__(cls, value: Any) -> ExactNumber:
        exact, text = _parse(value)
        self = super().__new__(cls, float(exact))
        self.exact = exact
        self.text = text
        return self

    def __reduce__(self) -> tuple[type[ExactNumber], tuple[str]]:
        return ExactNumber, (self.text,)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(_plain)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": rf"^{_NUMBER}(\s*/\s*{_NUMBER})?$"}]}


def _parse(value: Any) -> tuple[Fraction, str]:
    """The exact value of a number or a text, and its spelling; ValueError where it is none."""
    if isinstance(value, ExactNumber):
        return value.exact, value.text
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"expected a number or a fraction such as 8/255, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number, not nan or infinity")
    match = _PATTERN.fullmatch(str(value)) if len(str(value)) <= 60 else None
    if match is None:
        raise ValueError("expected a number or a fraction such as 8/255")
    numerator = Fraction(match[1])
    denominator = Fraction(match[2] or "1")
    if denominator == 0:
        raise ValueError("the fraction divides by zero")
    exact = numerator / denominator
    try:
        float(exact)
    except OverflowError:
        raise ValueError("the number is too large for a float") from None
    return exact, str(value).strip()


def _plain(value: ExactNumber) -> float | str:
    """The value for YAML and JSON: a fraction as text, any other number as a number."""
    return value.text if "/" in value.text else float(value)


def _safe_name(value: str) -> str:
    if not _SAFE_NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "a name is 1 to 100 letters, digits, '.', '_' or '-', starts with a letter or digit, and has no '..'"
        )
    return value


def _run_name(value: str) -> str:
    """The name itself. A reference `${stage}` that is still there was not replaced: the pipeline has no such stage."""
    if re.fullmatch(r"\$\{[^}]*\}", value):
        raise ValueError(f"{value} names no stage before this one")
    if "${" in value:
        raise ValueError("a run of another stage is named by ${stage} alone, with nothing before or behind it")
    return _safe_name(value)


def _code_reference(value: str) -> str:
    if not _CODE.fullmatch(value):
        raise ValueError("is not of the form package.module:attribute")
    return value


CodeReference = Annotated[str, AfterValidator(_code_reference)]
"""The name of an object in code of the user, as `package.module:attribute`."""

Name = Annotated[str, AfterValidator(_safe_name)]

RunName = Annotated[str, AfterValidator(_run_name)]
"""The name of another run of the same store whose outputs are read."""
