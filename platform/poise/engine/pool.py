"""A pool of engines that sample from one language model, each a Ray actor, behind the interface of one sampler.

Invariant: what the pool answers is what any one engine would. Requests are dealt in turn and answers put back in order;
an engine that dies is replaced, gets the weights that the pool has, and is asked the same again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from poise import env
from poise.errors import PoiseError
from poise.models.folder import check_newer, read_folder
from poise.models.sampling import Decoding, Request, Sample, Sampler
from poise.spec import SamplerSpec

__all__ = ["SamplerPool"]

_START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class _Answer:
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

    def ask(self, method: str, *arguments: Any) -> _Answer:
        try:
            value = getattr(self.sampler, method)(*arguments)
        except PoiseError as error:
            return _Answer(self.sampler.version, error=error)
        return _Answer(self.sampler.version, value)

    def ready(self) -> _Answer:
        return _Answer(self.sampler.version)


class SamplerPool:
    """The engines of `spec` on the model of a local folder, for as long as the block lasts.

    A version, a name set, a checksum or a prefix cache that is not what it must be is a PoiseError, and so is the death
    of an engine after `max_restarts` were replaced; `on_restart` hears of each.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        folder: Path,
        *,
        max_restarts: int = 3,
        on_restart: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._spec, self._folder = spec, read_folder(folder.absolute())
        self._restarts_left, self._on_restart = max_restarts, on_restart
        self._engines: list[Any] = []
        self._starting: list[Any] = []
        self._files: Any = None
        self._weights: Any = None
        self._version = 0

    def __enter__(self) -> SamplerPool:
        if len(ray.nodes()) > 1:  # an engine may start where the folder is not
            self._files = ray.put({file.name: file.read_bytes() for file in self._folder.path.glob("*.*")})
        self._engines = [self._start() for _ in range(self._spec.engines)]
        self._starting = [engine.ready.remote() for engine in self._engines]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def version(self) -> int:
        return self._version

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Sample]]:
        return self._deal("generate", requests, lambda share: (share, decoding))

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        pairs = list(zip(prompts, responses, strict=True))
        return self._deal("score", pairs, lambda share: tuple(zip(*share, strict=True)))

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self._version)
        sent = ray.put(self._folder.checked(weights))
        asks = [(index, "update_weights", (sent, version)) for index in range(len(self._engines))]
        self._ask(asks, version)
        self._weights, self._version = sent, version

    def _deal(
        self, method: str, items: Sequence[Any], arguments: Callable[[Sequence[Any]], tuple[Any, ...]]
    ) -> list[Any]:
        """Engine i gets items i, i + N, ...; the answers come back in the order of `items`."""
        count = min(len(self._engines), len(items))
        asks = [(index, method, arguments(items[index::count])) for index in range(count)]
        answers: list[Any] = [None] * len(items)
        for index, share in enumerate(self._ask(asks, self._version)):
            answers[index::count] = share
        return answers

    def _ask(self, asks: Sequence[tuple[int, str, tuple[Any, ...]]], version: int) -> list[Any]:
        """Ask engines at the same time; every one must answer with weights of `version`."""
        self._await_engines()
        refs = [self._engines[index].ask.remote(method, *arguments) for index, method, arguments in asks]
        return [self._value(ref, ask, version) for ref, ask in zip(refs, asks, strict=True)]

    def _await_engines(self) -> None:
        """Before they are asked first; until then they start while the caller does what it has to."""
        try:
            ray.get(self._starting, timeout=_START_TIMEOUT_S)
        except GetTimeoutError:
            raise PoiseError(
                f"the sampler's engines did not start in {_START_TIMEOUT_S:.0f} s: {self._spec.engines} of "
                f"{self._spec.cpus} CPU and {self._spec.gpus} GPU; free are {ray.available_resources()}"
            ) from None
        except RayActorError as error:
            raise PoiseError(f"an engine of the sampler did not start:\n{error}") from None
        self._starting = []

    def _value(self, ref: Any, ask: tuple[int, str, tuple[Any, ...]], version: int) -> Any:
        answer = None
        while answer is None:
            try:
                answer = ray.get(ref)
            except RayActorError as error:
                ref = self._replaced(ask[0], error).ask.remote(ask[1], *ask[2])
        if answer.error is not None:
            raise answer.error
        if answer.version != version:
            raise PoiseError(
                f"engine {ask[0]} of the sampler answers with weights of version {answer.version}, not {version}"
            )
        return answer.value

    def _replaced(self, index: int, error: RayActorError) -> Any:
        """A new engine in the place of one that died; what it is asked next waits until it has the pool's weights."""
        if self._restarts_left == 0 or error.actor_init_failed:
            raise PoiseError(f"engine {index} of the sampler died, and no more may be started:\n{error}") from None
        self._restarts_left -= 1
        self._on_restart(f"engine {index} of the sampler died")
        engine = self._engines[index] = self._start()
        if self._weights is not None:
            engine.ask.remote("update_weights", self._weights, self._version)
        return engine

    def _start(self) -> Any:
        settings = env.VLLM_SETTINGS if self._spec.gpus else {**env.VLLM_SETTINGS, **env.VLLM_ON_CPU}
        options = ray.remote(_Engine).options(
            num_cpus=self._spec.cpus,
            num_gpus=self._spec.gpus,
            max_restarts=0,
            scheduling_strategy="DEFAULT",  # never in the placement group of the gang that opens the pool
            runtime_env={"env_vars": {**settings, "OMP_NUM_THREADS": str(self._spec.cpus)}},
        )
        return options.remote(self._spec, self._folder.path, self._files)

    def _stop(self) -> None:
        for engine in self._engines:
            ray.kill(engine)


def _open(spec: SamplerSpec, folder: Path) -> Sampler:
    if spec.backend == "transformers":
        import torch

        from poise.models.transformers_sampler import TransformersSampler

        torch.set_num_threads(spec.cpus)
        return TransformersSampler(folder, "cuda" if spec.gpus else "cpu")
    from poise.engine.vllm_engine import VllmSampler

    return VllmSampler(folder, spec)
