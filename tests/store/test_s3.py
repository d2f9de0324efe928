"""S3 as it is met: services that lack conditions, fail for a while, cut answers short or disagree about checksums."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from poise.errors import StoreError, UserError
from poise.store.checkpoints import Checkpoints
from poise.store.lease import Lease
from poise.store.storage import open_storage

Behind = Callable[[Callable[[str], str]], str]


def test_a_service_that_ignores_conditional_writes_is_refused_at_claim(s3_behind: Behind) -> None:
    storage = open_storage(s3_behind(lambda method: "ignore"))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"ignores conditional writes .* two drivers .* in a folder"):
            Lease(storage, "digits").__enter__()
    assert [entry.key for entry in storage.list()] == []  # nothing was claimed, and the probe is not shown


def test_a_service_that_honours_them_is_probed_once(s3_behind: Behind) -> None:
    methods: list[str] = []

    def count(method: str) -> str:
        methods.append(method)
        return "serve"

    storage = open_storage(s3_behind(count))
    storage.check_exclusion()
    assert methods == ["PUT"] * 3
    storage.check_exclusion()
    assert len(methods) == 3
    open_storage(storage.url).check_exclusion()
    assert methods[3:] == ["PUT"] * 2  # the object is there by now
    with Lease(storage, "digits") as lease:
        lease.check()
    assert [entry.key for entry in storage.list()] == ["digits/LOCK"]


@pytest.mark.usefixtures("no_pause")
def test_a_body_that_is_cut_short_is_read_again(s3_behind: Behind, tmp_path: Path) -> None:
    fates = {"GET": 0}

    def cut(method: str) -> str:
        fates[method] = fates.get(method, 0) + 1
        return "cut" if method == "GET" and fates["GET"] % 8 else "serve"

    storage, data = open_storage(s3_behind(cut)), os.urandom(100_000)
    storage.write("a", data)
    assert storage.read("a") == data
    assert fates["GET"] == 8
    storage.download("a", tmp_path / "a")  # which boto3 itself asks for 5 times
    assert (tmp_path / "a").read_bytes() == data
    assert storage.compare_and_swap("a", b"next", data)


@pytest.mark.usefixtures("no_pause")
def test_bodies_that_are_always_cut_short_are_an_error_that_says_so(s3_behind: Behind, tmp_path: Path) -> None:
    storage = open_storage(s3_behind(lambda method: "cut" if method == "GET" else "serve"))
    storage._policy.patience_s = 0  # type: ignore[attr-defined]
    storage.write("a", b"0123456789")
    for act in (lambda: storage.read("a"), lambda: storage.download("a", tmp_path / "a")):
        with pytest.raises(StoreError, match=r"ended early 11 times .* nothing that was committed is lost"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_pause")
def test_an_outage_is_waited_out_by_whoever_reached_the_service_before(
    s3_behind: Behind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = 0.0
    storage = open_storage(s3_behind(lambda method: "drop" if time.monotonic() < over else "serve"))
    storage.write("a", b"1")
    over = time.monotonic() + 0.6  # some hundred failing requests
    assert storage.read("a") == b"1"
    over = time.monotonic() + 0.6
    assert storage.create("b", b"2")
    over = time.monotonic() + 0.6
    storage.upload(Path(__file__), "c")
    assert "fails (503): waiting for it, up to 900 s" in caplog.text
    storage._policy.patience_s = 0.3  # type: ignore[attr-defined]
    over = float("inf")
    with pytest.raises(StoreError, match="nothing that was committed is lost"):
        storage.read("a")


def test_pauses_grow_to_twenty_seconds_and_end_with_patience(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_STORE_PATIENCE_S", "300")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    policy = open_storage(s3_store)._policy  # type: ignore[attr-defined]
    now = time.monotonic()
    assert policy.pause(4, now, "") is None
    policy.reached = True
    pauses = [policy.pause(attempt, now, "") for attempt in range(1, 12)]
    assert all(
        longest / 2 <= pause <= longest for pause, longest in zip(pauses, [1, 2, 4, 8, 16] + [20] * 6, strict=True)
    )
    assert policy.pause(2000, now, "") is not None
    assert policy.pause(12, now - 301, "") is None


@pytest.mark.usefixtures("no_pause")
def test_retries_leave_the_global_random_state_alone(flaky_s3: str, tmp_path: Path) -> None:
    random.seed(5)
    before = random.getstate()
    storage = open_storage(flaky_s3)
    for index in range(30):
        storage.write(f"key-{index}", b"1")
        storage.read(f"key-{index}")
    storage.upload(Path(__file__), "file")
    storage.download("file", tmp_path / "file")
    assert random.getstate() == before


def test_a_checksum_that_disagrees_is_damage_where_the_bytes_are_other_ones_and_nothing_else(
    s3_behind: Behind, tmp_path: Path
) -> None:
    fate = ["serve"]
    storage = open_storage(s3_behind(lambda method: fate[0] if method == "GET" else "serve"))
    checkpoints, saved = Checkpoints(storage, "digits/checkpoints"), tmp_path / "saved"
    saved.mkdir()
    for step in (10, 20):
        (saved / "model.bin").write_bytes(bytes([step]) * 100)
        checkpoints.commit(step, saved, info={})
    fate[0] = "change"
    commit, damages = checkpoints.latest_valid(tmp_path / "one")
    assert (commit.step if commit else None, damages) == (20, [])  # the bytes are what was committed
    storage.write("digits/checkpoints/step-00000020/model.bin", bytes(100))
    commit, damages = checkpoints.latest_valid(tmp_path / "two")
    assert commit is not None
    assert commit.step == 10
    assert [str(damage) for damage in damages] == ["step-00000020/model.bin: sha256 differs"]


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "value", ["127.0.0.1:9000", "http://[::1", "http://host:port", "http://host:99999", "ftp://host", "hush", "http://"]
)
def test_an_endpoint_that_cannot_be_parsed_is_named_and_not_repeated(
    name: str, value: str, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is not the address of a service: write https://host") as caught:
        open_storage(s3_store).read("a")
    assert value not in str(caught.value).replace("http://host:port", "")


@pytest.mark.parametrize("name", ["AWS_MAX_ATTEMPTS", "POISE_STORE_PATIENCE_S"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "nan", "inf"])
def test_a_number_of_the_environment_that_is_none_is_named(
    name: str, value: str, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name} is '{value}': write a positive number, such as"):
        open_storage(s3_store).list()
