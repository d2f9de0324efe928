"""The token that protects a cluster, before any cluster starts."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from poise.cli import cli
from poise.engine.ray import auth
from poise.errors import UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_token_is_made_once_and_only_its_owner_reads_it(home):
    done = CliRunner().invoke(cli, ["cluster", "token"])
    file = home / ".ray" / "auth_token"
    assert (done.exit_code, done.output) == (0, f"{file}\n")
    assert re.fullmatch("[0-9a-f]{64}", file.read_text())
    assert (mode(file), mode(file.parent)) == (0o600, 0o700)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    before = auth.read_token()
    auth.ensure_token()
    assert auth.read_token() == before == file.read_text()
    assert [each.name for each in file.parent.iterdir()] == ["auth_token"]


def test_a_token_that_ray_made_is_kept_and_closed_to_others(home):
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("a" * 64)
    file.chmod(0o644)
    auth.ensure_token()
    assert (file.read_text(), mode(file)) == ("a" * 64, 0o600)


def test_an_empty_file_is_no_token(home):
    file = home / ".ray" / "auth_token"
    file.parent.mkdir()
    file.touch(0o644)
    auth.ensure_token()
    assert (len(file.read_text()), mode(file)) == (64, 0o600)


def test_nothing_is_written_where_the_token_is_given_or_not_wanted(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    auth.ensure_token()
    assert auth.read_token() == "b" * 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.ensure_token()
    assert list(home.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_with_the_way_out(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "file" / "token"))
    with pytest.raises(UserError, match=r"file/token: .*RAY_AUTH_TOKEN_PATH"):
        auth.ensure_token()


def test_rays_files_lie_in_a_folder_of_this_user_alone(home, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert mode(auth.private_folder()) == 0o700
    assert auth.private_folder() == Path(f"/tmp/poise-{os.getuid()}")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_somebody_else_has_put_in_its_place_is_not_used(kind, tmp_path, monkeypatch):
    short = Path(tempfile.mkdtemp(dir="/tmp", prefix="p"))
    monkeypatch.setattr("tempfile.tempdir", str(short))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    place = short / f"poise-{os.getuid()}"
    if kind == "file":
        place.touch()
    else:
        place.symlink_to(tmp_path)
    try:
        with pytest.raises(UserError, match="set RAY_TMPDIR"):
            auth.private_folder()
        assert mode(tmp_path) != 0o777
        monkeypatch.setenv("RAY_TMPDIR", "/tmp/mine")
        assert auth.private_folder() == Path("/tmp/mine")
    finally:
        place.unlink()
        short.rmdir()
