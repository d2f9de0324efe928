from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.observe.names import PHASES
from poise.observe.timers import PhaseTimers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_a_phase_inside_another_pauses_it() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    clock.pass_(50)  # outside of every phase: charged to none
    with timers("forward_backward"):
        clock.pass_(1)
        with timers("attack"):
            clock.pass_(10)
            with timers("data"):
                clock.pass_(0.5)
            clock.pass_(20)
        clock.pass_(2)
    assert timers.take() == {"data": 0.5, "generate": 0, "attack": 30, "forward_backward": 3, "optim": 0, "report": 0}


def test_a_phase_inside_itself_counts_once() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with timers("optim"), timers("optim"):
        clock.pass_(3)
    assert timers.take()["optim"] == 3


def test_take_splits_an_open_phase_and_totals_go_on() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)
    with timers("report"):
        clock.pass_(3)
        assert timers.take()["report"] == 3
        clock.pass_(4)
    assert timers.take()["report"] == 4
    assert timers.take()["report"] == 0
    assert timers.totals["report"] == 7


def test_an_exception_closes_its_phase() -> None:
    clock = Clock()
    timers = PhaseTimers(clock=clock)

    def failing_read() -> None:
        with timers("data"):
            clock.pass_(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_read()
    clock.pass_(9)
    assert sum(timers.take().values()) == 1


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(KeyError):
        PhaseTimers()("warmup")


tree: Any = st.recursive(
    st.integers(0, 5), lambda inner: st.tuples(st.sampled_from(PHASES), st.lists(inner, max_size=4)), max_leaves=20
)


@settings(deadline=None, max_examples=60)
@given(st.lists(tree, max_size=4))
def test_seconds_are_those_of_the_innermost_phase(trees: list[Any]) -> None:
    clock, expected = Clock(), dict.fromkeys(PHASES, 0.0)
    timers = PhaseTimers(clock=clock)

    def walk(node: Any, inside: str | None) -> None:
        if isinstance(node, int):
            clock.pass_(node)
            if inside:
                expected[inside] += node
            return
        with timers(node[0]):
            for child in node[1]:
                walk(child, node[0])

    for node in itertools.chain(trees, [1]):
        walk(node, None)
    assert timers.take() == expected
