"""`kind: robust.vae`: a conditional variational autoencoder, measured by the evidence lower bound of held-out images.

data -> encoder -> noise -> decoder -> train.loop -> ELBO of the test split
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from poise.data.images.batches import Dataset, load, training_batches
from poise.data.images.datasets import ImageSet, to_float
from poise.errors import IntegrityError
from poise.kinds.common.finished_run import open_finished
from poise.kinds.robust_vae.result import RobustVaeResult
from poise.kinds.robust_vae.spec import RobustVaeSpec
from poise.models.sizes import count_parameters
from poise.models.vae import ConditionalVae, build_vae
from poise.observe.rows import Rows
from poise.robust.manifold import elbo_parts
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.store.result import write_result
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.restore import load_checkpoint, restore
from poise.train.task import StepContext, StepOutput, Task, TaskState

__all__ = ["open_vae", "run"]

_EVALUATION_BATCH = 1024


def run(spec: RobustVaeSpec, context: Context) -> None:
    """Train, then measure the best weights, or where they are damaged the final ones, on the test split."""
    data = load(spec.data, spec.seed)
    model = _build(spec, data).to(context.device)
    fitted = fit(_task(spec, data, model, context), spec.train, context)
    for selected, step in {"best": fitted.best_step, "final": fitted.final_step}.items():
        if restore(model, step, context):
            measured = held_out(model, data.test, spec.seed, context)
            context.on_main(partial(_write_results, spec, model, fitted, selected, measured, context))
            return
    raise IntegrityError(f"{context.run.url}: no checkpoint could be measured, all are damaged; run again to mend them")


def open_vae(store: str, name: str, device: torch.device) -> tuple[ConditionalVae, Dataset]:
    """The selected weights of a finished run, in eval mode, and its data.

    Raises:
        UserError: no such run, one without a result, or one of another kind.
        IntegrityError: its checkpoint is damaged.
    """
    finished = open_finished(store, name, RobustVaeSpec, RobustVaeResult, unchanged_inputs=True)
    data = load(finished.spec.data, finished.spec.seed)
    model = _build(finished.spec, data).to(device)
    step = finished.result.step_of(finished.result.selected)
    load_checkpoint(model, finished.run, step, device)
    return model.eval(), data


@torch.no_grad()
def held_out(model: ConditionalVae, images: ImageSet, seed: int, context: Context) -> dict[str, float]:
    """Means per image over a split, on every rank: "elbo" = -"reconstruction" - "kl" in nats, and "error".

    "error" is the mean squared pixel difference between the image and its reconstruction from the mean code. The noise
    of an image follows from `seed` and its index alone.
    """
    shard = torch.tensor(context.shard(len(images)), dtype=torch.int64)
    totals = torch.zeros(3, dtype=torch.float64)  # reconstruction, KL, error
    for rows in torch.split(shard, _EVALUATION_BATCH):
        batch = images.select(rows)
        x = to_float(batch.images.to(context.device))  # (B, C, H, W)
        y = batch.labels.to(context.device)  # (B,)
        noise = Noise.of(seed, "elbo", rows, context.device).normal(model.latent)  # (B, latent)
        reconstruction, kl = elbo_parts(x, *model(x, y, noise))  # (B,) each
        error = (model.images(model.code(x, y)) - x).square().flatten(1).mean(1)  # (B,)
        totals += torch.stack([values.double().sum() for values in (reconstruction, kl, error)]).cpu()
    all_totals = sum(context.gather(totals), torch.zeros_like(totals))
    mean_reconstruction, mean_kl, mean_error = (all_totals / len(images)).tolist()
    return {
        "elbo": -mean_reconstruction - mean_kl,
        "reconstruction": mean_reconstruction,
        "kl": mean_kl,
        "error": mean_error,
    }


def _build(spec: RobustVaeSpec, data: Dataset) -> ConditionalVae:
    return build_vae(spec.model, shape=data.shape, classes=data.classes, seed=derive_seed(spec.seed, "model"))


def _task(spec: RobustVaeSpec, data: Dataset, model: ConditionalVae, context: Context) -> Task:
    batches = training_batches(data, spec.data, spec.seed, context.rank, context.world_size, context.device)
    evaluate = None
    if len(data.validation):
        evaluate = partial(held_out, model, data.validation, spec.seed, context)
    return Task(
        model=model,
        batch=batches.batch,
        step=_step(spec.model.latent),
        batches_per_epoch=batches.steps_per_epoch,
        examples_per_batch=spec.data.batch_size,
        seed=spec.seed,
        evaluate=evaluate,
        monitor="elbo",
    )


def _step(latent: int) -> Callable[[nn.Module, tuple[Tensor, Tensor], TaskState, StepContext], StepOutput]:
    """The step function: the loss is minus the ELBO, with one draw of the code of each image."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor], state: TaskState, step_context: StepContext) -> StepOutput:
        x, y = batch
        noise = torch.randn(len(x), latent, generator=step_context.generator, device=x.device)
        reconstruction, kl = (values.mean() for values in elbo_parts(x, *model(x, y, noise)))
        loss = reconstruction + kl
        metrics = {"elbo": -loss.detach(), "reconstruction": reconstruction.detach(), "kl": kl.detach()}
        return StepOutput(loss, metrics, state)

    return step


def _write_results(
    spec: RobustVaeSpec,
    model: nn.Module,
    fitted: FitResult,
    selected: str,
    measured: dict[str, float],
    context: Context,
) -> None:
    """On rank 0: write the metrics of the selected checkpoint, and the result."""
    step = fitted.best_step if selected == "best" else fitted.final_step
    result = RobustVaeResult(
        run=spec.name,
        seed=spec.seed,
        objective=f"ELBO, {spec.model.latent} latent coordinates",
        step=fitted.final_step,
        best_step=fitted.best_step,
        selected=selected,
        measured=measured,
        parameters=count_parameters(model),
    )
    rows = Rows()
    rows.add(step, 0.0, "test", measured)
    context.run.write("metrics/test.parquet", rows.to_parquet())
    write_result(context.run, result)
