"""The training loop.

    for each optimizer step:
        for each batch of the step:  load data -> task.step (attack, loss) -> backward
        clip gradients, set the learning rate, optimizer step, average batch-norm statistics
        if an evaluation is due:  task.watch -> on an alarm, roll back to the newest checkpoint and end
                                  task.evaluate -> a new best?
        if due: write a row of metrics, commit a checkpoint
        if a signal asked for the end: commit and end

A step is a pure function of the committed state and of its number: batches, augmentation and attack noise are drawn
from (seed, step, rank). A run that was killed at any point and resumed from its last commit therefore ends with the
same bits as one that was not interrupted.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from poise.errors import PoiseError
from poise.observe.events import event
from poise.observe.rows import Rows
from poise.spec.seeds import derive_seed
from poise.train.commits import Commits
from poise.train.context import Context
from poise.train.optim import build_optimizer
from poise.train.parallel import average_statistics, batch_statistics, distribute
from poise.train.preemption import StopVote
from poise.train.schedule import factor
from poise.train.spec import TrainSpec
from poise.train.state import Best, TrainState, seed_rng
from poise.train.task import StepContext, Task, TaskState
from poise.train.telemetry import Telemetry
from poise.train.window import MetricWindow

__all__ = ["EarlyStop", "FitResult", "fit"]


@dataclass(frozen=True)
class EarlyStop:
    """The alarm that ended a run: the step at which it was raised, and the reason in words."""

    step: int
    why: str


@dataclass(frozen=True)
class FitResult:
    """The result of a finished run: its last step, the step of its best evaluation, and its length in epochs.

    `state` is the state of the task at the last step. A run that an alarm ended was rolled back to a checkpoint, so its
    last step is before the step of the alarm.
    """

    final_step: int
    best_step: int
    epochs: float
    stopped: EarlyStop | None = None
    state: TaskState = field(default_factory=dict, compare=False)


def fit(task: Task, spec: TrainSpec, context: Context) -> FitResult:
    """Train `task` to the end of `spec`, from the newest valid checkpoint of the run if there is one.

    Raises:
        PoiseError: the loss is not finite.
        StoreError: the store fails.
        RunBusyError: another driver has taken over the run.
        PreemptedError: a signal asked for the end. As with every error, commits so far remain.
    """
    return _Loop(task, spec, context).run()


class _Loop:
    def __init__(self, task: Task, spec: TrainSpec, context: Context) -> None:
        self.task = task
        self.spec = spec
        self.context = context
        self.plan = spec.plan(task.batches_per_epoch, task.repeats)
        self.steps_per_epoch = self.plan.steps
        self.total = spec.total_steps(self.steps_per_epoch)
        self.evaluate_every = spec.evaluate_every.in_steps(self.steps_per_epoch)
        self.commit_every = spec.checkpoint.every.in_steps(self.steps_per_epoch)
        self.state = TrainState(task.model, build_optimizer(spec.optimizer, task.model), task.state)
        self.parameters = [parameter for group in self.state.optimizer.param_groups for parameter in group["params"]]
        self.generator = torch.Generator(context.device)
        self.rows = Rows()  # since the last commit
        self.window = MetricWindow()
        self.sum_lr = 0.0
        self.stopped: EarlyStop | None = None
        self.vote = StopVote(context)
        examples_per_epoch = task.examples_per_batch * task.batches_per_epoch * task.repeats
        self.telemetry = Telemetry(
            context,
            steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
            examples_per_step=round(examples_per_epoch / self.plan.steps),
            unit=task.unit,
        )
        self.timers = self.telemetry.timers
        self.commits = Commits(
            self.state, self.rows, self.window, context, self.telemetry, seed=task.seed, keep=spec.checkpoint.keep
        )

    def run(self) -> FitResult:
        seed_rng(self.task.seed, self.context.rank)
        self._resume()
        self.statistics = batch_statistics(self.task.model)
        self.model = distribute(self.task.model, self.context)
        self.telemetry.begin(self.state.step)
        self.vote.begin(self.state.step)
        self.task.model.train()
        with self.context.stop.deferred():
            while self.state.step < self.total and not self.stopped:
                self._step()
                self._after_step()
                self._end_if_asked()
        last_step = self.state.step
        best_step = self.state.best.step if self.state.best else last_step
        return FitResult(last_step, best_step, self._epoch(), self.stopped, self.state.task)

    def _step(self) -> None:
        """One optimizer step on the mean gradient of its batches."""
        step_context = self._step_context()
        batches = self.plan.of_step(self.state.step)
        for index in batches:
            with self.timers("data"):
                batch = self.task.batch(index)
            with self.timers("forward_backward"), self._no_sync(last=index == batches[-1]), self._autocast():
                loss, metrics, self.state.task = self.task.step(self.model, batch, self.state.task, step_context)
                scaled = loss if len(batches) == 1 else loss / len(batches)
                scaled.backward()  # type: ignore[no-untyped-call]
            self.window.add("loss", loss.detach())
            for name, value in metrics.items():
                self.window.add(name, value.to(loss.device))
        with self.timers("optim"):
            self._optimizer_step()

    def _step_context(self) -> StepContext:
        step = self.state.step
        self.generator.manual_seed(derive_seed(self.task.seed, "step", step, self.context.rank))
        epoch, offset = divmod(step, self.steps_per_epoch)
        return StepContext(step, epoch, offset == 0, self.generator, self.timers, self.context.mean)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.spec.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.context.device.type, dtype=torch.bfloat16)

    def _no_sync(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients are averaged over the ranks in the last backward pass of a step only."""
        return nullcontext() if last or self.context.world_size == 1 else self.model.no_sync()  # type: ignore[operator]

    def _optimizer_step(self) -> None:
        optimizer = self.state.optimizer
        if self.spec.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.spec.clip_norm)
            self.window.add("grad_norm", norm)
        rate = self._rate(self.state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.sum_lr += rate
        for parameter in self.parameters:  # as optimizer.zero_grad, without its profiling hooks
            parameter.grad = None
        average_statistics(self.statistics, self.context.world_size)
        self.state.step += 1
        if self.task.after is not None:
            self.state.task = self.task.after(self.state.task, self.state.step)

    def _rate(self, step: int) -> float:
        return self.spec.optimizer.lr * factor(self.spec.schedule, step, self.total)

    def _after_step(self) -> None:
        """Watch, evaluate, log and commit, as far as each is due after this step. The last step does all of them."""
        step = self.state.step
        is_last = step == self.total
        evaluation_due = step % self.evaluate_every == 0 or is_last
        if evaluation_due and (alarm := self._watch()):
            self._rollback(alarm)
            return
        new_best = self._evaluate() if evaluation_due else False
        commit_due = step % self.commit_every == 0 or is_last or new_best
        if step % self.spec.log_every == 0 or commit_due:
            self._log()
        if commit_due:
            self._commit()

    def _end_if_asked(self) -> None:
        """Commit this step and raise PreemptedError if any rank was asked to end.

        This commit is provisional: the next one replaces it. The window of metrics is stored in it and not written as a
        row, so that the resumed run writes its rows at the same steps as an uninterrupted one.
        """
        if self.stopped or not self.vote.ask(self.state.step):
            return
        if self.commits.last_step != self.state.step:
            self._commit(provisional=True)
        raise self.context.stop.error(f"{self.context.run.name}: stopped and committed at step {self.state.step}")

    def _watch(self) -> str | None:
        """Call the monitor of the task; the alarm that ends the run, or None."""
        if self.task.watch is None:
            return None
        result = self.task.watch(self.state.task)
        self.state.task = result.state
        self.rows.add(self.state.step, self._epoch(), "train", result.metrics)
        if result.alarm:
            alarm_event = event("alarm", step=self.state.step, what=result.alarm, **self.context.attempt_fields())
            self.context.on_main(partial(self.context.run.append_events, [alarm_event]))
        return result.alarm if result.stop else None

    def _rollback(self, alarm: str) -> None:
        """Restore the newest checkpoint and end the run. A run that is started again raises the same alarm.

        The rows up to the alarm are written; no checkpoint is committed after them.
        """
        step = self.state.step
        self._log()
        self.commits.write_rows(step)
        if not self.commits.restore("restore"):
            raise PoiseError(f"{alarm}, at step {step}, and no checkpoint is older: commit more often")
        self.stopped = EarlyStop(step, alarm)

    def _evaluate(self) -> bool:
        """Evaluate on held-out data; True when the result is the best so far."""
        if self.task.evaluate is None:
            return False
        started = time.perf_counter()
        metrics = self.task.evaluate()
        self.context.sink.observe("poise_evaluation_seconds", time.perf_counter() - started, run=self.context.run.name)
        self.rows.add(self.state.step, self._epoch(), "validation", metrics)
        self.telemetry.evaluated(self.state.step, metrics)
        sign = -1 if self.task.monitor.startswith("-") else 1
        value = metrics[self.task.monitor.removeprefix("-")] * sign
        if self.state.best is not None and value <= self.state.best.value:
            return False
        self.state.best = Best(value, self.state.step)
        return True

    def _log(self) -> None:
        """Make one row of the metrics since the last row, and publish it; PoiseError when the loss is not finite."""
        metrics = self.window.take(self.context)
        if not metrics:
            return
        if not math.isfinite(metrics["loss"]):
            raise PoiseError(
                f"the loss is {metrics['loss']} in the {self.spec.log_every} steps up to step {self.state.step}: lower "
                "train.optimizer.lr, set train.clip_norm or use train.precision fp32; what was committed before is kept"
            )
        metrics |= {"lr": float(self.state.optimizer.param_groups[0]["lr"]), "sum_lr": self.sum_lr}
        self.rows.add(self.state.step, self._epoch(), "train", metrics)
        self.telemetry.publish(self.state.step, metrics)

    def _commit(self, *, provisional: bool = False) -> None:
        with self.timers("report"):
            self.commits.write(self._epoch(), provisional=provisional)

    def _resume(self) -> None:
        """Restore the newest valid checkpoint, if there is one, and the sum of learning rates."""
        if not self.commits.restore("start"):
            return
        if self.state.step > self.total:
            raise PoiseError(f"the run has {self.state.step} committed steps and the spec asks for {self.total}")
        for step in range(self.state.step):  # the order of additions of an uninterrupted run, for the same rounding
            self.sum_lr += self._rate(step)

    def _epoch(self) -> float:
        return self.state.step / self.steps_per_epoch
