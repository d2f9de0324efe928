"""A checkpoint is downloaded once per machine, and every rank has it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poise.errors import IntegrityError
from poise.store.runs import open_run
from poise.train.context import Context
from poise.train.restore import node_folder

RANK = """\
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from poise.spec import ExactNumber
from poise.store.runs import open_run
from poise.train.context import Context
from poise.train.loop import fit
from poise.train.spec import Checkpointing, Interval, Sgd, TrainSpec
from poise.train.task import StepOutput, Task

store = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
spec = TrainSpec(
    steps=8,
    optimizer=Sgd(lr=ExactNumber("0.05"), momentum=ExactNumber("0.9")),
    checkpoint=Checkpointing(every=Interval(steps=3), keep=100),
    log_every=2,
)


def train(name, last_batch=10**9):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3))

    def batch(index):
        if index >= last_batch:
            raise KeyboardInterrupt
        return torch.randn(16, 5, generator=torch.Generator().manual_seed(2 * index + rank))

    def step(model, x, state, step_context):
        return StepOutput(model(x).square().mean(), {}, state)

    run = open_run(store, name)
    read = []
    run.storage._client.meta.events.register(
        "before-send.s3.GetObject", lambda request, **_: read.append(request.url.partition("checkpoints/")[2])
    )
    try:
        fit(Task(model, batch, step, 4, 32, seed=3), spec, Context(run, rank, 2))
    except KeyboardInterrupt:
        pass
    return [name for name in read if name]


train("whole")
train("ended", last_batch=7)
dist.barrier()
line = json.dumps([rank, train("ended")]) + "\\n"
os.write(1, line.encode())  # in one piece, since both ranks write to one file
dist.destroy_process_group()
"""


def test_two_ranks_on_s3_download_each_file_of_a_checkpoint_once(s3_store: str, fork_server: Any) -> None:
    """And the run that went on from it has the same bits as one that was not interrupted."""
    done = fork_server.run_ranks(["-c", RANK, s3_store])
    assert done.returncode == 0, done.stderr
    read_by_rank = {}
    for line in done.stdout.splitlines():
        rank, files_read = json.loads(line)
        read_by_rank[rank] = Counter(files_read)
    run = open_run(s3_store, "ended")
    files = [file.removeprefix("checkpoints/") for file in run.files("checkpoints/step-00000006/")]
    tensors = [file for file in files if not file.endswith(("manifest.json", "COMMITTED"))]
    assert len(tensors) >= 5
    assert {file: read_by_rank[0][file] for file in tensors} == dict.fromkeys(tensors, 1)
    assert not read_by_rank[1], "rank 1 has the files of rank 0"
    whole = open_run(s3_store, "whole")
    for step in (6, 8):
        for name in run.files(f"checkpoints/step-{step:08d}/"):
            if name.endswith((".safetensors", "state.json")):
                assert run.read(name) == whole.read(name), name


class Ranks:
    """Contexts of ranks in threads, two on each of the machines, which do not see each other's folders."""

    def __init__(self, world_size: int, store: Path) -> None:
        self.values: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size)
        self.contexts = [self._context(rank, world_size, store) for rank in range(world_size)]

    def _context(self, rank: int, world_size: int, store: Path) -> Context:
        context = Context(open_run(store, "one"), rank, world_size)

        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait(20)
            values = [_as_seen_by(rank, each, owner) for owner, each in enumerate(self.values)]
            self.barrier.wait(20)
            return values

        context.gather = gather  # type: ignore[method-assign]
        context.broadcast = lambda value: gather(value)[0]  # type: ignore[method-assign]
        return context

    def run(self, action: Callable[[Context], Any]) -> list[Any]:
        """The result or the exception of `action` on every rank."""
        results: list[Any] = [None] * len(self.contexts)

        def call(context: Context) -> None:
            try:
                results[context.rank] = action(context)
            except Exception as error:  # noqa: BLE001 - returned
                results[context.rank] = error

        threads = [threading.Thread(target=call, args=(context,)) for context in self.contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def _as_seen_by(rank: int, value: Any, owner: int) -> Any:
    is_elsewhere = isinstance(value, Path) and rank // 2 != owner // 2
    return value / "on another machine" if is_elsewhere else value


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A store with a run that has a checkpoint at step 3."""
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "model.bin").write_bytes(b"weights")
    open_run(tmp_path / "store", "one").checkpoints.commit(3, saved, info={})
    return tmp_path / "store"


def test_ranks_of_other_machines_download_for_themselves(committed: Path) -> None:

    def load(context: Context) -> tuple[bool, bytes]:
        with node_folder(context) as folder:
            if context.is_main:
                context.run.checkpoints.latest_valid(folder.path)
            folder.fetch(context.run.checkpoints.at(3), context)
            return folder.is_owner, context.on_every_rank(lambda: (folder.path / "model.bin").read_bytes())

    loaded = Ranks(4, committed).run(load)
    assert [is_owner for is_owner, _ in loaded] == [True, False, True, False]
    assert {data for _, data in loaded} == {b"weights"}


def test_what_one_rank_cannot_download_ends_all(committed: Path) -> None:
    ranks = Ranks(4, committed)
    commit = ranks.contexts[0].run.checkpoints.at(3)
    file = committed / "one/checkpoints/step-00000003/model.bin"

    def load(context: Context) -> None:
        with node_folder(context) as folder:
            context.on_main(lambda: context.run.checkpoints.fetch(commit, folder.path))
            context.on_main(lambda: file.write_bytes(b"Weights"))  # after rank 0 has it
            folder.fetch(commit, context)

    errors = ranks.run(load)
    assert [type(error) for error in errors] == [IntegrityError] * 4
    assert all("model.bin: sha256 differs" in str(error) for error in errors)
