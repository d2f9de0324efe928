"""The progress of a run and its display: a live panel in a terminal, plain lines elsewhere.

Invariant: the display does not slow a run. In a terminal `show` only stores its argument, and a thread draws twice a
second. Elsewhere a line is written at most every LINE_EVERY_S, and one per finished epoch and at the end.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress import BarColumn, TaskID, TaskProgressColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from poise.observe.terminal import printable

__all__ = ["Display", "Progress"]

LINE_EVERY_S = 5.0
DRAWN_PER_S = 2.0

_HEADLINES = ("loss", "accuracy", "clean", "robust/union", "ce", "excess")
"""The metrics in a plain line. The panel has all but the accuracies of training batches under attack; the page draws
all metrics of training."""

_BLOCK = "\u2501"
_SQUARE = "\u25a0"
_PHASE_STYLES = ("cyan", "red", "blue", "green", "magenta")


@dataclass(frozen=True)
class Progress:
    """The progress of one run. `dataclasses.asdict` makes a dictionary for JSON, `Progress(**values)` reads it.

    `phases` are seconds or shares (only their proportions are shown), `metrics` the latest values by row name, `eta_s`
    is None while unknown, `attempt` counts restarts from 0, `unit` is the name of the examples. With `epochs` 0 the
    steps are counts of `unit`. `evaluation` are the metrics measured on held-out examples at exactly this step: it is
    reported once per evaluation, also if no value has changed, and empty otherwise.
    """

    run: str
    stage: str
    epoch: float
    epochs: float
    step: int
    steps: int
    examples_per_s: float = 0.0
    eta_s: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 0
    unit: str = "images"
    evaluation: Mapping[str, float] = field(default_factory=dict)


class Display:
    """A context manager that shows the progress of `runs`, and of every other run that is shown, on `stream` (stderr).

    Draws a panel if `stream` is a terminal that can move its cursor; otherwise, with TERM=dumb or with CI set, writes
    lines.
    """

    def __init__(
        self, stream: TextIO | None = None, runs: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._latest: dict[str, Progress | None] = dict.fromkeys(runs)
        self._lines: dict[str, tuple[Progress, float]] = {}
        self._draws = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("CI")
        self._panels = _Panels(console=Console(file=self._stream), refresh_per_second=DRAWN_PER_S, expand=True)
        self._tasks: dict[str, TaskID] = {}  # the task of each run in the panels
        for run in runs:
            self._tasks[run] = self._panels.add_task(run, progress=None)

    def __enter__(self) -> Display:
        if self._draws:
            self._panels.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._draws:
            self._panels.stop()
            return
        for progress in filter(None, self._latest.values()):
            if self._lines[progress.run][0] != progress:
                self._line(progress)

    def show(self, progress: Progress) -> None:
        """Show the newest progress of a run. Takes microseconds, or the time of one line of output if one is due.

        Ignores the report of an evaluation, whose metrics are in the next progress too. It is for schedulers, which
        override this method.
        """
        if progress.evaluation:
            return
        self._latest[progress.run] = progress
        if progress.run not in self._tasks:
            self._tasks[progress.run] = self._panels.add_task(progress.run, progress=None)
        task = self._tasks[progress.run]
        self._panels.update(task, total=max(progress.steps, 1), completed=progress.step, progress=progress)
        if not self._draws and self._due(progress):
            self._line(progress)

    def remove(self, run: str) -> None:
        """Stop showing a run, which has ended."""
        self._latest.pop(run, None)
        if run in self._tasks:
            self._panels.remove_task(self._tasks.pop(run))

    def note(self, text: str) -> None:
        """Print `text` on its own line above the panel, without interpreting markup."""
        text = printable(text)
        if self._draws:
            self._panels.console.print(Text(text))
        else:
            self._write(text)

    def render(self) -> RenderableType:
        """The panels of all runs, as they are drawn in a terminal."""
        return self._panels.get_renderable()

    def _due(self, progress: Progress) -> bool:
        """Whether to write a line: after a new phase of the run, LINE_EVERY_S, or at the last step."""
        if progress.run not in self._lines:
            return True
        last, written_at = self._lines[progress.run]
        return (
            _milestone(last) != _milestone(progress)
            or self._clock() - written_at >= LINE_EVERY_S
            or (progress.step >= progress.steps and last.step != progress.step)
        )

    def _line(self, progress: Progress) -> None:
        self._lines[progress.run] = (progress, self._clock())
        self._write(_plain(progress))

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _milestone(progress: Progress) -> tuple[str, int, int]:
    """Stage, restarts and finished epochs; a line is written at once when one of them changes."""
    return progress.stage, progress.attempt, int(progress.epoch)


def _plain(progress: Progress) -> str:
    """The line of a run: its counters, the shares of its phases, its headline metrics."""
    headlines = [name for name in _HEADLINES if name in progress.metrics]
    parts = [
        f"[{progress.run}] {progress.stage}",
        *(f"{key} {value}" for key, value in _counters(progress)),
        " ".join(f"{phase} {share:.0%}" for phase, share in _shares(progress.phases).items()),
        " ".join(f"{name} {_number(name, progress.metrics[name])}" for name in headlines),
    ]
    return "  ".join(filter(None, parts))


def _counters(progress: Progress) -> list[tuple[str, str]]:
    """The counters of a run, as (name, value)."""
    if not progress.epochs:  # the run does not train
        return [(progress.unit, f"{progress.step:,}/{progress.steps:,}")]
    counters = [
        ("epoch", f"{_epochs(progress.epoch)}/{_epochs(progress.epochs)}"),
        ("step", f"{progress.step:,}/{progress.steps:,}"),
    ]
    if speed := _speed(progress.examples_per_s):
        counters.append((f"{progress.unit}/s", speed))
    counters.append(("ETA", _duration(progress.eta_s)))
    if progress.attempt:
        counters.append(("attempt", str(progress.attempt + 1)))
    return counters


def _epochs(value: float) -> str:
    """A number of epochs, with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _speed(per_s: float) -> str:
    """Examples per second as an integer, or with two digits below 10; empty while it is 0."""
    if not per_s > 0:
        return ""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


def _shares(phases: Mapping[str, float]) -> dict[str, float]:
    """The share of each phase that took any time in their sum."""
    total = sum(phases.values())
    return {phase: value / total for phase, value in phases.items() if value > 0}


def _number(name: str, value: float) -> str:
    """An accuracy in percent, any other metric with four digits."""
    is_fraction = name in ("accuracy", "clean") or name.startswith("robust/")
    return f"{value:.1%}" if is_fraction else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    """A duration as H:MM:SS or M:SS; "-" if it is unknown."""
    if seconds is None or not 0 <= seconds < 1e8:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Panels(RichProgress):
    """A panel for each task, whose description is the name of a run and whose field `progress` is its progress."""

    @classmethod
    def get_default_columns(cls) -> tuple[BarColumn, TaskProgressColumn]:
        """The bar of steps, with the percentage beside it."""
        bar = BarColumn(bar_width=None, complete_style="cyan", finished_style="green")
        return bar, TaskProgressColumn("[bold]{task.percentage:.0f}%")

    def get_renderables(self) -> Iterable[RenderableType]:
        """The panels. The drawing thread calls this while `show` adds runs: `tasks` is a copy."""
        for task in self.tasks:
            yield _panel(task.description, task.fields["progress"], self.make_tasks_table([task]))


def _panel(run: str, progress: Progress | None, bar: RenderableType) -> Panel:
    """The panel of one run with its bar of steps; "waiting" before its first progress."""
    title = Text(run, style="bold")
    body: list[RenderableType] = [Text("waiting", style="dim")]
    if progress:
        title.append(f" \u00b7 {progress.stage}", style="not bold cyan")
        body = [bar, _pairs(_counters(progress))]
        shares = _shares(progress.phases)
        if shares:
            body += [_PhaseBar(shares), _legend(shares)]
        if progress.metrics:
            body.append(_pairs([(name, _number(name, value)) for name, value in progress.metrics.items()]))
    return Panel(Group(*body), title=title, title_align="left", border_style="bright_black", padding=(0, 1))


class _PhaseBar:
    """A bar as wide as the panel, divided into the shares of the phases."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._edges = list(itertools.accumulate(shares.values()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [round(edge * options.max_width) for edge in self._edges]
        text = Text()
        for start, end, style in zip([0, *cells], cells, _PHASE_STYLES, strict=False):
            text.append(_BLOCK * (end - start), style=style)
        yield text


def _legend(shares: Mapping[str, float]) -> Text:
    """The color and the percentage of each phase."""
    items = []
    for (phase, share), style in zip(shares.items(), _PHASE_STYLES, strict=False):
        items.append(Text.assemble((_SQUARE + " ", style), (f"{phase}\u00a0", "dim"), f"{share:.0%}"))
    return Text("  ").join(items)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Text:
    """Names and values on one line."""
    items = [Text.assemble((f"{key}\u00a0", "dim"), (value, "bold")) for key, value in pairs]
    return Text("  ").join(items)
