"""The model that a run leaves: tried before the first step, and measured to be the model that was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from poise.errors import PoiseError, UserError
from poise.models.language import MODEL_FOLDER, export, open_folder
from poise.observe.events import event
from poise.store.storage import scratch_folder
from poise.train.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["keep_model", "next_token_probabilities", "probe_sequences", "rehearse_export"]

LARGEST_DISTANCE = 1e-3
"""Total variation between next-token distributions beyond which two models are not the same; rounding gives 1e-5."""

_PROBES, _PROBE_TOKENS = 4, 16


def probe_sequences(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """A few short sequences of those that a run is about, on which two models are compared."""
    return [tuple(sequence[:_PROBE_TOKENS]) for sequence in sequences[:_PROBES] if sequence]


@torch.no_grad()
def next_token_probabilities(model: nn.Module, probes: Sequence[Sequence[int]]) -> Tensor:
    """The distribution after every token of the probes, in their order: (total tokens, V) in float32, on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        logits = [model(input_ids=torch.tensor([probe], device=device), use_cache=False).logits[0] for probe in probes]
    finally:
        model.train(training)
    return torch.cat(logits).float().softmax(-1).cpu()


def rehearse_export(model: nn.Module, tokenizer: Tokenizer, probes: Sequence[Sequence[int]], context: Context) -> None:
    """Try what the end of the run will need: write the model as it is now, open it, and compare. All ranks call it.

    Raises:
        UserError: why the model could not be left at the end.
    """
    context.together(lambda: _rehearse(model, tokenizer, probes))


def keep_model(
    model: nn.Module, tokenizer: Tokenizer, probes: Sequence[Sequence[int]], expected: Tensor, context: Context
) -> None:
    """Write the model of this run into the store, as plain files under artifacts/model/; one rank calls it.

    `expected` are the `next_token_probabilities` of the model that was trained. What is written is opened again first.

    Raises:
        PoiseError: what was written answers otherwise. Nothing is kept then but the checkpoints.
    """
    context.guard()
    with scratch_folder() as scratch:
        _write(model, tokenizer, scratch)
        _check(scratch, probes, expected, context.device)
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        names = [path.relative_to(scratch).as_posix() for path in files]
        for path, name in zip(files, names, strict=True):
            context.run.upload(path, f"{MODEL_FOLDER}/{name}")
    context.run.append_events([event("model", files=names)])


def _rehearse(model: nn.Module, tokenizer: Tokenizer, probes: Sequence[Sequence[int]]) -> None:
    expected = next_token_probabilities(model, probes)
    with scratch_folder() as scratch:
        try:
            _write(model, tokenizer, scratch)
            _check(scratch, probes, expected, next(model.parameters()).device)
        except PoiseError as error:
            raise UserError(f"the model could not be exported at the end of this run: {error}") from error


def _write(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    try:
        export(model, tokenizer, folder)
    except Exception as error:  # transformers has no class for what it cannot write
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "; set TMPDIR to a folder with room for the model" if "No space left" in reason else ""
        raise PoiseError(f"transformers cannot save it into {folder.parent}: {reason}{cure}") from error


def _check(folder: Path, probes: Sequence[Sequence[int]], expected: Tensor, device: torch.device) -> None:
    """PoiseError unless the model in a folder gives the expected probabilities, to rounding."""
    exported, _ = open_folder(folder)
    found = next_token_probabilities(exported.to(device), probes)
    if found.shape != expected.shape:
        raise PoiseError(f"the exported model has {found.shape[1]} tokens and the trained one {expected.shape[1]}")
    distance = float(0.5 * (found - expected).abs().sum(-1).max())
    if not distance <= LARGEST_DISTANCE:
        raise PoiseError(
            f"the exported model is not the one that was trained: the probabilities of the next token differ by up to "
            f"{distance:.2g}; the checkpoints of the run are kept"
        )
