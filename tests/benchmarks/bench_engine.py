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
from pathlib import Path

from poise.report.record import load_record
from poise.store.runs import open_run

ROUNDS = 3
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


def measure(engine: str, count: int, steps: int, folder: Path, turn: int) -> float:
    """Images per second from the first commit to the last: start-up and the final evaluation are left out."""
    name = f"{engine}-{count}-{turn}"
    spec = folder / f"{name}.yaml"
    spec.write_text(SPEC.format(name=name, store=folder, count=count, steps=steps, every=steps // 5))
    python = [sys.executable]
    if engine == "local" and count > 1:
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    command = [*python, "-m", "poise", "run", str(spec), "--engine", engine]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    rows = load_record(open_run(str(folder), name)).rows.to_pylist()
    seconds = [row for row in rows if row["split"] == "timing" and row["name"].startswith("seconds/")]
    steady = [row["value"] for row in seconds if row["step"] > steps // 5]
    return (steps - steps // 5) * 128 / sum(steady)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for count, steps in ((1, 200), (2, 300)):
            pairs = [
                (measure("local", count, steps, Path(scratch), turn), measure("ray", count, steps, Path(scratch), turn))
                for turn in range(ROUNDS)
            ]
            ratios = [ray / local for local, ray in pairs]
            local, ray = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"  world size {count}  local {local:8.0f} images/s   ray {ray:8.0f} images/s   "
                f"ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] over {ROUNDS} rounds",
                flush=True,
            )


if __name__ == "__main__":
    main()
