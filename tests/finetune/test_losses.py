"""Losses against closed forms, autograd, and each other; fp64 where an identity is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from poise.errors import UserError
from poise.finetune.losses import (
    IGNORE_INDEX,
    LOSSES,
    Ce,
    FinetuneLoss,
    Gem,
    cross_entropy,
    entropy,
    gem_loss,
)
from poise.finetune.losses.base import compute_loss, prepare_loss

VARIANTS = ["linear", "logsigmoid"]


def problem(n: int = 12, classes: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (n, V) in fp64 that need a gradient, labels of which the second and the last are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, classes, generator=generator, dtype=torch.double)).requires_grad_()
    labels = torch.randint(classes, (n,), generator=generator)
    labels[[1, n - 1]] = IGNORE_INDEX
    return logits, labels


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


def close(one: Tensor, other: Tensor, atol: float = 1e-15) -> bool:
    return torch.allclose(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("beta", [0.1, 0.7, 1.0])
def test_linear_gem_has_the_gradient_of_cross_entropy_at_a_temperature(beta):
    logits, labels = problem()
    found = gradient(gem_loss(logits, labels, beta), logits)
    kept = labels != IGNORE_INDEX
    onehot = nn.functional.one_hot(labels[kept], logits.shape[1])
    assert close(found[kept], ((logits / beta).softmax(-1)[kept] - onehot) / kept.sum())
    assert not found[~kept].any()
    assert close(found, gradient(beta * cross_entropy(logits / beta, labels), logits))


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_logsigmoid_gem_has_the_gradient_of_its_formula(beta):
    logits, labels = problem()
    kept = labels != IGNORE_INDEX
    z, y = logits.detach()[kept], labels[kept]
    weights = (z / beta).softmax(-1) * (0.01 * (z - z.gather(1, y[:, None]))).sigmoid()
    onehot = nn.functional.one_hot(y, z.shape[1])
    found = gradient(gem_loss(logits, labels, beta, "logsigmoid"), logits)[kept]
    assert close(found, (weights - onehot * weights.sum(1, keepdim=True)) / kept.sum())
    assert close(found.sum(1), torch.zeros(len(y), dtype=torch.double))


def test_logsigmoid_with_no_slope_is_half_of_linear(monkeypatch):
    monkeypatch.setattr("poise.finetune.losses.gem.SLOPE", 0.0)
    logits, labels = problem()
    assert torch.equal(gem_loss(logits, labels, 0.7, "logsigmoid"), gem_loss(logits, labels, 0.7) / 2)


def test_at_beta_one_the_gradient_is_that_of_cross_entropy_and_the_value_is_not():
    logits, labels = problem()
    gem, ce = gem_loss(logits, labels, 1.0), cross_entropy(logits, labels)
    assert close(gradient(gem, logits), gradient(ce, logits))
    assert close(gem, ce - entropy(logits, labels), 1e-14)


def test_the_opponent_is_held_fixed():
    """With its gradient let through, linear GEM at beta 1 would be CE - H, which is another loss."""
    logits, labels = problem()
    z, y = logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
    leaking = (z.softmax(-1) * (z - z.gather(1, y[:, None]))).sum() / len(y)
    assert close(leaking, gem_loss(logits, labels, 1.0), 1e-14)
    assert not close(gradient(leaking, logits), gradient(gem_loss(logits, labels, 1.0), logits), 1e-3)


def test_a_small_beta_is_the_perceptron():
    logits, labels = problem()
    labels[3] = logits[3].argmax()
    kept = labels != IGNORE_INDEX
    found = gradient(gem_loss(logits, labels, 1e-3), logits)[kept] * kept.sum()
    top, y = logits[kept].argmax(1), labels[kept]
    assert close(found, (nn.functional.one_hot(top, 9) - nn.functional.one_hot(y, 9)).double(), 1e-12)
    assert (top == y).any()  # and there the gradient is zero
    assert (top != y).any()


def tabular_optimum(variant: str, counts: Tensor) -> Tensor:
    """The model that no full-batch step of GEM changes, found by descent over free logits."""
    z = torch.zeros(len(counts), dtype=torch.double, requires_grad=True)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    for _ in range(1000):
        loss = gem_loss(z.expand(len(labels), -1), labels, 0.7, variant)
        z = (z - 2 * gradient(loss, z)).detach().requires_grad_()
    return z.softmax(-1).detach()


def test_the_tabular_optimum_is_the_power_of_the_data():
    counts = torch.tensor([10, 6, 3, 1])
    data = counts.double() / 20
    found = tabular_optimum("linear", counts)
    assert close(found, data**0.7 / (data**0.7).sum(), 1e-9)
    assert close(found, torch.tensor([0.4293, 0.3002, 0.1848, 0.0857], dtype=torch.double), 5e-5)
    assert float(-(found * found.log()).sum()) == pytest.approx(1.2468, abs=5e-5)
    assert close(tabular_optimum("logsigmoid", counts), found, 2e-3)

    def objective(f: Tensor) -> Tensor:
        """KL(f || data) - (1 / beta - 1) H(f)."""
        return (f * (f / data).log()).sum() + (1 / 0.7 - 1) * (f * f.log()).sum()

    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(200, 4, generator=generator, dtype=torch.double)
    assert all(objective(found) < objective((found.log() + shift).softmax(-1)) for shift in noise)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_partition_function_cancels(variant):
    logits, labels = problem()
    kept = labels != IGNORE_INDEX
    z, y = logits.detach()[kept], labels[kept]
    log_p, margins = z.log_softmax(-1), z - z.gather(1, y[:, None])
    w = 1 if variant == "linear" else (0.01 * margins).sigmoid()
    told = ((z / 0.7).softmax(-1) * w * (log_p - log_p.gather(1, y[:, None]))).sum() / kept.sum()
    assert close(told, gem_loss(logits, labels, 0.7, variant), 1e-14)
    assert close(gem_loss(logits + 5, labels, 0.7, variant), told, 1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_never_above_zero_where_the_label_is_the_favourite(variant):
    logits, _ = problem()
    assert all(gem_loss(row[None], row.argmax()[None], 0.7, variant) <= 0 for row in logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit_logits_are_reduced_in_fp32(variant):
    logits, labels = problem(classes=2000)
    half = logits.detach().bfloat16()
    assert torch.equal(gem_loss(half, labels, 0.7, variant), gem_loss(half.float(), labels, 0.7, variant))
    assert torch.equal(cross_entropy(half, labels), cross_entropy(half.float(), labels))
    assert cross_entropy(half, labels).dtype == torch.float32


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("ranks", [1, 2])
def test_uneven_micro_batches_have_the_gradient_of_their_union(variant, ranks):
    """Loss per part = its sum / n of the step: parts add up, ranks are averaged and multiplied back."""

    def loss(logits: Tensor, labels: Tensor, normalizer: float | None = None) -> Tensor:
        if variant is None:
            return cross_entropy(logits, labels, normalizer=normalizer)
        return gem_loss(logits, labels, 0.7, variant, normalizer=normalizer)

    logits, labels = problem(n=16)
    labels[4:8] = IGNORE_INDEX  # the second of four parts has no supervised token at all
    count = int((labels != IGNORE_INDEX).sum())
    parts = [loss(logits[i : i + 4], labels[i : i + 4], count / ranks) / ranks for i in range(0, 16, 4)]
    assert close(gradient(torch.stack(parts).sum(), logits), gradient(loss(logits, labels), logits), 3e-16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_part_without_supervised_tokens_is_a_zero_with_a_gradient(variant):
    logits, labels = problem()
    nothing = torch.full_like(labels, IGNORE_INDEX)
    for loss in (
        gem_loss(logits, nothing, 0.7, variant, normalizer=5),
        cross_entropy(logits, nothing, normalizer=5),
    ):
        assert loss == 0
        assert not gradient(loss, logits).any()


def test_nonsense_is_refused():
    logits, labels = problem()
    with pytest.raises(ValueError, match="above 0"):
        gem_loss(logits, labels, 0.0)
    with pytest.raises(ValueError, match="linear or logsigmoid"):
        gem_loss(logits, labels, 0.7, "sigmoid")


def test_every_loss_has_the_name_under_which_it_is_registered():
    assert [loss.model_fields["name"].default for loss in LOSSES.values()] == list(LOSSES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_options_of_a_loss_are_those_of_its_function(variant):
    logits, labels = problem()
    gem = Gem(beta="3/10", variant=variant)
    assert gem.loss(logits, labels, normalizer=3) == gem_loss(logits, labels, 0.3, variant, normalizer=3)
    assert Ce().loss(logits, labels, normalizer=3) == cross_entropy(logits, labels, normalizer=3)
    assert (Ce().describe(), gem.describe()) == ("ce", f"gem ({variant}, beta 3/10)")


# --- losses of the user's code


class Mine(FinetuneLoss):
    """The cross entropy, as `CHANGE` spoils it, and a metric."""

    def loss(self, logits, labels, *, normalizer=None):
        loss = cross_entropy(logits, labels, normalizer=normalizer)
        return CHANGE["loss"](loss, logits) if CHANGE else loss

    def metrics(self, logits, labels, *, normalizer=None):
        return {"largest": logits.amax()}


CHANGE = {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss, logits: logits.mean((1, 2)), r"Mine.loss: what it returned is a tensor of shape \(2,\): it must"),
        (lambda loss, logits: loss.detach(), "Mine.loss: what it returned has no gradient"),
        (lambda loss, logits: loss.item(), "Mine.loss: what it returned is a float"),
    ],
)
def test_a_wrong_loss_is_named_with_its_line(monkeypatch, spoil, message):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.ones(2, 3, dtype=torch.int64)
    value, metrics = compute_loss(Mine(), logits, labels, 6.0)
    assert torch.equal(value, cross_entropy(logits, labels, normalizer=6.0))
    assert metrics == {"largest": logits.amax()}
    assert not metrics["largest"].requires_grad
    monkeypatch.setitem(CHANGE, "loss", spoil)
    with pytest.raises(UserError, match=message) as caught:
        compute_loss(Mine(), logits, labels, 6.0)
    assert "test_losses.py:" in str(caught.value)


def test_a_wrong_prepare_is_named_with_its_line():
    class Unprepared(Mine):
        def prepare(self, logits):
            return sum(part.numel() for part in logits)

    with pytest.raises(UserError, match=r"Unprepared.prepare returned an? int.*: it must return a FinetuneLoss"):
        prepare_loss(Unprepared(), [torch.ones(2, 3)])
    assert isinstance(prepare_loss(Mine(), []), Mine)


def test_a_loss_without_a_normalizer_is_named_with_its_line():
    class Short(FinetuneLoss):
        def loss(self, logits, labels):
            return logits.sum()

    with pytest.raises(UserError, match=r"Short.loss raised TypeError: .*'normalizer' \(.*test_losses.py:\d+\)"):
        compute_loss(Short(), torch.randn(1, 2, 3, requires_grad=True), torch.ones(1, 2, dtype=torch.int64), 2.0)
