"""The type of a field of a spec that holds one of the sections of a registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import Field

from poise.spec.base import SpecModel

__all__ = ["union_of"]


def union_of(registry: Mapping[str, type[SpecModel]]) -> Any:
    """The annotation of a field that holds a section of one of these classes; the key `name` of the section decides.

    `registry`: the classes by that name. Each class has the field `name: Literal[...]` with its own.
    """
    classes = tuple(registry.values())
    if len(classes) == 1:  # pydantic refuses a discriminator where there is nothing to distinguish
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="name")]  # noqa: UP007 - made at run time
