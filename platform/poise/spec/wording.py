"""Messages for errors of pydantic that say what to write in a spec instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

__all__ = ["TAGS", "section_expected", "size_expected"]

TAGS = ("name", "kind", "attack")
"""The keys that distinguish the members of a union of sections."""

_SOURCES = ("run", "folder", "file", "function")
"""The keys for the source of a model."""

_MAX_CHARACTERS = 60
_MAX_KEYS = 5


def section_expected(value: Any, members: Sequence[type[BaseModel]]) -> str:
    """The message for a value in the place of one of the sections `members`, with an example to write instead."""
    if examples := _examples(value, members):
        return f"needs a section: write {' or '.join(f'`{example}`' for example in examples)}"
    if len(members) == 1:
        keys = list(members[0].model_fields)
        more = ", ..." if len(keys) > _MAX_KEYS else ""
        return f"needs a section with keys of {', '.join(keys[:_MAX_KEYS])}{more}"
    return "needs a section" + ("" if members else " of keys and values")


def size_expected(kind: str, context: Mapping[str, Any]) -> str:
    """The message for a list, a mapping or a text that is too short or too long; `kind` is pydantic's error type."""
    least = context.get("min_length")
    most = context.get("max_length")
    if kind == "too_short":
        return f"needs at least {_count(least, 'entry', 'entries')} and has {context.get('actual_length') or 'none'}"
    if kind == "too_long":
        return f"may have at most {_count(most, 'entry', 'entries')}"
    if kind == "string_too_short":
        return "must not be empty" if least == 1 else f"needs at least {least} characters"
    return f"may have at most {_count(most, 'character', 'characters')}"


def _count(count: Any, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"


def _examples(value: Any, members: Sequence[type[BaseModel]]) -> list[str]:
    """Sections with `value` that the author may have meant, as YAML on one line, the likeliest first.

    Several are returned only for the source of a model, since a text can be the name of a run as well as a path.
    """
    sections = list(_sections_with(value, members))
    if sections and sections[0].keys() <= set(_SOURCES):
        source = _source_of(value)
        sections.sort(key=lambda section: source not in section)
    else:
        sections = sections[:1]
    lines = [_to_yaml_line(section) for section in sections]
    return [line for line in lines if len(line) <= _MAX_CHARACTERS]


def _source_of(value: Any) -> str | None:
    """The likeliest source that a text names: a function by its form, a folder or a file that exists, else None."""
    if not isinstance(value, str):
        return None
    if re.fullmatch(r"[\w.]+:\w+", value):
        return "function"
    path = os.path.expanduser(value)
    if os.path.isdir(path):
        return "folder"
    return "file" if os.path.isfile(path) else None


def _sections_with(value: Any, members: Sequence[type[BaseModel]]) -> Iterator[dict[str, Any]]:
    """Sections that have `value` as their tag, or that are valid with `value` or a list of it as their only key."""
    if value is None:
        return
    for member in members:
        for key in TAGS:
            field = member.model_fields.get(key)
            if field and get_origin(field.annotation) is Literal and value in get_args(field.annotation):
                yield {key: value}
    if len(members) != 1:
        return
    section = members[0]
    for candidate in (value,) if isinstance(value, list) else (value, [value]):
        for key in section.model_fields:
            try:
                section.model_validate({key: candidate})
            except ValidationError:
                continue
            yield {key: candidate}


def _to_yaml_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
