"""The classifier under test, as a spec names it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, model_validator

from poise.models.spec import ModelSpec
from poise.spec import CodeReference, Input, RunName, field_error

__all__ = ["CLASSIFIER_KINDS", "TargetModelSpec", "classifier_inputs"]

CLASSIFIER_KINDS = ("robust.train", "sweep")
"""The kinds of runs that a list of classifiers may name; a sweep stands for all its trials."""


class TargetModelSpec(ModelSpec):
    """The classifier under test: one of `run`, `file` and `function`. The keys of `ModelSpec` apply to a `file`."""

    run: RunName | None = Field(None, description="finished run of robust.train in the same store")
    checkpoint: Literal["best", "final", "averaged"] | None = Field(
        None, description="weights of the run; default its selected ones"
    )
    file: str | None = Field(
        None, min_length=1, max_length=1000, description="state dict in safetensors, here or on s3://"
    )
    function: CodeReference | None = Field(
        None,
        description="package.module:function in your code that returns an nn.Module on images in [0, 1]; `file` may "
        "add its weights",
    )

    @model_validator(mode="after")
    def _one_source(self) -> TargetModelSpec:
        sources = [key for key in ("run", "file", "function") if getattr(self, key) is not None]
        if len(sources) != 1 and sources != ["file", "function"]:
            raise ValueError(
                "a model to evaluate is one of run: RUN, file: FILE or function: MODULE:FUNCTION; a function may have "
                "a file with its weights"
            )
        if self.checkpoint is not None and self.run is None:
            raise field_error("checkpoint", "only a run has checkpoints to choose from: remove it")
        if self.run is not None:
            self._refuse_architecture("run")
        return self

    @property
    def source(self) -> Literal["run", "file", "function"]:
        """The key that names the model; with a function and a file, the function."""
        if self.run is not None:
            return "run"
        return "file" if self.function is None else "function"

    def inputs(self) -> Iterator[Input]:
        """The run, the file or the code."""
        if self.run is not None:
            yield Input(("run",), "run", self.run, kinds=("robust.train",))
        if self.file is not None:
            yield Input(("file",), "files", self.file)
        yield from super().inputs()


def classifier_inputs(runs: Sequence[str]) -> Iterator[Input]:
    """The runs of classifiers that the key `runs` of a spec names."""
    for index, name in enumerate(runs):
        yield Input(("runs", index), "run", name, kinds=CLASSIFIER_KINDS)
