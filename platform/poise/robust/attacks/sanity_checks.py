"""Reasons to distrust a robust accuracy: inputs that are not images, and models that mask their gradients.

The warnings are those that the authors of AutoAttack give (Croce and Hein, 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from poise.errors import PoiseError, UserError
from poise.robust.attacks.base import (
    NO_GRADIENT,
    BNMode,
    attack_mode,
    scores,
)
from poise.robust.attacks.losses import LOSSES, without_underflow
from poise.robust.threats import Threat

__all__ = [
    "RANDOMISED",
    "batch_dependence",
    "check_inputs",
    "gradient_masking",
    "require_images",
    "require_logits",
    "sanity_warnings",
]

RANDOMISED = "the model is randomised"
_RANDOMISED = 1e-4  # of the largest logit: two forwards that differ by more are randomised
_BATCHED = 1e-3  # of the largest logit; the rounding of kernels of different batch sizes differs by less
_MASKING_SHARE = 0.002  # of all examples


def check_inputs(x: Tensor, y: Tensor, *threats: Threat) -> Tensor:
    """Check the inputs of an attack, and return labels y as int64. It reads the images once.

    Raises:
        UserError: no examples, images x that are not float32 or float64 or leave [0, 1], labels that are not integers
            (N,), or a radius that is larger than the box. For a threat outside of the box (`in_box` False) pixels may
            have any value.
    """
    if not x.is_floating_point() or x.dtype not in (torch.float32, torch.float64):
        dtype = str(x.dtype).removeprefix("torch.")
        conversion = "x.float() / 255" if x.dtype == torch.uint8 else "x.float()"
        raise UserError(f"images are {dtype}: attacks need float32 or float64 in [0, 1], write {conversion}")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        dtype = str(y.dtype).removeprefix("torch.")
        raise UserError(f"labels are {dtype} {tuple(y.shape)}: {len(x)} images need as many integers, ({len(x)},)")
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
    out_of_range = (y < 0) | (y >= logits.shape[1])
    if bool(out_of_range.any()):
        index = int(out_of_range.int().argmax())
        raise UserError(f"example {index} has label {int(y[index])}, but the model has {logits.shape[1]} classes")
    finite = logits.amax(1).isfinite()  # -inf masks a class; NaN, +inf and a row of -inf do not pass
    if not bool(finite.all()):
        raise PoiseError(f"the model's output for example {int(finite.int().argmin())} is not finite: it has diverged")


def sanity_warnings(
    model: nn.Module, x: Tensor, y: Tensor, losses: Sequence[str] = ("cw",), bn_mode: BNMode = "eval"
) -> tuple[str, ...]:
    """Reasons why attacks on images x (N, ...) in [0, 1] with labels (N,) may fail although the model is not robust.

    There is one sentence for each of these: two forwards differ by more than 1e-4 of the largest logit; one image alone
    has other logits than in its batch; rows are probabilities; one of the `losses` that will be maximised, by name, has
    a gradient of exactly zero at some images; the model has no gradient at all. Costs three forwards, and a backward
    for each loss.
    """
    with attack_mode(model, bn_mode):
        point = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = model(point.clone())
            zero_gradients = {name: _count_zero_gradients(point, logits, y, name) for name in losses}
        first = logits.detach()
        tolerance = _RANDOMISED * _scale(first)
        randomised = _differ(first, scores(model, x), tolerance)
        batched = None if randomised else batch_dependence(model, x, first)
    warnings = []
    if randomised:
        warnings.append(
            f"{RANDOMISED}: two forwards of the same images differ, so that its robustness is overestimated "
            "unless gradients and predictions are averaged over draws: use version rand of AutoAttack, or draws"
        )
    if batched is not None:
        warnings.append(batched)
    if bool((first >= 0).all()) and bool(((first.sum(1) - 1).abs() < 1e-4).all()):
        warnings.append(
            "the model gives probabilities (rows that sum to 1) in place of logits: their gradients vanish where it is "
            "confident; remove the softmax"
        )
    if None in zero_gradients.values():
        warnings.append(NO_GRADIENT)
    counts = {name: count for name, count in zero_gradients.items() if count}
    if counts:
        per_loss = ", ".join(f"{LOSS_NAMES[name]}: {count}" for name, count in counts.items())
        warnings.append(
            f"{max(counts.values())} of {len(x)} examples have a gradient of exactly zero ({per_loss}): attacks that "
            "follow gradients cannot move there, only Square can"
        )
    return tuple(warnings)


LOSS_NAMES = {"ce": "cross entropy", "cw": "CW", "dlr": "DLR"}


def _count_zero_gradients(point: Tensor, logits: Tensor, y: Tensor, name: str) -> int | None:
    """The number of examples where the loss of this name has a gradient of exactly zero; None without any gradient."""
    losses = without_underflow(LOSSES[name])(logits, y)
    if not losses.requires_grad:
        return None
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        losses.sum(), point, retain_graph=True, allow_unused=True
    )
    gradient = gradients[0]
    if gradient is None:
        return None
    largest = gradient.flatten(1).abs().amax(1)  # (N,)
    return int((largest == 0).sum())


def batch_dependence(model: nn.Module, x: Tensor, batched: Tensor | None = None) -> str | None:
    """A warning if the first image alone has other logits than in the batch x (N, ...); otherwise None.

    None for a randomised model too, whose logits always differ. `batched` (N, K): the logits of the batch, if they are
    computed already. Call it in `attack_mode`.
    """
    if len(x) < 2:
        return None
    batched = scores(model, x) if batched is None else batched
    tolerance = _BATCHED * _scale(batched)
    try:
        alone = scores(model, x[:1])
        same = not _differ(batched[:1], alone, tolerance)
        randomised = not same and _differ(alone, scores(model, x[:1]), tolerance)
    except ValueError as error:  # torch refuses to normalise a batch of one value
        if isinstance(error, PoiseError) and not isinstance(error.__cause__, ValueError):
            raise  # an error that the model itself reports
        same = False
        randomised = False
    if same or randomised:
        return None
    return (
        "the model answers for one image alone otherwise than for the same image in its batch (such as BatchNorm "
        "without running statistics, or put into training mode by forward): the result depends on the batch size and "
        "on the other images"
    )


def _scale(logits: Tensor) -> Tensor:
    """The largest absolute value of a finite logit."""
    return logits.nan_to_num(nan=0, posinf=0, neginf=0).abs().max()


def _differ(one: Tensor, other: Tensor, tolerance: Tensor) -> bool:
    """Whether any two logits differ by more than `tolerance`; two masked classes (-inf) are equal."""
    return bool(((one - other).abs() > tolerance).any())  # -inf - -inf is NaN, which is not above the tolerance


def gradient_masking(before: Tensor, after: Tensor) -> str | None:
    """A warning if Square fooled more than 0.2 % of all examples, after every white-box attack had failed on them.

    Args:
        before, after: bool (N,), which examples were robust before Square and after it.
    """
    fooled = int((before & ~after).sum())
    if fooled <= _MASKING_SHARE * len(before):
        return None
    return (
        f"Square, which sees no gradient, fooled {fooled} of {len(before)} examples that withstood every attack with "
        "gradients: the model may mask them; try more restarts, or an attack made for this model"
    )
