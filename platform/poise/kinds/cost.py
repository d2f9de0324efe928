"""What a run will cost, told before it starts and without building anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from poise.data.spec import known_sizes
from poise.kinds.specs import PipelineSpec, RobustTrainSpec
from poise.models.spec import num_parameters, state_bytes
from poise.robust.spec import gradients_per_batch
from poise.spec import RunSpec

__all__ = ["estimate"]


def estimate(spec: RunSpec) -> list[str]:
    """Lines that say what `spec` will cost. Raises UserError when the images are too small for the model."""
    lines: list[str] = _ESTIMATES[spec.kind](spec)
    return lines


def _pipeline(spec: PipelineSpec) -> list[str]:
    return [f"{stage.name}: {line}" for stage in spec.stages.values() for line in estimate(stage)]


def _robust_train(spec: RobustTrainSpec) -> list[str]:
    attack = gradients_per_batch(spec.objective, spec.threats)
    lines = [f"gradients per batch of {spec.data.batch_size}: {attack} for attacks, {len(spec.threats)} for the loss"]
    sizes = known_sizes(spec.data)
    if sizes is None:
        return [*lines, "steps, parameters and bytes: known when the data set is read"]
    weights, state = (
        num_parameters(spec.model, sizes.shape, sizes.classes),
        state_bytes(spec.model, sizes.shape, sizes.classes),
    )
    checkpoint = state + 4 * weights * (1 if spec.train.optimizer.name == "sgd" else 2)
    steps_per_epoch = max(1, sizes.train // spec.data.batch_size // spec.train.accumulate)
    steps = spec.train.total_steps(steps_per_epoch)
    images = steps * spec.train.accumulate * spec.data.batch_size
    kept = spec.train.checkpoint.keep + 1
    return [
        *lines,
        f"{steps:,} optimizer steps, {steps / steps_per_epoch:.4g} epochs of {sizes.train:,} images: {images:,} images",
        f"{images * (attack + len(spec.threats)):,} image gradients in all, evaluation not counted",
        f"{weights:,} parameters; {_bytes(checkpoint)} per checkpoint, {_bytes(kept * checkpoint)} kept at most",
        f"{spec.workers.count} workers of {spec.workers.cpus} CPU and {spec.workers.gpus} GPU",
    ]


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


_ESTIMATES: dict[str, Callable[[Any], list[str]]] = {"robust.train": _robust_train, "pipeline": _pipeline}
