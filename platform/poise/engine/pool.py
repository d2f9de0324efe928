"""A pool of engines that sample from one language model, each a Ray actor, behind the interface of one sampler.

Invariant: what the pool answers is what any one engine would. Requests are dealt in turn and answers put back in order;
an engine that dies is replaced, gets the weights that the pool has, and is asked the same again. An engine that has
outlived the worker that asked it begins again with the weights of the folder: what takes minutes, it has loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from safetensors.torch import load_file
from torch import Tensor

from poise.engine.replica import Answer, start_engine
from poise.errors import PoiseError
from poise.models.folder import check_newer, read_folder
from poise.models.sampling import Decoding, ProgressCallback, Request, Sample, no_progress
from poise.spec import SamplerSpec

__all__ = ["SamplerPool"]

_START_WITHIN_S = 600.0
_PROGRESS_EVERY_S = 2.0
_FREE_WITHIN_S = 60.0  # an engine may still be answering the worker that died: at some point a new one is sooner


class SamplerPool:
    """The engines of `spec` on the model of a local folder, for as long as the block lasts.

    A version, a name set, a checksum or a prefix cache that is not what it must be is a PoiseError, and so is the death
    of an engine after `max_restarts` were replaced; `on_restart` hears of each. `keeper`: a board that starts the
    engines, so that they outlive this process, and another that opens the same pool there goes on with them.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        folder: Path,
        *,
        keeper: Any = None,
        max_restarts: int = 3,
        on_restart: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._spec, self._folder, self._keeper = spec, read_folder(folder.absolute()), keeper
        self._restarts_left, self._on_restart = max_restarts, on_restart
        self._engines: list[Any] = []
        self._starting: dict[int, tuple[Any, bool]] = {}  # the answer to come; whether an earlier worker left it
        self._files: Any = None
        self._weights: Any = None
        self._version = 0

    def __enter__(self) -> SamplerPool:
        if len(ray.nodes()) > 1:  # an engine may start where the folder is not
            self._files = ray.put({file.name: file.read_bytes() for file in self._folder.path.glob("*.*")})
        self._engines = [self._start(index) for index in range(self._spec.engines)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    @property
    def version(self) -> int:
        return self._version

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        return self._deal("generate", requests, lambda share: (share, decoding), on_progress)

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
        self,
        method: str,
        items: Sequence[Any],
        arguments: Callable[[Sequence[Any]], tuple[Any, ...]],
        on_progress: ProgressCallback = no_progress,
    ) -> list[Any]:
        """Engine i gets items i, i + N, ...; the answers come back in the order of `items`."""
        count = min(len(self._engines), len(items))
        asks = [(index, method, arguments(items[index::count])) for index in range(count)]
        answers: list[Any] = [None] * len(items)
        for index, share in enumerate(self._ask(asks, self._version, on_progress)):
            answers[index::count] = share
        return answers

    def _ask(
        self,
        asks: Sequence[tuple[int, str, tuple[Any, ...]]],
        version: int,
        on_progress: ProgressCallback = no_progress,
    ) -> list[Any]:
        """Ask engines at the same time; every one must answer with weights of `version`."""
        self._await_engines()
        refs = [self._engines[index].ask.remote(method, *arguments) for index, method, arguments in asks]
        asked = [index for index, _, _ in asks]

        def report() -> None:
            on_progress(self._answered(asked))

        return [self._value(ref, ask, version, report) for ref, ask in zip(refs, asks, strict=True)]

    def _answered(self, indices: Sequence[int]) -> int:
        """Requests that these engines have answered of those that they were asked last."""
        refs = [self._engines[index].answered.remote() for index in indices]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_PROGRESS_EVERY_S)
        answered = 0
        for ref in ready:
            with suppress(RayActorError):  # it is replaced when its answer is waited for
                answered += ray.get(ref)
        return answered

    def _await_engines(self) -> None:
        """Before they are asked first; until then they start while the caller does what it has to."""
        while self._starting:
            index, (ref, inherited) = next(iter(self._starting.items()))
            try:
                answer: Answer = ray.get(ref, timeout=_FREE_WITHIN_S if inherited else _START_WITHIN_S)
            except GetTimeoutError:
                self._give_up(index, inherited)
                continue
            except RayActorError as error:
                if error.actor_init_failed:
                    raise PoiseError(f"an engine of the sampler did not start:\n{error}") from None
                self._replaced(index, error)
                continue
            if answer.error is not None:
                raise answer.error
            if inherited and answer.version > 0:
                self._starting[index] = self._engines[index].ask.remote("restart", self._stored), False
            else:
                del self._starting[index]

    def _give_up(self, index: int, inherited: bool) -> None:
        """An engine that does not answer in time: PoiseError, or another in the place of one that was left here."""
        if not inherited:
            raise PoiseError(
                f"the sampler's engines did not start in {_START_WITHIN_S:.0f} s: {self._spec.engines} of "
                f"{self._spec.cpus} CPU and {self._spec.gpus} GPU; free are {ray.available_resources()}"
            )
        ray.kill(self._engines[index])
        self._engines[index] = self._start(index, anew=True)

    def _value(self, ref: Any, ask: tuple[int, str, tuple[Any, ...]], version: int, report: Callable[[], None]) -> Any:
        answer = None
        while answer is None:
            try:
                while not ray.wait([ref], timeout=_PROGRESS_EVERY_S)[0]:
                    report()
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
        """A new engine in the place of one that died, as soon as it has the pool's weights."""
        if self._restarts_left == 0 or error.actor_init_failed:
            raise PoiseError(f"engine {index} of the sampler died, and no more may be started:\n{error}") from None
        self._restarts_left -= 1
        self._on_restart(f"engine {index} of the sampler died")
        engine = self._engines[index] = self._start(index, anew=True)
        ref, _ = self._starting.pop(index)
        # An actor with concurrency groups may begin what it is sent in any order: each call waits for the one before.
        try:
            answer: Answer = ray.get(ref, timeout=_START_WITHIN_S)
            if answer.error is None and self._weights is not None:
                answer = ray.get(engine.ask.remote("update_weights", self._weights, self._version))
        except RayActorError as again:
            return self._replaced(index, again)
        except GetTimeoutError:
            return self._give_up(index, inherited=False)
        if answer.error is not None:
            raise answer.error
        return engine

    def _start(self, index: int, *, anew: bool = False) -> Any:
        """Engine `index`; `_starting` holds what it answers as soon as it can."""
        start = partial(start_engine, self._spec, self._folder.path, self._files)
        engine, inherited = (
            (start(), False) if self._keeper is None else ray.get(self._keeper.engine.remote(index, start, anew))
        )
        self._starting[index] = engine.ready.remote(), inherited
        return engine

    @cached_property
    def _stored(self) -> Any:
        """The weights of the folder, in Ray's object store: for engines that an earlier worker gave others."""
        files = sorted(self._folder.path.glob("*.safetensors"))
        return ray.put({name: value for file in files for name, value in load_file(file).items()})

    def _stop(self) -> None:
        for engine in self._engines:
            ray.kill(engine)
        if self._keeper is not None:
            self._keeper.forget_engines.remote()
