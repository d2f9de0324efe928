"""One engine of a sampler pool: a sampler in a Ray actor of its own.

Whoever starts one need not load torch: it may be the board, which keeps engines when the worker that asks them dies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from poise import env
from poise.errors import PoiseError
from poise.spec import SamplerSpec

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
    """One sampler in a process of its own."""

    def __init__(self, spec: SamplerSpec, folder: Path, files: Mapping[str, bytes] | None) -> None:
        with tempfile.TemporaryDirectory(prefix="poise-model-") as scratch:
            for name, data in (files or {}).items():
                Path(scratch, name).write_bytes(data)
            self.sampler = _open(spec, folder if files is None else Path(scratch))

    def ask(self, method: str, *arguments: Any) -> Answer:
        try:
            value = getattr(self.sampler, method)(*arguments)
        except PoiseError as error:
            return Answer(self.sampler.version, error=error)
        return Answer(self.sampler.version, value)

    def ready(self) -> Answer:
        return Answer(self.sampler.version)


def start_engine(spec: SamplerSpec, folder: Path, files: Any) -> Any:
    """Start an engine on the model of a local folder; it lives as long as the process that starts it.

    `files` are those of the folder, in Ray's object store, where the engine may start on another machine; or None.
    """
    settings = env.VLLM_SETTINGS if spec.gpus else {**env.VLLM_SETTINGS, **env.VLLM_ON_CPU}
    options = ray.remote(_Engine).options(
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
        return TransformersSampler(folder, "cuda" if spec.gpus else "cpu")
    from poise.engine.vllm_engine import VllmSampler

    return VllmSampler(folder, spec)
