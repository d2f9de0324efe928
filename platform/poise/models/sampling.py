"""What every sampler of a language model does, be it a pool of vLLM engines or transformers in this process.

Invariant: what a request yields is a function of the weights, of the request and of the decoding alone. A request that
is asked again after a crash gives the same samples.
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
"""Is called with the number of requests that are answered so far."""


def no_progress(answered: int) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: softmax(logits / temperature), its top_p nucleus, until a stop token or max_tokens.

    Temperature 0 is greedy. Log-probabilities of samples are those of the model at temperature 1, before top_p.
    With `stop`, a response also ends with the token that completes one of these strings in its text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """`n` samples to be drawn after one prompt; sample j is drawn from seed + j, so seeds of requests lie n apart."""

    id: str
    prompt: tuple[int, ...]
    n: int
    seed: int


@dataclass(frozen=True, slots=True, init=False)
class Sample:
    """One response: its tokens and the log-probability of each.

    The stop token, or the token that completed a stop string, is the last one; `finish` says which it was, or that the
    response was truncated. A run holds millions of tokens, so they are kept as bytes: 12 per token, where tuples of
    Python numbers take 70.
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
            object.__setattr__(self, name, value)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids, made anew at each call."""
        return tuple(np.frombuffer(self.token_bytes, dtype=np.int32).tolist())

    @property
    def logprobs(self) -> tuple[float, ...]:
        """log p of each token (nats), made anew at each call."""
        return tuple(np.frombuffer(self.logprob_bytes, dtype=np.float64).tolist())

    @property
    def num_tokens(self) -> int:
        return len(self.token_bytes) // np.dtype(np.int32).itemsize

    @property
    def is_truncated(self) -> bool:
        """True when max_tokens ended the response, not the model."""
        return self.finish == "length"


class StopStrings:
    """Finds where the text of one response first contains one of some strings, token by token.

    The text is what the tokenizers library decodes incrementally after the prompt, special tokens left out; vLLM
    decodes in the same way, so that both samplers end a response with the same token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop))
        self._tail = ""  # the end of the text, in which a string may have begun

    def completed_by(self, token: int) -> bool:
        """True when `token`, the next of the response, completes a stop string."""
        text = self._tail + (self._stream.step(self._tokenizer, token) or "")
        self._tail = text[len(text) - self._longest + 1 :] if len(text) >= self._longest else text
        return any(string in text for string in self._stop)


class Sampler(Protocol):
    """A language model that answers."""

    @property
    def version(self) -> int:
        """The version of the weights that answer, 0 for those that it was opened with."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        """The samples of each request, in the order of requests and of their indices."""

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | all before it) of each token of each response after its prompt, at temperature 1 (nats)."""

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights. PoiseError when names, shapes or checksums differ, or `version` is not newer."""
