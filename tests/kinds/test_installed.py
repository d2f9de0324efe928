"""A kind that an installed package registers: its code is recorded, and what is broken in it is named in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from poise import plugins
from poise.cli import cli
from poise.errors import UserError
from poise.kinds import KINDS, registry, report_sections, result_classes
from poise.kinds.pipeline.spec import PipelineSpec
from poise.spec import all_inputs
from poise.store.inputs import read_inputs
from poise.store.runs import open_run

FILES = {
    "__init__.py": "",
    "api.py": """\
from poise.kinds.registry import Kind

KIND = Kind("lab_count", "CountSpec", "CountResult")
""",
    "spec.py": """\
from typing import Literal

from poise.spec import RunSpec


class CountSpec(RunSpec):
    kind: Literal["lab.count"]
    most: int = 3
""",
    "result.py": """\
from typing import Literal

from poise.store.result import RunResult


class CountResult(RunResult):
    kind: Literal["lab.count"] = "lab.count"
    total: int
""",
    "helpers.py": """\
def total(most):
    return most
""",
    "run.py": """\
from poise.store.result import write_result

from lab_count.result import CountResult


def run(spec, context):
    from . import helpers

    context.run.write("artifacts/begun.txt", b"1")
    result = CountResult(run=spec.name, seed=spec.seed, total=helpers.total(spec.most))
    context.on_main(lambda: write_result(context.run, result))
""",
    "report.py": """\
from poise.report.blocks import Column, Row, Section, Table, number

from lab_count.result import CountResult


def tables(records):
    rows = [Row(record.name, "", [number(record.result.total)]) for record in records if record.result]
    yield Table("Counts", "Counts.", "run", [Column("total")], rows)


SECTION = Section("Counts", CountResult, tables)
""",
}
COUNT = {"kind": "lab.count", "name": "counted"}
CODE = {f"lab_count/{name}" for name in FILES if name != "report.py"}
BOUNDS = {"kind": "bounds.report", "name": "bounds", "runs": ["none"]}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, installed as an installer would."""
    monkeypatch.delenv("POISE_ALLOW_CODE", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    site = tmp_path / "site-packages"
    folder = site / "lab_count"
    folder.mkdir(parents=True)
    for name, code in FILES.items():
        (folder / name).write_text(code)
    info = site / "lab_count-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab_count\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[poise.kinds]\nlab.count = lab_count.api:KIND\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second are otherwise not seen
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    """Make the next command import the package anew, as another process does."""
    plugins._entry_points.cache_clear()
    registry._installed_kind.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_count"]:
        del sys.modules[name]


def poise(*arguments: str, spec: dict[str, Any] | None = None) -> Result:
    _forget()
    Path("spec.yaml").write_text(yaml.safe_dump(spec or COUNT))
    return CliRunner().invoke(cli, list(arguments))


def run() -> Result:
    return poise("run", "spec.yaml", "--engine", "local")


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def error_of(result: Result) -> str:
    assert isinstance(result.exception, UserError), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_its_code_is_recorded_and_an_edited_file_ends_the_run(package):
    result = run()
    assert result.exit_code == 0, result.exception
    records = read_inputs(open_run("runs", "counted")).values()
    assert {record.file for record in records} == CODE
    assert {(record.where, record.place) for record in records} == {("kind", "lab_count.api:KIND")}
    (package / "report.py").write_text(FILES["report.py"] + "\n")  # a page may be rendered again
    assert "nothing was run" in run().output
    edit(package / "helpers.py", "return most", "return 2 * most")
    refused = run()
    assert isinstance(refused.exception, UserError)
    assert "kind: lab_count/helpers.py has changed" in str(refused.exception)
    assert "lab_count/run.py" not in str(refused.exception)


def test_an_interrupted_run_is_not_continued_with_other_code(package):
    edit(package / "run.py", "    result =", "    raise KeyboardInterrupt\n    result =")
    assert run().exit_code != 0
    assert open_run("runs", "counted").manifest().status == "running"
    (package / "run.py").write_text(FILES["run.py"])
    assert "kind: lab_count/run.py has changed" in str(run().exception)


def test_it_is_recorded_as_a_stage_too():
    stage = KINDS["lab.count"].model_validate(COUNT)
    pipeline = PipelineSpec.model_construct(kind="pipeline", name="all", stages={"count": stage})
    assert [(each.where, each.place) for each in all_inputs(pipeline)] == [("stages.count.kind", "lab_count.api:KIND")]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("report.py", "def tables", "import no_such_module\n\n\ndef tables", "the report of the kind 'lab.count'"),
        ("api.py", "CountResult", "CoumtResult", "lab_count.CoumtResult, the result of the kind 'lab.count'"),
        ("run.py", "def run", "def walk", "lab_count, the code of the kind 'lab.count'"),
    ],
)
def test_a_broken_kind_breaks_no_other_and_is_named_where_it_is_used(package, file, old, new, message):
    edit(package / file, old, new)
    _forget()
    assert report_sections()["bounds.report"]
    assert result_classes()["bounds.report"]
    assert "robust.train" in list(report_sections())
    for command in (("check", "spec.yaml", "--spec-only"), ("--version",)):
        result = poise(*command, spec=BOUNDS)
        assert result.exit_code == 0, result.exception
        assert f"poise: warning: poise.kinds 'lab.count': {message}" in result.output
    refused = error_of(run())
    assert refused.startswith(message)
    assert "cannot be loaded: " in refused


def test_a_run_without_a_result_has_failed(package):
    edit(package / "run.py", "context.on_main", "str")
    message = error_of(run())
    assert "the kind 'lab.count' has left no result" in message
    assert "write_result" in message
    assert open_run("runs", "counted").manifest().status == "failed"


def test_an_error_in_its_code_is_one_line_with_the_source(package):
    edit(package / "helpers.py", "return most", "return {}[most]")
    assert error_of(run()) == (
        f"the kind 'lab.count' raised KeyError: 3 ({package}/helpers.py:2 in total: return {{}}[most])"
    )


def test_an_error_in_its_report_is_one_line_with_the_source(package):
    edit(package / "report.py", "record.result.total", "record.result.totle")
    line = "report.py:7 in <listcomp>" if sys.version_info < (3, 12) else "report.py:7 in tables"
    for result in (run(), poise("runs", "show", "runs/counted")):
        message = error_of(result)
        assert message.startswith("the report of the kind 'lab.count' raised AttributeError: ")
        assert f"{package}/{line}: rows = [Row(record.name" in message


def test_an_unknown_kind_of_another_package_has_a_hint():
    message = str(poise("check", "spec.yaml", spec={**COUNT, "kind": "mylab.disagree"}).exception)
    assert "'mylab.disagree' is not a kind of job" in message
    assert "a kind of another package is found only where that package is installed" in message
    message = str(poise("check", "spec.yaml", spec={**COUNT, "kind": "robust.trane"}).exception)
    assert "did you mean 'robust.train'?" in message
    assert "installed" not in message
