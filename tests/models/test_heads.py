"""The head of models of several families, and their hidden states, beside the logits of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
)

from poise.models.heads import HiddenStates, linear_head

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": None}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SEQUENCES = [[3, 1, 4, 1, 5], [9, 2]]

CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "llama, tied": LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=0.5),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),
    "cohere, scaled": CohereConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, logit_scale=0.25),
    "granite, divided": GraniteConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, logits_scaling=4.0),
    "phi, with a bias": PhiConfig(**SIZES, num_attention_heads=2),
    "phi3": Phi3Config(**SIZES, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "olmo2": Olmo2Config(**SIZES, num_attention_heads=2, num_key_value_heads=1),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_of_the_hidden_states_gives_the_logits_and_their_gradients(name):
    model = model_of(name).double()
    states = HiddenStates(model)
    head = linear_head(model, SEQUENCES, states)
    assert head is not None
    assert head.weight is model.get_output_embeddings().weight
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits
    ours = head.logits(states(model, input_ids=ids, use_cache=False))
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-12)
    weights = torch.randn_like(logits)
    wanted = torch.autograd.grad((logits * weights).sum(), list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad((ours * weights).sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_the_model_itself_is_left_as_it_was():
    model = model_of("llama").train()
    ids = torch.tensor([[3, 1, 4]])
    before = model(input_ids=ids).logits
    states = HiddenStates(model)
    assert linear_head(model, SEQUENCES, states) is not None
    assert model.training
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_head_that_does_something_else_is_left_to_the_model():
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.relu())
    assert linear_head(model, SEQUENCES, HiddenStates(model)) is None

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = model_of("llama")
    model.lm_head = Doubled(16, 40, bias=False)
    assert linear_head(model, SEQUENCES, HiddenStates(model)) is None


@pytest.mark.parametrize("call", [lambda layer, x: x @ layer.weight.T, lambda layer, x: layer(input=x)])
def test_a_model_that_does_not_call_its_head_with_one_tensor_is_left_to_itself(call):
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of("llama")
            self.config = self.inner.config

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, input_ids, use_cache=False):
            hidden = self.inner.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return SimpleNamespace(logits=call(self.inner.lm_head, hidden))

    model = Bypass().train()
    assert linear_head(model, SEQUENCES, HiddenStates(model)) is None
    assert model.training


def test_a_head_with_an_adapter_is_left_to_the_model():
    from peft import LoraConfig, get_peft_model

    for target, is_found in (("q_proj", True), ("lm_head", False)):
        model = get_peft_model(model_of("llama"), LoraConfig(target_modules=[target]))
        assert (linear_head(model, SEQUENCES, HiddenStates(model)) is not None) == is_found
