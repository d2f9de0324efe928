from __future__ import annotations

import getpass
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import poise
from poise.observe import environment as module
from poise.observe.environment import environment


def test_it_names_versions_and_no_secret_or_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-secret")
    found = environment()
    assert found["poise"] == poise.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"].startswith("2.")
    assert found["cpus"] >= 1
    text = json.dumps(found)
    for secret in ("hunter2-secret", str(Path.home()) + "/", str(Path.cwd())):
        assert secret not in text
    assert not {getpass.getuser(), socket.gethostname()} & set(map(str, found.values()))
    assert set(found) == {"python", "poise", "git", "packages", "platform", "cpus", "torch"}


def test_asking_does_not_import_torch() -> None:
    code = "import sys, poise.observe.environment as e; print(e.environment()['torch'], 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["None", "False"]


def test_with_torch_imported_its_devices_are_named() -> None:
    import torch

    assert environment()["torch"] == {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def test_the_commit_of_a_working_tree_and_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "poise" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(module.poise, "__file__", str(package))
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "result.csv").write_text("an output is no change of the code")
    assert environment()["git"]["dirty"] is False
    package.write_text("changed = True")
    assert environment()["git"]["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None
