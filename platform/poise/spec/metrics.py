"""The metrics that a run will have, as far as its spec determines them: a sweep is checked before its first trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field

from poise.spec.base import SpecModel
from poise.spec.inputs import Input
from poise.spec.values import CodeReference

__all__ = [
    "Attacks",
    "ExtraMetrics",
    "MetricFunction",
    "MetricSource",
    "Split",
    "extra_names",
    "find_source",
    "row_sources",
    "summary_sources",
]

Split = Literal["train", "validation", "test"]
Attacks = Literal["training", "evaluation"]


@dataclass(frozen=True)
class MetricSource:
    """Where a metric comes from.

    Attributes:
        examples: the split that it is measured on.
        rows: the split under which it is written in the rows of metrics; None for a number of the summary, whose name
            is its dotted path.
        during: whether it is measured repeatedly during training, so that a scheduler can compare trials by it.
        attacks: whether it is measured under the attacks of training or of the evaluation; None without attacks.
        needs: the setting without which it is not measured, such as `evaluate.validation: true`; "" where there is
            none.
    """

    examples: Split
    rows: Split | None
    during: bool = False
    attacks: Attacks | None = None
    needs: str = ""


class MetricFunction(SpecModel):
    """A metric of the user's code."""

    function: CodeReference = Field(
        description="package.module:function in your code that returns one number per example; their mean is measured"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")

    def inputs(self) -> Iterator[Input]:
        """The code."""
        yield Input(("function",), "code", self.function)


ExtraMetrics = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,39}$")], MetricFunction]
"""Metrics of the user's code, by the name under which they are measured, as `metric/NAME`."""


def extra_names(metrics: Mapping[str, MetricFunction]) -> list[str]:
    """The names under which metrics of the user's code are measured."""
    return [f"metric/{name}" for name in metrics]


def row_sources(
    names: Iterable[str], examples: Split, *, during: bool = False, attacks: Attacks | None = None
) -> dict[str, MetricSource]:
    """Metrics that are written in the rows of the split that they are measured on."""
    return {name: MetricSource(examples, examples, during, attacks) for name in names}


def summary_sources(
    prefixes: Iterable[str], names: Sequence[str], examples: Split, attacks: Attacks | None = None, needs: str = ""
) -> dict[str, MetricSource]:
    """Numbers of the summary: `prefix.name` for every prefix and every name."""
    source = MetricSource(examples, None, attacks=attacks, needs=needs)
    return {f"{prefix}.{name}": source for prefix in prefixes for name in names}


def find_source(name: str, sources: Mapping[str, MetricSource]) -> MetricSource | None:
    """The source of a metric, None where there is none. A name in `sources` may be a pattern, as `accuracy.*.clean`."""
    if name in sources:
        return sources[name]
    return next((source for pattern, source in sources.items() if fnmatchcase(name, pattern)), None)
