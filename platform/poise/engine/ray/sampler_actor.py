"""One engine of a sampler pool: a sampler in a Ray actor.

This module does not load torch, since the coordinator starts engines too: they outlive the worker that uses them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from poise import env
from poise.errors import PoiseError
from poise.spec import SamplerSpec
from poise.store.storage import scratch_folder

if TYPE_CHECKING:
    from poise.engine.vllm.engine import VllmSampler
    from poise.inference.transformers_sampler import TransformersSampler

__all__ = ["Answer", "start_engine"]


@dataclass(frozen=True)
class Answer:
    """The reply of an engine: the version of its weights when it replied, and the result or the error."""

    version: int
    value: Any = None
    error: PoiseError | None = None


class _Engine:
    """A Ray actor with one sampler.

    The first `ready` opens the sampler, not the constructor: then all its calls run in one thread, and an error while
    it opens is returned as an `Answer`. `num_answered` runs in a second thread, while the sampler works.
    """

    def __init__(self, spec: SamplerSpec, folder: Path, files: Mapping[str, bytes] | None) -> None:
        self._spec = spec
        self._folder = folder
        self._files = files
        self._num_answered = 0
        self._failure: PoiseError | None = None
        self.sampler: VllmSampler | TransformersSampler | None = None

    def ready(self) -> Answer:
        """Open the sampler unless it is open."""
        if self.sampler is None:
            return self._try(self._open)
        return self._answer(None)

    def call(self, method: str, *arguments: Any) -> Answer:
        """Call a method of the sampler."""
        self._num_answered = 0
        if method == "generate":
            arguments = (*arguments, self._count)
        return self._try(lambda: getattr(self.sampler, method)(*arguments))

    @ray.method(concurrency_group="progress")  # type: ignore[untyped-decorator]
    def num_answered(self) -> int:
        """Number of requests of the current `generate` that are answered."""
        return self._num_answered

    def _try(self, action: Callable[[], Any]) -> Answer:
        """Run `action` and wrap its result or error. After an unexpected error the engine returns only that error."""
        if self._failure is not None:
            return self._answer(None)
        try:
            return self._answer(action())
        except PoiseError as error:
            return self._answer(None, error)
        except Exception as error:  # noqa: BLE001 - the caller raises it as what ends the run
            traceback.print_exc()
            self._failure = PoiseError(f"an engine of the sampler failed: {_describe(error)}")
            return self._answer(None)

    def _answer(self, value: Any, error: PoiseError | None = None) -> Answer:
        version = 0 if self.sampler is None else self.sampler.version
        return Answer(version, value, error or self._failure)

    def _count(self, num_answered: int) -> None:
        self._num_answered = num_answered

    def _open(self) -> None:
        """Open the sampler on the files, or on the local folder where there are none."""
        with scratch_folder() as scratch:
            for name, data in (self._files or {}).items():
                (scratch / name).write_bytes(data)
            self.sampler = _open(self._spec, self._folder if self._files is None else scratch)


def _describe(error: Exception) -> str:
    """The type and text of an error, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"


def start_engine(spec: SamplerSpec, folder: Path, files: Any) -> Any:
    """Start an engine on the model of a local folder, and return its handle. It lives as long as the calling process.

    `files` is a reference to the files of the folder in Ray's object store, for an engine that may start on another
    machine; None if it starts on this one.
    """
    settings = env.VLLM_SETTINGS if spec.gpus else {**env.VLLM_SETTINGS, **env.VLLM_ON_CPU}
    engine_class = ray.remote(concurrency_groups={"progress": 1})(_Engine).options(
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_restarts=0,
        scheduling_strategy="DEFAULT",  # outside the placement group of the worker group that opens the pool
        runtime_env={"env_vars": {**settings, "OMP_NUM_THREADS": str(spec.cpus)}},
    )
    return engine_class.remote(spec, folder, files)


def _open(spec: SamplerSpec, folder: Path) -> VllmSampler | TransformersSampler:
    """The sampler of `spec.backend` on the model of a local folder."""
    if spec.backend == "transformers":
        import torch

        from poise.inference.transformers_sampler import TransformersSampler

        torch.set_num_threads(spec.cpus)
        return TransformersSampler(folder, "cuda" if spec.gpus else "cpu", dtype=spec.dtype)
    from poise.engine.vllm.engine import VllmSampler

    return VllmSampler(folder, spec)
