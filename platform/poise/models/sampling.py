"""What every sampler of a language model does, be it a pool of vLLM engines or transformers in this process.

Invariant: what a request yields is a function of the weights, of the request and of the decoding alone. A request that
is asked again after a crash gives the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

__all__ = ["Decoding", "Request", "Sample", "Sampler"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn: softmax(logits / temperature), its top_p nucleus, until a stop token or max_tokens.

    Temperature 0 is greedy. Log-probabilities of samples are those of the model at temperature 1, before top_p.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """`n` samples to be drawn after one prompt; sample j is drawn from seed + j, so seeds of requests lie n apart."""

    id: str
    prompt: tuple[int, ...]
    n: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One response: its tokens, the stop token included where it ended by itself, and the log-probability of each."""

    request: str
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    version: int


class Sampler(Protocol):
    """A language model that answers."""

    @property
    def version(self) -> int:
        """The version of the weights that answer, 0 for those that it was opened with."""

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Sample]]:
        """The samples of each request, in the order of requests and of their indices."""

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token | all before it) of each token of each response after its prompt, at temperature 1 (nats)."""

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights. PoiseError when names, shapes or checksums differ, or `version` is not newer."""
