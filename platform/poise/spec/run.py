"""The part of a spec that every kind of run has: name, seed, store, workers and samplers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from poise import plugins
from poise.errors import UserError
from poise.secrets import is_secret_variable
from poise.spec.base import SpecModel, field_error
from poise.spec.inputs import Input
from poise.spec.metrics import MetricSource
from poise.spec.problems import Path
from poise.spec.values import ExactNumber, Name

__all__ = ["RunSpec", "SamplerSpec", "WorkersSpec", "all_inputs"]

_CREDENTIALS_IN_URL = re.compile(r"^\w+://[^/]*@")


class WorkersSpec(SpecModel):
    """The group of worker processes."""

    count: int = Field(1, ge=1, le=4096, description="number of worker processes of a training, one device each")
    min_count: int | None = Field(
        None, ge=1, description="least number of workers to continue with when the cluster shrinks"
    )
    cpus: int = Field(1, ge=1, le=1024, description="CPU cores, and torch threads, of each worker")
    gpus: int = Field(0, ge=0, le=1, description="GPUs of each worker: 0 trains on the CPU")
    max_failures: int = Field(
        3,
        ge=0,
        le=1000,
        description="how often the worker group is restarted from its last checkpoint after a worker has died",
    )
    environment: dict[str, str] = Field({}, description="environment variables of each worker; must not hold secrets")

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name, content in value.items():
            if is_secret_variable(name, content):
                raise ValueError(
                    f"{name} looks like a secret; set it in the environment of the cluster, never in a spec"
                )
        return value

    @model_validator(mode="after")
    def _elastic(self) -> WorkersSpec:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is above count {self.count}")
        return self

    def check_shares(self, path: str, batch_size: int) -> None:
        """Raise an error at `path` unless a batch is divisible by every possible number of workers."""
        for count in range(self.min_count or self.count, self.count + 1):
            if batch_size % count:
                raise field_error(path, f"{batch_size} does not divide by {count} workers")


class SamplerSpec(SpecModel):
    """The pool of engines that sample from a language model."""

    backend: Literal["vllm", "transformers"] = Field(
        "vllm", description="library that runs the model; without Ray always transformers"
    )
    engines: int = Field(1, ge=1, le=4096, description="number of engines that share the requests")
    cpus: int = Field(1, ge=1, le=1024, description="CPU cores of each engine")
    gpus: int = Field(0, ge=0, le=64, description="GPUs of each engine: 0 samples on the CPU")
    memory: Annotated[ExactNumber, Field(gt=0)] = Field(
        ExactNumber(1), description="GiB for the key-value cache of each vLLM engine on a CPU"
    )
    gpu_memory_utilization: Annotated[ExactNumber, Field(gt=0, le=1)] = Field(
        ExactNumber("0.9"),
        description="share of a GPU's memory for the weights and the key-value cache of a vLLM engine",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="longest sequence of a vLLM engine, prompt and response together, in tokens (default: as long as "
        "the run needs)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="precision of the model in an engine; auto: float32 on a CPU, the default of vLLM on a GPU",
    )

    def fit_sequences(self, longest: int) -> SamplerSpec:
        """This spec with engines that hold sequences of `longest` tokens, prompt and response together.

        Raises:
            UserError: `max_model_len` is set and too small.
        """
        needed = longest + 1  # an engine generates one token after a sequence to score it
        if self.max_model_len is None:
            return self.model_copy(update={"max_model_len": needed})
        if self.max_model_len < needed:
            raise UserError(
                f"sampler.max_model_len: {self.max_model_len} tokens are too few for prompts and responses of up to "
                f"{longest}; set it to {needed} or more, or leave it out"
            )
        return self


class RunSpec(SpecModel):
    """The keys that every spec has."""

    shares_batches: ClassVar[bool] = True
    """Whether all workers share the batches; False for a kind whose work one worker does alone."""

    kind: str = Field(description="kind of job, such as robust.train")
    name: Name = Field(description="name of the run and its resume key: a run of the same name is continued")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw of the run")
    store: str = Field(
        "runs", min_length=1, max_length=1000, description="where runs are stored: a folder or s3://bucket/prefix"
    )
    workers: WorkersSpec = Field(WorkersSpec(), description="the group of worker processes")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """The tree with its shorthands expanded, and for each copied path the path that it was copied from."""
        return tree, {}

    def cost(self) -> list[str]:
        """The estimated cost of the run, as lines of text; computed without building anything."""
        return []

    def metrics(self) -> dict[str, MetricSource]:
        """The numbers by which trials of a sweep can be compared, by name or by a pattern as `accuracy.*.clean`."""
        return {}

    @field_validator("store")
    @classmethod
    def _store_form(cls, value: str) -> str:
        if _CREDENTIALS_IN_URL.match(value):
            raise ValueError(
                "a store URL carries no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        scheme, mark, rest = value.partition("://")
        if mark and (scheme != "s3" or not rest.strip("/")):
            raise ValueError("a store is a folder or s3://bucket/prefix")
        if "\0" in value:
            raise ValueError("a store is a path without null bytes")
        return value


def all_inputs(spec: RunSpec) -> list[Input]:
    """The inputs of a spec, each once, with the code of its kind and of the kinds in it that packages register."""
    return list(dict.fromkeys([*_kind_code(spec), *spec.inputs()]))


def _kind_code(spec: RunSpec) -> Iterator[Input]:
    """The code of the kind of a spec, of the base of a sweep and of the stages of a pipeline, unless it is of Poise."""
    # A package cannot replace a kind of Poise: what it registers under such a name is not used.
    is_of_poise = type(spec).__module__.partition(".")[0] == "poise"
    if not is_of_poise and spec.kind in plugins.names("poise.kinds"):
        modules = plugins.modules("poise.kinds", spec.kind)
        yield Input(("kind",), "plugin", plugins.reference("poise.kinds", spec.kind), modules=modules)
    for key, value in spec:
        if isinstance(value, RunSpec):
            for each in _kind_code(value):
                yield each.below(key)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(inner, RunSpec):
                    for each in _kind_code(inner):
                        yield each.below(key, name)
