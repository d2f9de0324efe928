"""`torchrun` decides how many processes share a run, whatever `workers.count` says: what the spec promises is checked
again for that number."""

from __future__ import annotations

import os
from typing import Any

from poise.env import launched_rank
from poise.errors import UserError
from poise.kinds import KINDS
from poise.spec import RunSpec, SpecError, parse
from poise.spec.problems import dotted
from poise.spec.reader import Document

__all__ = ["check_launcher", "for_processes"]


def check_launcher(engine: str) -> None:
    """Raise UserError where the environment of a launcher is incomplete, or the engine starts its own processes."""
    world_size = launched_rank()[1]
    if world_size == 1:
        return
    if engine == "ray":
        raise UserError(
            f"a launcher has started {world_size} processes (WORLD_SIZE), and Ray starts its own: use --engine local, "
            "or start `poise run` once and set workers.count"
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {world_size} and {missing[0]} is not set: start the processes with torchrun, or unset "
            "RANK and WORLD_SIZE to run alone"
        )


def for_processes(spec: RunSpec, count: int) -> RunSpec:
    """`spec` with `workers.count` processes in every run of it that shares its batches.

    Raises UserError, before anything has started, when a batch of any of them cannot be shared equally.
    """
    if count == 1:
        return spec
    tree = _with_count(spec.model_dump(mode="json", exclude_unset=True), count)
    try:
        return parse(Document(spec.name, tree), {spec.kind: type(spec)})
    except SpecError as error:
        lines = [f"{dotted(problem.path)}: {problem.message}" for problem in error.problems]
        raise UserError(
            "\n".join([*lines, f"torchrun has started {count} processes; start a number of them that divides"])
        ) from None


def _with_count(tree: Any, count: int) -> Any:
    """The tree of a spec, its stages and bases included, with that many workers, no fewer when one is lost."""
    if isinstance(tree, list):
        return [_with_count(value, count) for value in tree]
    if not isinstance(tree, dict):
        return tree
    found = {key: _with_count(value, count) for key, value in tree.items()}
    kind = KINDS.get(str(tree.get("kind")))
    if kind is not None and kind.shares_batches:
        found["workers"] = {**(tree.get("workers") or {}), "count": count, "min_count": None}
    return found
