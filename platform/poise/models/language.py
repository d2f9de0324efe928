"""Language models: opened from a run, a folder or S3, created, exported, and scored.

A stored model is a plain folder as transformers saves it, which vLLM loads too: config.json, generation_config.json,
model.safetensors (shared tensors once), tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.errors import UserError
from poise.models.examine import examine_folder
from poise.models.scoring import position_logits
from poise.models.spec import LanguageModelSpec
from poise.models.special_tokens import reconcile
from poise.store.runs import open_run
from poise.store.storage import open_storage, scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = [
    "MODEL_FOLDER",
    "answer_logprobs",
    "export",
    "fetch_folder",
    "new_llama",
    "open_config",
    "open_folder",
    "open_language_model",
    "open_model",
    "open_tokenizer",
]

MODEL_FOLDER = "artifacts/model"
"""The folder of a run that holds its final model."""


def open_language_model(
    spec: LanguageModelSpec, store: str, seed: int, tokenizer: Tokenizer | None = None
) -> tuple[nn.Module, Tokenizer]:
    """The model in float32 on the CPU, in training mode, and its tokenizer.

    A new model takes `tokenizer` and its vocabulary, and draws its weights by `seed`. Any other model comes
    with a tokenizer.

    Raises:
        UserError: there is no such run, or the folder holds no language model.
    """
    if spec.name is not None:
        if tokenizer is None:
            raise ValueError("a new model needs a tokenizer")
        return new_llama(spec, tokenizer, seed), tokenizer
    with scratch_folder() as scratch:
        return open_folder(fetch_folder(spec, store, scratch / "model"))


def open_folder(folder: Path) -> tuple[nn.Module, Tokenizer]:
    """The model of a local folder in float32 on the CPU, in training mode, and its tokenizer.

    Raises:
        UserError: Poise cannot use the folder, see `examine_folder` and `open_model`.
    """
    examine_folder(folder)
    model = open_model(folder)
    tokenizer = open_tokenizer(folder)
    return model.train(), tokenizer


def open_model(folder: Path) -> nn.Module:
    """The model of a local folder in float32 on the CPU, in evaluation mode.

    Raises:
        UserError: transformers cannot open it; weights of the architecture are missing (transformers would draw them at
            random) or have another shape; or the model does not continue a text as a decoder does.
    """
    from transformers import AutoModelForCausalLM

    _silence_transformers()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the error below names them in one line
            output_loading_info=True,
        )
    except Exception as error:  # transformers has no exception class for a folder that it cannot open
        raise UserError(
            f"{folder} holds no language model that transformers can open: {_in_one_line(error)}"
        ) from error
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise UserError(
            f"{folder}: {len(mismatched)} weights are not of the shape that config.json gives them, first {name}: "
            f"{list(stored)} instead of {list(expected)}"
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} weights of its architecture, first {missing[0]}: they would be random"
        )
    opened: nn.Module = model.eval()
    _check_continues(opened, folder)
    return opened


def open_config(folder: Path) -> Any:
    """The config of a local folder, with the defaults of its class; UserError where transformers cannot open it."""
    from transformers import AutoConfig

    _silence_transformers()
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has no exception class for a folder that it cannot open
        raise UserError(f"{folder}/config.json cannot be opened by transformers: {_in_one_line(error)}") from error


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a local folder.

    Raises:
        UserError: transformers can open none, or the tokenizer has no tokens.
    """
    from transformers import AutoTokenizer

    _silence_transformers()
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has no exception class for a folder that it cannot open
        raise UserError(f"{folder} holds no tokenizer that transformers can open: {_in_one_line(error)}") from error
    if not tokenizer("a text", add_special_tokens=False).input_ids:
        raise UserError(f"{folder} holds a tokenizer without tokens: copy its files again from the original model")
    return tokenizer


def fetch_folder(spec: LanguageModelSpec, store: str, into: Path) -> Path:
    """A local folder with the model of another run, of a folder or of S3; files are downloaded `into` a new folder.

    A local folder is returned as it is.

    Raises:
        UserError: the spec is of a new model, there is no such run, or there is no model.
    """
    if spec.run is not None:
        run = open_run(store, spec.run, must_exist=True)
        for path in run.committed_files(f"{MODEL_FOLDER}/"):
            run.download(path, into / path.removeprefix(f"{MODEL_FOLDER}/"))
        return _examine_download(into, f"run {spec.run!r} has left no model in {run.url}/{MODEL_FOLDER}/")
    if spec.folder is None:
        raise UserError("model: a new model is in no folder; name a `run` or a `folder`")
    if not spec.folder.startswith("s3://"):
        return examine_folder(spec.folder).path
    storage = open_storage(spec.folder)
    for entry in storage.list():
        if "/" not in entry.key:
            storage.download(entry.key, into / entry.key)
    return _examine_download(into, f"{spec.folder} holds no model: there is no file in it")


def new_llama(spec: LanguageModelSpec, tokenizer: Tokenizer, seed: int) -> nn.Module:
    """A Llama with random weights, a function of `seed` alone; the global random state is not changed.

    Embedding and head are not tied, so that every tensor has one name, in checkpoints and in the export.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=4 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=spec.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config).float().train()
    return model


def export(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a transformers model and its tokenizer into a folder, as plain files that transformers and vLLM load.

    Model and tokenizer are reconciled in place first, so that the written configs name the special tokens that the
    model was trained with.
    """
    _silence_transformers()
    reconcile(model, tokenizer)
    model.save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def answer_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    batch_size: int = 512,
    stop: Collection[int] = (),
) -> list[Tensor]:
    """log p(answer | prompt) in nats of every answer to every prompt, as the sum over the tokens of the answer.

    Args:
        model: in transformers' calling convention; evaluated in evaluation mode, then put back into its mode.
        prompts: token ids of each prompt.
        answers: for each prompt the token ids of its answers, EOS included.
        batch_size: number of sequences that are evaluated at once.
        stop: the tokens that end a response. For an answer that ends in one of them, the probabilities of all of them
            are summed at that position, since responses that differ only in their stop token are the same answer.

    Returns:
        One float32 tensor (number of answers,) for each prompt, on the CPU.
    """
    pairs = [(prompt, answer) for prompt, its_answers in zip(prompts, answers, strict=True) for answer in its_answers]
    training = model.training
    model.eval()
    try:
        parts = [
            _score_batch(model, pairs[start : start + batch_size], sorted(stop))
            for start in range(0, len(pairs), batch_size)
        ]
    finally:
        model.train(training)
    return list(torch.split(torch.cat(parts), [len(its_answers) for its_answers in answers]))


def _score_batch(model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], stop: Sequence[int]) -> Tensor:
    """log p of the answers of B pairs of prompt and answer, (B,) on the CPU.

    Sequences are padded on the right, where causal attention ignores the padding.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
    begin = torch.tensor([len(prompt) for prompt, _ in pairs], device=device)  # (B,)
    end = torch.tensor([len(row) for row in rows], device=device)  # (B,)
    column = torch.arange(tokens.shape[1], device=device)  # (T,)
    # the token after each selected position belongs to the answer
    selected = (column >= begin[:, None] - 1) & (column < end[:, None] - 1)  # (B, T)
    stop_ids = torch.tensor(stop, dtype=torch.int64, device=device)
    logprobs = torch.zeros(tokens.shape, device=device)
    for part in position_logits(model, tokens, column < end[:, None], selected):
        log_p = part.logits.log_softmax(-1)  # (M, V)
        next_token = tokens[part.rows, part.columns + 1]  # (M,)
        token_logprob = log_p.gather(-1, next_token[:, None])[:, 0]
        if stop:
            is_end = (part.columns + 2 == end[part.rows]) & torch.isin(next_token, stop_ids)
            token_logprob = token_logprob.where(~is_end, log_p[:, stop_ids].logsumexp(-1))
        logprobs[part.rows, part.columns] = token_logprob
    return logprobs.sum(1).cpu()


@torch.no_grad()
def _check_continues(model: nn.Module, folder: Path) -> None:
    """UserError where logits are NaN or depend on later tokens, or where the model cannot continue from a cache.

    Samplers rely on these properties. They are tried on four tokens, since no list of architectures is complete.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.arange(4) % vocabulary
    other = torch.cat([ids[:-1], (ids[-1:] + 1) % vocabulary])  # differs in the last token alone
    # the tolerances below are relative and far above the rounding of float32
    logits = model(input_ids=torch.stack([ids, other]), use_cache=False).logits.float()  # (2, 4, V)
    if logits.isnan().any():
        raise UserError(f"{folder} holds a model whose logits are no numbers: its weights are damaged or have diverged")
    scale = float(logits.abs().max())
    if float((logits[0, :-1] - logits[1, :-1]).abs().max()) > 1e-3 * scale:  # a causal model gives equal logits
        raise UserError(f"{folder} holds a model that sees the tokens after each position: it cannot continue a text")
    prefix = model(input_ids=ids[None, :-1], use_cache=True)
    cache = getattr(prefix, "past_key_values", None)
    if cache is None:
        raise UserError(f"{folder} holds a model that keeps no keys and values of earlier tokens: it cannot be sampled")
    continuation = model(input_ids=ids[None, -1:], past_key_values=cache, use_cache=True).logits.float()  # (1, 1, V)
    if float((continuation[0, -1] - logits[0, -1]).abs().max()) > 1e-2 * scale:
        raise UserError(f"{folder} holds a model that goes on otherwise from its cache than from the whole text")


def _in_one_line(error: Exception) -> str:
    """The message of a library's error, cut after 300 characters. A KeyError has the key alone as its message."""
    words = " ".join(str(error).split()) or type(error).__name__
    words = f"unknown {words}" if isinstance(error, KeyError) else words
    return words if len(words) <= 300 else f"{words[:300]} ..."


def _silence_transformers() -> None:
    """Switch off the progress bars and warnings of transformers, which would disturb the display of Poise."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _examine_download(folder: Path, missing: str) -> Path:
    """The folder of a download after its examination; UserError with the message `missing` where nothing came."""
    if not folder.is_dir():
        raise UserError(missing)
    return examine_folder(folder).path
