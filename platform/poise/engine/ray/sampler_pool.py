"""A pool of engines that sample from one language model, each a Ray actor, behind the interface of one sampler.

Invariant: the pool returns what any single engine would return. Requests are scattered round-robin and their answers
returned in order. An engine that dies is replaced, gets the weights of the pool, and the call is repeated. An engine
that outlives its worker reloads the initial weights and keeps its compiled graphs, which take minutes to make.
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

from poise.engine.ray.sampler_actor import Answer, start_engine
from poise.errors import PoiseError
from poise.inference.sampler import (
    Decoding,
    ProgressCallback,
    Request,
    Sample,
    no_progress,
)
from poise.models.model_folder import check_newer, read_folder
from poise.spec import SamplerSpec

__all__ = ["SamplerPool"]

_START_WITHIN_S = 600.0
_PROGRESS_EVERY_S = 2.0
_FREE_WITHIN_S = 60.0
"""How long to wait for an engine that is still busy with a call of a dead worker, before another takes its place."""

_Call = tuple[int, str, tuple[Any, ...]]
"""Index of the engine, method of its sampler, arguments."""


class SamplerPool:
    """The engines of `spec` on the model of a local folder, as a context manager.

    Raises PoiseError when an engine has a wrong version, set of names, checksum or prefix cache, and when one dies
    after `max_restarts` were replaced; `on_restart` is called with the reason of each replacement. With an `owner`, the
    handle of a coordinator, that actor starts the engines: they outlive this process, and the next worker that opens
    the pool on the same coordinator uses them.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        folder: Path,
        *,
        owner: Any = None,
        max_restarts: int = 3,
        on_restart: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._spec = spec
        self._folder = read_folder(folder.absolute())
        self._owner = owner
        self._remaining_restarts = max_restarts
        self._on_restart = on_restart
        self._engines: list[Any] = []
        # Per engine that starts: the reference of its answer, and whether an earlier worker started it.
        self._starting: dict[int, tuple[Any, bool]] = {}
        self._files: Any = None
        self._weights: Any = None
        self._version = 0

    def __enter__(self) -> SamplerPool:
        if len(ray.nodes()) > 1:  # an engine may start on a machine that does not have the folder
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
        return self._scatter("generate", requests, lambda share: (share, decoding), on_progress)

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        pairs = list(zip(prompts, responses, strict=True))
        return self._scatter("score", pairs, lambda share: tuple(zip(*share, strict=True)))

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self._version)
        weights_ref = ray.put(self._folder.validate_state_dict(weights))
        calls = [(index, "update_weights", (weights_ref, version)) for index in range(len(self._engines))]
        self._call(calls, version)
        # Only now: an engine that dies during the update is replaced with the weights of the version before.
        self._weights = weights_ref
        self._version = version

    def _scatter(
        self,
        method: str,
        items: Sequence[Any],
        arguments: Callable[[Sequence[Any]], tuple[Any, ...]],
        on_progress: ProgressCallback = no_progress,
    ) -> list[Any]:
        """Call `method` with items i, i + N, ... on engine i of N; the answers are in the order of `items`."""
        count = min(len(self._engines), len(items))
        calls = [(index, method, arguments(items[index::count])) for index in range(count)]
        answers: list[Any] = [None] * len(items)
        for index, share in enumerate(self._call(calls, self._version, on_progress)):
            answers[index::count] = share
        return answers

    def _call(
        self,
        calls: Sequence[_Call],
        version: int,
        on_progress: ProgressCallback = no_progress,
    ) -> list[Any]:
        """Run all calls at the same time; PoiseError if an engine answers with weights of another version."""
        self._await_engines()
        refs = [self._engines[index].call.remote(method, *arguments) for index, method, arguments in calls]
        answered = {index: 0 for index, _, _ in calls}

        def report() -> None:
            self._update_answered(answered)
            on_progress(sum(answered.values()))

        return [self._value(ref, call, version, report) for ref, call in zip(refs, calls, strict=True)]

    def _update_answered(self, answered: dict[int, int]) -> None:
        """Set the number of requests of the current calls that each of these engines has answered.

        An engine that does not say in time keeps its number, and one that was replaced keeps that of the one before
        until it has answered more: the sum never falls.
        """
        refs = {self._engines[index].num_answered.remote(): index for index in answered}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_PROGRESS_EVERY_S)
        for ref in ready:
            with suppress(RayActorError):  # a dead engine is replaced in `_value`
                index = refs[ref]
                answered[index] = max(answered[index], ray.get(ref))

    def _await_engines(self) -> None:
        """Wait until every engine has started. Called before the first call, not when the pool opens: until then the
        caller works while the engines start."""
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
                self._replace(index, error)
                continue
            if answer.error is not None:
                raise answer.error
            if inherited and answer.version > 0:
                self._starting[index] = self._engines[index].call.remote("restart", self._initial_weights), False
            else:
                del self._starting[index]

    def _give_up(self, index: int, inherited: bool) -> None:
        """Handle an engine that did not answer in time: replace one that an earlier worker started, else PoiseError."""
        if not inherited:
            raise PoiseError(
                f"the sampler's engines did not start in {_START_WITHIN_S:.0f} s: {self._spec.engines} of "
                f"{self._spec.cpus} CPU and {self._spec.gpus} GPU; free are {ray.available_resources()}"
            )
        ray.kill(self._engines[index])
        self._engines[index] = self._start(index, replace_engine=True)

    def _value(self, ref: Any, call: _Call, version: int, report: Callable[[], None]) -> Any:
        """The result of `call`, whose answer is `ref`; a call whose engine dies is repeated on its replacement."""
        index, method, arguments = call
        answer = None
        while answer is None:
            try:
                while not ray.wait([ref], timeout=_PROGRESS_EVERY_S)[0]:
                    report()
                answer = ray.get(ref)
            except RayActorError as error:
                ref = self._replace(index, error).call.remote(method, *arguments)
        if answer.error is not None:
            raise answer.error
        if answer.version != version:
            raise PoiseError(
                f"engine {index} of the sampler answers with weights of version {answer.version}, not {version}"
            )
        return answer.value

    def _replace(self, index: int, error: RayActorError) -> Any:
        """Start a new engine in place of one that died. Returns its handle once it has the weights of the pool."""
        if self._remaining_restarts == 0 or error.actor_init_failed:
            raise PoiseError(f"engine {index} of the sampler died, and no more may be started:\n{error}") from None
        self._remaining_restarts -= 1
        self._on_restart(f"engine {index} of the sampler died")
        engine = self._start(index, replace_engine=True)
        self._engines[index] = engine
        ref, _ = self._starting.pop(index)
        # An actor with concurrency groups may run calls out of order, so each call waits for the one before it.
        try:
            answer: Answer = ray.get(ref, timeout=_START_WITHIN_S)
            if answer.error is None and self._weights is not None:
                answer = ray.get(engine.call.remote("update_weights", self._weights, self._version))
        except RayActorError as again:
            return self._replace(index, again)
        except GetTimeoutError:
            return self._give_up(index, inherited=False)
        if answer.error is not None:
            raise answer.error
        return engine

    def _start(self, index: int, *, replace_engine: bool = False) -> Any:
        """Start engine `index` and return its handle; `_starting` gets the reference of its first answer."""
        start = partial(start_engine, self._spec, self._folder.path, self._files)
        if self._owner is None:
            engine = start()
            inherited = False
        else:
            engine, inherited = ray.get(self._owner.engine.remote(index, start, replace_engine))
        self._starting[index] = engine.ready.remote(), inherited
        return engine

    @cached_property
    def _initial_weights(self) -> Any:
        """A reference to the weights of the folder in Ray's object store, for engines with weights of an earlier
        worker."""
        weights: dict[str, Tensor] = {}
        for file in sorted(self._folder.path.glob("*.safetensors")):
            weights.update(load_file(file))
        return ray.put(weights)

    def _stop(self) -> None:
        for engine in self._engines:
            ray.kill(engine)
        if self._owner is not None:
            self._owner.forget_engines.remote()
