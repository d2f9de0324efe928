"""The classifier under test, as a spec names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from poise.models.spec import ModelSpec
from poise.spec import Input, RunName, field_error

__all__ = ["TargetModelSpec"]

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class TargetModelSpec(ModelSpec):
    """The classifier under test: one of `run`, `file` and `function`. The keys of `ModelSpec` apply to a `file`."""

    run: RunName | None = Field(None, description="finished run of robust.train in the same store")
    checkpoint: Literal["best", "final", "averaged"] | None = Field(
        None, description="weights of the run; default its selected ones"
    )
    file: str | None = Field(
        None, min_length=1, max_length=1000, description="state dict in safetensors, here or on s3://"
    )
    function: str | None = Field(
        None, description="module:function in your code that returns an nn.Module on [0, 1]; `file` may add its weights"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")

    @model_validator(mode="after")
    def _one_source(self) -> TargetModelSpec:
        sources = [key for key in ("run", "file", "function") if getattr(self, key) is not None]
        if len(sources) != 1 and sources != ["file", "function"]:
            raise ValueError(
                "a model to evaluate is one of run: RUN, file: FILE or function: MODULE:FUNCTION; a function may have "
                "a file with its weights"
            )
        if self.arguments and self.function is None:
            raise field_error("arguments", "only a function takes arguments: remove them")
        if self.checkpoint is not None and self.run is None:
            raise field_error("checkpoint", "only a run has checkpoints to choose from: remove it")
        for key, field in ModelSpec.model_fields.items():
            if self.source != "file" and getattr(self, key) != field.default:
                raise field_error(key, f"the architecture is written for a file only; that of a {self.source} is known")
        if self.function is not None and not _FUNCTION.fullmatch(self.function):
            raise field_error("function", f"{self.function[:60]!r} is not of the form package.module:function")
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
        if self.function is not None:
            yield Input(("function",), "code", self.function)
