"""One engine of a sampler pool: a sampler in a Ray actor of its own.

Whoever starts one need not load torch: it may be the board, which keeps engines when the worker that asks them dies.
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
    from poise.engine.vllm_engine import VllmSampler
    from poise.models.transformers_sampler import TransformersSampler

__all__ = ["Answer", "start_engine"]


@dataclass(frozen=True)
class Answer:
    """What an engine returns: the version of its weights when it answered, and the answer or the error."""

    version: int
    value: Any = None
    error: PoiseError | None = None


class _Engine:
    """One sampler in a process of its own.

    The sampler is opened by the first `ready`, not by the constructor: all that touches it runs in one thread, and
    what goes wrong is an answer like any other. `answered` runs in a second thread, while the sampler works.
    """

    def __init__(self, spec: SamplerSpec, folder: Path, files: Mapping[str, bytes] | None) -> None:
        self._arguments = spec, folder, files
        self._answered = 0
        self._failure: PoiseError | None = None
        self.sampler: VllmSampler | TransformersSampler | None = None

    def ready(self) -> Answer:
        """Open the sampler, unless it is."""
        if self.sampler is None:
            return self._try(self._open)
        return self._answer(None)

    def ask(self, method: str, *arguments: Any) -> Answer:
        """Call a method of the sampler."""
        self._answered = 0
        if method == "generate":
            arguments = (*arguments, self._count)
        return self._try(lambda: getattr(self.sampler, method)(*arguments))

    @ray.method(concurrency_group="progress")  # type: ignore[untyped-decorator]
    def answered(self) -> int:
        """Requests of the current `generate` that are answered."""
        return self._answered

    def _try(self, action: Callable[[], Any]) -> Answer:
        """What the action returns. After an error that nobody raised on purpose, the engine answers no more."""
        if self._failure is not None:
            return self._answer(None)
        try:
            return self._answer(action())
        except PoiseError as error:
            return self._answer(None, error)
        except Exception as error:  # noqa: BLE001 - the caller raises it as what ends the run
            traceback.print_exc()
            self._failure = PoiseError(f"an engine of the sampler failed: {_described(error)}")
            return self._answer(None)

    def _answer(self, value: Any, error: PoiseError | None = None) -> Answer:
        version = 0 if self.sampler is None else self.sampler.version
        return Answer(version, value, error or self._failure)

    def _count(self, answered: int) -> None:
        self._answered = answered

    def _open(self) -> None:
        spec, folder, files = self._arguments
        with scratch_folder() as scratch:
            for name, data in (files or {}).items():
                (scratch / name).write_bytes(data)
            self.sampler = _open(spec, folder if files is None else scratch)


def _described(error: Exception) -> str:
    """The type and text of an error, and the line that raised it."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({raised.filename}:{raised.lineno})"


def start_engine(spec: SamplerSpec, folder: Path, files: Any) -> Any:
    """Start an engine on the model of a local folder; it lives as long as the process that starts it.

    `files` are those of the folder, in Ray's object store, where the engine may start on another machine; or None.
    """
    settings = env.VLLM_SETTINGS if spec.gpus else {**env.VLLM_SETTINGS, **env.VLLM_ON_CPU}
    options = ray.remote(concurrency_groups={"progress": 1})(_Engine).options(
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_restarts=0,
        scheduling_strategy="DEFAULT",  # never in the placement group of the gang that opens the pool
        runtime_env={"env_vars": {**settings, "OMP_NUM_THREADS": str(spec.cpus)}},
    )
    return options.remote(spec, folder, files)


def _open(spec: SamplerSpec, folder: Path) -> VllmSampler | TransformersSampler:
    if spec.backend == "transformers":
        import torch

        from poise.models.transformers_sampler import TransformersSampler

        torch.set_num_threads(spec.cpus)
        return TransformersSampler(folder, "cuda" if spec.gpus else "cpu", dtype=spec.dtype)
    from poise.engine.vllm_engine import VllmSampler

    return VllmSampler(folder, spec)
