"""Every result of a run is hashed when it is written: what was changed or lost is named, and never read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from poise.errors import IntegrityError
from poise.store.runs import Run
from poise.store.storage import Storage

ROWS = [f"metrics/rows-{step:08d}.parquet" for step in (10, 20, 30)]


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Run:
    """An unfinished run: rows and a checkpoint at each of three steps, a shard of samples, an artifact."""
    run = Run(storage, "digits")
    run.claim_spec("kind: robust.train\nname: digits\n", "a" * 64)
    run.start("robust.train", "a" * 64)
    run.append_events([{"event": "start", "step": 0}])
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ROWS:
        step = int(name[-16:-8])
        run.write_files({name: b"rows of " + name.encode()})
        (saved / "model.bin").write_bytes(bytes(step))
        run.checkpoints.commit(step, saved, info={}, appended=run.results.appended())
        run.append_events([{"event": "commit", "step": step}])
    run.write("samples/shard-00000.parquet", b"samples")
    run.write("artifacts/averaged.safetensors", b"weights")
    return run


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def change(run: Run, name: str, how: Callable[[bytes], bytes]) -> None:
    """Behind the back of the run."""
    run.storage.write(run.key(name), how(run.storage.read(run.key(name))))


def test_what_was_written_is_read_and_sound(run: Run) -> None:
    assert run.read(ROWS[0]) == b"rows of " + ROWS[0].encode()
    assert run.committed_files("metrics/") == ROWS
    assert run.verify() == []


@pytest.mark.parametrize("name", [*ROWS, "samples/shard-00000.parquet", "artifacts/averaged.safetensors", "spec.yaml"])
@pytest.mark.parametrize("how", [flip, lambda data: data[:-1], lambda data: b""])
def test_a_changed_result_of_an_unfinished_run_is_named_and_not_read(
    run: Run, name: str, how: Callable[[bytes], bytes]
) -> None:
    change(run, name, how)
    with pytest.raises(IntegrityError, match=name):
        run.read(name)
    assert [damage.file for damage in run.verify()] == [name]
    run.finish("finished")
    assert [damage.file for damage in run.verify()] == [name]  # the end does not make it right


def test_lost_rows_are_named_and_not_passed_over(run: Run) -> None:
    run.storage.delete([run.key(ROWS[1])])
    assert run.committed_files("metrics/") == ROWS
    with pytest.raises(IntegrityError, match=rf"{ROWS[1]} is missing"):
        run.read(ROWS[1])
    assert [str(damage) for damage in run.verify()] == [f"digits/{ROWS[1]}: missing"]


@pytest.mark.parametrize("name", ["records.jsonl", "events.jsonl"])
@pytest.mark.parametrize("how", [lambda data: data[20:], lambda data: data.replace(b"2", b"3", 1), lambda data: b""])
def test_a_change_of_what_a_checkpoint_vouches_for_is_named(run: Run, name: str, how: Callable[[bytes], bytes]) -> None:
    run.results.merge_appended()
    (file,) = run.files(name.removesuffix(".jsonl"))  # the file, or on S3 the one object that is left
    change(run, file, how)
    damages = run.verify()
    assert f"digits/{name}" in str(damages[0])
    assert "step-00000030" in str(damages[0])
    assert run.read(ROWS[0]) == b"rows of " + ROWS[0].encode()  # a lost record makes no other value of it


def test_a_write_that_was_cut_off_is_no_damage(run: Run) -> None:
    """The record is there, the file is not or is still the one before: the driver died in between."""
    from poise.store.records import record_of

    run.results.record({"metrics/rows-00000040.parquet": record_of(b"never written")})
    run.results.record({"samples/shard-00000.parquet": record_of(b"other samples")})
    run.storage.append(run.key("records.jsonl"), b'{"path": "metr')  # in a folder; an object on S3 is whole
    assert run.verify() == []
    assert run.read("samples/shard-00000.parquet") == b"samples"
    with pytest.raises(FileNotFoundError):
        run.read("metrics/rows-00000040.parquet")
    again = Run(run.storage, "digits")
    again.write("metrics/rows-00000040.parquet", b"written now")
    assert again.read("metrics/rows-00000040.parquet") == b"written now"
    assert run.read("metrics/rows-00000040.parquet") == b"written now"  # also by who looked before
    assert run.verify() == []
    files = run.finish("finished").files
    assert set(files) == {*run.files("metrics/"), *run.files("samples/"), *run.files("artifacts/"), "spec.yaml"}


def test_a_file_that_nobody_recorded_is_named(run: Run) -> None:
    run.storage.write(run.key("metrics/rows-00000025.parquet"), b"from elsewhere")
    assert [str(damage) for damage in run.verify()] == [
        "digits/metrics/rows-00000025.parquet: there is no record of it"
    ]


def test_a_changed_manifest_of_a_finished_run_is_named(run: Run) -> None:
    run.finish("finished", final_step=30, best_step=20)
    change(run, "manifest.json", lambda data: data.replace(b'"best_step": 20', b'"best_step": 30'))
    with pytest.raises(IntegrityError, match=r"manifest.json is damaged \(its sha256 differs\)"):
        run.manifest()
    assert [damage.file for damage in run.verify()] == ["manifest.json"]


def test_a_downloaded_result_is_checked_too(run: Run, tmp_path: Path) -> None:
    run.download("artifacts/averaged.safetensors", tmp_path / "sound")
    assert (tmp_path / "sound").read_bytes() == b"weights"
    change(run, "artifacts/averaged.safetensors", flip)
    with pytest.raises(IntegrityError, match="averaged"):
        run.download("artifacts/averaged.safetensors", tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_a_damaged_spec_is_mended_by_the_same_spec(run: Run) -> None:
    change(run, "spec.yaml", flip)
    assert run.claim_spec("kind: robust.train\nname: digits\n", "a" * 64) is False
    assert run.verify() == []
