"""The fields that the results of all kinds that train a network have in common."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from poise.store.result import RunResult

__all__ = ["TrainedResult"]


class TrainedResult(RunResult):
    """The steps of a training, and its selected checkpoint."""

    objective: str = Field("", description="the loss that was minimised")
    step: int = Field(description="the last optimizer step")
    best_step: int | None = Field(description="the step of the best checkpoint")
    selected: str = Field("final", description="the selected checkpoint: best or final")
    parameters: int = Field(description="parameters of the network")

    @property
    def last_step(self) -> int | None:
        """The last optimizer step."""
        return self.step

    @property
    def selected_step(self) -> int | None:
        """The step of the best checkpoint."""
        return self.best_step

    def step_of(self, weights: str) -> int:
        """The step of the checkpoint of this name: "best", or any other for the final one."""
        return self.best_step if weights == "best" and self.best_step is not None else self.step

    def facts(self) -> Iterator[tuple[str, str]]:
        """Objective, steps and parameters."""
        if self.objective:
            yield "objective", self.objective
        yield "step", f"{self.step:,}"
        yield "parameters", f"{self.parameters:,}"
