"""`kind: robust.train`: adversarial training under one or several norms, measured under attack.

data -> model -> train.loop [attack under each threat -> objective -> loss] -> accuracy per norm and of their union
"""

from __future__ import annotations

from functools import partial

from safetensors.torch import save
from torch import nn

from poise.data.images.batches import (
    Batches,
    Dataset,
    load,
    training_batches,
)
from poise.errors import IntegrityError
from poise.kinds.common.attack_description import describe_threats
from poise.kinds.common.eigenspaces import eigenspaces
from poise.kinds.common.robust_accuracy import columns_of, matrix_to_parquet
from poise.kinds.common.trained_classifier import AVERAGED, classifier
from poise.kinds.robust_train.monitors import RobustMonitor, attacked, measured
from poise.kinds.robust_train.result import EarlyStopResult, RobustTrainResult
from poise.kinds.robust_train.spec import RobustTrainSpec
from poise.kinds.robust_train.step import RobustStep
from poise.models.sizes import count_parameters
from poise.observe.progress import Progress
from poise.observe.rows import Rows
from poise.robust.evaluate import Evaluation
from poise.robust.spec import Threats
from poise.robust.training.averaging import assign, update_bn
from poise.store.result import write_result
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.parallel import average_statistics, batch_statistics
from poise.train.restore import restore
from poise.train.task import Task, TaskState

__all__ = ["run"]


def run(spec: RobustTrainSpec, context: Context) -> None:
    """Train, then measure the best, the final and the averaged weights on the test split."""
    data = load(spec.data, spec.seed)
    model = classifier(spec, data).to(context.device)
    batches = training_batches(data, spec.data, spec.seed, context.rank, context.world_size, context.device)
    basis = context.on_main(partial(eigenspaces, spec.eigenspace, data.train)) if spec.eigenspace else None
    robust_step = RobustStep(spec, model, spec.steps_per_epoch(batches.steps_per_epoch), basis)
    fitted = fit(_task(spec, data, model, batches, robust_step, context), spec.train, context)
    averaged = robust_step.averaged(fitted.state, fitted.final_step)
    _evaluate_checkpoints(spec, data, model, batches, averaged, fitted, context)


def _task(
    spec: RobustTrainSpec, data: Dataset, model: nn.Module, batches: Batches, robust_step: RobustStep, context: Context
) -> Task:
    """The task of the training loop."""
    monitor = RobustMonitor(spec, data, model, context)
    state = robust_step.initial() | monitor.initial()
    overfitting = spec.monitors.overfitting
    return Task(
        model=model,
        batch=batches.batch,
        step=robust_step.step,
        state={name: value.to(context.device) for name, value in state.items()},
        batches_per_epoch=batches.steps_per_epoch,
        repeats=spec.steps_per_batch,
        examples_per_batch=spec.data.batch_size,
        seed=spec.seed,
        evaluate=monitor.validate if len(data.validation) else None,
        monitor="robust/union",
        after=robust_step.after,
        watch=partial(monitor.watch, overfitting) if overfitting is not None else None,
    )


def _evaluate_checkpoints(
    spec: RobustTrainSpec,
    data: Dataset,
    model: nn.Module,
    batches: Batches,
    averaged: TaskState | None,
    fitted: FitResult,
    context: Context,
) -> None:
    """Attack the best, the final and the averaged weights on the test split; write matrices, metrics and the result."""
    if context.is_main:
        epochs = fitted.epochs
        steps = fitted.final_step
        context.report(Progress(spec.name, "evaluate", epochs, epochs, steps, steps))
    threats = spec.evaluate.threats or spec.threats
    evaluations: dict[int, Evaluation] = {}  # by step: the best checkpoint is often the final one
    accuracy: dict[str, dict[str, float]] = {}
    validation: dict[str, dict[str, float]] = {}
    extra_metrics: dict[str, dict[str, float]] = {}
    for label, step in {"final": fitted.final_step, "best": fitted.best_step}.items():
        if step not in evaluations and restore(model, step, context):
            evaluations[step] = attacked(spec, threats, model, data.test, context)
            validation[label] = _validation_accuracy(spec, threats, model, data, context)
            extra_metrics[label] = measured(spec, model, data.test, context)
        if step in evaluations:
            accuracy[label] = evaluations[step].summary()
            validation.setdefault(label, validation.get("final", {}))
            extra_metrics.setdefault(label, extra_metrics.get("final", {}))
            context.on_main(partial(_write_matrix, context, label, evaluations[step]))
    if not accuracy:
        raise IntegrityError(
            f"{context.run.url}: no checkpoint could be measured, all are damaged; run again to mend them"
        )
    if averaged is not None:
        _load_averaged(model, averaged, batches, context)
        evaluation = attacked(spec, threats, model, data.test, context)
        accuracy["averaged"] = evaluation.summary()
        validation["averaged"] = _validation_accuracy(spec, threats, model, data, context)
        extra_metrics["averaged"] = measured(spec, model, data.test, context)
        context.on_main(partial(_write_matrix, context, "averaged", evaluation))
    context.on_main(partial(_write_results, spec, data, model, fitted, accuracy, validation, extra_metrics, context))


def _validation_accuracy(
    spec: RobustTrainSpec, threats: Threats, model: nn.Module, data: Dataset, context: Context
) -> dict[str, float]:
    """Accuracies on the validation split under the attacks of the test; {} unless the spec asks for them.

    A sweep chooses models by these. If it chose by the test split, the test accuracy of the best trial would be biased
    upwards, as the best of many draws.
    """
    if not spec.evaluate.validation:
        return {}
    return attacked(spec, threats, model, data.validation, context).summary()


def _load_averaged(model: nn.Module, averaged: TaskState, batches: Batches, context: Context) -> None:
    """Load averaged parameters, estimate batch-norm statistics on one clean epoch, and write them as an artifact."""
    assign(model, averaged)
    images = (batches.batch(index)[0] for index in range(batches.steps_per_epoch))
    update_bn(model, images)
    average_statistics(batch_statistics(model), context.world_size)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    context.on_main(lambda: context.run.write(AVERAGED, save(tensors)))


def _write_matrix(context: Context, label: str, evaluation: Evaluation) -> None:
    """Write the boolean matrix [n, attacks] as Parquet: a row per example of the test split, in its order."""
    context.run.write(f"artifacts/evaluation-{label}.parquet", matrix_to_parquet(columns_of(evaluation)))


def _write_results(
    spec: RobustTrainSpec,
    data: Dataset,
    model: nn.Module,
    fitted: FitResult,
    accuracy: dict[str, dict[str, float]],
    validation: dict[str, dict[str, float]],
    extra_metrics: dict[str, dict[str, float]],
    context: Context,
) -> None:
    """On rank 0: write the metrics of the selected checkpoint, and the result."""
    selected = "best" if "best" in accuracy else "final"
    selected_step = fitted.best_step if selected == "best" else fitted.final_step
    stopped = fitted.stopped
    result = RobustTrainResult(
        run=spec.name,
        seed=spec.seed,
        objective=spec.objective.name,
        step=fitted.final_step,
        best_step=fitted.best_step,
        selected=selected,
        num_examples=len(data.test.choose(spec.evaluate.num_examples)),
        attacks=describe_threats(spec.evaluate.threats or spec.threats),
        accuracy=accuracy,
        validation=validation if spec.evaluate.validation else {},
        num_validation_examples=len(data.validation.select(slice(spec.evaluate.num_examples))),
        extra_metrics=extra_metrics if spec.evaluate.extra_metrics else {},
        best_minus_final=_difference(accuracy),
        stopped=None if stopped is None else EarlyStopResult(step=stopped.step, why=stopped.why),
        parameters=count_parameters(model),
    )
    rows = Rows()
    rows.add(selected_step, 0.0, "test", accuracy[selected] | extra_metrics[selected])
    context.run.write("metrics/test.parquet", rows.to_parquet())
    write_result(context.run, result)


def _difference(accuracy: dict[str, dict[str, float]]) -> dict[str, float]:
    """The accuracies of the best checkpoint minus those of the final one; empty when one is damaged."""
    best = accuracy.get("best", {})
    final = accuracy.get("final", {})
    return {name: value - final[name] for name, value in best.items() if name in final}
