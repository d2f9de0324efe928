"""Checks of what a method returned: the method may be code of the user, and its mistake is named where it is made.

They look at types and shapes only, so that no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from poise.user_code import MethodOutputError

__all__ = ["describe", "require_loss", "require_metrics", "require_tensors"]


def describe(value: Any) -> str:
    """A value in the words of a message: "a tensor of shape (3,)", or its type, such as "a float"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def require_loss(what: str, loss: Any, shape: tuple[int, ...]) -> None:
    """Raise MethodOutputError unless `loss` is a tensor of this shape with a gradient. Messages call it `what`."""
    expected = "a scalar tensor" if shape == () else f"a tensor of shape {shape}, one value per response,"
    if not isinstance(loss, Tensor) or loss.shape != shape:
        raise MethodOutputError(f"{what} is {describe(loss)}: it must be {expected} with a gradient")
    if not loss.requires_grad:
        raise MethodOutputError(
            f"{what} has no gradient: compute it from the logits without detach(), item() or no_grad()"
        )


def require_metrics(what: str, metrics: Any) -> None:
    """Raise MethodOutputError unless `metrics` maps names to detached scalar tensors, and no name is `loss`."""
    require_tensors(what, metrics)
    for name, value in metrics.items():
        if value.ndim:
            raise MethodOutputError(
                f"{what}[{name!r}] is {describe(value)}: it must be a scalar tensor, such as its mean()"
            )
    if "loss" in metrics:
        raise MethodOutputError(f"{what}['loss']: the loss itself has this name, call the metric otherwise")


def require_tensors(what: str, values: Any) -> None:
    """Raise MethodOutputError unless `values` maps names to detached tensors."""
    if not isinstance(values, Mapping):
        raise MethodOutputError(f"{what} is {describe(values)}: it must be a mapping from names to tensors")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise MethodOutputError(
                f"{what}[{name!r}] is {describe(value)}: it must be a tensor, such as torch.tensor(value)"
            )
        if value.requires_grad:
            raise MethodOutputError(f"{what}[{name!r}] has a gradient, which would keep its whole graph: detach() it")
