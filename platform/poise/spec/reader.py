"""Reading YAML text into a plain tree with the line of every key, reporting all errors of form at once.

PyYAML composes the nodes, which have positions, and its safe constructor makes the scalars. `_TreeBuilder` adds checks
that YAML does not make: no duplicate keys, string keys only, and a bound on size that includes expanded aliases.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from poise.errors import UserError
from poise.spec.merge import merge
from poise.spec.problems import Path, Problem, SpecError, dotted, nearest

__all__ = ["Document", "read_document", "read_file"]

_MAX_BYTES = 1 << 20
_MAX_NODES = 50_000
_MAX_DEPTH = 100
_MAX_BITS = 10_000
_READ_WITHIN_S = 10
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """The tree of a spec and where each part of it was written.

    Attributes:
        source: the path of the file, for messages.
        tree: the content.
        lines: the line of each part, from 1.
        overridden: the parts that a `--set` has replaced.
        copies: for parts that `RunSpec.expand` copied, the paths that they were copied from.
    """

    source: str
    tree: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)
    overridden: set[Path] = field(default_factory=set)
    copies: dict[Path, Path] = field(default_factory=dict)

    def place(self, path: Path) -> tuple[str, int]:
        """Source and line of the longest prefix of `path` that was written, there or at a path it was copied from."""
        candidates = [path]
        for copy, origin in self.copies.items():
            if path[: len(copy)] == copy:
                candidates.append((*origin, *path[len(copy) :]))

        def missing_parts(candidate: Path) -> int:
            return len(candidate) - len(self._written_prefix(candidate))

        written = self._written_prefix(min(candidates, key=missing_parts))
        if written in self.overridden:
            return f"--set {dotted(written)}", 0
        return self.source, self.lines.get(written, 0)

    def _written_prefix(self, path: Path) -> Path:
        """The longest prefix of `path` that the file or a `--set` has; () where there is none."""
        prefixes = (path[:end] for end in range(len(path), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.overridden or prefix in self.lines), ())

    def problem(self, path: Path, message: str) -> Problem:
        """A Problem at `path`, with its source and line."""
        return Problem(*self.place(path), path, message)

    def take_profile(self, name: str | None) -> None:
        """Apply the changes of one profile, if `name` is not None, and remove `profiles` from the tree.

        See `merge` for how. The run is called `<name>-<profile>` unless the profile sets `name`.
        """
        profiles = self.tree.pop("profiles", {})
        if not isinstance(profiles, dict) or not all(isinstance(changes, dict) for changes in profiles.values()):
            raise SpecError([self.problem(("profiles",), "a mapping of names to the changes that each makes")])
        if name is None:
            return
        if name not in profiles:
            hint = nearest(name, profiles) if profiles else "the spec has no `profiles`"
            raise SpecError([Problem(f"--profile {name}", 0, (), f"is not a profile of {self.source}; {hint}")])
        if isinstance(self.tree.get("name"), str):
            self.tree["name"] = f"{self.tree['name']}-{name}"
        self.tree = merge(self.tree, profiles[name])
        # Problems in the changes are reported where the changes were written.
        for path, line in list(self.lines.items()):
            if path[:2] == ("profiles", name) and len(path) > 2:
                self.lines[path[2:]] = line

    def override(self, assignments: Sequence[str]) -> None:
        """Apply `a.b=value` assignments. Values are YAML; missing sections are created."""
        results = [self._assign(text) for text in assignments]
        problems = [problem for problem in results if problem]
        if problems:
            raise SpecError(problems)

    def _assign(self, text: str) -> Problem | None:
        """Apply one assignment; the Problem where it is not possible."""
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        shown = f"--set {key[:80]}"  # without the value, which may be long or a secret
        if not equals or not all(path):
            return Problem(f"--set {text[:80]!r}", 0, (), "expected path=value, such as train.epochs=5")
        if len(path) > _MAX_DEPTH:
            return Problem(shown, 0, (), "sections are nested too deeply")
        if len(text.splitlines()) > 1:
            return Problem(
                f"{shown!r}", 0, (), "is more than one line; write a list as [a, b], a section as {key: value}"
            )
        try:
            parsed = read_document(f"value: {value}" if value.strip() else "value: null", f"--set {key}").tree["value"]
        except SpecError as error:
            return Problem(shown, 0, (), error.problems[0].message)
        node: Any = self.tree
        for depth, part in enumerate(path[:-1]):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                return Problem(shown, 0, path[: depth + 1], "is a value, not a section")
        node[path[-1]] = parsed
        self._forget(path)
        self.overridden.add(path)
        return None

    def _forget(self, path: Path) -> None:
        """Remove the lines and overrides at `path` and below it."""
        self.lines = {place: line for place, line in self.lines.items() if place[: len(path)] != path}
        self.overridden = {place for place in self.overridden if place[: len(path)] != path}


def read_file(path: FilePath) -> Document:
    """Read a spec file; UserError when it cannot be read, SpecError when it is not a YAML mapping."""
    try:
        data = _read_within_limits(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `jobs/` holds specs to start from") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return read_document(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is not UTF-8); a spec is YAML text") from None


def _read_within_limits(path: FilePath) -> bytes:
    """The bytes of a file or a pipe (`poise check <(...)`); UserError for an endless device or a silent pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe without a writer would block for ever
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        data = b""
        deadline = time.monotonic() + _READ_WITHIN_S
        while len(data) <= _MAX_BYTES:
            readable, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise UserError(f"{path}: nothing was written into this pipe within {_READ_WITHIN_S} s")
            part = file.read(_MAX_BYTES + 1 - len(data))
            if not part:
                return data
            data += part
    raise UserError(f"{path}: more than {_MAX_BYTES} bytes is not a spec")


def read_document(text: str, source: str) -> Document:
    """Parse YAML text into a Document; SpecError with all errors of form."""
    document = Document(source, {})
    try:
        _check_size(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise SpecError([Problem(source, 0, (), "the spec is empty; it needs at least `kind:` and `name:`")])
        builder = _TreeBuilder(document)
        tree = builder.build(root, ())
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError([_yaml_problem(source, error)]) from None
    if builder.problems:
        raise SpecError(builder.problems)
    if not isinstance(tree, dict):
        raise SpecError([Problem(source, 1, (), f"a spec is a mapping of keys to values, not a {_type_name(tree)}")])
    document.tree = tree
    return document


def _check_size(text: str) -> None:
    """Raise YAMLError for too many values, RecursionError for too many levels, before the tree is built.

    The parser in C is about a thousand times as fast as composing nodes. Errors of syntax are left to the composer.
    """
    nodes = depth = 0
    with suppress(yaml.YAMLError, UnicodeEncodeError):
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            nodes += isinstance(event, yaml.NodeEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if nodes > _MAX_NODES or depth > _MAX_DEPTH:
                break
    if depth > _MAX_DEPTH:
        raise RecursionError
    if nodes > _MAX_NODES:
        raise yaml.YAMLError(f"more than {_MAX_NODES} values")


class _TreeBuilder:
    """Converts nodes to values, records their lines in the document, and collects problems.

    Values are counted; an alias counts each time it is used.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.nodes = 0
        self.scalars = yaml.SafeLoader("")

    def build(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node that stands at `path`."""
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES} values once aliases are expanded")
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            self._add(node.start_mark.line + 1, path, f"cannot read the tag {node.tag}; a spec holds plain values")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}  # from merge keys `<<`, which the other keys take precedence over
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = merge(merged, self._merge_key(value_node, path))
            elif not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "this key"
                self._add(line, path, f"keys are plain words; quote {shown} if it is meant as one")
            elif key in result:
                self._add(line, (*path, key), "written twice in the same section; keep one")
            else:
                self.document.lines[(*path, key)] = line
                result[key] = self.build(value_node, (*path, key))
        return merge(merged, result) if merged else result

    def _merge_key(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        """The mapping that stands behind a `<<` in the mapping at `path`."""
        value = self.build(node, path)
        if not isinstance(value, dict):
            self._add(node.start_mark.line + 1, path, "`<<` takes one mapping")
            return {}
        return value

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            value = self.scalars.construct_object(node)
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # Python refuses to print so large a number
                raise ValueError
            return value
        except (yaml.YAMLError, ValueError, OverflowError):
            type_name = node.tag.split(":")[-1]
            self._add(node.start_mark.line + 1, path, f"cannot read {str(node.value)[:40]!r} as {type_name}")
            return None

    def _add(self, line: int, path: Path, message: str) -> None:
        self.problems.append(Problem(self.document.source, line, path, message))


def _yaml_problem(source: str, error: Exception) -> Problem:
    """The problem for an error of the YAML parser, on one line."""
    if isinstance(error, RecursionError):
        return Problem(source, 0, (), "sections are nested too deeply")
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return Problem(source, mark.line + 1 if mark else 0, (), f"not valid YAML: {reason}")


def _type_name(value: Any) -> str:
    """The type of a value in words of YAML."""
    return {list: "list", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
