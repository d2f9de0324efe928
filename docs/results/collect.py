"""The results of a study as a table: `python docs/results/collect.py STORE STUDY`.

A study is a pipeline whose stages are sweeps over seeds. Each line is a stage: the mean over its seeds in percent, with
the half width of the 95 % interval of the mean (Student's t).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import yaml
from scipy import stats

from poise.kinds.robust_manifold.result import RobustManifoldResult
from poise.kinds.robust_train.result import RobustTrainResult
from poise.kinds.sweep.result import SweepResult
from poise.store.result import has_result, require_result
from poise.store.runs import open_run


def interval(shares: Sequence[float | None]) -> str:
    """Mean and half width, both times 100; None where no image was attacked is left out."""
    values = [share for share in shares if share is not None]
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return f"{100 * mean:.1f}"
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def trained(name: str, trials: Sequence[RobustTrainResult], columns: Sequence[str]) -> list[str]:
    """Lines of a stage: the selected weights, the averaged ones if there are any, and best minus final."""
    cells = {"": "selected", "averaged": "averaged", "best - final": None}
    lines = []
    for label, weights in cells.items():
        if weights is None:
            found = [trial.best_minus_final for trial in trials]
        else:
            found = [trial.accuracy.get(trial.selected if weights == "selected" else weights, {}) for trial in trials]
        if all(found):
            row = [interval([one[column] for one in found]) if column in found[0] else "–" for column in columns]
            lines.append(f"| {name} {label} | {len(found)} | {' | '.join(row)} |".replace("  |", " |"))
    return lines


def main(store: str, study: str) -> None:
    """Print the table of every sweep of the study."""
    stages = sweeps(store, study)
    trials = {
        stage: [require_result(open_run(store, trial), RobustTrainResult) for trial in runs]
        for stage, runs in stages.items()
    }
    columns = list(dict.fromkeys(key for runs in trials.values() for one in runs for key in one.accuracy["final"]))
    columns.sort(key=["clean", "robust/linf", "robust/l2", "robust/l1", "robust/average", "robust/union"].index)
    print("| | seeds | " + " | ".join(column.removeprefix("robust/") for column in columns) + " |")
    print("|---|" + "---|" * (len(columns) + 1))
    for stage, runs in trials.items():
        print("\n".join(trained(stage, runs, columns)))
    for attacked in stages_of(store, study, "robust.manifold"):
        result = require_result(open_run(store, attacked), RobustManifoldResult)
        print("\n".join(["", *on_and_off(result, stages)]))


def on_and_off(result: RobustManifoldResult, stages: dict[str, list[str]]) -> list[str]:
    """Of each stage and ball, the share of correctly classified images that fall on the manifold, off it, in all."""
    lines = ["| | seeds | ball | on | off | full |", "|---|---|---|---|---|---|"]
    classifiers = {one.run: one for one in result.classifiers}
    for stage, runs in stages.items():
        found = [classifiers[run].success for run in runs]
        for norm in dict.fromkeys(name.partition("/")[2] for name in found[0]):
            cells = [
                interval([one[f"{where}/{norm}"] for one in found]) for where in ("on_manifold", "off_manifold", "full")
            ]
            lines.append(f"| {stage} | {len(runs)} | {norm} | {' | '.join(cells)} |")
    return lines


def stages_of(store: str, study: str, kind: str) -> dict[str, str]:
    """From the run of each stage of that kind to the name of the stage."""
    stages = yaml.safe_load(open_run(store, study).read("spec.yaml"))["stages"]
    return {body["name"]: name for name, body in stages.items() if body["kind"] == kind}


def sweeps(store: str, study: str) -> dict[str, list[str]]:
    """The trials of each finished stage of a study that is a sweep, by the name of the stage."""
    runs = {name: open_run(store, run) for run, name in stages_of(store, study, "sweep").items()}
    results = {name: require_result(run, SweepResult) for name, run in runs.items() if has_result(run)}
    return {name: [trial.run for trial in result.trials] for name, result in results.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
