"""The interface of samplers of a language model: a pool of vLLM engines, or transformers in this process.

Invariant: the samples of a request depend only on the weights, the request and the decoding options. A request that is
repeated after a crash gives the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Decoding", "Finish", "ProgressCallback", "Request", "Sample", "Sampler", "StopStrings", "no_progress"]

Finish = Literal["stop", "stop_string", "length"]
"""Why a response ended: a stop token, a stop string, or max_tokens, which truncates it."""

ProgressCallback = Callable[[int], None]
"""A function that is called with the number of requests answered so far."""


def no_progress(answered: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Decoding:
    """Decoding options. Tokens are drawn from the top_p nucleus of softmax(logits / temperature).

    Temperature 0 is greedy. A response ends at a stop token or after max_tokens. With `stop`, it also ends with the
    token that completes one of these strings in its text. The log-probabilities of samples are those of the model at
    temperature 1, before top_p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """`n` samples to be drawn after one prompt.

    Sample j is drawn with seed + j, so the seeds of two requests must differ by at least n.
    """

    id: str
    prompt: tuple[int, ...]
    n: int
    seed: int


@dataclass(frozen=True, slots=True, init=False)
class Sample:
    """One response: its tokens and the log-probability of each.

    The last token is the stop token or the token that completed a stop string, as `finish` says, unless the response
    was truncated. A run holds millions of tokens, so they are stored as bytes: 12 per token, where tuples of Python
    numbers take 70.
    """

    request: str
    index: int
    finish: Finish
    version: int
    token_bytes: bytes = field(repr=False)
    logprob_bytes: bytes = field(repr=False)

    def __init__(
        self,
        request: str,
        index: int,
        tokens: Sequence[int] | np.ndarray,
        logprobs: Sequence[float] | np.ndarray,
        finish: Finish,
        version: int,
    ) -> None:
        values = {
            "request": request,
            "index": index,
            "finish": finish,
            "version": version,
            "token_bytes": np.asarray(tokens, dtype=np.int32).tobytes(),
            "logprob_bytes": np.asarray(logprobs, dtype=np.float64).tobytes(),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids, decoded at each call."""
        return tuple(np.frombuffer(self.token_bytes, dtype=np.int32).tolist())

    @property
    def logprobs(self) -> tuple[float, ...]:
        """log p of each token (nats), decoded at each call."""
        return tuple(np.frombuffer(self.logprob_bytes, dtype=np.float64).tolist())

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without decoding them."""
        return len(self.token_bytes) // np.dtype(np.int32).itemsize

    @property
    def is_truncated(self) -> bool:
        """True when max_tokens ended the response."""
        return self.finish == "length"


class StopStrings:
    """Finds the token of a response that first completes one of several stop strings.

    The text is decoded incrementally after the prompt by the tokenizers library, without special tokens. vLLM decodes
    in the same way, so that both samplers end a response with the same token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop))
        self._tail = ""  # the last longest - 1 characters of the text, which may hold the beginning of a stop string

    def completed_by(self, token: int) -> bool:
        """True when `token`, the next token of the response, completes a stop string."""
        text = self._tail + (self._stream.step(self._tokenizer, token) or "")
        self._tail = text[len(text) - self._longest + 1 :] if len(text) >= self._longest else text
        return any(string in text for string in self._stop)


class Sampler(Protocol):
    """A language model from which responses can be sampled, and which scores responses."""

    @property
    def version(self) -> int:
        """The version of the served weights; 0 for the weights that the sampler was opened with."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        """The samples of each request, in the order of the requests and of the samples' indices."""

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | all tokens before it) of each token of each response, at temperature 1 (nats)."""

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights. PoiseError when names, shapes or checksums differ, or `version` is not newer."""
