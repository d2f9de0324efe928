"""What a training run tells the outside while it runs: progress, exported metrics, and where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from poise.observe.export import export
from poise.observe.progress import Progress
from poise.observe.timers import PhaseTimers
from poise.train.context import Context

__all__ = ["Telemetry"]


class Telemetry:
    """Timers, rates and exports of one attempt at a run. Rank 0 publishes; every rank measures."""

    def __init__(
        self, context: Context, *, steps: int, steps_per_epoch: int, examples_per_step: float, unit: str
    ) -> None:
        self.timers = PhaseTimers()
        self._context, self._steps = context, steps
        self._steps_per_epoch, self._examples_per_step = steps_per_epoch, examples_per_step
        self._unit = unit
        self._since_commit: Counter[str] = Counter()
        self._latest: dict[str, float] = {}
        self._first = self._published = 0
        self._started = time.perf_counter()

    def begin(self, step: int) -> None:
        """The attempt starts at `step`: rates count from here."""
        self._first = self._published = step
        self._started = time.perf_counter()
        self._context.sink.set("poise_workers", self._context.world_size, run=self._context.run.name)

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export the newest training metrics and show progress."""
        phases = self.timers.take()
        self._since_commit.update(phases)
        self.measured(metrics)
        if not self._context.leads:
            return
        sink, run, steps = self._context.sink, self._context.run.name, step - self._published
        sink.inc("poise_steps_total", steps, run=run)
        sink.inc("poise_examples_total", steps * self._examples_per_step, run=run)
        sink.set("poise_epoch", step / self._steps_per_epoch, run=run)
        for phase, seconds in phases.items():
            sink.observe("poise_phase_seconds", seconds / max(steps, 1), run=run, phase=phase)
        self._published = step
        self._context.report(self._progress(step, phases))

    def measured(self, metrics: Mapping[str, float], *, held_out: bool = False) -> None:
        """Export and show metrics; accuracies only when they are of held-out data."""
        shown = {name: value for name, value in metrics.items() if held_out or not name.startswith("robust/")}
        self._latest.update(shown)
        if self._context.leads:
            export(self._context.sink, self._context.run.name, shown)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Export what was measured on held-out examples after `step` steps, and report it, even if nothing changed."""
        self.measured(metrics, held_out=True)
        if self._context.leads:
            self._context.report(replace(self._progress(step, {}), evaluation=dict(metrics)))

    def committed(self, step: int, seconds: float) -> None:
        """Count a commit that took `seconds`."""
        sink, run = self._context.sink, self._context.run.name
        sink.inc("poise_commits_total", run=run)
        sink.observe("poise_commit_seconds", seconds, run=run)
        sink.set("poise_committed_step", step, run=run)

    def timing(self, step: int) -> dict[str, float]:
        """The rate so far, and the seconds of each phase since this was last asked."""
        seconds, self._since_commit = self._since_commit, Counter()
        seconds.update(self.timers.take())
        return {"examples_per_s": self._rate(step), **{f"seconds/{phase}": value for phase, value in seconds.items()}}

    def _rate(self, step: int) -> float:
        """Examples per second of all ranks since the attempt began."""
        return (step - self._first) * self._examples_per_step / max(time.perf_counter() - self._started, 1e-9)

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
