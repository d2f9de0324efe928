"""The code of the user that the runs of a spec would run: what the spec names, and what the runs that it reads name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from poise.errors import PoiseError
from poise.kinds import KINDS
from poise.spec import Input, RunSpec
from poise.spec.problems import Path
from poise.store.runs import open_run

__all__ = ["NamedCode", "named_code"]

_REOPENED = ("robust.train", "robust.evaluate", "robust.vae", "sweep")
"""Kinds whose model and data are made anew from their spec by a run that reads their result."""


@dataclass(frozen=True)
class NamedCode:
    """Code of the user.

    Attributes:
        path: where the spec names it, or names the run that needs it.
        reference: `package.module:attribute`.
        run: the run that needs it; None where the spec names it itself.
    """

    path: Path
    reference: str
    run: str | None = None


def named_code(spec: RunSpec) -> list[NamedCode]:
    """The code of the user that the runs of `spec` would run, each once, in the order of the spec.

    Runs that do not exist yet, such as those of earlier stages, are left out: the spec names their code itself.
    """
    names = dict[NamedCode, None]()  # an ordered set
    for item in spec.inputs():
        if item.kind == "code":
            names[NamedCode(item.path, item.place)] = None
        elif item.kind == "run":
            for reference in dict.fromkeys(_code_of_run(spec.store, item, set())):
                names[NamedCode(item.path, reference, item.place)] = None
    return list(names)


def _code_of_run(store: str, item: Input, seen: set[str]) -> Iterator[str]:
    """The references of the model and the data of the run that `item` names, and of the runs that these name."""
    if item.place in seen:
        return
    seen.add(item.place)
    spec = _read_spec(store, item.place)
    if spec is None or spec.kind not in _REOPENED:
        return
    for inner in spec.inputs():
        path = [part for part in inner.path if part != "base"]  # of the trials of a sweep
        if inner.kind == "run":
            yield from _code_of_run(store, inner, seen)
        elif inner.kind == "code" and path[0] in ("model", "data"):
            yield inner.place


def _read_spec(store: str, name: str) -> RunSpec | None:
    """The spec of a run; None where there is none or it cannot be read, which other checks report."""
    try:
        tree = yaml.safe_load(open_run(store, name).read("spec.yaml"))
        return KINDS[tree["kind"]].model_validate(tree)
    except (FileNotFoundError, PoiseError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
