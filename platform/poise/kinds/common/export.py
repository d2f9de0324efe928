"""Export of the trained model: rehearsed before the first step, and compared with the model in memory at the end."""

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

__all__ = ["export_model", "next_token_probabilities", "probe_sequences", "rehearse_export"]

MAX_TOTAL_VARIATION = 1e-3
"""Two models whose next-token distributions differ by more are not the same; rounding alone gives about 1e-5."""

_PROBES = 4
_PROBE_TOKENS = 16


def probe_sequences(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The first few of the sequences, shortened, on which the trained and the exported model are compared."""
    return [tuple(sequence[:_PROBE_TOKENS]) for sequence in sequences[:_PROBES] if sequence]


@torch.no_grad()
def next_token_probabilities(model: nn.Module, probes: Sequence[Sequence[int]]) -> Tensor:
    """The next-token distribution after every token of the probes: (total tokens, V) in float32, on the CPU."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits = []
    try:
        for probe in probes:
            input_ids = torch.tensor([probe], device=device)  # (1, tokens)
            logits.append(model(input_ids=input_ids, use_cache=False).logits[0])  # (tokens, V)
    finally:
        model.train(training)
    return torch.cat(logits).float().softmax(-1).cpu()


def rehearse_export(model: nn.Module, tokenizer: Tokenizer, probes: Sequence[Sequence[int]], context: Context) -> None:
    """Export the model as it is now, open the export and compare, so that a failure is found before the training.

    All ranks call it; rank 0 writes to a temporary folder.

    Raises:
        UserError: why the model could not be exported at the end.
    """
    context.on_main(lambda: _rehearse(model, tokenizer, probes))


def export_model(
    model: nn.Module, tokenizer: Tokenizer, probes: Sequence[Sequence[int]], expected: Tensor, context: Context
) -> None:
    """Write the model of this run into the store, as plain files under artifacts/model/; one rank calls it.

    The export is opened and compared before it is uploaded. `expected`: the `next_token_probabilities` of the trained
    model on `probes`.

    Raises:
        PoiseError: the export gives other probabilities. The store then has the checkpoints only.
    """
    context.check_lease()
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
    except Exception as error:  # transformers has no exception class of its own for a model that it cannot write
        reason = " ".join(str(error).split()) or type(error).__name__
        cure = "; set TMPDIR to a folder with room for the model" if "No space left" in reason else ""
        raise PoiseError(f"transformers cannot save it into {folder.parent}: {reason}{cure}") from error


def _check(folder: Path, probes: Sequence[Sequence[int]], expected: Tensor, device: torch.device) -> None:
    """Compare the model in a folder with the expected probabilities.

    Raises:
        PoiseError: they differ by more than rounding.
    """
    exported, _ = open_folder(folder)
    probabilities = next_token_probabilities(exported.to(device), probes)
    if probabilities.shape != expected.shape:
        raise PoiseError(
            f"the exported model has {probabilities.shape[1]} tokens and the trained one {expected.shape[1]}"
        )
    distance = float(0.5 * (probabilities - expected).abs().sum(-1).max())  # largest total variation
    if not distance <= MAX_TOTAL_VARIATION:  # also true for NaN
        raise PoiseError(
            f"the exported model is not the one that was trained: the probabilities of the next token differ by up to "
            f"{distance:.2g}; the checkpoints of the run are kept"
        )
