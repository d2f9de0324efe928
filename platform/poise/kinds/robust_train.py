"""`kind: robust.train`: adversarial training under one or several norms, measured under attack.

data -> model -> train.loop [attack under each threat -> objective -> loss] -> accuracy per norm and of their union
"""

from __future__ import annotations

import io
import json
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import nn

from poise.data.batches import Batches, Dataset, load, training_batches
from poise.errors import DamagedError
from poise.kinds.eigenspaces import eigenspaces
from poise.kinds.measure import described
from poise.kinds.robust_step import RobustStep
from poise.kinds.robust_watch import RobustWatch, attacked
from poise.kinds.specs.robust import RobustTrainSpec
from poise.kinds.trained import AVERAGED, classifier
from poise.observe.progress import Progress
from poise.observe.rows import Rows
from poise.robust.averaging import assign, reestimate
from poise.robust.evaluate import Evaluation
from poise.robust.spec import Threats
from poise.train.context import Context
from poise.train.loop import Fitted, fit
from poise.train.parallel import average_statistics, batch_statistics
from poise.train.restore import restore
from poise.train.task import Task, TaskState

__all__ = ["run"]


def run(spec: RobustTrainSpec, context: Context) -> None:
    """Train, then measure the best, the final and the averaged weights on the test split."""
    data = load(spec.data, spec.seed)
    model = classifier(spec, data).to(context.device)
    batches = training_batches(data, spec.data, spec.seed, context.rank, context.world_size, context.device)
    basis = context.together(partial(eigenspaces, spec.eigenspace, data.train)) if spec.eigenspace else None
    steps = RobustStep(spec, model, spec.steps_per_epoch(batches.steps_per_epoch), basis)
    fitted = fit(_task(spec, data, model, batches, steps, context), spec.train, context)
    _measure(spec, data, model, batches, steps.averaged(fitted.state, fitted.final_step), fitted, context)


def _task(
    spec: RobustTrainSpec, data: Dataset, model: nn.Module, batches: Batches, steps: RobustStep, context: Context
) -> Task:
    watch = RobustWatch(spec, data, model, context)
    state = steps.initial() | watch.initial()
    overfitting = spec.monitors.overfitting
    return Task(
        model=model,
        batch=batches.batch,
        step=steps.step,
        state={name: value.to(context.device) for name, value in state.items()},
        batches_per_epoch=batches.steps_per_epoch,
        repeats=spec.steps_per_batch,
        examples_per_batch=spec.data.batch_size,
        seed=spec.seed,
        evaluate=watch.validate if len(data.validation) else None,
        monitor="robust/union",
        after=steps.after,
        watch=partial(watch.watch, overfitting) if overfitting is not None else None,
    )


def _measure(
    spec: RobustTrainSpec,
    data: Dataset,
    model: nn.Module,
    batches: Batches,
    averaged: TaskState | None,
    fitted: Fitted,
    context: Context,
) -> None:
    """Attack the best, the final and the averaged weights on the test split; keep what each example withstood."""
    if context.leads:
        epochs, steps = fitted.epochs, fitted.final_step
        context.report(Progress(spec.name, "evaluate", epochs, epochs, steps, steps))
    threats = spec.evaluate.threats or spec.threats
    evaluations: dict[int, Evaluation] = {}
    accuracy: dict[str, dict[str, float]] = {}
    held_out: dict[str, dict[str, float]] = {}
    for label, step in {"final": fitted.final_step, "best": fitted.best_step}.items():
        if step not in evaluations and restore(model, step, context):
            evaluations[step] = attacked(spec, threats, model, data.test, context)
            held_out[label] = _held_out(spec, threats, model, data, context)
        if step in evaluations:
            accuracy[label] = evaluations[step].summary()
            held_out.setdefault(label, held_out.get("final", {}))
            context.together(partial(_keep_matrix, context, label, evaluations[step]))
    if not accuracy:
        raise DamagedError(
            f"{context.run.url}: no checkpoint could be measured, all are damaged; run again to mend them"
        )
    if averaged is not None:
        _become(model, averaged, batches, context)
        evaluation = attacked(spec, threats, model, data.test, context)
        accuracy["averaged"] = evaluation.summary()
        held_out["averaged"] = _held_out(spec, threats, model, data, context)
        context.together(partial(_keep_matrix, context, "averaged", evaluation))
    context.together(partial(_keep_summary, spec, data, model, fitted, accuracy, held_out, context))


def _held_out(
    spec: RobustTrainSpec, threats: Threats, model: nn.Module, data: Dataset, context: Context
) -> dict[str, float]:
    """Accuracies on the validation split under the attacks of the test, by which models can be chosen; {} unless asked.

    What a sweep chooses by must not be the test: the accuracy of the winner there would be the best of many draws.
    """
    return attacked(spec, threats, model, data.validation, context).summary() if spec.evaluate.validation else {}


def _become(model: nn.Module, averaged: TaskState, batches: Batches, context: Context) -> None:
    """Make `model` the averaged one, with batch-norm statistics of one clean epoch, and keep it as an artifact."""
    assign(model, averaged)
    reestimate(model, (batches.batch(index)[0] for index in range(batches.steps_per_epoch)))
    average_statistics(batch_statistics(model), context.world_size)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    context.together(lambda: context.run.write(AVERAGED, save(tensors)))


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
    held_out: dict[str, dict[str, float]],
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
        "examples": len(data.test.choose(spec.evaluate.examples)),
        "attacks": described(spec.evaluate.threats or spec.threats),
        "accuracy": accuracy,
        "validation": held_out if spec.evaluate.validation else {},
        "validation_examples": len(data.validation.select(slice(spec.evaluate.examples))),
        "best_minus_final": _difference(accuracy),
        "stopped": None if fitted.stopped is None else {"step": fitted.stopped.step, "why": fitted.stopped.why},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    rows = Rows()
    rows.add(fitted.best_step if selected == "best" else fitted.final_step, 0.0, "test", accuracy[selected])
    context.run.write("metrics/test.parquet", rows.to_parquet())
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())


def _difference(accuracy: dict[str, dict[str, float]]) -> dict[str, float]:
    """How much each accuracy of the best checkpoint exceeds that of the final one; empty when one is damaged."""
    best, final = accuracy.get("best", {}), accuracy.get("final", {})
    return {name: value - final[name] for name, value in best.items() if name in final}
