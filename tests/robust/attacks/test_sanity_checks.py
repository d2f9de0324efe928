"""What must make one doubt a robust accuracy: each sign on a model made to show it, and on a sound one none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks.sanity_checks import (
    gradient_masking,
    require_images,
    require_logits,
    sanity_warnings,
)


class _Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) + 0.01 * torch.rand(len(x), 5)


def _net(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), *tail)


def test_a_sound_model_raises_no_suspicion_and_is_left_as_it_was(
    small_net: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """Dropout is no randomness: attacks see the model in eval mode."""
    before = {name: value.clone() for name, value in small_net.state_dict().items()}
    assert sanity_warnings(small_net, *images) == ()
    assert all(module.training for module in small_net.modules())
    assert all(torch.equal(value, before[name]) for name, value in small_net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in small_net.parameters())


def test_each_sign_is_named(images: tuple[Tensor, Tensor]) -> None:
    (randomised,) = sanity_warnings(_Noisy(36, 5), *images)
    assert "two forwards of the same images differ" in randomised
    (probabilities,) = sanity_warnings(_net(nn.Softmax(dim=1)), *images)
    assert "probabilities" in probabilities
    assert "remove the softmax" in probabilities


def test_zero_gradients_are_counted() -> None:
    """A ReLU that is dead below a brightness of one half."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3))
    with torch.no_grad():
        net[1].weight.fill_(0.25)
        net[1].bias.fill_(-0.5)
    x = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    (sign,) = sanity_warnings(net, x, torch.zeros(5, dtype=torch.int64))
    assert sign.startswith("3 of 5 examples have a gradient of exactly zero")


def test_square_may_not_beat_gradients_by_more_than_two_in_a_thousand() -> None:
    before = torch.ones(1000, dtype=torch.bool)
    after = before.clone()
    after[:2] = False
    assert gradient_masking(before, after) is None
    after[2] = False
    assert "Square" in (sign := gradient_masking(before, after) or "")
    assert "fooled 3 of 1000" in sign
    assert gradient_masking(after, after) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.01, r"example 2 has pixels from -0.01 to"),
        (255.0, r"example 2 has pixels from .* to 255"),
        (float("nan"), "example 2 has a pixel that is not a number"),
        (float("inf"), "example 2 has pixels from"),
    ],
)
def test_what_is_no_image_is_refused(images: tuple[Tensor, Tensor], value: float, message: str) -> None:
    x = images[0].clone()
    require_images(x)
    x[2, 0, 1, 1] = x[5, 0, 0, 0] = value
    with pytest.raises(ValueError, match=message):
        require_images(x)
    with pytest.raises(ValueError, match="no examples"):
        require_images(x[:0])


def test_labels_and_logits_are_refused_by_example() -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    require_logits(logits, y)
    with pytest.raises(ValueError, match="example 2 has label 3, but the model has 3 classes"):
        require_logits(logits, torch.tensor([0, 1, 3, -1]))
    with pytest.raises(ValueError, match="at least two classes"):
        require_logits(logits[:, :1], torch.zeros(4, dtype=torch.int64))
    logits[1, 0] = torch.nan
    with pytest.raises(PoiseError, match="example 1 is not finite"):
        require_logits(logits, y)
