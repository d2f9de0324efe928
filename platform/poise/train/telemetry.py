"""Progress, exported metrics and timings of a running training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from poise.observe.export import export
from poise.observe.progress import Progress
from poise.observe.timers import DevicePhaseTimers, PhaseTimers
from poise.train.context import Context

__all__ = ["Telemetry"]


def _phase_timers(device: torch.device) -> PhaseTimers:
    """Timers of the phases: with the clock of the host, or with the device's own if it is a GPU."""
    if device.type != "cuda":
        return PhaseTimers()
    return DevicePhaseTimers(partial(_cuda_event, device))


def _cuda_event(device: torch.device) -> torch.cuda.Event:
    """An event after all work that was submitted to the current stream of a GPU so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Telemetry:
    """Timers, rates and exports of one attempt at a run. Every rank measures; rank 0 publishes."""

    def __init__(
        self, context: Context, *, steps: int, steps_per_epoch: int, examples_per_step: float, unit: str
    ) -> None:
        self.timers = _phase_timers(context.device)
        self._context = context
        self._steps = steps
        self._steps_per_epoch = steps_per_epoch
        self._examples_per_step = examples_per_step
        self._unit = unit
        self._since_commit: Counter[str] = Counter()  # seconds of each phase
        self._latest: dict[str, float] = {}
        self._first_step = 0
        self._published_step = 0
        self._started = time.perf_counter()

    def begin(self, step: int) -> None:
        """Start to measure rates, at the first step of an attempt."""
        self._first_step = step
        self._published_step = step
        self._started = time.perf_counter()
        self._context.sink.set("poise_workers", self._context.world_size, run=self._context.run.name)

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export the newest training metrics and report progress."""
        phases = self.timers.take()
        self._since_commit.update(phases)
        self.measured(metrics)
        if not self._context.is_main:
            return
        sink = self._context.sink
        run = self._context.run.name
        steps = step - self._published_step
        sink.inc("poise_steps_total", steps, run=run)
        sink.inc("poise_examples_total", steps * self._examples_per_step, run=run)
        sink.set("poise_epoch", step / self._steps_per_epoch, run=run)
        for phase, seconds in phases.items():
            sink.observe("poise_phase_seconds", seconds / max(steps, 1), run=run, phase=phase)
        self._published_step = step
        self._context.report(self._progress(step, phases))

    def measured(self, metrics: Mapping[str, float], *, held_out: bool = False) -> None:
        """Export metrics and include them in progress; robust accuracies only when they are of held-out data."""
        exported = {name: value for name, value in metrics.items() if held_out or not name.startswith("robust/")}
        self._latest.update(exported)
        if self._context.is_main:
            export(self._context.sink, self._context.run.name, exported)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export and report the metrics of an evaluation after `step` steps, even if no number has changed."""
        self.measured(metrics, held_out=True)
        if self._context.is_main:
            self._context.report(replace(self._progress(step, {}), evaluation=dict(metrics)))

    def committed(self, step: int, seconds: float) -> None:
        """Export a commit of `step` that took `seconds`."""
        sink = self._context.sink
        run = self._context.run.name
        sink.inc("poise_commits_total", run=run)
        sink.observe("poise_commit_seconds", seconds, run=run)
        sink.set("poise_committed_step", step, run=run)

    def timing(self, step: int) -> dict[str, float]:
        """The rate of this attempt so far, and the seconds of each phase since the last call."""
        seconds = self._since_commit
        self._since_commit = Counter()
        seconds.update(self.timers.take())
        return {"examples_per_s": self._rate(step), **{f"seconds/{phase}": value for phase, value in seconds.items()}}

    def _rate(self, step: int) -> float:
        """Examples per second of all ranks since the attempt began."""
        examples = (step - self._first_step) * self._examples_per_step
        return examples / max(time.perf_counter() - self._started, 1e-9)

    def _progress(self, step: int, phases: Mapping[str, float]) -> Progress:
        rate = self._rate(step)
        return Progress(
            run=self._context.run.name,
            stage="train",
            epoch=step / self._steps_per_epoch,
            epochs=self._steps / self._steps_per_epoch,
            step=step,
            steps=self._steps,
            examples_per_s=rate,
            eta_s=(self._steps - step) * self._examples_per_step / rate if rate else None,
            phases=dict(phases),
            metrics=dict(self._latest),
            attempt=self._context.attempt,
            unit=self._unit,
        )
