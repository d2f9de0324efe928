"""What the validator says in the words of a library, said as what to write in a spec instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

__all__ = ["TAGS", "section_expected", "size_expected"]

TAGS = ("name", "kind", "attack")
"""The keys that tell which of several sections one is."""

_SOURCES = ("run", "folder", "file", "function")
"""The keys that say where a model is taken from."""

_MOST_CHARACTERS = 60
_LISTED = 5


def section_expected(given: Any, members: Sequence[type[BaseModel]]) -> str:
    """What to write where `given` stands and one of the sections `members` belongs."""
    if examples := _examples(given, members):
        return f"needs a section: write {' or '.join(f'`{example}`' for example in examples)}"
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


def _examples(given: Any, members: Sequence[type[BaseModel]]) -> list[str]:
    """Sections that hold `given` and are what its author may have meant, the likeliest first.

    Of several they are all shown only where they say where something is taken from: any name can be that of a run.
    """
    sections = list(_sections_with(given, members))
    if sections and sections[0].keys() <= set(_SOURCES):
        found = _source_of(given)
        sections.sort(key=lambda section: found not in section)
    else:
        sections = sections[:1]
    return [text for section in sections for text in _flow(section)]


def _source_of(given: Any) -> str | None:
    """The key of something that has this form, or is on this machine under this name."""
    if not isinstance(given, str):
        return None
    if re.fullmatch(r"[\w.]+:\w+", given):
        return "function"
    place = os.path.expanduser(given)
    return "folder" if os.path.isdir(place) else "file" if os.path.isfile(place) else None


def _sections_with(given: Any, members: Sequence[type[BaseModel]]) -> Iterator[dict[str, Any]]:
    """Sections that are tagged with `given`, or valid with it alone."""
    if given is None:
        return
    for member in members:
        for key in TAGS:
            field = member.model_fields.get(key)
            if field and get_origin(field.annotation) is Literal and given in get_args(field.annotation):
                yield {key: given}
    if len(members) != 1:
        return
    for value in (given,) if isinstance(given, list) else (given, [given]):
        for key in members[0].model_fields:
            try:
                members[0].model_validate({key: value})
            except ValidationError:
                continue
            yield {key: value}


def _flow(value: Any) -> Iterator[str]:
    """The value on one line of YAML, unless it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    if len(text) <= _MOST_CHARACTERS:
        yield text
