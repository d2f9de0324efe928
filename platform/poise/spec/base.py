"""The base of every section of a spec: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

from poise.spec.inputs import Input

__all__ = ["Section", "mistake"]


class Section(BaseModel):
    """One section of a spec.

    Frozen, strict (no silent `"3"` to 3), unknown keys refused. Each field carries a one-line `description`; where it
    has a unit, the name or the description says so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    def inputs(self) -> Iterator[Input]:
        """What is read besides the spec, by this section and by those inside it.

        A section that names files, runs or code yields each of them, and then `super().inputs()`.
        """
        for key, value in self:
            yield from _inputs_of(value, key)


def _inputs_of(value: Any, *path: str | int) -> Iterator[Input]:
    if isinstance(value, Section):
        for each in value.inputs():
            yield each.below(*path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _inputs_of(inner, *path, key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _inputs_of(inner, *path, index)


def mistake(path: str, message: str) -> PydanticCustomError:
    """What a validator of a whole section raises when the fault lies at `path` (dotted) inside it."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "path": path})
