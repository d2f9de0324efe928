from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from poise.kinds import report_sections, result_classes
from poise.kinds.bounds_report.result import BoundsReportResult
from poise.kinds.calibrate_measure.result import AnswerCounts, CalibrateMeasureResult
from poise.kinds.common.attack_description import AttackDescription
from poise.kinds.robust_evaluate.result import RobustEvaluateResult
from poise.kinds.robust_train.result import EarlyStopResult, RobustTrainResult
from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.observe.rows import Rows, read_rows
from poise.report.page import render
from poise.report.publish import publish
from poise.report.record import RunRecord, load_record
from poise.report.table import comparison, run_details, run_list
from poise.store.result import RunResult, write_result
from poise.store.runs import Run, list_runs, open_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps text, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def two_runs(make_record: Callable[..., RunRecord]) -> str:
    return render([make_record("adt", level=0.7), make_record("at", level=0.6)], "Two runs", report_sections())


def test_the_page_stands_alone(two_runs: str) -> None:
    text, page = two_runs, Page(two_runs)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.values("src") == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert page.values("href")
    for target in page.values("href"):
        assert target.startswith("#")
        assert target[1:] in ids
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert text.startswith("<!DOCTYPE html>")


def test_it_holds_the_numbers_of_every_run(two_runs: str) -> None:
    page = Page(two_runs)
    for expected in ("71.3", "55.3", "61.3", "45.3", "70.0"):
        assert expected in page.texts
    assert {"best, step 450, n=360, seed 7", "final, step 540, n=360, seed 7"} <= set(page.texts)
    assert "66.4\u201375.7" in page.texts  # Wilson, 71.3% of 360
    assert "0123456789ab + local changes" in page.texts
    assert "PGD-20 in the linf ball, eps 8/255, 1 restart" in page.texts
    assert "123,456" in page.texts
    assert page.tags.count("svg") == 2 + 2 * 5
    assert page.values("aria-label").count("") == 0


def test_the_highest_selected_accuracy_is_bold(two_runs: str) -> None:
    assert two_runs.count('class="number top"') == 6
    assert '<td class="number top">91.3' in two_runs


def test_equal_records_give_an_equal_page(make_record: Callable[..., RunRecord]) -> None:
    assert render([make_record()], "x", report_sections()) == render([make_record()], "x", report_sections())


def test_hostile_text_is_text(
    make_record: Callable[..., RunRecord], describe_attack: Callable[[str], AttackDescription]
) -> None:
    evil = "</pre><script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{ &amp;"
    record = make_record()
    rows = Rows()
    rows.add(1, 1.0, "validation", {f"robust/{evil}": 0.5, "clean": 0.5})
    rows.add(1, 1.0, "timing", {f"seconds/{evil}": 0.5})
    assert record.result is not None
    trained = record.result.model_copy(
        update={
            "run": evil,
            "objective": evil,
            "selected": evil,
            "attacks": {evil: describe_attack(evil)},
            "accuracy": {evil: {f"robust/{evil}": 0.5}},
            "best_minus_final": {f"robust/{evil}": 0.1},
            "stopped": EarlyStopResult(step=1, why=evil),
        }
    )
    hostile = dataclasses.replace(
        record, name=evil, spec_text=evil, environment={evil: evil}, events=[{"event": evil, evil: evil}],
        status=evil, error=evil, result=trained, rows=read_rows([rows.to_parquet()]),
    )  # fmt: skip
    evaluated = RobustEvaluateResult(run=evil, seed=0, num_examples=1, warnings=[evil])
    doubtful = RunRecord(evil, kind="robust.evaluate", result=evaluated)
    page = Page(render([hostile, doubtful], evil, report_sections()))
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.texts.count(evil) >= 9
    assert f"stopped at step 1: {evil}" in page.texts
    assert page.texts[page.texts.index("objective") + 1] == evil


def test_a_run_that_has_just_begun_has_a_page() -> None:
    text = render([RunRecord("young"), RunRecord("younger", status="running")], "Nothing yet", report_sections())
    page = Page(text)
    assert "svg" not in page.tags
    assert any("No final evaluation yet" in part for part in page.texts)
    assert sum("No metrics yet" in part for part in page.texts) == 2
    Page(render([], "No run", report_sections()))


def _sweep() -> SweepResult:
    return SweepResult(
        run="done", seed=3, metric="clean", mode="max", judgement={}, judged_by="clean", judged_on="test",
        best="done-0000", failed=[],
        trials=[TrialResult(run="done-0000", status="finished", values={}, metric=0.5, step=None, test={})],
    )  # fmt: skip


def _bounds() -> BoundsReportResult:
    return BoundsReportResult(
        run="done", seed=3, num_examples=1_234, percentile=50.0, margins="correct", radius="data", delta=0.05,
        networks=[],
    )  # fmt: skip


def _calibration() -> CalibrateMeasureResult:
    return CalibrateMeasureResult(
        run="done", seed=3, num_examples=1_234, tokens=0, protocol="n=5", coverage=1.0,
        answers=AnswerCounts(drawn=0, empty=0, no_answer=0, truncated=0, tied_questions=0),
        metrics={}, noise_floor={"sem1": None, "sem2": None}, reliability={}, histogram={}, hardest=[],
        confidently_wrong=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("result", "count"),
    [
        pytest.param(_sweep(), None, id="sweep"),
        pytest.param(_bounds(), "examples", id="bounds.report"),
        pytest.param(RobustEvaluateResult(run="done", seed=3, num_examples=1_234), "examples", id="robust.evaluate"),
        pytest.param(_calibration(), "questions", id="calibrate.measure"),
    ],
)
def test_a_finished_run_that_takes_no_steps_is_not_called_young(result: RunResult, count: str | None) -> None:
    record = RunRecord("done", kind=result.kind, status="finished", result=result)
    page = Page(render([record], "x", report_sections()))
    assert not any("No metrics yet" in text for text in page.texts)
    assert "step" not in page.texts
    assert page.texts[page.texts.index("seed") + 1] == "3"
    if count is not None:
        assert page.texts[page.texts.index(count) + 1] == "1,234"


@pytest.mark.parametrize(
    ("kind", "unit"), [("align.selfplay", "responses"), ("finetune.sft", "examples"), ("robust.train", "images")]
)
def test_speed_is_in_the_unit_of_the_kind_before_there_is_a_result(make_record, kind: str, unit: str) -> None:
    record = dataclasses.replace(make_record(), kind=kind, result=None, status="running")
    assert any(text.endswith(f" {unit}/s (median)") for text in Page(render([record], "x", report_sections())).texts)


def test_sentences_are_broken_into_lines_and_numbers_are_not(make_record: Callable[..., RunRecord]) -> None:
    """A cell of prose has a class of its own; a caption is no part of its table, which may be wider than the screen."""
    text = render([make_record()], "x", report_sections())
    page = Page(text)
    attack = "PGD-20 in the linf ball, eps 8/255, 1 restart"
    assert f'<td class="prose">{attack}' in text
    assert "caption" not in page.tags
    assert page.values("class").count("caption") == page.tags.count("thead") - 1  # the event log has none
    console = Console(file=io.StringIO(), width=60, record=True)
    words = "a warning of many words that no terminal is wide enough for, which ends here"
    result = RobustEvaluateResult(run="doubtful", seed=0, num_examples=1, warnings=[words])
    warned = RunRecord("doubtful", kind="robust.evaluate", result=result)
    console.print(*comparison([warned], report_sections()))
    assert words in " ".join(line[len("doubtful ") :].strip() for line in console.export_text().splitlines())


def test_a_page_of_several_runs_is_titled_by_them(tmp_path: Path) -> None:
    runs = [open_run(tmp_path, name) for name in ("a", "b", "c", "d", "e", "f")]

    def title(count: int, home: Run) -> str:
        publish(
            [load_record(run, result_classes()) for run in runs[:count]],
            home,
            report_sections(),
            tmp_path / "page.html",
        )
        page = Page((tmp_path / "page.html").read_text())
        return next(filter(None, page.texts))

    assert title(1, runs[0]) == "a"
    assert title(2, runs[0]) == "a and b"
    assert title(4, runs[0]) == "a, b, c and d"
    assert title(6, runs[0]) == "a, b, c and 3 more runs"
    assert title(6, open_run(tmp_path, "pipeline")) == "pipeline"


def test_values_that_are_missing_or_no_numbers_become_dashes(make_record: Callable[..., RunRecord]) -> None:
    record = make_record()
    accuracy = {"best": {"clean": math.nan, "robust/linf": None, "robust/l1": 0.25}}
    assert record.result is not None
    result = RobustTrainResult.model_validate({**record.result.model_dump(), "accuracy": accuracy})
    records = [dataclasses.replace(record, result=result), RunRecord("other", kind="robust.train")]
    page = Page(render(records, "x", report_sections()))
    assert page.texts.count("\u2013") == 5
    assert "25.0" in page.texts
    assert "nan" not in " ".join(page.texts).lower()


def test_many_events_are_cut_but_no_failure_is(make_record: Callable[..., RunRecord]) -> None:
    events = [{"event": "damaged", "what": "early"}, *({"event": "commit", "step": i} for i in range(500))]
    page = Page(render([dataclasses.replace(make_record(), events=events)], "x", report_sections()))
    assert "what=early" in page.texts
    assert "step=499" in page.texts
    assert "step=100" not in page.texts
    assert any(text.endswith("400 are left out here and stand in events.jsonl.") for text in page.texts)


def test_an_alarm_of_a_monitor_is_marked_and_is_no_failure(make_record: Callable[..., RunRecord]) -> None:
    """That a model overfits is a finding: nothing has failed."""
    alarms = [{"event": "alarm", "step": step, "what": "accuracy fell"} for step in (10, 20)]
    commits = [{"event": "commit", "step": step} for step in range(300)]
    record = dataclasses.replace(make_record(), events=[*alarms, *commits])
    text = render([record], "x", report_sections())
    page = Page(text)
    assert "failures survived" not in page.texts
    assert "Event log (302, 2 of them alarms)" in page.texts
    assert text.count('<tr class="marked">') == 2
    both = dataclasses.replace(record, events=[*alarms, {"event": "damaged", "what": "rot"}])
    page = Page(render([both], "x", report_sections()))
    assert page.texts[page.texts.index("failures survived") + 1] == "1"
    assert "Event log (3, 1 of them failures, 2 of them alarms)" in page.texts


def test_the_table_of_the_command_line(make_record: Callable[..., RunRecord]) -> None:
    records = [make_record("quickstart-adt"), RunRecord("[red]young", kind="robust.train")]
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(*comparison(records, report_sections()))
    text = console.export_text()
    for expected in ("quickstart-adt", "71.3", "66.4\u201375.7", "n=360", "[red]young", "not evaluated"):
        assert expected in text
    assert "\u2026" not in text


RESULT = RobustTrainResult(
    run="stored", seed=3, step=5, best_step=5, parameters=7, num_examples=2, attacks={}, accuracy={}
)


def _stored(folder: Path) -> Run:
    """A run in a real store, with one row of metrics."""
    run, rows = open_run(folder, "stored"), Rows()
    rows.add(5, 0.5, "train", {"loss": 1.0})
    run.claim_spec("kind: robust.train\n", "0" * 64)
    run.write("environment.json", b'{"cpus": 2}')
    run.start("robust.train", "0" * 64)
    run.write("metrics/rows-00000005.parquet", rows.to_parquet())
    write_result(run, RESULT)
    run.append_events([{"event": "start", "attempt": 0}])
    return run


def test_a_record_is_read_from_the_store(tmp_path: Path) -> None:
    run = _stored(tmp_path)
    assert load_record(run, result_classes()).status == "interrupted"  # no driver holds it
    run.finish("failed", error="the disk is full")
    record = load_record(run, result_classes())
    assert (record.name, record.kind, record.status) == ("stored", "robust.train", "failed")
    assert record.rows["value"].to_pylist() == [1.0]
    assert record.environment == {"cpus": 2}
    assert record.result == RESULT
    assert record.spec_text == "kind: robust.train\n"
    assert record.events == [{"event": "start", "attempt": 0}]
    assert "the disk is full" in render([record], "x", report_sections())


def test_a_run_without_files_is_an_empty_record(tmp_path: Path) -> None:
    record = load_record(open_run(tmp_path, "nothing"), result_classes())
    assert (record.kind, record.spec_text, record.result, record.events, len(record.rows)) == ("", "", None, [], 0)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = _stored(tmp_path)
    run.write("metrics/timing-00000005.parquet", run.read("metrics/rows-00000005.parquet")[:-9])
    run.write("result.json", b"[1")
    run.write("environment.json", b"[1]")
    run.write("manifest.json", b"{")
    record = load_record(run, result_classes())
    assert record.status == "damaged"
    assert record.rows["value"].to_pylist() == [1.0]
    named = " ".join(event.get("what", "") for event in record.events)
    for file in ("metrics/timing-00000005.parquet", "result.json", "environment.json"):
        assert file in named
    Page(render([record], "x", report_sections()))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(RESULT.model_dump_json()[:-1].encode() + b', "colour": 1}', "colour: Extra inputs", id="unknown"),
        pytest.param(RESULT.model_dump_json()[:40].encode(), "Invalid JSON: EOF", id="cut"),
        pytest.param(RESULT.model_dump_json().replace("robust.train", "sweep").encode(), "kind: Input", id="kind"),
        pytest.param(b'{"kind": "robust.train", "seed": 3}', "run: Field required", id="missing"),
    ],
)
def test_a_result_that_does_not_fit_its_class_is_a_damage_that_the_page_names(
    tmp_path: Path, data: bytes, why: str
) -> None:
    run = _stored(tmp_path)
    run.write("result.json", data)
    run.finish("finished")
    record = load_record(run, result_classes())
    assert record.result is None
    (damage,) = record.corruptions
    assert damage.startswith(f"{run.url}/result.json is damaged: {why}")
    page = Page(render([record], "x", report_sections()))
    assert f"what={damage}" in page.texts
    assert any("No final evaluation yet" in part for part in page.texts)
    assert page.texts[page.texts.index("failures survived") + 1] == "1"


def test_without_a_manifest_the_result_says_of_what_kind_it_is(tmp_path: Path) -> None:
    run = _stored(tmp_path)
    run.write("manifest.json", b"{")
    record = load_record(run, result_classes())
    assert (record.status, record.result) == ("damaged", RESULT)


def test_a_store_and_a_run_are_printed(tmp_path: Path) -> None:
    run = _stored(tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "model.bin").write_bytes(b"x" * 2_000)
    run.checkpoints.commit(1_234, tmp_path / "scratch", info={})
    run.finish("failed", final_step=1_234, error="no [red] space")
    open_run(tmp_path, "second").claim_spec("kind: x\n", "1" * 64)
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(run_list(list_runs(run.storage)))
    console.print(*run_details(run))
    console.print(*run_details(open_run(tmp_path, "second")))
    text = " ".join(console.export_text().split())  # the terminal is narrower than the path of the run
    for expected in ("stored", "second", "failed because: no [red] space", "interrupted", "1,234", "step-"):
        assert expected in text


@pytest.mark.parametrize(
    ("events", "facts"),
    [
        (["failed"], {"commands that ended with an error": "1"}),  # and was started again, with other code perhaps
        (["failed", "start 20", "commit"], {"commands that ended with an error": "1"}),
        (["interrupted", "start 20"], {}),
        (["commit", "start 20"], {"failures survived": "1"}),  # killed without a word, gone on from its commit
        (["failed", "start 20", "start 40"], {"failures survived": "1", "commands that ended with an error": "1"}),
        (["damaged", "failed"], {"failures survived": "1", "commands that ended with an error": "1"}),
    ],
)
def test_only_what_a_run_went_on_from_by_itself_is_called_survived(events: list[str], facts: dict[str, str]) -> None:
    named = [{"event": name.split()[0], "step": int((name.split()[1:] or ["0"])[0])} for name in events]
    texts = Page(render([RunRecord("done", status="finished", events=named)], "x", report_sections())).texts
    shown = {name: texts[texts.index(name) + 1] for name in texts if "survived" in name or "ended with" in name}
    assert shown == facts
