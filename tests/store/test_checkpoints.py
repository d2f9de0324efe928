"""What is trusted is sound, whatever was killed, lost or altered, on a folder and on S3."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from poise.errors import IntegrityError, RunBusyError, StoreError, UserError
from poise.store.checkpoints import Checkpoints
from poise.store.folder import FolderStorage
from poise.store.storage import Storage, open_storage

PREFIX = "digits/checkpoints"


def payload(folder: Path, step: int) -> Path:
    """What a trainer would save at this step: the same bytes every time, in two files, one in a subfolder."""
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(bytes([step % 256]) * 3000)
    (folder / "ranks" / "0.json").write_text(json.dumps({"step": step}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(step: int, tmp_path: Path) -> dict[str, bytes]:
    return content(payload(tmp_path / f"expected-{step}", step))


@pytest.fixture
def checkpoints(storage: Storage, tmp_path: Path) -> Checkpoints:
    """Steps 10, 20 and 30 are committed."""
    checkpoints = Checkpoints(storage, PREFIX)
    for step in (10, 20, 30):
        checkpoints.commit(step, payload(tmp_path / "saved", step), info={"world": 2, "loss": step / 3})
    return checkpoints


def newest(checkpoints: Checkpoints, tmp_path: Path) -> tuple[int | None, list[str]]:
    """The newest sound step, whose files are checked here, and what was said of the newer ones."""
    into = tmp_path / "into"
    commit, damages = checkpoints.latest_valid(into)
    if commit is None:
        assert not into.exists()
        return None, [str(damage) for damage in damages]
    assert content(into) == expected(commit.step, tmp_path)
    for path in sorted(into.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return commit.step, [str(damage) for damage in damages]


def test_what_is_committed_comes_back(checkpoints: Checkpoints, tmp_path: Path) -> None:
    assert [commit.step for commit in checkpoints.commits()] == [10, 20, 30]
    last = checkpoints.commits()[-1]
    assert last.name == "step-00000030"
    assert checkpoints.info(last) == {"world": 2, "loss": 10.0}
    assert content(checkpoints.fetch(last, tmp_path / "fetched")) == expected(30, tmp_path)
    assert checkpoints.verify() == []
    with pytest.raises(UserError, match="not empty"):
        checkpoints.fetch(last, tmp_path / "fetched")


def test_one_file_is_fetched_and_verified_without_the_others(checkpoints: Checkpoints, tmp_path: Path) -> None:
    last = checkpoints.commits()[-1]
    name, *others = sorted(expected(30, tmp_path))
    storage = checkpoints.storage
    for other in others:  # neither downloaded nor looked at
        storage.write(f"{last.key}/{other}", b"damaged")
    fetched = checkpoints.fetch(last, tmp_path / "one", names=[name])
    assert content(fetched) == {name: expected(30, tmp_path)[name]}
    storage.write(f"{last.key}/{name}", b"damaged")
    with pytest.raises(IntegrityError, match=name):
        checkpoints.fetch(last, tmp_path / "two", names=[name])
    with pytest.raises(IntegrityError, match="absent: missing"):
        checkpoints.fetch(last, tmp_path / "three", names=["absent"])


def test_an_empty_store_has_no_checkpoint(storage: Storage, tmp_path: Path) -> None:
    empty = Checkpoints(storage, PREFIX)
    assert (empty.commits(), empty.verify(), empty.prune(1), empty.sweep(0)) == ([], [], [], [])
    assert newest(empty, tmp_path) == (None, [])


def test_steps_sort_as_numbers(storage: Storage, tmp_path: Path) -> None:
    checkpoints = Checkpoints(storage, PREFIX)
    for step in (99_999_999, 100_000_000, 7):
        checkpoints.commit(step, payload(tmp_path / "saved", step), info={})
    assert [commit.step for commit in checkpoints.commits()] == [7, 99_999_999, 100_000_000]
    assert newest(checkpoints, tmp_path) == (100_000_000, [])


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


DAMAGES: list[tuple[str, Callable[[bytes], bytes | None], str]] = [
    ("model.safetensors", lambda data: data[:-1], "2999 bytes instead of 3000"),
    ("model.safetensors", lambda data: b"", "0 bytes instead of 3000"),
    ("model.safetensors", flip, "sha256 differs"),
    ("ranks/0.json", flip, "sha256 differs"),
    ("ranks/0.json", lambda data: None, "missing"),
    ("manifest.json", flip, "sha256 differs from COMMITTED"),
    ("manifest.json", lambda data: data[:10], "sha256 differs from COMMITTED"),
    ("manifest.json", lambda data: None, "missing"),
    ("COMMITTED", lambda data: b"", "manifest.json: sha256 differs from COMMITTED"),
    ("COMMITTED", lambda data: None, "missing: the upload was not finished"),
]


def damage(storage: Storage, step: int, name: str, change: Callable[[bytes], bytes | None]) -> None:
    key = f"{PREFIX}/step-{step:08d}/{name}"
    changed = change(storage.read(key))
    if changed is None:
        storage.delete([key])
    else:
        storage.write(key, changed)


@pytest.mark.parametrize(("name", "change", "said"), DAMAGES)
def test_each_damage_is_named_skipped_and_mended(
    checkpoints: Checkpoints,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes | None],
    said: str,
) -> None:
    last = checkpoints.commits()[-1]
    damage(checkpoints.storage, 30, name, change)
    before = checkpoints.storage.list()
    step, damages = newest(checkpoints, tmp_path)
    assert step == 20
    assert len(damages) == 1
    assert damages[0].startswith("step-00000030/")
    assert said in damages[0]
    assert [str(found) for found in checkpoints.verify()] == damages
    with pytest.raises(IntegrityError, match=r"step-00000030/"):
        checkpoints.fetch(last, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert checkpoints.storage.list() == before  # reading deletes nothing
    checkpoints.commit(30, payload(tmp_path / "saved", 30), info={})  # what the resumed run does
    assert newest(checkpoints, tmp_path) == (30, [])
    assert [commit.step for commit in checkpoints.commits()] == [10, 20, 30]


def test_every_bad_file_is_named_and_the_walk_goes_on(checkpoints: Checkpoints, tmp_path: Path) -> None:
    damage(checkpoints.storage, 30, "ranks/0.json", flip)
    damage(checkpoints.storage, 30, "model.safetensors", lambda data: data + b"x")
    damage(checkpoints.storage, 20, "model.safetensors", flip)
    assert newest(checkpoints, tmp_path) == (
        10,
        [
            "step-00000030/model.safetensors: 3001 bytes instead of 3000",
            "step-00000030/ranks/0.json: sha256 differs",
            "step-00000020/model.safetensors: sha256 differs",
        ],
    )


def test_what_was_damaged_is_kept_aside_until_swept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for _ in range(2):
        damage(checkpoints.storage, 30, "model.safetensors", flip)
        checkpoints.commit(30, payload(tmp_path / "saved", 30), info={})
    aside = [f"{PREFIX}/damaged/step-00000030-{number}" for number in (1, 2)]
    assert len(checkpoints.storage.list(f"{PREFIX}/damaged/")) == 2 * 4
    assert checkpoints.storage.read(f"{aside[1]}/model.safetensors") == flip(
        expected(30, tmp_path)["model.safetensors"]
    )
    assert checkpoints.sweep(3600) == []
    assert checkpoints.sweep(-60) == aside
    assert checkpoints.storage.list(f"{PREFIX}/damaged/") == []
    assert newest(checkpoints, tmp_path) == (30, [])


def test_a_step_committed_twice_is_the_same_commit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    last, before = checkpoints.commits()[-1], checkpoints.storage.list()
    assert checkpoints.commit(30, payload(tmp_path / "saved", 30), info={"wall": 2}) == last
    assert checkpoints.storage.list() == before


def test_a_step_is_not_committed_with_other_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="step-00000030: this step is committed already, whole, with other files"):
        checkpoints.commit(30, payload(tmp_path / "saved", 31), info={})
    assert newest(checkpoints, tmp_path) == (30, [])


def test_a_writer_that_lost_its_lease_changes_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    def refuse() -> None:
        raise RunBusyError("held by another")

    damage(checkpoints.storage, 30, "model.safetensors", flip)
    before = checkpoints.storage.list()
    with pytest.raises(RunBusyError):
        checkpoints.commit(30, payload(tmp_path / "saved", 30), info={}, check_lease=refuse)
    assert checkpoints.storage.list() == before


def test_a_writer_that_loses_its_lease_while_uploading_does_not_commit(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    calls: list[int] = []

    def refuse_later() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise RunBusyError("taken over")

    with pytest.raises(RunBusyError):
        checkpoints.commit(40, payload(tmp_path / "saved", 40), info={}, check_lease=refuse_later)
    assert len(calls) == 2
    assert newest(checkpoints, tmp_path) == (30, ["step-00000040/COMMITTED: missing: the upload was not finished"])


def test_an_upload_cut_short_by_the_store_is_not_committed(tmp_path: Path) -> None:
    class Truncating(FolderStorage):
        def upload(self, path: Path, key: str) -> None:
            self.write(key, path.read_bytes()[:-1])

    checkpoints = Checkpoints(Truncating(tmp_path / "store"), PREFIX)
    with pytest.raises(IntegrityError, match="2999 bytes instead of 3000"):
        checkpoints.commit(10, payload(tmp_path / "saved", 10), info={})
    assert checkpoints.commits() == []


def test_of_two_writers_of_one_step_one_is_told(tmp_path: Path) -> None:
    """The rival commits in the moment between our last look and our commit."""
    checkpoints = Checkpoints(FolderStorage(tmp_path / "store"), PREFIX)
    mark = f"{PREFIX}/step-00000010/COMMITTED"
    calls: list[int] = []

    def rival() -> None:
        calls.append(1)
        if len(calls) == 2:
            checkpoints.storage.create(mark, b"another manifest")

    with pytest.raises(StoreError, match="another writer"):
        checkpoints.commit(10, payload(tmp_path / "saved", 10), info={}, check_lease=rival)
    assert checkpoints.storage.read(mark) == b"another manifest"


@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED"])
def test_names_of_the_store_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).write_text("x")
    with pytest.raises(UserError, match=name):
        Checkpoints(FolderStorage(tmp_path / "store"), PREFIX).commit(1, tmp_path / "saved", info={})


@pytest.mark.parametrize(("step", "said"), [(-1, "not -1"), (10**12, "999999999999"), (1, "no file")])
def test_nothing_to_commit_is_refused(tmp_path: Path, step: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Checkpoints(FolderStorage(tmp_path / "store"), PREFIX).commit(step, tmp_path / "missing", info={})


def test_a_manifest_that_leads_out_of_the_folder_is_damage(tmp_path: Path) -> None:
    import hashlib

    storage = FolderStorage(tmp_path / "store")
    checkpoints = Checkpoints(storage, PREFIX)
    checkpoints.commit(10, payload(tmp_path / "saved", 10), info={})
    key = f"{PREFIX}/step-00000010"
    manifest = json.loads(storage.read(f"{key}/manifest.json"))
    manifest["files"]["../../escape"] = manifest["files"].pop("ranks/0.json")
    forged = json.dumps(manifest).encode()
    storage.write(f"{key}/manifest.json", forged)
    storage.write(f"{key}/COMMITTED", hashlib.sha256(forged).hexdigest().encode())
    assert newest(checkpoints, tmp_path) == (
        None,
        ["step-00000010/manifest.json: not a manifest of this version of Poise"],
    )


@pytest.mark.parametrize(
    ("keep", "protect", "removed"),
    [(1, (), [20, 10]), (2, (), [10]), (1, (10,), [20]), (3, (), []), (9, (), []), (1, (10, 20, 99), [])],
)
def test_pruning_keeps_the_newest_and_the_protected(
    checkpoints: Checkpoints, tmp_path: Path, keep: int, protect: Sequence[int], removed: list[int]
) -> None:
    assert checkpoints.prune(keep, protect) == removed
    assert [commit.step for commit in checkpoints.commits()] == sorted({10, 20, 30} - set(removed))
    assert checkpoints.verify() == []


def test_pruning_does_not_count_what_lacks_bytes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    damage(checkpoints.storage, 30, "model.safetensors", lambda data: data[:-1])
    assert checkpoints.prune(1) == [10]
    assert newest(checkpoints, tmp_path)[0] == 20
    damage(checkpoints.storage, 20, "manifest.json", flip)
    before = checkpoints.storage.list()
    assert checkpoints.prune(1) == []
    assert checkpoints.storage.list() == before
    with pytest.raises(UserError, match="at least 1"):
        checkpoints.prune(0)


def test_a_commit_takes_as_many_requests_however_many_were_made(s3_store: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_storage(s3_store), PREFIX)
    requests: list[str] = []
    client = checkpoints.storage._client  # type: ignore[attr-defined]
    client.meta.events.register("before-send.s3", lambda request, **_: requests.append(request.method))
    counts = []
    for step in range(1, 31):
        requests.clear()
        checkpoints.commit(step, payload(tmp_path / "saved", step), info={})
        checkpoints.prune(20)
        counts.append(len(requests))
    assert set(counts[:20]) == {counts[0]}  # nothing is removed yet
    assert set(counts[20:]) == {counts[0] + 3}  # one checkpoint is, each time
    assert counts[0] < 15


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "COMMITTED", "ranks/0.json"])
def test_a_folder_in_the_place_of_a_file_is_stepped_over_and_set_aside(tmp_path: Path, name: str) -> None:
    checkpoints = Checkpoints(FolderStorage(tmp_path / "store"), PREFIX)
    for step in (10, 20):
        checkpoints.commit(step, payload(tmp_path / "saved", step), info={})
    place = tmp_path / "store" / PREFIX / "step-00000020" / name
    place.unlink()
    place.mkdir()
    (place / "kept").write_text("whoever put it there may want it")
    step, damages = newest(checkpoints, tmp_path)
    assert step == 10
    assert name in damages[0]
    checkpoints.commit(20, payload(tmp_path / "saved", 20), info={})
    assert newest(checkpoints, tmp_path) == (20, [])
    kept = list((tmp_path / "store").rglob("kept"))
    assert len(kept) == (name != "COMMITTED")  # without it all of this was an upload that was not finished


@pytest.mark.parametrize("place", ["step-00000020", ""])
def test_a_file_in_the_place_of_a_folder_is_set_aside(tmp_path: Path, place: str) -> None:
    checkpoints = Checkpoints(FolderStorage(tmp_path / "store"), PREFIX)
    path = tmp_path / "store" / PREFIX / place
    path.parent.mkdir(parents=True)
    path.write_text("whoever put it there may want it")
    assert newest(checkpoints, tmp_path)[0] is None
    checkpoints.commit(20, payload(tmp_path / "saved", 20), info={})
    assert newest(checkpoints, tmp_path) == (20, [])
    assert [path.read_text() for path in (tmp_path / "store").rglob(".poise-displaced-*")]


def test_sweeping_takes_old_orphans_only(checkpoints: Checkpoints, tmp_path: Path) -> None:
    damage(checkpoints.storage, 20, "COMMITTED", lambda data: None)
    assert checkpoints.sweep(3600) == []
    assert checkpoints.sweep(-60) == [f"{PREFIX}/step-00000020"]
    assert [commit.step for commit in checkpoints.commits()] == [10, 30]
    assert checkpoints.verify() == []


@pytest.mark.parametrize("half_written", [False, True])
def test_death_at_any_point_of_a_commit(
    storage: Storage, tmp_path: Path, half_written: bool, mortal: type[Any]
) -> None:
    """Whenever it comes, 30 is trusted and untouched, and 40 can be committed afterwards."""
    saved, life, outcomes = payload(tmp_path / "saved", 40), 0, []
    while not outcomes or outcomes[-1] != "done":
        checkpoints = Checkpoints(storage, f"life-{life}/checkpoints")
        older = checkpoints.commit(30, payload(tmp_path / "older", 30), info={})
        before = storage.list(older.key)
        if half_written:
            storage.write(f"{checkpoints.prefix}/step-00000040/leftover.bin", b"of a longer checkpoint")
        try:
            Checkpoints(mortal(storage, life), checkpoints.prefix).commit(40, saved, info={})
            outcomes.append("done")
        except mortal.Killed:
            step, damages = newest(checkpoints, tmp_path)
            outcomes.append(str(step))
            assert all("the upload was not finished" in said for said in damages)
        checkpoints.commit(40, saved, info={})
        assert newest(checkpoints, tmp_path) == (40, [])
        assert storage.list(older.key) == before
        assert not [entry for entry in storage.list() if "leftover" in entry.key]
        life += 1
    changes = 2 + 2 + half_written  # two files, the manifest, COMMITTED; and what was left over
    assert outcomes == ["30"] * changes + ["done"]


def test_death_at_any_point_of_mending_a_damaged_step(storage: Storage, tmp_path: Path, mortal: type[Any]) -> None:
    saved, life, outcomes = payload(tmp_path / "saved", 40), 0, []
    while not outcomes or outcomes[-1] != "done":
        checkpoints = Checkpoints(storage, f"life-{life}/checkpoints")
        checkpoints.commit(30, payload(tmp_path / "older", 30), info={})
        damaged = checkpoints.commit(40, saved, info={})
        storage.write(f"{damaged.key}/model.safetensors", b"\x00" * 3000)
        try:
            Checkpoints(mortal(storage, life), checkpoints.prefix).commit(40, saved, info={})
            outcomes.append("done")
        except mortal.Killed:
            outcomes.append(str(newest(checkpoints, tmp_path)[0]))
        checkpoints.commit(40, saved, info={})
        assert newest(checkpoints, tmp_path) == (40, [])
        assert len(storage.list(f"{checkpoints.prefix}/damaged/")) == 4  # nothing of the evidence is lost
        life += 1
    assert outcomes == ["30"] * 8 + ["done"]  # four objects moved away, four made


def test_death_at_any_point_of_pruning(storage: Storage, tmp_path: Path, mortal: type[Any]) -> None:
    life, done = 0, False
    while not done:
        checkpoints = Checkpoints(storage, f"life-{life}/checkpoints")
        for step in (10, 20, 30):
            checkpoints.commit(step, payload(tmp_path / "saved", step), info={})
        try:
            Checkpoints(mortal(storage, life), checkpoints.prefix).prune(1, protect=[10])
            done = True
        except mortal.Killed:
            pass
        assert newest(checkpoints, tmp_path) == (30, [])
        assert all("the upload was not finished" in found.problem for found in checkpoints.verify())
        checkpoints.prune(1, protect=[10])
        checkpoints.sweep(-60)
        assert [commit.step for commit in checkpoints.commits()] == [10, 30]
        assert checkpoints.verify() == []
        life += 1
    assert life == 4 + 1


@pytest.mark.usefixtures("no_pause")
def test_checkpoints_survive_s3_that_fails_one_request_in_three(flaky_s3: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_storage(flaky_s3), PREFIX)
    for step in (10, 20):
        checkpoints.commit(step, payload(tmp_path / "saved", step), info={})
    assert newest(checkpoints, tmp_path) == (20, [])
    assert checkpoints.prune(1) == [10]


def test_a_disk_that_fills_up_costs_the_new_checkpoint_only(full_disk: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(FolderStorage(full_disk / "store"), PREFIX)
    checkpoints.commit(10, payload(tmp_path / "saved", 10), info={})
    big = payload(tmp_path / "big", 20)
    (big / "optimizer.bin").write_bytes(b"x" * 400_000)
    with pytest.raises(StoreError, match="no space left"):
        checkpoints.commit(20, big, info={})
    step, damages = newest(checkpoints, tmp_path)
    assert step == 10
    assert all("the upload was not finished" in said for said in damages)
    checkpoints.commit(20, payload(tmp_path / "saved", 20), info={})
    assert newest(checkpoints, tmp_path) == (20, [])
