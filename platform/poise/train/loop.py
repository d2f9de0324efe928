"""The one training loop.

    for each optimizer step:
        for each of its batches:  data -> the task's step (attack, loss) -> backward
        clip, schedule, optimizer, statistics
        watch? -> alarm: end at the newest checkpoint    evaluate? -> new best?    log?    commit?
        asked to end? -> commit, and end

A step is a pure function of the committed state and of its number: batches, augmentation and attack noise are drawn
from (seed, step, rank). So a run that was killed anywhere and goes on from its last commit ends in the same bits.
"""

from __future__ import annotations

import math
import os
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
from poise.train.task import Task, TaskState, Turn
from poise.train.telemetry import Telemetry

__all__ = ["Fitted", "Stopped", "fit"]


@dataclass(frozen=True)
class Stopped:
    """An alarm that has ended a run: at which step it came, and in words why."""

    step: int
    why: str


@dataclass(frozen=True)
class Fitted:
    """Where a finished run stands: its last step, the step of its best evaluation, the epochs that it took.

    `state` is the task's at the last step. A run that was stopped has gone back: its last step is before the alarm.
    """

    final_step: int
    best_step: int
    epochs: float
    stopped: Stopped | None = None
    state: TaskState = field(default_factory=dict, compare=False)


def fit(task: Task, spec: TrainSpec, context: Context) -> Fitted:
    """Train `task` to the end of `spec`, from the newest sound checkpoint of the run if there is one.

    Raises PoiseError when the loss is not finite, StoreError when the store fails, RunBusyError when another driver has
    taken over, PreemptedError when a signal asked for the end. What was committed by then stays committed.
    """
    return _Loop(task, spec, context).run()


class _Loop:
    def __init__(self, task: Task, spec: TrainSpec, context: Context) -> None:
        self.task, self.spec, self.context = task, spec, context
        self.plan = spec.plan(task.batches_per_epoch, task.repeats)
        self.steps_per_epoch = self.plan.steps
        self.total = spec.total_steps(self.steps_per_epoch)
        self.evaluate_every = spec.evaluate_every.in_steps(self.steps_per_epoch)
        self.commit_every = spec.checkpoint.every.in_steps(self.steps_per_epoch)
        self.state = TrainState(task.model, build_optimizer(spec.optimizer, task.model), task.state)
        self.parameters = [parameter for group in self.state.optimizer.param_groups for parameter in group["params"]]
        self.generator = torch.Generator(context.device)
        self.rows, self.window = Rows(), _Window()
        self.sum_lr = 0.0
        self.stopped: Stopped | None = None
        self.vote = StopVote(context)
        self.committed_step: int | None = None
        self.provisional_step: int | None = None
        self.telemetry = Telemetry(
            context,
            steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
            examples_per_step=round(task.examples_per_batch * task.batches_per_epoch * task.repeats / self.plan.steps),
            unit=task.unit,
        )
        self.timers = self.telemetry.timers

    def run(self) -> Fitted:
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
        best, last = self.state.best, self.state.step
        return Fitted(last, best.step if best else last, self._epoch(), self.stopped, self.state.task)

    def _step(self) -> None:
        turn = self._turn()
        batches = self.plan.of_step(self.state.step)
        for index in batches:
            with self.timers("data"):
                batch = self.task.batch(index)
            with self.timers("forward_backward"), self._no_sync(last=index == batches[-1]), self._autocast():
                loss, metrics, self.state.task = self.task.step(self.model, batch, self.state.task, turn)
                share = loss if len(batches) == 1 else loss / len(batches)
                share.backward()  # type: ignore[no-untyped-call]
            self.window.add("loss", loss.detach())
            for name, value in metrics.items():
                self.window.add(name, value)
        with self.timers("optim"):
            self._descend()

    def _turn(self) -> Turn:
        step = self.state.step
        self.generator.manual_seed(derive_seed(self.task.seed, "step", step, self.context.rank))
        epoch, offset = divmod(step, self.steps_per_epoch)
        return Turn(step, epoch, offset == 0, self.generator, self.timers, self.context.mean)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.spec.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.context.device.type, dtype=torch.bfloat16)

    def _no_sync(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last or self.context.world_size == 1 else self.model.no_sync()  # type: ignore[operator]

    def _descend(self) -> None:
        optimizer = self.state.optimizer
        if self.spec.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.spec.clip_norm)
            self.window.add("grad_norm", norm)
        rate = self._rate(self.state.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.sum_lr += rate
        for parameter in self.parameters:  # what zero_grad does, without its profiling hooks
            parameter.grad = None
        average_statistics(self.statistics, self.context.world_size)
        self.state.step += 1
        if self.task.after is not None:
            self.state.task = self.task.after(self.state.task, self.state.step)

    def _rate(self, step: int) -> float:
        return self.spec.optimizer.lr * factor(self.spec.schedule, step, self.total)

    def _after_step(self) -> None:
        step, end = self.state.step, self.state.step == self.total
        due = step % self.evaluate_every == 0 or end
        if due and (alarm := self._watch()):
            self._go_back(alarm)
            return
        new_best = self._evaluate() if due else False
        commit = step % self.commit_every == 0 or end or new_best
        if step % self.spec.log_every == 0 or commit:
            self._log()
        if commit:
            self._commit()

    def _end_if_asked(self) -> None:
        """Commit this step and raise PreemptedError if any rank was asked to end.

        The window of metrics is part of that commit, and no row is made of it: rows fall on the steps that they would
        have fallen on. The next commit takes its place.
        """
        if self.stopped or not self.vote.ask(self.state.step):
            return
        if self.committed_step != self.state.step:
            self._commit(provisional=True)
        raise self.context.stop.error(f"{self.context.run.name}: stopped and committed at step {self.state.step}")

    def _watch(self) -> str | None:
        """Look at the training itself; the alarm that ends it, if there is one."""
        if self.task.watch is None:
            return None
        seen = self.task.watch(self.state.task)
        self.state.task = seen.state
        self.rows.add(self.state.step, self._epoch(), "train", seen.metrics)
        if seen.alarm:
            told = event("alarm", step=self.state.step, what=seen.alarm, **self._attempt())
            self.context.together(lambda: self.context.run.append_events([told]))
        return seen.alarm if seen.stop else None

    def _go_back(self, alarm: str) -> None:
        """End the run as it was at its newest checkpoint. One that is started again comes to the same alarm.

        The rows of what led to the alarm are kept; no checkpoint is written behind them.
        """
        step = self.state.step
        self._log()
        self.context.together(partial(self._write_rows, step))
        if not self._load("restore"):
            raise PoiseError(f"{alarm}, at step {step}, and no checkpoint is older: commit more often")
        self.stopped = Stopped(step, alarm)

    def _evaluate(self) -> bool:
        """Measure on held-out data; True when it is the best so far."""
        if self.task.evaluate is None:
            return False
        started = time.perf_counter()
        metrics = self.task.evaluate()
        self.context.sink.observe("poise_evaluation_seconds", time.perf_counter() - started, run=self.context.run.name)
        self.rows.add(self.state.step, self._epoch(), "validation", metrics)
        self.telemetry.evaluated(self.state.step, metrics)
        value = metrics[self.task.monitor.removeprefix("-")] * (-1 if self.task.monitor.startswith("-") else 1)
        if self.state.best is not None and value <= self.state.best.value:
            return False
        self.state.best = Best(value, self.state.step)
        return True

    def _log(self) -> None:
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
        """Every rank stops here; rank 0 commits; no rank goes on before it is done."""
        with self.timers("report"):
            rngs = self.context.gather(capture_rng(self.context.device))
            windows = self.context.gather(self.window.tensors())
            self.context.together(lambda: self._write(rngs, windows, provisional))
            self.rows.clear()
        self.committed_step = self.state.step

    def _write(self, rngs: list[dict[str, Tensor]], windows: list[dict[str, Tensor]], provisional: bool) -> None:
        """Rows first, then the checkpoint whose commit makes them count: a torn attempt writes the same rows again."""
        run, state = self.context.run, self.state
        started = time.perf_counter()
        timing = Rows()
        timing.add(state.step, self._epoch(), "timing", self.telemetry.timing(state.step))
        self.context.guard()
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
                guard=self.context.guard,
            )
        if self.provisional_step is not None:
            run.checkpoints.remove(self.provisional_step)
        self.provisional_step = state.step if provisional else None
        run.checkpoints.prune(self.spec.checkpoint.keep, {state.best.step} if state.best else set())
        seconds = time.perf_counter() - started
        facts = {"step": state.step, "seconds": round(seconds, 3), **self._attempt()}
        run.append_events([event("commit", **facts, **({"provisional": True} if provisional else {}))])
        self.telemetry.committed(state.step, seconds)

    def _write_rows(self, step: int) -> None:
        self.context.run.write(f"metrics/rows-{step:08d}.parquet", self.rows.to_parquet())

    def _info(self) -> dict[str, float | int | None]:
        best = self.state.best
        return {"world_size": self.context.world_size, "best_step": best.step if best else None, "seed": self.task.seed}

    def _resume(self) -> None:
        """Continue from the newest checkpoint that is sound, naming those that are not."""
        if not self._load("start"):
            return
        if self.state.step > self.total:
            raise PoiseError(f"the run has {self.state.step} committed steps and the spec asks for {self.total}")
        for step in range(self.state.step):  # in the order in which an uninterrupted run adds
            self.sum_lr += self._rate(step)

    def _load(self, why: str) -> bool:
        """Make the newest sound checkpoint the state, and say so in an event `why`; False where there is none."""
        with scratch_folder() as scratch:
            folder = scratch / "checkpoint"
            pids = self.context.gather(os.getpid())
            commit = self.context.together(lambda: self._find(folder, why, pids))
            if commit is None:
                return False
            if not self.context.leads:
                self.context.run.checkpoints.fetch(commit, folder)
            load_state(self.state, folder, self.context.device)
            self.window.fill(load_window(folder, self.context.rank, self.context.world_size, self.context.device))
            if not restore_rng(folder, self.context.rank, self.context.device):
                seed_rng(self.task.seed, self.context.rank, self.state.step)
        return True

    def _find(self, folder: Path, why: str, pids: list[int]) -> Commit | None:
        run = self.context.run
        commit, damages = run.checkpoints.newest_sound(folder)
        for damage in damages:
            self.context.sink.inc("poise_damaged_checkpoints_total", run=run.name)
            run.append_events([event("damaged", what=str(damage))])
        run.append_events([event(why, step=commit.step if commit else 0, pids=pids, **self._attempt())])
        self.committed_step = self.provisional_step = None
        if commit is not None and run.checkpoints.info(commit).get("provisional"):
            self.provisional_step = commit.step
        return commit

    def _epoch(self) -> float:
        return self.state.step / self.steps_per_epoch

    def _attempt(self) -> dict[str, int]:
        return {"attempt": self.context.attempt, "workers": self.context.world_size}


class _Window:
    """Metrics kept on the device since the last row, so that a step never waits for the host."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        """The values by name, (steps,) each, on the CPU."""
        return {name: torch.stack(values).cpu() for name, values in self.values.items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self.values = {name: list(values.unbind()) for name, values in tensors.items()}

    def take(self, context: Context) -> dict[str, float]:
        """The means over the window and over all ranks."""
        if not self.values:
            return {}
        names = sorted(self.values)
        means = torch.stack([torch.stack(self.values[name]).float().mean() for name in names])
        self.values = {}
        return dict(zip(names, context.mean(means).tolist(), strict=True))
