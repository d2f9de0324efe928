"""`kind: sweep`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from poise.kinds.jobs import Job
from poise.kinds.sweep.space import Axis, Values, contains
from poise.spec import ExactNumber, Input, MetricSource, RunSpec, SpecError, SpecModel, field_error, find_source, parse
from poise.spec.merge import merge
from poise.spec.problems import Path, Problem, dotted, nearest
from poise.spec.reader import Document
from poise.train.spec import Interval, TrainSpec

__all__ = ["AshaSpec", "GridSearch", "NoScheduler", "RandomSearch", "SweepSpec", "Trial"]

_MOST_TRIALS = 10_000


class GridSearch(SpecModel):
    """Every combination of the listed values, once."""

    name: Literal["grid"] = Field("grid", description="every combination of the listed values")


class RandomSearch(SpecModel):
    """Random samples, each crossed with every combination of the listed values."""

    name: Literal["random"] = Field(
        "random", description="random samples, crossed with every combination of the listed values"
    )
    samples: int = Field(
        ge=1, le=_MOST_TRIALS, description="number of samples; raising it leaves the earlier samples unchanged"
    )


class NoScheduler(SpecModel):
    """Every trial runs to its end."""

    name: Literal["none"] = Field("none", description="every trial runs to its end")


class AshaSpec(SpecModel):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934): trials that fall behind are stopped early.

    Rungs are at grace, grace * reduction, grace * reduction^2, ...; a trial goes on past a rung if its metric there is
    among the best 1 / reduction of the trials that have reached it.
    """

    name: Literal["asha"] = Field("asha", description="stop trials that are behind the others")
    grace: Interval = Field(Interval(epochs=1), description="length that every trial may run at least")
    reduction: Annotated[ExactNumber, Field(gt=1, le=100)] = Field(
        ExactNumber(4), description="one trial in this many passes a rung"
    )


@dataclass(frozen=True)
class Trial:
    """One trial: its number from 0, the value at every path of the space as it was written, and its spec."""

    index: int
    values: Values
    spec: RunSpec


class SweepSpec(RunSpec):
    """One run varied: each trial is a run of its own, `NAME-0007`, of the base spec with some of its values changed."""

    shares_batches: ClassVar[bool] = False

    kind: Literal["sweep"]
    base: Annotated[Job, Field(discriminator="kind")] = Field(
        description="the spec that is varied, of any other kind; name, seed, store and workers are the sweep's"
    )
    space: dict[str, Axis] = Field(
        min_length=1, max_length=20, description="by dotted path in base, the values that are tried there"
    )
    search: Annotated[GridSearch | RandomSearch, Field(discriminator="name")] = Field(
        GridSearch(), description="which combinations are tried"
    )
    scheduler: Annotated[NoScheduler | AshaSpec, Field(discriminator="name")] = Field(
        NoScheduler(), description="which trials are stopped early"
    )
    metric: str = Field(
        min_length=1,
        max_length=200,
        description="metric that trials are compared by: the best value that a metric such as robust/union reaches on "
        "held-out examples, or a number of the summary such as accuracy.best.clean",
    )
    mode: Literal["max", "min"] = Field(description="whether higher or lower values of the metric are better")
    concurrent: int = Field(1, ge=1, le=_MOST_TRIALS, description="trials that run at the same time")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """Add name, seed, store and workers of the sweep to the base, where the base does not set them itself."""
        if not isinstance(tree.get("base"), dict):
            return tree, {}
        inherited: dict[str, Any] = {key: tree[key] for key in ("name", "seed", "store", "workers") if key in tree}
        return {**tree, "base": merge(inherited, tree["base"])}, {}

    @model_validator(mode="after")
    def _base_in_place(self) -> SweepSpec:
        for key in ("name", "store"):
            if getattr(self.base, key) != getattr(self, key):
                raise field_error(
                    f"base.{key}", f"trials use the {key} of the sweep: remove {key} here, or set the sweep's"
                )
        return self

    @model_validator(mode="after")
    def _searchable(self) -> SweepSpec:
        sampled = [path for path, axis in self.space.items() if not axis.listed(path)]
        if sampled and self.search.name == "grid":
            raise field_error(
                "search", f"{sampled[0]} is drawn: write `search: {{name: random, samples: 20}}`, or a grid"
            )
        if not sampled and self.search.name == "random":
            raise field_error(
                "search", "nothing is drawn and samples would repeat each other: write `search: {name: grid}`"
            )
        if self.num_trials > _MOST_TRIALS:
            raise field_error("space", f"{self.num_trials:,} trials; the limit is {_MOST_TRIALS:,}")
        paths = self._paths()
        for path in paths:
            if path.rpartition(".")[2] in ("kind", "name", "store"):
                raise field_error(
                    "space", f"{path} names the whole section: vary that, as in {{grid: [{{name: a}}, ...]}}"
                )
            if sum(contains(path, other) for other in paths) > 1:
                raise field_error("space", f"{path} is given values twice")
        return self

    @model_validator(mode="after")
    def _accepted(self) -> SweepSpec:
        """Check that every trial, and the ends of every range, make a valid spec.

        A mistake is reported at the place in the space where the value is written.
        """
        specs: list[tuple[Values, RunSpec]] = []
        mistakes: dict[tuple[Path, str], None] = {}  # an ordered set
        for values in self._values_to_check():
            try:
                specs.append((values, self._spec(values, self.name)))
            except SpecError as error:
                mistakes |= dict.fromkeys(self._locate(problem, values) for problem in error.problems)
        _raise_all(mistakes)
        _raise_all(self._equal_values())
        self._check_metric(specs)
        if isinstance(self.scheduler, AshaSpec):
            self._check_asha(self.scheduler, [spec for _, spec in specs])
        return self

    def _equal_values(self) -> list[tuple[Path, str]]:
        """Mistakes: values of one path that are written in two ways and mean the same, such as 1/10 and 0.1."""
        first = next(self._settings())
        mistakes: list[tuple[Path, str]] = []
        for name, axis in self.space.items():
            seen: dict[str, Any] = {}
            for index, value in enumerate(axis.grid or axis.choice or ()):
                try:
                    meaning = repr(_normalize(self._spec({**first, name: value}, self.name)))
                except SpecError:
                    continue  # a choice that no sample combines with these values of the other paths
                if meaning in seen:
                    other = seen[meaning]
                    message = f"{_quote(value)} means the same as {_quote(other)}: one trial would run twice"
                    mistakes.append((("space", name, axis.key, index), message))
                seen.setdefault(meaning, value)
        return mistakes

    def _check_metric(self, specs: Sequence[tuple[Values, RunSpec]]) -> None:
        """Refuse a metric that some trial does not measure."""
        for values, spec in specs:
            metrics = spec.metrics()
            source = find_source(self.metric, metrics)
            if not metrics:
                raise field_error("metric", f"a {spec.kind} leaves no number that trials could be judged by")
            if source is None:
                where = "" if values is specs[0][0] else f" with {_describe(values)}"
                raise field_error(
                    "metric", f"a {spec.kind}{where} measures no {self.metric!r}; {nearest(self.metric, metrics)}"
                )
            if source.needs:
                raise field_error("metric", f"{self.metric} is measured only with `{source.needs}` in base")

    def _check_asha(self, asha: AshaSpec, specs: Sequence[RunSpec]) -> None:
        """Refuse a schedule under which no trial is compared before its end."""
        if not self.source.during:
            during = sorted(name for name, source in specs[0].metrics().items() if source.during)
            hint = f"judge by {' or '.join(during)}, or " if during else ""
            raise field_error(
                "scheduler",
                f"asha compares trials while they run, and {self.metric} is known at their end only: {hint}write "
                "`scheduler: {name: none}`",
            )
        trains: list[TrainSpec] = [getattr(spec, "train") for spec in specs]  # noqa: B009 - of any kind that trains
        for unit in ("epochs", "steps"):
            ends = [getattr(train, unit) for train in trains]
            if None in ends:
                continue
            grace = getattr(asha.grace, unit)
            if grace is not None and grace >= max(ends):
                raise field_error(
                    "scheduler.grace", f"{grace} {unit}, and all trials have ended by then: none is stopped"
                )
            intervals = [getattr(train.evaluate_every, unit) for train in trains]
            if all(every is not None and every >= end for every, end in zip(intervals, ends, strict=True)):
                raise field_error(
                    "scheduler", f"trials end before they are evaluated a second time (train.evaluate_every, {unit})"
                )

    @property
    def num_trials(self) -> int:
        """The number of trials."""
        cells = 1
        for path, axis in self.space.items():
            cells *= len(axis.listed(path)) or 1
        return cells * (self.search.samples if isinstance(self.search, RandomSearch) else 1)

    def trials(self) -> list[Trial]:
        """Every trial in order: a pure function of the spec. The last axis of the space changes fastest."""
        return [
            Trial(index, values, self._spec(values, f"{self.name}-{index:04d}"))
            for index, values in enumerate(self._settings())
        ]

    def inputs(self) -> Iterator[Input]:
        """The inputs of all trials, each once; the space may vary them."""
        inputs = (named.below("base") for trial in self.trials() for named in trial.spec.inputs())
        yield from dict.fromkeys(inputs)

    @property
    def source(self) -> MetricSource:
        """The source of the metric: its split, and whether it is known during a trial."""
        spec = self._spec(next(self._settings()), self.name)
        return find_source(self.metric, spec.metrics()) or MetricSource("train", None)

    def judged_by(self) -> str:
        """What trials are compared by, as text."""
        source = self.source
        attacks = ""
        if source.attacks:
            attacks = f" under the attacks of {'training' if source.attacks == 'training' else 'the evaluation'}"
        best = "the best value of " if source.during else ""
        words = f"{best}{self.metric} on the {source.examples} split{attacks}"
        if source.examples == "test":
            return f"{words}: the best is chosen by the test, and its result there is too good"
        if source.examples == "train":
            return f"{words}: it favours overfitting; {self._suggest_validation()}"
        if source.attacks == "training" and any(contains("threats", path) for path in self._paths()):
            return f"{words}, which differ from trial to trial: no common measure"
        return words

    def _suggest_validation(self) -> str:
        """Which metric to use instead of one on training examples."""
        metrics = self._spec(next(self._settings()), self.name).metrics()
        names = [name for name, source in metrics.items() if source.examples == "validation" and not source.needs]
        example = next((name for name in names if "*" not in name), None)
        return f"use one of the validation split, such as {example}" if example else "hold out a validation split"

    def cost(self) -> list[str]:
        """The number of trials, what they are compared by, and the cost of the first of them."""
        count = f"{self.num_trials:,} trials, {min(self.concurrent, self.num_trials)} at a time"
        first = self.trials()[0].spec.cost()
        return [count, f"judged by {self.judged_by()}", *(f"the first: {line}" for line in first)]

    def _paths(self) -> list[str]:
        """Every path of the base that the space sets."""
        return [path for name, axis in self.space.items() for path in axis.paths(name)]

    def _settings(self) -> Iterator[Values]:
        """The values of every trial: each sample with every cell of the grid, so that cells share the same samples."""
        samples = self.search.samples if isinstance(self.search, RandomSearch) else 1
        axes = self.space.items()
        for sample in range(samples):
            choices = [axis.listed(path) or [axis.sampled(path, self.seed, sample)] for path, axis in axes]
            for cell in product(*choices):
                values: Values = {}
                for setting in cell:
                    values |= setting
                yield values

    def _values_to_check(self) -> Iterator[Values]:
        """The values of every trial; then each end of each range, with the other values of the first trial."""
        first: Values | None = None
        for values in self._settings():
            first = first or values
            yield values
        for path, axis in self.space.items():
            for end in axis.ends():
                yield {**(first or {}), path: end}

    def _spec(self, values: Values, name: str) -> RunSpec:
        """The base under `values`. SpecError when that is no valid spec."""
        tree = self._tree(values, name)
        return parse(Document("space", tree), {tree["kind"]: type(self.base)})

    def _locate(self, problem: Problem, values: Values) -> tuple[Path, str]:
        """Path and message of a mistake: at the value that causes it; if several values do, at the space, with them."""
        where = dotted(problem.path)
        for name, axis in self.space.items():
            for path in axis.paths(name):
                if contains(path, where) or contains(where, path):
                    inner = "" if contains(where, path) else f"{where}: "
                    return ("space", name, *axis.place(values[path])), inner + problem.message
        return ("space",), f"with {_describe(values)}: {where}: {problem.message}"

    def _tree(self, values: Values, name: str) -> dict[str, Any]:
        """The base as it was written, with `values` set."""
        tree = self.base.model_dump(mode="json", exclude_unset=True)
        with_defaults = self.base.model_dump(mode="json")
        for path, value in values.items():
            _set_value(tree, with_defaults, path.split("."), value)
        return {**tree, "name": name, "store": self.store}


def _raise_all(mistakes: Iterable[tuple[Path, str]]) -> None:
    """Raise a ValidationError with all mistakes, each at its path; do nothing where there is none."""
    details = [
        InitErrorDetails(type=PydanticCustomError("space", "{m}", {"m": message}), loc=path, input={})
        for path, message in mistakes
    ]
    if details:
        raise ValidationError.from_exception_data("sweep", details)


def _describe(values: Values) -> str:
    return ", ".join(f"{path} = {value}" for path, value in values.items())


def _quote(value: Any) -> str:
    """A value as it was written; texts are quoted, because some look like numbers."""
    return repr(value) if isinstance(value, str) else str(value)


def _normalize(value: Any) -> Any:
    """A spec as plain values: two specs that mean the same, such as with 1/10 and 0.1, are equal."""
    if isinstance(value, BaseModel):
        # A method of the user's code that is not allowed to run keeps its options as extra values.
        names = [*type(value).model_fields, *(value.model_extra or {})]
        return type(value), [(name, _normalize(getattr(value, name))) for name in names]
    if isinstance(value, dict):
        return {key: _normalize(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normalize(inner) for inner in value]
    return float(value) if isinstance(value, ExactNumber) else value


def _set_value(tree: dict[str, Any], with_defaults: Any, keys: list[str], value: Any) -> None:
    """Set the value at `keys` in `tree`. A section that `tree` does not have begins with the name of its default."""
    for key in keys[:-1]:
        with_defaults = with_defaults.get(key) if isinstance(with_defaults, dict) else None
        has_name = isinstance(with_defaults, dict) and "name" in with_defaults
        default = {"name": with_defaults["name"]} if has_name else {}
        inner = tree.get(key)
        tree[key] = inner if isinstance(inner, dict) else default
        tree = tree[key]
    tree[keys[-1]] = deepcopy(value)
