"""Sections of a spec that stand for a method: of a registry of Poise, of an installed package, or of the user's code.

The key `name` chooses the class of such a section; the other keys are its options. A name of the form
`package.module:Class` is code of the user. Where that is not allowed to run, its options are kept as they are written:
such a spec can be checked, and is refused before it is run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import new_class
from typing import Annotated, Any, Union, get_args

from pydantic import (
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError, SchemaValidator, core_schema

from poise import plugins
from poise.errors import UserError
from poise.spec.base import SpecModel, field_error
from poise.spec.inputs import Input
from poise.user_code import is_code_allowed, load_attribute

__all__ = ["MethodSection", "is_unchecked", "resolve", "resolved_class", "union_of"]


class MethodSection(SpecModel):
    """Base of the sections that stand for a method. A class of methods, such as `Objective`, is a subclass.

    A method of Poise narrows `name` to the literal of its own name. A method of the user's code leaves it as it is, or
    writes `name: str` if it is a subclass of a method of Poise: its name is the reference by which a spec has found it.
    Where an object is made without a name, as in a notebook, it is that of the class.
    """

    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _class_name(cls, values: Any) -> Any:
        field = cls.model_fields["name"]
        has_default = not field.is_required() and field.default
        if field.annotation is str and not has_default and isinstance(values, dict):
            return {"name": cls.__name__, **values}
        return values

    def inputs(self) -> Iterator[Input]:
        """The code, where the method is code of the user or of an installed package."""
        if ":" in self.name:
            yield Input(("name",), "code", self.name)
        elif group := plugins.group_of(self.name, type(self)):
            modules = plugins.modules(group, self.name)
            yield Input(("name",), "plugin", plugins.reference(group, self.name), modules=modules)
        yield from super().inputs()


def resolve(
    name: str, registry: Mapping[str, type[MethodSection]], base: type[MethodSection], group: str
) -> type[MethodSection]:
    """The class of a section by its name: of `registry`, of a package that registers it in `group`, or of user's code.

    Of code of the user that is not allowed to run, a class that accepts any options.

    Raises:
        KeyError: there is no such name.
        UserError: the class cannot be imported, or is no subclass of `base`.
    """
    if name in registry:
        return registry[name]
    if ":" not in name:
        section_class = plugins.load(group, name)
    elif is_code_allowed():
        section_class = load_attribute(name, "name")
    else:
        return _unchecked_class(base)
    if not (isinstance(section_class, type) and issubclass(section_class, base)):
        raise UserError(f"{name} is not a subclass of {base.__module__}.{base.__name__}")
    if missing := sorted(getattr(section_class, "__abstractmethods__", ())):
        raise UserError(f"{name} does not define {', '.join(missing)}, which {base.__name__} leaves to it")
    for attribute, member in inspect.getmembers_static(base):
        if isinstance(member, property) and inspect.isfunction(inspect.getattr_static(section_class, attribute)):
            raise UserError(f"{name}.{attribute} is a method and has to be a property: write @property above it")
    annotation = section_class.model_fields["name"].annotation
    if annotation is not str and name not in get_args(annotation):
        raise UserError(f"{name} inherits the name of another method: write `name: str` in the class")
    return section_class


def is_unchecked(section: MethodSection) -> bool:
    """Whether it stands for code of the user that is not allowed to run: its options are not validated."""
    return isinstance(section, _Unchecked)


def union_of(registry: Mapping[str, type[MethodSection]], base: type[MethodSection], group: str) -> Any:
    """The annotation of a field that holds a section of a registry, of an installed package or of the user's code.

    Args:
        registry: the classes of Poise by name. Each has the field `name: Literal[...]` with its own.
        base: the class that all of them are subclasses of.
        group: the group of entry points by which installed packages register further ones.
    """
    classes = tuple(registry.values())
    resolved = _Resolved(registry, base, group)
    if len(classes) == 1:  # pydantic refuses a discriminator where there is nothing to distinguish
        return Annotated[classes[0], resolved]
    return Annotated[Union[classes], Field(discriminator="name"), resolved]  # noqa: UP007 - made at run time


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
"""A name of the form `package.module.Class`."""

_RESOLVED: dict[str, type[MethodSection]] = {}


def resolved_class(name: str) -> type[MethodSection] | None:
    """The class of an installed package or of the user's code that a spec has named before; None for other names."""
    return _RESOLVED.get(name)


class _Resolved:
    """Makes a field accept, beside the classes of a registry, those that `resolve` finds for other names."""

    def __init__(self, registry: Mapping[str, type[MethodSection]], base: type[MethodSection], group: str) -> None:
        self._registry = registry
        self._base = base
        self._group = group

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            self._validate,
            handler(source),
            serialization=core_schema.wrap_serializer_function_ser_schema(_serialize, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        names = [{"const": name} for name in plugins.names(self._group)]
        name_schema = {"anyOf": [*names, {"type": "string", "pattern": r"^[\w.]+:\w+$"}]}
        other = {
            "type": "object",
            "description": "a method of an installed package, or package.module:Class of your code",
            "properties": {"name": name_schema},
            "required": ["name"],
        }
        return {"anyOf": [handler(schema), other]}

    def _validate(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """The section of a value, validated by the class that its name stands for."""
        name = value.get("name") if isinstance(value, dict) else None
        if isinstance(value, self._base) or not isinstance(name, str) or name in self._registry:
            return value if isinstance(value, self._base) else handler(value)
        try:
            section_class = resolve(name, self._registry, self._base, self._group)
        except KeyError:
            raise self._unknown(name) from None
        except UserError as error:
            raise field_error("name", str(error).removeprefix("name: ")) from None
        _RESOLVED[name] = section_class
        # A union of one class, so that its errors are reported as those of the members of the registry are.
        union = core_schema.tagged_union_schema({name: section_class.__pydantic_core_schema__}, discriminator="name")
        return SchemaValidator(union).validate_python(value)

    def _unknown(self, name: str) -> PydanticKnownError | PydanticCustomError:
        names = (*self._registry, *plugins.names(self._group))
        if _DOTTED.fullmatch(name) and not get_close_matches(name, names):
            module, _, attribute = name.rpartition(".")
            hint = f"code of yours is named with a colon, as '{module}:{attribute}'"
            return field_error("name", f"{name!r} is not valid; {hint}")
        expected = ", ".join(f"'{each}'" for each in names)
        context = {"discriminator": "'name'", "tag": name, "expected_tags": expected}
        return PydanticKnownError("union_tag_invalid", context)


def _serialize(value: Any, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
    """A section as its own class dumps it: to `handler`, a class outside of the registry is unknown."""
    if not isinstance(value, MethodSection):
        return handler(value)
    return value.model_dump(
        mode=info.mode,
        exclude_unset=info.exclude_unset,
        exclude_defaults=info.exclude_defaults,
        exclude_none=info.exclude_none,
    )


class _Unchecked:
    """Marks the classes that `_unchecked_class` makes."""


@cache
def _unchecked_class(base: type[MethodSection]) -> type[MethodSection]:
    """A subclass of `base` that accepts any options. A spec that has one is never run."""

    def refuse(self: Any, *arguments: Any, **options: Any) -> Any:
        raise UserError(f"{self.name} is code of yours, which is not allowed to run: add --allow-code")

    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": "A method of the user's code with its options as they are written.",
        "model_config": ConfigDict(extra="allow"),
    }
    if hasattr(base, "training_metrics"):  # which of them there are is known when the code may run
        body["training_metrics"] = property(lambda self: ("*",))
    for name in base.__abstractmethods__:
        body[name] = property(refuse) if isinstance(getattr(base, name), property) else refuse
    return new_class(
        f"Unchecked{base.__name__}", (_Unchecked, base), exec_body=lambda namespace: namespace.update(body)
    )
