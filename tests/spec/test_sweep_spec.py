"""What a sweep tries, exactly, and how a mistake in it is told."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
import yaml

from poise.kinds import KINDS
from poise.spec import ExactNumber, SpecError, dump, load

SWEEP = """\
kind: sweep
name: eps
seed: 3
workers: {count: 2}
base:
  kind: robust.train
  model: {name: cnn, width: 4}
  data: {name: digits, batch_size: 64}
  threats:
    linf: {eps: 8/255}
    l2: {eps: 0.5}
  objective: {name: avg}
  train:
    epochs: 1
space:
  threats.linf.eps:
    grid: [8/255, 0.05, 1e-1]
  train.epochs: {grid: [1, 2]}
metric: robust/union
mode: max
"""


@pytest.fixture
def sweep(write):
    def make(space: str | None = None, **changes: object):
        tree = yaml.safe_load(SWEEP) | changes
        if space is not None:
            tree["space"] = yaml.safe_load(space)
        return load(write(yaml.safe_dump(tree, sort_keys=False)), KINDS)

    return make


def drawn(sweep, axis: str, samples: int = 400, path: str = "threats.l2.eps"):
    spec = sweep(f"{path}: {axis}", search={"name": "random", "samples": samples})
    return [trial.values for trial in spec.trials()]


def test_a_grid_is_every_combination_in_order_with_values_as_written(sweep):
    trials = sweep().trials()
    assert [tuple(trial.values.values()) for trial in trials] == [
        ("8/255", 1), ("8/255", 2), (0.05, 1), (0.05, 2), ("1e-1", 1), ("1e-1", 2),
    ]  # fmt: skip
    assert [trial.spec.name for trial in trials] == [f"eps-000{index}" for index in range(6)]
    assert trials[1].spec.threats["linf"].eps.exact == Fraction(8, 255)
    assert (trials[1].spec.train.epochs, trials[1].spec.seed, trials[1].spec.workers.count) == (2, 3, 2)
    assert yaml.safe_load(dump(trials[0].spec))["threats"]["linf"]["eps"] == "8/255"


def test_the_resolved_sweep_reads_back_with_the_same_trials(sweep, write):
    spec = sweep("train.optimizer.lr: {log_uniform: [1e-3, 1]}", search={"name": "random", "samples": 5})
    again = load(write(dump(spec), "again.yaml"), KINDS)
    assert again == spec
    assert [dump(trial.spec) for trial in again.trials()] == [dump(trial.spec) for trial in spec.trials()]


def test_draws_hang_on_seed_path_and_number_alone(sweep):
    axis = "{uniform: [0.1, 0.9]}"
    few, many = drawn(sweep, axis, 5), drawn(sweep, axis, 50)
    assert many[:5] == few
    both = "threats.l2.eps: {uniform: [0.1, 0.9]}\ntrain.epochs: {grid: [1, 2]}"
    crossed = sweep(both, search={"name": "random", "samples": 5}).trials()
    assert [trial.values["threats.l2.eps"] for trial in crossed] == [v["threats.l2.eps"] for v in few for _ in "ab"]
    assert sweep(both, search={"name": "random", "samples": 5}, seed=4).trials()[0].values != crossed[0].values


def test_draws_have_their_distributions(sweep):
    """Means within five standard errors of the exact ones."""
    n = 2000
    uniform = [v["threats.l2.eps"] for v in drawn(sweep, "{uniform: [1, 3]}", n)]
    assert math.fsum(uniform) / n == pytest.approx(2, abs=5 * math.sqrt(4 / 12 / n))
    assert 1 <= min(uniform) < 1.02
    assert 2.98 < max(uniform) <= 3
    logs = [math.log10(v["threats.l2.eps"]) for v in drawn(sweep, "{log_uniform: [0.0001, 1]}", n)]
    assert math.fsum(logs) / n == pytest.approx(-2, abs=5 * math.sqrt(16 / 12 / n))
    choices = Counter(v["threats.l2.eps"] for v in drawn(sweep, "{choice: [1/2, 1, 2, 4]}", n))
    assert set(choices) == {"1/2", 1, 2, 4}
    assert all(abs(count - n / 4) < 5 * math.sqrt(n * 3 / 16) for count in choices.values())


@pytest.mark.parametrize("concentration", [0.5, 1, 6])
def test_a_drawn_simplex_is_dirichlet_and_sums_to_one_exactly(concentration, sweep):
    """Mean 1/k and variance (k - 1) / (k^2 (k c + 1)) of each share."""
    n = 1500
    draws = drawn(sweep, f"{{simplex: {{over: [linf, l2], concentration: {concentration}}}}}", n, "objective.weights")
    shares = [[ExactNumber(value).exact for value in values.values()] for values in draws]
    assert {sum(share) for share in shares} == {Fraction(1)}
    first, variance = [float(share[0]) for share in shares], 1 / (4 * (2 * concentration + 1))
    assert math.fsum(first) / n == pytest.approx(1 / 2, abs=5 * math.sqrt(variance / n))
    assert math.fsum((x - 0.5) ** 2 for x in first) / n == pytest.approx(variance, rel=0.12)


def test_a_listed_simplex_has_every_point(sweep):
    trials = sweep("objective.weights: {simplex: {over: [linf, l2], resolution: 4}}").trials()
    assert [trial.values["objective.weights.linf"] for trial in trials] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert all(sum(weight.exact for weight in trial.spec.objective.weights.values()) == 1 for trial in trials)


def test_a_path_into_a_section_that_the_base_leaves_to_its_default(sweep):
    (trial,) = sweep("train.optimizer.momentum: {grid: [0.5]}").trials()
    assert (trial.spec.train.optimizer.name, trial.spec.train.optimizer.momentum) == ("sgd", 0.5)


# (space, path of the mistake, what the message must contain)
MISTAKES = [
    ("threats.linf.epz: {grid: [1]}", ("space", "threats.linf.epz", "grid", 0), "did you mean 'eps'"),
    ("thraets.linf: {grid: [1]}", ("space", "thraets.linf", "grid", 0), "did you mean 'threats'"),
    ("train.epochs: {grid: [1, 2, 0]}", ("space", "train.epochs", "grid", 2), "greater than or equal to 1"),
    ("train.epochs: {grid: [1.5]}", ("space", "train.epochs", "grid", 0), "integer"),
    ("train.epochs: {uniform: [1, 4]}", ("search",), "is drawn"),
    ("threats.linf.eps: {grid: [1/0]}", ("space", "threats.linf.eps", "grid", 0), "divides by zero"),
    ("data.batch_size: {grid: [64, 65]}", ("space", "data.batch_size", "grid", 1), "does not divide by 2 workers"),
    ("objective: {grid: [{name: at}]}", ("space",), "threats: objective `at` trains on exactly one"),
    ("objective.name: {grid: [max]}", ("space",), "vary that"),
    ("seed.x: {grid: [1]}", ("space", "seed.x", "grid", 0), "integer"),
    ("threats.linf.eps: {grid: []}", ("space", "threats.linf.eps", "grid"), "at least 1"),
    ("threats.linf.eps: {grid: [1, 1]}", ("space", "threats.linf.eps", "grid"), "1 stands twice"),
    ("threats.linf.eps: {gird: [1]}", ("space", "threats.linf.eps", "gird"), "did you mean 'grid'"),
    ("threats.linf.eps: {}", ("space", "threats.linf.eps"), "needs exactly one of grid"),
    ("threats.linf.eps: {uniform: [2, 1]}", ("space", "threats.linf.eps"), "from low up to high"),
    ("threats.linf: {grid: [{eps: 1}]}\nthreats.linf.eps: {grid: [1]}", ("space",), "given values twice"),
    ("objective.weights: {simplex: {over: [linf, l2], resolution: 2000}}",
     ("space", "objective.weights", "simplex", "resolution"), "less than or equal"),
    ("objective.weights: {simplex: {over: [linf, l1], resolution: 2}}", ("space",), "name the same norms"),
]  # fmt: skip


# (space, axis and place of the second spelling, what the message must contain)
SPELLINGS = [
    ("threats.linf.eps: {grid: [1/10, '0.1']}", ("threats.linf.eps", "grid", 1), "'0.1' means the same as '1/10'"),
    ("threats.linf.eps: {grid: [0.2, 1e-1, 10/100, 0.1]}", ("threats.linf.eps", "grid", 2), "'10/100' means the same"),
    ("threats.linf.eps: {grid: ['0.1', 0.1]}", ("threats.linf.eps", "grid", 1), "0.1 means the same as '0.1'"),
    ("objective: {grid: [{name: avg}, {name: max}, {name: avg, mode: joint}]}", ("objective", "grid", 2), "one trial"),
    ("train.optimizer: {grid: [{name: sgd, lr: 1/10}, {name: sgd, momentum: 0.90, lr: 0.1}]}",
     ("train.optimizer", "grid", 1), "means the same"),
    ("threats.linf.eps: {choice: [1/10, '0.1']}\nthreats.l2.eps: {uniform: [0.1, 1]}",
     ("threats.linf.eps", "choice", 1), "means the same"),
]  # fmt: skip


@pytest.mark.parametrize(("space", "place", "message"), SPELLINGS)
def test_two_spellings_of_one_value_are_one_trial_too_many(space, place, message, sweep):
    changes = {"search": {"name": "random", "samples": 3}} if "choice" in space else {}
    with pytest.raises(SpecError) as caught:
        sweep(space, **changes)
    first = caught.value.problems[0]
    assert (first.path, message in first.message) == (("space", *place), True), str(caught.value)
    assert first.line > 0


def test_values_that_differ_little_are_two_trials(sweep):
    assert len(sweep("threats.linf.eps: {grid: [0.1, 0.10000001, 1/11]}").trials()) == 3


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"metric": "robust/unoin"}, "metric", "measures no 'robust/unoin'; did you mean 'robust/union'?"),
        ({"metric": "accuracy.bset.clean"}, "metric", "did you mean 'accuracy.best.clean'?"),
        ({"metric": "robust/l1"}, "metric", "measures no 'robust/l1'"),
        ({"metric": "validation.best.clean"}, "metric", "is measured only with `evaluate.validation: true` in base"),
        ({"metric": "kind"}, "metric", "measures no 'kind'"),
        (
            {"scheduler": {"name": "asha"}, "metric": "accuracy.best.clean"},
            "scheduler",
            "known at their end only: judge",
        ),
        ({"scheduler": {"name": "asha"}, "metric": "loss"}, "scheduler", "or write `scheduler: {name: none}`"),
        ({"scheduler": {"name": "asha", "grace": {"epochs": 2}}}, "scheduler.grace", "none is stopped"),
    ],
)
def test_what_trials_cannot_be_judged_by_is_refused_before_any_runs(changes, path, message, sweep):
    with pytest.raises(SpecError) as caught:
        sweep("train.epochs: {grid: [1, 2]}", **changes)
    (problem,) = caught.value.problems
    assert (".".join(map(str, problem.path)), message in problem.message) == (path, True), str(caught.value)


def test_a_metric_that_only_some_trials_measure_is_refused_with_the_values_of_the_first_that_does_not(sweep):
    axis = "threats: {grid: [{linf: {eps: 0.1}}, {l2: {eps: 1}}]}"
    with pytest.raises(SpecError, match=r"with threats = .*'l2'.* measures no 'robust/linf'"):
        sweep(axis, metric="robust/linf")


def test_a_scheduler_whose_trials_are_evaluated_once_is_refused(sweep):
    base = yaml.safe_load(SWEEP)["base"]
    base["train"] = {"epochs": 4, "evaluate_every": {"epochs": 4}}
    with pytest.raises(SpecError, match="evaluated a second time"):
        sweep("threats.linf.eps: {grid: [0.1, 0.2]}", base=base, scheduler={"name": "asha"})


def test_a_kind_that_leaves_no_number_cannot_be_swept(write):
    base = {"kind": "bounds.report", "runs": ["a"]}
    tree = {"kind": "sweep", "name": "s", "metric": "examples", "mode": "max", "base": base}
    with pytest.raises(SpecError, match=r"a bounds\.report leaves no number"):
        load(write(yaml.safe_dump({**tree, "space": {"num_examples": {"grid": [2, 3]}}})), KINDS)


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        ("train.epochs: {grid: [1, 2]}", {}, "on the validation split under the attacks of training"),
        ("threats.linf.eps: {grid: [0.1, 0.2]}", {}, "which differ from trial to trial: no common measure"),
        ("train.epochs: {grid: [1, 2]}", {"metric": "accuracy.best.clean"}, "the best is chosen by the test"),
        ("train.epochs: {grid: [1, 2]}", {"metric": "loss"}, "train split: it favours overfitting; use one of the va"),
    ],
)
def test_by_what_trials_are_judged_is_said_with_the_cost(space, changes, message, sweep):
    assert message in sweep(space, **changes).cost()[1]


@pytest.mark.parametrize(("space", "path", "message"), MISTAKES)
def test_a_mistake_is_told_at_the_value_that_makes_it(space, path, message, sweep):
    with pytest.raises(SpecError) as caught:
        sweep(space)
    first = caught.value.problems[0]
    assert (first.path, message in first.message) == (path, True), str(caught.value)
    assert first.line > 0


@pytest.mark.parametrize(
    ("path", "axis", "message"),
    [
        ("threats.l2.eps", "{uniform: [-1, 2]}", "greater than or equal to 0"),
        ("train.epochs", "{uniform: [1, 4]}", "valid integer"),
        ("train.optimizer.momentum", "{uniform: [0, 1]}", "less than 1"),
    ],
)
def test_the_ends_of_a_range_are_checked(path, axis, message, sweep):
    with pytest.raises(SpecError, match=message) as caught:
        drawn(sweep, axis, 3, path)
    assert {problem.path for problem in caught.value.problems} == {("space", path, "uniform")}


def test_every_mistake_is_told_at_once_with_its_line(write):
    text = SWEEP.replace("[8/255, 0.05, 1e-1]", "[8/255, -1, eight]").replace("[1, 2]", "[0]")
    with pytest.raises(SpecError) as caught:
        load(write(text), KINDS)
    places = [(problem.line, problem.path[1:]) for problem in caught.value.problems]
    assert places == [
        (17, ("threats.linf.eps", "grid", 1)),
        (17, ("threats.linf.eps", "grid", 2)),
        (18, ("train.epochs", "grid", 0)),
    ]


def test_a_mistake_in_the_base_is_told_at_its_line(write):
    with pytest.raises(SpecError) as caught:
        load(write(SWEEP.replace("epochs: 1\n", "epoks: 1\n")), KINDS)
    assert [(p.line, p.path) for p in caught.value.problems if "epochs" in p.message] == [
        (14, ("base", "train", "epoks"))
    ]


@pytest.mark.parametrize("changes", [{"base": {"kind": "sweep"}}, {"base": {"kind": "pipeline"}}, {"base": 3}])
def test_a_sweep_of_sweeps_is_refused(changes, sweep):
    with pytest.raises(SpecError, match="base"):
        sweep(**changes)


def test_a_search_that_draws_nothing_is_refused(sweep):
    with pytest.raises(SpecError, match="nothing is drawn"):
        sweep(search={"name": "random", "samples": 3})


def test_a_sweep_is_a_stage_of_a_pipeline(write):
    stage = {key: value for key, value in yaml.safe_load(SWEEP).items() if key not in ("name", "seed")}
    pipeline = {"kind": "pipeline", "name": "p", "seed": 8, "store": "s3://b/runs", "stages": {"all": stage}}
    spec = load(write(yaml.safe_dump(pipeline)), KINDS).stages["all"]
    trial = spec.trials()[5].spec
    assert (spec.name, trial.name, trial.seed, trial.store) == ("p-all", "p-all-0005", 8, "s3://b/runs")


def test_the_cost_names_trials_and_the_first(sweep):
    cost = sweep(concurrent=4).cost()
    assert cost[0] == "6 trials, 4 at a time"
    assert cost[1].startswith("judged by the best value of robust/union on the validation split under the attacks")
    assert cost[2].startswith("the first: gradients per batch of 64: 20 for attacks")
