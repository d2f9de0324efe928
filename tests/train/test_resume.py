"""Killed anywhere and started again, a run ends in the same bits; damage is named and stepped over."""

from __future__ import annotations

import pytest
import torch

from poise.errors import IntegrityError
from poise.observe.rows import Rows
from poise.train.state import TrainState, capture_rng, load_state, restore_rng, save_state


class Killed(BaseException):
    """Not an Exception: nothing in the loop may catch it and tidy up."""


def kill_at(index: int):
    def interrupt(batch: int) -> None:
        if batch == index:
            raise Killed

    return interrupt


@pytest.mark.parametrize("step", range(12))
def test_killed_at_any_step_it_ends_in_the_same_bits(step, bench, tmp_path):
    whole = bench.fit("whole")
    with pytest.raises(Killed):
        bench.fit("killed", kill_at(step))
    committed = bench.steps("killed")
    assert bench.fit("killed") == whole
    starts = [event["step"] for event in bench.run("killed").events() if event["event"] == "start"]
    assert starts == [0, max(committed, default=0)]
    bench.assert_equal("killed", "whole", tmp_path)


def test_killed_again_and_again_it_ends_in_the_same_bits(bench, tmp_path, adamw):
    whole = bench.fit("whole", optimizer=adamw)
    for step in (2, 5, 5, 8, 11):
        with pytest.raises(Killed):
            bench.fit("killed", kill_at(step), optimizer=adamw)
    assert bench.fit("killed", optimizer=adamw) == whole
    bench.assert_equal("killed", "whole", tmp_path)
    commits = [event["step"] for event in bench.run("killed").events() if event["event"] == "commit"]
    assert commits == sorted(set(commits)), "a committed step was repeated"


def test_rows_of_a_commit_that_was_killed_at_another_step_do_not_count_twice(bench, tmp_path):
    """A signal makes a run commit at any step: killed before its checkpoint, it leaves rows of steps to come."""
    bench.fit("whole")
    with pytest.raises(Killed):
        bench.fit("killed", kill_at(4))
    last = max(bench.steps("killed"))
    files = bench.run("whole").files("metrics/rows-")
    other = next(step for step in range(last + 1, 12) if f"metrics/rows-{step:08d}.parquet" not in files)
    rows = Rows()
    rows.add(other, 0.5, "train", {"loss": 1.0})
    bench.run("killed").write(f"metrics/rows-{other:08d}.parquet", rows.to_parquet())
    bench.fit("killed")
    bench.assert_equal("killed", "whole", tmp_path)
    assert bench.run("killed").verify() == []


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "task.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(file, harm, bench, tmp_path):
    bench.fit("whole")
    with pytest.raises(Killed):
        bench.fit("harmed", kill_at(10))
    newest = tmp_path / "runs/harmed/checkpoints/step-00000009" / file
    data = bytearray(newest.read_bytes())
    if harm == "missing":
        newest.unlink()
    else:
        data[len(data) // 2] ^= 1
        newest.write_bytes(data[: len(data) // 2] if harm == "truncated" else data)
    bench.fit("harmed")
    events = bench.run("harmed").events()
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 8]
    (named,) = [event["what"] for event in events if event["event"] == "damaged"]
    assert "step-00000009" in named
    assert file in named
    bench.assert_equal("harmed", "whole", tmp_path)


def test_an_upload_without_its_commit_is_never_used(bench, tmp_path):
    bench.fit("whole")
    with pytest.raises(Killed):
        bench.fit("torn", kill_at(10))
    (tmp_path / "runs/torn/checkpoints/step-00000009/COMMITTED").unlink()
    bench.fit("torn")
    assert [event["step"] for event in bench.run("torn").events() if event["event"] == "start"] == [0, 8]
    bench.assert_equal("torn", "whole", tmp_path)


def test_when_every_checkpoint_is_damaged_it_starts_anew_and_says_so(bench, tmp_path):
    bench.fit("whole")
    with pytest.raises(Killed):
        bench.fit("harmed", kill_at(5))
    for file in (tmp_path / "runs/harmed/checkpoints").rglob("model.safetensors"):
        file.write_bytes(b"nothing")
    bench.fit("harmed")
    events = bench.run("harmed").events()
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 0]
    assert len([event for event in events if event["event"] == "damaged"]) == 2
    bench.assert_equal("harmed", "whole", tmp_path)


def test_no_flipped_bit_in_the_rows_of_an_unfinished_run_is_read(bench, tmp_path):
    with pytest.raises(Killed):
        bench.fit("harmed", kill_at(10))
    run = bench.run("harmed")
    assert run.verify() == []
    rows = tmp_path / "runs/harmed/metrics/rows-00000006.parquet"
    sound = rows.read_bytes()
    for index in range(0, len(sound), 29):
        rows.write_bytes(sound[:index] + bytes([sound[index] ^ 4]) + sound[index + 1 :])
        with pytest.raises(IntegrityError, match="rows-00000006"):
            bench.rows("harmed")
    assert "rows-00000006.parquet: sha256 differs" in str(run.verify()[0])
    rows.unlink()
    assert "rows-00000006.parquet: missing" in str(run.verify()[0])
    with pytest.raises(IntegrityError, match=r"rows-00000006.parquet is missing"):
        [run.read(name) for name in run.committed_files("metrics/")]


def test_the_state_on_disk_is_the_state_in_memory(tmp_path, adamw, make_task):
    from poise.train.optim import build_optimizer

    task = make_task()
    state = TrainState(task.model, build_optimizer(adamw, task.model), {"weights": torch.rand(3)}, step=5)
    task.model(torch.randn(4, 5)).sum().backward()
    state.optimizer.step()
    rng = capture_rng(torch.device("cpu"))
    save_state(state, [rng, capture_rng(torch.device("cpu"))], tmp_path)
    drawn = torch.rand(3)

    other = make_task()
    loaded = TrainState(other.model, build_optimizer(adamw, other.model), {})
    load_state(loaded, tmp_path, torch.device("cpu"))
    assert loaded.step == 5
    assert torch.equal(loaded.task["weights"], state.task["weights"])
    for before, after in zip(
        state.optimizer.state_dict()["state"].values(), loaded.optimizer.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert restore_rng(tmp_path, 1, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)
    assert not restore_rng(tmp_path, 2, torch.device("cpu"))


def test_a_best_checkpoint_that_is_gone_is_a_named_error(bench):
    with pytest.raises(IntegrityError, match="step 5 is not there"):
        bench.run("none").checkpoints.at(5)
