"""The one convention for the tokens that begin, end and pad a text.

Training, export, samplers, oracle and evaluation all take it from here:

- A prompt begins with what the tokenizer puts before every text, such as BOS, once: a rendered prompt that has it
  already gets no second one. What a tokenizer appends to every text (EOS) is left out, since a prompt is continued.
- A completion ends with EOS, the `eos_token` of the tokenizer; where the tokenizer has none, with the first stop token
  of the model.
- A response ends at its first stop token: those of generation_config.json (config.json where it names none), and EOS.
- Padding is on the right and masked; no loss, logit or metric depends on its id. An export names the padding token of
  the tokenizer for whoever samples with other software.

Where a folder disagrees with itself, `notes` says how it is read, and an export is written so that it agrees.
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
    """Ids of the tokens that end a text; `notes` are sentences for people.

    eos: what training puts behind a completion, one of `stop`; None where no token ends a text.
    stop: a response ends at the first of these.
    """

    eos: int | None
    stop: frozenset[int]
    notes: tuple[str, ...] = ()


def read_special_tokens(path: Path, config: Any, tokenizer: Tokenizer | None, vocabulary: int) -> SpecialTokens:
    """Those of a model folder, whose `config` is opened (what it does not state is the default of its class).

    Raises:
        UserError: EOS lies beyond the `vocabulary` rows of the embedding.
    """
    generation = path / "generation_config.json"
    stated = read_json(generation).get("eos_token_id") if generation.is_file() else None
    eos = None if tokenizer is None else tokenizer.eos_token_id
    return _agreed(stated if stated is not None else config.eos_token_id, eos, vocabulary)


def reconcile(model: nn.Module, tokenizer: Tokenizer) -> SpecialTokens:
    """Make an opened model and its tokenizer agree, in place, and return what they agree on.

    Afterwards the configs of the model name EOS first among the stop tokens, and the tokenizer has an EOS if there is
    any stop token. BOS and padding of the configs become those of the tokenizer where it has them. Settings of sampling
    that transformers opens and does not save are dropped.

    Raises:
        UserError: EOS lies beyond the rows of the embedding.
    """
    configs: list[Any] = [model.config, model.generation_config]
    stated = next((config.eos_token_id for config in reversed(configs) if config.eos_token_id is not None), None)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    special = _agreed(stated, tokenizer.eos_token_id, vocabulary)
    special = replace(special, notes=(*special.notes, *_drop_unused_settings(model.generation_config)))
    if special.eos is None:
        return special
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(special.eos)
    others = sorted(special.stop - {special.eos})
    for config in configs:
        config.eos_token_id = [special.eos, *others] if others else special.eos
        for name in ("bos_token_id", "pad_token_id"):
            if (known := getattr(tokenizer, name)) is not None and known < vocabulary:
                setattr(config, name, known)
    return special


def _drop_unused_settings(generation: Any) -> list[str]:
    """transformers opens a generation config that sets a temperature beside `do_sample: false`, and does not save it.

    Returns what was dropped, as sentences.
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
    """What the tokenizer puts before and behind every text, such as BOS and EOS: two tuples of ids."""
    whole = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _agreed(stated: Any, eos: int | None, vocabulary: int) -> SpecialTokens:
    """From the stop tokens that a model states and the EOS of its tokenizer."""
    found: list[Any] = list(stated) if isinstance(stated, list | tuple) else [] if stated is None else [stated]
    ids = [token for token in found if isinstance(token, int)]
    if wrong := [token for token in found if not isinstance(token, int)]:
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
    chosen = eos if eos is not None else next(iter(within), None)
    stop = frozenset(within) if chosen is None else frozenset({*within, chosen})
    return SpecialTokens(chosen, stop, tuple(notes))
