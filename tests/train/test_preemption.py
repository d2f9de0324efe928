"""Asked to end by a signal, a training commits its step and goes on from there to the same bits."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import time

import pytest
import torch

from poise.errors import PreemptedError
from poise.store.checkpoints import Checkpoints
from poise.train.context import Context
from poise.train.preemption import PROCESS, StopRequest, StopVote


def signal_at(*batches: int, number: int = signal.SIGTERM):
    """Sends this process a signal while it reads these batches."""

    def interrupt(batch: int) -> None:
        if batch in batches:
            os.kill(os.getpid(), number)

    return interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_loses_no_step(number, bench):
    said = rf"committed at step 8 after {number.name}.* same command"
    handler = signal.getsignal(number)
    with pytest.raises(PreemptedError, match=said) as caught, PROCESS.handled():
        bench.fit("a", signal_at(7, number=number))
    assert caught.value.exit_code == 75
    assert bench.steps("a")[-1] == 8
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("step", range(12))
def test_stopped_at_any_step_it_ends_in_the_same_bits(step, bench, tmp_path):
    whole = bench.fit("whole")
    with pytest.raises(PreemptedError), PROCESS.handled():
        bench.fit("stopped", signal_at(step))
    assert bench.steps("stopped")[-1] == step + 1
    with PROCESS.handled():
        assert bench.fit("stopped") == whole
    starts = [event["step"] for event in bench.run("stopped").events() if event["event"] == "start"]
    assert starts == [0, step + 1]
    bench.assert_equal("stopped", "whole", tmp_path)
    assert bench.run("stopped").verify() == []


def test_stopped_after_every_step_it_ends_in_the_same_bits(bench, tmp_path, adamw):
    whole = bench.fit("whole", optimizer=adamw)
    for step in range(12):
        with pytest.raises(PreemptedError), PROCESS.handled():
            bench.fit("stopped", signal_at(step), optimizer=adamw)
    assert bench.fit("stopped", optimizer=adamw) == whole
    bench.assert_equal("stopped", "whole", tmp_path)


@pytest.mark.parametrize("signals", [1, 2])
def test_killed_before_the_commit_of_a_signal_was_removed_it_leaves_no_checkpoint_behind(
    signals, bench, tmp_path, monkeypatch
):
    """The next commit is there and the one that it replaces still is; the next may be that of another signal."""
    whole = bench.fit("whole")
    with pytest.raises(PreemptedError), PROCESS.handled():
        bench.fit("killed", signal_at(4))
    (provisional,) = set(bench.steps("killed")) - set(bench.steps("whole"))

    def killed(self: Checkpoints, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", killed)
        with pytest.raises(KeyboardInterrupt), PROCESS.handled():
            bench.fit("killed", signal_at(*(5,) * (signals - 1)))
    assert provisional in bench.steps("killed")
    assert bench.steps("killed")[-1] > provisional
    assert bench.fit("killed") == whole
    bench.assert_equal("killed", "whole", tmp_path)


def test_a_second_signal_and_a_step_without_end_do_not_wait(bench, monkeypatch):
    with pytest.raises(PreemptedError, match="stopped at the last commit after SIGHUP"), PROCESS.handled():
        bench.fit("twice", signal_at(6, 7, number=signal.SIGHUP), accumulate=2)
    assert bench.steps("twice") == [3]
    monkeypatch.setenv("POISE_GRACE_S", "0.05")

    def stuck(batch: int) -> None:
        if batch == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    started = time.monotonic()
    with pytest.raises(PreemptedError), PROCESS.handled():
        bench.fit("stuck", stuck)
    assert time.monotonic() - started < 20
    assert bench.steps("stuck") == [3, 4, 6]


def test_outside_a_training_a_signal_raises_at_once_and_an_ignored_one_stays_ignored():
    with pytest.raises(PreemptedError), PROCESS.handled():
        signal.raise_signal(signal.SIGUSR1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with PROCESS.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert PROCESS.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_vote_about_once_a_second_and_at_the_same_steps(bench, monkeypatch):
    """Two ranks whose means are taken by hand: they ask at equal steps, and one that was told stops both."""
    now = [0.0]
    monkeypatch.setattr("poise.train.preemption.time.monotonic", lambda: now[0])
    stops = [StopRequest(), StopRequest()]
    ranks = [Context(bench.run("a"), rank, 2, stop=stops[rank]) for rank in range(2)]
    votes = [StopVote(context) for context in ranks]
    sent: list[torch.Tensor] = []

    def run(step: int) -> list[bool]:
        """Both ranks at one step: first what each would send, then the mean of it."""
        sent.clear()
        for context in ranks:
            monkeypatch.setattr(context, "mean", lambda value: sent.append(value) or value)
        for vote in votes:
            copy.copy(vote).ask(step)
        mean = torch.stack(sent).mean(0) if sent else torch.zeros(2)
        for context in ranks:
            monkeypatch.setattr(context, "mean", lambda value: mean)
        return [vote.ask(step) for vote in votes]

    steps = []
    for step in range(1, 61):
        now[0] += 0.1
        if step == 35:
            stops[1].request("SIGTERM")
        answers = run(step)
        if sent:
            steps.append(step)
        if any(answers):
            break
    assert answers == [True, True]
    assert all(9 <= after - before <= 11 for before, after in itertools.pairwise(steps))
    assert 35 <= step <= 46
    assert stops[0].reason == "a signal to another rank"


def test_a_checkpoint_of_another_number_of_ranks_leaves_the_window_empty(bench, tmp_path):
    from poise.train.state import load_window, save_window

    save_window([{"loss": torch.ones(2)}, {"loss": torch.zeros(2)}], tmp_path)
    assert torch.equal(load_window(tmp_path, 1, 2, torch.device("cpu"))["loss"], torch.zeros(2))
    assert load_window(tmp_path, 0, 1, torch.device("cpu")) == {}
