"""Runs under `torchrun`, whose number of processes replaces `workers.count`. A spec is validated again for it."""

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
    """Raise UserError if a launcher's environment is incomplete, or if the engine starts processes itself."""
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
    """`spec` with `workers.count` set to `count` in every run of it that shares its batches.

    Raises UserError when a batch of any of them does not divide by `count`.
    """
    if count == 1:
        return spec
    tree = _with_count(spec.model_dump(mode="json", exclude_unset=True), count)
    try:
        return parse(Document(spec.name, tree), {spec.kind: type(spec)})
    except SpecError as error:
        lines = [f"{dotted(problem.path)}: {problem.message}" for problem in error.problems]
        lines.append(f"torchrun has started {count} processes; start a number of them that divides")
        raise UserError("\n".join(lines)) from None


def _with_count(tree: Any, count: int) -> Any:
    """A dumped spec with `count` workers, also in its stages and bases; `min_count` is unset."""
    if isinstance(tree, list):
        return [_with_count(value, count) for value in tree]
    if not isinstance(tree, dict):
        return tree
    changed = {key: _with_count(value, count) for key, value in tree.items()}
    kind = KINDS.get(str(tree.get("kind")))
    if kind is not None and kind.shares_batches:
        changed["workers"] = {**(tree.get("workers") or {}), "count": count, "min_count": None}
    return changed
