"""What a kind of run measures, known from its spec alone: a sweep is checked against it before any trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

__all__ = ["Attacks", "MetricSource", "Split", "find_source", "row_sources", "summary_sources"]

Split = Literal["train", "validation", "test"]
Attacks = Literal["training", "evaluation"]


@dataclass(frozen=True)
class MetricSource:
    """Where a metric comes from.

    `examples`: the split that it is measured on. `rows`: the split under which it stands in the rows of metrics; None
    for a number of the summary, whose name is then its dotted path. `during`: measured again and again while the run
    trains, so that a scheduler can compare it. `attacks`: those of training or of the evaluation, where there are any.
    `needs`: the setting without which it is not measured, such as `evaluate.validation: true`; "" where it is.
    """

    examples: Split
    rows: Split | None
    during: bool = False
    attacks: Attacks | None = None
    needs: str = ""


def row_sources(
    names: Iterable[str], examples: Split, *, during: bool = False, attacks: Attacks | None = None
) -> dict[str, MetricSource]:
    """Metrics that stand in the rows of the split that they are measured on."""
    return {name: MetricSource(examples, examples, during, attacks) for name in names}


def summary_sources(
    prefixes: Iterable[str], names: Sequence[str], examples: Split, attacks: Attacks | None = None, needs: str = ""
) -> dict[str, MetricSource]:
    """Numbers of the summary: every name below every prefix."""
    source = MetricSource(examples, None, attacks=attacks, needs=needs)
    return {f"{prefix}.{name}": source for prefix in prefixes for name in names}


def find_source(name: str, known: Mapping[str, MetricSource]) -> MetricSource | None:
    """The source of a metric; a known name may be a pattern such as `accuracy.*.clean`. None where nothing fits."""
    if name in known:
        return known[name]
    return next((source for pattern, source in known.items() if fnmatchcase(name, pattern)), None)
