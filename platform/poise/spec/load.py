"""From a file and its overrides to a typed spec, or to every mistake at once."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from poise.secrets import find_secrets, redact
from poise.spec.problems import Path, Problem, SpecError, nearest
from poise.spec.reader import Document, read_file
from poise.spec.run import RunSpec
from poise.spec.wording import TAGS, section_expected, size_expected

__all__ = ["dump", "json_schema", "load", "load_document", "parse", "sha256"]

Kinds = Mapping[str, type[RunSpec]]

_SECRET = (
    "holds a secret, such as a password in a URL or a service's token. A spec is kept with its run and shown on its "
    "page: take the secret out, and set it in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def load(path: str | FilePath, kinds: Kinds, assignments: Sequence[str] = (), profile: str | None = None) -> RunSpec:
    """Read the spec at `path`, apply one of its `profiles`, then `a.b=value` assignments, and validate it.

    Raises UserError when the file cannot be read and SpecError with every mistake when it is not a valid spec.
    """
    return load_document(path, kinds, assignments, profile)[0]


def load_document(
    path: str | FilePath, kinds: Kinds, assignments: Sequence[str] = (), profile: str | None = None
) -> tuple[RunSpec, Document]:
    """As `load`; beside the spec the document, which knows the line of every part of it."""
    document = read_file(FilePath(path))
    document.take_profile(profile)
    written = copy.deepcopy(document)
    document.override(assignments)
    try:
        return parse(document, kinds), document
    except SpecError as error:
        raise SpecError([_blamed(problem, written, kinds, assignments) for problem in error.problems]) from None


def _blamed(problem: Problem, written: Document, kinds: Kinds, assignments: Sequence[str]) -> Problem:
    """The problem, with the assignment as its place where the file alone does not have it.

    A value that was set may be at fault with one that was not: 3 workers and a batch of 64.
    """
    if not assignments or not problem.line or _has(written, (), kinds, problem):
        return problem
    single = [text for text in assignments if _has(written, [text], kinds, problem)]
    names = [text.partition("=")[0] for text in single or assignments]  # a value may be a secret
    return Problem(" ".join(f"--set {name}" for name in names), 0, problem.path, problem.message)


def _has(written: Document, assignments: Sequence[str], kinds: Kinds, problem: Problem) -> bool:
    """Whether the file has this problem with these assignments alone."""
    document = copy.deepcopy(written)
    try:
        document.override(assignments)
        parse(document, kinds)
    except SpecError as error:
        return any((each.path, each.message) == (problem.path, problem.message) for each in error.problems)
    return False


def parse(document: Document, kinds: Kinds) -> RunSpec:
    """Validate a document against the class of its kind."""
    kind = document.tree.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        what = "is missing" if kind is None else f"{kind!r} is not a kind of job"
        hint = nearest(kind, kinds) if isinstance(kind, str) else f"valid: {', '.join(sorted(kinds))}"
        raise SpecError([document.problem(("kind",), f"{what}; {hint}")])
    if secrets := list(find_secrets(document.tree)):
        raise SpecError([document.problem(path, _SECRET) for path in secrets])
    document.tree, document.copies = kinds[kind].expand(document.tree)
    try:
        return kinds[kind].model_validate(document.tree)
    except ValidationError as error:
        raise SpecError(_problems(error, document, kinds[kind])) from None


def dump(spec: BaseModel) -> str:
    """The resolved spec as YAML: every default written out, fractions as they were written."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def sha256(spec: BaseModel) -> str:
    """The identity of a resolved spec."""
    return hashlib.sha256(dump(spec).encode()).hexdigest()


def json_schema(spec_class: type[RunSpec], kind: str) -> dict[str, Any]:
    """The JSON Schema of one kind, for editors."""
    schema = spec_class.model_json_schema()
    schema["properties"]["kind"] = {"const": kind, "description": schema["properties"]["kind"].get("description", "")}
    schema["properties"]["profiles"] = {
        "type": "object",
        "additionalProperties": {"type": "object"},
        "description": "changes by name, which --profile applies",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"poise {kind}"}


def _problems(error: ValidationError, document: Document, spec_class: type[RunSpec]) -> list[Problem]:
    found = [
        document.problem(_written(_loc(detail), document.tree), _message(detail, spec_class))
        for detail in error.errors()
    ]
    return sorted(dict.fromkeys(found), key=lambda problem: (problem.line, problem.path and str(problem.path)))


def _loc(detail: ErrorDetails) -> Path:
    if detail["type"] != "mistake":
        return detail["loc"]
    inside = str(detail["ctx"]["path"]).split(".")
    return (*detail["loc"], *(int(part) if part.isdigit() else part for part in inside))


def _written(loc: Path, tree: Any) -> Path:
    """The path as its author wrote it: pydantic puts the tag of a union between the keys, the author does not."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        inside = (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if inside:
            tree = tree[part]
            path.append(part)
        elif index == len(loc) - 1 and not (isinstance(tree, dict) and part in map(tree.get, TAGS)):
            path.append(part)
    return tuple(path)


def _message(detail: ErrorDetails, spec_class: type[RunSpec]) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(detail['loc'][-1]), _fields_at(spec_class, detail['loc'][:-1]))}"
    if kind == "missing":
        return "is required and missing"
    if kind == "union_tag_not_found":
        tag = str(context["discriminator"]).strip("'")
        return f"needs a `{tag}`; valid: {_choices(spec_class, detail['loc'])}"
    if kind in ("union_tag_invalid", "literal_error"):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected_tags") or context.get("expected")))
        shown = context["tag"] if kind == "union_tag_invalid" else given
        hint = nearest(str(shown), allowed) if allowed else f"expected {context.get('expected')}"
        return f"{_short(shown)} is not valid; {hint}"
    if kind in ("model_type", "model_attributes_type"):
        members = _members(_annotation_at(spec_class, detail["loc"]))
        return f"{section_expected(given, members)}, got {_short(given)}"
    if kind == "list_type" and isinstance(given, (str, int, float)):
        return f"needs a list, such as [{_short(given)}]"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return size_expected(kind, context)
    text = re.sub(r"^(Value|Assertion) error, ", "", detail["msg"])
    text = re.sub(r"^Input should be", "must be", text).replace("a valid dictionary", "a mapping of keys to values")
    untold = kind == "mistake" or isinstance(given, dict) or "environment" in detail["loc"]
    return text if untold else f"{text}, got {_short(given)}"


def _choices(spec_class: type[BaseModel], loc: Path) -> str:
    tags = [_tag(member) for member in _members(_annotation_at(spec_class, loc))]
    return ", ".join(sorted(tag for tag in tags if tag))


def _fields_at(spec_class: type[BaseModel], loc: Path) -> list[str]:
    members = _members(_annotation_at(spec_class, loc))
    return [name for member in members for name in member.model_fields]


def _annotation_at(annotation: Any, loc: Path) -> Any:
    """The annotation that pydantic was at when it stopped: follow fields, list and dict items, and union tags."""
    for part in loc:
        members = _members(annotation)
        tagged = [member for member in members if _tag(member) == part]
        owner = next((member for member in members if part in member.model_fields), None)
        if owner is not None:
            annotation = owner.model_fields[str(part)].annotation
        elif tagged:
            annotation = tagged[0]
        else:
            annotation = get_args(annotation)[-1] if get_args(annotation) else annotation
    return annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside an annotation: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, dict, tuple):
        return []
    return [member for argument in get_args(annotation) for member in _members(argument)]


def _tag(member: type[BaseModel]) -> str | None:
    fields = (member.model_fields.get(key) for key in TAGS)
    tags = [get_args(field.annotation)[0] for field in fields if field and get_origin(field.annotation) is Literal]
    return str(tags[0]) if tags else None


def _short(value: Any) -> str:
    text = redact(repr(value))  # before it is cut, which may take away what a secret is known by
    return text if len(text) <= 60 else f"{text[:57]}..."
