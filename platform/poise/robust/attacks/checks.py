"""What should make one doubt a robust accuracy: inputs that are no images, and models that hide from gradients.

The signs are those that the authors of AutoAttack warn of (Croce and Hein, 2020; papers/adversarial.md, section 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from poise.errors import PoiseError, UserError
from poise.robust.attacks.contract import NO_GRADIENT, BNMode, attack_mode, scores
from poise.robust.attacks.losses import LOSSES, without_underflow
from poise.robust.threats import Threat

__all__ = [
    "RANDOMISED",
    "batch_dependence",
    "check_inputs",
    "masking",
    "require_images",
    "require_logits",
    "suspicions",
]

RANDOMISED = "the model is randomised"
_RANDOMISED = 1e-4
_BATCHED = 1e-3  # of the largest logit; kernels of different batch sizes round otherwise by less
_BEATEN = 0.002


def check_inputs(x: Tensor, y: Tensor, *threats: Threat) -> Tensor:
    """Labels y as int64, once what an attack is given makes sense; costs one look at the images.

    Raises:
        UserError: no examples, images x that are not float32 or float64 or leave [0, 1], labels (N,) that are no
            integers, a radius that is larger than the box. A threat that does not live in the box may have any image.
    """
    if not x.is_floating_point() or x.dtype not in (torch.float32, torch.float64):
        kind = str(x.dtype).removeprefix("torch.")
        cure = "x.float() / 255" if x.dtype == torch.uint8 else "x.float()"
        raise UserError(f"images are {kind}: attacks need float32 or float64 in [0, 1], write {cure}")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        kind = str(y.dtype).removeprefix("torch.")
        raise UserError(f"labels are {kind} {tuple(y.shape)}: {len(x)} images need as many integers, ({len(x)},)")
    if len(x) == 0:
        raise UserError("no examples: there is nothing to attack")
    if all(threat.in_box for threat in threats):
        require_images(x)
    for threat in threats:
        threat.check_eps(x[0].numel())
    return y.long()


def require_images(x: Tensor) -> None:
    """Raise UserError, naming the first example, unless all of x (N, ...) are numbers from 0 to 1 and N > 0."""
    if len(x) == 0:
        raise UserError("no examples: there is nothing to attack")
    low, high = x.flatten(1).aminmax(dim=1)
    bad = ~((low >= 0) & (high <= 1))
    if bool(bad.any()):
        index = int(bad.int().argmax())
        if bool(x[index].isnan().any()):
            raise UserError(f"example {index} has a pixel that is not a number")
        raise UserError(
            f"example {index} has pixels from {float(low[index]):.4g} to {float(high[index]):.4g}: scale images to "
            "[0, 1] and let the model normalise them"
        )


def require_logits(logits: Tensor, y: Tensor) -> None:
    """Raise unless logits are finite, or -inf for some classes, (N, K), K >= 2, and labels y (N,) lie in 0..K-1.

    Raises:
        UserError: fewer than two classes, or a label beyond them.
        PoiseError: the logits of an example are not finite.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"expected logits (N, K) of at least two classes, the model gives {tuple(logits.shape)}")
    foreign = (y < 0) | (y >= logits.shape[1])
    if bool(foreign.any()):
        index = int(foreign.int().argmax())
        raise UserError(f"example {index} has label {int(y[index])}, but the model has {logits.shape[1]} classes")
    finite = logits.amax(1).isfinite()  # -inf masks a class; NaN, +inf and a row of -inf do not pass
    if not bool(finite.all()):
        raise PoiseError(f"the model's output for example {int(finite.int().argmin())} is not finite: it has diverged")


def suspicions(
    model: nn.Module, x: Tensor, y: Tensor, losses: Sequence[str] = ("margin",), bn_mode: BNMode = "eval"
) -> tuple[str, ...]:
    """What on images x (N, ...) in [0, 1] with labels (N,) suggests that attacks will not find what there is.

    A sentence for each: two forwards differ by more than 1e-4 of the largest logit; one image alone gets other logits
    than in its batch; rows are probabilities; one of the `losses` that are to be climbed, by name, has a gradient of
    exactly zero at some images; the model has no gradient at all. Costs three forwards, and a backward for each loss.
    """
    with attack_mode(model, bn_mode):
        point = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = model(point.clone())
            blind = {name: _gradient_free(point, logits, y, name) for name in losses}
        first = logits.detach()
        tolerance = _RANDOMISED * _scale(first)
        randomised = _differ(first, scores(model, x), tolerance)
        batched = None if randomised else batch_dependence(model, x, first)
    found = []
    if randomised:
        found.append(
            f"{RANDOMISED}: two forwards of the same images differ, so that its robustness is overestimated "
            "unless gradients and verdicts are averaged over draws: use version rand of AutoAttack, or draws"
        )
    if batched is not None:
        found.append(batched)
    if bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all()):
        found.append(
            "the model gives probabilities (rows that sum to 1) in place of logits: their gradients vanish where it is "
            "sure; remove the softmax"
        )
    if None in blind.values():
        found.append(NO_GRADIENT)
    counts = {name: count for name, count in blind.items() if count}
    if counts:
        words = ", ".join(f"{LOSS_NAMES[name]}: {count}" for name, count in counts.items())
        found.append(
            f"{max(counts.values())} of {len(x)} examples have a gradient of exactly zero ({words}): attacks that "
            "follow gradients are blind to them, and Square alone searches there"
        )
    return tuple(found)


LOSS_NAMES = {"ce": "cross entropy", "margin": "margin", "dlr": "DLR"}


def _gradient_free(point: Tensor, logits: Tensor, y: Tensor, name: str) -> int | None:
    """How many examples have a gradient of exactly zero in the loss of this name; None where there is none at all."""
    losses = without_underflow(LOSSES[name])(logits, y)
    if not losses.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(losses.sum(), point, retain_graph=True, allow_unused=True)
    return None if gradient is None else int((gradient.flatten(1).abs().amax(1) == 0).sum())


def batch_dependence(model: nn.Module, x: Tensor, batched: Tensor | None = None) -> str | None:
    """A sentence if the first image alone has other logits than in the batch x (N, ...), which are `batched` (N, K).

    None for a randomised model, whose logits always differ. Call it in `attack_mode`.
    """
    if len(x) < 2:
        return None
    batched = scores(model, x) if batched is None else batched
    tolerance = _BATCHED * _scale(batched)
    try:
        alone = scores(model, x[:1])
        same = not _differ(batched[:1], alone, tolerance)
        randomised = not same and _differ(alone, scores(model, x[:1]), tolerance)
    except ValueError as error:  # torch refuses to normalise a single value by its batch
        if isinstance(error, PoiseError) and not isinstance(error.__cause__, ValueError):
            raise  # the model has explained another error
        same = randomised = False
    if same or randomised:
        return None
    return (
        "the model answers for one image alone otherwise than for the same image in its batch (such as BatchNorm "
        "without running statistics, or put into training mode by forward): the result depends on the batch size and "
        "on the other images"
    )


def _scale(logits: Tensor) -> Tensor:
    """The largest finite logit by its size."""
    return logits.nan_to_num(nan=0, posinf=0, neginf=0).abs().max()


def _differ(one: Tensor, other: Tensor, tolerance: Tensor) -> bool:
    """Whether logits differ by more than that; two masked classes (-inf) are equal."""
    return bool(((one - other).abs() > tolerance).any())  # -inf - -inf is NaN, which is not above the tolerance


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
