"""What should make one doubt a robust accuracy: inputs that are no images, and models that hide from gradients.

The signs are those that the authors of AutoAttack warn of (Croce and Hein, 2020; papers/adversarial.md, section 8).
"""

from __future__ import annotations

from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks.contract import attack_mode, input_gradient, scores
from poise.robust.attacks.losses import margin

__all__ = ["masking", "require_images", "require_logits", "suspicions"]

_RANDOMISED = 1e-4
_BEATEN = 0.002


def require_images(x: Tensor) -> None:
    """Raise ValueError, naming the first example, unless all of x (N, ...) are numbers from 0 to 1 and N > 0."""
    if len(x) == 0:
        raise ValueError("no examples: there is nothing to attack")
    low, high = x.flatten(1).aminmax(dim=1)
    bad = ~((low >= 0) & (high <= 1))
    if bool(bad.any()):
        index = int(bad.int().argmax())
        if bool(low[index].isnan()):
            raise ValueError(f"example {index} has a pixel that is not a number")
        raise ValueError(
            f"example {index} has pixels from {float(low[index]):.4g} to {float(high[index]):.4g}: scale images to "
            "[0, 1] and let the model normalise them"
        )


def require_logits(logits: Tensor, y: Tensor) -> None:
    """Raise unless logits are finite (N, K), K >= 2, and labels y (N,) lie in 0..K-1.

    Raises:
        ValueError: fewer than two classes, or a label beyond them.
        PoiseError: the logits of an example are not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits (N, K) of at least two classes, the model gives {tuple(logits.shape)}")
    foreign = (y < 0) | (y >= logits.shape[1])
    if bool(foreign.any()):
        index = int(foreign.int().argmax())
        raise ValueError(f"example {index} has label {int(y[index])}, but the model has {logits.shape[1]} classes")
    finite = logits.isfinite().all(1)
    if not bool(finite.all()):
        raise PoiseError(f"the model's output for example {int(finite.int().argmin())} is not finite: it has diverged")


def suspicions(model: nn.Module, x: Tensor, y: Tensor) -> tuple[str, ...]:
    """What on images x (N, ...) in [0, 1] with labels (N,) suggests that gradients will not find what there is.

    A sentence for each: two forwards differ by more than 1e-4 of the largest logit; rows are probabilities; the margin
    has a gradient of exactly zero at some images. Costs two forwards and a backward.
    """
    with attack_mode(model):
        gradient, _, first = input_gradient(model, x, y, margin)
        second = scores(model, x)
    found = []
    if bool((first - second).abs().max() > _RANDOMISED * first.abs().max()):
        found.append(
            "the model is randomised: two forwards of the same images differ, so that its robustness is overestimated "
            "unless gradients and verdicts are averaged over draws"
        )
    if bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all()):
        found.append(
            "the model gives probabilities (rows that sum to 1) in place of logits: their gradients vanish where it is "
            "sure; remove the softmax"
        )
    if zero := int((gradient.flatten(1).abs().amax(1) == 0).sum()):
        found.append(
            f"{zero} of {len(x)} examples have a gradient of exactly zero: attacks that follow gradients are blind to "
            "them, and Square alone searches there"
        )
    return tuple(found)


def masking(before: Tensor, after: Tensor) -> str | None:
    """A sentence when Square fooled more than 0.2 % of all examples after every white-box attack had failed on them.

    Args:
        before, after: bool (N,), which examples stood before Square and after it.
    """
    beaten = int((before & ~after).sum())
    if beaten <= _BEATEN * len(before):
        return None
    return (
        f"Square, which sees no gradient, fooled {beaten} of {len(before)} examples that withstood every attack with "
        "gradients: the model may mask them; try more restarts, or an attack made for this model"
    )
