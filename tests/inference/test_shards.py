"""Samples in shards: what is committed is never drawn again, and never taken for the answer to something else."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poise.errors import IntegrityError, RunBusyError, UserError
from poise.inference.sampler import (
    Decoding,
    Request,
    Sample,
    no_progress,
)
from poise.inference.shards import sample_all
from poise.store.runs import open_run
from poise.train.context import Context

DECODING = Decoding(4, 0.7)


class Counting:
    """A sampler whose samples are a function of the request alone, and that counts how often each is asked."""

    version = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, requests, decoding, on_progress=no_progress):
        answers = []
        for request in requests:
            self.asked.append(request.id)
            answers.append([self.sample(request, index) for index in range(request.n)])
            on_progress(len(answers))
        return answers

    def sample(self, request, index):
        tokens = tuple((request.seed + index) * 31 % (7 + place) for place in range(1 + index % 4))
        logprobs = tuple(-1 / (1 + token + index) for token in tokens)
        return Sample(request.id, index, tokens, logprobs, ("stop", "length")[index % 2], 0)


class Sink:
    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def inc(self, name, value=1.0, **labels):
        self.counts[name] = self.counts.get(name, 0) + value


def requests(count=10, n=3, **changes):
    return [
        Request(**{"id": f"q{i}", "prompt": (1, i + 2), "n": n + i % 2, "seed": 100 * i, **changes})
        for i in range(count)
    ]


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path, "sampled")


def test_samples_come_in_order_and_are_read_back_as_they_were(run):
    sampler, again = Counting(), Counting()
    drawn = sample_all(Context(run), sampler, requests(), DECODING, 4)
    assert drawn == [[sampler.sample(request, j) for j in range(request.n)] for request in requests()]
    assert run.files("samples/") == [f"samples/shard-0000{i}.parquet" for i in range(3)]
    assert sample_all(Context(run), again, requests(), DECODING, 4) == drawn
    assert (len(sampler.asked), again.asked) == (10, [])


def test_progress_costs_and_token_counts_are_told(run):
    shown, sink = [], Sink()
    drawn = sample_all(Context(run, report=shown.append, sink=sink), Counting(), requests(), DECODING, 4)
    tokens = sum(len(sample.tokens) for answer in drawn for sample in answer)
    assert {(progress.stage, progress.steps) for progress in shown} == {("sample", 10)}
    assert [progress.step for progress in shown] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10]  # within each shard too
    assert sink.counts == {"poise_samples_total": 35, "poise_sampled_tokens_total": tokens}
    told = [pq.read_metadata(pa.BufferReader(run.read(name))).metadata for name in run.files("samples/")]
    costs = [json.loads(metadata[b"poise"]) for metadata in told]
    assert sum(cost["tokens"] for cost in costs) == tokens
    assert [cost["prompt_tokens"] for cost in costs] == [8, 8, 4]
    assert all(cost["seconds"] >= 0 for cost in costs)


@pytest.mark.parametrize(
    ("changes", "decoding", "size"),
    [
        ({"prompt": (1, 2)}, DECODING, 4),
        ({"seed": 3}, DECODING, 4),
        ({"n": 2}, DECODING, 4),
        ({}, Decoding(4, 0.8), 4),
        ({}, DECODING, 5),
    ],
    ids=["prompts", "seeds", "n", "decoding", "shard size"],
)
def test_a_shard_of_something_else_is_refused(run, changes, decoding, size):
    sample_all(Context(run), Counting(), requests(), DECODING, 4)
    sampler = Counting()
    with pytest.raises(UserError, match=r"samples/shard-00000\.parquet was computed from other prompts"):
        sample_all(Context(run), sampler, requests(**changes), decoding, size)
    assert sampler.asked == []


def test_a_damaged_shard_is_named(run):
    sample_all(Context(run), Counting(), requests(), DECODING, 4)
    run.write("samples/shard-00001.parquet", run.read("samples/shard-00001.parquet")[:-40])
    with pytest.raises(IntegrityError, match=r"shard-00001\.parquet is damaged"):
        sample_all(Context(run), Counting(), requests(), DECODING, 4)


def test_who_lost_the_run_commits_nothing(run):
    def lost() -> None:
        raise RunBusyError("taken over")

    with pytest.raises(RunBusyError):
        sample_all(Context(run, check_lease=lost), Counting(), requests(), DECODING, 4)
    assert run.files("samples/") == []


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from test_shards import Context, Counting, DECODING, open_run, requests, sample_all

    class Dying(Counting):
        def generate(self, asked, decoding, on_progress):
            if len(self.asked) >= 6:
                os.kill(os.getpid(), signal.SIGKILL)
            answers = super().generate(asked, decoding, on_progress)
            print(*self.asked[-len(asked):], flush=True)
            return answers

    sample_all(Context(open_run({store!r}, "sampled")), Dying(), requests(), DECODING, 2)
"""


def test_killed_after_half_of_the_shards_and_gone_on_with(run, tmp_path, fork_server):
    code = textwrap.dedent(KILLED.format(tests=os.path.dirname(__file__), store=str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = fork_server.run(["-c", code], env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before, sampler = done.stdout.split(), Counting()
    drawn = sample_all(Context(run), sampler, requests(), DECODING, 2)
    assert len(before) == 6
    assert sorted(before + sampler.asked) == [f"q{i}" for i in range(10)]
    assert drawn == sample_all(Context(open_run(tmp_path, "whole")), Counting(), requests(), DECODING, 2)
