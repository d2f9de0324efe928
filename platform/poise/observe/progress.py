"""What a run is doing now, and its display: a live panel in a terminal, plain lines elsewhere.

Invariant: showing progress never slows a run. In a terminal `show` only stores its argument and a thread draws twice a
second; elsewhere a line is written at most every LINE_EVERY_S, besides one per finished epoch and one at the end.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from poise.observe.terminal import printable

__all__ = ["Display", "Progress"]

LINE_EVERY_S = 5.0
DRAWN_PER_S = 2.0

_HEADLINES = ("loss", "accuracy", "clean", "robust/union", "ce", "excess")
"""The metrics of a plain line; the panel and the page have all of them."""

_BLOCK, _SQUARE = "\u2501", "\u25a0"
_PHASE_STYLES = ("cyan", "red", "blue", "green", "magenta")


@dataclass(frozen=True)
class Progress:
    """The state of one run, JSON-able as it stands (`dataclasses.asdict`) and built back by `Progress(**values)`.

    `phases` are seconds or shares (only their proportions are shown), `metrics` the latest values by row name, `eta_s`
    None while unknown, `attempt` counts restarts from 0, `unit` is what an example is called. With 0
    `epochs` the steps are counts of `unit`. `evaluation` is what was measured on held-out examples at this very step:
    it comes once for each evaluation, whether anything has changed or not.
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
    """A context manager that shows the progress of `runs`, and of any run that turns up, on `stream` (stderr).

    The panel is drawn where `stream` is a terminal that can move its cursor; with TERM=dumb or CI set, lines.
    """

    def __init__(
        self, stream: TextIO | None = None, runs: Sequence[str] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._latest: dict[str, Progress | None] = dict.fromkeys(runs)
        self._lines: dict[str, tuple[Progress, float]] = {}
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("CI"):
            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self.render, refresh_per_second=DRAWN_PER_S)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()
            return
        for progress in filter(None, self._latest.values()):
            if self._lines[progress.run][0] != progress:
                self._line(progress)

    def show(self, progress: Progress) -> None:
        """Take the newest state of a run; costs microseconds, or one line of output when one is due.

        A report of an evaluation is for those who compare runs: what is shown next has its metrics too.
        """
        if progress.evaluation:
            return
        self._latest[progress.run] = progress
        if self._live is None and self._due(progress):
            self._line(progress)

    def remove(self, run: str) -> None:
        """Show a run no more: it has ended, and others take its place."""
        self._latest.pop(run, None)

    def note(self, text: str) -> None:
        """Print `text`, as it is, on a line of its own above the panel."""
        text = printable(text)
        if self._live:
            self._live.console.print(Text(text))
        else:
            self._write(text)

    def render(self) -> RenderableType:
        """The panel of every run, as it is drawn in a terminal."""
        return Group(*(_panel(run, progress) for run, progress in list(self._latest.items())))

    def _due(self, progress: Progress) -> bool:
        if progress.run not in self._lines:
            return True
        last, written_at = self._lines[progress.run]
        return (
            _chapter(last) != _chapter(progress)
            or self._clock() - written_at >= LINE_EVERY_S
            or (progress.step >= progress.steps and last.step != progress.step)
        )

    def _line(self, progress: Progress) -> None:
        self._lines[progress.run] = (progress, self._clock())
        self._write(_plain(progress))

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _chapter(progress: Progress) -> tuple[str, int, int]:
    """What makes a new line due at once when it changes: the stage, a restart, a finished epoch."""
    return progress.stage, progress.attempt, int(progress.epoch)


def _plain(progress: Progress) -> str:
    parts = [
        f"[{progress.run}] {progress.stage}",
        *(f"{key} {value}" for key, value in _counters(progress)),
        " ".join(f"{phase} {share:.0%}" for phase, share in _shares(progress.phases).items()),
        " ".join(f"{name} {_number(name, progress.metrics[name])}" for name in _HEADLINES if name in progress.metrics),
    ]
    return "  ".join(filter(None, parts))


def _counters(progress: Progress) -> list[tuple[str, str]]:
    if not progress.epochs:  # it counts something else than training
        return [(progress.unit, f"{progress.step:,}/{progress.steps:,}")]
    counters = [
        ("epoch", f"{_epochs(progress.epoch)}/{_epochs(progress.epochs)}"),
        ("step", f"{progress.step:,}/{progress.steps:,}"),
    ]
    if speed := _speed(progress.examples_per_s):
        counters.append((f"{progress.unit}/s", speed))
    counters.append(("ETA", _duration(progress.eta_s)))
    return [*counters, ("attempt", str(progress.attempt + 1))] if progress.attempt else counters


def _epochs(value: float) -> str:
    """With two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _speed(per_s: float) -> str:
    """A whole number, below 10 two digits; nothing where nothing is counted yet."""
    if not per_s > 0:
        return ""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


def _shares(phases: Mapping[str, float]) -> dict[str, float]:
    total = sum(phases.values())
    return {phase: value / total for phase, value in phases.items()} if total > 0 else {}


def _number(name: str, value: float) -> str:
    """Accuracies as percent, the rest with four digits."""
    is_fraction = name in ("accuracy", "clean") or name.startswith("robust/")
    return f"{value:.1%}" if is_fraction else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None or not 0 <= seconds < 1e8:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _panel(run: str, progress: Progress | None) -> Panel:
    title = Text(run, style="bold")
    body: list[RenderableType] = [Text("waiting", style="dim")]
    if progress:
        title.append(f" \u00b7 {progress.stage}", style="not bold cyan")
        body = [_bar(progress), _pairs(_counters(progress))]
        shares = _shares(progress.phases)
        if shares:
            body += [_PhaseBar(shares), _legend(shares)]
        if progress.metrics:
            body.append(_pairs([(name, _number(name, value)) for name, value in progress.metrics.items()]))
    return Panel(Group(*body), title=title, title_align="left", border_style="bright_black", padding=(0, 1))


def _bar(progress: Progress) -> Table:
    total = max(progress.steps, 1)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(width=6, justify="right")
    bar = ProgressBar(total=total, completed=progress.step, complete_style="cyan", finished_style="green")
    grid.add_row(bar, Text(f"{progress.step / total:.0%}", style="bold"))
    return grid


class _PhaseBar:
    """One line as wide as the panel, a stretch per phase: which of the five costs the time is seen at a glance."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._edges = list(itertools.accumulate(shares.values()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [round(edge * options.max_width) for edge in self._edges]
        text = Text()
        for start, end, style in zip([0, *cells], cells, _PHASE_STYLES, strict=False):
            text.append(_BLOCK * (end - start), style=style)
        yield text


def _legend(shares: Mapping[str, float]) -> Text:
    items = [
        Text.assemble((_SQUARE + " ", style), (f"{phase}\u00a0", "dim"), f"{share:.0%}")
        for (phase, share), style in zip(shares.items(), _PHASE_STYLES, strict=False)
    ]
    return Text("  ").join(items)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Text:
    items = [Text.assemble((f"{key}\u00a0", "dim"), (value, "bold")) for key, value in pairs]
    return Text("  ").join(items)
