"""The one convention for the tokens that begin, end and pad a text.

Training, export, samplers, oracle and evaluation follow it:

- A prompt begins with the tokens that the tokenizer puts before every text, such as BOS. A rendered prompt that already
  begins with them gets no second copy. Tokens that the tokenizer appends to every text (EOS) are left out, since a
  prompt is continued.
- A completion ends with EOS, the `eos_token` of the tokenizer; if the tokenizer has none, with the first stop token of
  the model.
- A response ends at its first stop token. Stop tokens are those of generation_config.json (of config.json if it names
  none), and EOS.
- Padding is on the right and masked; no loss, logit or metric depends on its id. An export names the padding token of
  the tokenizer for users of other samplers.

Where the files of a folder contradict each other, `notes` says how they are read; an export is written consistently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.errors import UserError
from poise.models.examine import read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["SpecialTokens", "added_tokens", "read_special_tokens", "reconcile"]


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that end a text.

    Attributes:
        eos: the token that training appends to a completion, one of `stop`; None where no token ends a text.
        stop: a response ends at the first of these tokens.
        notes: sentences for the user about contradictions in the files of the model.
    """

    eos: int | None
    stop: frozenset[int]
    notes: tuple[str, ...] = ()


def read_special_tokens(path: Path, config: Any, tokenizer: Tokenizer | None, vocabulary: int) -> SpecialTokens:
    """The special tokens of a model folder.

    Args:
        path: the folder.
        config: its opened config, with the defaults of its class filled in.
        tokenizer: its tokenizer, if it has one.
        vocabulary: rows of its token embedding.

    Raises:
        UserError: EOS lies beyond the rows of the embedding.
    """
    generation = path / "generation_config.json"
    model_stop = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if model_stop is None:
        model_stop = config.eos_token_id
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return _special_tokens(model_stop, eos, vocabulary)


def reconcile(model: nn.Module, tokenizer: Tokenizer) -> SpecialTokens:
    """Make the special tokens of an opened model and its tokenizer consistent, in place, and return them.

    Afterwards the configs of the model name EOS first among the stop tokens, and the tokenizer has an EOS if there is
    any stop token. BOS and padding of the configs become those of the tokenizer where it has them. Sampling settings
    that transformers can open but refuses to save are removed.

    Raises:
        UserError: EOS lies beyond the rows of the embedding.
    """
    configs: list[Any] = [model.config, model.generation_config]
    model_stop = next((config.eos_token_id for config in reversed(configs) if config.eos_token_id is not None), None)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    special = _special_tokens(model_stop, tokenizer.eos_token_id, vocabulary)
    special = replace(special, notes=(*special.notes, *_drop_unused_settings(model.generation_config)))
    if special.eos is None:
        return special
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(special.eos)
    others = sorted(special.stop - {special.eos})
    for config in configs:
        config.eos_token_id = [special.eos, *others] if others else special.eos
        for name in ("bos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)
            if token is not None and token < vocabulary:
                setattr(config, name, token)
    return special


def _drop_unused_settings(generation: Any) -> list[str]:
    """Remove sampling settings from a generation config without `do_sample: true`, and return notes about them.

    transformers opens such a config, but refuses to save it.
    """
    unused = [name for name in _SAMPLING if getattr(generation, name, None) is not None]
    if generation.do_sample or not unused:
        return []
    try:
        generation.validate(strict=True)
    except ValueError:
        for name in unused:
            setattr(generation, name, None)
        return [f"generation_config.json sets {', '.join(unused)} without do_sample: true: left out of the export"]
    return []


def added_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before every text, such as BOS, and those that it puts after it, such as EOS."""
    whole = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _special_tokens(model_stop: Any, eos: int | None, vocabulary: int) -> SpecialTokens:
    """The special tokens from the `eos_token_id` of a model, one or several, and the EOS of its tokenizer."""
    stated: list[Any] = []
    if isinstance(model_stop, list | tuple):
        stated = list(model_stop)
    elif model_stop is not None:
        stated = [model_stop]
    ids = [token for token in stated if isinstance(token, int)]
    if wrong := [token for token in stated if not isinstance(token, int)]:
        raise UserError(f"eos_token_id of the model's configs holds {wrong[0]!r}, which is no token id")
    within = [token for token in ids if 0 <= token < vocabulary]
    notes = [f"the stop token {token} is beyond the embedding and never said" for token in ids if token not in within]
    if eos is not None and eos >= vocabulary:
        raise UserError(f"the EOS of the tokenizer is token {eos}, and the model has embeddings of {vocabulary} tokens")
    if eos is None and within:
        notes.append(
            f"the tokenizer has no EOS: completions end with token {within[0]}, the first that the model names"
        )
    elif within and eos not in within:
        notes.append(
            f"the tokenizer ends a text with token {eos} and the model's configs with {within}: completions are "
            f"trained to end with {eos}, and responses end at any of them"
        )
    end = eos if eos is not None else next(iter(within), None)
    stop = frozenset(within) if end is None else frozenset({*within, end})
    return SpecialTokens(end, stop, tuple(notes))
