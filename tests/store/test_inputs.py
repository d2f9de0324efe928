"""The record of what a run has read: what is hashed, how often, and how a difference is said."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field

from poise.data.images.spec import DataSpec
from poise.data.text.spec import JsonlText
from poise.engine.lifecycle import claim
from poise.errors import IntegrityError, UserError
from poise.spec import Input, RunSpec
from poise.store import hashes
from poise.store.inputs import check_inputs, read_inputs, record_inputs
from poise.store.result import RunResult, write_result
from poise.store.runs import Run, open_run

PARQUET = ("train-0.parquet", "train-1.parquet", "test.parquet", "readme.md")


class ReadingSpec(RunSpec):
    """A kind that reads images and text."""

    data: DataSpec | None = Field(None, description="images")
    text: JsonlText | None = Field(None, description="text")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files; none is small enough to be hashed each time."""
    monkeypatch.setattr(hashes, "LARGE", 4)
    monkeypatch.setattr("poise.store.inputs.LARGE", 4)
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "images"
    root.mkdir()
    for name in PARQUET:
        (root / name).write_text(f"rows of {name}")
    return root


def reading(tmp_path: Path, root: Path) -> tuple[Run, RunSpec]:
    spec = ReadingSpec(kind="x", name="one", store=str(tmp_path / "runs"), data=DataSpec(name="images", root=str(root)))
    return open_run(tmp_path / "runs", "one"), spec


def record(run: Run, spec: RunSpec) -> None:
    record_inputs(run, spec, committed=True)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    real = hashes.sha256_of
    monkeypatch.setattr(hashes, "sha256_of", lambda path: names.append(path.name) or real(path))
    return names


def test_a_large_file_is_hashed_once_and_again_when_it_was_touched(tmp_path, images, monkeypatch):
    run, spec = reading(tmp_path, images)
    hashed = counted(monkeypatch)
    record(run, spec)
    assert sorted(hashed) == sorted(PARQUET[:3])
    hashed.clear()
    record(run, spec)
    check_inputs(run, spec)
    other = open_run(tmp_path / "runs", "two")
    record(other, spec)  # the hashes are known on this machine
    assert hashed == []
    os.utime(images / "train-1.parquet", (1, 1))
    record(run, spec)
    record(run, spec)
    assert hashed == ["train-1.parquet"]
    assert {entry.modified for entry in read_inputs(run).values() if entry.file == "train-1.parquet"} == {1.0}


def test_a_change_that_keeps_size_and_name_is_found(tmp_path, images):
    run, spec = reading(tmp_path, images)
    record(run, spec)
    (images / "readme.md").write_text("not read")
    record(run, spec)
    (images / "train-0.parquet").write_text("cows of train-0.parquet")
    with pytest.raises(UserError, match=r"data\.root: .*/images/train-0\.parquet has changed: 23 bytes, sha256 \w{12}"):
        record(run, spec)


def test_files_that_come_and_go_are_named(tmp_path, images):
    run, spec = reading(tmp_path, images)
    record(run, spec)
    (images / "train-1.parquet").rename(images / "train-2.parquet")
    with pytest.raises(UserError) as caught:
        record(run, spec)
    assert "images/train-1.parquet is gone" in str(caught.value)
    assert "images/train-2.parquet is new" in str(caught.value)
    assert "train-0" not in str(caught.value)


def test_a_place_that_is_not_there_is_left_to_who_reads_it(tmp_path, images):
    run, spec = reading(tmp_path, tmp_path / "elsewhere")
    record(run, spec)
    assert read_inputs(run) == {}
    images.rename(tmp_path / "elsewhere")
    record(run, spec)
    assert len(read_inputs(run)) == 3


def test_a_run_without_results_may_begin_with_other_files(tmp_path, images):
    run, spec = reading(tmp_path, images)
    record_inputs(run, spec)
    (images / "test.parquet").write_text("others")
    record_inputs(run, spec)
    run.write("samples/shard-00000.parquet", b"drawn")
    (images / "test.parquet").write_text("once more")
    with pytest.raises(UserError, match="has changed"):
        record_inputs(run, spec)


def test_one_file_is_looked_for_by_itself(tmp_path, monkeypatch):
    """And a relative path that means another file in another folder is compared by its content."""
    for name, text in (("a", "first"), ("b", "first"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(text)
        (tmp_path / name / "rows.jsonl.bak").write_text(name)
    spec = ReadingSpec(
        kind="x", name="one", store=str(tmp_path / "runs"), text=JsonlText(name="jsonl", path="rows.jsonl")
    )
    run = open_run(tmp_path / "runs", "one")
    for name in ("a", "b"):
        monkeypatch.chdir(tmp_path / name)
        record(run, spec)
    assert [entry.file for entry in read_inputs(run).values()] == ["rows.jsonl"]
    monkeypatch.chdir(tmp_path / "c")
    with pytest.raises(UserError, match=r"text\.path: rows\.jsonl has changed"):
        record(run, spec)


def test_a_damaged_record_is_named(tmp_path, images):
    run, spec = reading(tmp_path, images)
    run.write("inputs.json", b"[{]")
    with pytest.raises(IntegrityError, match=r"inputs\.json is damaged .*remove that one file"):
        record(run, spec)


def test_reading_that_takes_long_is_announced_and_its_rate_is_said(tmp_path, images, monkeypatch):
    """Files that are hashed slowly stand for large ones; what is remembered is not read again, and nothing is said."""
    run, spec = reading(tmp_path, images)
    monkeypatch.setattr("poise.store.inputs._SILENT_S", 0.05)
    real = hashes.sha256_of

    def slowly(path: Path) -> str:
        time.sleep(0.1)
        return real(path)

    monkeypatch.setattr(hashes, "sha256_of", slowly)
    notes: list[str] = []
    with claim(run, spec, notes.append):
        pass
    begun, ended = notes
    assert begun == "reading 0.0 GB of inputs (data.root) to record what the run depends on"
    assert re.fullmatch(r"read 0\.0 GB of inputs \(data\.root\) in \d+ s, \d+ MB/s", ended)
    with claim(run, spec, notes.append):
        pass
    assert len(notes) == 2


class Judging(RunSpec):
    """A kind that reads a run."""

    judged: str

    def inputs(self) -> Iterator[Input]:
        yield Input(("judged",), "run", self.judged)


def test_a_run_that_is_made_of_others_has_changed_when_one_of_them_has(tmp_path: Path) -> None:
    def made(name: str, result: RunResult) -> None:
        one = open_run(tmp_path, name)
        one.start("x", "0" * 64)
        write_result(one, result)
        one.finish("finished")

    made("part", RunResult(kind="x", run="part", seed=0))
    made("whole", RunResult(kind="x", run="whole", seed=0, parts=["part"]))
    spec, run = Judging(kind="x", name="one", store=str(tmp_path), judged="whole"), open_run(tmp_path, "one")
    record(run, spec)
    record(run, spec)
    made("part", RunResult(kind="x", run="part", seed=1))
    with pytest.raises(UserError, match="judged: run 'whole' has changed"):
        record(run, spec)
