"""Steps per second of `--engine ray` beside `--engine local` at the same world size, after start-up; the floor is 0.97.

World size 1 is one process against a gang of one; world size 2 is two processes under torchrun against a gang of two.
Each figure is of a whole run by the command line, read from the timing rows that the run itself has kept.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from poise.report.record import load_record
from poise.store.runs import open_run

ROUNDS = 4
WINDOW = 20
"""Steps from one commit to the next: each is timed by itself."""
STEPS = 25 * WINDOW
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
  steps: {steps}
  optimizer: {{name: sgd, lr: 0.05}}
  checkpoint: {{every: {{steps: {every}}}}}
  evaluate_every: {{steps: {steps}}}
evaluate: {{examples: 1}}
"""


def measure(engine: str, count: int, folder: Path, turn: int) -> float:
    """Median images per second of the windows after the first: start-up and the final evaluation are left out."""
    name = f"{engine}-{count}-{turn}"
    spec = folder / f"{name}.yaml"
    spec.write_text(SPEC.format(name=name, store=folder, count=count, steps=STEPS, every=WINDOW))
    python = [sys.executable]
    if engine == "local" and count > 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    command = [*python, "-m", "poise", "run", str(spec), "--engine", engine]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    seconds: Counter[int] = Counter()
    for row in load_record(open_run(str(folder), name)).rows.to_pylist():
        if row["split"] == "timing" and row["name"].startswith("seconds/") and row["step"] > WINDOW:
            seconds[row["step"]] += row["value"]
    return WINDOW * 128 / statistics.median(seconds.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1, 2):
            ratios = [_round(count, Path(scratch), turn) for turn in range(ROUNDS)]
            print(
                f"  world size {count}  ray over local {statistics.median(ratios):.3f} "
                f"[{min(ratios):.3f}, {max(ratios):.3f}], median of {ROUNDS} rounds",
                flush=True,
            )


def _round(count: int, folder: Path, turn: int) -> float:
    """One run of each engine, in alternating order; the ratio of their rates."""
    engines = ("local", "ray") if turn % 2 == 0 else ("ray", "local")
    rates = {engine: measure(engine, count, folder, turn) for engine in engines}
    local, ray = rates["local"], rates["ray"]
    print(
        f"    round {turn}: local {local:6.0f} images/s   ray {ray:6.0f} images/s   ratio {ray / local:.3f}", flush=True
    )
    return ray / local


if __name__ == "__main__":
    main()
