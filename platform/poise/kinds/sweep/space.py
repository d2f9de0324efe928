"""The search space of a sweep: the values at one path of the base, listed in full or sampled."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, model_validator

from poise.spec import ExactNumber, SpecModel, field_error
from poise.spec.problems import Path
from poise.spec.seeds import derive_seed

__all__ = ["Axis", "SimplexSpec", "Values", "contains"]

Values = dict[str, Any]
"""By dotted path, the value that is set there, as it is written in a spec."""

_MOST_POINTS = 10_000
_SHARE_UNITS = 10**6
"""Shares of a Dirichlet draw are multiples of one millionth."""

Range = Annotated[list[ExactNumber], Field(min_length=2, max_length=2)]


class SimplexSpec(SpecModel):
    """Shares that sum to one exactly: every point of a grid, or draws from a symmetric Dirichlet distribution."""

    over: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=2, max_length=20, description="keys below the path, each of which gets a share"
    )
    resolution: int | None = Field(
        None, ge=1, le=1000, description="list every point whose shares are multiples of 1/n"
    )
    concentration: Annotated[ExactNumber, Field(ge=0.05, le=1000)] | None = Field(
        None, description="of the Dirichlet draws; default 1, which is uniform; below 1 nearer to the corners"
    )

    @model_validator(mode="after")
    def _one_way(self) -> SimplexSpec:
        if len(set(self.over)) < len(self.over):
            raise field_error("over", "a key stands twice")
        if self.resolution and self.concentration:
            raise ValueError("resolution lists points and concentration draws them: give one")
        if self.resolution:
            points = math.comb(self.resolution + len(self.over) - 1, self.resolution)
            if points > _MOST_POINTS:
                raise field_error("resolution", f"{points:,} points; the limit is {_MOST_POINTS:,}")
        return self


class Axis(SpecModel):
    """The values that are tried at one path: exactly one of the keys. A value is used as it is written."""

    grid: list[Any] | None = Field(None, min_length=1, max_length=1000, description="each of these values")
    choice: list[Any] | None = Field(None, min_length=1, max_length=1000, description="one of these values, drawn")
    uniform: Range | None = Field(None, description="[low, high]: drawn uniformly, for real numbers")
    log_uniform: Range | None = Field(None, description="[low, high]: drawn so that its logarithm is uniform")
    simplex: SimplexSpec | None = Field(None, description="weights below the path that sum to one")

    @model_validator(mode="after")
    def _one_key(self) -> Axis:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError(f"needs exactly one of {', '.join(type(self).model_fields)}")
        for key in ("grid", "choice"):
            values = [repr(value) for value in getattr(self, key) or ()]
            repeated = [value for value in values if values.count(value) > 1]
            if repeated:
                raise field_error(key, f"{repeated[0]} stands twice")
        low, high = (float(end) for end in self.uniform or self.log_uniform or (ExactNumber(1), ExactNumber(2)))
        if low >= high or (self.log_uniform and low <= 0):
            raise ValueError("a range goes from low up to high, and from above 0 where it is logarithmic")
        return self

    @property
    def key(self) -> str:
        """The one key that is set."""
        return next(key for key, value in self if value is not None)

    def paths(self, name: str) -> list[str]:
        """The paths in the base that the axis at `name` sets."""
        return [f"{name}.{key}" for key in self.simplex.over] if self.simplex else [name]

    def listed(self, name: str) -> list[Values]:
        """Every setting of an axis whose values are listed; [] where they are sampled."""
        if self.simplex and self.simplex.resolution:
            resolution = self.simplex.resolution
            paths = self.paths(name)
            settings: list[Values] = []
            for point in _compositions(resolution, len(paths)):
                shares = [f"{count}/{resolution}" for count in point]
                settings.append(dict(zip(paths, shares, strict=True)))
            return settings
        return [{name: value} for value in self.grid or ()]

    def sampled(self, name: str, seed: int, sample: int) -> Values:
        """Sample number `sample`: a pure function of seed, path and number. Reals have six significant digits."""
        generator = random.Random(derive_seed(seed, "sweep", name, sample))
        if self.simplex:
            shares = _dirichlet(generator, float(self.simplex.concentration or 1), len(self.simplex.over))
            return dict(zip(self.paths(name), shares, strict=True))
        if self.choice:
            return {name: self.choice[int(generator.random() * len(self.choice))]}
        low, high = self.ends()
        if self.log_uniform:
            value = math.exp(math.log(low) + generator.random() * (math.log(high) - math.log(low)))
        else:
            value = low + generator.random() * (high - low)
        rounded = float(f"{value:.6g}")
        return {name: min(max(rounded, low), high)}

    def ends(self) -> list[float]:
        """The ends of a range; [] for other axes."""
        return [float(end) for end in self.uniform or self.log_uniform or ()]

    def place(self, value: Any) -> Path:
        """The path below the axis where `value` is written."""
        values = self.grid or self.choice
        return (self.key, values.index(value)) if values else (self.key,)


def contains(outer: str, inner: str) -> bool:
    """Whether the dotted path `inner` is `outer` or lies below it."""
    return inner == outer or inner.startswith((f"{outer}.", f"{outer}["))


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of `parts` counts."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in _compositions(total - first, parts - 1))


def _dirichlet(generator: random.Random, concentration: float, parts: int) -> list[float]:
    """The shares of a symmetric Dirichlet draw, as normalised Gamma variates, in millionths that sum to one exactly."""
    gammas = [generator.gammavariate(concentration, 1.0) for _ in range(parts)]
    total = math.fsum(gammas)
    # Cumulative sums are rounded, not shares, so that the rounded shares still sum to one.
    edges = [round(_SHARE_UNITS * math.fsum(gammas[:end]) / total) for end in range(parts + 1)]
    return [(high - low) / _SHARE_UNITS for low, high in pairwise(edges)]
