"""What installed packages register by entry points: kinds of runs, and methods that specs name.

A package registers an object in its metadata, in a group of `GROUPS`. With setuptools or hatch, in pyproject.toml:

    [project.entry-points."poise.objectives"]
    focal = "mylab.focal:Focal"

The package was installed on purpose, so specs use its objects by plain name and without `--allow-code`. An entry point
that cannot be loaded breaks nothing until a spec uses its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from poise.errors import UserError
from poise.user_code import describe_error

__all__ = ["GROUPS", "failures", "group_of", "load", "modules", "names", "package_versions", "reference", "top_levels"]

GROUPS = (
    "poise.kinds",
    "poise.objectives",
    "poise.losses",
    "poise.tuning",
    "poise.selfplay",
    "poise.oracles",
    "poise.clustering",
)
"""The groups of entry points."""


def names(group: str) -> list[str]:
    """The names that installed packages register in a group, sorted. Nothing is imported."""
    return sorted(_entry_points()[group])


def load(group: str, name: str) -> Any:
    """The object that an installed package registers under this name.

    Raises:
        KeyError: no package registers it.
        UserError: the entry point cannot be loaded; the message names the package.
    """
    entry_point = _entry_points()[group][name]
    try:
        return entry_point.load()
    except Exception as error:
        raise UserError(f"{_origin(entry_point)} cannot be loaded: {describe_error(error)}") from error


def group_of(name: str, loaded: object) -> str | None:
    """The group in which an installed package registers this object under this name; None if no package does."""
    for group in GROUPS:
        if name in _entry_points()[group]:
            with suppress(UserError):
                if load(group, name) is loaded:
                    return group
    return None


def reference(group: str, name: str) -> str:
    """The object of an entry point as `package.module:attribute`. KeyError if no package registers it."""
    entry_point = _entry_points()[group][name]
    return f"{entry_point.module}:{entry_point.attr}"


def modules(group: str, name: str) -> tuple[str, ...]:
    """The modules whose code a registered object runs: the one that its entry point names, and those of a kind.

    Raises:
        KeyError, UserError: as `load`.
    """
    module = _entry_points()[group][name].module
    return (module, *load(group, name).modules) if group == "poise.kinds" else (module,)


def top_levels() -> frozenset[str]:
    """The top-level packages and modules of everything that is registered. Nothing is imported."""
    registered = (entry_point for group in GROUPS for entry_point in _entry_points()[group].values())
    return frozenset(entry_point.module.partition(".")[0] for entry_point in registered)


def failures() -> Iterator[str]:
    """A message for every entry point that cannot be loaded. Imports all of them."""
    for group in GROUPS:
        for name in names(group):
            try:
                load(group, name)
            except UserError as error:
                yield f"{group} {name!r}: {error}"


def package_versions() -> Mapping[str, str]:
    """The versions of all packages that register something, by name."""
    versions = {}
    for group in GROUPS:
        for entry_point in _entry_points()[group].values():
            if entry_point.dist is not None:
                versions[entry_point.dist.name] = entry_point.dist.version
    return versions


def _origin(entry_point: EntryPoint) -> str:
    package = "an installed package" if entry_point.dist is None else f"the package {entry_point.dist.name}"
    return f"{entry_point.value}, which {package} registers,"


@cache
def _entry_points() -> Mapping[str, Mapping[str, EntryPoint]]:
    """The entry points by group and name; of several with one name, the first on Python's path.

    The metadata of all packages is read once, which takes about 30 ms.
    """
    registered = entry_points()
    groups: dict[str, dict[str, EntryPoint]] = {}
    for group in GROUPS:
        groups[group] = {}
        for entry_point in registered.select(group=group):
            groups[group].setdefault(entry_point.name, entry_point)
    return groups
