"""DFT, EAFT, TOFU, label smoothing and entropy regularisation: values and gradients by hand, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.finetune.losses import (
    IGNORE_INDEX,
    LOSSES,
    Dft,
    Eaft,
    EntropyRegularized,
    FinetuneLoss,
    LabelSmoothing,
    Sed,
    Tofu,
    cross_entropy,
)
from poise.finetune.losses.eaft import eaft_loss, top_entropy
from poise.finetune.losses.sed import top_mass
from poise.finetune.losses.tofu import tofu_loss

P = (0.5, 0.25, 0.125, 0.125)
"""The probabilities of logits ln (8, 4, 2, 2), whose label is the second token: -log p = 1.386294, H = 1.213008."""


def one_token() -> tuple[Tensor, Tensor]:
    return torch.tensor([[8.0, 4.0, 2.0, 2.0]], dtype=torch.double).log().requires_grad_(), torch.tensor([1])


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(12, 30, generator=generator, dtype=torch.double)).requires_grad_()
    labels = torch.randint(30, (12,), generator=generator)
    labels[[1, 11]] = IGNORE_INDEX
    return logits, labels


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        (Dft(), 0.346574, (0.125, -0.1875, 0.03125, 0.03125)),
        (Eaft(top=4), 0.560529, tuple(0.404336 * v for v in (0.5, -0.75, 0.125, 0.125))),
        (Eaft(top=4, scale=1), 1.681586, tuple(1.213008 * v for v in (0.5, -0.75, 0.125, 0.125))),
        (Eaft(top=4, scale="1.3862943611"), 1.213008, tuple(0.875 * v for v in (0.5, -0.75, 0.125, 0.125))),
        (Sed(threshold="0.8"), 1.448794, (0.5625, -0.84375, 0.140625, 0.140625)),
        (Sed(threshold="0.7"), 1.386294, (0.5, -0.75, 0.125, 0.125)),
        (Tofu(), 1.159475, (0.567484, -0.76812, 0.100318, 0.100318)),
        (EntropyRegularized(), 1.264994, (0.525993, -0.754332, 0.11417, 0.11417)),
        (LabelSmoothing(), 0.9 * 1.386294 + 0.1 * (1 + 2 + 3 + 3) / 4 * math.log(2), (0.475, -0.675, 0.1, 0.1)),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else "",
)
def test_a_token_of_known_probabilities(loss, value, slope):
    logits, labels = one_token()
    found = loss.loss(logits, labels)
    assert found.item() == pytest.approx(value, abs=2e-6)
    assert gradient(found, logits)[0].tolist() == pytest.approx(slope, abs=2e-6)


def test_dft_never_unlearns_a_label_below_one_over_e():
    logits = torch.tensor([[5.0, 0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([1])
    assert logits.softmax(-1)[0, 1] < 1 / math.e
    assert gradient(Dft().loss(logits, labels), logits)[0, 1] < 0
    p = logits.softmax(-1)[0, 1]
    assert gradient(-p * p.log(), logits)[0, 1] > 0, "with a gradient through the weight it is unlearned"


def test_tofu_at_temperature_one_has_the_gradient_of_the_focal_loss():
    logits, labels = problem()
    kept = labels != IGNORE_INDEX
    log_p = logits.log_softmax(-1)[kept].gather(1, labels[kept, None])[:, 0]
    focal = -((1 - log_p.exp()) ** 3 * log_p).mean()
    assert torch.allclose(gradient(tofu_loss(logits, labels, beta=1.0), logits), gradient(focal, logits), atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_tofu_is_finite_where_the_probability_of_the_label_is_zero_or_one(gamma):
    logits = torch.tensor([[0.0, 200.0], [200.0, 0.0]], requires_grad=True)
    loss = tofu_loss(logits, torch.tensor([0, 0]), gamma)
    assert loss.isfinite()
    assert gradient(loss, logits).isfinite().all()
    assert loss.item() == pytest.approx(100, abs=1e-3)  # g = 1 and beta * 200 / beta, over two tokens


def test_the_entropy_of_the_top_tokens_is_renormalised_and_all_of_them_where_there_are_fewer():
    logits, _ = one_token()
    assert top_entropy(logits, 2).item() == pytest.approx(-(2 / 3) * math.log(2 / 3) - math.log(1 / 3) / 3)
    assert top_entropy(logits, 100).item() == pytest.approx(1.213008, abs=1e-6)
    assert not top_entropy(logits, 2).requires_grad


def test_the_scales_of_the_two_public_versions_of_eaft_differ_by_a_power():
    logits, labels = problem()
    ours = eaft_loss(logits, labels, alpha=2.0, scale=3.0)
    assert eaft_loss(logits, labels, alpha=2.0, scale=1.0).item() == pytest.approx(9 * ours.item())


def ready(name: str) -> FinetuneLoss:
    """The loss of that name with its default options."""
    return LOSSES[name]().prepare([problem(1)[0]])


def test_the_threshold_of_sed_is_the_mass_that_the_share_of_tokens_reaches():
    logits = torch.cat([problem(seed)[0] for seed in range(5)]).detach()
    masses = top_mass(logits, 2)
    assert torch.allclose(masses, logits.softmax(-1).topk(2).values.sum(1))
    for share in ("0", "0.3", "1"):
        prepared = Sed(share=share).prepare(logits.split(7))
        sure = (masses >= float(prepared.threshold)).sum()
        assert sure == int(float(share) * len(logits))
    given = Sed(threshold="0.5")
    assert given.prepare([]) is given
    assert prepared.describe().startswith("sed (weight 1, top 2, threshold 0.")
    with pytest.raises(ValueError, match="no threshold"):
        Sed().loss(*problem())


@pytest.mark.parametrize("loss", [LabelSmoothing(smoothing=0), EntropyRegularized(gamma=0), Sed(weight=0, threshold=1)])
def test_with_its_option_at_zero_it_is_cross_entropy(loss):
    logits, labels = problem()
    assert torch.allclose(loss.loss(logits, labels), cross_entropy(logits, labels), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("ranks", [1, 2])
def test_uneven_micro_batches_of_every_loss_have_the_gradient_of_their_union(name, ranks):
    loss = ready(name)
    logits, labels = problem()
    labels[3:6] = IGNORE_INDEX  # the second of four parts has no supervised token
    count = int((labels != IGNORE_INDEX).sum())
    parts = [loss.loss(logits[i : i + 3], labels[i : i + 3], normalizer=count / ranks) / ranks for i in range(0, 12, 3)]
    whole = loss.loss(logits, labels)
    assert torch.allclose(torch.stack(parts).sum(), whole, rtol=0, atol=1e-14)
    assert torch.allclose(gradient(torch.stack(parts).sum(), logits), gradient(whole, logits), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_reduces_16_bits_in_fp32_and_is_a_zero_with_a_gradient_without_tokens(name):
    loss = ready(name)
    logits, labels = problem()
    half = logits.detach().bfloat16()
    assert torch.equal(loss.loss(half, labels), loss.loss(half.float(), labels))
    nothing = loss.loss(logits, torch.full_like(labels, IGNORE_INDEX), normalizer=5)
    assert nothing == 0
    assert not gradient(nothing, logits).any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_learns_to_prefer_what_the_data_has_more_of(name):
    """Full-batch descent over the free logits of one context."""
    counts = torch.tensor([10, 6, 3, 1])
    labels = torch.arange(4).repeat_interleave(counts)
    z = torch.zeros(4, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=1.0)
    loss = ready(name)
    for _ in range(300):
        optimizer.zero_grad()
        loss.loss(z.expand(20, -1), labels).backward()
        optimizer.step()
    p = z.detach().softmax(-1)
    assert p.tolist() == sorted(p.tolist(), reverse=True)
    if name == "ce":
        assert torch.allclose(p, counts.double() / 20, atol=1e-3)
    if name == "dft":
        assert p[0] > 0.95, "weighted by the model's own probability, the most frequent token takes all"
