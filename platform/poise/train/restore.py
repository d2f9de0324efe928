"""Reading checkpoints: on all ranks, each downloaded once per machine; or by itself, of another run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from poise.errors import IntegrityError
from poise.observe.events import event
from poise.store.checkpoints import Commit
from poise.store.runs import Run
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.state import MODEL, load_weights

__all__ = ["NodeFolder", "load_checkpoint", "node_folder", "restore"]


@dataclass(frozen=True)
class NodeFolder:
    """A temporary folder that all ranks of one machine see at the same path.

    `is_owner` is true on the one rank that made the folder, and that downloads into it. Rank 0 is always an owner.
    """

    path: Path
    is_owner: bool

    def fetch(self, commit: Commit, context: Context) -> None:
        """Download a checkpoint into `path` where rank 0 has not done it; every rank calls this, and then has it.

        Raises:
            IntegrityError: on every rank, if the checkpoint that any rank received is damaged.
        """

        def download() -> None:
            if self.is_owner and not context.is_main:
                context.run.checkpoints.fetch(commit, self.path)

        context.on_every_rank(download)


@contextmanager
def node_folder(context: Context) -> Iterator[NodeFolder]:
    """Yield the folder of this rank's machine; it does not exist yet, and its parent is removed after the block.

    Every rank makes a folder with a random name and looks for those of the others: it shares the folder of the lowest
    rank that it can read. That is also right for containers of one machine, which do not see each other's files, and
    for machines with a common TMPDIR.

    What reads the folder must be in a call that waits for all ranks, such as `context.on_every_rank`: otherwise its
    owner could leave the block and remove it while another rank reads.
    """
    with scratch_folder() as scratch:
        folders: list[Path] = context.gather(scratch)
        owner = next(rank for rank, folder in enumerate(folders) if _is_readable(folder))
        yield NodeFolder(folders[owner] / "checkpoint", owner == context.rank)


def load_checkpoint(model: nn.Module, run: Run, step: int, device: torch.device) -> None:
    """Load the weights that a run committed at `step`. Nothing else of the checkpoint is downloaded.

    Raises:
        IntegrityError: the weights are damaged, or not there.
        UserError: it belongs to another architecture.
    """
    with scratch_folder() as scratch:
        folder = run.checkpoints.fetch(run.checkpoints.at(step), scratch / "checkpoint", names=[MODEL])
        load_weights(model, folder, device)


def restore(model: nn.Module, step: int, context: Context) -> bool:
    """Load the weights committed at `step`; False when they are damaged, which is recorded as an event."""
    with node_folder(context) as folder:
        problem = _fetch(step, folder.path, context) if folder.is_owner else None
        problems = [text for text in context.gather(problem) if text]
        if problems:
            context.on_main(lambda: context.run.append_events([event("damaged", what=problems[0])]))
            return False
        context.on_every_rank(lambda: load_weights(model, folder.path, context.device))
    return True


def _fetch(step: int, folder: Path, context: Context) -> str | None:
    """Download the checkpoint of `step`; returns what is damaged, or None."""
    checkpoints = context.run.checkpoints
    try:
        checkpoints.fetch(checkpoints.at(step), folder)
    except IntegrityError as error:
        return str(error)
    return None


def _is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)
