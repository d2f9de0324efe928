"""What a driver does round a run: identity, claim, and how an end is recorded."""

from __future__ import annotations

import pytest

from poise.engine.lifecycle import claim, is_finished, spec_hash
from poise.errors import PreemptedError, RunBusyError, UserError
from poise.kinds.robust_train.result import RobustTrainResult
from poise.store.result import write_result
from poise.store.runs import open_run


def test_where_and_on_how_many_workers_does_not_make_another_experiment(spec_of):
    same = [spec_of(), spec_of(workers={"count": 4}), spec_of(store="s3://bucket/runs")]
    assert len({spec_hash(spec) for spec in same}) == 1
    assert spec_hash(spec_of(seed=1)) != spec_hash(spec_of())
    assert spec_hash(spec_of(train={"epochs": 2})) != spec_hash(spec_of())


def test_an_end_is_recorded_with_its_reason(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with pytest.raises(UserError), claim(run, spec_of()):
        raise UserError("no such data set")
    assert (run.manifest().status, run.manifest().error) == ("failed", "no such data set")
    assert not is_finished(run, spec_of())
    with claim(run, spec_of()):
        assert run.manifest().status == "running"
    assert is_finished(run, spec_of())


def test_whether_a_run_is_finished_is_asked_without_writing(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with claim(run, spec_of()):
        pass
    spec_file = tmp_path / "one/spec.yaml"
    spec_file.unlink()  # claiming the run would write it again
    before = sorted(path for path in tmp_path.rglob("*"))
    assert is_finished(run, spec_of())
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_an_interrupt_is_no_failure_and_lets_go_of_the_run(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with pytest.raises(KeyboardInterrupt), claim(run, spec_of()):
        raise KeyboardInterrupt
    assert run.summary().status == "interrupted"
    with claim(run, spec_of()):
        pass


def test_a_held_run_and_another_spec_are_refused(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with claim(run, spec_of()):
        with pytest.raises(RunBusyError, match="held by process"), claim(run, spec_of()):
            pass
        assert run.manifest().status == "running"
    with pytest.raises(UserError, match="another spec"):
        is_finished(run, spec_of(seed=2))


def test_a_driver_that_lost_its_lease_leaves_the_record_of_the_next_alone(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    lease = claim(run, spec_of())
    token = lease.__enter__().token
    stored = run.storage.read("one/LOCK")
    assert run.storage.compare_and_swap("one/LOCK", stored.replace(token.encode(), b"somebody else"), stored)
    assert not lease.__exit__(UserError, UserError("no such data set"), None)
    assert run.manifest().status == "running"
    assert run.events() == []


def test_a_refused_typo_does_not_use_up_the_name(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with pytest.raises(UserError, match="no such data set"), claim(run, spec_of(seed=1)):
        raise UserError("no such data set")
    with claim(run, spec_of(seed=2)):
        write_result(
            run,
            RobustTrainResult(
                run="one", seed=2, step=8, best_step=6, parameters=1, num_examples=1, attacks={}, accuracy={}
            ),
        )
    assert is_finished(run, spec_of(seed=2))
    assert (run.manifest().final_step, run.manifest().best_step) == (8, 6)
    assert [event["event"] for event in run.events()] == ["failed"]
    with pytest.raises(UserError, match=r"another spec(.|\n)*poise runs rm"):
        is_finished(run, spec_of(seed=3))


def test_a_preempted_run_says_so_and_is_no_failure(tmp_path, spec_of):
    run = open_run(tmp_path, "one")
    with pytest.raises(PreemptedError), claim(run, spec_of()):
        raise PreemptedError("stopped and committed at step 7")
    assert run.summary().status == "interrupted"
    assert run.events()[-1]["event"] == "preempted"
