"""The typed result of a run: the fields that all kinds share, and reading and writing of `result.json`.

Every kind has a subclass with its own fields. Reports, sweeps, pipelines and the command line read a result through
its class, so that the type checker finds every use of a renamed field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from poise.errors import IntegrityError, UserError
from poise.store.runs import Run

__all__ = [
    "RESULT",
    "ResultModel",
    "RunResult",
    "Score",
    "has_result",
    "kind_of_result",
    "parts_of",
    "read_result",
    "require_result",
    "write_result",
]

RESULT = "result.json"
"""The path of the result in its run."""


def _none_is_nan(value: Any) -> Any:
    return math.nan if value is None else value


Score = Annotated[float, BeforeValidator(_none_is_nan)]
"""A number that may be NaN, which JSON writes as null."""


class ResultModel(BaseModel):
    """Base of all parts of a result: frozen, without unknown fields. Floats that are not finite are written as null."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunResult(ResultModel):
    """The measurements of a run, written once, when it ends."""

    schema_version: Literal[1] = Field(1, description="raised when a field changes its meaning")
    kind: str = Field(description="kind of the run")
    run: str = Field(description="name of the run")
    seed: int = Field(description="seed of the run")
    warnings: list[str] = Field([], description="reasons to doubt the result, a sentence each")
    parts: list[str] = Field(
        [], description="runs of the same store that it consists of, such as the trials of a sweep"
    )

    @property
    def last_step(self) -> int | None:
        """The last optimizer step of the run; None for a run without training."""
        return None

    @property
    def selected_step(self) -> int | None:
        """The step of the best checkpoint; None if there is none."""
        return None

    def num_examples_of(self, split: str) -> int | None:
        """The number of examples of a split ("train", "validation", "test") that metrics are means over, or None."""
        return None

    def facts(self) -> Iterator[tuple[str, str]]:
        """The facts at the head of the run's page, as (name, value)."""
        yield from ()

    def number(self, path: str) -> float | None:
        """The finite number at a dotted path, such as `accuracy.best.clean`; None if there is none."""
        value: Any = self.model_dump()
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value)


Result = TypeVar("Result", bound=RunResult)
Model = TypeVar("Model", bound=BaseModel)


def write_result(run: Run, result: RunResult) -> None:
    """Write `result.json`.

    Raises:
        ValueError: a number is not finite where the class of the result does not allow it; nothing is written.
    """
    data = result.model_dump_json(indent=1).encode()
    type(result).model_validate_json(data)  # what could not be read again would be taken for damaged
    run.write(RESULT, data)


class _Header(BaseModel):
    """The fields that the store reads of a result of any kind."""

    kind: str
    parts: list[str] = []


def kind_of_result(run: Run) -> str | None:
    """The kind that the result of a run names; None where there is no result. IntegrityError as `read_result`."""
    header = _read(run, _Header)
    return None if header is None else header.kind


def parts_of(run: Run) -> list[str]:
    """The names of the runs that a run's result consists of; empty if there is no result.

    Raises:
        IntegrityError: `result.json` is damaged.
    """
    header = _read(run, _Header)
    return [] if header is None else header.parts


def has_result(run: Run) -> bool:
    """Whether the run has a result, so has ended once."""
    return RESULT in run.files(RESULT)


def read_result(run: Run, result_class: type[Result]) -> Result | None:
    """The result of a run; None if it has none yet.

    Raises:
        IntegrityError: `result.json` is damaged, or of another kind or version than `result_class`.
    """
    return _read(run, result_class)


def require_result(run: Run, result_class: type[Result]) -> Result:
    """The result of a finished run.

    Raises:
        UserError: the run has no result yet. IntegrityError: as `read_result`.
    """
    result = read_result(run, result_class)
    if result is None:
        raise UserError(f"run {run.name!r} in {run.storage.url} has no result yet: run it to its end first")
    return result


def _read(run: Run, model: type[Model]) -> Model | None:
    """`result.json` as an instance of `model`, or None where there is none. IntegrityError where it does not fit."""
    try:
        data = run.read(RESULT)
    except FileNotFoundError:
        return None
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        why = f"{field}: {first['msg']}" if field else first["msg"]
        raise IntegrityError(f"{run.url}/{RESULT} is damaged: {why}") from error
