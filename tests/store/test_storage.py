"""The promises of a storage, on a folder and on S3."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import StoreError, UserError
from poise.store.storage import RESERVED, Storage, check_key, open_storage


def test_read_gives_what_was_written_last(storage: Storage) -> None:
    storage.write("a/b.bin", b"first")
    storage.write("a/b.bin", b"\x00second")
    assert storage.read("a/b.bin") == b"\x00second"


@pytest.mark.parametrize("key", ["missing", "a/missing", "a", "a/b/c"])
def test_a_missing_object_is_named(storage: Storage, tmp_path: Path, key: str) -> None:
    storage.write("a/b", b"1")
    target = tmp_path / "copy"
    for act in (storage.read, storage.sha256, lambda key: storage.download(key, target)):
        with pytest.raises(FileNotFoundError, match=key):
            act(key)
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(RESERVED)] == []
    assert storage.compare_and_swap(key, b"2", b"1") is False


def test_listing_is_sorted_has_sizes_and_takes_any_prefix(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.folders() == []
    for key in ("runs/b/2", "runs/a/10", "runs/a/1", "runs/ab", "top"):
        storage.write(key, key.encode())
    assert [entry.key for entry in storage.list()] == ["runs/a/1", "runs/a/10", "runs/ab", "runs/b/2", "top"]
    assert [entry.key for entry in storage.list("runs/a")] == ["runs/a/1", "runs/a/10", "runs/ab"]
    assert [(entry.key, entry.size) for entry in storage.list("runs/a/")] == [("runs/a/1", 8), ("runs/a/10", 9)]
    assert storage.list("nothing/") == []
    assert storage.folders() == ["runs"]
    assert abs(storage.list("top")[0].modified - time.time()) < 300


def test_listing_and_deletion_go_past_one_page(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "7")
    monkeypatch.setattr("poise.store.s3._BATCH", 5)
    keys = [f"{folder}/{index:04d}" for folder in ("one", "two") for index in range(12)]
    for key in keys:
        storage.write(key, b"")
    assert [entry.key for entry in storage.list()] == keys
    assert storage.folders() == ["one", "two"]
    storage.delete([*keys[1:], "one/not-there"])
    assert [entry.key for entry in storage.list()] == keys[:1]
    storage.delete([])


def test_one_of_32_racing_creates_wins(storage: Storage) -> None:
    contents = [f"writer {index}".encode() * 50 for index in range(32)]
    with ThreadPoolExecutor(32) as pool:
        won = list(pool.map(lambda data: storage.create("lock", data), contents))
    assert won.count(True) == 1
    assert storage.read("lock") == contents[won.index(True)]
    assert [entry.key for entry in storage.list()] == ["lock"]


def test_one_of_16_racing_swaps_wins_each_round(storage: Storage) -> None:
    storage.create("lock", b"start")
    seen = b"start"
    for turn in range(5):
        contents = [f"round {turn} writer {index}".encode() for index in range(16)]
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda data, seen=seen: storage.compare_and_swap("lock", data, seen), contents))
        assert won.count(True) == 1
        assert storage.read("lock") == contents[won.index(True)]
        assert storage.compare_and_swap("lock", b"late", seen) is False
        seen = storage.read("lock")


def test_a_folder_appends_in_place_and_s3_refuses_to(storage: Storage) -> None:
    is_folder = not storage.url.startswith("s3://")
    assert storage.append("events", b"one\n") is is_folder
    assert storage.append("events", b"two\n") is is_folder
    assert [storage.read(entry.key) for entry in storage.list()] == [b"one\ntwo\n"] * is_folder


def test_move(storage: Storage) -> None:
    storage.write("log/events", b"one\ntwo\n")
    storage.write("old", b"replaced")
    storage.move("log/events", "old")
    assert storage.read("old") == b"one\ntwo\n"
    assert [entry.key for entry in storage.list()] == ["old"]
    assert storage.folders() == []


def test_files_of_several_parts_go_up_and_down_unchanged(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source.bin", tmp_path / "deep" / "er" / "target.bin"
    source.write_bytes(os.urandom((9 << 20) + 13))
    storage.upload(source, "big/file.bin")
    storage.download("big/file.bin", target)
    assert target.read_bytes() == source.read_bytes()
    assert storage.list("big/")[0].size == source.stat().st_size


def test_a_pickled_storage_carries_no_secret(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-hush")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUSHHUSH")
    storage = open_storage(s3_store)
    storage.write("a", b"1")  # the client exists now
    pickled = pickle.dumps(storage)
    assert b"hush" not in pickled.lower()
    assert pickle.loads(pickled).read("a") == b"1"


def test_what_dead_writers_left_is_swept_by_age(s3_store: str, tmp_path: Path) -> None:
    import boto3

    folder, remote = open_storage(tmp_path / "store"), open_storage(s3_store)
    for storage in (folder, remote):
        storage.write("run/kept", b"1")
    stale = tmp_path / "store" / "run" / f"{RESERVED}tmp-dead"
    stale.write_bytes(b"half of something")
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    boto3.client("s3").create_multipart_upload(Bucket=bucket, Key=f"{prefix}/run/half")
    assert folder.sweep(3600) == []
    for storage, name in ((folder, f"run/{stale.name}"), (remote, "run/half")):
        assert storage.sweep(-60) == [name]
        assert storage.sweep(-60) == []
        assert [entry.key for entry in storage.list()] == ["run/kept"]


PARTS = st.sampled_from(["a", "b.c", "step-00000010", "name with space", "\u00e9t\u00e9"])
TRAPS = st.sampled_from(["", ".", "..", "a\\b", "a\x00", "a\n", "\ud800", f"{RESERVED}tmp-1", "x" * 201])


@given(st.lists(PARTS, max_size=3), TRAPS, st.lists(PARTS, max_size=3))
@settings(deadline=None, max_examples=200)
def test_a_key_with_one_bad_part_is_refused(before: list[str], trap: str, after: list[str]) -> None:
    with pytest.raises(UserError, match="relative path"):
        check_key("/".join([*before, trap, *after]))


@given(st.text(alphabet=st.sampled_from("ab./\\~ \u00e9\x00"), max_size=12))
@settings(deadline=None, max_examples=300)
def test_no_accepted_key_leaves_the_folder(key: str) -> None:
    try:
        check_key(key)
    except UserError:
        return
    root = "/srv/store"
    path = os.path.normpath(os.path.join(root, key))
    assert path.startswith(root + "/")
    assert path == f"{root}/{key}"  # nothing was collapsed: one object has one key


@pytest.mark.parametrize(
    "act", ["read", "write", "create", "compare_and_swap", "append", "delete", "move", "download", "sha256"]
)
def test_every_way_in_checks_the_key(storage: Storage, tmp_path: Path, act: str) -> None:
    arguments = {
        "write": (b"",),
        "create": (b"",),
        "compare_and_swap": (b"", b""),
        "append": (b"",),
        "move": ("fine",),
        "download": (tmp_path / "x",),
    }
    key = "../outside"
    with pytest.raises(UserError, match="outside"):
        getattr(storage, act)([key] if act == "delete" else key, *arguments.get(act, ()))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "write a folder"),
        ("gs://bucket/x", "write a folder, such as runs, or s3://bucket/prefix"),
        ("file:///tmp/x", "write a folder"),
        ("S3:bucket/x", "write a folder"),
        ("a\x00b", "write a folder"),
        ("s3://", "s3://bucket/prefix"),
        ("s3://Bucket_1/x", "s3://bucket/prefix"),
        ("s3://bucket/../x", "relative path"),
        ("s3://bucket//x", "relative path"),
    ],
)
def test_an_address_that_is_no_store_is_refused(url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://AKIA:hush@bucket/x", "s3://bucket/x?secret_key=hush", "s3://bucket/x#hush"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_storage(url)
    assert "hush" not in str(caught.value)


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("a", b"1")
    assert (tmp_path / "runs" / "a").read_bytes() == b"1"


def test_a_missing_bucket_is_named(s3_store: str) -> None:
    storage = open_storage("s3://no-such-bucket-here/x")
    for act in (lambda: storage.read("a"), lambda: storage.write("a", b""), storage.list):
        with pytest.raises(StoreError, match=r"no bucket 'no-such-bucket-here' .*AWS_ENDPOINT_URL"):
            act()


def test_missing_credentials_name_the_variables(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_storage(s3_store).write("a", b"1")


def test_refused_access_names_the_bucket(s3_store: str) -> None:
    from botocore.exceptions import ClientError

    storage = open_storage(s3_store)
    refusal = ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "PutObject")

    def refuse(**kwargs: object) -> None:
        raise refusal

    storage._client.put_object = refuse  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match=r"refused access \(AccessDenied\).*AWS_SECRET_ACCESS_KEY.*'poise-"):
        storage.write("a", b"1")


@pytest.mark.usefixtures("no_pause")
def test_an_unreachable_endpoint_is_named_without_its_password(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hush@127.0.0.1:9")
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9 cannot be reached .*AWS_ENDPOINT_URL") as caught:
        open_storage(s3_store).read("a")
    assert "hush" not in str(caught.value)


@pytest.mark.usefixtures("no_pause")
def test_everything_works_when_s3_fails_one_request_in_three(flaky_s3: str, tmp_path: Path) -> None:
    storage, source = open_storage(flaky_s3), tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    for index in range(24):
        assert storage.create(f"lock-{index}", f"owner {index}".encode()) is True  # though some answers were lost
        assert storage.create(f"lock-{index}", b"rival") is False
        assert storage.compare_and_swap(f"lock-{index}", b"next", f"owner {index}".encode()) is True
    storage.upload(source, "file")
    storage.download("file", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert len(storage.list()) == 25


@pytest.mark.usefixtures("no_pause")
def test_s3_that_never_answers_is_an_error_that_says_so(dead_s3: str) -> None:
    with pytest.raises(StoreError, match=r"failed PutObject after 11 tries .*nothing that was committed is lost"):
        open_storage(dead_s3).write("a", b"1")


def test_a_full_disk_is_named_and_leaves_what_was_there(full_disk: Path, tmp_path: Path, s3_store: str) -> None:
    storage, big = open_storage(full_disk / "store"), tmp_path / "big"
    big.write_bytes(os.urandom(400_000))
    storage.write("kept", b"sound")
    for act in (
        lambda: storage.write("kept", big.read_bytes()),
        lambda: storage.create("new", big.read_bytes()),
        lambda: storage.upload(big, "new"),
    ):
        with pytest.raises(StoreError, match=r"no space left: free space and run again"):
            act()
        assert [path.name for path in (full_disk / "store").iterdir()] == ["kept"]
        assert storage.read("kept") == b"sound"
    remote = open_storage(s3_store)
    remote.upload(big, "big")
    with pytest.raises(StoreError, match="no space left"):
        remote.download("big", full_disk / "copy")
    assert [path.name for path in full_disk.iterdir()] == ["store"]


def test_a_file_in_the_way_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(StoreError, match="store"):
        open_storage(tmp_path / "store").write("a", b"1")


@pytest.mark.parametrize("place", ["/proc/poise", "file/runs"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    storage = open_storage(place)
    for write in (storage.write, storage.create, storage.append):
        with pytest.raises(StoreError, match=rf"^store: .*{place} cannot be made \(.*\): name a folder"):
            write("run/key", b"")
