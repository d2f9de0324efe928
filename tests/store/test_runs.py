"""What is kept of a run, and that a name stands for one spec."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from poise.errors import IntegrityError, PoiseError, RunBusyError, UserError
from poise.store.runs import Run, list_runs, open_run
from poise.store.storage import Storage

SPEC = "kind: robust.train\nname: digits\nseed: 1\n"


@pytest.fixture
def run(storage: Storage) -> Run:
    """A run that was started and has one checkpoint and one artifact."""
    run = Run(storage, "digits")
    run.claim_spec(SPEC, "a" * 64)
    run.start("robust.train", "a" * 64)
    return run


def commit(run: Run, step: int, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir(exist_ok=True)
    (tmp_path / "saved" / "model.bin").write_bytes(bytes(step))
    run.checkpoints.commit(step, tmp_path / "saved", info={})


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    run = open_run(tmp_path / "runs", "digits")
    assert run.claim_spec(SPEC, "a" * 64) is True
    run.start("robust.train", "a" * 64)
    run.write("environment.json", b"{}")
    run.write("metrics/train.parquet", b"rows")
    run.write("artifacts/report.html", b"<html>")
    run.append_events([{"event": "start"}])
    commit(run, 40, tmp_path)
    with run.lease():
        pass
    run.finish("finished", final_step=40, best_step=40)
    made = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "runs").rglob("[!.]*") if path.is_file()}
    assert made == {
        "runs/digits/spec.yaml",
        "runs/digits/environment.json",
        "runs/digits/manifest.json",
        "runs/digits/metrics/train.parquet",
        "runs/digits/artifacts/report.html",
        "runs/digits/events.jsonl",
        "runs/digits/records.jsonl",
        "runs/digits/LOCK",
        "runs/digits/checkpoints/step-00000040/model.bin",
        "runs/digits/checkpoints/step-00000040/manifest.json",
        "runs/digits/checkpoints/step-00000040/COMMITTED",
    }
    assert run.files("metrics/") == ["metrics/train.parquet"]


def test_a_run_keeps_its_spec(run: Run, tmp_path: Path) -> None:
    commit(run, 10, tmp_path)
    assert run.read("spec.yaml").decode() == SPEC
    assert run.claim_spec(SPEC, "b" * 64) is False  # the same text
    assert run.claim_spec("# a remark\n" + SPEC, "a" * 64) is False  # the same meaning
    with pytest.raises(UserError) as caught:
        run.claim_spec(SPEC.replace("seed: 1", "seed: 2"), "b" * 64)
    message = str(caught.value)
    assert "-seed: 1\n+seed: 2" in message
    assert "choose another name" in message
    assert f"poise runs rm {run.url}" in message
    assert run.read("spec.yaml").decode() == SPEC


def test_a_spec_claimed_before_a_crash_is_still_compared(storage: Storage) -> None:
    run = Run(storage, "digits")
    run.claim_spec(SPEC, "a" * 64)  # and the driver died before `start`
    assert run.claim_spec(SPEC, "a" * 64) is False
    run.write("samples/shard-00000.parquet", b"samples")
    with pytest.raises(UserError, match="another spec"):
        run.claim_spec(SPEC + "x: 1\n", "a" * 64)
    assert run.summary().status == "interrupted"


def test_a_run_that_has_committed_nothing_gives_way_to_the_next_spec(run: Run) -> None:
    run.write("metrics/rows-00000010.parquet", b"rows that no checkpoint followed")
    run.storage.write(run.key("checkpoints/step-00000010/model.bin"), b"half a checkpoint")
    run.append_events([{"event": "failed", "why": "no such folder"}])
    run.finish("failed", error="no such folder")
    mended = SPEC.replace("seed: 1", "seed: 2")
    assert run.claim_spec(mended, "b" * 64) is True
    assert run.read("spec.yaml").decode() == mended
    assert run.manifest() is None
    assert {re.split("[./]", file)[0] for file in run.files()} == {"events", "records", "spec"}
    assert run.events() == [{"event": "failed", "why": "no such folder"}]
    assert run.verify() == []
    run.start("robust.train", "b" * 64)
    run.finish("finished")
    with pytest.raises(UserError, match="another spec"):  # it has ended well, though it left nothing
        run.claim_spec(SPEC, "a" * 64)


def test_a_run_is_removed_unless_it_is_alive(run: Run, tmp_path: Path) -> None:
    other = Run(run.storage, "digits-2")
    other.claim_spec(SPEC, "a" * 64)
    commit(run, 10, tmp_path)
    with run.lease(), pytest.raises(RunBusyError, match="held by process"):
        run.remove()
    assert run.checkpoints.commits()
    run.remove()
    assert not run.exists()
    assert Run.names(run.storage) == ["digits-2"]
    assert run.files() == []
    assert run.storage.folders() == ["digits-2"]
    with run.lease():
        assert run.claim_spec(SPEC, "b" * 64) is True


def test_the_commands_that_remove_and_collect_leave_a_run_under_way_alone(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from poise.cli import cli

    run = open_run(tmp_path / "runs", "digits")
    run.claim_spec(SPEC, "a" * 64)
    run.storage.write(run.key("checkpoints/step-00000010/model.bin"), b"a commit under way")
    elsewhere = tmp_path / "runs" / "other" / ".poise-tmp-upload"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"under way in another run")
    invoke = CliRunner().invoke
    with run.lease():
        for command in (["gc", run.url, "--older-than", "0"], ["rm", run.url, "--yes"]):
            refused = invoke(cli, ["runs", *command])
            assert isinstance(refused.exception, RunBusyError)
    assert run.files("checkpoints/") == ["checkpoints/step-00000010/model.bin"]
    swept = invoke(cli, ["runs", "gc", run.url, "--older-than", "0"])
    assert "1 orphans removed" in swept.output
    assert elsewhere.exists()
    assert invoke(cli, ["runs", "gc", run.url, "--older-than", "-1"]).exit_code != 0
    asked = invoke(cli, ["runs", "rm", run.url], input="n\n")
    assert f"remove {run.url}, interrupted, with 0 checkpoints?" in asked.output
    assert isinstance(asked.exception, PoiseError)
    assert (str(asked.exception), asked.exception.exit_code) == ("nothing was removed", 1)
    assert str(invoke(cli, ["runs", "rm", run.url], input="").exception) == "nothing was removed"
    other = open_run(tmp_path / "runs", "mnist")
    other.claim_spec(SPEC, "a" * 64)
    asked = invoke(cli, ["runs", "rm", other.url, run.url], input="y\nn\n")
    assert str(asked.exception) == "nothing more was removed"
    assert not other.exists()
    assert run.exists()
    assert f"removed {run.url}" in invoke(cli, ["runs", "rm", run.url], input="y\n").output
    assert not run.exists()


def test_the_end_of_a_run_takes_no_more_requests_for_more_results(s3_store: str) -> None:
    requests: list[str] = []
    counts = []
    for number in (3, 40):
        run = open_run(s3_store, f"digits-{number}")
        run.claim_spec(SPEC, "a" * 64)
        run.start("robust.train", "a" * 64)
        run.write_files({f"samples/shard-{index:05}.parquet": b"%d" % index for index in range(number)})
        client = run.storage._client  # type: ignore[attr-defined]
        client.meta.events.register("before-send.s3", lambda request, **_: requests.append(request.method))
        requests.clear()
        assert len(run.finish("finished").files) == number + 1
        counts.append(len(requests))
    assert counts[0] == counts[1] < 20


def test_the_manifest_tells_how_the_run_went(run: Run, tmp_path: Path) -> None:
    first = run.manifest()
    assert first is not None
    assert (first.name, first.kind, first.status, first.files) == ("digits", "robust.train", "running", {})
    run.finish("failed", error="worker 1 was killed")
    failed = run.manifest()
    assert failed is not None
    assert (failed.status, failed.error) == ("failed", "worker 1 was killed")
    again = run.start("robust.train", "a" * 64)
    assert (again.status, again.error, again.started) == ("running", None, first.started)
    run.write("artifacts/report.html", b"<html>")
    run.finish("finished", final_step=30, best_step=20)
    done = run.manifest()
    assert done is not None
    assert (done.status, done.final_step, done.best_step, done.started) == ("finished", 30, 20, first.started)
    assert set(done.files) == {"artifacts/report.html", "spec.yaml"}
    assert done.files["artifacts/report.html"].bytes == 6


def test_finishing_what_was_not_started_is_refused(storage: Storage) -> None:
    with pytest.raises(UserError, match="not started"):
        Run(storage, "digits").finish("finished")


def test_verify_finds_damage_in_checkpoints_and_artifacts(run: Run, tmp_path: Path) -> None:
    commit(run, 10, tmp_path)
    run.write("artifacts/a.html", b"first")
    run.write("artifacts/b.html", b"second")
    run.write("metrics/train.parquet", b"rows")
    run.finish("finished", final_step=10)
    assert run.verify() == []
    run.append_events([{"event": "more"}])  # which is no damage
    run.write("checkpoints/step-00000010/model.bin", b"short")
    run.write("checkpoints/step-00000020/model.bin", b"never finished")
    run.write("artifacts/a.html", b"fIrst")
    run.storage.delete([run.key("artifacts/b.html")])
    run.write("spec.yaml", SPEC[:-1].encode())
    assert [str(damage) for damage in run.verify()] == [
        "step-00000010/model.bin: 5 bytes instead of 10",
        "step-00000020/COMMITTED: missing: the upload was not finished",
        "digits/artifacts/a.html: sha256 differs",
        "digits/artifacts/b.html: missing",
        f"digits/spec.yaml: {len(SPEC) - 1} bytes instead of {len(SPEC)}",
    ]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": 1}', b"\xff"])
def test_a_damaged_manifest_is_named(run: Run, data: bytes) -> None:
    run.write("manifest.json", data)
    with pytest.raises(IntegrityError, match=r"digits/manifest\.json is damaged .*remove that one file"):
        run.manifest()
    assert [damage.file for damage in run.verify()] == ["manifest.json"]
    assert [summary.status for summary in list_runs(run.storage)] == ["damaged"]


def die_while_appending(run: Run) -> None:
    """Leave the beginning of a line in a folder; on S3, whose objects are whole, as a copy of a folder has it."""
    text = run.results.events.read() + b'{"event": "comm'
    run.storage.delete([run.key(file) for file in run.files("events")])
    run.storage.write(run.key("events.jsonl"), text)


def test_events_come_back_in_order_and_a_torn_one_is_shown(run: Run) -> None:
    assert run.events() == []
    run.append_events([])
    run.append_events([{"event": "start", "step": 0}, {"event": "note", "text": "two\nlines \u2028 \u00e9"}])
    run.append_events([{"event": "commit", "step": 10}])
    die_while_appending(run)
    again = Run(run.storage, "digits")
    again.append_events([{"event": "start", "step": 10}])
    again.append_events([{"event": "end"}])
    assert again.events() == [
        {"event": "start", "step": 0},
        {"event": "note", "text": "two\nlines \u2028 \u00e9"},
        {"event": "commit", "step": 10},
        {"event": "torn", "text": '{"event": "comm'},
        {"event": "start", "step": 10},
        {"event": "end"},
    ]
    lines = run.results.events.read().decode().splitlines()
    assert [json.loads(line)["event"] for line in lines if "comm" not in line] == ["start", "note", "start", "end"]
    assert "" not in lines


def test_runs_are_listed_with_what_became_of_them(storage: Storage, tmp_path: Path) -> None:
    assert list_runs(storage) == []
    for name in ("done", "failed", "held", "killed"):
        run = Run(storage, name)
        run.claim_spec(SPEC, "a" * 64)
        run.start("robust.train", "a" * 64)
    commit(Run(storage, "done"), 7, tmp_path)
    Run(storage, "done").finish("finished", final_step=7, best_step=7)
    Run(storage, "failed").finish("failed", error="no space")
    storage.write("no run at all/notes.txt", b"x")
    storage.write("folder/notes.txt", b"x")
    with Run(storage, "held").lease():
        summaries = list_runs(storage)
    assert {summary.name: summary.status for summary in summaries} == {
        "done": "finished",
        "failed": "failed",
        "held": "running",
        "killed": "interrupted",
    }
    assert [summary.name for summary in summaries] == Run.names(storage) == ["done", "failed", "held", "killed"]
    assert (summaries[0].last_checkpoint, summaries[0].final_step, summaries[0].kind) == (7, 7, "robust.train")
    assert summaries[1].last_checkpoint is None


def test_a_run_that_has_to_exist_names_the_nearest(url: str) -> None:
    with pytest.raises(UserError, match="it has no run at all"):
        open_run(url, "digits", must_exist=True)
    open_run(url, "digits-adt").claim_spec(SPEC, "a" * 64)
    with pytest.raises(UserError, match="is it 'digits-adt'"):
        open_run(url, "digits-atd", must_exist=True)
    with pytest.raises(UserError, match=r"no run 'nope' in .*: `poise runs list .*` names those that are there"):
        open_run(url, "nope", must_exist=True)
    assert open_run(url, "digits-adt", must_exist=True).exists()
    assert not open_run(url, "digits").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "-a", "a" * 101, "a\n", "a..b", "\u00e9"])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run"):
        open_run(tmp_path, name)
