"""Malformed specs: exit code 2, no traceback, and a message that says what to change."""

from __future__ import annotations

import os
import pickle
import random
import threading
import time

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.cli import cli
from poise.errors import UserError
from poise.kinds import KINDS
from poise.spec import SpecError, load

BASE = {
    "kind": "robust.train",
    "name": "digits",
    "model": {"name": "cnn"},
    "data": {"name": "digits", "batch_size": 64},
    "threats": {"linf": {"eps": "8/255"}},
    "objective": {"name": "at"},
    "train": {"epochs": 2},
}

# (path, value, what the message must contain)
CHANGES = [
    ("kind", "robust.trian", "did you mean 'robust.train'"),
    ("kind", None, "is missing"),
    ("kind", ["robust.train"], "valid:"),
    ("kind", 3, "valid:"),
    ("name", "../../etc/passwd", "letters, digits"),
    ("name", "a/b", "letters, digits"),
    ("name", "a..b", "no '..'"),
    ("name", "", "1 to 100"),
    ("name", "x" * 101, "1 to 100"),
    ("name", 7, "valid string"),
    ("name", ".hidden", "starts with a letter"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than"),
    ("seed", 1.5, "valid integer"),
    ("seed", True, "valid integer"),
    ("store", "ftp://host/runs", "s3://bucket/prefix"),
    ("store", "s3://", "s3://bucket/prefix"),
    ("store", "s3://key:secret@bucket/x", "AWS_SECRET_ACCESS_KEY"),
    ("store", "", "must not be empty"),
    ("store", 5, "valid string"),
    ("modle", {"name": "cnn"}, "did you mean 'model'"),
    ("model", "cnn", "needs a section: write `{name: cnn}`"),
    ("model.name", "resnet19", "did you mean 'resnet18'"),
    ("model.activation", "gelu", "is not valid"),
    ("model.width", 0, "greater than or equal to 1"),
    ("data.name", "imagenet", "is not valid"),
    ("data.name", "cifar10", "set root"),
    ("data.batch_size", 0, "greater than or equal to 1"),
    ("data.batch_size", 10**12, "less than or equal to"),
    ("data.batch_size", "many", "valid integer"),
    ("data.batch_sise", 3, "did you mean 'batch_size'"),
    ("data.root", "/nowhere", "remove root"),
    ("data.flip", "yes please", "valid boolean"),
    ("threats", {}, "at least one threat"),
    ("threats", [], "needs a section with keys of linf, l2, l1, got []"),
    ("threats.linf", "8/255", "needs a section: write `{eps: 8/255}`"),
    ("workers", 2, "needs a section: write `{count: 2}`"),
    ("data", "digits", "needs a section: write `{name: digits}`"),
    ("train.evaluate_every", 2, "needs a section: write `{epochs: 2}`"),
    ("train.optimizer", "sgd", "needs a section: write `{name: sgd}`"),
    ("objective", "trades", "needs a section: write `{name: trades}`"),
    ("store", "s" * 5000, "may have at most"),
    ("threats.linf.eps", "8/0", "divides by zero"),
    ("threats.linf.eps", "eight", "fraction such as 8/255"),
    ("threats.linf.eps", float("nan"), "finite"),
    ("threats.linf.eps", float("inf"), "finite"),
    ("threats.linf.eps", -0.1, "greater than or equal to 0"),
    ("threats.linf.eps", "1e999", "too large"),
    ("threats.linf.eps", None, "fraction such as 8/255"),
    ("threats.linf.steps", 0, "greater than or equal to 1"),
    ("threats.linf.steps", 10**9, "less than or equal to"),
    ("threats.linf.stepsize", 1, "did you mean 'step_size'"),
    ("threats.linf.sparsity", 5, "l1 alone"),
    ("threats.linfinity", {"eps": 1}, "unknown key"),
    ("threats.l2", {"eps": 1}, "exactly one threat"),
    ("objective", {"name": "add"}, "did you mean 'adt'"),
    ("objective", {}, "valid: adt, at, avg, eat, fgsm_rs"),
    ("objective", {"name": "adt", "lag": 2}, "is not valid"),
    ("objective", {"name": "adt", "weighting": "inverse"}, "did you mean 'inverse_loss'"),
    ("objective", {"name": "at", "lag": 1}, "unknown key"),
    ("train", None, "needs a section with keys of epochs"),
    ("train.epochs", "ten", "valid integer"),
    ("train.epochs", 0, "greater than or equal to 1"),
    ("train.steps", 10, "either epochs or steps"),
    ("train.optimizer", {"name": "sdg"}, "did you mean 'sgd'"),
    ("train.optimizer", {"name": "sgd", "lr": 0}, "greater than 0"),
    ("train.optimizer", {"name": "sgd", "momentum": 1}, "less than 1"),
    ("train.optimizer", {"name": "sgd", "momentum": 0, "nesterov": True}, "momentum above 0"),
    ("train.schedule", {"name": "piecewise", "milestones": [0.7, 0.5]}, "must increase"),
    ("train.schedule", {"name": "linear", "points": [[0, 1], [0.5, 0]]}, "share 0 to share 1"),
    ("train.schedule", {"name": "cosin"}, "did you mean 'cosine'"),
    ("train.precision", "fp16", "is not valid"),
    ("train.clip_norm", 0, "greater than 0"),
    ("train.checkpoint", {"keep": 0}, "greater than or equal to 1"),
    ("train.checkpoint", {"every": {"epochs": 1, "steps": 1}}, "either epochs or steps"),
    ("workers.count", 0, "greater than or equal to 1"),
    ("workers.count", 3, "does not divide"),
    ("workers.min_count", 2, "above count"),
    ("workers", {"count": 4, "min_count": 2}, "does not divide by 3 workers"),
    ("workers.environment", {"AWS_SECRET_ACCESS_KEY": "x"}, "never in a spec"),
    ("workers.environment", {"A": 1}, "valid string"),
    ("evaluate.num_examples", 0, "greater than or equal to 1"),
]

# (text, what the message must contain)
TEXTS = [
    (b"", "the spec is empty"),
    (b"# only a comment\n", "the spec is empty"),
    (b"null\n", "not a null"),
    (b"- a\n- b\n", "not a list"),
    (b"just text\n", "not a text"),
    (b"42\n", "mapping of keys"),
    (b"\x00\x01\x02\xff\xfe", "not a text file"),
    (b"\xff\xfek\x00i\x00n\x00d\x00", "not a text file"),
    (b"kind: [robust.train\n", "not valid YAML"),
    (b"kind: robust.train\n\tname: x\n", "not valid YAML"),
    (b"kind: robust.train\nkind: pipeline\n", "written twice"),
    (b"kind: robust.train\n1: x\n", "keys are plain words"),
    (b"kind: robust.train\n? [a, b]\n: c\n", "keys are plain words"),
    (b"kind: !!python/object/apply:os.system ['true']\n", "cannot read"),
    (b"kind: *nowhere\n", "not valid YAML"),
    (b"--- {kind: a}\n--- {kind: b}\n", "not valid YAML"),
    (b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
     b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n",
     "aliases are expanded"),
    (b"a: &a\n  b: *a\n", "nested too deeply"),
    (b"[" * 100_000, "nested too deeply"),
    (b"kind: robust.train\nname: x\na: " + b"[" * 200 + b"]" * 200, "nested too deeply"),
    (b"kind: robust.train\nname: x\na: [" + b"1," * 500_000 + b"]\n", "more than 50000 values"),
    (b"kind: robust.train\nname: x\na:\n" + b"- 1\n" * 200_000, "more than 50000 values"),
    (b"kind: pipeline\nname: p\nstages: {}\n", "needs at least 1 entry and has none"),
    (b"kind: pipeline\nname: p\nstages: [a]\n", "stages"),
    (b"kind: pipeline\nname: p\nstages: {a: 3}\n", "stages.a"),
    (b"kind: pipeline\nname: p\nstages: {../a: {}}\n", "letters, digits"),
    (b"kind: pipeline\nname: p\n", "required and missing"),
]  # fmt: skip


def changed(path: str, value: object) -> str:
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    *sections, last = path.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return yaml.safe_dump(tree)


def refused(path, *arguments: str) -> str:
    """What `poise check` prints for a spec that it must refuse."""
    outcome = CliRunner().invoke(cli, ["check", str(path), *arguments])
    assert isinstance(outcome.exception, UserError), outcome.output
    assert outcome.exception.exit_code == 2
    return str(outcome.exception)


def test_the_spec_that_is_changed_is_valid(write):
    load(write(yaml.safe_dump(BASE)), KINDS)


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[f"{p}={str(v)[:30]}" for p, v, _ in CHANGES])
def test_a_malformed_value_is_refused_by_name(path, value, expected, write):
    message = refused(write(changed(path, value)))
    assert expected in message
    assert path.split(".")[0] in message
    assert "spec.yaml" in message


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[repr(text[:30]) for text, _ in TEXTS])
def test_a_malformed_file_is_refused(text, expected, write):
    assert expected in refused(write(text))


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path, write):
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "cannot be read" in refused(tmp_path)
    assert "more than 1048576 bytes" in refused(write(b"a" * (1 << 21)))


def test_a_device_without_end_and_a_pipe_that_nobody_writes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("poise.spec.reader._READ_WITHIN_S", 0.3)
    assert "more than 1048576 bytes" in refused("/dev/zero")
    assert "the spec is empty" in refused("/dev/null")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "pipe.yaml: nothing was written into this pipe" in refused(tmp_path / "pipe.yaml")


def test_a_pipe_is_read_to_its_end(tmp_path):
    """As in `poise check <(command)`: the writer may pause."""
    reading, writing = os.pipe()
    text = yaml.safe_dump(BASE).encode()

    def write_slowly() -> None:
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            pipe.write(text[:20])
            time.sleep(0.2)
            pipe.write(text[20:])

    writer = threading.Thread(target=write_slowly)
    writer.start()
    outcome = CliRunner().invoke(cli, ["check", f"/dev/fd/{reading}"])
    writer.join()
    os.close(reading)
    assert outcome.exit_code == 0, outcome.exception
    assert "name: digits" in outcome.output


def test_mistakes_reach_another_process_as_they_are(write):
    with pytest.raises(SpecError) as caught:
        load(write("kind: robust.train\nname: a/b\n"), KINDS)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.problems) == (str(caught.value), caught.value.problems)


def test_mistakes_without_number_are_counted_and_not_all_shown(write):
    text = yaml.safe_dump(BASE) + "".join(f"k{number}: 1\n" for number in range(2000))
    lines = refused(write(text)).splitlines()
    assert len(lines) == 52
    assert lines[-2:] == ["and 1950 more", "2000 mistakes; nothing was run."]


@pytest.mark.parametrize("value", ["name=a\nseed: 3", "name=a\rseed: 3", "name=a\u2028seed: 3"])
def test_an_override_of_several_lines_is_refused_whole(value, write):
    message = refused(write(yaml.safe_dump(BASE)), "--set", value)
    assert "more than one line" in message
    assert "--set name" in message


@pytest.mark.parametrize(
    "assignment",
    [
        "train.epochs",
        "=3",
        "train..epochs=3",
        "name.x=3",
        "train.epochs=[",
        "kind=x",
        "a." * 5000 + "b=1",
        "seed=0x" + "f" * 10_000,
        "name=\udcff",
        "name=\x1b[2J",
        "train={",
    ],
)
def test_a_malformed_override_is_refused(assignment, write):
    assert "--set" in refused(write(yaml.safe_dump(BASE)), "--set", assignment)


@pytest.mark.parametrize("threat", ["{linf: 8/255}", "{linf: {eps: 8/255}}", "linf"])
def test_a_ball_that_is_written_as_a_threat_of_training_is_told_once_how_it_is_written(threat, write):
    text = (
        "kind: robust.evaluate\nname: e\nmodel: {run: r}\ndata: {name: digits}\n"
        f"attacks: [{{attack: pgd, threat: {threat}}}]\n"
    )
    with pytest.raises(SpecError) as caught:
        load(write(text), KINDS)
    (problem,) = caught.value.problems
    assert problem.path == ("attacks", 0, "threat")
    assert "write `{norm: linf, eps: 8/255}`" in problem.message


def test_no_message_names_a_class_or_a_step_of_the_validator(write):
    text = (
        "kind: sweep\nname: s\nmetric: ''\nmode: max\nsearch: grid\nbase: {kind: calibrate.measure, model: m, "
        "questions: q, decoding: {stop: a}}\nspace: {samples: [2, 3], bins: {grid: []}, seed: {uniform: [1]}}\n"
    )
    with pytest.raises(SpecError) as caught:
        load(write(text), KINDS)
    told = {problem.path: problem.message for problem in caught.value.problems}
    assert told == {
        ("metric",): "must not be empty",
        ("search",): "needs a section: write `{name: grid}`, got 'grid'",
        ("base", "model"): "needs a section: write `{run: m}` or `{folder: m}`, got 'm'",
        ("base", "questions"): "needs a section, got 'q'",
        ("base", "decoding", "stop"): "needs a list, such as ['a']",
        ("space", "samples"): "needs a section: write `{grid: [2, 3]}`, got [2, 3]",
        ("space", "bins", "grid"): "needs at least 1 entry and has none",
        ("space", "seed", "uniform"): "needs at least 2 entries and has 1",
    }


def test_every_mistake_is_reported_at_once_with_its_line(write):
    text = (
        "kind: robust.train\nname: a/b\nmodle: {}\ndata: {name: digits, batch_size: no}\n"
        "train:\n  epochs: -1\n  lr: 3\n"
    )
    with pytest.raises(SpecError) as caught:
        load(write(text), KINDS)
    lines = {(problem.path, problem.line) for problem in caught.value.problems}
    assert lines >= {
        (("name",), 2), (("modle",), 3), (("data", "batch_size"), 4), (("train", "epochs"), 6), (("train", "lr"), 7),
    }  # fmt: skip
    assert {problem.path for problem in caught.value.problems} >= {("model",), ("threats",)}


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip
PATHS = sorted(
    {path for path, _, _ in CHANGES} | {"data.limit", "data.validation", "train.log_every", "extra.deep.key"}
)


@given(st.lists(st.tuples(st.sampled_from(PATHS), LEAVES), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_mutation_is_read_or_refused_but_never_crashes(mutations):
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    for path, value in mutations:
        *sections, last = path.split(".")
        node = tree
        for section in sections:
            node = node[section] if isinstance(node.get(section), dict) else node.setdefault(section + "_", {})
        node[last] = value
    check_text(yaml.safe_dump(tree, allow_unicode=True).encode())


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused(data):
    check_text(data)


@given(st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_any_damaged_text_is_read_or_refused(rng: random.Random):
    text = bytearray(yaml.safe_dump(BASE).encode())
    for _ in range(rng.randint(1, 5)):
        text[rng.randrange(len(text))] = rng.randrange(256)
    check_text(bytes(text))


def check_text(data: bytes) -> None:
    runner = CliRunner()
    with runner.isolated_filesystem():
        with open("spec.yaml", "wb") as file:
            file.write(data)
        outcome = runner.invoke(cli, ["check", "spec.yaml"])
    assert outcome.exception is None or isinstance(outcome.exception, UserError), outcome.exc_info
