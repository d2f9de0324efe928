"""Monitors of a robust training: validation, the robust gap, and the alarm of catastrophic overfitting."""

from __future__ import annotations

import math

import torch
from torch import nn

from poise.data.images.batches import Dataset
from poise.data.images.datasets import ImageSet, to_float
from poise.kinds.common.extra_metrics import measure_images
from poise.kinds.common.robust_accuracy import robust_accuracy
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.robust.evaluate import Evaluation
from poise.robust.noise import Noise
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.robust.training.monitors import alarm, probe, robust_gap
from poise.robust.training_spec import Overfitting
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.task import MonitorResult, TaskState

__all__ = ["RobustMonitor", "attacked", "measured"]

_PREVIOUS_PGD = "monitor/pgd"
"""The key of the PGD accuracy of the previous probe in the state of the task."""


def attacked(
    spec: RobustTrainSpec, threats: Threats, model: nn.Module, images: ImageSet, context: Context
) -> Evaluation:
    """Attack the model in eval mode on `evaluate.num_examples` of the images. All ranks call it."""
    seed = derive_seed(spec.seed, "evaluate")
    chosen = images.choose(spec.evaluate.num_examples)
    return robust_accuracy(model, chosen, threats, batch_size=spec.evaluate.batch_size, seed=seed, context=context)


def measured(spec: RobustTrainSpec, model: nn.Module, images: ImageSet, context: Context) -> dict[str, float]:
    """The metrics of the user's code on `evaluate.num_examples` of the images. All ranks call it."""
    chosen = images.choose(spec.evaluate.num_examples)
    metrics = spec.evaluate.extra_metrics
    return measure_images(metrics, model, chosen, batch_size=spec.evaluate.batch_size, context=context)


class RobustMonitor:
    """Measures a model during training on validation images and on a fixed sample of the training images."""

    def __init__(self, spec: RobustTrainSpec, data: Dataset, model: nn.Module, context: Context) -> None:
        self._spec = spec
        self._data = data
        self._model = model
        self._context = context
        generator = torch.Generator().manual_seed(derive_seed(spec.seed, "monitor"))
        self._order = torch.randperm(len(data.train), generator=generator)

    def initial(self) -> TaskState:
        """The state before the first probe: its previous PGD accuracy is NaN. Empty without a probe."""
        if self._spec.monitors.overfitting is None:
            return {}
        return {_PREVIOUS_PGD: torch.tensor(math.nan, dtype=torch.float64)}

    def validate(self) -> dict[str, float]:
        """Validation accuracies under the threats of training, by which the best checkpoint is chosen.

        The threats of the test may be others. With the monitor `robust_gap`, also the training minus validation
        accuracies, under `gap/`. Metrics of the user's code are added, under `metric/`.
        """
        validation = self._accuracies(self._data.validation)
        extra = measured(self._spec, self._model, self._data.validation, self._context)
        if not self._spec.monitors.robust_gap:
            return validation | extra
        training = self._accuracies(self._training_sample(len(self._data.validation)))
        return validation | extra | robust_gap(training, validation)

    def watch(self, options: Overfitting, state: TaskState) -> MonitorResult:
        """Probe the training sample for catastrophic overfitting, under the first threat of the spec.

        Every rank probes the whole sample; the result of rank 0 counts.
        """
        norm, threat = next(iter(self._spec.threats.items()))
        images = self._training_sample(options.num_examples)
        device = self._context.device
        x = to_float(images.images).to(device)
        y = images.labels.to(device)
        noise = Noise.of(derive_seed(self._spec.seed, "monitor"), "probe", range(len(x)), device)
        result = probe(self._model, x, y, Threat(norm, threat.eps), steps=options.steps, noise=noise)
        result = self._context.broadcast(result)
        previous_pgd = state[_PREVIOUS_PGD]
        reason = alarm(result, previous_pgd.item(), gap=float(options.gap), max_drop=float(options.max_drop))
        metrics = {
            "overfitting/fgsm": result.fgsm,
            "overfitting/pgd": result.pgd,
            "overfitting/cosine": result.cosine,
            "overfitting/alarm": float(reason is not None),
        }
        next_state = state | {_PREVIOUS_PGD: torch.full_like(previous_pgd, result.pgd)}
        return MonitorResult(metrics, next_state, reason, options.stop == "restore")

    def _accuracies(self, images: ImageSet) -> dict[str, float]:
        return attacked(self._spec, self._spec.threats, self._model, images, self._context).summary()

    def _training_sample(self, count: int) -> ImageSet:
        """The first `count` training images of a fixed random order."""
        return self._data.train.select(self._order[:count])
