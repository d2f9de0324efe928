"""The base of every section of a spec: frozen, strict, and closed to unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

__all__ = ["Section", "mistake"]


class Section(BaseModel):
    """One section of a spec.

    Frozen, strict (no silent `"3"` to 3), unknown keys refused. Each field carries a one-line `description`; where it
    has a unit, the name or the description says so.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


def mistake(path: str, message: str) -> PydanticCustomError:
    """What a validator of a whole section raises when the fault lies at `path` (dotted) inside it."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "path": path})
