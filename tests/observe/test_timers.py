from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.observe.names import PHASES
from poise.observe.timers import DevicePhaseTimers, PhaseTimers


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


class Device:
    """A device with a queue: the host submits work and markers, and goes on at once."""

    def __init__(self) -> None:
        self.host = 0.0  # seconds
        self.end = 0.0  # when the device has done all that was submitted
        self.num_waits = 0

    def think(self, seconds: float) -> None:
        self.host += seconds

    def submit(self, seconds: float) -> None:
        self.end = max(self.end, self.host) + seconds

    def marker(self) -> DeviceMarker:
        self.submit(0.0)
        return DeviceMarker(self, self.end)


class DeviceMarker:
    def __init__(self, device: Device, time: float) -> None:
        self.device = device
        self.time = time

    def synchronize(self) -> None:
        self.device.num_waits += 1
        self.device.host = max(self.device.host, self.time)

    def elapsed_time(self, end_event: DeviceMarker) -> float:
        assert self.device.host >= end_event.time, "read before the device has reached it"
        return 1000 * (end_event.time - self.time)


def test_a_phase_takes_as_long_as_the_device_works_on_it() -> None:
    device = Device()
    timers = DevicePhaseTimers(device.marker)
    for _ in range(3):
        with timers("forward_backward"):
            device.submit(1)
            with timers("attack"):
                device.submit(10)
            device.submit(2)
        with timers("optim"):
            device.submit(0.5)
        device.submit(7)  # outside of every phase
    assert device.num_waits == 0, "a phase has waited for the device"
    seconds = timers.take()
    assert seconds == {"data": 0, "generate": 0, "attack": 30, "forward_backward": 9, "optim": 1.5, "report": 0}
    assert device.num_waits == 1
    assert sum(timers.take().values()) == 0


def test_a_phase_of_the_host_alone_takes_its_time_while_the_device_idles() -> None:
    device = Device()
    timers = DevicePhaseTimers(device.marker)
    with timers("data"):
        device.think(3)
    with timers("forward_backward"):
        device.submit(4)
    with timers("data"):
        device.think(1)  # while the device is still at work
    assert timers.take() == {"data": 3, "generate": 0, "attack": 0, "forward_backward": 4, "optim": 0, "report": 0}


def test_take_splits_an_open_phase_of_a_device() -> None:
    device = Device()
    timers = DevicePhaseTimers(device.marker)
    with timers("report"):
        device.submit(3)
        assert timers.take()["report"] == 3
        device.submit(4)
    assert timers.take()["report"] == 4
    assert timers.totals["report"] == 7


def test_markers_do_not_accumulate_where_nobody_asks_for_the_times() -> None:
    device = Device()
    markers: list[weakref.ref[DeviceMarker]] = []

    def marker() -> DeviceMarker:
        markers.append(weakref.ref(new := device.marker()))
        return new

    timers = DevicePhaseTimers(marker)
    for _ in range(10_000):
        with timers("optim"):
            device.submit(1)
    assert sum(each() is not None for each in markers) < 5000
    assert timers.take()["optim"] == 10_000
