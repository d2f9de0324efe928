"""Steps per second of `--engine ray` beside `--engine local` at the same world size, after start-up; the floor is 0.97.

World size 1 is one process against a group of one; world size 2 is two processes under torchrun against a group of two.
Both runs, started by the command line, live at the same time and take turns: all processes of one are stopped (SIGSTOP)
while the other works, so that each ratio compares neighbouring seconds of the same machine. A turn's rate is read from
the commits that the run itself records.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from poise.store.runs import Run, open_run

ROUNDS, TURN_S, SETTLE_S = 24, 5.0, 1.0
SPEC = """\
kind: robust.train
name: {name}
store: {store}
workers: {{count: {count}}}
model: {{name: cnn, width: 16}}
data: {{name: digits, batch_size: 128}}
threats: {{linf: {{eps: 0.15, steps: 5}}, l2: {{eps: 0.8, steps: 5}}}}
objective: {{name: adt}}
train:
  steps: 1000000
  optimizer: {{name: sgd, lr: 0.05}}
  checkpoint: {{every: {{steps: 20}}}}
  evaluate_every: {{steps: 1000000}}
evaluate: {{num_examples: 1}}
"""


class Runner:
    """A run in processes of its own that can be halted as a whole."""

    def __init__(self, engine: str, count: int, folder: Path) -> None:
        spec = folder / f"{engine}.yaml"
        spec.write_text(SPEC.format(name=engine, store=folder, count=count))
        python = [sys.executable]
        if engine == "local" and count > 1:
            python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
        command = [*python, "-m", "poise", "run", str(spec), "--engine", engine]
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.run: Run = open_run(str(folder), engine)
        while len(self.commits(0)) < 3:
            assert self.process.poll() is None, f"{engine} has ended"
            time.sleep(0.2)

    def commits(self, since: float) -> list[tuple[float, int]]:
        """Time and step of each commit from `since` on."""
        events = self.run.events()
        return [(e["time"], e["step"]) for e in events if e["event"] == "commit" and e["time"] >= since]

    def signal(self, number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.send_signal(number)

    def turn(self) -> float:
        """Steps per second of one turn, the first moments after waking left out."""
        self.signal(signal.SIGCONT)
        began = time.time()
        time.sleep(TURN_S)
        self.signal(signal.SIGSTOP)
        commits = self.commits(began + SETTLE_S)
        (first, start), (last, end) = commits[0], commits[-1]
        return (end - start) / (last - first)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


def main() -> None:
    for count in (2, 1):
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            runners = {}
            for engine in ("local", "ray"):
                runners[engine] = Runner(engine, count, Path(scratch))
                stack.callback(runners[engine].end)
                runners[engine].signal(signal.SIGSTOP)
            ratios = [_round(runners, turn) for turn in range(ROUNDS)]
        low, high = _interval(ratios)
        print(
            f"  world size {count}  ray over local {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], "
            f"median of {ROUNDS} turns of {TURN_S:.0f} s each and its 95 % interval (bootstrap)",
            flush=True,
        )


def _interval(ratios: list[float]) -> tuple[float, float]:
    draws = random.Random(0)
    medians = [statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000)]
    low, *_, high = statistics.quantiles(medians, n=40)
    return low, high


def _round(runners: dict[str, Runner], number: int) -> float:
    """A turn of each engine, in alternating order; the ratio of their rates."""
    order = ("local", "ray") if number % 2 == 0 else ("ray", "local")
    rates = {engine: runners[engine].turn() for engine in order}
    local, ray = rates["local"], rates["ray"]
    print(f"    {number}: local {local:6.2f} steps/s   ray {ray:6.2f} steps/s   ratio {ray / local:.3f}", flush=True)
    return ray / local


if __name__ == "__main__":
    main()
