"""The base class of every section of a spec: frozen, strict, without unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, LiteralString

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from poise.spec.inputs import Input

__all__ = ["FIELD_ERROR", "SpecModel", "field_error"]

FIELD_ERROR: LiteralString = "field_error"
"""The error type of `field_error` in the errors of pydantic."""


class SpecModel(BaseModel):
    """One section of a spec.

    Frozen, strict (the text `"3"` is not converted to 3), unknown keys refused. Each field has a one-line
    `description`. The unit of a field, if it has one, is in its name or description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    def inputs(self) -> Iterator[Input]:
        """The files, runs and code that this section and the sections inside it name.

        A section that names any yields each of them, and then `super().inputs()`.
        """
        for key, value in self:
            yield from _inputs_of(value, key)


def _inputs_of(value: Any, *path: str | int) -> Iterator[Input]:
    """The inputs of all sections in the value at `path`: a section, or a list or dict that may hold sections."""
    if isinstance(value, SpecModel):
        for item in value.inputs():
            yield item.below(*path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _inputs_of(inner, *path, key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _inputs_of(inner, *path, index)


def field_error(path: str, message: str) -> PydanticCustomError:
    """The error that a validator of a section raises for a problem at `path` (dotted) inside the section."""
    return PydanticCustomError(FIELD_ERROR, "{message}", {"message": message, "path": path})
