"""Reading a spec: exact values, overrides, resolved text, schemas."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.kinds import KINDS
from poise.spec import ExactNumber, SpecError, dump, json_schema, load
from poise.spec.problems import dotted


def test_a_fraction_is_exact_and_printed_as_written(valid, write):
    spec = load(write(valid), KINDS)
    eps = spec.threats["linf"].eps
    assert eps.exact == Fraction(8, 255)
    assert eps == 8 / 255
    assert yaml.safe_load(dump(spec))["threats"]["linf"]["eps"] == "8/255"


def test_the_resolved_spec_reads_back_as_itself(valid, write):
    spec = load(write(valid), KINDS)
    again = load(write(dump(spec), "again.yaml"), KINDS)
    assert again == spec
    assert dump(again) == dump(spec)


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=10**6))
@settings(max_examples=100, deadline=None)
def test_reals_keep_every_fraction(value):
    real = ExactNumber(f"{value.numerator}/{value.denominator}")
    assert real.exact == value
    assert real == float(value)
    assert pickle.loads(pickle.dumps(real)).exact == value


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_reals_keep_every_float(value):
    assert float(ExactNumber(value)) == value


def test_set_changes_values_and_makes_sections(valid, write):
    spec = load(
        write(valid), KINDS, ["train.epochs=5", "threats.l2.eps=1/2", "train.schedule.name=cosine", "name=other"]
    )
    assert (spec.name, spec.train.epochs, spec.train.schedule.name) == ("other", 5, "cosine")
    assert spec.threats["l2"].eps.exact == Fraction(1, 2)


def test_merge_keys_and_aliases_are_read(write):
    text = """\
kind: robust.train
name: a
model: &model {name: cnn}
data: {name: digits}
threats:
  linf: &ball {eps: 0.1, steps: 3}
  l2: {<<: *ball, eps: 1}
train: {epochs: 1}
"""
    spec = load(write(text), KINDS)
    assert (spec.threats["l2"].eps, spec.threats["l2"].steps) == (1, 3)


STAGES = {
    "a": {"kind": "robust.train", "model": {}, "data": {}, "threats": {"linf": {"eps": 0.1}}, "train": {"epochs": 1}},
    "b": {"kind": "robust.evaluate", "model": {"run": "${a}"}, "attacks": [
        {"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.1}}]},
    "c": {"kind": "bounds.report", "runs": ["${a}"]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"b": {"model": {"run": "x${a}"}}}, "stages.b.model.run", "named by ${stage} alone"),
        ({"b": {"model": {"run": "${a}x"}}}, "stages.b.model.run", "named by ${stage} alone"),
        ({"b": {"model": {"run": "${c}"}}}, "stages.b.model.run", "${c} names no stage before this one"),
        ({"b": {"model": {"run": "p-c"}}}, "stages.b.model.run", "p-c is the run of stage c, which comes later"),
        ({"b": {"model": {"run": "p-b"}}}, "stages.b.model.run", "which comes later"),
        ({"b": {"kind": "sweep", "metric": "clean", "mode": "max", "base": STAGES["b"], "space": {
            "model.run": {"grid": ["${a}", "p-c"]}}, "model": None, "attacks": None}},
         "stages.b.base.model.run", "p-c is the run of stage c, which comes later"),
    ],
)  # fmt: skip
def test_what_a_stage_reads_is_checked_before_anything_runs(changes, path, message, write):
    stages = {name: {**stage, **changes.get(name, {})} for name, stage in STAGES.items()}
    stages = {name: {key: value for key, value in stage.items() if value is not None} for name, stage in stages.items()}
    with pytest.raises(SpecError) as caught:
        load(write(yaml.safe_dump({"kind": "pipeline", "name": "p", "stages": stages}, sort_keys=False)), KINDS)
    told = [(dotted(problem.path), problem.message, problem.line > 0) for problem in caught.value.problems]
    assert any(where == path and message in text and line for where, text, line in told), told


def test_a_stage_reads_the_runs_of_stages_before_it(write):
    text = yaml.safe_dump({"kind": "pipeline", "name": "p", "stages": STAGES}, sort_keys=False)
    stages = load(write(text), KINDS).stages
    assert [each.place for stage in stages.values() for each in stage.inputs() if each.kind == "run"] == ["p-a", "p-a"]


def test_common_is_laid_under_each_stage(write, valid):
    body = yaml.safe_load(valid)
    del body["name"], body["seed"]
    stages = {"a": {"use": "digits", "train": {"epochs": 7}}, "b": {"use": "digits", "seed": 9}}
    pipeline = {
        "kind": "pipeline",
        "name": "both",
        "seed": 3,
        "workers": {"count": 2},
        "common": {"digits": body},
        "stages": stages,
    }
    spec = load(write(yaml.safe_dump(pipeline)), KINDS)
    a, b = spec.stages["a"], spec.stages["b"]
    assert (a.name, b.name) == ("both-a", "both-b")
    assert (a.seed, b.seed) == (3, 9)
    assert (a.train.epochs, b.train.epochs) == (7, 2)
    assert a.workers.count == b.workers.count == 2
    assert load(write(dump(spec), "again.yaml"), KINDS) == spec


def test_a_mistake_in_common_is_found_where_it_was_written(write, valid):
    common = "common:\n  x:\n    kind: robust.train\n    train:\n      epoks: 3\n"
    text = f"kind: pipeline\nname: p\n{common}stages:\n  a: {{use: x}}\n"
    with pytest.raises(SpecError) as caught:
        load(write(text), KINDS)
    unknown = [problem for problem in caught.value.problems if "unknown key" in problem.message]
    assert [(problem.line, problem.path[-1]) for problem in unknown] == [(7, "epoks")]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_schema_of_every_kind_describes_every_field(kind):
    schema = json_schema(KINDS[kind], kind)
    json.dumps(schema)
    sections = [schema, *schema.get("$defs", {}).values()]
    for section in sections:
        for name, field in section.get("properties", {}).items():
            assert field.get("description") or "const" in field, f"{section.get('title')}.{name} has no description"


def test_the_keys_of_robust_train_are_frozen():
    """A renamed or dropped key breaks the specs of users: change this list only with a note for them."""
    sections = json_schema(KINDS["robust.train"], "robust.train")
    found = {section["title"]: sorted(section["properties"]) for section in [sections, *sections["$defs"].values()]}
    assert found["poise robust.train"] == [
        "averaging", "awp", "compute", "data", "eigenspace", "evaluate", "kind", "model", "monitors", "name",
        "objective", "profiles", "seed", "store", "threats", "train", "workers",
    ]  # fmt: skip
    assert found["TrainSpec"] == [
        "accumulate", "checkpoint", "clip_norm", "epochs", "evaluate_every", "log_every", "optimizer", "precision",
        "schedule", "steps",
    ]  # fmt: skip
    assert found["ThreatSpec"] == ["attack", "eps", "random_start", "restarts", "sparsity", "step_size", "steps"]
    assert found["WorkersSpec"] == ["count", "cpus", "environment", "gpus", "max_failures", "min_count"]


def test_a_spec_travels_between_processes_as_it_was_written(write, valid):
    spec = load(write(valid), KINDS)
    received = pickle.loads(pickle.dumps(spec))
    assert received == spec
    assert dump(received) == dump(spec)
    assert received.threats.linf.eps.exact == spec.threats.linf.eps.exact
