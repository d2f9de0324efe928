"""Logits of a language model at chosen positions, a bounded number of them at a time.

The logits of a whole batch are by far the largest tensor of an evaluation: 256 sequences of 165 tokens with a
vocabulary of 151,936 have 26 GB. Here the head is applied only where something is scored, to `VALUES_AT_ONCE` numbers
at a time; a sequence that needs more is passed through the model again for each part. The results are those of one
pass over everything, up to the rounding of its matrix products.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TOKENS_AT_ONCE", "VALUES_AT_ONCE", "PositionLogits", "position_logits"]

VALUES_AT_ONCE = 2**26
"""Logits that a forward pass returns at most: 256 MiB in float32."""

TOKENS_AT_ONCE = 2**15
"""Tokens of a forward pass, padding included."""


class PositionLogits(NamedTuple):
    """Logits (M, V) in float32 of M positions, and the row and column (M,) of each."""

    rows: Tensor
    columns: Tensor
    logits: Tensor


def position_logits(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    selected: Tensor,
    *,
    values_at_once: int | None = None,
    tokens_at_once: int | None = None,
) -> Iterator[PositionLogits]:
    """The logits of every selected position, each once.

    Args:
        model: in transformers' calling convention, already in evaluation mode; call this without gradients.
        ids: (B, T) int64, padded on the right.
        mask: (B, T), 0 on padding.
        selected: (B, T) bool; what is selected of a row is a run of positions without gaps, or nothing.
        values_at_once, tokens_at_once: bounds on a forward pass; a single position and a single row are the least.
    """
    values, tokens = values_at_once or VALUES_AT_ONCE, tokens_at_once or TOKENS_AT_ONCE
    vocabulary, keeps = int(model.config.vocab_size), _keeps_logits(model)  # type: ignore[union-attr, arg-type]
    for group in _groups(mask, selected, max(1, values // vocabulary), tokens, whole_rows=not keeps):
        width = int(mask[group].sum(1).max())
        columns = selected[group].any(0).nonzero()[:, 0]
        step = max(1, values // (vocabulary * len(group))) if keeps else len(columns)
        for part in torch.split(columns, step):
            options = {"logits_to_keep": part} if keeps else {}
            inputs = {"input_ids": ids[group, :width], "attention_mask": mask[group, :width].long()}
            logits = model(**inputs, use_cache=False, **options).logits  # (group, part or width, V)
            logits = logits if keeps else logits[:, part]
            places = selected[group][:, part].nonzero()  # (M, 2)
            for place in torch.split(places, max(1, values // (4 * vocabulary))):
                yield PositionLogits(group[place[:, 0]], part[place[:, 1]], logits[place[:, 0], place[:, 1]].float())


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model can apply its head to some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(base.forward).parameters


class _Extent(NamedTuple):
    """The first selected position of some rows, the one behind the last, and the length of the longest row."""

    first: int
    behind: int
    length: int

    def with_row(self, other: _Extent) -> _Extent:
        return _Extent(min(self.first, other.first), max(self.behind, other.behind), max(self.length, other.length))


def _groups(mask: Tensor, selected: Tensor, positions: int, tokens: int, *, whole_rows: bool) -> Iterator[Tensor]:
    """Rows that are evaluated together: few positions of logits, few tokens, and similar places of what is selected."""
    lengths, chosen = mask.sum(1).tolist(), selected.cpu()
    extents = {
        row: _Extent(0 if whole_rows else places[0], length if whole_rows else places[-1] + 1, length)
        for row, length in enumerate(lengths)
        if (places := chosen[row].nonzero()[:, 0].tolist())
    }
    group: list[int] = []
    extent = _Extent(0, 0, 0)
    for row in sorted(extents, key=extents.__getitem__):
        larger = extent.with_row(extents[row]) if group else extents[row]
        number = len(group) + 1
        if group and (number * (larger.behind - larger.first) > positions or number * larger.length > tokens):
            yield torch.tensor(group, device=mask.device)
            group, larger = [], extents[row]
        group.append(row)
        extent = larger
    if group:
        yield torch.tensor(group, device=mask.device)
