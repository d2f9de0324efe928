"""What the validator says in the words of a library, said as what to write in a spec instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

__all__ = ["TAGS", "section_expected", "size_expected"]

TAGS = ("name", "kind", "attack")
"""The keys that tell which of several sections one is."""

_MOST_CHARACTERS = 60
_LISTED = 5


def section_expected(given: Any, members: Sequence[type[BaseModel]]) -> str:
    """What to write where `given` stands and one of the sections `members` belongs."""
    if example := next(_examples(given, members), None):
        return f"needs a section: write `{example}`"
    if len(members) == 1:
        keys = list(members[0].model_fields)
        more = ", ..." if len(keys) > _LISTED else ""
        return f"needs a section with keys of {', '.join(keys[:_LISTED])}{more}"
    return "needs a section" + ("" if members else " of keys and values")


def size_expected(kind: str, context: Mapping[str, Any]) -> str:
    """What is said of a list, a mapping or a text that is too short or too long."""
    least, most = context.get("min_length"), context.get("max_length")
    if kind == "too_short":
        return f"needs at least {_many(least, 'entry', 'entries')} and has {context.get('actual_length') or 'none'}"
    if kind == "too_long":
        return f"may have at most {_many(most, 'entry', 'entries')}"
    if kind == "string_too_short":
        return "must not be empty" if least == 1 else f"needs at least {least} characters"
    return f"may have at most {_many(most, 'character', 'characters')}"


def _many(count: Any, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _examples(given: Any, members: Sequence[type[BaseModel]]) -> Iterator[str]:
    """Sections that hold `given` and are what its author may have meant: tagged with it, or valid with it alone."""
    if given is None:
        return
    for member in members:
        for key in TAGS:
            field = member.model_fields.get(key)
            if field and get_origin(field.annotation) is Literal and given in get_args(field.annotation):
                yield from _flow({key: given})
    if len(members) != 1:
        return
    for value in (given,) if isinstance(given, list) else (given, [given]):
        for key in members[0].model_fields:
            try:
                members[0].model_validate({key: value})
            except ValidationError:
                continue
            yield from _flow({key: value})


def _flow(value: Any) -> Iterator[str]:
    """The value on one line of YAML, unless it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    if len(text) <= _MOST_CHARACTERS:
        yield text
