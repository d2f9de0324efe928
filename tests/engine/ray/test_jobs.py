"""What is refused before a job is sent."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile

import pytest
from click.testing import CliRunner

from poise.cli import cli
from poise.engine.ray import jobs
from poise.errors import StoreError, UserError
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"store": "runs"}, "store: runs is relative to this folder"),
        ({"store": "/shared/runs", "data": {"name": "mnist", "root": "data/mnist"}}, "data.root: data/mnist"),
    ],
)
def test_a_folder_that_does_not_last_is_refused(changes, named, spec_of):
    with pytest.raises(UserError, match=named):
        jobs.submit(spec_of(**changes), "http://127.0.0.1:9")


def test_no_usable_tmpdir_is_named_before_a_job_is_sent(spec_of, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(StoreError, match="set TMPDIR to a folder"):
        jobs.submit(spec_of(store="/shared/runs"), "http://127.0.0.1:9")


EVALUATION = {
    "kind": "robust.evaluate",
    "name": "mine",
    "store": "/shared/runs",
    "model": {"function": "mymodel:make"},
    "data": {"name": "digits"},
    "attacks": [{"attack": "pgd", "threat": {"norm": "linf", "eps": 0.1}}],
}


def test_the_users_module_goes_with_its_job_and_all_that_it_imports(tmp_path, monkeypatch):
    """The job is run by a Python that knows the folder it was sent, and nothing of where it was sent from."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "parts").mkdir(parents=True)
    there.mkdir()
    (here / "mymodel.py").write_text("import json\nfrom parts.layers import WIDTH\ndef make():\n    return WIDTH\n")
    (here / "parts" / "__init__.py").touch()
    (here / "parts" / "layers.py").write_text("WIDTH = 7\n")
    (here / "notes.py").write_text("print('not imported')\n")
    monkeypatch.chdir(here)
    jobs.pack(RobustEvaluateSpec.model_validate(EVALUATION), there)
    shutil.rmtree(here)
    files = sorted(file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file())
    assert files == ["mymodel.py", "parts/__init__.py", "parts/layers.py", "spec.yaml"]
    code = "import sys; sys.path.insert(0, ''); import mymodel; print(mymodel.make())"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=there, capture_output=True, text=True, check=False)
    assert done.stdout == "7\n", done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"function": "mymodel:make"}, "no module 'mymodel'"),
        ({"file": "weights/net.safetensors", "name": "cnn"}, r"model\.file: weights/net\.safetensors is relative"),
    ],
)
def test_what_only_this_machine_has_is_refused_before_anything_is_sent(change, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = RobustEvaluateSpec.model_validate({**EVALUATION, "model": change})
    with pytest.raises(UserError, match=named):
        jobs.submit(spec, "http://127.0.0.1:9")


def test_an_installed_module_is_the_clusters_own(tmp_path):
    spec = RobustEvaluateSpec.model_validate({**EVALUATION, "model": {"function": "torch.nn:Identity"}})
    jobs.pack(spec, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["spec.yaml"]


@pytest.mark.parametrize("job", ["a/b", "../a", "x" * 300, "", "a b", "a\x1b[2J", "-a", "%2e%2e", "a?b#c"])
@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_what_cannot_be_the_id_of_a_job_is_refused_before_anybody_is_asked(job, command):
    outcome = CliRunner().invoke(cli, [command, "--address", "http://127.0.0.1:9", "--", job])
    assert isinstance(outcome.exception, UserError), outcome.output
    assert "is not the id of a job" in str(outcome.exception)
    assert str(outcome.exception).isprintable()
    assert len(str(outcome.exception)) < 200


def test_a_job_is_not_sent_under_such_an_id(spec_of):
    with pytest.raises(UserError, match="is not the id of a job"):
        jobs.submit(spec_of(store="/shared/runs"), "http://127.0.0.1:9", job="a/b")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "foo",
        "127.0.0.1:8265",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://[::1",
        "http://\x1b[2J",
        "ray://h",
    ],
)
def test_what_is_no_address_of_a_dashboard_is_told_at_once(address):
    with pytest.raises(UserError, match=r"write http://HOST:8265"):
        jobs.status("poise-one", address)
