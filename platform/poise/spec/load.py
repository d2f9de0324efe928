"""Loading a typed spec from a file and its overrides, with all errors reported at once."""

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

from poise.errors import UserError
from poise.secrets import find_secrets, redact
from poise.spec.base import FIELD_ERROR
from poise.spec.problems import Path, Problem, SpecError, nearest
from poise.spec.reader import Document, read_file
from poise.spec.registry import resolved_class
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

    Raises:
        UserError: the file cannot be read.
        SpecError: it is not a valid spec; has all errors.
    """
    spec, _ = load_document(path, kinds, assignments, profile)
    return spec


def load_document(
    path: str | FilePath, kinds: Kinds, assignments: Sequence[str] = (), profile: str | None = None
) -> tuple[RunSpec, Document]:
    """The spec as by `load`, and the document, which has the line of every part of the spec."""
    document = read_file(FilePath(path))
    document.take_profile(profile)
    original = copy.deepcopy(document)
    document.override(assignments)
    try:
        return parse(document, kinds), document
    except SpecError as error:
        problems = [_attribute(problem, original, kinds, assignments) for problem in error.problems]
        raise SpecError(problems) from None


def _attribute(problem: Problem, original: Document, kinds: Kinds, assignments: Sequence[str]) -> Problem:
    """The problem, reported at the assignments that cause it where the file without them does not have it.

    An assignment can cause a problem at another key: 3 workers, and a batch of 64 in the file.
    """
    if not assignments or not problem.line or _has_problem(original, (), kinds, problem):
        return problem
    causes = [text for text in assignments if _has_problem(original, [text], kinds, problem)]
    names = [text.partition("=")[0] for text in causes or assignments]  # without values, which may be secrets
    return Problem(" ".join(f"--set {name}" for name in names), 0, problem.path, problem.message)


def _has_problem(original: Document, assignments: Sequence[str], kinds: Kinds, problem: Problem) -> bool:
    """Whether the file has this problem with these assignments only."""
    document = copy.deepcopy(original)
    try:
        document.override(assignments)
        parse(document, kinds)
    except SpecError as error:
        return any((other.path, other.message) == (problem.path, problem.message) for other in error.problems)
    return False


def parse(document: Document, kinds: Kinds) -> RunSpec:
    """The spec of a document, validated against the class of its kind; SpecError with all errors."""
    spec_class = _spec_class(document, kinds)
    if secrets := list(find_secrets(document.tree)):
        raise SpecError([document.problem(path, _SECRET) for path in secrets])
    document.tree, document.copies = spec_class.expand(document.tree)
    try:
        return spec_class.model_validate(document.tree)
    except ValidationError as error:
        raise SpecError(_problems(error, document, spec_class)) from None


def _spec_class(document: Document, kinds: Kinds) -> type[RunSpec]:
    """The class of the kind that a document names; SpecError where there is none, or it cannot be imported."""
    kind = document.tree.get("kind")
    try:
        if isinstance(kind, str) and kind in kinds:
            return kinds[kind]
    except UserError as error:  # the kind of an installed package that cannot be used
        raise SpecError([document.problem(("kind",), str(error))]) from None
    fault = "is missing" if kind is None else f"{kind!r} is not a kind of job"
    hint = nearest(kind, kinds) if isinstance(kind, str) else f"valid: {', '.join(sorted(kinds))}"
    families = {name.partition(".")[0] for name in kinds}
    if isinstance(kind, str) and "." in kind and kind.partition(".")[0] not in families:
        hint += "; a kind of another package is found only where that package is installed"
    raise SpecError([document.problem(("kind",), f"{fault}; {hint}")])


def dump(spec: BaseModel) -> str:
    """The resolved spec as YAML: with all defaults, and fractions in their spelling."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def sha256(spec: BaseModel) -> str:
    """The SHA-256 of a resolved spec as YAML, which identifies it."""
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
    """The errors of pydantic as problems without duplicates, in the order of the file."""
    problems = [
        document.problem(_path_in_file(_loc(detail), document.tree), _message(detail, spec_class))
        for detail in error.errors()
    ]
    return sorted(dict.fromkeys(problems), key=lambda problem: (problem.line, problem.path and str(problem.path)))


def _loc(detail: ErrorDetails) -> Path:
    """The location of an error, with the path inside the section that a `field_error` adds."""
    if detail["type"] != FIELD_ERROR:
        return detail["loc"]
    inside = str(detail["ctx"]["path"]).split(".")
    return (*detail["loc"], *(int(part) if part.isdigit() else part for part in inside))


def _path_in_file(loc: Path, tree: Any) -> Path:
    """A location of pydantic as a path in the file: without the tags of unions, which pydantic puts between keys."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        is_key = isinstance(tree, dict) and part in tree
        is_index = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        is_last = index == len(loc) - 1
        if is_key or is_index:
            tree = tree[part]
            path.append(part)
        elif is_last and not (isinstance(tree, dict) and part in map(tree.get, TAGS)):  # a missing key, not a tag
            path.append(part)
    return tuple(path)


def _message(detail: ErrorDetails, spec_class: type[RunSpec]) -> str:
    """The message of an error of pydantic, in the words of a spec."""
    kind = detail["type"]
    context = detail.get("ctx", {})
    value = detail.get("input")
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(detail['loc'][-1]), _fields_at(spec_class, detail['loc'][:-1]))}"
    if kind == "missing":
        return "is required and missing"
    if kind == "union_tag_not_found":
        tag = str(context["discriminator"]).strip("'")
        return f"needs a `{tag}`; valid: {_choices(spec_class, detail['loc'])}"
    if kind in ("union_tag_invalid", "literal_error"):
        choices = re.findall(r"'([^']*)'", str(context.get("expected_tags") or context.get("expected")))
        shown = context["tag"] if kind == "union_tag_invalid" else value
        hint = nearest(str(shown), choices) if choices else f"expected {context.get('expected')}"
        return f"{_short(shown)} is not valid; {hint}"
    if kind in ("model_type", "model_attributes_type"):
        members = _members(_annotation_at(spec_class, detail["loc"]))
        return f"{section_expected(value, members)}, got {_short(value)}"
    if kind == "list_type" and isinstance(value, (str, int, float)):
        return f"needs a list, such as [{_short(value)}]"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        return size_expected(kind, context)
    text = re.sub(r"^(Value|Assertion) error, ", "", detail["msg"])
    text = re.sub(r"^Input should be", "must be", text).replace("a valid dictionary", "a mapping of keys to values")
    # a field_error has the value in its message, a section is long, and the environment may hold secrets
    omit_value = kind == FIELD_ERROR or isinstance(value, dict) or "environment" in detail["loc"]
    return text if omit_value else f"{text}, got {_short(value)}"


def _choices(spec_class: type[BaseModel], loc: Path) -> str:
    """The tags of the union at a location."""
    tags = [_tag(member) for member in _members(_annotation_at(spec_class, loc))]
    return ", ".join(sorted(tag for tag in tags if tag))


def _fields_at(spec_class: type[BaseModel], loc: Path) -> list[str]:
    """The keys of all sections that may stand at a location."""
    members = _members(_annotation_at(spec_class, loc))
    return [name for member in members for name in member.model_fields]


def _annotation_at(annotation: Any, loc: Path) -> Any:
    """The annotation at a location of pydantic, by following fields, items of lists and dicts, and tags of unions."""
    for part in loc:
        members = _members(annotation)
        tagged = next((member for member in members if _tag(member) == part), None)
        if tagged is None and members:
            tagged = resolved_class(str(part))
        owner = next((member for member in members if part in member.model_fields), None)
        if owner is not None:
            annotation = owner.model_fields[str(part)].annotation
        elif tagged is not None:
            annotation = tagged
        else:
            annotation = get_args(annotation)[-1] if get_args(annotation) else annotation
    return annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The sections of an annotation: the section itself, or the members of a union; none of a list or dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, dict, tuple):
        return []
    return [member for argument in get_args(annotation) for member in _members(argument)]


def _tag(member: type[BaseModel]) -> str | None:
    """The value of the key that distinguishes a section from the other members of its union; None without one."""
    for key in TAGS:
        field = member.model_fields.get(key)
        if field and get_origin(field.annotation) is Literal:
            return str(get_args(field.annotation)[0])
    return None


def _short(value: Any) -> str:
    """A value for messages: without secrets, and cut where it is long."""
    text = redact(repr(value))  # redacted before it is cut, since a cut secret may not be recognized
    return text if len(text) <= 60 else f"{text[:57]}..."
