"""What a robust training is watched by: its validation, the robust gap, the alarm of catastrophic overfitting."""

from __future__ import annotations

import math

import torch
from torch import nn

from poise.data.batches import Dataset
from poise.data.sets import ImageSet, unit_pixels
from poise.kinds.measure import robust_accuracy
from poise.kinds.specs.robust import RobustTrainSpec
from poise.robust.evaluate import Evaluation
from poise.robust.monitors import alarm, probe, robust_gap
from poise.robust.noise import Noise
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.robust.training_spec import Overfitting
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.task import TaskState, Watch

__all__ = ["RobustWatch", "attacked"]

_BEFORE = "monitor/pgd"


def attacked(
    spec: RobustTrainSpec, threats: Threats, model: nn.Module, images: ImageSet, context: Context
) -> Evaluation:
    """The model under attack on as many images as the spec says, in eval mode."""
    seed = derive_seed(spec.seed, "evaluate")
    chosen = images.choose(spec.evaluate.examples)
    return robust_accuracy(model, chosen, threats, batch_size=spec.evaluate.batch_size, seed=seed, context=context)


class RobustWatch:
    """The looks at a model in training, on held-out images and on a fixed sample of those that it trains on."""

    def __init__(self, spec: RobustTrainSpec, data: Dataset, model: nn.Module, context: Context) -> None:
        self._spec, self._data, self._model, self._context = spec, data, model, context
        generator = torch.Generator().manual_seed(derive_seed(spec.seed, "monitor"))
        self._order = torch.randperm(len(data.train), generator=generator)

    def initial(self) -> TaskState:
        """The state before the first look."""
        watched = self._spec.monitors.overfitting is not None
        return {_BEFORE: torch.tensor(math.nan, dtype=torch.float64)} if watched else {}

    def validate(self) -> dict[str, float]:
        """What picks the best checkpoint: robustness to the threats of training, those of the test may be others."""
        held_out = self._summary(self._data.validation)
        if not self._spec.monitors.robust_gap:
            return held_out
        return held_out | robust_gap(self._summary(self._sample(len(self._data.validation))), held_out)

    def watch(self, options: Overfitting, state: TaskState) -> Watch:
        """Probe the fixed sample under the first threat, each rank alone; what rank 0 finds counts."""
        (norm, threat), *_ = self._spec.threats.items()
        images = self._sample(options.examples)
        x, y = (values.to(self._context.device) for values in (unit_pixels(images.images), images.labels))
        noise = Noise.of(derive_seed(self._spec.seed, "monitor"), "probe", range(len(x)), self._context.device)
        found = probe(self._model, x, y, Threat(norm, threat.eps), steps=options.steps, noise=noise)
        found = self._context.broadcast(found)
        why = alarm(found, state[_BEFORE].item(), gap=float(options.gap), fall=float(options.fall))
        measures = {"fgsm": found.fgsm, "pgd": found.pgd, "cosine": found.cosine, "alarm": float(why is not None)}
        after = state | {_BEFORE: torch.full_like(state[_BEFORE], found.pgd)}
        metrics = {f"overfitting/{name}": value for name, value in measures.items()}
        return Watch(metrics, after, why, options.stop == "restore")

    def _summary(self, images: ImageSet) -> dict[str, float]:
        return attacked(self._spec, self._spec.threats, self._model, images, self._context).summary()

    def _sample(self, count: int) -> ImageSet:
        return self._data.train.select(self._order[:count])
