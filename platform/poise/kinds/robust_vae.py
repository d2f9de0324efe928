"""`kind: robust.vae`: a conditional variational autoencoder, measured by the evidence lower bound of held-out images.

data -> encoder -> noise -> decoder -> train.loop -> ELBO of the test split
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
import yaml
from torch import Tensor, nn

from poise.data.batches import Dataset, load, training_batches
from poise.data.sets import ImageSet, unit_pixels
from poise.errors import DamagedError, UserError
from poise.kinds.specs.manifold import RobustVaeSpec
from poise.models.vae import ConditionalVae, build_vae
from poise.observe.rows import Rows
from poise.robust.manifold import elbo_parts
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.store.inputs import check_inputs
from poise.store.runs import open_run
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.loop import Fitted, fit
from poise.train.restore import restore
from poise.train.state import load_weights
from poise.train.task import StepOutput, Task, TaskState, Turn

__all__ = ["open_vae", "run"]

_AT_ONCE = 1024


def run(spec: RobustVaeSpec, context: Context) -> None:
    """Train, then measure the best weights, or the final ones, on the test split."""
    data = load(spec.data, spec.seed)
    model = _model(spec, data).to(context.device)
    fitted = fit(_task(spec, data, model, context), spec.train, context)
    for selected, step in {"best": fitted.best_step, "final": fitted.final_step}.items():
        if restore(model, step, context):
            measured = held_out(model, data.test, spec.seed, context)
            context.together(partial(_keep, spec, model, fitted, selected, measured, context))
            return
    raise DamagedError(f"{context.run.url}: no checkpoint could be measured, all are damaged; run again to mend them")


def open_vae(store: str, name: str, device: torch.device) -> tuple[ConditionalVae, Dataset]:
    """The selected weights of a finished run, in eval mode, and its data.

    Raises:
        UserError: no such run, no result yet, or of another kind. DamagedError: its checkpoint is not whole.
    """
    run = open_run(store, name, must_exist=True)
    try:
        summary = json.loads(run.read("artifacts/summary.json"))
    except FileNotFoundError:
        raise UserError(f"run {name!r} in {run.storage.url} has no result yet: run it to its end first") from None
    if summary["kind"] != "robust.vae":
        raise UserError(f"run {name!r} is a {summary['kind']} and trains no autoencoder; name a robust.vae")
    spec = RobustVaeSpec.model_validate(yaml.safe_load(run.read("spec.yaml")))
    check_inputs(run, spec)
    data = load(spec.data, spec.seed)
    model = _model(spec, data).to(device)
    with scratch_folder() as scratch:
        step = summary["best_step" if summary["selected"] == "best" else "step"]
        load_weights(model, run.checkpoints.fetch(run.checkpoints.at(step), scratch / "checkpoint"), device)
    return model.eval(), data


@torch.no_grad()
def held_out(model: ConditionalVae, images: ImageSet, seed: int, context: Context) -> dict[str, float]:
    """Means per image over a split, in nats: "elbo", and what it loses, "reconstruction" and "kl"; "error" is the mean
    square of the pixels of the reconstruction from the mean code. Noise follows from `seed` and the index alone.
    """
    mine = torch.arange(context.rank, len(images), context.world_size)
    totals = torch.zeros(3, dtype=torch.float64)
    for rows in torch.split(mine, _AT_ONCE):
        part = images.select(rows)
        x, y = unit_pixels(part.images.to(context.device)), part.labels.to(context.device)
        noise = Noise.of(seed, "elbo", rows, context.device).normal(model.latent)
        density, kl = elbo_parts(x, *model(x, y, noise))
        error = (model.images(model.code(x, y)) - x).square().flatten(1).mean(1)
        totals += torch.stack([part.double().sum() for part in (density, kl, error)]).cpu()
    density, kl, error = (sum(context.gather(totals), torch.zeros_like(totals)) / len(images)).tolist()
    return {"elbo": -density - kl, "reconstruction": density, "kl": kl, "error": error}


def _model(spec: RobustVaeSpec, data: Dataset) -> ConditionalVae:
    return build_vae(spec.model, shape=data.shape, classes=data.classes, seed=derive_seed(spec.seed, "model"))


def _task(spec: RobustVaeSpec, data: Dataset, model: ConditionalVae, context: Context) -> Task:
    batches = training_batches(data, spec.data, spec.seed, context.rank, context.world_size, context.device)
    return Task(
        model=model,
        batch=batches.batch,
        step=_step(spec.model.latent),
        batches_per_epoch=batches.steps_per_epoch,
        examples_per_batch=spec.data.batch_size,
        seed=spec.seed,
        evaluate=partial(held_out, model, data.validation, spec.seed, context) if len(data.validation) else None,
        monitor="elbo",
    )


def _step(latent: int) -> Callable[[nn.Module, tuple[Tensor, Tensor], TaskState, Turn], StepOutput]:
    """One step on minus the ELBO, with one draw of each code."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor], state: TaskState, turn: Turn) -> StepOutput:
        x, y = batch
        noise = torch.randn(len(x), latent, generator=turn.generator, device=x.device)
        density, kl = (part.mean() for part in elbo_parts(x, *model(x, y, noise)))
        loss = density + kl
        return StepOutput(loss, {"elbo": -loss.detach(), "reconstruction": density.detach(), "kl": kl.detach()}, state)

    return step


def _keep(
    spec: RobustVaeSpec, model: nn.Module, fitted: Fitted, selected: str, measured: dict[str, float], context: Context
) -> None:
    step = fitted.best_step if selected == "best" else fitted.final_step
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "objective": f"ELBO, {spec.model.latent} latent coordinates",
        "step": fitted.final_step,
        "best_step": fitted.best_step,
        "selected": selected,
        "split": "test",
        "measured": measured,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    rows = Rows()
    rows.add(step, 0.0, "test", measured)
    context.run.write("metrics/test.parquet", rows.to_parquet())
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())
