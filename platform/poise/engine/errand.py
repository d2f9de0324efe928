"""What a worker of a gang is sent, and the call it begins with.

The driver and Ray's controller load this module as well; torch, which takes seconds, is loaded in the worker alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Errand", "run_errand"]


@dataclass(frozen=True)
class Errand:
    """Nothing in it is a secret."""

    kind: str
    spec_json: str
    store: str
    token: str
    folder: str
    board: Any


def run_errand(config: dict[str, Errand]) -> None:
    """The training function of the gang."""
    from poise.engine.worker import work

    work(config["errand"])
