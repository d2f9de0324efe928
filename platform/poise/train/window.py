"""The metrics of the steps since the last row."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.train.context import Context

__all__ = ["MetricWindow"]


class MetricWindow:
    """Metrics of the steps since the last row. They stay on the device, so that no step waits for it."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        """The values by name, each (steps,), on the CPU."""
        return {name: torch.stack(values).cpu() for name, values in self.values.items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Restore the values that `tensors` returned."""
        self.values = {name: list(values.unbind()) for name, values in tensors.items()}

    def take(self, context: Context) -> dict[str, float]:
        """The means over the window and over all ranks; the window is empty afterwards."""
        if not self.values:
            return {}
        names = sorted(self.values)
        # (names,): one all-reduce and one copy to the host for all metrics
        means = torch.stack([torch.stack(self.values[name]).float().mean() for name in names])
        self.values = {}
        return dict(zip(names, context.mean(means).tolist(), strict=True))
