from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from poise.observe.progress import Display, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _progress(step: int = 10, **changes: object) -> Progress:
    base = Progress(
        run="adt", stage="train", epoch=step / 100, epochs=4, step=step, steps=400, examples_per_s=1234.5, eta_s=3725.0,
        phases={"data": 1.0, "attack": 3.0}, metrics={"loss": 0.51234, "robust/linf": 0.25},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def _lines(updates: list[tuple[float, Progress]]) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Display(stream, clock=clock) as display:
        for now, progress in updates:
            clock.now = now
            display.show(progress)
    return stream.getvalue().splitlines()


def test_a_line_says_what_matters_and_holds_no_escape_codes() -> None:
    (line,) = _lines([(0.0, _progress())])
    assert line == (
        "[adt] train  epoch 0.1/4  step 10/400  images/s 1,234  ETA 1:02:05  data 25% attack 75%  loss 0.5123"
    )


def test_nothing_is_said_of_a_speed_that_is_not_known_and_epochs_have_two_decimals() -> None:
    (line,) = _lines([(0.0, _progress(40, steps=40, epoch=0.30769, epochs=0.30769, examples_per_s=0.0))])
    assert line.startswith("[adt] train  epoch 0.31/0.31  step 40/40  ETA 1:02:05")
    for speed, shown in ((0.4, "0.4"), (1.26, "1.3"), (1234.5, "1,234")):
        (line,) = _lines([(0.0, _progress(examples_per_s=speed, epoch=10, epochs=100))])
        assert f"epoch 10/100  step 10/400  images/s {shown}  ETA" in line


def test_lines_come_every_five_seconds_at_epochs_and_at_the_end() -> None:
    updates = [(0.01 * step, _progress(step)) for step in range(1, 401)]
    steps = [line.split("step ")[1].split("/")[0] for line in _lines(updates)]
    assert steps == ["1", "100", "200", "300", "400"]
    slow = [(1.0 * step, _progress(step)) for step in range(1, 14)]
    steps = [line.split("step ")[1].split("/")[0] for line in _lines(slow)]
    assert steps == ["1", "6", "11", "13"]  # the last one although it was not due


def test_a_restart_and_a_new_stage_are_shown_at_once() -> None:
    lines = _lines(
        [(0.0, _progress(50)), (0.1, _progress(45, attempt=1)), (0.2, _progress(45, attempt=1, stage="test"))]
    )
    assert len(lines) == 3
    assert "attempt 2" in lines[1]
    assert lines[2].startswith("[adt] test")


def test_runs_have_their_own_rhythm() -> None:
    lines = _lines(
        [(0.0, _progress(5)), (0.1, _progress(5, run="at")), (0.2, _progress(6)), (0.3, _progress(6, run="at"))]
    )
    assert [line.split("]")[0] for line in lines] == ["[adt", "[at", "[adt", "[at"]


def test_the_same_state_is_not_printed_twice() -> None:
    assert len(_lines([(0.0, _progress(400)), (0.1, _progress(400))])) == 1


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("CI", "true")])
def test_a_terminal_that_cannot_draw_gets_lines(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(variable, value)
    stream = Terminal()
    with Display(stream) as display:
        display.show(_progress())
        display.note("a [bold] note")
    assert "\x1b" not in stream.getvalue()
    assert "a [bold] note\n" in stream.getvalue()


def test_a_terminal_gets_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("CI", raising=False)
    stream = Terminal()
    with Display(stream, runs=["adt", "at"]) as display:
        display.show(_progress())
        display.note("kept [red] as it is")
    text = stream.getvalue()
    assert "\x1b[" in text
    for part in ("adt", "waiting", "kept [red] as it is", "1,234", "1:02:05", "attack", "75%"):
        assert part in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_fits_its_terminal_and_odd_values_do_not_break_it(width: int) -> None:
    display = Display(io.StringIO(), runs=["[/bold]"])
    display.show(_progress(0, steps=0, epochs=0, eta_s=math.inf, phases={}, metrics={"loss": math.nan}))
    display.show(_progress(run="long" * 60, phases={"data": 0.0, "attack": 0.0}, eta_s=None))
    display.show(_progress(run="other", phases={f"p{i}": 1.0 for i in range(7)}))
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(display.render())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("[/bold]" in line for line in lines)


def test_progress_is_plain_json() -> None:
    progress = _progress(attempt=2)
    assert Progress(**json.loads(json.dumps(dataclasses.asdict(progress)))) == progress
