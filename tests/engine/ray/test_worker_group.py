"""What a worker group that failed tells its user."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError

from poise.engine.ray.worker_args import WorkerArgs
from poise.engine.ray.worker_group import cluster, failure_of
from poise.errors import PoiseError, UserError

TRACEBACK = "Traceback (most recent call last):\n  File ...\nRuntimeError: gloo"


def test_what_a_worker_explains_itself_is_said_as_it_is():
    """Workers that do not reach each other fail while Ray's controller starts them; Ray wraps that in its own error."""
    raised = RayTaskError("execute", TRACEBACK, PoiseError("worker 1 on b did not reach the other workers"))
    error = pickle.loads(pickle.dumps(ControllerError(raised)))
    said = failure_of(error, attempts=0)
    assert str(said) == "worker 1 on b did not reach the other workers"
    failed = failure_of(WorkerGroupError("", {3: UserError("data.root: no such folder")}), attempts=1)
    assert (str(failed), failed.exit_code) == ("data.root: no such folder", 2)


def test_a_defect_keeps_its_traceback_and_says_when_it_happened():
    start = str(failure_of(ControllerError(RayTaskError("execute", TRACEBACK, KeyError("x"))), attempts=0))
    assert start.startswith("the workers could not be started.")
    assert "max_failures" not in start
    later = str(failure_of(WorkerGroupError("", {2: RuntimeError("boom"), 1: RuntimeError("bang")}), attempts=4))
    assert later.startswith("worker 1 failed, in attempt 4; workers.max_failures allows no more.")
    assert later.endswith("bang")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("foo", "write HOST:PORT"),
        ("", "write HOST:PORT"),
        ("http://127.0.0.1:8265", "write HOST:PORT"),
        ("no.such.host.invalid:6379", "no Ray cluster answers"),
        ("127.0.0.1:1", "Connection refused"),
    ],
)
def test_an_address_where_no_cluster_is_is_told_at_once(address, said):
    with pytest.raises(UserError, match=said), cluster(address, []):
        pass


def test_processes_that_outlive_a_cluster_of_one_command_are_ended(spec_of, monkeypatch):
    """Only those of Ray: another child of the process that uses Poise is left alone."""
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("poise.engine.ray.worker_group._END_WITHIN_S", 0.2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster(None, [spec_of()]):
        orphan = subprocess.Popen(["ray::TrainController", "60"], executable="/bin/sleep")
        other = subprocess.Popen(["sleep", "60"])
    orphan.wait(5)  # raises if it is still there
    assert other.poll() is None
    other.kill()
    other.wait()


OWN_KIND = """\
from poise.kinds.robust_train.spec import RobustTrainSpec

class Mine(RobustTrainSpec):
    pass
"""


def test_a_machine_that_lacks_a_module_of_the_spec_is_named(spec_of, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kind_of_mine.py").write_text(OWN_KIND)
    spec = importlib.import_module("kind_of_mine").Mine.model_validate(spec_of().model_dump(exclude_unset=True))
    args = WorkerArgs(pickle.dumps(spec), "/runs", "token", "/", None)
    assert args.spec == spec
    (tmp_path / "kind_of_mine.py").unlink()
    monkeypatch.delitem(sys.modules, "kind_of_mine")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"the machine \S+ lacks a module .*'kind_of_mine'.*: install it on every"):
        assert args.spec
