"""The union of the specs of jobs, for the stages of a pipeline and the base of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from poise.kinds.registry import REGISTRY
from poise.spec import RunSpec

__all__ = ["Job"]

if TYPE_CHECKING:
    Job = RunSpec
else:
    Job = Union[tuple(kind.spec for kind in REGISTRY.values() if kind.is_job)]  # noqa: UP007 - made at run time
    """The union of the specs of all jobs; pydantic chooses the class by `kind`."""
