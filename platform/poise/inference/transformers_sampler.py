"""The sampler for machines without vLLM: transformers in this process, by default in float32.

Invariant: a sample is drawn by inverting the distribution function at uniform numbers of a generator that is seeded by
the request's seed plus the sample's index. The composition of a batch changes only the rounding of the model's logits.
Shapes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from poise.errors import UserError
from poise.inference.sampler import Decoding, Finish, ProgressCallback, Request, Sample, StopStrings, no_progress
from poise.models.examine import has_tokenizer
from poise.models.language import open_model, open_tokenizer
from poise.models.model_folder import check_newer, read_folder

__all__ = ["TransformersSampler"]


class TransformersSampler:
    """A `poise.inference.sampler.Sampler` of the language model in a local folder."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_size: int = 64,
    ) -> None:
        """Open the model; UserError when the folder holds none. With dtype auto it computes in float32.

        All files are read now, since the folder may be temporary.
        """
        self._folder = read_folder(folder)
        self._stop = self._folder.stop
        self._tokenizer = open_tokenizer(folder) if has_tokenizer(folder) else None
        precision = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self._model = open_model(folder).to(device, precision)
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        self._folder.check_context_length((request.prompt for request in requests), decoding.max_tokens)
        # one row per sample: the place of its request, and its index within the request
        rows = [(place, index) for place, request in enumerate(requests) for index in range(request.n)]
        samples: list[list[Sample]] = [[] for _ in requests]
        missing = Counter(place for place, _ in rows)
        lengths = [len(requests[place].prompt) for place, _ in rows]
        for batch in _equal_length_batches(lengths, self._batch_size):
            batch_rows = [rows[row] for row in batch]
            batch_samples = self._draw([(requests[place], index) for place, index in batch_rows], decoding)
            for (place, _), sample in zip(batch_rows, batch_samples, strict=True):
                samples[place].append(sample)
                missing[place] -= 1
            on_progress(sum(not count for count in missing.values()))
        return samples

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        pairs = list(zip(prompts, responses, strict=True))
        self._folder.check_context_length(prompts, 0)
        self._folder.check_context_length([[*prompt, *response] for prompt, response in pairs], 0)
        scores: list[list[float]] = [[] for _ in pairs]
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        for batch in _equal_length_batches(lengths, self._batch_size):
            ids = torch.tensor([[*pairs[place][0], *pairs[place][1]] for place in batch], device=self._device)  # (B, T)
            logprobs = _logprobs(self._model(input_ids=ids).logits[:, :-1], ids[:, 1:])  # (B, T - 1)
            for place, row in zip(batch, logprobs.tolist(), strict=True):
                prompt, _ = pairs[place]
                scores[place] = row[len(prompt) - 1 :]  # the first token of a sequence has no score
        return scores

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self._version)
        self._serve(self._folder.validate_state_dict(weights), version)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Serve version 0 again, with the initial `weights` of the folder, for a worker that was started again."""
        self._serve(self._folder.validate_state_dict(weights), 0)

    @torch.no_grad()
    def _serve(self, new: Mapping[str, Tensor], version: int) -> None:
        served = self._model.state_dict()
        for name, value in new.items():
            served[name].copy_(value)
        self._version = version

    def _draw(self, rows: Sequence[tuple[Request, int]], decoding: Decoding) -> Iterator[Sample]:
        """The samples of rows (request, index of the sample) whose prompts have equal lengths."""
        # (B, max_tokens): every number is drawn now, so that it does not depend on when other responses end
        noise = torch.stack([_uniform(request.seed + index, decoding.max_tokens) for request, index in rows])
        ids = torch.tensor([request.prompt for request, _ in rows], device=self._device)  # (B, T), then (B, 1)
        detectors = [self._end_detector(request, decoding) for request, _ in rows]
        tokens: list[Tensor] = []  # one (B, 1) per position
        logprobs: list[Tensor] = []
        cache = None
        for position in range(decoding.max_tokens):
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = _choose(output.logits[:, 0], decoding, noise[:, position].to(self._device))[:, None]
            tokens.append(ids)
            logprobs.append(_logprobs(output.logits, ids))
            for detector, token in zip(detectors, ids[:, 0].tolist(), strict=True):
                detector.read(token)
            if all(detector.finish != "length" for detector in detectors):
                break
        token_rows = torch.cat(tokens, 1).tolist()
        logprob_rows = torch.cat(logprobs, 1).tolist()
        for (request, index), detector, row, row_logprobs in zip(
            rows, detectors, token_rows, logprob_rows, strict=True
        ):
            length = detector.length
            yield Sample(request.id, index, row[:length], row_logprobs[:length], detector.finish, self._version)

    def _end_detector(self, request: Request, decoding: Decoding) -> _EndDetector:
        if not decoding.stop:
            return _EndDetector(self._stop, None)
        if self._tokenizer is None:
            raise UserError(f"{self._folder.path}: stop strings need a tokenizer, and this folder has none")
        return _EndDetector(self._stop, StopStrings(self._tokenizer, request.prompt, decoding.stop))


class _EndDetector:
    """Finds the end of one response. It reads all drawn tokens; those after the end do not change `length`."""

    def __init__(self, stop: frozenset[int], strings: StopStrings | None) -> None:
        self._stop = stop
        self._strings = strings
        self.length = 0
        self.finish: Finish = "length"

    def read(self, token: int) -> None:
        if self.finish != "length":
            return
        self.length += 1
        if token in self._stop:
            self.finish = "stop"
        elif self._strings is not None and self._strings.completed_by(token):
            self.finish = "stop_string"


def _equal_length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of places of sequences with equal lengths: without padding, no row depends on the length of another."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(order, key=lengths.__getitem__):
        places = list(group)
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p (B, T) of tokens (B, T) under logits (B, T, V), in float32 at temperature 1."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def _choose(logits: Tensor, decoding: Decoding, noise: Tensor) -> Tensor:
    """The next tokens (B,) for logits (B, V) and uniform noise (B,) in [0, 1).

    At temperature 0 the likeliest token; otherwise the first token, in order of decreasing probability, at which the
    distribution function of the top_p nucleus exceeds the noise.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    unsorted = (logits.double() / decoding.temperature).softmax(-1)
    probabilities, order = unsorted.sort(stable=True, dim=-1, descending=True)  # (B, V); stable: ties in token order
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    cumulative = probabilities.where(before < decoding.top_p, 0.0).cumsum(-1)
    # the noise is scaled by the mass of the nucleus instead of dividing the nucleus by it
    place = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)  # (B, 1)
    return order.gather(-1, place.clamp(max=order.shape[-1] - 1)).squeeze(-1)
