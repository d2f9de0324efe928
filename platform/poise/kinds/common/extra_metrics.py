"""Metrics of the user's code: a number per example, whose mean is measured beside the metrics of a kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from poise.data.images.datasets import ImageSet, to_float
from poise.data.text.batches import TextBatch, text_batch
from poise.data.text.examples import TextExample
from poise.errors import UserError
from poise.robust.attacks import attack_mode
from poise.spec import MetricFunction
from poise.train.context import Context
from poise.user_code import explain_errors, load_attribute

__all__ = ["measure_images", "measure_texts"]

_TEXTS_PER_BATCH = 16


def measure_images(
    metrics: Mapping[str, MetricFunction],
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int,
    context: Context,
) -> dict[str, float]:
    """The mean over `images` of each metric, a function of (model, x, y, **arguments) that returns numbers (N,).

    x (N, C, H, W) is in [0, 1], y (N,) the labels. The model is in eval mode and no gradient is recorded; a metric that
    attacks the model enables it. All ranks call this and get the same numbers.

    Raises:
        UserError: a metric fails, or returns anything but N finite numbers.
    """
    shard = images.select(torch.tensor(context.shard(len(images)), dtype=torch.int64))

    def batch(rows: slice) -> tuple[Tensor, Tensor]:
        return to_float(shard.images[rows].to(context.device)), shard.labels[rows].to(context.device)

    with attack_mode(model), torch.no_grad():
        return _means(metrics, model, batch, len(shard), batch_size, "evaluate.extra_metrics", context)


def measure_texts(
    metrics: Mapping[str, MetricFunction], model: nn.Module, examples: Sequence[TextExample], context: Context
) -> dict[str, float]:
    """The mean over examples of each metric, a function of (model, batch, **arguments) that returns numbers (B,).

    `batch` is a `TextBatch` of B examples. The model is in eval mode and no gradient is recorded. All ranks call this
    and get the same numbers; {} without an example.

    Raises:
        UserError: as `measure_images`.
    """
    if not examples:
        return {}
    shard = [examples[row] for row in context.shard(len(examples))]

    def batch(rows: slice) -> tuple[TextBatch]:
        on_cpu = text_batch(shard[rows])
        device = context.device
        return (TextBatch(on_cpu.ids.to(device), on_cpu.labels.to(device), on_cpu.mask.to(device)),)

    training = model.training
    model.eval()
    with torch.no_grad():
        means = _means(metrics, model, batch, len(shard), _TEXTS_PER_BATCH, "extra_metrics", context)
    model.train(training)
    return means


def _means(
    metrics: Mapping[str, MetricFunction],
    model: nn.Module,
    batch: Callable[[slice], tuple[Any, ...]],
    count: int,
    batch_size: int,
    field: str,
    context: Context,
) -> dict[str, float]:
    """The means of all metrics over the examples of all ranks, of which this rank has `count`."""
    means = {}
    for name, metric in metrics.items():
        where = f"{field}.{name}.function"
        function = load_attribute(metric.function, where)
        values: list[float] = []
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            with explain_errors(f"{where}: {metric.function}"):
                returned = function(model, *batch(rows), **metric.arguments)
            values += _numbers(returned, rows.stop - start, f"{where}: {metric.function}")
        # math.fsum is exact, so that the mean does not depend on how the examples are shared among ranks.
        all_values = context.unshard(values)
        means[f"metric/{name}"] = math.fsum(all_values) / len(all_values)
    return means


def _numbers(returned: Any, count: int, what: str) -> list[float]:
    """What a metric returned for `count` examples, as numbers; UserError where it is anything else."""
    if not isinstance(returned, Tensor) or returned.shape != (count,):
        shown = f"a tensor {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned).__name__
        raise UserError(f"{what} returned {shown} for {count} examples: it has to return a tensor ({count},)")
    if not bool(returned.isfinite().all()):
        raise UserError(f"{what} returned a number that is not finite")
    numbers: list[float] = returned.double().tolist()
    return numbers
