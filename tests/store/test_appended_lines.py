"""Append-only lines: in order and complete whoever writes, reads or dies, and on S3 without rewriting what is there."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from poise.store.appended_lines import FAN_OUT, AppendedLines
from poise.store.folder import FolderStorage
from poise.store.storage import Storage, open_storage

KEY = "digits/events.jsonl"


class WholeObjects(FolderStorage):
    """A folder that, as S3, can only replace whole objects."""

    def append(self, key: str, data: bytes) -> bool:
        return False


@pytest.fixture
def whole_objects(tmp_path: Path) -> Storage:
    return WholeObjects(tmp_path / "store")


def steps(storage: Storage) -> list[int]:
    """The steps of all lines, as another process reads them."""
    return [json.loads(line)["step"] for line in AppendedLines(storage, KEY).read().splitlines()]


def append(lines: AppendedLines, step: int) -> None:
    lines.append([{"event": "commit", "step": step}])


def test_lines_come_back_in_order(storage: Storage) -> None:
    lines = AppendedLines(storage, KEY)
    for step in range(FAN_OUT + 3):
        append(lines, step)
    lines.append([{"event": "commit", "step": 100}, {"event": "commit", "step": 101}])
    assert steps(storage) == [*range(FAN_OUT + 3), 100, 101]
    record = lines.record()
    lines.merge_all()
    assert steps(storage) == [*range(FAN_OUT + 3), 100, 101]
    assert AppendedLines(storage, KEY).record() == record
    assert len(storage.list("digits/")) == 1
    append(AppendedLines(storage, KEY), 102)  # the run goes on
    assert steps(storage)[-1] == 102


def test_bytes_written_grow_linearly_and_few_objects_are_left(
    whole_objects: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewriting one object at each append would write 500 times the bytes of 1,000 lines."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of times
    written: list[int] = []
    for method in ("write", "create"):
        count_bytes(whole_objects, method, written, monkeypatch)
    lines = AppendedLines(whole_objects, KEY)
    for step in range(1000):
        append(lines, step)
        if step + 1 in (250, 500, 1000):
            # each line is written by itself, with FAN_OUT others, and with FAN_OUT^2 others
            assert sum(written) < 3 * len(lines.known())
    assert steps(whole_objects) == list(range(1000))
    assert len(whole_objects.list("digits/")) < 3 * FAN_OUT
    lines.merge_all()
    assert len(whole_objects.list("digits/")) == 1
    assert sum(written) < 4 * len(lines.known())


def test_they_do_so_on_s3(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3_store)
    written: list[int] = []
    count_bytes(storage, "_put", written, monkeypatch)
    lines = AppendedLines(storage, KEY)
    for step in range(100):
        append(lines, step)
    assert steps(storage) == list(range(100))
    assert sum(written) < 2 * len(lines.known())
    assert len(storage.list("digits/")) < 2 * FAN_OUT


def count_bytes(storage: Storage, method: str, written: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the bytes of every call of a method of a storage that writes an object."""
    write = getattr(storage, method)

    def counting(key: str, data: bytes, **options: str) -> Any:
        written.append(len(data))
        return write(key, data, **options)

    monkeypatch.setattr(storage, method, counting)


def test_lines_of_several_writers_are_all_kept(storage: Storage) -> None:
    """The lease admits one writer; one that has lost it may still be in the middle of a call."""

    def write(first: int) -> None:
        lines = AppendedLines(storage, KEY)
        for step in range(first, 12, 4):
            append(lines, step)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert sorted(steps(storage)) == list(range(12))


def test_a_writer_that_has_not_looked_for_long_takes_no_number_twice(whole_objects: Storage) -> None:
    """The numbers that it takes for free were merged into one object, which does not hold its line."""
    early = AppendedLines(whole_objects, KEY)
    append(early, 0)
    late = AppendedLines(whole_objects, KEY)
    for step in range(1, 2 * FAN_OUT):
        append(late, step)
    append(early, 2 * FAN_OUT)
    append(late, 2 * FAN_OUT + 1)
    assert steps(whole_objects) == list(range(2 * FAN_OUT + 2))


def test_a_reader_meets_a_merge(whole_objects: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has listed is gone when it reads it."""
    lines = AppendedLines(whole_objects, KEY)
    for step in range(5):
        append(lines, step)
    list_objects = whole_objects.list

    def list_and_be_late(prefix: str = "") -> Any:
        monkeypatch.setattr(whole_objects, "list", list_objects)
        entries = list_objects(prefix)
        lines.merge_all()
        return entries

    monkeypatch.setattr(whole_objects, "list", list_and_be_late)
    assert steps(whole_objects) == list(range(5))


@pytest.mark.parametrize("merges_all", [False, True])
def test_death_at_any_point_loses_nothing(whole_objects: Storage, mortal: type[Any], merges_all: bool) -> None:
    before = FAN_OUT - 1 if not merges_all else 3
    life = 0
    done = False
    while not done:
        for entry in whole_objects.list():
            whole_objects.delete([entry.key])
        lines = AppendedLines(whole_objects, KEY)
        for step in range(before):
            append(lines, step)
        victim = AppendedLines(mortal(whole_objects, life), KEY)
        try:
            append(victim, before)
            if merges_all:
                victim.merge_all()
            done = True
        except mortal.Killed:
            pass
        found = steps(whole_objects)
        assert found in ([*range(before)], [*range(before + 1)])
        if done:
            assert len(found) == before + 1
        again = AppendedLines(whole_objects, KEY)
        append(again, 99)
        assert steps(whole_objects) == [*found, 99]
        again.merge_all()
        assert steps(whole_objects) == [*found, 99]
        assert len(whole_objects.list()) == 1  # nothing of the attempt that died is left
        life += 1
    assert life > before


def test_a_store_that_was_copied_goes_on_in_order(whole_objects: Storage, tmp_path: Path) -> None:
    """From S3 to a folder, and from a folder to S3."""
    lines = AppendedLines(whole_objects, KEY)
    for step in range(3):
        append(lines, step)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    folder = open_storage(tmp_path / "copy")
    append(AppendedLines(folder, KEY), 3)
    assert steps(folder) == [0, 1, 2, 3]

    plain = open_storage(tmp_path / "plain")
    append(AppendedLines(plain, KEY), 0)
    plain.append(KEY, b'{"event": "commit", "step": 1}')  # its end was not written
    onward = WholeObjects(tmp_path / "plain")
    append(AppendedLines(onward, KEY), 2)
    append(AppendedLines(onward, KEY), 3)
    assert steps(onward) == [0, 1, 2, 3]
    assert plain.read(KEY).count(b"\n") == 1, "what was there is not changed"
