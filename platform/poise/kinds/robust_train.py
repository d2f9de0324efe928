"""`kind: robust.train`: adversarial training under one or several norms, measured under attack.

data -> model -> train.loop [attack under each threat -> objective -> loss] -> accuracy per norm and of their union
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor, nn

from poise.data.batches import Batches, Dataset, load
from poise.data.sets import ImageSet
from poise.errors import DamagedError
from poise.kinds.measure import described, robust_accuracy
from poise.kinds.specs.robust import RobustTrainSpec
from poise.kinds.trained import classifier
from poise.observe.progress import Progress
from poise.observe.rows import Rows
from poise.robust.attacks import PERTURB, Loss, cross_entropy
from poise.robust.evaluate import Evaluation
from poise.robust.objectives import OBJECTIVES, Play, initial_state
from poise.robust.spec import Threats, ThreatSpec
from poise.robust.threats import Threat
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.loop import Fitted, fit
from poise.train.restore import restore
from poise.train.task import StepOutput, Task, TaskState, Turn

__all__ = ["run"]

_Batch = tuple[Tensor, Tensor]


def run(spec: RobustTrainSpec, context: Context) -> None:
    """Train, then measure the best and the final checkpoint on the test split."""
    data = load(spec.data, spec.seed)
    model = classifier(spec, data).to(context.device)
    fitted = fit(_task(spec, data, model, context), spec.train, context)
    _measure(spec, data, model, fitted, context)


def _task(spec: RobustTrainSpec, data: Dataset, model: nn.Module, context: Context) -> Task:
    batches = Batches(
        data.train.images,
        data.train.labels,
        batch_size=spec.data.batch_size,
        seed=spec.seed,
        pad=spec.data.pad,
        pad_mode=spec.data.pad_mode,
        flip=spec.data.flip,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        resident=spec.data.device_resident,
    )
    state = initial_state(spec.objective, spec.threats.keys())
    return Task(
        model=model,
        batch=batches.batch,
        step=_step(spec),
        state={name: value.to(context.device) for name, value in state.items()},
        batches_per_epoch=batches.steps_per_epoch,
        examples_per_batch=spec.data.batch_size,
        seed=spec.seed,
        evaluate=partial(_validate, spec, model, data.validation, context) if len(data.validation) else None,
        monitor="robust/union",
    )


def _step(spec: RobustTrainSpec) -> Callable[[nn.Module, _Batch, TaskState, Turn], StepOutput]:
    """One step: the objective at the adversarial examples of every threat."""
    objective = OBJECTIVES[spec.objective.name]

    def step(model: nn.Module, batch: _Batch, state: TaskState, turn: Turn) -> StepOutput:
        play = Play(
            attacks={norm: _Attack(Threat(norm, each.eps), each, turn) for norm, each in spec.threats.items()},
            options=spec.objective,
            state=state,
            step=turn.step,
            epoch=turn.epoch,
            first_in_epoch=turn.first_in_epoch,
            draw=random.Random(derive_seed(spec.seed, "draw", turn.step)).random(),
            mean=turn.mean,
            noise=turn.generator,
        )
        outcome = objective(model, *batch, play)
        return StepOutput(outcome.loss, outcome.metrics, outcome.state)

    return step


@dataclass(frozen=True)
class _Attack:
    """An attack of one step: its noise is that of the step, its time is charged to the attack phase."""

    threat: Threat
    spec: ThreatSpec
    turn: Turn

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss = cross_entropy, **options: Any) -> Tensor:
        with self.turn.timers("attack"):
            perturb, bound = PERTURB[self.spec.attack], {**self.spec.options(), **options}
            return perturb(model, x, y, self.threat, loss=loss, noise=self.turn.generator, **bound)


def _validate(spec: RobustTrainSpec, model: nn.Module, images: ImageSet, context: Context) -> dict[str, float]:
    """What picks the best checkpoint: robustness to the threats of training, those of the test may be others."""
    return _evaluate(spec, spec.threats, model, images, context).summary()


def _evaluate(
    spec: RobustTrainSpec, threats: Threats, model: nn.Module, images: ImageSet, context: Context
) -> Evaluation:
    seed = derive_seed(spec.seed, "evaluate")
    chosen = images.select(slice(spec.evaluate.examples))
    return robust_accuracy(model, chosen, threats, batch_size=spec.evaluate.batch_size, seed=seed, context=context)


def _measure(spec: RobustTrainSpec, data: Dataset, model: nn.Module, fitted: Fitted, context: Context) -> None:
    """Attack the best and the final weights on the test split; keep what each example withstood."""
    if context.leads:
        epochs, steps = fitted.epochs, fitted.final_step
        context.report(Progress(spec.name, "evaluate", epochs, epochs, steps, steps))
    threats = spec.evaluate.threats or spec.threats
    evaluations: dict[int, Evaluation] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for label, step in {"final": fitted.final_step, "best": fitted.best_step}.items():
        if step not in evaluations and restore(model, step, context):
            evaluations[step] = _evaluate(spec, threats, model, data.test, context)
        if step in evaluations:
            accuracy[label] = evaluations[step].summary()
            context.together(partial(_keep_matrix, context, label, evaluations[step]))
    if not accuracy:
        raise DamagedError(
            f"{context.run.url}: no checkpoint could be measured, all are damaged; run again to mend them"
        )
    context.together(partial(_keep_summary, spec, data, model, fitted, accuracy, context))


def _keep_matrix(context: Context, label: str, evaluation: Evaluation) -> None:
    """The boolean matrix [n, attacks] as Parquet: a row per example of the test split, in its order."""
    columns = {name: evaluation.correct[:, index].numpy() for index, name in enumerate(evaluation.names)}
    sink = io.BytesIO()
    pq.write_table(pa.table({"example": pa.array(range(len(evaluation.correct))), **columns}), sink)
    context.run.write(f"artifacts/evaluation-{label}.parquet", sink.getvalue())


def _keep_summary(
    spec: RobustTrainSpec,
    data: Dataset,
    model: nn.Module,
    fitted: Fitted,
    accuracy: dict[str, dict[str, float]],
    context: Context,
) -> None:
    selected = "best" if "best" in accuracy else "final"
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "objective": spec.objective.name,
        "step": fitted.final_step,
        "best_step": fitted.best_step,
        "selected": selected,
        "split": "test",
        "examples": len(data.test.select(slice(spec.evaluate.examples))),
        "attacks": described(spec.evaluate.threats or spec.threats),
        "accuracy": accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    rows = Rows()
    rows.add(fitted.best_step if selected == "best" else fitted.final_step, 0.0, "test", accuracy[selected])
    context.run.write("metrics/test.parquet", rows.to_parquet())
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())
