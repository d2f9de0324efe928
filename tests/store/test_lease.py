"""Of two drivers that want one run, one has it; a dead one does not keep it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from poise.errors import RunBusyError, StoreError
from poise.store.folder import FolderStorage
from poise.store.lease import Lease
from poise.store.storage import Storage, open_storage

SPAWN = multiprocessing.get_context("spawn")


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def change_lock(storage: Storage, **changes: object) -> None:
    written = json.loads(storage.read("digits/LOCK"))
    storage.write("digits/LOCK", json.dumps(written | changes).encode())


def test_the_second_driver_is_told_who_holds_the_run(storage: Storage) -> None:
    with Lease(storage, "digits") as lease:
        assert Lease.holds(storage, "digits", lease.token)
        assert Lease.is_held(storage, "digits")
        lease.check()
        with pytest.raises(
            RunBusyError, match=rf"'digits' is held by process {os.getpid()} on .* since .* another name"
        ):
            Lease(storage, "digits").__enter__()
    assert not Lease.holds(storage, "digits", lease.token)
    assert not Lease.is_held(storage, "digits")
    with pytest.raises(RunBusyError, match="stops here"):
        lease.check()
    with Lease(storage, "digits") as second:
        second.check()


def test_nobody_holds_what_was_never_taken(storage: Storage) -> None:
    assert not Lease.is_held(storage, "digits")
    assert not Lease.holds(storage, "digits", "")


def test_a_lease_is_given_back_when_the_driver_fails(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), Lease(storage, "digits"):
        raise ZeroDivisionError
    assert not Lease.is_held(storage, "digits")
    assert not Lease.holds(storage, "digits", "")


@pytest.mark.parametrize("taken_over", [False, True])
def test_one_of_many_racing_drivers_wins(storage: Storage, taken_over: bool) -> None:
    if taken_over:
        with Lease(storage, "digits"):
            pass
    leases = [Lease(storage, "digits") for _ in range(12)]

    def enter(lease: Lease) -> bool:
        try:
            lease.__enter__()
        except RunBusyError:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        won = list(pool.map(enter, leases))
    assert won.count(True) == 1
    assert [Lease.holds(storage, "digits", lease.token) for lease in leases] == won
    leases[won.index(True)].__exit__(None, None, None)


def race(url: str, connection: Connection) -> None:
    storage = open_storage(url)
    storage.list()  # the client is made before the race
    connection.send("ready")
    connection.recv()
    try:
        with Lease(storage, "digits"):
            connection.send("won")
            connection.recv()
    except RunBusyError as error:
        connection.send(str(error))


def start(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def test_of_two_racing_processes_one_wins(url: str) -> None:
    rivals = [start(race, url) for _ in range(2)]
    assert [connection.recv() for _, connection in rivals] == ["ready", "ready"]
    for _, connection in rivals:
        connection.send("go")
    said = [connection.recv() for _, connection in rivals]
    assert said.count("won") == 1
    winner = said.index("won")
    assert f"held by process {rivals[winner][0].pid} on" in said[1 - winner]
    rivals[winner][1].send("leave")
    for process, _ in rivals:
        process.join()
        assert process.exitcode == 0
    assert not Lease.is_held(open_storage(url), "digits")


def hold(url: str, connection: Connection) -> None:
    with Lease(open_storage(url), "digits", expires_s=3600):
        connection.send("held")
        connection.recv()


def test_a_killed_driver_is_followed_at_once(url: str) -> None:
    process, connection = start(hold, url)
    assert connection.recv() == "held"
    storage = open_storage(url)
    with pytest.raises(RunBusyError, match=f"process {process.pid} "):
        Lease(storage, "digits").__enter__()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not Lease.is_held(storage, "digits"))  # though nobody waited for it: it is a zombie now
    with Lease(storage, "digits") as lease:
        lease.check()
    process.join()


def test_another_process_of_the_same_number_is_not_the_holder(storage: Storage) -> None:
    with Lease(storage, "digits", renew_s=3600) as lease:
        change_lock(storage, started=1)
        assert not Lease.is_held(storage, "digits")
        with Lease(storage, "digits") as second:
            with pytest.raises(RunBusyError, match="This driver had it before, and stops here"):
                lease.check()
            second.check()


def test_a_driver_elsewhere_is_respected_until_its_lease_expires(storage: Storage) -> None:
    with Lease(storage, "digits", renew_s=3600) as lease:
        change_lock(storage, host="node-7", space="another boot", pid=1, started=1)
        with pytest.raises(RunBusyError, match=r"process 1 on node-7 .* try again in 30 s"):
            Lease(storage, "digits").__enter__()
        change_lock(storage, host="node-7", space="another boot", pid=1, started=1, renewed=time.time() - 31)
        with Lease(storage, "digits") as second:
            assert not Lease.holds(storage, "digits", lease.token)
            second.check()


def test_a_lease_from_a_wrong_clock_is_watched_and_taken_over_if_nobody_renews_it(storage: Storage) -> None:
    elsewhere = {"host": "node-7", "space": "another boot", "pid": 1, "started": 1}
    with Lease(storage, "digits", renew_s=3600):
        change_lock(storage, **elsewhere, renewed=time.time() + 10**6, expires_s=0.3)
        assert not Lease.is_held(storage, "digits")
        with Lease(storage, "digits", renew_s=0.05) as second:
            second.check()


def test_a_driver_whose_clock_is_wrong_is_respected_while_it_renews(storage: Storage) -> None:
    elsewhere = {"host": "node-7", "space": "another boot", "pid": 1, "started": 1}
    with Lease(storage, "digits", renew_s=3600):
        change_lock(storage, **elsewhere, renewed=time.time() + 10**6, expires_s=30)
        over = threading.Event()

        def renew() -> None:
            for later in itertools.count():
                if over.wait(0.05):
                    return
                change_lock(storage, renewed=time.time() + 10**6 + later)

        thread = threading.Thread(target=renew)
        thread.start()
        with pytest.raises(RunBusyError, match=r"process 1 on node-7 .* try again in 30 s"):
            Lease(storage, "digits", renew_s=0.1).__enter__()
        over.set()
        thread.join()


def test_who_waits_is_told_how_long(storage: Storage) -> None:
    with Lease(storage, "digits", renew_s=3600):
        change_lock(storage, host="node-7", space="another boot", pid=1, started=1, renewed=time.time() - 20)
        with pytest.raises(RunBusyError, match=r"try again in (9|10) s"):
            Lease(storage, "digits").__enter__()


def test_a_lease_is_renewed_while_it_is_held(storage: Storage) -> None:
    def renewed() -> float:
        return float(json.loads(storage.read("digits/LOCK"))["renewed"])

    with Lease(storage, "digits", renew_s=0.01):
        first = renewed()
        wait_for(lambda: renewed() > first)


def test_a_driver_that_was_followed_never_takes_the_lease_back(storage: Storage) -> None:
    with Lease(storage, "digits", renew_s=0.01) as lease:
        change_lock(storage, token="of another", renewed=time.time() + 3600)
        wait_for(lambda: not lease._thread.is_alive())
        assert Lease.holds(storage, "digits", "of another")
    assert Lease.holds(storage, "digits", "of another")  # nor does it let go of what is not its own


def test_a_store_that_fails_for_a_while_does_not_end_the_lease(tmp_path: Path) -> None:
    class Failing(FolderStorage):
        failures = 0

        def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
            if self.failures < 3:
                self.failures += 1
                super().compare_and_swap(key, data, expected)  # done, but the answer is lost
                raise StoreError("no answer")
            return super().compare_and_swap(key, data, expected)

    storage = Failing(tmp_path)
    with Lease(storage, "digits", renew_s=0.01) as lease:
        wait_for(lambda: storage.failures == 3)
        seen = storage.read("digits/LOCK")
        wait_for(lambda: storage.read("digits/LOCK") != seen)
        lease.check()
    assert not Lease.is_held(storage, "digits")


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff\x00", b"[1, 2"])
def test_an_unreadable_lock_is_taken_over(storage: Storage, garbage: bytes) -> None:
    storage.write("digits/LOCK", garbage)
    assert not Lease.is_held(storage, "digits")
    with Lease(storage, "digits") as lease:
        lease.check()
