"""Write the key tables of docs/specs.md from the classes that read a spec: `python docs/generate.py`.

A table stands between `<!-- keys: module.Class -->` and `<!-- end -->`; everything else in the file is prose and stays.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from poise.spec import ExactNumber, RunSpec

PAGE = Path(__file__).with_name("specs.md")

_BLOCK = re.compile(r"(<!-- keys: ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PLAIN = {ExactNumber: "number", int: "integer", str: "text", bool: "true, false", Any: "value"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": None, "max_length": None}


def regenerated(text: str) -> str:
    """The page with every table written anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_table(_section(found[2]))}{found[3]}", text)


def listed(text: str) -> set[type[BaseModel]]:
    """The classes that the page has a table of."""
    return {_section(found[2]) for found in _BLOCK.finditer(text)}


def sections(root: type[BaseModel]) -> set[type[BaseModel]]:
    """`root` and every section that can stand inside it."""
    found, waiting = set[type[BaseModel]](), [root]
    while waiting:
        section = waiting.pop()
        if section not in found:
            found.add(section)
            waiting += [inner for field in section.model_fields.values() for inner in _models(field.annotation)]
    return found


def _section(path: str) -> type[BaseModel]:
    module, _, name = path.rpartition(".")
    section: type[BaseModel] = getattr(import_module(module), name)
    return section


def _table(section: type[BaseModel]) -> str:
    head = RunSpec.model_fields if section is not RunSpec and issubclass(section, RunSpec) else ()
    rows = [
        f"| `{name}` | {_values(field)} | {_default(field)} | {field.description} |"
        for name, field in section.model_fields.items()
        if field.description and name not in head  # a bare tag says nothing that its heading does not
    ]
    return "\n".join(["| key | values | default | meaning |", "|---|---|---|---|", *rows, ""])


def _values(field: FieldInfo) -> str:
    return " ".join(filter(None, [_type(field.annotation), _bounds(field.metadata)]))


def _type(annotation: Any) -> str:
    """How a person writes a value of this annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join(filter(None, [_type(arguments[0]), _bounds(arguments[1:])]))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not NoneType))
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return "section" if _models(annotation) else _PLAIN.get(annotation, "text")


def _bounds(metadata: Any) -> str:
    found = []
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            found.append(_bounds(constraint.metadata))
        found += [
            f"{words} {getattr(constraint, key)}"
            for key, words in _BOUNDS.items()
            if words and hasattr(constraint, key)
        ]
    return ", ".join(filter(None, found))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        said = {"name", *value.model_fields_set}
        value = {key: part for key, part in value.model_dump().items() if key in said}
        return f"`{_flow(value)}`" if value else "all defaults"
    return "" if value is None else f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """The value as YAML on one line, fractions as they are written."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, (str, ExactNumber)):
        return str(value)
    return yaml.safe_dump(value).splitlines()[0]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _models(argument)]


if __name__ == "__main__":
    PAGE.write_text(regenerated(PAGE.read_text()))
