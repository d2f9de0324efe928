"""Examination of a model folder before anything is loaded, with a one-line error for what Poise cannot use.

Only small files are read: config.json, the tokenizer's files and the headers of the safetensors files. torch and
transformers are not imported, so that `poise check` can examine a folder in a fraction of a second. Faults that only
the opened model shows (missing weights, attention to later tokens) are checked by `open_folder`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from poise.errors import UserError
from poise.models.stored_weights import LFS_POINTER, StoredTensor, begin_alike, read_header

__all__ = ["FolderFacts", "context_length", "examine_folder", "has_tokenizer", "read_json"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
)
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings", "tokens_embed")
_HEADS = ("lm_head.weight", "embed_out.weight")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_FLOATING = ("F64", "F32", "F16", "BF16")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length")

_ENCODER_DECODERS = """
    bart bigbird_pegasus blenderbot blenderbot-small byt5 fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-
    moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma trocr umt5 whisper
"""
_BIDIRECTIONAL = """
    albert bert bert-generation big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie
    eurobert longformer megatron-bert modernbert mpnet nomic_bert rembert roberta roberta-prelayernorm
    roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""
_RECURRENT = "falcon_mamba mamba mamba2 recurrent_gemma reformer rwkv xlstm"


@dataclass(frozen=True)
class FolderFacts:
    """The facts that the files of a model folder state.

    Attributes:
        config: the content of config.json.
        shapes: the shape of every stored weight by name.
        vocabulary: rows of the token embedding; None where the files do not state it.
        context: longest sequence in tokens; None where the files do not state it.
    """

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: int | None
    context: int | None


def examine_folder(folder: str | Path, *, tokenizer: bool = True) -> FolderFacts:
    """The facts of a local folder with a language model, as `save_pretrained` of transformers writes it.

    Takes milliseconds; imports neither torch nor transformers.

    Args:
        folder: as the user wrote it; `~` is resolved.
        tokenizer: whether the folder must hold a tokenizer too.

    Raises:
        UserError: Poise cannot use the folder; the message says in one line why, and what to do instead.
    """
    path = _existing(folder)
    _check_adapter(path)
    config = _config(path)
    _check_architecture(path, config)
    tensors = _stored_weights(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    _check_layers(path, config, shapes)
    _check_tied(path, config, tensors)
    vocabulary = _vocabulary(path, config, shapes)
    if tokenizer:
        _check_tokenizer(path)
    return FolderFacts(path, config, shapes, vocabulary, context_length(config))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError that names the file where it holds anything else."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if data.startswith(LFS_POINTER):
        raise UserError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser().absolute()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{folder} is a file; name the folder that a model was saved into")
    if _HUB_NAME.fullmatch(str(folder)):
        raise UserError(
            f"there is no folder {folder!r}; if it is the name of a model on a hub: nothing is downloaded, "
            "so fetch it into a folder first and name that folder"
        )
    raise UserError(f"there is no folder {folder!s}")


def _check_adapter(path: Path) -> None:
    """UserError for an adapter: transformers would load the base model that it names, wherever that is."""
    if not (path / "adapter_config.json").is_file():
        return
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    raise UserError(
        f"{path} holds an adapter of {base or 'another model'}, not a model: merge the adapter into its base model "
        "(merge_and_unload of peft) and save the result"
    )


def _config(path: Path) -> dict[str, Any]:
    """The content of config.json; UserError for a folder in another format."""
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    if any(path.glob("*.gguf")):
        raise UserError(f"{path} holds GGUF files (no config.json): name a folder as transformers saves it")
    if (path / "params.json").is_file():
        raise UserError(f"{path} is in Meta's own format (no config.json): convert it to that of transformers first")
    raise UserError(f"{path} holds no model as transformers saves it (no config.json)")


def _check_architecture(path: Path, config: Mapping[str, Any]) -> None:
    """UserError for everything but a decoder of text with plain floating-point weights."""
    kind = str(config.get("model_type") or "unknown")
    if not config.get("model_type") and not config.get("architectures"):
        raise UserError(f"{path}/config.json does not say which model it is: it has no model_type")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(f"{path} holds quantised weights ({method}): Poise needs the model in floating point")
    if config.get("is_encoder_decoder") or kind in _ENCODER_DECODERS.split():
        raise UserError(f"{path} holds an encoder-decoder model ({kind}): Poise trains and samples decoders only")
    if kind in _BIDIRECTIONAL.split() and not config.get("is_decoder"):
        raise UserError(
            f"{path} holds a model that sees the tokens after each position ({kind}), which cannot be trained to "
            "continue a text: name a decoder"
        )
    if kind in _RECURRENT.split():
        raise UserError(f"{path} holds a recurrent model ({kind}): Poise trains and samples attention models only")
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise UserError(
            f"{path} holds a {names[0]}, which has no head for the next token: name a causal language model"
        )


def _stored_weights(path: Path) -> dict[str, StoredTensor]:
    """Every weight that transformers would load, by name."""
    tensors: dict[str, StoredTensor] = {}
    for name in _weight_files(path):
        tensors |= read_header(path / name)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype not in _FLOATING:
            raise UserError(
                f"{path} holds quantised weights ({name} is {tensor.dtype}): Poise needs them in floating point"
            )
    return tensors


def _weight_files(path: Path) -> list[str]:
    """The names of the safetensors files that transformers would load; UserError where one is missing."""
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} does not say which file holds which weight (weight_map)")
        names = sorted({str(name) for name in weight_map.values()})
        if missing := [name for name in names if not (path / name).is_file()]:
            raise UserError(f"{path}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}")
        return names
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise UserError(
            f"{path} holds pickled weights, which Poise does not open: save the model anew as safetensors "
            "(save_pretrained of transformers does)"
        )
    other = next(path.glob("*.safetensors"), None)
    hint = f"; {other.name} is not where transformers looks" if other else ""
    raise UserError(f"{path} holds no weights (model.safetensors){hint}")


def _check_tied(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """UserError for a stored head that differs from the embedding that it is tied to.

    transformers would use the stored head, vLLM the embedding.
    """
    if config.get("tie_word_embeddings") is not True:
        return
    heads = [tensor for name, tensor in tensors.items() if name.endswith(_HEADS)]
    embeddings = [tensor for name, tensor in tensors.items() if _is_embedding(name, tensor.shape)]
    if heads and embeddings and not begin_alike(heads[0], embeddings[0]):
        raise UserError(
            f"{path}: config.json ties the head to the embedding (tie_word_embeddings), and they are stored with "
            "different values, as after a merge of an adapter: set it to false"
        )


def _check_layers(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError for more stored layers than config.json states: transformers would ignore them without an error."""
    layers = _number(config, _LAYERS)
    matches = [_LAYER.search(name) for name in shapes]
    numbers = [int(match[1]) for match in matches if match]
    if layers is None or not numbers:
        return
    # layers that predict further tokens are numbered after the others
    extra = _number(config, ("num_nextn_predict_layers", "mtp_num_hidden_layers")) or 0
    if max(numbers) >= layers + extra:
        raise UserError(f"{path}: config.json says {layers} layers and {max(numbers) + 1} are stored")


def _vocabulary(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rows of the token embedding; UserError where config.json states another number."""
    vocab_size = _number(config, ("vocab_size",))
    rows = [shape[0] for name, shape in shapes.items() if _is_embedding(name, shape)]
    if not rows or vocab_size is None:
        return rows[0] if rows else vocab_size
    if vocab_size not in rows:
        raise UserError(f"{path}: config.json says vocab_size {vocab_size} and the stored embedding has {rows[0]} rows")
    return vocab_size


def _is_embedding(name: str, shape: tuple[int, ...]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and len(shape) == 2 and module.rpartition(".")[2] in _EMBEDDINGS


def context_length(config: Mapping[str, Any]) -> int | None:
    """The longest sequence, in tokens, of a model with this config; None where the config does not state it."""
    return _number(config, _POSITIONS)


def _number(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first positive number under one of these names in a config, or in its section `text_config`."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for name in names:
            value = part.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf:
                return int(value)
    return None


def has_tokenizer(path: Path) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any(any(path.glob(name)) for name in _TOKENIZER_FILES)


def _check_tokenizer(path: Path) -> None:
    """UserError for a folder without a tokenizer, or whose JSON files for it cannot be read."""
    if not has_tokenizer(path):
        raise UserError(
            f"{path} holds a model without a tokenizer (no tokenizer.json): copy the tokenizer's files from the model "
            "that it was made from"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file():
            read_json(path / name)
