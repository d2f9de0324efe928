"""Logits of a language model at selected positions, a bounded number at a time.

The logits of a whole batch are by far the largest tensor of an evaluation: 256 sequences of 165 tokens with a
vocabulary of 151,936 take 26 GB. Here the head is applied only to positions that are scored, for at most
`VALUES_AT_ONCE` logits at a time; a sequence that needs more is passed through the model once for each part. The
results equal those of a single pass up to the rounding of its matrix products.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TOKENS_AT_ONCE", "VALUES_AT_ONCE", "PositionLogits", "position_logits"]

VALUES_AT_ONCE = 2**26
"""The largest number of logits that a forward pass returns: 256 MiB in float32."""

TOKENS_AT_ONCE = 2**15
"""The largest number of tokens of a forward pass, padding included."""


class PositionLogits(NamedTuple):
    """Logits (M, V) in float32 of M positions, with the row and the column (M,) of each position."""

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
        selected: (B, T) bool; the selected positions of a row must be contiguous. A row may have none.
        values_at_once, tokens_at_once: bounds on a forward pass, which has at least one position and one row.
    """
    values = values_at_once or VALUES_AT_ONCE
    tokens = tokens_at_once or TOKENS_AT_ONCE
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    partial_head = _has_partial_head(model)
    for group in _groups(mask, selected, max(1, values // vocabulary), tokens, whole_rows=not partial_head):
        width = int(mask[group].sum(1).max())  # without the padding that all rows of the group have
        columns = selected[group].any(0).nonzero()[:, 0]  # selected in any row of the group
        step = max(1, values // (vocabulary * len(group))) if partial_head else len(columns)
        for part in torch.split(columns, step):
            options = {"logits_to_keep": part} if partial_head else {}
            inputs = {"input_ids": ids[group, :width], "attention_mask": mask[group, :width].long()}
            logits = model(**inputs, use_cache=False, **options).logits  # (group, part or width, V)
            logits = logits if partial_head else logits[:, part]
            places = selected[group][:, part].nonzero()  # (M, 2)
            # the copies in float32 are smaller than the logits themselves
            for place in torch.split(places, max(1, values // (4 * vocabulary))):
                rows, positions = place.unbind(1)
                yield PositionLogits(group[rows], part[positions], logits[rows, positions].float())


def _has_partial_head(model: nn.Module) -> bool:
    """Whether the model can apply its head to a subset of the positions."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(base.forward).parameters


class _Extent(NamedTuple):
    """The first position that some rows need logits at, the end of these positions, and the longest row's length."""

    first: int
    end: int
    length: int

    def union(self, other: _Extent) -> _Extent:
        """The extent of the rows of both."""
        return _Extent(min(self.first, other.first), max(self.end, other.end), max(self.length, other.length))


def _groups(mask: Tensor, selected: Tensor, positions: int, tokens: int, *, whole_rows: bool) -> Iterator[Tensor]:
    """Groups of rows that are evaluated together, as index tensors; rows without selected positions are left out.

    A group has at most `positions` positions of logits and `tokens` tokens, padding included, unless a single row has
    more. `whole_rows`: the head is applied to all positions of a row. Rows are sorted by extent, so that rows of a
    group have their selected positions at similar places.
    """
    lengths = mask.sum(1).tolist()
    selected = selected.cpu()
    extents: dict[int, _Extent] = {}
    for row, length in enumerate(lengths):
        places = selected[row].nonzero()[:, 0].tolist()
        if places:
            extents[row] = _Extent(0, length, length) if whole_rows else _Extent(places[0], places[-1] + 1, length)
    group: list[int] = []
    extent = _Extent(0, 0, 0)
    for row in sorted(extents, key=extents.__getitem__):
        larger = extent.union(extents[row]) if group else extents[row]
        number = len(group) + 1
        # rows of a group are padded to one length, and their logits are computed at one range of positions
        if group and (number * (larger.end - larger.first) > positions or number * larger.length > tokens):
            yield torch.tensor(group, device=mask.device)
            group = []
            larger = extents[row]
        group.append(row)
        extent = larger
    if group:
        yield torch.tensor(group, device=mask.device)
