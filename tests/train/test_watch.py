"""Alarms: a run that is stopped ends at its newest checkpoint, says so, and does it again when started again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from poise.errors import PoiseError
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.schedule import factor
from poise.train.spec import Checkpointing, Interval
from poise.train.task import MonitorResult


class Killed(BaseException):
    pass


def _fit(bench, make_task, spec, name: str, *, at: int = 8, stop: bool = True, kill: int | None = None) -> FitResult:
    """The task with a watch that counts its own calls and gives the alarm at step `at`, the second of 4, 8, 12."""

    def interrupt(index: int) -> None:
        if index == kill:
            raise Killed

    task = make_task(interrupt)
    task.state["looks"] = torch.zeros(())
    own = task.step

    def step(model, batch, state, step_context):
        output = own(model, batch, state, step_context)
        return output._replace(state=state | output.state)

    def watch(state):
        looks = state["looks"] + 1
        alarm = "too good" if 4 * looks == at else None
        return MonitorResult({"overfitting/looks": looks.item()}, state | {"looks": looks}, alarm, stop)

    task.step, task.watch = step, watch
    return fit(task, spec, Context(bench.run(name)))


def test_an_alarm_ends_the_run_at_the_newest_checkpoint_before_it(bench, make_task, make_spec, tmp_path):
    fitted = _fit(bench, make_task, make_spec(), "stopped")
    assert (fitted.final_step, fitted.stopped.step, fitted.stopped.why) == (6, 8, "too good")
    assert fitted.state["looks"].item() == 1
    assert fitted.best_step == 4
    assert bench.steps("stopped") == [3, 4, 6]
    tensors = bench.tensors("stopped", 6, tmp_path)
    assert tensors["task/looks"].item() == 1
    events = [e for e in bench.run("stopped").events() if e["event"] in ("alarm", "restore")]
    assert [(e["event"], e["step"]) for e in events] == [("alarm", 8), ("restore", 6)]
    assert events[0]["what"] == "too good"
    looked = [(r["step"], r["value"]) for r in bench.rows("stopped") if r["name"] == "overfitting/looks"]
    assert looked == [(4, 1), (8, 2)]  # the evidence is kept


@pytest.mark.parametrize("kill", [2, 5, 7])
def test_killed_before_the_alarm_it_ends_in_the_same_bits(kill, bench, make_task, make_spec, tmp_path):
    whole = _fit(bench, make_task, make_spec(), "whole")
    with pytest.raises(Killed):
        _fit(bench, make_task, make_spec(), "killed", kill=kill)
    assert _fit(bench, make_task, make_spec(), "killed") == whole
    bench.assert_equal("killed", "whole", tmp_path)


def test_started_again_it_comes_to_the_same_end(bench, make_task, make_spec, tmp_path):
    spec = make_spec()
    first = _fit(bench, make_task, spec, "run")
    rows = bench.rows("run")
    again = _fit(bench, make_task, spec, "run")
    assert again == first
    assert bench.rows("run") == rows
    assert bench.steps("run") == [3, 4, 6]


def test_an_alarm_that_does_not_stop_is_told_and_no_more(bench, make_task, make_spec):
    fitted = _fit(bench, make_task, make_spec(), "warned", stop=False)
    assert (fitted.final_step, fitted.stopped) == (12, None)
    assert [e["step"] for e in bench.run("warned").events() if e["event"] == "alarm"] == [8]


def test_without_a_checkpoint_to_go_back_to_the_error_says_so(bench, make_task, make_spec):
    spec = make_spec(checkpoint=Checkpointing(every=Interval(steps=100)))
    with pytest.raises(PoiseError, match="too good, at step 4, and no checkpoint is older"):
        _fit(bench, make_task, spec, "early", at=4)


def test_the_sum_of_step_sizes_is_kept_through_kills(bench, make_task, make_spec: Callable[..., object]):
    spec = make_spec()
    with pytest.raises(Killed):
        _fit(bench, make_task, spec, "sum", stop=False, kill=7)
    _fit(bench, make_task, spec, "sum", stop=False)
    sums = {r["step"]: r["value"] for r in bench.rows("sum") if r["name"] == "sum_lr"}
    for step, value in sums.items():
        assert value == pytest.approx(sum(0.05 * factor(spec.schedule, s, 12) for s in range(step)), rel=1e-12)
    assert max(sums) == 12
