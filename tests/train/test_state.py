"""What a checkpoint holds of a model whose weights are partly tied or frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from poise.errors import UserError
from poise.train.optim import build_optimizer
from poise.train.state import TrainState, capture_rng, load_state, save_state

CPU = torch.device("cpu")


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and a buffer of the embedding's size."""

    def __init__(self, seed: int, freeze: str = "") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.middle, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("seen", torch.full((6, 4), float(seed)))
        if freeze:
            self.get_submodule(freeze).requires_grad_(False)


def saved(model: nn.Module, folder: Path, adamw) -> list[str]:
    save_state(TrainState(model, build_optimizer(adamw, model), {}), [capture_rng(CPU)], folder)
    return sorted(load_file(folder / "model.safetensors"))


def test_a_tied_weight_is_stored_once_and_loaded_under_both_names(tmp_path, adamw):
    one, other = Tied(1), Tied(2)
    assert saved(one, tmp_path, adamw) == ["embed.weight", "middle.bias", "middle.weight", "nothing", "seen"]
    load_state(TrainState(other, build_optimizer(adamw, other), {}), tmp_path, CPU)
    assert other.head.weight is other.embed.weight
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("freeze", "stored"),
    [("middle", ["embed.weight", "nothing", "seen"]), ("embed", ["middle.bias", "middle.weight", "nothing", "seen"])],
)
def test_a_frozen_weight_is_not_stored_and_stays_what_it_is(freeze, stored, tmp_path, adamw):
    one, other = Tied(1, freeze), Tied(1, freeze)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert saved(one, tmp_path, adamw) == stored
    load_state(TrainState(other, build_optimizer(adamw, other), {}), tmp_path, CPU)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_other_frozen_weights_are_refused(tmp_path, adamw):
    saved(Tied(1, "middle"), tmp_path, adamw)
    other = Tied(2, "middle")
    with pytest.raises(UserError, match="frozen weights are not those"):
        load_state(TrainState(other, build_optimizer(adamw, other), {}), tmp_path, CPU)
