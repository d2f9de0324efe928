"""Odd names, records and places on the command line: refused or shown, never obeyed and never a traceback."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from poise import cli
from poise.errors import UserError
from poise.observe.progress import Display
from poise.observe.terminal import printable
from poise.store.runs import open_run

HOSTILE = "\x1b[2J\x1b[31m[/b] [bold]gone\x07\r"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one run whose manifest somebody else has written."""
    folder = tmp_path / "runs"
    run = open_run(str(folder), "odd")
    with run.lease():
        run.claim_spec("kind: robust.train\n", "0" * 64)
        run.start(f"robust.{HOSTILE}", "0" * 64)
        run.finish("failed", error=HOSTILE)
    return folder


def printed(*arguments: str) -> str:
    outcome = CliRunner().invoke(cli.cli, arguments)
    assert outcome.exception is None, outcome.exc_info
    return outcome.output


def test_a_manifest_is_shown_and_not_obeyed(store):
    for text in (printed("runs", "list", str(store)), printed("runs", "show", str(store / "odd"))):
        assert r"\x1b" in text.replace("\n", "")
        assert not {"\x1b", "\x07", "\r"} & set(text)


def test_messages_and_notes_are_shown_and_not_obeyed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["poise", "check", f"/nowhere/{HOSTILE}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert r"\x1b[2J" in capsys.readouterr().err
    stream = io.StringIO()
    Display(stream).note(f"a\n{HOSTILE}")
    assert stream.getvalue() == f"a\n{printable(HOSTILE)}\n"
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/nowhere/x", "{file}/x"])
def test_a_place_that_cannot_be_written_is_named(place, tmp_path, store):
    (tmp_path / "file").touch()
    place = place.format(file=tmp_path / "file")
    for arguments in (["schema", "--output", place], ["report", str(store / "odd"), "--output", place]):
        outcome = CliRunner().invoke(cli.cli, arguments)
        assert isinstance(outcome.exception, UserError), outcome.exc_info
        assert f"{place} cannot be written" in str(outcome.exception)
