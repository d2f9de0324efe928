"""The weights of one checkpoint, for measures and exports after the training."""

from __future__ import annotations

from torch import nn

from poise.errors import DamagedError
from poise.observe.events import event
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.state import load_weights

__all__ = ["restore"]


def restore(model: nn.Module, step: int, context: Context) -> bool:
    """Load the weights that were committed at `step`; False, and said in the events, when they are damaged."""
    checkpoints = context.run.checkpoints
    with scratch_folder() as scratch:
        folder, damage = scratch / "checkpoint", None
        try:
            checkpoints.fetch(checkpoints.at(step), folder)
        except DamagedError as error:
            damage = str(error)
        if damages := [found for found in context.gather(damage) if found]:
            context.together(lambda: context.run.append_events([event("damaged", what=damages[0])]))
            return False
        load_weights(model, folder, context.device)
    return True
