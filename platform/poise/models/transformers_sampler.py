"""The sampler for machines without vLLM: transformers, in this process, in float32 unless told otherwise.

Invariant: a sample is drawn by inverting the distribution function at numbers of its own generator, seeded by the
request's seed plus the sample's index. Which samples share a batch changes only the rounding of the model's logits.
Legend: B samples, T tokens, V vocabulary.
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
from poise.models.examine import has_tokenizer
from poise.models.folder import check_newer, read_folder
from poise.models.language import open_model, open_tokenizer
from poise.models.sampling import Decoding, Finish, ProgressCallback, Request, Sample, StopStrings, no_progress

__all__ = ["TransformersSampler"]


class TransformersSampler:
    """The language model of a local folder; `poise.models.sampling.Sampler` says what it does."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_size: int = 64,
    ) -> None:
        """UserError when the folder holds no language model. With dtype auto, the model computes in float32."""
        self._folder = read_folder(folder)
        self._stop = self._folder.stop
        self._tokenizer = open_tokenizer(folder) if has_tokenizer(folder) else None  # the folder may be gone later
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
        self._folder.check_room((request.prompt for request in requests), decoding.max_tokens)
        rows = [(place, index) for place, request in enumerate(requests) for index in range(request.n)]
        answers: list[list[Sample]] = [[] for _ in requests]
        missing = Counter(place for place, _ in rows)
        for batch in _alike([len(requests[place].prompt) for place, _ in rows], self._batch_size):
            chosen = [rows[row] for row in batch]
            samples = self._draw([(requests[place], index) for place, index in chosen], decoding)
            for (place, _), sample in zip(chosen, samples, strict=True):
                answers[place].append(sample)
                missing[place] -= 1
            on_progress(sum(not count for count in missing.values()))
        return answers

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        pairs = list(zip(prompts, responses, strict=True))
        self._folder.check_room(prompts, 0)
        self._folder.check_room([[*prompt, *response] for prompt, response in pairs], 0)
        scores: list[list[float]] = [[] for _ in pairs]
        for batch in _alike([len(prompt) + len(response) for prompt, response in pairs], self._batch_size):
            ids = torch.tensor([[*pairs[place][0], *pairs[place][1]] for place in batch], device=self._device)
            logprobs_BT = _logprobs(self._model(input_ids=ids).logits[:, :-1], ids[:, 1:])
            for place, row in zip(batch, logprobs_BT.tolist(), strict=True):
                scores[place] = row[len(pairs[place][0]) - 1 :]
        return scores

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self._version)
        self._serve(self._folder.checked(weights), version)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Serve version 0 again, the `weights` that the folder had: somebody else begins to ask."""
        self._serve(self._folder.checked(weights), 0)

    @torch.no_grad()
    def _serve(self, new: Mapping[str, Tensor], version: int) -> None:
        served = self._model.state_dict()
        for name, value in new.items():
            served[name].copy_(value)
        self._version = version

    def _draw(self, rows: Sequence[tuple[Request, int]], decoding: Decoding) -> Iterator[Sample]:
        """The samples of rows whose prompts are equally long."""
        noise_BT = torch.stack([_uniform(request.seed + index, decoding.max_tokens) for request, index in rows])
        ids = torch.tensor([request.prompt for request, _ in rows], device=self._device)
        ends = [self._end(request, decoding) for request, _ in rows]
        tokens, logprobs, cache = [], [], None
        for position in range(decoding.max_tokens):
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits_B1V = output.past_key_values, output.logits
            ids = _choose(logits_B1V[:, 0], decoding, noise_BT[:, position].to(self._device))[:, None]
            tokens.append(ids)
            logprobs.append(_logprobs(logits_B1V, ids))
            for end, token in zip(ends, ids[:, 0].tolist(), strict=True):
                end.read(token)
            if all(end.finish != "length" for end in ends):
                break
        drawn = zip(rows, ends, torch.cat(tokens, 1).tolist(), torch.cat(logprobs, 1).tolist(), strict=True)
        for (request, index), end, row, row_logprobs in drawn:
            length = end.length
            yield Sample(request.id, index, row[:length], row_logprobs[:length], end.finish, self._version)

    def _end(self, request: Request, decoding: Decoding) -> _End:
        if not decoding.stop:
            return _End(self._stop, None)
        if self._tokenizer is None:
            raise UserError(f"{self._folder.path}: stop strings need a tokenizer, and this folder has none")
        return _End(self._stop, StopStrings(self._tokenizer, request.prompt, decoding.stop))


class _End:
    """Where one response ends: it reads the tokens that are drawn, also those after the end, which do not count."""

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


def _alike(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Places of equal length, in batches: nothing is padded, so no row depends on how long another is."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, group in groupby(order, key=lengths.__getitem__):
        places = list(group)
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, T] of logits [B, T, V] and tokens [B, T]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def _choose(logits: Tensor, decoding: Decoding, noise: Tensor) -> Tensor:
    """Tokens [B] of logits [B, V]: greedy, or where the nucleus' distribution function first exceeds the noise [B]."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    unsorted = (logits.double() / decoding.temperature).softmax(-1)
    probabilities, order = unsorted.sort(stable=True, dim=-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    cumulative = probabilities.where(before < decoding.top_p, 0.0).cumsum(-1)
    place = torch.searchsorted(cumulative, (noise * cumulative[:, -1])[:, None], right=True)
    return order.gather(-1, place.clamp(max=order.shape[-1] - 1)).squeeze(-1)
