"""What cannot be done with a model folder is said from its small files, in one line, and by no library's traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.errors import UserError
from poise.models.examine import examine_folder
from poise.models.language import open_folder
from poise.models.model_folder import read_folder

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "mistral")


@pytest.fixture
def copy(family_folder, tmp_path):
    """A writable copy of the folder of a family."""

    def make(family: str = "llama") -> Path:
        return Path(shutil.copytree(family_folder(family), tmp_path / family))

    return make


def change_json(file: Path, **values: object) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_facts_of_a_sound_folder(family, family_folder):
    folder = family_folder(family)
    facts = examine_folder(str(folder))
    model, tokenizer = open_folder(folder)
    assert facts.vocabulary == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert facts.context == 128
    stored = load_file(folder / "model.safetensors")
    assert facts.shapes == {name: tuple(value.shape) for name, value in stored.items()}
    assert read_folder(folder).context == 127


def test_the_real_llama_is_sound(shared_data):
    facts = examine_folder(shared_data / "lm" / "stories260K-hf-hd32")
    assert (facts.vocabulary, facts.context) == (512, 512)


def test_an_examination_imports_neither_torch_nor_transformers(family_folder):
    code = (
        "import sys; from poise.models.examine import examine_folder; examine_folder(sys.argv[1]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(family_folder("gpt2"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised .*bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*gptq"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder model .t5"),
        ({"model_type": "mbart"}, "encoder-decoder model .mbart"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "sees the tokens after each position .bert"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "recurrent model .mamba"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, which has no head"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel, which has no head"),
        ({"vocab_size": 999}, r"config.json says vocab_size 999 and the stored embedding has \d+ rows"),
        ({"model_type": None, "architectures": None}, "does not say which model"),
    ],
)
def test_models_that_poise_cannot_use_are_named(config, message, copy):
    folder = copy()
    change_json(folder / "config.json", **config)
    assert_refused(folder, message)


def test_folders_that_hold_no_whole_model_are_named(copy, tmp_path, monkeypatch):
    folder = copy()
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), config.read_bytes()

    def refused_with(file: Path, content: bytes | None, message: str) -> None:
        before = file.read_bytes() if file.is_file() else None
        file.unlink() if content is None else file.write_bytes(content)
        assert_refused(folder, message)
        file.unlink(missing_ok=True) if before is None else file.write_bytes(before)

    refused_with(weights, whole[:-3], "it is cut off")
    refused_with(weights, whole[:6], "is cut off")
    refused_with(weights, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer")
    refused_with(weights, len(whole).to_bytes(8, "little") + whole, "is no safetensors file")
    refused_with(weights, (4).to_bytes(8, "little") + b"[{}]", "is no safetensors file")
    refused_with(weights, None, "holds no weights")
    refused_with(config, b"[]", "holds a JSON list")
    refused_with(config, b"{", "is no JSON")
    refused_with(config, b"\xff\xfe", "is no JSON")
    refused_with(config, b"[" * 100_000, "is no JSON")
    refused_with(folder / "adapter_config.json", b'{"base_model_name_or_path": "base"}', "an adapter of base")
    weights.rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pickled weights")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    change_json(folder / "model.safetensors.index.json", **index)
    assert_refused(folder, "2 of 2 weight files are missing, first model-1-of-2")
    assert config.read_bytes() == settings
    config.unlink()
    assert_refused(folder, r"no config\.json")
    (folder / "params.json").write_text("{}")
    assert_refused(folder, "Meta's own format")
    monkeypatch.chdir(tmp_path)
    for name, message in (("Qwen/Qwen2.5-0.5B", "nothing is downloaded"), ("/no/such", "no folder /no/such")):
        with pytest.raises(UserError, match=message):
            examine_folder(name)
    with pytest.raises(UserError, match="is a file"):
        examine_folder(folder / "params.json")


def test_a_folder_without_a_tokenizer_is_refused_before_its_batches_are_empty(copy):
    folder = copy()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert_refused(folder, "without a tokenizer")
    assert read_folder(folder).context == 127  # a sampler of token ids needs none


def test_files_beside_the_model_are_not_taken_for_weights(copy):
    folder = copy()
    save_file({"other": torch.ones(2)}, folder / "consolidated.safetensors")
    assert "other" not in read_folder(folder).shapes


def test_shards_are_read_through_their_index(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(weights), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors", {"format": "pt"})
    change_json(folder / "model.safetensors.index.json", metadata={}, weight_map=places)
    assert examine_folder(folder).shapes.keys() == weights.keys()
    assert open_folder(folder)[0].state_dict().keys() == weights.keys()


def test_weights_that_would_be_random_are_refused(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of its architecture, first lm_head\.weight"):
        open_folder(folder)


def test_weights_of_other_shapes_and_values_are_named(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"

    def save(value: torch.Tensor) -> None:
        save_file({**weights, name: value}, folder / "model.safetensors", {"format": "pt"})

    save(torch.ones(3, 3))
    with pytest.raises(UserError, match=rf"1 weights are not of the shape .*, first {name}: \[3, 3\] instead of"):
        open_folder(folder)
    save(torch.full_like(weights[name], torch.nan))
    with pytest.raises(UserError, match="whose logits are no numbers"):
        open_folder(folder)
    save(weights[name].to(torch.int8))
    assert_refused(folder, rf"quantised weights \({name} is I8\)")
    save(weights[name].to(torch.float8_e4m3fn))
    assert_refused(folder, "is F8_E4M3")
    save(weights[name].bfloat16())
    assert open_folder(folder)[0].dtype == torch.float32


def test_stored_layers_that_would_be_left_out_are_refused(copy):
    folder = copy()
    change_json(folder / "config.json", num_hidden_layers=1)
    assert_refused(folder, "config.json says 1 layers and 2 are stored")
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="lacks 9 weights of its architecture"):
        open_folder(folder)


def test_a_head_that_is_tied_and_stored_otherwise_is_refused(copy):
    """transformers would use the stored head, and vLLM the embedding: two models in one folder."""
    folder = copy("gemma2")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    examine_folder(folder)
    save_file({**weights, "lm_head.weight": embedding + 1}, folder / "model.safetensors", {"format": "pt"})
    assert_refused(folder, "ties the head to the embedding")
    change_json(folder / "config.json", tie_word_embeddings=False)
    examine_folder(folder)


def test_a_model_that_keeps_no_cache_is_refused(tmp_path):
    """A sampler would give it the last token alone, and it would answer as if that were the whole prompt."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    from poise.models.language import open_model

    OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=9, n_embd=32, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="keeps no keys and values of earlier tokens"):
        open_model(tmp_path)


@pytest.mark.parametrize("value", ["2", [2, None], {"id": 2}])
def test_an_end_that_is_no_token_is_refused(value, copy):
    folder = copy()
    change_json(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match="which is no token id"):
        _ = read_folder(folder).stop


def test_code_of_its_own_is_refused_in_one_line(copy):
    folder = copy()
    change_json(folder / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    with pytest.raises(UserError, match="no language model that transformers can open") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_model_that_sees_the_future_is_found_by_its_logits(tmp_path, family_folder):
    """The names of bidirectional models are known; one that is not among them is found all the same."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertLMHeadModel(BertConfig(vocab_size=320, is_decoder=False, **sizes)).save_pretrained(tmp_path)
    assert_refused(tmp_path, "sees the tokens after each position")
    from poise.models.language import open_model

    with pytest.raises(UserError, match="sees the tokens after each position"):
        open_model(tmp_path)
    BertLMHeadModel(BertConfig(vocab_size=320, is_decoder=True, **sizes)).save_pretrained(tmp_path)
    open_model(tmp_path)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        examine_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_hybrid_that_can_be_sampled_is_taken(tmp_path):
    """Convolutions beside attention: no attention model by name, and yet it continues a text from its cache."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from poise.models.language import open_model

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = Lfm2Config(vocab_size=9, num_key_value_heads=1, layer_types=["conv", "full_attention"], **sizes)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    examine_folder(tmp_path, tokenizer=False)
    open_model(tmp_path)


def test_a_cache_that_forgets_is_found(family_folder, monkeypatch):
    from transformers import LlamaForCausalLM

    honest = LlamaForCausalLM.forward

    def forgetful(self, *arguments, past_key_values=None, **options):
        return honest(self, *arguments, past_key_values=None, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forgetful)
    with pytest.raises(UserError, match="goes on otherwise from its cache"):
        open_folder(family_folder("llama"))
