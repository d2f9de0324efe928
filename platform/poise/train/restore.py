"""Loading the weights of one checkpoint, for measurements and exports after training."""

from __future__ import annotations

from torch import nn

from poise.errors import IntegrityError
from poise.observe.events import event
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.state import load_weights

__all__ = ["restore"]


def restore(model: nn.Module, step: int, context: Context) -> bool:
    """Load the weights committed at `step`; False when a rank finds them damaged, which is recorded as an event."""
    checkpoints = context.run.checkpoints
    with scratch_folder() as scratch:
        folder = scratch / "checkpoint"
        damage: str | None = None
        try:
            checkpoints.fetch(checkpoints.at(step), folder)
        except IntegrityError as error:
            damage = str(error)
        damages = [text for text in context.gather(damage) if text]
        if damages:
            context.on_main(lambda: context.run.append_events([event("damaged", what=damages[0])]))
            return False
        load_weights(model, folder, context.device)
    return True
