"""`kind: sweep`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from poise.kinds.specs.space import Axis, Values, contains
from poise.kinds.specs.stage import Job
from poise.spec import Input, MetricSource, Real, RunSpec, Section, SpecError, find_source, mistake, parse
from poise.spec.problems import Path, Problem, dotted, nearest
from poise.spec.reader import Document
from poise.train.spec import Every, TrainSpec

__all__ = ["AshaSpec", "GridSearch", "NoScheduler", "RandomSearch", "SweepSpec", "Trial"]

_MOST_TRIALS = 10_000


class GridSearch(Section):
    """Every combination of the listed values, once."""

    name: Literal["grid"] = Field("grid", description="every combination of the listed values")


class RandomSearch(Section):
    """Draws, each crossed with every combination of the listed values."""

    name: Literal["random"] = Field("random", description="draws, crossed with every combination of what is listed")
    samples: int = Field(ge=1, le=_MOST_TRIALS, description="draws; more of them leave the earlier ones as they are")


class NoScheduler(Section):
    """Every trial runs to its end."""

    name: Literal["none"] = Field("none", description="every trial runs to its end")


class AshaSpec(Section):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934): trials that fall behind are stopped early.

    Rungs are at grace, grace * reduction, grace * reduction^2, ...; a trial goes on past a rung if its metric there is
    among the best 1 / reduction of the trials that have reached it.
    """

    name: Literal["asha"] = Field("asha", description="stop trials that fall behind the others")
    grace: Every = Field(Every(epochs=1), description="how far every trial may go")
    reduction: Annotated[Real, Field(gt=1, le=100)] = Field(Real(4), description="one trial in this many passes a rung")


@dataclass(frozen=True)
class Trial:
    """One trial: its number from 0, the value at every swept path as it was written, and its spec."""

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
        description="what trials are judged by: the best value that a metric such as robust/union reaches on held-out "
        "examples, or a number of the summary such as accuracy.best.clean",
    )
    mode: Literal["max", "min"] = Field(description="whether the metric is to rise or to fall")
    concurrent: int = Field(1, ge=1, le=_MOST_TRIALS, description="trials that run at the same time")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """Give the base what it does not say itself: name, seed, store and workers of the sweep."""
        if not isinstance(tree.get("base"), dict):
            return tree, {}
        head = {key: tree[key] for key in ("name", "seed", "store", "workers") if key in tree}
        return {**tree, "base": {**head, **tree["base"]}}, {}

    @model_validator(mode="after")
    def _base_in_place(self) -> SweepSpec:
        for key in ("name", "store"):
            if getattr(self.base, key) != getattr(self, key):
                raise mistake(f"base.{key}", f"trials are kept as the sweep is; leave {key} out, or set the sweep's")
        return self

    @model_validator(mode="after")
    def _searchable(self) -> SweepSpec:
        drawn = [path for path, axis in self.space.items() if not axis.listed(path)]
        if drawn and self.search.name == "grid":
            raise mistake("search", f"{drawn[0]} is drawn: write `search: {{name: random, samples: 20}}`, or a grid")
        if not drawn and self.search.name == "random":
            raise mistake(
                "search", "nothing is drawn and samples would repeat each other: write `search: {name: grid}`"
            )
        if self.num_trials > _MOST_TRIALS:
            raise mistake("space", f"{self.num_trials:,} trials; the limit is {_MOST_TRIALS:,}")
        every = self._paths()
        for path in every:
            if path.rpartition(".")[2] in ("kind", "name", "store"):
                raise mistake("space", f"{path} names the whole section: vary that, as in {{grid: [{{name: a}}, ...]}}")
            if sum(contains(path, other) for other in every) > 1:
                raise mistake("space", f"{path} is given values twice")
        return self

    @model_validator(mode="after")
    def _accepted(self) -> SweepSpec:
        """Every trial, and the ends of every range, make a valid spec; what does not is told where it was written."""
        specs, found = list[tuple[Values, RunSpec]](), dict[tuple[Path, str], None]()
        for values in self._probes():
            try:
                specs.append((values, self._spec(values, self.name)))
            except SpecError as error:
                found |= dict.fromkeys(self._placed(problem, values) for problem in error.problems)
        _refuse(found)
        _refuse(self._spellings())
        self._check_metric(specs)
        if isinstance(self.scheduler, AshaSpec):
            self._check_asha(self.scheduler, [spec for _, spec in specs])
        return self

    def _spellings(self) -> list[tuple[Path, str]]:
        """Values of one path that are written in two ways and mean the same, such as 1/10 and 0.1."""
        first, found = next(self._variants()), list[tuple[Path, str]]()
        for name, axis in self.space.items():
            seen: dict[str, Any] = {}
            for index, value in enumerate(axis.grid or axis.choice or ()):
                try:
                    meaning = repr(_meaning(self._spec({**first, name: value}, self.name)))
                except SpecError:
                    continue  # a choice that no draw has met with these other values
                if meaning in seen:
                    message = (
                        f"{_written(value)} means the same as {_written(seen[meaning])}: one trial would run twice"
                    )
                    found.append((("space", name, axis.key, index), message))
                seen.setdefault(meaning, value)
        return found

    def _check_metric(self, specs: Sequence[tuple[Values, RunSpec]]) -> None:
        """Every trial measures the metric."""
        for values, spec in specs:
            known = spec.metrics()
            source = find_source(self.metric, known)
            if not known:
                raise mistake("metric", f"a {spec.kind} leaves no number that trials could be judged by")
            if source is None:
                where = "" if values is specs[0][0] else f" with {_shown(values)}"
                raise mistake(
                    "metric", f"a {spec.kind}{where} measures no {self.metric!r}; {nearest(self.metric, known)}"
                )
            if source.needs:
                raise mistake("metric", f"{self.metric} is measured only with `{source.needs}` in base")

    def _check_asha(self, asha: AshaSpec, specs: Sequence[RunSpec]) -> None:
        """There is something to compare before trials end."""
        if not self.source.during:
            known = specs[0].metrics()
            compared = sorted(name for name, source in known.items() if source.during)
            hint = f"judge by {' or '.join(compared)}, or " if compared else ""
            raise mistake(
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
                raise mistake("scheduler.grace", f"{grace} {unit}, and all trials have ended by then: none is stopped")
            intervals = [getattr(train.evaluate_every, unit) for train in trains]
            if all(every is not None and every >= end for every, end in zip(intervals, ends, strict=True)):
                raise mistake(
                    "scheduler", f"trials end before they are evaluated a second time (train.evaluate_every, {unit})"
                )

    @property
    def num_trials(self) -> int:
        """How many trials the sweep has."""
        cells = 1
        for path, axis in self.space.items():
            cells *= len(axis.listed(path)) or 1
        return cells * (self.search.samples if isinstance(self.search, RandomSearch) else 1)

    def trials(self) -> list[Trial]:
        """Every trial in its order: a pure function of the spec. The last axis of the space changes fastest."""
        return [
            Trial(index, values, self._spec(values, f"{self.name}-{index:04d}"))
            for index, values in enumerate(self._variants())
        ]

    def inputs(self) -> Iterator[Input]:
        """What any of the trials reads: the space may vary what the base names."""
        read = (each.below("base") for trial in self.trials() for each in trial.spec.inputs())
        yield from dict.fromkeys(read)

    @property
    def source(self) -> MetricSource:
        """Where the metric comes from."""
        spec = self._spec(next(self._variants()), self.name)
        return find_source(self.metric, spec.metrics()) or MetricSource("train", None)

    def judged_by(self) -> str:
        """What trials are judged by, in words."""
        source = self.source
        attacks = f" under the attacks of {'training' if source.attacks == 'training' else 'the evaluation'}"
        best = "the best value of " if source.during else ""
        words = f"{best}{self.metric} on the {source.examples} split{attacks if source.attacks else ''}"
        if source.examples == "test":
            return f"{words}: the best is chosen by the test, and its result there is too good"
        if source.examples == "train":
            return f"{words}: it favours overfitting; {self._held_out()}"
        if source.attacks == "training" and any(contains("threats", path) for path in self._paths()):
            return f"{words}, which differ from trial to trial: no common measure"
        return words

    def _held_out(self) -> str:
        """What to judge by instead of the images or rows that are trained on."""
        known = self._spec(next(self._variants()), self.name).metrics()
        names = [name for name, source in known.items() if source.examples == "validation" and not source.needs]
        shown = next((name for name in names if "*" not in name), None)
        return f"use one of the validation split, such as {shown}" if shown else "hold out a validation split"

    def cost(self) -> list[str]:
        """The number of trials, what they are judged by, and what the first of them costs."""
        many = f"{self.num_trials:,} trials, {min(self.concurrent, self.num_trials)} at a time"
        first = self.trials()[0].spec.cost()
        return [many, f"judged by {self.judged_by()}", *(f"the first: {line}" for line in first)]

    def _paths(self) -> list[str]:
        """Every path of the base that is given values."""
        return [path for name, axis in self.space.items() for path in axis.paths(name)]

    def _variants(self) -> Iterator[Values]:
        """The samples one after the other, each with every cell of the grid: cells compare on the same draws."""
        samples = self.search.samples if isinstance(self.search, RandomSearch) else 1
        axes = self.space.items()
        for sample in range(samples):
            choices = [axis.listed(path) or [axis.sampled(path, self.seed, sample)] for path, axis in axes]
            for cell in product(*choices):
                yield {path: value for part in cell for path, value in part.items()}

    def _probes(self) -> Iterator[Values]:
        first: Values | None = None
        for values in self._variants():
            first = first or values
            yield values
        for path, axis in self.space.items():
            for end in axis.ends():
                yield {**(first or {}), path: end}

    def _spec(self, values: Values, name: str) -> RunSpec:
        """The base under `values`. SpecError when that is no valid spec."""
        return _read(self._tree(values, name), type(self.base))

    def _placed(self, problem: Problem, values: Values) -> tuple[Path, str]:
        """At the value that is at fault; a fault of several together, at the space, with the values that make it."""
        where = dotted(problem.path)
        for name, axis in self.space.items():
            for path in axis.paths(name):
                if contains(path, where) or contains(where, path):
                    inner = "" if contains(where, path) else f"{where}: "
                    return ("space", name, *axis.place(values[path])), inner + problem.message
        return ("space",), f"with {_shown(values)}: {where}: {problem.message}"

    def _tree(self, values: Values, name: str) -> dict[str, Any]:
        """The base as it was written, with `values` in it."""
        tree = self.base.model_dump(mode="json", exclude_unset=True)
        whole = self.base.model_dump(mode="json")
        for path, value in values.items():
            _put(tree, whole, path.split("."), value)
        return {**tree, "name": name, "store": self.store}


def _refuse(found: Iterable[tuple[Path, str]]) -> None:
    """Raise all mistakes at once, each at its place; nothing where there is none."""
    lines = [
        InitErrorDetails(type=PydanticCustomError("space", "{m}", {"m": message}), loc=loc, input={})
        for loc, message in found
    ]
    if lines:
        raise ValidationError.from_exception_data("sweep", lines)


def _shown(values: Values) -> str:
    return ", ".join(f"{path} = {value}" for path, value in values.items())


def _written(value: Any) -> str:
    """A value as its author sees it; a text that could be taken for a number is quoted."""
    return repr(value) if isinstance(value, str) else str(value)


def _meaning(value: Any) -> Any:
    """What a spec says, however it is written: two that mean the same are equal."""
    if isinstance(value, BaseModel):
        return type(value), [(name, _meaning(getattr(value, name))) for name in type(value).model_fields]
    if isinstance(value, dict):
        return {key: _meaning(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_meaning(inner) for inner in value]
    return float(value) if isinstance(value, Real) else value


def _read(tree: dict[str, Any], spec_class: type[RunSpec]) -> RunSpec:
    return parse(Document("space", tree), {tree["kind"]: spec_class})


def _put(tree: dict[str, Any], whole: Any, keys: list[str], value: Any) -> None:
    """Set the value at `keys`. A section that the base does not write out is the one that it has by default."""
    for key in keys[:-1]:
        whole = whole.get(key) if isinstance(whole, dict) else None
        default = {"name": whole["name"]} if isinstance(whole, dict) and "name" in whole else {}
        inner = tree.get(key)
        tree[key] = inner if isinstance(inner, dict) else default
        tree = tree[key]
    tree[keys[-1]] = deepcopy(value)
