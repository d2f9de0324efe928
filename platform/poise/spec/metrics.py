"""The metrics that a run will have, as far as its spec determines them: a sweep is checked before its first trial."""

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
