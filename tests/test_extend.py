"""The examples of docs/extend.md, run from a package outside of Poise, whose code is not changed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from poise import plugins
from poise.cli import cli
from poise.engine.launch import launch
from poise.errors import UserError
from poise.kinds import KINDS
from poise.observe.progress import Display, Progress
from poise.observe.rows import read_rows
from poise.observe.sinks import NullSink
from poise.spec import load
from poise.store.inputs import read_inputs
from poise.store.runs import Run, open_run
from poise.user_code import allow_code

IMAGES = ("data.limit=200", "data.validation=40", "data.batch_size=20", "train.epochs=1", "evaluate.num_examples=20")
WORLD = (
    "data.world={entities: 8, relations: 4, answers: 8, pretrain: 4}",
    "batch_size=32",
    "model={name: llama, hidden: 32, layers: 1, heads: 1}",
    "train.steps=4",
    "train.epochs=null",
    "train.log_every=1",
)
"""What makes the specs of the page cheap; the code is run as it is written."""


@pytest.fixture(autouse=True)
def _folder(mylab: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(mylab)
    monkeypatch.delenv("POISE_ALLOW_CODE", raising=False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def run(spec: str, *changes: str) -> Run:
    """Run a spec of the page as a user does, in this process."""
    options = [option for change in changes for option in ("--set", change)]
    result = CliRunner().invoke(cli, ["run", f"{spec}.yaml", "--allow-code", "--engine", "local", *options])
    assert result.exit_code == 0, result.exception
    named = [change.removeprefix("name=") for change in changes if change.startswith("name=")]
    return open_run("runs", named[0] if named else spec)


def result_of(done: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(done.read("result.json"))
    return result


def files_of(done: Run) -> set[str]:
    """The files of the user's code that a run has recorded."""
    return {record.file for record in read_inputs(done).values()}


def values_of(done: Run, name: str, split: str = "train") -> list[float]:
    rows = read_rows(done.read(file) for file in done.files("metrics/") if file.endswith(".parquet")).to_pylist()
    return [row["value"] for row in rows if (row["split"], row["name"]) == (split, name)]


def test_every_example_is_a_short_file_and_is_refused_without_the_permission(mylab):
    files = sorted((mylab / "mylab").glob("[a-z]*.py"))
    assert [file.stem for file in files] == ["data", "focal", "nets", "smoothing", "temperature", "winners"]
    assert all(file.read_text().count("\n") < 60 for file in files)
    for spec in ("own-network", "own-data", "own-objective", "own-loss"):
        refused = CliRunner().invoke(cli, ["run", f"{spec}.yaml", "--engine", "local"])
        assert isinstance(refused.exception, UserError)
        assert "only with --allow-code" in str(refused.exception)
        checked = CliRunner().invoke(cli, ["check", f"{spec}.yaml"])
        assert checked.exit_code == 0, checked.exception
    assert not Path("runs").exists()


def test_the_network():
    done = run("own-network", *IMAGES)
    assert result_of(done)["parameters"] == (64 + 1) * 32 + (32 + 1) * 10
    assert files_of(done) == {"mylab/__init__.py", "mylab/nets.py"}


def test_the_images_and_the_metric():
    done = run("own-data")
    result = result_of(done)
    assert result["num_examples"] == 200
    assert result["accuracy"]["final"]["clean"] > 0.9  # the stripes are easy to tell apart
    (final,) = result["extra_metrics"]["final"].values()
    assert 0.5 <= final <= 1
    assert values_of(done, "metric/confidence", "test") == [final]
    assert len(values_of(done, "metric/confidence", "validation")) == 2
    assert files_of(done) == {"mylab/__init__.py", "mylab/data.py"}
    shown = CliRunner().invoke(cli, ["runs", "show", "runs/own-data"]).output
    assert "Metrics of your code" in shown


def test_the_objective():
    quick = (*IMAGES, "train.log_every=1")
    done = run("own-objective", *quick)
    assert result_of(done)["objective"] == "mylab.focal:Focal"
    assert files_of(done) == {"mylab/__init__.py", "mylab/focal.py"}
    assert set(values_of(done, "weight/linf")) == {0.5}
    # With gamma 0 it is the mean cross entropy, as `avg` is; with more it is less.
    plain = run("own-objective", *quick, "objective.gamma=0", "name=plain")
    mean = run("own-objective", *quick, "objective={name: avg}", "name=mean")
    assert values_of(plain, "loss") == pytest.approx(values_of(mean, "loss"), rel=1e-4)
    assert values_of(done, "loss")[0] < values_of(mean, "loss")[0]


def test_a_run_with_the_objective_that_is_killed_ends_with_the_same_bits():
    """As the page says under "How to test it"; the kill is the interrupt of the driver after three steps."""
    changes = [*IMAGES, "train.checkpoint.every={steps: 1}", "train.log_every=1"]

    class Killer(Display):
        def show(self, progress: Progress) -> None:
            if progress.step == 3:
                raise KeyboardInterrupt

    with allow_code():
        for name in ("whole", "killed"):
            spec = load("own-objective.yaml", KINDS, [*changes, f"name={name}"])
            if name == "killed":
                with pytest.raises(KeyboardInterrupt):
                    launch(spec, "local", None, Killer(io.StringIO()), NullSink())
                assert open_run("runs", name).manifest().status == "running"
            launch(spec, "local", None, Display(io.StringIO()), NullSink())
    whole, killed = (open_run("runs", name) for name in ("whole", "killed"))
    assert result_of(whole) | {"run": ""} == result_of(killed) | {"run": ""}
    assert values_of(whole, "loss") == values_of(killed, "loss")
    weights = []
    for done in (whole, killed):  # what `sha256sum` compares
        *_, last = sorted(name for name in done.files("checkpoints/") if name.endswith("/model.safetensors"))
        weights.append(done.read(last))
    assert weights[0] == weights[1]


def test_the_loss_and_the_method():
    done = run("own-loss", *WORLD)
    assert files_of(done) == {"mylab/__init__.py", "mylab/smoothing.py"}
    plain = run("own-loss", *WORLD, "loss.share=0", "name=plain")
    assert values_of(plain, "loss") == pytest.approx(values_of(plain, "ce"), rel=1e-5)
    assert all(
        loss != pytest.approx(ce, rel=1e-4)
        for loss, ce in zip(values_of(done, "loss"), values_of(done, "ce"), strict=True)
    )

    world = "questions={name: world, split: prefer, world: {entities: 8, relations: 4, answers: 8, pretrain: 4}}"
    played = run("own-method", world, "prompts=2", "rollouts=4", "train.epochs=2", "max_tokens=4", "train.log_every=1")
    assert files_of(played) >= {"mylab/__init__.py", "mylab/winners.py"}
    assert len(values_of(played, "kl/initial")) == 2


@pytest.mark.parametrize(
    ("module", "spec", "right", "wrong", "message"),
    [
        ("focal", "own-objective", "focal.mean(), focal", "focal[0], focal", "Focal.loss: ObjectiveOutput.loss is"),
        ("smoothing", "own-loss", "losses.sum() /", "losses /", "Smoothing.loss: what it returned is a tensor"),
        ("winners", "own-method", "best - (1 - best)", "best[0] - (1 - best[0])", "Winners.advantage returned"),
        ("winners", "own-method", '"reference"', '"ema"', "Winners.regularizers: 'initial' is KLTerm"),
    ],
)
def test_what_a_method_returns_is_checked_in_a_run(mylab, module, spec, right, wrong, message):
    """A method of the page with a mistake in what it returns is named with its file and line."""
    world = "questions={name: world, split: prefer, world: {entities: 8, relations: 4, answers: 8, pretrain: 4}}"
    changes = {
        "own-objective": IMAGES,
        "own-loss": WORLD,
        "own-method": (world, "prompts=2", "rollouts=4", "train.epochs=1", "max_tokens=4"),
    }[spec]
    if spec == "own-method":
        run("own-loss", *WORLD)
    file = mylab / "mylab" / f"{module}.py"
    code = file.read_text()
    assert right in code
    file.write_text(code.replace(right, wrong))
    options = [option for change in changes for option in ("--set", change)]
    result = CliRunner().invoke(cli, ["run", f"{spec}.yaml", "--allow-code", "--engine", "local", *options])
    assert isinstance(result.exception, UserError), result.exception
    assert f"mylab.{module}:{message}" in str(result.exception)
    assert f"mylab/{module}.py:" in str(result.exception)


def test_the_kind_of_an_installed_package():
    """The package is found by its metadata on Python's path, and its kind needs no permission."""
    run("own-objective", *IMAGES)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"

    def poise(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "poise", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = poise("run", "own-kind.yaml", "--engine", "local")
    assert done.returncode == 0, done.stderr
    result = result_of(open_run("runs", "own-kind"))
    assert 0.1 <= result["temperature"] <= 10
    assert set(result["ece"]) == {"before", "after"}
    for path in ("temperature", "ece.before", "ece.after"):
        assert path in done.stdout  # the numbers of a kind without a section of its own
    wrong = poise("check", "own-kind.yaml", "--set", "models=x")
    assert "models: unknown key; did you mean 'model'?" in wrong.stderr


def test_what_an_installed_package_registers_is_listed(mylab, monkeypatch):
    monkeypatch.syspath_prepend(str(mylab))
    plugins._entry_points.cache_clear()
    try:
        assert "mylab 1.0" in CliRunner().invoke(cli, ["--version"]).output
        assert "poise mylab.temperature" in CliRunner().invoke(cli, ["schema"]).output
    finally:
        plugins._entry_points.cache_clear()
