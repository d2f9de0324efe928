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
import os
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.observe.events import event
from poise.observe.rows import Rows
from poise.spec.seeds import derive_seed
from poise.store.checkpoints import Commit
from poise.store.storage import scratch_folder
from poise.train.context import Context
from poise.train.optim import build_optimizer
from poise.train.parallel import average_statistics, batch_statistics, distribute
from poise.train.preemption import StopVote
from poise.train.restore import node_folder
from poise.train.schedule import factor
from poise.train.spec import TrainSpec
from poise.train.state import (
    Best,
    TrainState,
    capture_rng,
    load_state,
    load_window,
    restore_rng,
    save_state,
    save_window,
    seed_rng,
)
from poise.train.task import StepContext, Task, TaskState
from poise.train.telemetry import Telemetry

__all__ = ["EarlyStop", "FitResult", "fit"]

_ROWS_FILE = re.compile(r"metrics/rows-(\d+)\.parquet")


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
        self.window = _Window()
        self.sum_lr = 0.0
        self.stopped: EarlyStop | None = None
        self.vote = StopVote(context)
        self.committed_step: int | None = None
        self.provisional_step: int | None = None
        examples_per_epoch = task.examples_per_batch * task.batches_per_epoch * task.repeats
        self.telemetry = Telemetry(
            context,
            steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
            examples_per_step=round(examples_per_epoch / self.plan.steps),
            unit=task.unit,
        )
        self.timers = self.telemetry.timers

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
        if self.committed_step != self.state.step:
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
            alarm_event = event("alarm", step=self.state.step, what=result.alarm, **self._attempt())
            self.context.on_main(partial(self.context.run.append_events, [alarm_event]))
        return result.alarm if result.stop else None

    def _rollback(self, alarm: str) -> None:
        """Restore the newest checkpoint and end the run. A run that is started again raises the same alarm.

        The rows up to the alarm are written; no checkpoint is committed after them.
        """
        step = self.state.step
        self._log()
        self.context.on_main(partial(self._write_rows, step))
        if not self._load("restore"):
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
        """Rank 0 commits the state; the other ranks wait until the commit is complete."""
        with self.timers("report"):
            rngs = self.context.gather(capture_rng(self.context.device))
            windows = self.context.gather(self.window.tensors())
            self.context.on_main(partial(self._write, rngs, windows, provisional))
            self.rows.clear()
        self.committed_step = self.state.step

    def _write(self, rngs: list[dict[str, Tensor]], windows: list[dict[str, Tensor]], provisional: bool) -> None:
        """Write the rows, then the checkpoint. Rows count from the commit on: an interrupted one writes them again."""
        run = self.context.run
        state = self.state
        started = time.perf_counter()
        timing = Rows()
        timing.add(state.step, self._epoch(), "timing", self.telemetry.timing(state.step))
        self.context.check_lease()
        run.write_files(
            {
                f"metrics/rows-{state.step:08d}.parquet": self.rows.to_parquet(),
                f"metrics/timing-{state.step:08d}.parquet": timing.to_parquet(),
            }
        )
        with scratch_folder() as scratch:
            save_state(state, rngs, scratch)
            save_window(windows, scratch)
            run.checkpoints.commit(
                state.step,
                scratch,
                info={**self._info(), "provisional": provisional},
                appended=run.results.appended(),
                check_lease=self.context.check_lease,
            )
        if self.provisional_step is not None:
            run.checkpoints.remove(self.provisional_step)
        self.provisional_step = state.step if provisional else None
        run.checkpoints.prune(self.spec.checkpoint.keep, {state.best.step} if state.best else set())
        seconds = time.perf_counter() - started
        details: dict[str, object] = {"step": state.step, "seconds": round(seconds, 3), **self._attempt()}
        if provisional:
            details["provisional"] = True
        run.append_events([event("commit", **details)])
        self.telemetry.committed(state.step, seconds)

    def _write_rows(self, step: int) -> None:
        self.context.run.write(f"metrics/rows-{step:08d}.parquet", self.rows.to_parquet())

    def _info(self) -> dict[str, float | int | None]:
        best = self.state.best
        return {"world_size": self.context.world_size, "best_step": best.step if best else None, "seed": self.task.seed}

    def _resume(self) -> None:
        """Restore the newest valid checkpoint, if there is one, and the sum of learning rates."""
        if not self._load("start"):
            return
        if self.state.step > self.total:
            raise PoiseError(f"the run has {self.state.step} committed steps and the spec asks for {self.total}")
        for step in range(self.state.step):  # the order of additions of an uninterrupted run, for the same rounding
            self.sum_lr += self._rate(step)

    def _load(self, event_name: str) -> bool:
        """Restore the newest valid checkpoint and record an event of this name; False where there is no checkpoint."""
        pids = self.context.gather(os.getpid())
        with node_folder(self.context) as folder:
            commit = self.context.on_main(partial(self._fetch_latest, folder.path, event_name, pids))
            if commit is None:
                return False
            folder.fetch(commit, self.context)
            self.context.on_every_rank(partial(self._load_from, folder.path))
        return True

    def _load_from(self, folder: Path) -> None:
        """Restore the state, the window of metrics and the random generators of this rank from a checkpoint's files."""
        rank = self.context.rank
        device = self.context.device
        load_state(self.state, folder, device)
        self.window.fill(load_window(folder, rank, self.context.world_size, device))
        if not restore_rng(folder, rank, device):  # the checkpoint was written by fewer ranks
            seed_rng(self.task.seed, rank, self.state.step)

    def _fetch_latest(self, folder: Path, event_name: str, pids: list[int]) -> Commit | None:
        """Download the newest valid checkpoint into a folder, and record events of it and of each damaged one."""
        run = self.context.run
        commit, damages = run.checkpoints.latest_valid(folder)
        for damage in damages:
            self.context.sink.inc("poise_damaged_checkpoints_total", run=run.name)
            run.append_events([event("damaged", what=str(damage))])
        run.append_events([event(event_name, step=commit.step if commit else 0, pids=pids, **self._attempt())])
        if event_name == "start":
            self._empty_rows_after(commit.step if commit else 0)
        self.committed_step = self.provisional_step = None
        if commit is not None and run.checkpoints.info(commit).get("provisional"):
            self.provisional_step = commit.step
        return commit

    def _empty_rows_after(self, step: int) -> None:
        """Empty the files of rows of later steps than `step`, which this attempt takes again.

        An attempt that was interrupted within a commit left them. The next commit may be at another step, so that its
        file does not replace theirs. They are emptied, not removed: their records are in the log of results.
        """
        run = self.context.run
        matches = map(_ROWS_FILE.fullmatch, run.files("metrics/"))
        later = [match[0] for match in matches if match and int(match[1]) > step]
        if later:
            run.write_files(dict.fromkeys(later, Rows().to_parquet()))

    def _epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    def _attempt(self) -> dict[str, int]:
        return {"attempt": self.context.attempt, "workers": self.context.world_size}


class _Window:
    """Metrics of the steps since the last row. They stay on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        """The values by name, each (steps,), on the CPU."""
        return {name: torch.stack(values).cpu() for name, values in self.values.items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Restore the values that `tensors` returned."""
        self.values = {name: list(values.unbind()) for name, values in tensors.items()}

    def take(self, context: Context) -> dict[str, float]:
        """The means over the window and over all ranks; the window is empty afterwards."""
        if not self.values:
            return {}
        names = sorted(self.values)
        # (names,): one all-reduce and one copy to the host for all metrics
        means = torch.stack([torch.stack(self.values[name]).float().mean() for name in names])
        self.values = {}
        return dict(zip(names, context.mean(means).tolist(), strict=True))
