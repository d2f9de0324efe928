"""Every spec in `jobs/` is sound, with and without its profiles; the small ones of robust training do run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from poise.engine.launch import launch
from poise.kinds import KINDS
from poise.observe.progress import Display
from poise.observe.sinks import NullSink
from poise.robust.objectives import OBJECTIVES
from poise.spec import load
from poise.store.runs import open_run

JOBS = Path(__file__).parents[1] / "jobs"
SPECS = sorted(JOBS.rglob("*.yaml"))
ROBUST = [path for path in sorted((JOBS / "robust").glob("*.yaml")) if "kind: robust.train" in path.read_text()]


def profiles(path: Path) -> list[str | None]:
    return [None, *yaml.safe_load(path.read_text()).get("profiles", {})]


def label(value: object) -> str:
    return str(value.relative_to(JOBS)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("path", "profile"), [(path, p) for path in SPECS for p in profiles(path)], ids=label)
def test_a_spec_of_the_project_is_sound_and_says_what_it_costs(path, profile):
    spec = load(path, KINDS, profile=profile)
    assert spec.cost()
    assert path.read_text().startswith("# ")
    assert f"poise run jobs/{path.relative_to(JOBS)}" in path.read_text()


def test_every_objective_has_a_job():
    written = {yaml.safe_load(path.read_text())["objective"]["name"] for path in ROBUST}
    assert written == OBJECTIVES.keys()


@pytest.mark.parametrize("path", ROBUST, ids=label)
def test_the_small_profile_of_a_robust_job_trains_and_is_measured(path, tmp_path):
    """Two epochs of 256 images instead of all: the same code, in a second or two."""
    less = ["train.epochs=2", "train.evaluate_every.epochs=1", "train.checkpoint.every.epochs=1", "data.limit=256"]
    less += ["data.validation=40", "evaluate.num_examples=20", f"store={tmp_path}"]
    sections = yaml.safe_load(path.read_text())
    less += [f"{key}.start.epochs=1" for key in ("averaging", "awp") if "start" in sections.get(key, {})]
    spec = load(path, KINDS, less, "small")
    launch(spec, "local", None, Display(io.StringIO()), NullSink())
    run = open_run(spec.store, spec.name)
    summary = json.loads(run.read("result.json"))
    assert run.manifest().status == "finished"
    assert summary["objective"] == spec.objective.name
    assert set(summary["accuracy"]) >= {"best", "final"}
    assert ("averaged" in summary["accuracy"]) == (spec.averaging is not None)
